"""Re-rank with instructions: `model(query, instruction, document) -> score`.

The instruction travels in a lane of its own that retrieved text cannot enter. Importing lanerank
does not load torch; `Reranker.from_pretrained()` does.
"""

from importlib.metadata import version

from lanerank.comparison import ComparedDocument, RankingComparison, compare_rankings
from lanerank.context import InstructionContext, use_instruction
from lanerank.contracts import Document, Lane, RankedDocument, Ranking
from lanerank.errors import (
    BulkError,
    FileFormatError,
    InputError,
    InstructionError,
    InstructionMissingError,
    InstructionNotSupportedError,
    JudgeError,
    LanerankError,
    MissingExtraError,
    ModelError,
    ModelLoadError,
    RemoteError,
    ScorerError,
)
from lanerank.instruction import Instruction
from lanerank.reranker import Reranker

__version__ = version("lanerank")

__all__ = [
    "BulkError",
    "ComparedDocument",
    "Document",
    "FileFormatError",
    "InputError",
    "Instruction",
    "InstructionContext",
    "InstructionError",
    "InstructionMissingError",
    "InstructionNotSupportedError",
    "JudgeError",
    "Lane",
    "LanerankError",
    "MissingExtraError",
    "ModelError",
    "ModelLoadError",
    "RankedDocument",
    "Ranking",
    "RankingComparison",
    "RemoteError",
    "Reranker",
    "ScorerError",
    "__version__",
    "compare_rankings",
    "use_instruction",
]
