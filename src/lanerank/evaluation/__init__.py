"""Measure how well a reranker follows instructions. Needs the extra `lanerank[eval]`."""

from importlib.util import find_spec

from lanerank.errors import MissingExtraError

try:
    from lanerank.evaluation.calibration import (
        bootstrap_calibration_interval,
        brier,
        expected_calibration_error,
    )
    from lanerank.evaluation.evaluate import EvaluationReport, KindReport, evaluate
    from lanerank.evaluation.measures import Estimate, bootstrap_interval, flip_outcomes, ndcg
    from lanerank.evaluation.scenarios import (
        INSTRUCTED_KINDS,
        LANE_KINDS,
        LaneKind,
        Scenario,
        ScenarioDocument,
        ScenarioLane,
        attribute_fields,
        read_scenarios,
    )
    from lanerank.evaluation.scoring import SupportsScore
except ModuleNotFoundError as error:
    missing = [name for name in ("ir_measures", "scipy") if find_spec(name) is None]
    if not missing:
        raise
    raise MissingExtraError(
        f"`lanerank.evaluation` needs {' and '.join(missing)}, not installed here. "
        'Install the extra: pip install "lanerank[eval]"'
    ) from error

__all__ = [
    "INSTRUCTED_KINDS",
    "LANE_KINDS",
    "Estimate",
    "EvaluationReport",
    "KindReport",
    "LaneKind",
    "Scenario",
    "ScenarioDocument",
    "ScenarioLane",
    "SupportsScore",
    "attribute_fields",
    "bootstrap_calibration_interval",
    "bootstrap_interval",
    "brier",
    "evaluate",
    "expected_calibration_error",
    "flip_outcomes",
    "ndcg",
    "read_scenarios",
]
