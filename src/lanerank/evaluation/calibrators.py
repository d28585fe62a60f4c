"""Fitting calibrators on scenarios, and checking them on kinds of instruction they never saw."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.util import find_spec
from typing import get_args

import numpy as np
from pydantic import BaseModel, ConfigDict

from lanerank.calibration import CalibratedScorer, CalibrationMethod, Calibrator
from lanerank.errors import InputError, MissingExtraError
from lanerank.evaluation.calibration import (
    JudgedPairs,
    count_pairs,
    named_estimates,
    score_pairs,
)
from lanerank.evaluation.measures import BoolArray, Estimate, FloatArray, describe_interval
from lanerank.evaluation.scenarios import LANE_KINDS, LaneKind, Scenario
from lanerank.evaluation.scoring import SupportsScore

FOLDS = 5
"""Into how many parts `check_calibrator` divides the scenarios."""

_FROZEN = ConfigDict(frozen=True, extra="forbid")


class HeldOutCalibration(BaseModel):
    """Pairs before and after a calibrator that was fitted on others.

    The `n` of every estimate is `pairs`.
    """

    model_config = _FROZEN

    pairs: int
    ece_before: Estimate
    ece_after: Estimate
    ece_change: Estimate
    """`ece_after - ece_before`, resampled together; below 0 the calibrator helps."""
    brier_before: Estimate
    brier_after: Estimate
    brier_change: Estimate
    """`brier_after - brier_before`, pair by pair; below 0 the calibrator helps."""


class CalibratorCheck(BaseModel):
    """What `check_calibrator` found: calibration on kinds of instruction not fitted on."""

    model_config = _FROZEN

    model: str
    """The scorer's name."""
    method: CalibrationMethod
    interval: str
    """How the bounds of every estimate were made."""
    scenarios: int
    folds: int
    """Into how many parts the scenarios were divided."""
    non_finite: int
    """Pairs whose score was NaN or infinite, and which are left out."""
    pooled: HeldOutCalibration
    """Over the pairs of all kinds that were held out, each calibrated as in `by_kind`. Errors of
    kinds in opposite directions cancel here."""
    by_kind: Mapping[LaneKind, HeldOutCalibration]
    """For each kind that was held out, with fits on the other kinds of other scenarios."""
    calibrator: Calibrator
    """Fitted on all the kinds and scenarios to fit on: the one to save."""

    def rows(self) -> list[tuple[str, Estimate]]:
        """Every estimate with its name, for tables: `ece_before`, `recency/brier_change`."""
        rows = named_estimates(self.pooled)
        for kind, measures in self.by_kind.items():
            rows += named_estimates(measures, f"{kind}/")
        return rows


def fit_calibrator(
    reranker: SupportsScore,
    scenarios: Sequence[Scenario],
    *,
    method: CalibrationMethod = "platt",
    kinds: Collection[LaneKind] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibrator:
    """Fit a calibrator on graded scenarios. `check_calibrator` says whether it will help.

    Args:
        reranker: The model, not calibrated.
        scenarios: At least one. Take others than those on which you report calibration.
        method: See `Calibrator`.
        kinds: The kinds of lanes to fit on; by default all that occur.
        progress: Called after each scenario with the number done and the number in all.

    Returns:
        The calibrator, which notes model and kinds. Save it beside the model.

    Raises:
        InputError: The reranker is calibrated already, a kind does not occur, or the pairs do not
            settle a calibrator.
        MissingExtraError: scikit-learn is not installed.
        ScorerError: If the reranker does not return one score for each document.
    """
    _check(reranker, method)
    fitted = _kinds("kinds", kinds, scenarios)
    return _fit(reranker, score_pairs(reranker, scenarios, progress, fitted), method)


def check_calibrator(
    reranker: SupportsScore,
    scenarios: Sequence[Scenario],
    *,
    method: CalibrationMethod = "platt",
    kinds: Collection[LaneKind] | None = None,
    held_out: Collection[LaneKind] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibratorCheck:
    """Measure what a calibrator does under kinds of instruction that it was not fitted on.

    One kind after another is held out. The scenarios are divided into `FOLDS` parts, in turn as
    they come, and the pairs of that kind in one part are calibrated by a fit on the other kinds in
    the other parts: neither the kind nor any of the documents was seen. Look at the kinds one by
    one: errors in opposite directions cancel in the pooled figures. The intervals are about the
    scenarios alone; calibrators are not fitted afresh for each resample.

    Args:
        reranker: The model, not calibrated.
        scenarios: At least two.
        method: See `Calibrator`.
        kinds: The kinds of lanes to fit on; by default all that occur.
        held_out: The kinds to check, one at a time; by default each of `kinds`.
        progress: Called after each scenario with the number done and the number in all.

    Returns:
        The report, with a calibrator that is fitted on all of `kinds`.

    Raises:
        InputError: The reranker is calibrated already, a kind does not occur, there are too few
            scenarios or kinds, or some part of the pairs does not settle a calibrator.
        MissingExtraError: scikit-learn is not installed.
        ScorerError: If the reranker does not return one score for each document.
    """
    _check(reranker, method)
    if len(scenarios) < 2:
        raise InputError(
            "`scenarios` must be at least two, to fit on some and check on others; got "
            f"{len(scenarios)}"
        )
    fitted = _kinds("kinds", kinds, scenarios)
    tested = fitted if held_out is None else _kinds("held_out", held_out, scenarios)
    if len(fitted) == 1 and fitted[0] in tested:
        raise InputError(
            f"`kinds` is {fitted[0]!r} alone, and nothing is left to fit on when it is held out; "
            "give more kinds, or others as `held_out`"
        )
    taken = {*fitted, *tested}
    pairs = score_pairs(reranker, scenarios, progress, taken)
    if silent := [kind for kind in tested if not (pairs.kinds == kind).any()]:
        raise InputError(
            f"{reranker.scorer.name!r} gave no finite score in any lane of kind "
            f"{', '.join(silent)}; leave it out of `held_out`"
        )
    in_fit = np.isin(pairs.kinds, fitted)
    folds = min(FOLDS, len(scenarios))
    calibrator = _fit(reranker, pairs.of(in_fit), method)
    after = np.full(pairs.scores.size, np.nan)
    for kind in tested:
        for fold in range(folds):
            inside = pairs.scenarios % folds == fold
            held = inside & (pairs.kinds == kind)
            if held.any():
                others = pairs.of(in_fit & ~inside & (pairs.kinds != kind))
                after[held] = _fit(reranker, others, method).apply(pairs.scores[held])
    return CalibratorCheck(
        model=reranker.scorer.name,
        method=method,
        interval=describe_interval(),
        scenarios=len(scenarios),
        folds=folds,
        non_finite=count_pairs(scenarios, taken) - pairs.scores.size,
        pooled=_compare(pairs, after, np.isin(pairs.kinds, tested)),
        by_kind={kind: _compare(pairs, after, pairs.kinds == kind) for kind in tested},
        calibrator=calibrator,
    )


def _check(reranker: SupportsScore, method: str) -> None:
    """Refuse before the scoring, which takes long."""
    if isinstance(reranker.scorer, CalibratedScorer):
        raise InputError(
            f"`reranker` is calibrated already: {reranker.scorer.name!r}; load the model with "
            "`calibrated=False`, because the new calibrator will get its raw scores"
        )
    if method not in get_args(CalibrationMethod):
        raise InputError(f"`method` must be one of {get_args(CalibrationMethod)}, got {method!r}")
    if find_spec("sklearn") is None:
        raise MissingExtraError(
            "fitting a calibrator needs scikit-learn, not installed here. "
            'Install the extra: pip install "lanerank[eval]"'
        )


def _kinds(
    name: str, chosen: Collection[LaneKind] | None, scenarios: Sequence[Scenario]
) -> list[LaneKind]:
    found = {lane.kind for scenario in scenarios for lane in scenario.lanes}
    occurring = [kind for kind in LANE_KINDS if kind in found]
    if chosen is None or not scenarios:
        return occurring
    if isinstance(chosen, str) or not chosen or not set(chosen) <= found:
        raise InputError(
            f"`{name}` must be a list of kinds of lanes that the scenarios have, which are "
            f"{', '.join(occurring)}; got {chosen!r}"
        )
    return [kind for kind in occurring if kind in chosen]


def _fit(reranker: SupportsScore, pairs: JudgedPairs, method: CalibrationMethod) -> Calibrator:
    kinds = ", ".join(kind for kind in LANE_KINDS if (pairs.kinds == kind).any())
    number = len(set(pairs.scenarios.tolist()))
    note = f"{reranker.scorer.name} on {number} scenarios; kinds: {kinds}"
    try:
        return Calibrator.fit(pairs.scores, pairs.labels, method, note=note)
    except InputError as error:
        raise InputError(
            f"`scenarios`: no calibrator can be fitted on {number} of them, kinds "
            f"{kinds or 'none'}: {error}"
        ) from error


def _compare(pairs: JudgedPairs, after: FloatArray, chosen: BoolArray) -> HeldOutCalibration:
    before, calibrated = pairs.of(chosen), pairs.with_scores(after).of(chosen)
    return HeldOutCalibration(
        pairs=before.scores.size,
        ece_before=before.calibration_error(),
        ece_after=calibrated.calibration_error(),
        ece_change=before.calibration_error_change(calibrated),
        brier_before=before.brier(),
        brier_after=calibrated.brier(),
        brier_change=before.brier_change(calibrated),
    )
