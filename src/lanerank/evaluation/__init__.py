"""Know whether an instruction works. Needs the extra `lanerank[eval]`.

- `evaluate`: one report on graded scenarios, the figures that models are compared by.
- `compare`, `compare_runs`: with and without an instruction, two wordings, two models, two runs.
- `measure_following`: do scores and ranks do what the instruction says, whatever its wording.
- `measure_calibration`, `fit_calibrator`, `check_calibrator`: do scores mean what they say.
- `measure_injection`: can a document talk its way up.
- `take_snapshot`, `check_snapshot`: what moved when a model or a wording changed.
- `make_report`: all of it on one page.
"""

from importlib.util import find_spec

from lanerank.errors import MissingExtraError

try:
    from lanerank.evaluation.attacks import Attack, AttackSuite, read_attacks
    from lanerank.evaluation.calibration import (
        CalibrationReport,
        best_threshold,
        bootstrap_calibration_interval,
        brier,
        brier_decomposition,
        expected_calibration_error,
        measure_calibration,
        reliability_bins,
    )
    from lanerank.evaluation.calibrators import CalibratorCheck, check_calibrator, fit_calibrator
    from lanerank.evaluation.cases import Case, CaseDocument, read_cases
    from lanerank.evaluation.compare import Comparison, compare, compare_runs
    from lanerank.evaluation.drift import DriftReport, check_snapshot
    from lanerank.evaluation.evaluate import EvaluationReport, KindReport, evaluate
    from lanerank.evaluation.following import FollowingReport, measure_following
    from lanerank.evaluation.injection import InjectionReport, measure_injection
    from lanerank.evaluation.measures import (
        Estimate,
        bootstrap_interval,
        flip_outcomes,
        ndcg,
        p_mrr,
        rank_by_score,
        robustness,
        sicr,
        wise,
    )
    from lanerank.evaluation.queries import JudgedQuery, queries_from_scenarios
    from lanerank.evaluation.report import REPORT_PARTS, Report, ReportPart, make_report
    from lanerank.evaluation.runs import DEFAULT_MEASURES, measure_label, rank_biased_overlap
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
    from lanerank.evaluation.snapshot import Snapshot, take_snapshot
    from lanerank.evaluation.systems import OWN, System
    from lanerank.evaluation.trec import Topic, read_qrels, read_run, read_topics, read_trec
    from lanerank.evaluation.wordings import CONDITIONS, Condition
except ModuleNotFoundError as error:
    missing = [name for name in ("ir_measures", "scipy") if find_spec(name) is None]
    if not missing:
        raise
    raise MissingExtraError(
        f"`lanerank.evaluation` needs {' and '.join(missing)}, not installed here. "
        'Install the extra: pip install "lanerank[eval]"'
    ) from error

__all__ = [
    "CONDITIONS",
    "DEFAULT_MEASURES",
    "INSTRUCTED_KINDS",
    "LANE_KINDS",
    "OWN",
    "REPORT_PARTS",
    "Attack",
    "AttackSuite",
    "CalibrationReport",
    "CalibratorCheck",
    "Case",
    "CaseDocument",
    "Comparison",
    "Condition",
    "DriftReport",
    "Estimate",
    "EvaluationReport",
    "FollowingReport",
    "InjectionReport",
    "JudgedQuery",
    "KindReport",
    "LaneKind",
    "Report",
    "ReportPart",
    "Scenario",
    "ScenarioDocument",
    "ScenarioLane",
    "Snapshot",
    "SupportsScore",
    "System",
    "Topic",
    "attribute_fields",
    "best_threshold",
    "bootstrap_calibration_interval",
    "bootstrap_interval",
    "brier",
    "brier_decomposition",
    "check_calibrator",
    "check_snapshot",
    "compare",
    "compare_runs",
    "evaluate",
    "expected_calibration_error",
    "fit_calibrator",
    "flip_outcomes",
    "make_report",
    "measure_calibration",
    "measure_following",
    "measure_injection",
    "measure_label",
    "ndcg",
    "p_mrr",
    "queries_from_scenarios",
    "rank_biased_overlap",
    "rank_by_score",
    "read_attacks",
    "read_cases",
    "read_qrels",
    "read_run",
    "read_scenarios",
    "read_topics",
    "read_trec",
    "reliability_bins",
    "robustness",
    "sicr",
    "take_snapshot",
    "wise",
]
