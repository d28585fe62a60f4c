"""Commands that measure: does the instruction work, and what does it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lanerank.cli.console import (
    STANDARD_STREAM,
    DeviceOption,
    ModelOption,
    UnsupportedOption,
    err,
    out,
    progress_bar,
)
from lanerank.reranker import Reranker


def evaluate(
    *,
    files: Annotated[list[Path], typer.Argument(help="Scenario files (JSONL).")],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    on_unsupported: UnsupportedOption = "raise",
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
    with progress_bar("Scoring scenarios", len(scenarios), at_least=2) as progress:
        report = evaluation.evaluate(reranker, scenarios, progress=progress)
    text = report.model_dump_json(indent=2)
    if json_to == STANDARD_STREAM:
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
