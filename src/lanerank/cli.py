"""The command line: rank a file, see the demo, evaluate a model."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from importlib.metadata import version as version_of
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lanerank.comparison import RankingComparison, compare_rankings
from lanerank.contracts import Lane, LongDocuments, Ranking
from lanerank.display import one_line
from lanerank.errors import FileFormatError, InputError, LanerankError
from lanerank.instruction import Instruction
from lanerank.reranker import OnUnsupported, Reranker
from lanerank.template import contract_for, contracts, known_models

app = typer.Typer(
    name="lanerank",
    help="Re-rank documents with instructions.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="List the models that lanerank knows how to ask.")
app.add_typer(models_app, name="models")
out = Console()
err = Console(stderr=True)

_STANDARD_INPUT = "-"
_INSTRUCTION = {
    (True, True): "instruction isolated",
    (True, False): "instruction open",
    (False, False): "instruction none",
}
_LANE_STYLES = {Lane.INSTRUCTION: "green", Lane.QUERY: "cyan", Lane.DOCUMENT: "yellow"}
_PROGRESS_FROM = 200
"""Below this many documents a progress bar would only flicker."""

ModelOption = Annotated[
    str | None,
    typer.Option(help="A folder or a Hugging Face id; by default the model in the package."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback(invoke_without_command=True)
def _root(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Re-rank documents with instructions."""
    if version:
        out.print(version_of("lanerank"), highlight=False)
        raise typer.Exit


@app.command()
def rank(
    *,
    query: Annotated[str, typer.Option("--query", "-q", help="What is searched for.")],
    file: Annotated[
        str,
        typer.Argument(
            help="JSONL (objects with `text`, or strings) or plain lines; `-` is standard input."
        ),
    ] = _STANDARD_INPUT,
    instruction: Annotated[
        str | None, typer.Option("--instruction", "-i", help="What relevance means here.")
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", "-a", help="A metadata field the model may see; repeatable."),
    ] = None,
    today: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="The date from which the ages of dates count."),
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", help="Keep this many.")] = None,
    long_documents: Annotated[
        LongDocuments, typer.Option(help="Cut long documents, or score windows of them.")
    ] = "truncate",
    on_unsupported: Annotated[
        OnUnsupported,
        typer.Option(help="What to do if the model has no channel for the instruction."),
    ] = "raise",
    as_json: JsonFlag = False,
) -> None:
    """Rank the documents of a file, best first.

    Each line of the input is a document. A line that begins with `{` or `"` makes the file JSONL:
    objects need a `text` and may have an `id` and `metadata`; their other keys count as metadata.
    """
    documents = list(_read_documents(file))
    reranker = Reranker.from_pretrained(
        model, device=device, long_documents=long_documents, on_unsupported=on_unsupported
    )
    with _progress("Ranking", len(documents)) as progress:
        ranking = reranker.rank(
            query,
            documents,
            instruction=Instruction(instruction, today=today.date() if today else None),
            attributes=tuple(attribute or ()),
            top_k=top_k,
            progress=progress,
        )
    if as_json:
        report = ranking.model_dump(mode="json")
        for result in report["results"]:
            # JSON has no word for what is not finite; `non_finite` lists these.
            if not math.isfinite(result["score"]):
                result["score"] = None
        _print_json(report)
        return
    _print_ranking(ranking)


@app.command()
def demo(
    *,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    top_k: Annotated[int, typer.Option("--top-k", "-k", help="Rows of the second table.")] = 8,
) -> None:
    """Re-rank two small corpora, each under different instructions; needs no network."""
    data = json.loads((files("lanerank") / "demo.json").read_text(encoding="utf-8"))
    reranker = Reranker.from_pretrained(model, device=device)
    for name in ("imo", "corpus"):
        _demonstrate(reranker, data[name], top_k)


@app.command()
def evaluate(
    *,
    files: Annotated[list[Path], typer.Argument(help="Scenario files (JSONL).")],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    on_unsupported: Annotated[
        OnUnsupported, typer.Option(help="What to do if the model takes no instructions.")
    ] = "raise",
    json_to: Annotated[
        str | None,
        typer.Option("--json", metavar="OUT", help="Write the report here; `-` prints it."),
    ] = None,
) -> None:
    """Measure how well a model follows the instructions of graded scenarios.

    Needs the extra `lanerank[eval]`. Intervals are 95% bootstrap intervals over scenarios.
    """
    # Here, because ranking must work without the extra.
    from lanerank import evaluation

    scenarios = evaluation.read_scenarios(files)
    reranker = Reranker.from_pretrained(model, device=device, on_unsupported=on_unsupported)
    with _progress("Scoring scenarios", len(scenarios), at_least=2) as progress:
        report = evaluation.evaluate(reranker, scenarios, progress=progress)
    text = report.model_dump_json(indent=2)
    if json_to == _STANDARD_INPUT:
        typer.echo(text)
        return
    table = Table(title=f"{report.model}: {len(scenarios)} scenarios", title_justify="left")
    table.add_column("measure")
    for heading in ("value", "95% interval", "n"):
        table.add_column(heading, justify="right")
    for name, estimate in report.rows():
        interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
        table.add_row(name, f"{estimate.value:.3f}", interval, str(estimate.n))
    out.print(table)
    if json_to is not None:
        Path(json_to).write_text(text + "\n", encoding="utf-8")
        err.print(f"Report written to {escape(json_to)}")


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, *, as_json: JsonFlag = False) -> None:
    """List the models whose exact prompt lanerank knows.

    Any of them loads by its id, as `--model ID` or `Reranker.from_pretrained("ID")`; the weights
    are fetched when you ask for them. Others need a contract: `models show` has examples.
    """
    if context.invoked_subcommand is not None:
        return
    if as_json:
        _print_json(
            [
                {
                    "model": model,
                    "kind": contract.kind,
                    "instructions": contract.supports_instructions,
                    "isolates_instruction": contract.isolates_instruction,
                    "parameters": contract.models[model].parameters,
                    **contract.model_dump(include={"family", "licence", "languages", "verified"}),
                }
                for model, contract in known_models()
            ]
        )
        return
    out.print(
        "[bold]lanerank-mini[/bold], in the package: instruction isolated; Apache-2.0; English"
    )
    for contract in contracts():
        how = _INSTRUCTION[contract.supports_instructions, contract.isolates_instruction]
        how = "refused" if contract.kind == "refused" else how
        facts = f"{how}; {contract.licence}; {contract.languages}"
        out.print(f"\n[bold]{contract.family}[/bold]: {escape(facts)}", highlight=False)
        for model, each in contract.models.items():
            out.print(f"  {escape(model)}  [dim]{each.parameters or ''}[/dim]", highlight=False)
        out.print(f"  [dim]{escape(contract.verified)}[/dim]", highlight=False)
    out.print(
        "\nIsolated: no document can change how the instruction is read. Open: the document comes "
        "first and can. None: the model takes no instruction, see `--on-unsupported`. "
        "`lanerank models show ID` has the prompt and its sources."
    )


@models_app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="ID", help="A model id, or a family.")],
    *,
    query: Annotated[str, typer.Option("--query", "-q")] = "candidates with IMO experience",
    instruction: Annotated[
        str, typer.Option("--instruction", "-i", help="Empty shows the prompt without one.")
    ] = "We are a marine logistics company.",
    document: Annotated[
        str, typer.Option("--document", "-d", help="Try one that imitates the markers.")
    ] = "Ten years of port-state inspections of tankers.",
) -> None:
    """Show how a model is asked, the lanes in colours, and where that is known from."""
    contract = contract_for(name)
    facts = contract.model_dump(
        include={"family", "kind", "licence", "languages", "max_tokens", "verified", "notes"}
    )
    if contract.kind == "refused":
        facts = {"family": contract.family, "refused": contract.reason}
    elif contract.kind == "causal_lm":
        facts["isolates_instruction"] = contract.isolates_instruction
    for key, value in facts.items():
        if value not in ("", None):
            out.print(f"[bold]{key}[/bold]: {escape(str(value))}", highlight=False)
    for source in contract.sources:
        out.print(f"[bold]source[/bold]: {escape(source)}", highlight=False)
    if contract.kind != "causal_lm":
        return
    prompt = Text()
    for piece in contract.render(query=query, instruction=instruction, document=document):
        style = "dim" if piece.lane is None else _LANE_STYLES[piece.lane]
        prompt.append(
            "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in piece.text), style
        )
    legend = Text("  ").join(Text(lane.name.lower(), style) for lane, style in _LANE_STYLES.items())
    chat = ", as the user's turn of the model's own chat template" if contract.chat else ""
    out.print(f"\n[bold]prompt[/bold]{chat}:", legend)
    out.print(prompt)
    if contract.answers is not None:
        tokens = [contract.answers.positive, contract.answers.negative]
        read = " minus ".join(repr(answer.token) for answer in tokens if answer)
        out.print(
            f"[bold]score[/bold]: sigmoid of the logit of {escape(read)}, "
            f"less {contract.mapping.shift:g}, over {contract.mapping.scale:g}",
            highlight=False,
        )


def main() -> None:
    """Run the command line; a mistake of the user's is one line, not a traceback."""
    # What a library has to say about itself is no part of a ranking.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.ERROR)
    try:
        app()
    except LanerankError as error:
        err.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except OSError as error:
        err.print(f"[red]Error:[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)


def _read_documents(file: str) -> Iterator[str | dict[str, Any]]:
    if file == _STANDARD_INPUT:
        if sys.stdin.isatty():
            err.print("Reading documents from standard input, one a line; end with Ctrl-D.")
        yield from _parse_lines("<stdin>", sys.stdin.buffer)
        return
    path = Path(file)
    if not path.is_file():
        raise InputError(f"`FILE` {file!r} is not a file; pass a path, or `-` for standard input")
    with path.open("rb") as lines:
        yield from _parse_lines(file, lines)


def _parse_lines(name: str, lines: Iterable[bytes]) -> Iterator[str | dict[str, Any]]:
    """Documents of a file; its first line with content decides whether it is JSONL."""
    is_json: bool | None = None
    for number, raw in enumerate(lines, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise FileFormatError(name, number, f"not UTF-8 ({error.reason})") from error
        if not line:
            continue
        if is_json is None:
            is_json = line[0] in '{"'
        if not is_json:
            yield line
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(name, number, f"not JSON ({error}): {line[:60]!r}") from error
        if isinstance(value, dict) and not isinstance(value.get("text"), str):
            raise FileFormatError(
                name, number, f"no 'text' that is a string; keys are {sorted(value)}"
            )
        if not isinstance(value, (dict, str)):
            raise FileFormatError(name, number, "neither an object with a 'text' nor a string")
        yield value


@contextmanager
def _progress(label: str, total: int, *, at_least: int = _PROGRESS_FROM) -> Iterator[Any]:
    """A bar on standard error for long work; gives a callback `(done, total)`, or None."""
    if total < at_least:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


def _print_json(value: object) -> None:
    # ASCII, because a document may hold lone surrogates, which no terminal can encode.
    typer.echo(json.dumps(value, indent=2))


def _printable(text: str, width: int) -> str:
    """One line of text, safe for a terminal: no control characters, no rich markup."""
    return escape(one_line(text, width))


def _print_ranking(ranking: Ranking) -> None:
    if not len(ranking):
        err.print("No documents.")
        return
    # Expanded, so that a long document gets what the numbers leave and not the reverse.
    table = Table(box=None, pad_edge=False, expand=True)
    for heading in ("rank", "score", "line"):
        table.add_column(heading, justify="right")
    table.add_column("document", overflow="ellipsis", no_wrap=True, ratio=1)
    for place, result in enumerate(ranking, 1):
        label = f"{result.document.id}: " if result.document.id else ""
        mark = "(cut) " if result.truncated else ""
        table.add_row(
            str(place),
            f"{result.score:.3f}",
            str(result.index + 1),
            mark + _printable(label + result.document.text, 200),
        )
    out.print(table)
    if ranking.non_finite:
        err.print(f"Without a finite score: documents {list(ranking.non_finite)}")


def _demonstrate(reranker: Reranker, part: dict[str, Any], top_k: int) -> None:
    """One corpus: the order without instruction, then under each, with the change of rank."""
    query, documents = part["query"], part["documents"]
    out.rule(f"Query: {escape(query)}", align="left")
    rankings = {"no instruction": reranker.rank(query, documents)}
    table = Table(show_lines=True)
    table.add_column("rank", justify="right")
    for setting in part["instructions"]:
        label, today = setting["label"], setting.get("today")
        instruction = Instruction(
            setting["text"], today=date.fromisoformat(today) if today else None
        )
        rankings[label] = reranker.rank(
            query, documents, instruction=instruction, attributes=part.get("attributes", ())
        )
        out.print(f"[bold]{escape(label)}[/bold]: {escape(instruction.render())}")
        table.add_column(f"{label}\n(score, change from the order without instruction)")
    comparison = compare_rankings(rankings)
    for place in range(1, min(top_k, len(documents)) + 1):
        cells = (_cell(comparison, column, place) for column in range(1, len(rankings)))
        table.add_row(str(place), *cells)
    out.print(table)


def _cell(comparison: RankingComparison, column: int, place: int) -> str:
    row = next(row for row in comparison if row.ranks[column] == place)
    move = row.moves[column] or 0
    arrow = f"[green]▲{move}[/green]" if move > 0 else f"[red]▼{-move}[/red]" if move < 0 else "="
    metadata = row.document.metadata
    shown = ", ".join(str(metadata[name]) for name in ("type", "site", "date") if name in metadata)
    suffix = f"\n[dim]{escape(shown)}[/dim]" if shown else ""
    text = _printable(row.document.text, 110)
    return f"[bold]{row.scores[column]:.2f}[/bold] {arrow} {text}{suffix}"
