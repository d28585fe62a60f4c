"""The command line, one module for each group of commands."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version as version_of
from typing import Annotated

import typer
from rich.markup import escape

from lanerank.cli.bulk import rank_dataset
from lanerank.cli.console import err, out
from lanerank.cli.data import data_app
from lanerank.cli.evaluation import (
    calibration,
    check,
    compare,
    evaluate,
    following,
    injection,
    report,
    snapshot,
)
from lanerank.cli.judge import judge
from lanerank.cli.models import models_app
from lanerank.cli.ranking import demo, rank
from lanerank.cli.serve import serve
from lanerank.cli.train import train
from lanerank.errors import LanerankError

app = typer.Typer(
    name="lanerank",
    help="Re-rank documents with instructions.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
measuring = (evaluate, compare, following, calibration, injection, report, snapshot, check)
for command in (rank, rank_dataset, demo, *measuring, judge, train, serve):
    app.command()(command)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")


@app.callback(invoke_without_command=True)
def _root(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Re-rank documents with instructions."""
    if version:
        out.print(version_of("lanerank"), highlight=False)
        raise typer.Exit


def main() -> None:
    """Run the command line; a mistake of the user's is one line, not a traceback."""
    # What a library has to say about itself is no part of a ranking.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.ERROR)
    try:
        app()
    except (LanerankError, OSError) as error:
        message = "; ".join([str(error), *getattr(error, "__notes__", ())])
        err.print(f"[red]Error:[/red] {escape(message)}", soft_wrap=True, highlight=False)
        sys.exit(2)
