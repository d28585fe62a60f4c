"""lanerank in LangChain: re-rank retrieved documents under an instruction.

`LanerankRerank` is a document compressor, `LanerankRetriever` a retriever around another one. Both
find the instruction in the call, the run's configuration or the agent's context; a document can
never supply it.
"""

from langchain_lanerank.compressor import LanerankRerank, RerankInput, RerankResult
from langchain_lanerank.instruction import InstructionHandler
from langchain_lanerank.retriever import LanerankRetriever

__all__ = [
    "InstructionHandler",
    "LanerankRerank",
    "LanerankRetriever",
    "RerankInput",
    "RerankResult",
]
