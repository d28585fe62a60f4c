"""The document compressor: documents and a query in, copies of the best ones with scores out."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, NotRequired

from lanerank import (
    InputError,
    Instruction,
    InstructionContext,
    InstructionError,
    Ranking,
    Reranker,
)
from lanerank.context import (
    Resolved,
    Source,
    current_instruction,
    derive_instruction,
    resolve_instruction,
)
from lanerank.contracts import LongDocuments, RankedDocument
from lanerank.instruction import InstructionLike
from lanerank.reranker import DocumentLike, ModelLike
from langchain_core.callbacks import Callbacks, adispatch_custom_event, dispatch_custom_event
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, ensure_config
from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, StrictStr

# Before Python 3.12 pydantic cannot make a schema of `typing`'s own.
from typing_extensions import TypedDict

from langchain_lanerank.instruction import find_handler_instruction, look_up, read_context

_InstructionFrom = Callable[[InstructionContext], InstructionLike] | StrictStr | None

_EVENT = "lanerank_rerank"


class RerankResult(TypedDict):
    """One entry of what `LanerankRerank.rerank` returns."""

    index: int
    """Position in the list that the caller gave."""
    relevance_score: float | None
    """The model's score, in [0, 1] for the models lanerank ships; `None`, and among the last, where
    it gave no finite number."""


class RerankInput(TypedDict):
    """The input of `LanerankRerank.as_runnable`."""

    query: str
    documents: Sequence[Document]
    instruction: NotRequired[str | Instruction | Mapping[str, object] | None]
    """A mapping has the parts of an `Instruction`, as JSON writes it."""


def _check_template(derive: _InstructionFrom) -> _InstructionFrom:
    if isinstance(derive, str):
        # Without a run its names have no values yet, but a template that is none shows already.
        with suppress(InstructionError):
            derive_instruction(derive, InstructionContext(query=""))
    return derive


def _check_sources(sources: tuple[Source | str, ...] | None) -> tuple[Source | str, ...] | None:
    resolve_instruction([], sources=sources)
    return sources


class LanerankRerank(BaseDocumentCompressor):
    """Re-ranks documents under an instruction, in a `ContextualCompressionRetriever` or alone.

    The instruction is the first that is found in: the call's own argument, an enclosing
    `use_instruction(...)`, an `InstructionHandler` among the callbacks, the run's `configurable`
    values, the run's metadata, the context object of a LangGraph run, `instruction_from`, the field
    `instruction`. It is looked up before any other thread takes over, and never in a document.

    >>> from lanerank.testing import OverlapScorer
    >>> compressor = LanerankRerank(model=OverlapScorer(), instruction="blue", top_n=1)
    >>> compressor.rerank(["a red fish", "a blue fish"], "fish")
    [{'index': 1, 'relevance_score': 1.0}]
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_assignment=True,
    )

    model: Annotated[ModelLike, PlainValidator(Reranker.check)] = Field(
        default=None, exclude=True, repr=False
    )
    """A name or folder as `Reranker.from_pretrained` takes it, loaded at the first use and once for
    the whole process; a `Reranker` or a `Scorer`, to choose device, precision, server or
    fallback; by default the model that comes with lanerank."""
    instruction: StrictStr | Instruction | None = None
    """The instruction where no other source gives one."""
    instruction_key: str = Field(default="rerank_instruction", min_length=1)
    """Where to look in the `configurable` values, the metadata and the LangGraph context."""
    instruction_from: Annotated[_InstructionFrom, AfterValidator(_check_template)] = Field(
        default=None, exclude=True, repr=False
    )
    """A callable, or a template over what the application knows of its user, such as
    `"The user works in {department}."`. It sees the metadata, `configurable` values, tags and
    context of the run, whichever `sources` count, and no documents."""
    require_instruction: bool = False
    """Whether finding no instruction is an error."""
    sources: Annotated[tuple[Source | str, ...] | None, AfterValidator(_check_sources)] = None
    """The sources that count, by name; all by default. Leave out `"configurable"`, `"metadata"` and
    `"runtime"` where these hold what an end user sent."""
    top_n: int | None = Field(default=3, ge=1, strict=True)
    """How many documents to keep; `None` keeps all."""
    attributes: tuple[str, ...] = ()
    """The metadata fields of documents that the model may see; none by default."""
    long_documents: LongDocuments | None = None
    """`"truncate"` or `"max_window"`; by default as the `Reranker` is set."""
    score_key: str = Field(default="relevance_score", min_length=1)
    """Where the score goes in a document's metadata. It replaces what the document has there, and
    is `None` where the model gave no finite number; that document is then among the last."""
    report_instruction: bool = False
    """Whether each document's metadata says which instruction applied, as
    `rerank_instruction_source` and `rerank_instruction_fingerprint`, both `None` without one, and
    as `rerank_degraded` whether nothing was scored, so that it changed nothing."""

    def rerank(
        self,
        documents: Sequence[Document | DocumentLike],
        query: str,
        *,
        instruction: InstructionLike | Resolved = None,
        top_n: int | None = -1,
    ) -> list[RerankResult]:
        """Rank without touching the documents.

        Args:
            documents: LangChain documents, texts, or whatever else `lanerank.Reranker.rank` takes.
            query: What is searched for.
            instruction: Goes before every other source.
            top_n: How many to keep; -1 is the field `top_n`, `None` keeps all.

        Returns:
            Index and score of the best documents, best first; ties keep the input's order.

        Raises:
            InputError: An argument is not usable.
            InstructionError: The instruction is not usable, or is required and missing.
        """
        resolved, top_n = self._settle(query, None, instruction, top_n)
        items = [self._item(document) for document in _listed(documents)]
        if not items:
            return []
        ranking, report = self._rank(query, items, resolved, top_n)
        if config := _parent_run(None):
            dispatch_custom_event(_EVENT, report, config=config)
        return [
            {"index": result.index, "relevance_score": _finite(result.score)} for result in ranking
        ]

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks = None,
        *,
        instruction: InstructionLike | Resolved = None,
        top_n: int | None = -1,
    ) -> list[Document]:
        """The best documents, best first, as copies with the score in their metadata.

        Where there is a parent run, it gets a custom event `lanerank_rerank` with the query,
        counts, seconds, and the source and fingerprint of the instruction. It holds no text of the
        instruction or of a document, unless a service that failed repeated one: `degraded` is the
        message of that error.

        Args:
            documents: What was retrieved. Ids and other metadata are kept.
            query: What is searched for.
            callbacks: The callbacks of the run, in which an instruction may be found.
            instruction: Goes before every other source. A `Resolved`, as `resolve` returns it, is
                final.
            top_n: How many to keep; -1 is the field `top_n`, `None` keeps all.

        Raises:
            InputError: An argument is not usable.
            InstructionError: The instruction is not usable, or is required and missing.
        """
        resolved, top_n = self._settle(query, callbacks, instruction, top_n)
        items = [self._item(document) for document in _checked(documents)]
        if not items:
            return []
        ranking, report = self._rank(query, items, resolved, top_n)
        if config := _parent_run(callbacks):
            dispatch_custom_event(_EVENT, report, config=config)
        return [self._copy(documents[result.index], result, ranking) for result in ranking]

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks = None,
        *,
        instruction: InstructionLike | Resolved = None,
        top_n: int | None = -1,
    ) -> list[Document]:
        """`compress_documents` without blocking the event loop.

        A scorer that can be awaited, as that of `Reranker.from_url`, takes no thread, and
        cancelling the call cancels its requests. Models are loaded and run in a worker thread. The
        instruction is looked up before any of that.
        """
        resolved, top_n = self._settle(query, callbacks, instruction, top_n)
        items = [self._item(document) for document in _checked(documents)]
        if not items:
            return []
        ranking, report = await self._arank(query, items, resolved, top_n)
        if config := _parent_run(callbacks):
            await adispatch_custom_event(_EVENT, report, config=config)
        return [self._copy(documents[result.index], result, ranking) for result in ranking]

    def as_runnable(self) -> Runnable[RerankInput, list[Document]]:
        """A runnable from `{"query", "documents", "instruction"?}` to the best documents.

        It is a run of its own, so tracers record its input, an `"instruction"` in it included.
        """

        def rerank(values: RerankInput) -> list[Document]:
            documents, query, instruction = _unpack(values)
            return self.compress_documents(documents, query, instruction=instruction)

        async def arerank(values: RerankInput) -> list[Document]:
            documents, query, instruction = _unpack(values)
            return await self.acompress_documents(documents, query, instruction=instruction)

        runnable = RunnableLambda(rerank, arerank, name=type(self).__name__)
        return runnable.with_types(input_type=RerankInput, output_type=list[Document])

    def resolve(
        self,
        query: str,
        *,
        instruction: InstructionLike = None,
        callbacks: Callbacks = None,
        config: RunnableConfig | None = None,
        default: InstructionLike = None,
    ) -> Resolved:
        """The instruction that would apply to a call, and where it was found.

        Args:
            query: What is searched for; `instruction_from` may look at it.
            instruction: The call's own.
            callbacks: The callbacks of the call.
            config: The configuration of the run; by default that of the enclosing run, where
                LangChain passes it on.
            default: Goes before the field `instruction`, after everything else.

        Raises:
            InputError: An instruction that was found has the wrong type.
            InstructionError: The instruction found is too long, `instruction_from` lacks a value,
                or an instruction is required and missing.
        """
        config = ensure_config(config)
        context = read_context(query, callbacks, config)
        key, derive = self.instruction_key, self.instruction_from
        derived = (
            [(Source.INSTRUCTION_FROM, lambda: derive_instruction(derive, context))]
            if derive is not None
            else []
        )
        return resolve_instruction(
            [
                (Source.ARGUMENT, instruction),
                (Source.USE_INSTRUCTION, current_instruction()),
                (Source.HANDLER, lambda: find_handler_instruction(callbacks, config)),
                (Source.CONFIGURABLE, lambda: look_up(context.configurable, key)),
                (Source.METADATA, lambda: look_up(context.metadata, key)),
                (Source.RUNTIME, lambda: look_up(context.runtime_context, key)),
                *derived,
                (Source.FIELD, default),
                (Source.FIELD, self.instruction),
            ],
            sources=self.sources,
            require=self.require_instruction,
        )

    def _settle(
        self,
        query: str,
        callbacks: Callbacks,
        instruction: InstructionLike | Resolved,
        top_n: int | None,
    ) -> tuple[Resolved, int | None]:
        """What depends on the caller's context and has to be known before a thread takes over."""
        if not isinstance(instruction, Resolved):
            instruction = self.resolve(query, instruction=instruction, callbacks=callbacks)
        if top_n == -1:
            top_n = self.top_n
        if top_n is not None and (type(top_n) is not int or top_n < 1):
            raise InputError(
                "`top_n` must be at least 1, None to keep all, or -1 for the setting of the "
                f"reranker; got {top_n!r}"
            )
        return instruction, top_n

    def _item(self, document: Document | DocumentLike) -> DocumentLike:
        if not isinstance(document, Document):
            return document
        metadata = document.metadata
        chosen = {name: metadata[name] for name in self.attributes if name in metadata}
        return {"text": document.page_content, "metadata": chosen}

    def _rank(
        self, query: str, items: Sequence[DocumentLike], resolved: Resolved, top_n: int | None
    ) -> tuple[Ranking, dict[str, object]]:
        reranker = Reranker.coerce(self.model)
        start = time.perf_counter()
        ranking = reranker.rank(
            query,
            items,
            instruction=resolved,
            attributes=self.attributes,
            top_k=top_n,
            long_documents=self.long_documents,
        )
        return ranking, _report(ranking, len(items), time.perf_counter() - start)

    async def _arank(
        self, query: str, items: Sequence[DocumentLike], resolved: Resolved, top_n: int | None
    ) -> tuple[Ranking, dict[str, object]]:
        reranker = await _load(self.model)
        start = time.perf_counter()
        ranking = await reranker.arank(
            query,
            items,
            instruction=resolved,
            attributes=self.attributes,
            top_k=top_n,
            long_documents=self.long_documents,
        )
        return ranking, _report(ranking, len(items), time.perf_counter() - start)

    def _copy(self, document: Document, result: RankedDocument, ranking: Ranking) -> Document:
        # Ours go last: a document must not be able to claim a score or an instruction.
        metadata = {**document.metadata}
        if self.report_instruction:
            metadata["rerank_instruction_source"] = ranking.instruction_source
            metadata["rerank_instruction_fingerprint"] = ranking.instruction_fingerprint
            # Not the reason: it may quote a service, and metadata gets into prompts.
            metadata["rerank_degraded"] = ranking.degraded is not None
        metadata[self.score_key] = _finite(result.score)
        return document.model_copy(update={"metadata": metadata})


def _finite(score: float) -> float | None:
    """The score, or what JSON has instead of NaN."""
    return score if math.isfinite(score) else None


async def _load(model: ModelLike) -> Reranker:
    # An object has nothing left to load, and then there is no need of a thread.
    if isinstance(model, str | Path | None):
        return await asyncio.to_thread(Reranker.coerce, model)
    return Reranker.coerce(model)


def _report(ranking: Ranking, documents: int, seconds: float) -> dict[str, object]:
    """What the custom event says."""
    return {
        "query": ranking.query,
        "documents": documents,
        "kept": len(ranking),
        "truncated": len(ranking.truncated),
        "non_finite": len(ranking.non_finite),
        "model": ranking.model,
        "instruction_source": ranking.instruction_source,
        "instruction_fingerprint": ranking.instruction_fingerprint,
        "instruction_applied": ranking.instruction_applied,
        "degraded": ranking.degraded,
        "seconds": seconds,
    }


def _parent_run(callbacks: Callbacks) -> RunnableConfig | None:
    """Where to send events: the run that these callbacks belong to, or the enclosing one."""
    manager = ensure_config().get("callbacks") if callbacks is None else callbacks
    if getattr(manager, "parent_run_id", None) is None:
        return None
    return {"callbacks": manager}


def _listed(documents: Sequence[Document | DocumentLike]) -> Sequence[Document | DocumentLike]:
    # Texts and mappings can be iterated over as well, with absurd results.
    if isinstance(documents, str | bytes | Mapping) or not isinstance(documents, Sequence):
        raise InputError(
            f"`documents` must be a list, got {type(documents).__name__}: {short(documents)}; "
            "wrap a single document in a list"
        )
    return documents


def _checked(documents: Sequence[Document]) -> Sequence[Document]:
    for index, document in enumerate(_listed(documents)):
        if not isinstance(document, Document):
            raise InputError(
                f"`documents[{index}]` must be a LangChain Document, got "
                f"{type(document).__name__}: {short(document)}; `rerank` takes texts"
            )
    return documents


def _unpack(values: RerankInput) -> tuple[Sequence[Document], str, InstructionLike]:
    if not isinstance(values, Mapping) or not {"query", "documents"} <= values.keys():
        raise InputError(
            "the input must be a mapping with 'query', 'documents' and optionally 'instruction', "
            f"got {short(values)}"
        )
    # A misspelt 'instruction' must not be dropped in silence.
    if unknown := values.keys() - RerankInput.__annotations__.keys():
        raise InputError(
            f"the input has {', '.join(map(repr, sorted(map(str, unknown))))} besides 'query', "
            "'documents' and 'instruction'; pick these in the step before"
        )
    return values["documents"], values["query"], look_up(values, "instruction")
