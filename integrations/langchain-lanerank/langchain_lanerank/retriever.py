"""The retriever: another retriever's documents, re-ranked, with the run's whole configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lanerank import InputError, Instruction
from lanerank.context import Resolved
from lanerank.instruction import InstructionLike
from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
    Callbacks,
)
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever, RetrieverLike
from langchain_core.runnables import RunnableConfig, patch_config
from pydantic import ConfigDict, Field, StrictStr

from langchain_lanerank.compressor import LanerankRerank


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What one `invoke` was given, on its way through LangChain to the method that retrieves."""

    config: RunnableConfig | None = None
    instruction: InstructionLike = None
    top_n: int | None = None


_PLAIN = _Call()


class LanerankRetriever(BaseRetriever):
    """Retrieves with another retriever and re-ranks what it finds.

    Unlike `ContextualCompressionRetriever` it reads the whole configuration of a call, so that an
    instruction arrives from `configurable` in batches and at the top level too, and it hands the
    configuration on to the retriever it wraps. `LanerankRerank` says where instructions come from.

    >>> from langchain_core.runnables import RunnableLambda
    >>> from lanerank.testing import OverlapScorer
    >>> found = [Document("a red fish"), Document("a blue fish")]
    >>> retriever = LanerankRetriever(
    ...     base_retriever=RunnableLambda(lambda query: found),
    ...     reranker=LanerankRerank(model=OverlapScorer()),
    ... )
    >>> retriever.invoke("fish", instruction="blue", top_n=1)[0].page_content
    'a blue fish'
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", use_attribute_docstrings=True
    )

    base_retriever: RetrieverLike
    """Finds the candidates. Let it fetch many times more than `top_n`."""
    reranker: LanerankRerank = Field(default_factory=LanerankRerank)
    """Ranks them; by default with the model that comes with lanerank."""
    instruction: StrictStr | Instruction | None = None
    """Goes before the reranker's own `instruction`; can be a `ConfigurableField`."""
    top_n: int | None = Field(default=None, ge=1, strict=True)
    """How many documents to return; by default as the reranker is set."""

    def invoke(
        self,
        input: str,
        config: RunnableConfig | None = None,
        *,
        instruction: InstructionLike = None,
        top_n: int | None = None,
        **kwargs: Any,  # noqa: ANN401 - the signature of every runnable
    ) -> list[Document]:
        """The best documents, best first.

        Args:
            input: The query.
            config: The configuration of the run.
            instruction: Goes before every other source.
            top_n: How many documents to return; by default as the retriever is set.
            **kwargs: LangChain's own `run_id` only.

        Raises:
            InputError: An argument is not usable.
            InstructionError: The instruction is not usable, or is required and missing.
        """
        call = _call(config, instruction, top_n, kwargs)
        return super().invoke(input, config, call=call, **kwargs)

    async def ainvoke(
        self,
        input: str,
        config: RunnableConfig | None = None,
        *,
        instruction: InstructionLike = None,
        top_n: int | None = None,
        **kwargs: Any,  # noqa: ANN401 - the signature of every runnable
    ) -> list[Document]:
        """`invoke` without blocking the event loop."""
        call = _call(config, instruction, top_n, kwargs)
        return await super().ainvoke(input, config, call=call, **kwargs)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, call: _Call = _PLAIN
    ) -> list[Document]:
        callbacks = run_manager.get_child()
        resolved = self._resolve(query, callbacks, call)
        documents = self.base_retriever.invoke(
            query, patch_config(call.config, callbacks=callbacks)
        )
        return self.reranker.compress_documents(
            documents, query, callbacks, instruction=resolved, top_n=self._top_n(call)
        )

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, call: _Call = _PLAIN
    ) -> list[Document]:
        callbacks = run_manager.get_child()
        resolved = self._resolve(query, callbacks, call)
        documents = await self.base_retriever.ainvoke(
            query, patch_config(call.config, callbacks=callbacks)
        )
        return await self.reranker.acompress_documents(
            documents, query, callbacks, instruction=resolved, top_n=self._top_n(call)
        )

    def _resolve(self, query: str, callbacks: Callbacks, call: _Call) -> Resolved:
        # Before anything is retrieved: a missing instruction then costs nothing.
        return self.reranker.resolve(
            query,
            instruction=call.instruction,
            callbacks=callbacks,
            config=call.config,
            default=self.instruction,
        )

    def _top_n(self, call: _Call) -> int | None:
        return next((n for n in (call.top_n, self.top_n) if n is not None), -1)


def _call(
    config: RunnableConfig | None,
    instruction: InstructionLike,
    top_n: int | None,
    kwargs: dict[str, Any],
) -> _Call:
    # A vector store would take a misspelt `instruction` and drop it in silence.
    if unknown := kwargs.keys() - {"run_id"}:
        raise InputError(
            f"`invoke` has no argument {', '.join(map(repr, sorted(unknown)))}; arguments are "
            "`instruction` and `top_n`; what the base retriever needs goes into its own settings, "
            "by call through its `configurable_fields`"
        )
    return _Call(config=config, instruction=instruction, top_n=top_n)
