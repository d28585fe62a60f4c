"""What a training run found, as a value and as `training.json` beside the weights."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from lanerank.calibration import Calibrator
from lanerank.display import fragment, table
from lanerank.errors import InputError
from lanerank.evaluation.measures import Estimate
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

    @property
    def worse_than_start(self) -> str | None:
        """A sentence that says so, by what selects a checkpoint; `None` where it is not worse."""
        start = selection(self.before, self.config)
        best = max(each.selection for each in self.evaluations)
        if best >= start:
            return None
        measure = {
            "ndcg": "nDCG@10",
            "flip_accuracy": "flip accuracy",
            "both": "the mean of nDCG@10 and flip accuracy",
        }[self.config.select_by]
        return (
            "On the development data the saved model is worse than the model that training began "
            f"with: {measure} is {best:.4f}, and was {start:.4f}."
        )

    def _repr_html_(self) -> str:
        """What training changed, for notebooks."""
        before = dict(self.before.rows_of_estimates())
        early = ", stopped early" if self.stopped_early else ""
        worse = f" {self.worse_than_start}" if self.worse_than_start else ""
        return fragment(
            words(
                f"{self.config.card.name or self.config.output.name}: {self.steps} steps{early}, "
                f"saved the weights of step {self.best_step}; {self.rows} rows of {self.queries} "
                f"queries.{worse}"
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


def selection(report: DevelopmentReport, config: TrainingConfig) -> float:
    """The value by which checkpoints are compared.

    Raises:
        InputError: The development data do not give it.
    """
    names = ("ndcg", "flip_accuracy") if config.select_by == "both" else (config.select_by,)
    values: list[Estimate | None] = [getattr(report, name) for name in names]
    if None in values:
        lacking = {
            "ndcg": "two documents of one query under one instruction, of which one is relevant",
            "flip_accuracy": "a document whose score differs between two instructions",
        }[names[values.index(None)]]
        raise InputError(
            f"`select_by` is {config.select_by!r}, and `dev` nowhere has {lacking}; add such rows "
            "or select by something else"
        )
    return sum(value.value for value in values if value) / len(values)
