"""`lanerank rank` and `lanerank demo`."""

from __future__ import annotations

import json
import math
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lanerank.cli.console import (
    STANDARD_STREAM,
    DeviceOption,
    JsonFlag,
    ModelOption,
    UnsupportedOption,
    err,
    out,
    print_json,
    printable,
    progress_bar,
)
from lanerank.comparison import RankingComparison, compare_rankings
from lanerank.contracts import LongDocuments, Ranking
from lanerank.errors import FileFormatError, InputError
from lanerank.instruction import Instruction
from lanerank.reranker import Reranker
from lanerank.scoring.fallback import OnError


def rank(
    *,
    query: Annotated[str, typer.Option("--query", "-q", help="What is searched for.")],
    file: Annotated[
        str,
        typer.Argument(
            help="JSONL (objects with `text`, or strings) or plain lines; `-` is standard input."
        ),
    ] = STANDARD_STREAM,
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
    on_unsupported: UnsupportedOption = "raise",
    service: Annotated[
        str | None,
        typer.Option(
            help="Let a service rank: a name of `lanerank models --services`, or a JSON file."
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Where the service runs; a hosted one knows by itself.")
    ] = None,
    on_error: Annotated[
        OnError,
        typer.Option(help="What happens if the service fails; `--probe` raises all the same."),
    ] = "raise",
    probe: Annotated[
        bool, typer.Option(help="Check first that an instruction reaches the service's model.")
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Rank the documents of a file, best first.

    Each line of the input is a document. If the first begins with `{` or `"`, the file is JSONL:
    objects need a `text` and may have an `id` and `metadata`; their other keys count as metadata.
    """
    _check_used(service, device, long_documents, on_error, probe=probe)
    documents = list(_read_documents(file))
    if service is not None:
        # A key comes from the environment: on the command line, every user of the machine sees it.
        reranker = Reranker.from_url(
            url,
            service=service,
            model=model,
            on_error=on_error,
            probe=probe,
            on_unsupported=on_unsupported,
        )
    elif url is not None:
        raise InputError("`--url` is given without `--service`; say what runs there, such as vllm")
    else:
        reranker = Reranker.from_pretrained(
            model, device=device, long_documents=long_documents, on_unsupported=on_unsupported
        )
    with progress_bar("Ranking", len(documents)) as progress:
        ranking = reranker.rank(
            query,
            documents,
            instruction=Instruction(instruction, today=today.date() if today else None),
            attributes=tuple(attribute or ()),
            top_k=top_k,
            progress=progress,
        )
    _tell_absent(attribute or (), documents)
    print_ranking(ranking, as_json=as_json)


def _tell_absent(attributes: Iterable[str], documents: Sequence[str | dict[str, Any]]) -> None:
    """Say on standard error which attributes no document has; most are typing mistakes."""
    fields: dict[str, None] = {}
    for document in documents:
        if isinstance(document, dict):
            fields.update(dict.fromkeys(document.keys() - {"text", "id", "metadata"}))
            fields.update(dict.fromkeys(document.get("metadata") or {}))
    for name in dict.fromkeys(attributes):
        if documents and name not in fields:
            known = printable(", ".join(sorted(fields)), 200) or "none"
            err.print(
                f"[yellow]No document has the attribute[/yellow] {printable(name, 60)}; "
                f"there are: {known}",
                highlight=False,
                soft_wrap=True,
            )


def _check_used(
    service: str | None, device: str, long_documents: str, on_error: str, *, probe: bool
) -> None:
    """Refuse options that would change nothing."""
    given = {
        "--device": device != "auto",
        "--long-documents": long_documents != "truncate",
        "--on-error": on_error != "raise",
        "--no-probe": not probe,
    }
    of_services = {"--on-error", "--no-probe"}
    for option, is_given in given.items():
        if is_given and (option in of_services) is (service is None):
            kind, remedy = (
                ("a service", "give `--service` too")
                if option in of_services
                else ("a model that runs here", "leave `--service` out")
            )
            raise InputError(f"`{option}` is for {kind}; {remedy}, or leave it out")


def demo(
    *,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    top_k: Annotated[
        int, typer.Option("--top-k", "-k", min=1, help="Rows of the second table.")
    ] = 8,
) -> None:
    """Re-rank two small corpora, each under different instructions; needs no network."""
    data = json.loads((files("lanerank") / "demo.json").read_text(encoding="utf-8"))
    reranker = Reranker.from_pretrained(model, device=device)
    for name in ("imo", "corpus"):
        _demonstrate(reranker, data[name], top_k)


def _read_documents(file: str) -> Iterator[str | dict[str, Any]]:
    if file == STANDARD_STREAM:
        if sys.stdin.isatty():
            err.print("Reading documents from standard input, one a line; end with Ctrl-D.")
        yield from _parse_lines("<stdin>", sys.stdin.buffer)
        return
    path = Path(file)
    # Not `is_file`: a pipe, such as a shell puts in the place of <(command), can be read too.
    if not path.exists() or path.is_dir():
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
            if _begins_array(line):
                raise FileFormatError(name, number, "a JSON array; give one object a line")
            is_json = line[0] in '{"'
        if not is_json:
            yield line
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(name, number, f"not JSON ({error}): {line[:60]!r}") from error
        if problem := _problem(value):
            raise FileFormatError(name, number, problem)
        yield value


def _begins_array(line: str) -> bool:
    """Whether this is a JSON array, or the first line of one that goes over several."""
    if re.match(r'\[\s*(\{\s*"|$)', line):
        return True
    try:
        return line[0] == "[" and isinstance(json.loads(line), list)
    except (ValueError, RecursionError):
        return False


def _problem(value: object) -> str | None:
    """What keeps the JSON of a line from being a document."""
    if isinstance(value, str):
        return None
    if not isinstance(value, dict):
        return "neither an object with a 'text' nor a string"
    if not isinstance(value.get("text"), str):
        return f"no 'text' that is a string; keys are {sorted(value)}"
    if not isinstance(value.get("metadata") or {}, dict):
        return f"'metadata' must be an object, got {reprlib.repr(value['metadata'])}"
    return None


def print_ranking(ranking: Ranking, *, as_json: bool) -> None:
    """Print a ranking on standard output, and on standard error what is wrong with it."""
    if ranking.degraded is not None:
        # A service may have worded it.
        reason = printable(ranking.degraded, 1_000)
        err.print(
            f"[yellow]In the order of the input, nothing was scored:[/yellow] {reason}",
            highlight=False,
            soft_wrap=True,
        )
    if ranking.instruction_applied == "neutral":
        err.print(
            "[yellow]The model took the instruction for one that changes nothing, and the order is "
            "that without it;[/yellow] say more of what is wanted.",
            highlight=False,
            soft_wrap=True,
        )
    if as_json:
        report = ranking.model_dump(mode="json")
        for result in report["results"]:
            # JSON has no word for what is not finite; `non_finite` lists these.
            if not math.isfinite(result["score"]):
                result["score"] = None
        print_json(report)
        return
    if not len(ranking):
        err.print("No documents.")
        return
    # Expanded, so that a long document gets what the numbers leave and not the reverse.
    table = Table(box=None, pad_edge=False, expand=True)
    for heading in ("rank", "score", "no."):
        table.add_column(heading, justify="right")
    table.add_column("document", overflow="ellipsis", no_wrap=True, ratio=1)
    for place, result in enumerate(ranking, 1):
        label = f"{result.document.id}: " if result.document.id else ""
        mark = "(cut) " if result.truncated else ""
        table.add_row(
            str(place),
            f"{result.score:.3f}",
            str(result.index + 1),
            mark + printable(label + result.document.text, 200),
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
    text = printable(row.document.text, 110)
    return f"[bold]{row.scores[column]:.2f}[/bold] {arrow} {text}{suffix}"
