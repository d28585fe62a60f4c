"""`lanerank judge`: scores for documents, from a panel of judges that compare them in pairs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from lanerank.cli.console import JsonFlag, err, out, print_json, printable, progress_bar
from lanerank.cli.outputs import OverwriteFlag, check_outputs, new_files
from lanerank.errors import InputError, JudgeError

if TYPE_CHECKING:
    from lanerank.training import (
        Cost,
        Entry,
        Judge,
        Judgements,
        JudgePanel,
        JudgeProgress,
        JudgingPlan,
        ObedienceReport,
        Quadruple,
        Tournament,
    )

_CHARACTERS_PER_TOKEN = 4
_ANSWER_CHARACTERS = 300
"""As `JudgingPlan` has them."""

_PANEL = "The panel"
_TOURNAMENT = "The tournament"
_Prices = tuple[float | None, float | None]
"""Of a million tokens sent, and of a million answered."""


def _check_prior(prior: float) -> float:
    if not 0 < prior < float("inf"):
        raise InputError(f"`--prior` must be a number of games above 0, got {prior!r}")
    return prior


def judge(
    *,
    entries: Annotated[
        Path,
        typer.Argument(
            metavar="ENTRIES",
            help="What to compare: lines with `query`, `instruction` (or null) and `document`, as "
            "JSONL, JSONL.gz or Parquet. Quadruples will do; their scores are not read.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Quadruples with uncertainty: .jsonl, .jsonl.gz or .parquet."
        ),
    ],
    judges: Annotated[
        list[str],
        typer.Option(
            "--judge",
            metavar="MODULE:NAME",
            help="A judge in a module of yours, looked for in the current folder first: a "
            "LangChain chat model, a LlamaIndex LLM, a function from a prompt to a reply, or a "
            "`lanerank.training.Judge`. Repeatable; votes are averaged.",
        ),
    ],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what judging would take; ask and write nothing."),
    ] = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Remembers every answer, under the judge's name; by default OUT.judge.sqlite.",
        ),
    ] = None,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
    games: Annotated[
        int,
        typer.Option(
            help="How many others each document is compared with under its request, an even "
            "number: half as many random cycles through all of them.",
            rich_help_panel=_PANEL,
        ),
    ] = 4,
    all_pairs_up_to: Annotated[
        int,
        typer.Option(
            help="Requests with so many documents or fewer compare all with all.",
            rich_help_panel=_PANEL,
        ),
    ] = 6,
    cross_documents: Annotated[
        int,
        typer.Option(
            help="How many documents of a query are also compared across its instructions, which "
            "puts these on one scale.",
            rich_help_panel=_PANEL,
        ),
    ] = 0,
    order: Annotated[
        Literal["random", "both"],
        typer.Option(
            help="Which of a pair is shown first: one drawn at random, or each in turn, which asks "
            "twice as much.",
            rich_help_panel=_PANEL,
        ),
    ] = "random",
    controls: Annotated[
        int,
        typer.Option(
            min=0,
            help="Judge so many clearly decided pairs again with an order inside the worse "
            "document, and with neutral text: do the judges obey documents? OUT is written "
            "before, and the command exits with 1 if a judge fails here.",
            rich_help_panel=_PANEL,
        ),
    ] = 0,
    seed: Annotated[
        int, typer.Option(help="Draws pairs, orders and controls.", rich_help_panel=_PANEL)
    ] = 0,
    concurrency: Annotated[
        int, typer.Option(help="Questions under way at a time.", rich_help_panel=_PANEL)
    ] = 4,
    max_failures: Annotated[
        int,
        typer.Option(
            help="Questions that may stay without an answer before the command gives up.",
            rich_help_panel=_PANEL,
        ),
    ] = 0,
    input_price: Annotated[
        float | None,
        typer.Option(min=0, help="The price of a million tokens sent.", rich_help_panel=_PANEL),
    ] = None,
    output_price: Annotated[
        float | None,
        typer.Option(min=0, help="The price of a million tokens answered.", rich_help_panel=_PANEL),
    ] = None,
    model: Annotated[
        Literal["bradley-terry", "thurstone"],
        typer.Option(
            help="The curve from strengths to chances: logistic, or normal.",
            rich_help_panel=_TOURNAMENT,
        ),
    ] = "bradley-terry",
    prior: Annotated[
        float,
        typer.Option(
            # As an argument, since the fit checks it only when judges have been paid.
            callback=_check_prior,
            help="Drawn games that each document is taken to have played besides: they keep one "
            "that won every game at a finite strength.",
            rich_help_panel=_TOURNAMENT,
        ),
    ] = 0.5,
    grades: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Quadruples that score a few of the entries; the scale is fitted to them, so that "
            "scores of different queries compare.",
            rich_help_panel=_TOURNAMENT,
        ),
    ] = None,
    source: Annotated[
        str, typer.Option(help="The `source` of the quadruples.", rich_help_panel=_TOURNAMENT)
    ] = "tournament",
) -> None:
    """Let judges compare documents in pairs, and turn their answers into scores to train on.

    Judges see the query, the instruction and two documents as quoted data. A run that is broken off
    goes on when called again: answers are remembered by the judge's name (MODULE:NAME, or that of
    a `Judge`), so give another name or cache to another model. Needs `lanerank[train]`.
    """
    from lanerank import training

    if not dry_run:
        # Before anybody is paid for answers.
        check_outputs({"OUT": output}, overwrite=overwrite, quadruples=True)
    field = training.read_entries(entries)
    pairs = training.plan_pairs(
        field,
        games=games,
        all_pairs_up_to=all_pairs_up_to,
        cross_documents=cross_documents,
        seed=seed,
    )
    if not pairs:
        raise InputError(
            f"{str(entries)!r} has no two documents with the same query and instruction, so there "
            "is nothing to compare; give several documents of each query"
        )
    anchors = _anchors(field, training.read_quadruples(grades)) if grades else {}
    panel = training.JudgePanel(
        [load_judge(each) for each in judges],
        cache=output.with_name(f"{output.name}.judge.sqlite") if cache is None else cache,
        order=order,
        seed=seed,
        concurrency=concurrency,
        max_failures=max_failures,
    )
    prices = (input_price, output_price)
    plan = panel.plan(field, pairs)
    if dry_run:
        _print_plan(plan, field, panel, pairs, controls, prices, as_json=as_json)
        return
    with (
        _interruptible(panel, "the same command goes on from here"),
        progress_bar("Judging", plan.questions, at_least=1) as progress,
    ):
        found = panel.compare(field, pairs, progress=_telling("Judging", progress, prices))
    try:
        fitted = training.fit_tournament(
            field, found.comparisons, grades=anchors, model=model, prior=prior, source=source
        )
    except InputError as error:
        error.add_note(f"what the judges answered is kept in {str(panel.cache)!r}")
        raise
    with new_files({"OUT": output}, overwrite=overwrite) as [file]:
        training.write_quadruples(file, fitted.quadruples)
    # Only now: controls that fail must not cost the scores.
    with _interruptible(
        panel,
        f"{str(output)!r} is written; the same command with --overwrite goes on with the controls",
    ):
        obedience, failure = _check_obedience(panel, field, found, controls, seed, prices)
    warnings = [
        *found.warnings(),
        *fitted.report.warnings(),
        *(_doubts(obedience, failure, output) if controls else ()),
    ]
    for warning in warnings:
        err.print(f"[yellow]Warning:[/yellow] {printable(warning, 1000)}", soft_wrap=True)
    if as_json:
        print_json(
            {
                "judging": found.model_dump(mode="json"),
                "tournament": fitted.report.model_dump(mode="json"),
                "obedience": obedience.model_dump(mode="json") if obedience else None,
                "warnings": warnings,
            }
        )
    else:
        _print_found(found, fitted, obedience, prices)
        out.print(
            f"{len(fitted.quadruples):,} rows in {printable(str(output), 200)}",
            highlight=False,
            soft_wrap=True,
        )
    if failure is not None:
        raise typer.Exit(1)


def load_judge(name: str) -> Judge:
    """The judge that a module of the user's holds.

    Args:
        name: The module and a name in it, `module:name`, dots allowed in both.

    Raises:
        InputError: There is no such module or name, or what is there is no judge.
    """
    from lanerank.training import Judge

    module_name, _, attributes = name.partition(":")
    if not module_name or not attributes:
        raise InputError(f"`--judge` must be MODULE:NAME, such as judges:model, got {name!r}")
    # The program starts in the folder of its script; a user means the one they stand in.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # What the module itself fails to import is for its author to see.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"`--judge` {name!r}: there is no module {error.name!r} in the current folder or "
            "installed; give the name of the file without .py"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise InputError(
                f"`--judge` {name!r}: {module_name!r} has no {attributes!r}; give a name that it "
                "defines"
            )
        found = getattr(found, attribute)
    if isinstance(found, Judge):
        return found
    try:
        return Judge(found, name=name)
    except InputError as error:
        error.add_note(f"this is what `--judge` {name!r} names")
        raise


def _anchors(entries: Sequence[Entry], grades: Sequence[Quadruple]) -> dict[int, float]:
    """The scores of those entries that are graded, by their position."""
    places = {(entry.request_key, entry.document_key): place for place, entry in enumerate(entries)}
    known = {
        places[key]: row.score
        for row in grades
        if (key := (row.request_key, row.document_key)) in places
    }
    if not known:
        raise InputError(
            "`--grades` has no row of an entry: query, instruction and document (or their ids) "
            "must be the same as in ENTRIES"
        )
    err.print(f"{len(known):,} of {len(entries):,} entries are graded.", highlight=False)
    return known


@contextmanager
def _interruptible(panel: JudgePanel, remedy: str) -> Iterator[None]:
    """Let a person break off questions, and tell them how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(
            f"Interrupted; answers are kept in {printable(str(panel.cache), 200)}, and "
            f"{printable(remedy, 400)}.",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None


def _check_obedience(
    panel: JudgePanel,
    entries: Sequence[Entry],
    found: Judgements,
    wanted: int,
    seed: int,
    prices: _Prices,
) -> tuple[ObedienceReport | None, JudgeError | None]:
    """Judge decided pairs again with orders in the worse document, where that is wanted."""
    from lanerank import training

    if not wanted:
        return None, None
    chosen = training.find_clear_pairs(entries, found.comparisons, count=wanted, seed=seed)
    if not chosen:
        return None, None
    if len(chosen) < wanted:
        err.print(f"Only {len(chosen)} pairs are clear enough for `--controls`.", highlight=False)
    made = training.make_controls(entries, chosen, seed=seed)
    total = panel.plan(made.entries, made.pairs).questions
    try:
        with progress_bar("Controls", total, at_least=1) as progress:
            telling = _telling("Controls", progress, prices)
            return training.measure_obedience(panel, made, progress=telling), None
    except JudgeError as error:
        return None, error


def _doubts(
    obedience: ObedienceReport | None, failure: JudgeError | None, output: Path
) -> list[str]:
    """What a person should know of the controls that they asked for."""
    if failure is not None:
        return [
            f"{str(output)!r} is written, but the controls broke off, so that nothing is known of "
            "orders inside documents. Give the same command with --overwrite once the judge "
            "answers, or with a larger --max-failures as well; what was answered is not asked "
            f"again. The error: {failure}"
        ]
    if obedience is None:
        return ["No pair was decided clearly enough for `--controls`."]
    return obedience.warnings()


def _telling(
    label: str,
    progress: Callable[[int, int, str], None] | None,
    prices: _Prices,
) -> JudgeProgress | None:
    """A progress bar that also shows what was spent."""
    if progress is None:
        return None

    def tell(done: int, total: int, cost: Cost) -> None:
        progress(done, total, f"{label} ({_describe_cost(cost, prices)})")

    return tell


def _tokens(cost: Cost) -> tuple[int, int]:
    """The tokens sent and answered: as the models count them, else guessed from the letters."""
    if cost.metered_calls == cost.calls:
        return cost.input_tokens, cost.output_tokens
    return (
        cost.characters_sent // _CHARACTERS_PER_TOKEN,
        cost.characters_received // _CHARACTERS_PER_TOKEN,
    )


def _describe_cost(cost: Cost, prices: _Prices) -> str:
    sent, received = _tokens(cost)
    about = "" if cost.metered_calls == cost.calls else "about "
    said = f"{cost.calls:,} calls, {about}{sent:,} tokens sent, {received:,} answered"
    price = _price(sent, received, prices)
    return said if price is None else f"{said}, cost {price:,.2f}"


def _price(sent: int, received: int, prices: _Prices) -> float | None:
    if prices == (None, None):
        return None
    return (sent * (prices[0] or 0) + received * (prices[1] or 0)) / 1e6


def _print_plan(
    plan: JudgingPlan,
    entries: Sequence[Entry],
    panel: JudgePanel,
    pairs: Sequence[tuple[int, int]],
    controls: int,
    prices: _Prices,
    *,
    as_json: bool,
) -> None:
    from lanerank.training import JudgePanel

    whole = JudgePanel(panel.judges, order=panel.order, seed=panel.seed).plan(entries, pairs)
    # Which pairs will be controls is known when they are judged. Two versions of each are new.
    extra = 2 * min(controls, plan.pairs) * whole.questions // plan.pairs
    letters = plan.characters_sent + extra * whole.characters_sent // whole.questions
    calls = plan.calls + extra
    sent = letters // _CHARACTERS_PER_TOKEN
    received = calls * _ANSWER_CHARACTERS // _CHARACTERS_PER_TOKEN
    cost = _price(sent, received, prices)
    facts: dict[str, int | float | None] = {
        "entries": len(entries),
        "requests": len({entry.request_key for entry in entries}),
        "judges": len(panel.judges),
        "pairs": plan.pairs,
        "questions": plan.questions,
        "remembered": plan.remembered,
        "calls_for_controls": extra,
        "calls": calls,
        "tokens_sent": sent,
        "tokens_answered": received,
        "cost": cost,
    }
    if as_json:
        print_json(facts)
        return
    table = Table(title="What judging would take", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.items():
        if value is not None:
            shown = f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"
            table.add_row(name.replace("_", " "), shown)
    out.print(table)
    out.print(
        "Tokens are guessed: four letters each, and answers of 300 letters. Answers that cannot be "
        "read are asked for again."
        + ("" if cost is not None else " `--input-price` and `--output-price` give the cost."),
        style="dim",
    )


def _print_found(
    found: Judgements, fitted: Tournament, obedience: ObedienceReport | None, prices: _Prices
) -> None:
    report = fitted.report
    measures = {
        "preference for the entry shown first": found.position_bias,
        "preferences that the swap turned": found.order_flips,
        "agreement of two judges": found.judge_agreement,
        "triples that go round in a circle": report.intransitive,
        "comparisons won by the weaker": report.upsets,
        "distance of games from the fit": report.residual,
        "distance of scores from grades": report.anchor_error,
    }
    if obedience is not None:
        measures |= {
            "controls: judged right as they are": obedience.accuracy,
            "controls: turned by an order": obedience.obeyed,
            "controls: turned by neutral text": obedience.obeyed_neutral,
        }
    table = Table(
        title=f"{report.comparisons:,} comparisons of {report.entries:,} entries",
        title_justify="left",
    )
    table.add_column("measure")
    for heading in ("value", "95% interval", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, estimate in measures.items():
        if estimate is not None:
            interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
            table.add_row(name, f"{estimate.value:.3f}", interval, f"{estimate.n:,}")
    out.print(table)
    cost = found.cost if obedience is None else found.cost + obedience.cost
    out.print(
        f"{_describe_cost(cost, prices)}; {found.remembered:,} of {found.questions:,} answers were "
        "remembered",
        highlight=False,
        soft_wrap=True,
    )
