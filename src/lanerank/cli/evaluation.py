"""Commands that measure: does the instruction work, and what can go wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import BaseModel
from rich.markup import escape
from rich.table import Table

from lanerank.calibration import CalibrationMethod
from lanerank.cli.console import (
    STANDARD_STREAM,
    DeviceOption,
    ModelOption,
    UnsupportedOption,
    err,
    out,
    printable,
    progress_bar,
)
from lanerank.cli.outputs import check_output, check_outputs, new_files
from lanerank.errors import InputError
from lanerank.reranker import Reranker

# Commands import lanerank.evaluation when they run, because ranking must work without the extra.
if TYPE_CHECKING:
    from lanerank.evaluation import Comparison, Estimate, FollowingReport, ReportPart

ScenarioFiles = Annotated[list[Path], typer.Argument(help="Scenario files (JSONL, or .gz).")]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="OUT",
        help="Write the report here; `-` prints it.",
        callback=check_output,
    ),
]


def evaluate(
    *,
    files: ScenarioFiles,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    on_unsupported: UnsupportedOption = "raise",
    json_to: JsonOption = None,
) -> None:
    """Measure how well a model follows the instructions of graded scenarios.

    Needs the extra `lanerank[eval]`. Intervals are 95% bootstrap intervals over scenarios.
    """
    from lanerank import evaluation

    scenarios = evaluation.read_scenarios(files)
    reranker = Reranker.from_pretrained(model, device=device, on_unsupported=on_unsupported)
    with progress_bar("Scoring scenarios", len(scenarios), at_least=2) as progress:
        report = evaluation.evaluate(reranker, scenarios, progress=progress)
    title = f"{report.model}: {len(scenarios)} scenarios"
    _finish(report, json_to, title, report.rows())


def following(
    *,
    files: ScenarioFiles,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    on_unsupported: UnsupportedOption = "raise",
    condition: Annotated[
        list[str] | None,
        typer.Option(
            "--condition",
            "-c",
            help="irrelevant, negated, long or paraphrased; repeatable, by default all. "
            "`none` runs none of them.",
        ),
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Measure whether scores and ranks do what the instruction says, and what its wording matters.

    Flip accuracy, p-MRR, SICR, WISE and robustness, each beside what random scores give, and nDCG
    under irrelevant, negated, long and paraphrased instructions. Needs `lanerank[eval]`.
    """
    from lanerank import evaluation

    scenarios = evaluation.read_scenarios(files)
    chosen = evaluation.CONDITIONS
    if condition is not None:
        wanted = [name for name in condition if name != "none"]
        if unknown := [name for name in wanted if name not in evaluation.CONDITIONS]:
            raise InputError(
                f"`--condition` must be of {', '.join(evaluation.CONDITIONS)} or none, got "
                f"{unknown[0]!r}"
            )
        chosen = tuple(name for name in evaluation.CONDITIONS if name in wanted)
    reranker = Reranker.from_pretrained(model, device=device, on_unsupported=on_unsupported)
    with progress_bar("Scoring scenarios", len(scenarios), at_least=2) as progress:
        report = evaluation.measure_following(
            reranker, scenarios, conditions=chosen, progress=progress
        )
    if json_to != STANDARD_STREAM:
        _print_following(report)
    if json_to is not None:
        _write_json(report, json_to)


def calibration(
    *,
    files: ScenarioFiles,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    on_unsupported: UnsupportedOption = "raise",
    check: Annotated[
        CalibrationMethod | None,
        typer.Option(
            help="Fit a calibrator, and measure it under kinds of instruction it never saw."
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="With --check: write the calibrator into this model folder."),
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Measure whether a score means the same under every kind of instruction.

    Needs `lanerank[eval]`. A folder with a `calibration.json` loads as a calibrated model.
    """
    from lanerank import evaluation

    if save is not None and check is None:
        raise InputError("`--save` needs `--check`, which names the method to fit")
    if save is not None and not save.is_dir():
        raise InputError(f"`--save` {str(save)!r} is not a folder; give the folder of a model")
    scenarios = evaluation.read_scenarios(files)
    reranker = Reranker.from_pretrained(
        model, device=device, on_unsupported=on_unsupported, calibrated=check is None
    )
    with progress_bar("Scoring scenarios", len(scenarios), at_least=2) as progress:
        if check is None:
            report = evaluation.measure_calibration(reranker, scenarios, progress=progress)
            title = f"{report.model}: {report.pooled.pairs} pairs"
            rows = report.rows()
        else:
            checked = evaluation.check_calibrator(
                reranker, scenarios, method=check, progress=progress
            )
            title = f"{checked.model}, {check}: {checked.pooled.pairs} pairs, each kind held out"
            rows = checked.rows()
    _finish(report if check is None else checked, json_to, title, rows)
    if check is not None:
        worse = [kind for kind, each in checked.by_kind.items() if each.ece_change.low > 0]
        if worse:
            err.print(f"[yellow]Worse with the calibrator[/yellow]: {', '.join(worse)}")
    if save is not None:
        checked.calibrator.save(save)
        err.print(f"Calibrator written into {escape(str(save))}")


def injection(
    *,
    files: ScenarioFiles,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    on_unsupported: UnsupportedOption = "raise",
    attacks: Annotated[
        Path | None, typer.Option(help="A list of attacks of your own, in JSON.")
    ] = None,
    sample: Annotated[int, typer.Option(help="About how many documents to score.")] = 3000,
    threshold: Annotated[
        float, typer.Option(help="The score above which you use documents.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Which documents and attacks are drawn.")] = 0,
    json_to: JsonOption = None,
) -> None:
    """Put attacks into irrelevant documents, and measure what that does to scores and ranks.

    Each is compared with harmless text of the same length in the same place. Needs
    `lanerank[eval]`.
    """
    from lanerank import evaluation

    scenarios = evaluation.read_scenarios(files)
    suite = evaluation.read_attacks(attacks)
    reranker = Reranker.from_pretrained(model, device=device, on_unsupported=on_unsupported)
    with progress_bar("Scoring documents", sample, at_least=2) as progress:
        report = evaluation.measure_injection(
            reranker,
            scenarios,
            attacks=suite,
            sample=sample,
            threshold=threshold,
            seed=seed,
            progress=progress,
        )
    title = f"{report.model}: {report.overall.attacked} attacked documents"
    _finish(report, json_to, title, report.rows())
    if json_to == STANDARD_STREAM or not report.worst:
        return
    table = Table(title="The attacks that paid most", title_justify="left", expand=True)
    for heading in ("score", "rank"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("attack", "text put in", "instruction"):
        table.add_column(heading)
    for each in report.worst[:5]:
        table.add_row(
            f"{each.control_score:.2f} to {each.attacked_score:.2f}",
            f"{each.control_rank} to {each.attacked_rank}",
            printable(each.attack, 40),
            printable(each.injected, 160),
            printable(each.instruction, 120),
        )
    out.print(table)


def compare(
    *,
    files: Annotated[
        list[Path] | None, typer.Argument(help="Scenario files (JSONL); or use the TREC options.")
    ] = None,
    model: ModelOption = None,
    other_model: Annotated[
        str | None, typer.Option(help="Model B; by default the same model on both sides.")
    ] = None,
    instruction_a: Annotated[
        str | None,
        typer.Option(
            help="`none`, `own` (each query's own), or a text for all. By default none, and own "
            "where two models are compared."
        ),
    ] = None,
    instruction_b: Annotated[str | None, typer.Option(help="As for A. By default own.")] = None,
    device: DeviceOption = "auto",
    on_unsupported: UnsupportedOption = "raise",
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "--measure",
            "-m",
            help="A measure of ir-measures, such as RR@10 or 'P(rel=2)@5'; repeatable. By default "
            "nDCG@10 with the gain 2^grade - 1.",
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option(help="Differences below it do not matter; `neutral`: whether that is shown."),
    ] = 0.02,
    qrels: Annotated[Path | None, typer.Option(help="TREC: grades.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="TREC: run A, or the candidates to rank anew.")
    ] = None,
    other_run: Annotated[Path | None, typer.Option(help="TREC: run B, finished as A is.")] = None,
    topics: Annotated[
        Path | None, typer.Option(help="TREC: queries with their instructions (JSONL or TSV).")
    ] = None,
    documents: Annotated[Path | None, typer.Option(help="TREC: documents (JSONL).")] = None,
    depth: Annotated[int | None, typer.Option(help="TREC: candidates of each query.")] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", "-a", help="TREC: a field the model may see; repeatable."),
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Compare with and without the instruction, two instructions, two models, or two runs.

    By default the same model without (A) and with (B) the instructions of scenario files. Says how
    large the difference is, whether it could be chance, and whether other queries were left alone.
    Needs `lanerank[eval]`.
    """
    from lanerank import evaluation

    measures = tuple(measure) if measure else evaluation.DEFAULT_MEASURES
    if other_run is not None:
        if run is None or files or documents or depth or attribute:
            raise InputError(
                "`--other-run` compares finished runs: it needs `--run`, takes `--qrels` and "
                "`--topics`, and nothing that is for ranking anew"
            )
        known = evaluation.read_topics(topics) if topics else {}
        comparison = evaluation.compare_runs(
            evaluation.read_run(run),
            evaluation.read_run(other_run),
            evaluation.read_qrels(qrels) if qrels else None,
            labels=(run.name, other_run.name),
            instruction_aware={name: topic.instruction_aware for name, topic in known.items()},
            clusters={name: topic.cluster or name for name, topic in known.items()},
            measures=measures,
            margin=margin,
        )
        _finish_comparison(comparison, json_to)
        return
    if files and not (run or topics or documents or qrels):
        queries = evaluation.queries_from_scenarios(evaluation.read_scenarios(files))
    elif run and topics and documents and not files:
        queries = evaluation.read_trec(
            topics=topics,
            documents=documents,
            run=run,
            qrels=qrels,
            depth=depth,
            attributes=tuple(attribute or ()),
        )
    else:
        raise InputError(
            "give scenario files, or `--topics`, `--documents` and `--run` to rank anew, or "
            "`--run` and `--other-run` to compare finished runs"
        )

    def system(reranker: Reranker, instruction: str) -> evaluation.System:
        if instruction == "own":
            return evaluation.System(reranker)
        return evaluation.System(reranker, None if instruction == "none" else instruction)

    first = Reranker.from_pretrained(model, device=device, on_unsupported=on_unsupported)
    second = first
    if other_model is not None:
        second = Reranker.from_pretrained(other_model, device=device, on_unsupported=on_unsupported)
    a = system(first, instruction_a or ("none" if other_model is None else "own"))
    b = system(second, instruction_b or "own")
    with progress_bar("Ranking queries", len(queries), at_least=2) as progress:
        comparison = evaluation.compare(
            a, b, queries, measures=measures, margin=margin, progress=progress
        )
    _finish_comparison(comparison, json_to)


def report(
    *,
    files: ScenarioFiles,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page to write.", callback=check_output)
    ] = Path("lanerank-report.html"),
    model: ModelOption = None,
    device: DeviceOption = "auto",
    on_unsupported: UnsupportedOption = "raise",
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="comparison, following, calibration or injection; repeatable, by default all."
        ),
    ] = None,
    title: Annotated[str, typer.Option(help="The heading.")] = "Does the instruction work?",
    sample: Annotated[int, typer.Option(help="About how many documents to attack.")] = 3000,
    json_to: JsonOption = None,
) -> None:
    """Write one page that says whether the instruction works: with pictures, in plain words.

    The page is self-contained, runs no script and can be passed on. Needs `lanerank[eval]`.
    """
    from lanerank import evaluation

    parts: tuple[ReportPart, ...] = evaluation.REPORT_PARTS
    if part:
        if unknown := [name for name in part if name not in evaluation.REPORT_PARTS]:
            raise InputError(
                f"`--part` must be of {', '.join(evaluation.REPORT_PARTS)}, got {unknown[0]!r}"
            )
        parts = tuple(name for name in evaluation.REPORT_PARTS if name in part)
    if json_to is not None:
        # Each is in order alone; here the page could still be lost to the JSON.
        check_outputs({"--output": output, "--json": Path(json_to)})
    scenarios = evaluation.read_scenarios(files)
    reranker = Reranker.from_pretrained(model, device=device, on_unsupported=on_unsupported)
    with progress_bar("Measuring", len(scenarios), at_least=0) as progress:
        found = evaluation.make_report(
            reranker,
            scenarios,
            parts=parts,
            title=title,
            sample=sample,
            progress=lambda name, done, total: progress(done, total, f"Measuring {name}"),
        )
    with new_files({"--output": output}) as [page]:
        page.write_text(found.to_html(), encoding="utf-8")
    err.print(f"Page written to {escape(str(output))}")
    if json_to is not None:
        _write_json(found, json_to)


def snapshot(
    *,
    files: Annotated[list[Path], typer.Argument(help="Files of cases or scenarios (JSONL).")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The snapshot to write.", callback=check_output)
    ],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    on_unsupported: UnsupportedOption = "raise",
) -> None:
    """Record how your own queries are ranked, to see later what moved.

    A case is one line: `{"id", "query", "instruction", "documents": [{"text", ...}]}`. The
    snapshot holds scores and hashes, no texts. Needs `lanerank[eval]`.
    """
    from lanerank import evaluation

    cases = evaluation.read_cases(files)
    reranker = Reranker.from_pretrained(model, device=device, on_unsupported=on_unsupported)
    with progress_bar("Ranking cases", len(cases), at_least=2) as progress:
        taken = evaluation.take_snapshot(reranker, cases, progress=progress)
    taken.save(output)
    err.print(f"{len(cases)} cases of {escape(taken.model)} written to {escape(str(output))}")


def check(
    *,
    recorded: Annotated[Path, typer.Argument(metavar="SNAPSHOT", help="What `snapshot` wrote.")],
    files: Annotated[list[Path], typer.Argument(help="Files of cases or scenarios (JSONL).")],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    on_unsupported: UnsupportedOption = "raise",
    score_tolerance: Annotated[
        float, typer.Option(help="The largest change of a score that is no drift.")
    ] = 0.02,
    ranks_only: Annotated[
        bool, typer.Option("--ranks-only", help="Judge ranks, whatever scores do.")
    ] = False,
    rank_tolerance: Annotated[int, typer.Option(help="Places a document may move.")] = 0,
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Judge ranks to this depth.")] = 10,
    json_to: JsonOption = None,
) -> None:
    """Rank the cases of a snapshot again, and say what moved.

    Exits with 0 if nothing moved beyond tolerance, 1 if something did, 2 on errors. Needs
    `lanerank[eval]`.
    """
    from lanerank import evaluation

    earlier = evaluation.Snapshot.load(recorded)
    cases = evaluation.read_cases(files)
    reranker = Reranker.from_pretrained(model, device=device, on_unsupported=on_unsupported)
    with progress_bar("Ranking cases", len(cases), at_least=2) as progress:
        drift = evaluation.check_snapshot(
            earlier,
            reranker,
            cases,
            score_tolerance=None if ranks_only else score_tolerance,
            rank_tolerance=rank_tolerance,
            top_k=top_k,
            progress=progress,
        )
    if json_to != STANDARD_STREAM:
        out.print(str(drift), markup=False, highlight=False, soft_wrap=True)
    if json_to is not None:
        _write_json(drift, json_to)
    if not drift.ok:
        raise typer.Exit(1)


def _finish(
    found: BaseModel, json_to: str | None, title: str, rows: Iterable[tuple[str, Estimate]]
) -> None:
    """Print the estimates, unless JSON goes to standard output; write JSON where it is wanted."""
    if json_to != STANDARD_STREAM:
        table = Table(title=escape(title), title_justify="left")
        table.add_column("measure")
        for heading in ("value", "95% interval", "n"):
            table.add_column(heading, justify="right")
        estimates = list(rows)
        for name, estimate in estimates:
            interval = estimate.bounds(between=" to ")
            table.add_row(escape(name), f"{estimate.value:.3f}", interval, str(estimate.n))
        out.print(table)
        if any(estimate.clusters == 1 for _, estimate in estimates):
            out.print(
                "no interval: the value rests on one scenario, and says nothing of others",
                style="dim",
                highlight=False,
            )
    if json_to is not None:
        _write_json(found, json_to)


def _write_json(found: BaseModel, json_to: str) -> None:
    text = found.model_dump_json(indent=2)
    if json_to == STANDARD_STREAM:
        typer.echo(text)
        return
    with new_files({"--json": Path(json_to)}) as [file]:
        file.write_text(text + "\n", encoding="utf-8")
    err.print(f"Report written to {escape(json_to)}")


def _print_following(report: FollowingReport) -> None:
    def cell(estimate: Estimate | None) -> str:
        if estimate is None:
            return ""
        return f"{estimate.value:.3f}\n[dim]{estimate.bounds(between=' to ')}[/dim]"

    table = Table(
        title=f"{escape(report.model)}: {report.lanes} lanes with an instruction",
        title_justify="left",
    )
    table.add_column("measure")
    for heading in ("model", "random scores", "grades as scores"):
        table.add_column(heading, justify="right")
    for name, measured in report.measures():
        table.add_row(name, *map(cell, (measured.model, measured.random, measured.oracle)))
    out.print(table)
    table = Table(title="In the place of the instruction", title_justify="left")
    table.add_column("condition")
    for heading in ("nDCG@10", "against withheld", "against matched", "score drift"):
        table.add_column(heading, justify="right")
    for condition, found in report.conditions.items():
        table.add_row(condition, *map(cell, (found.ndcg, found.lift, found.change, found.drift)))
    out.print(table)


def _finish_comparison(comparison: Comparison, json_to: str | None) -> None:
    if json_to != STANDARD_STREAM:
        _print_comparison(comparison)
    if json_to is not None:
        _write_json(comparison, json_to)


def _print_comparison(comparison: Comparison) -> None:
    from lanerank.evaluation import measure_label

    for name, side in (("A", comparison.a), ("B", comparison.b)):
        model = f" ({side.model})" if side.model else ""
        out.print(f"{name}: {printable(side.label + model, 100)}", highlight=False)
    table = Table()
    table.add_column("queries")
    for heading in ("A", "B", "B - A", "p", "+ / = / -", "neutral"):
        table.add_column(heading, justify="right")
    for name, group in comparison.groups():
        for measure, found in group.measures.items():
            change = found.difference
            table.add_row(
                f"{name} ({group.queries})\n[dim]{printable(measure_label(measure), 40)}[/dim]",
                f"{found.a.value:.3f}",
                f"{found.b.value:.3f}",
                f"{change.value:+.3f}\n[dim]{change.bounds('+', between=' to ')}[/dim]",
                f"{found.p_adjusted:.3f}",
                f"{found.wins} / {found.ties} / {found.losses}",
                {True: "yes", False: "no", None: "?"}[found.neutral],
            )
        if not group.measures:
            table.add_row(f"{name} ({group.queries})", "no labels")
    out.print(table)
    for name, group in comparison.groups():
        out.print(
            f"{name}: rank-biased overlap {group.rbo.value:.3f}, "
            f"{group.same_order} of {group.queries} queries in the same order",
            highlight=False,
        )
    out.print(f"p: {escape(comparison.test)}", style="dim", highlight=False)
    if comparison.pooled.measures:
        out.print(
            f"neutral: does the interval of B - A lie within {comparison.margin:g} of 0, so that "
            "the difference does not matter? 'no' says that this is not shown, '?' that there are "
            "too few queries to tell",
            style="dim",
            highlight=False,
        )
    moved = [query for query in comparison.per_query if query.moved][:5]
    for query in moved:
        documents = ", ".join(
            f"{printable(each.id, 30)} {each.rank_a or '-'} to {each.rank_b or '-'}"
            for each in query.moved
        )
        out.print(f"changed most: {printable(query.id, 40)}: {documents}", highlight=False)
