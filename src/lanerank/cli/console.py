"""What the commands share: the two consoles, common options, progress, harmless output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lanerank.display import one_line
from lanerank.reranker import OnUnsupported

out = Console()
err = Console(stderr=True)

STANDARD_STREAM = "-"
"""What stands for standard input or output in place of a file."""
_PROGRESS_FROM = 200
"""Below this many documents a progress bar would only flicker."""

ModelOption = Annotated[
    str | None,
    typer.Option(help="A folder or a Hugging Face id; by default the model in the package."),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")]
UnsupportedOption = Annotated[
    OnUnsupported, typer.Option(help="What to do with an instruction if the model takes none.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@contextmanager
def progress_bar(label: str, total: int, *, at_least: int = _PROGRESS_FROM) -> Iterator[Any]:
    """A bar on standard error for long work.

    Gives a callback `(done, total)`, which takes a new label too, or None if the work is short.
    """
    if total < at_least:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done, whole, name=label: bar.update(
            task, completed=done, total=whole, description=name
        )


def print_json(value: object) -> None:
    """Print a value as JSON on standard output."""
    # ASCII, because a document may hold lone surrogates, which no terminal can encode.
    typer.echo(json.dumps(value, indent=2))


def printable(text: str, width: int) -> str:
    """One line of text, safe for a terminal: no control characters, no rich markup."""
    return escape(one_line(text, width))
