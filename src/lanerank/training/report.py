"""What a training run found, as a value and as `training.json` beside the weights."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from lanerank.calibration import Calibrator
from lanerank.display import fragment, table
from lanerank.evaluation.sections import headings, row, words
from lanerank.training.config import TrainingConfig
from lanerank.training.development import DevelopmentReport

REPORT_FILE = "training.json"
"""The name of the report beside the weights; where it is, a run is complete."""

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class DataFile(BaseModel):
    """A file that was read, so that one can tell whether another is the same."""

    model_config = _FROZEN

    name: str
    sha256: str


class Evaluation(BaseModel):
    """One evaluation on the way."""

    model_config = _FROZEN

    step: int
    selection: float
    """The value by which checkpoints are compared; see `TrainingConfig.select_by`."""
    losses: Mapping[str, float]
    """The mean of each loss, times its weight, since the evaluation before."""


class TrainingReport(BaseModel):
    """What a run did, and how good the model is that it saved."""

    model_config = _FROZEN

    config: TrainingConfig
    """Paths in it are relative to the folder in which the model's folder lies."""
    data: tuple[DataFile, ...]
    """The files of quadruples, those to train on first."""
    versions: Mapping[str, str]
    """Of the packages that decide about the weights."""
    queries: int
    rows: int
    """The number of quadruples trained on."""
    terms: Mapping[str, int]
    """For each loss, how many terms it has in one pass: rows, lists or pairs. One with 0 taught
    nothing, for want of such data."""
    steps: int
    """The steps done."""
    best_step: int
    """The step whose weights were saved."""
    stopped_early: bool
    evaluations: tuple[Evaluation, ...]
    before: DevelopmentReport
    """The starting model on the development data."""
    after: DevelopmentReport
    """The saved model on the development data, loaded as users load it, but without calibration."""
    calibrator: Calibrator | None
    """What was saved beside the weights."""
    not_calibrated: str | None
    """Why there is no calibrator, where one was asked for."""

    def _repr_html_(self) -> str:
        """What training changed, for notebooks."""
        before = dict(self.before.rows_of_estimates())
        early = ", stopped early" if self.stopped_early else ""
        return fragment(
            words(
                f"{self.config.card.name or self.config.output.name}: {self.steps} steps{early}, "
                f"saved the weights of step {self.best_step}; {self.rows} rows of {self.queries} "
                "queries."
            ),
            table(
                headings(("measure", "before", "after", "n")),
                [
                    row(name, before.get(name), value, str(value.n))
                    for name, value in self.after.rows_of_estimates()
                ],
            ),
            words(
                f"On {self.after.rows} rows of {self.after.queries} development queries, which "
                f"chose the weights too. Intervals: {self.after.interval}."
            ),
        )
