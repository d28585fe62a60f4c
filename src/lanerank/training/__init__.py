"""Train rerankers on data and judges of one's own. Needs the extra `lanerank[train]`.

- `Judge`, `JudgePanel`, `plan_pairs`: ask chat models which of two documents is the better one.
- `find_clear_pairs`, `make_controls`, `measure_obedience`: do judges obey orders inside documents.
- `fit_tournament`: scores on one scale from what the judges said.
- `read_quadruples`, `write_quadruples`, `read_entries`: the format of the data.
- `quadruples_from_scenarios`, `quadruples_from_trec`, `quadruples_from_triples`: data from others.
- `check`, `split`, `datasheet`: what is wrong with data, a development set, a description.
- `read_config`, `train`: a model from a file of settings.
- `measure_development`: how any reranker does on quadruples that were held out.

What computes with torch (`train`, the losses, the models) is loaded when it is first used: data and
judges do without.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lanerank.errors import MissingExtraError

try:
    from lanerank.training.checks import RELEVANT_SCORE, check
    from lanerank.training.config import (
        EMBEDDED_MODEL,
        CardSettings,
        DataSource,
        InjectionSettings,
        LaneEncoderSettings,
        LoraSettings,
        LossWeights,
        ModelKind,
        TrainingConfig,
        read_config,
    )
    from lanerank.training.controls import (
        INJECTED_ORDERS,
        Controls,
        ObedienceReport,
        ObeyedOrder,
        find_clear_pairs,
        make_controls,
        measure_obedience,
    )
    from lanerank.training.datasheet import datasheet
    from lanerank.training.development import DevelopmentReport, measure_development
    from lanerank.training.findings import CheckReport, Finding, Severity
    from lanerank.training.groups import Group, Row, add_attacks, make_groups
    from lanerank.training.judge import Judge
    from lanerank.training.pairing import plan_pairs
    from lanerank.training.panel import (
        Comparison,
        Judgements,
        JudgePanel,
        JudgeProgress,
        JudgingPlan,
        Order,
        Vote,
    )
    from lanerank.training.quadruples import (
        Entry,
        Quadruple,
        group_by_query,
        quadruple_format,
        read_entries,
        read_quadruples,
        write_quadruples,
    )
    from lanerank.training.questions import Question
    from lanerank.training.report import REPORT_FILE, DataFile, Evaluation, TrainingReport
    from lanerank.training.sources import (
        SCENARIO_SCORES,
        TopicField,
        quadruples_from_scenarios,
        quadruples_from_trec,
        quadruples_from_triples,
        read_trec_topics,
    )
    from lanerank.training.splits import Split, split
    from lanerank.training.tournament import (
        StrengthModel,
        Tournament,
        TournamentReport,
        fit_strengths,
        fit_tournament,
    )
    from lanerank.training.verdicts import Cost, Verdict, VerdictStore
except ImportError as error:
    needed = {
        "choix": "choix",
        "ir_measures": "ir-measures",
        "scipy": "scipy",
        "sklearn": "scikit-learn",
        "stamina": "stamina",
    }
    missing = [package for name, package in needed.items() if find_spec(name) is None]
    if not missing:
        raise
    raise MissingExtraError(
        f"`lanerank.training` needs {' and '.join(missing)}, not installed here. "
        'Install the extra: pip install "lanerank[train]"'
    ) from error

if TYPE_CHECKING:
    from lanerank.training.backends import Backend, load_backend
    from lanerank.training.bi_encoder import convert_bi_encoder
    from lanerank.training.collate import Batch, GroupCollator
    from lanerank.training.losses import (
        horizontal_pairs,
        injection_invariance,
        listwise_softmax,
        null_instruction_consistency,
        pointwise_bce,
        vertical_pairs,
    )
    from lanerank.training.trainer import GroupTrainer, OnEvaluation, train

__all__ = [
    "EMBEDDED_MODEL",
    "INJECTED_ORDERS",
    "RELEVANT_SCORE",
    "REPORT_FILE",
    "SCENARIO_SCORES",
    "Backend",
    "Batch",
    "CardSettings",
    "CheckReport",
    "Comparison",
    "Controls",
    "Cost",
    "DataFile",
    "DataSource",
    "DevelopmentReport",
    "Entry",
    "Evaluation",
    "Finding",
    "Group",
    "GroupCollator",
    "GroupTrainer",
    "InjectionSettings",
    "Judge",
    "JudgePanel",
    "JudgeProgress",
    "Judgements",
    "JudgingPlan",
    "LaneEncoderSettings",
    "LoraSettings",
    "LossWeights",
    "ModelKind",
    "ObedienceReport",
    "ObeyedOrder",
    "OnEvaluation",
    "Order",
    "Quadruple",
    "Question",
    "Row",
    "Severity",
    "Split",
    "StrengthModel",
    "TopicField",
    "Tournament",
    "TournamentReport",
    "TrainingConfig",
    "TrainingReport",
    "Verdict",
    "VerdictStore",
    "Vote",
    "add_attacks",
    "check",
    "convert_bi_encoder",
    "datasheet",
    "find_clear_pairs",
    "fit_strengths",
    "fit_tournament",
    "group_by_query",
    "horizontal_pairs",
    "injection_invariance",
    "listwise_softmax",
    "load_backend",
    "make_controls",
    "make_groups",
    "measure_development",
    "measure_obedience",
    "null_instruction_consistency",
    "plan_pairs",
    "pointwise_bce",
    "quadruple_format",
    "quadruples_from_scenarios",
    "quadruples_from_trec",
    "quadruples_from_triples",
    "read_config",
    "read_entries",
    "read_quadruples",
    "read_trec_topics",
    "split",
    "train",
    "vertical_pairs",
    "write_quadruples",
]

_WITH_TORCH = {
    "backends": ("Backend", "load_backend"),
    "bi_encoder": ("convert_bi_encoder",),
    "collate": ("Batch", "GroupCollator"),
    "losses": (
        "horizontal_pairs",
        "injection_invariance",
        "listwise_softmax",
        "null_instruction_consistency",
        "pointwise_bce",
        "vertical_pairs",
    ),
    "trainer": ("GroupTrainer", "OnEvaluation", "train"),
}
_HOMES = {name: module for module, names in _WITH_TORCH.items() for name in names}


def __getattr__(name: str) -> object:
    """Load what needs torch when it is asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """What is there already and what would be loaded."""
    return sorted({*globals(), *_HOMES})
