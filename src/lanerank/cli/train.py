"""`lanerank train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lanerank.cli.console import JsonFlag, err, out, progress_bar

if TYPE_CHECKING:
    from lanerank.evaluation.measures import Estimate
    from lanerank.training.development import DevelopmentReport
    from lanerank.training.report import TrainingReport


def train(
    *,
    config: Annotated[Path, typer.Argument(help="A TOML file; see TrainingConfig.")],
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what an earlier run left, and start afresh.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a reranker on quadruples; a run that was interrupted goes on when called again.

    Needs the extra `lanerank[train]`. The model is saved with its contract, a calibration, a report
    and a model card.
    """
    # Here, because ranking must work without the extra, and the second because it loads torch: a
    # mistake in the file should show at once.
    from lanerank.training.config import read_config

    settings = read_config(config)
    from lanerank.training import trainer

    with progress_bar("Training", 1, at_least=1) as progress:
        report = trainer.train(
            settings, restart=restart, progress=progress, on_evaluation=_show_evaluation
        )
    if report.worse_than_start:
        err.print(
            f"[yellow]{report.worse_than_start} Lower the learning rate, or look at the data "
            "(`lanerank data check`), before you use it.[/yellow]",
            highlight=False,
            soft_wrap=True,
        )
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    for name, count in report.terms.items():
        if not count:
            err.print(f"[yellow]The loss `{name}` had no data.[/yellow]", highlight=False)
    out.print(_table(report))
    early = ", stopped early" if report.stopped_early else ""
    out.print(
        f"{report.steps} steps{early}; saved the weights of step {report.best_step} in "
        f"{escape(str(settings.output))}",
        highlight=False,
        soft_wrap=True,
    )
    if report.not_calibrated:
        err.print(f"Not calibrated: {escape(report.not_calibrated)}", soft_wrap=True)


def _show_evaluation(step: int, report: DevelopmentReport) -> None:
    shown = [
        f"{name} {value.value:.3f}"
        for name in ("ndcg_instructed", "ndcg_plain", "flip_accuracy", "neutral_drift")
        if (value := getattr(report, name)) is not None
    ]
    err.print(f"step {step}: {', '.join(shown)}", highlight=False)


def _table(report: TrainingReport) -> Table:
    before = dict(report.before.rows_of_estimates())
    table = Table(caption=report.after.interval, caption_justify="left")
    for heading in ("measure", "before", "after", "n"):
        table.add_column(heading, no_wrap=True)
    for name, value in report.after.rows_of_estimates():
        table.add_row(escape(name), _cell(before.get(name)), _cell(value), str(value.n))
    return table


def _cell(value: Estimate | None) -> str:
    return f"{value.value:.3f} [dim]({value.low:.3f} to {value.high:.3f})[/dim]" if value else ""
