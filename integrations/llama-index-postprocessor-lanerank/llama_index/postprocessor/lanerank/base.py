"""The node postprocessor, and the query bundle that carries an instruction to it."""

from __future__ import annotations

import asyncio
import math
import reprlib
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from dataclasses_json import config
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload
from llama_index.core.callbacks.base import EventContext
from llama_index.core.instrumentation import (  # type: ignore[attr-defined]  # re-exported
    get_dispatcher,
)
from llama_index.core.instrumentation.dispatcher import (  # type: ignore[attr-defined]  # re-exported
    active_instrument_tags,
)
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from pydantic import (
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from lanerank import InputError, Instruction, InstructionContext, InstructionError, Reranker
from lanerank.context import (
    Resolved,
    Source,
    current_instruction,
    derive_instruction,
    resolve_instruction,
)
from lanerank.contracts import Document, LongDocuments, Ranking, Scorer
from lanerank.instruction import InstructionLike

dispatcher = get_dispatcher(__name__)

_EMBEDDED = "lanerank-mini"
_RETRIEVAL_SCORE = "retrieval_score"
_SOURCES = (
    Source.BUNDLE,
    Source.USE_INSTRUCTION,
    Source.INSTRUMENT_TAGS,
    Source.INSTRUCTION_FROM,
    Source.FIELD,
)
# Every tracer is given the tags, so reading them is for the application to choose.
_DEFAULT_SOURCES = tuple(source for source in _SOURCES if source is not Source.INSTRUMENT_TAGS)


# --- how the fields are read and written ------------------------------------------------------


def _read_model(value: object) -> str | Reranker | Scorer:
    model = Reranker.check(value)
    if model is None:
        return _EMBEDDED
    return str(model) if isinstance(model, Path) else model


def _write_model(value: str | Reranker | Scorer) -> str:
    if isinstance(value, str):
        return value
    raise InputError(
        f"`model` is an object and cannot be serialised, got {reprlib.repr(value)}; pass the name "
        "or the path of a model"
    )


def _read_instruction(value: object) -> InstructionLike:
    if isinstance(value, Mapping):
        return Instruction(**value)
    Instruction.coerce(value)  # type: ignore[arg-type]  # raises on any other type
    return value  # type: ignore[return-value]  # what `coerce` accepts


def _write_instruction(value: InstructionLike) -> str | dict[str, object] | None:
    if isinstance(value, Instruction):
        return value.model_dump(mode="json", exclude_defaults=True)
    return value


def _write_template(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise InputError(
        f"`instruction_from` is a callable and cannot be serialised, got {reprlib.repr(value)}; "
        "use a template"
    )


def _read_sources(value: object) -> tuple[Source, ...] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Collection) or any(name not in _SOURCES for name in names):
        raise InputError(
            f"`sources` must be some of {', '.join(_SOURCES)}, got {reprlib.repr(value)}"
        )
    return tuple(map(Source, names))


def _write_sources(value: tuple[Source, ...] | None) -> list[str] | None:
    return None if value is None else [str(source) for source in value]


_Model = Annotated[
    str | Reranker | Scorer, PlainValidator(_read_model), PlainSerializer(_write_model)
]
_Instruction = Annotated[
    InstructionLike, PlainValidator(_read_instruction), PlainSerializer(_write_instruction)
]
_InstructionFrom = Annotated[
    Callable[[InstructionContext], InstructionLike] | str | None, PlainSerializer(_write_template)
]
_Sources = Annotated[
    tuple[Source, ...] | None, PlainValidator(_read_sources), PlainSerializer(_write_sources)
]


# --- the query --------------------------------------------------------------------------------


@dataclass(kw_only=True)
class InstructedQueryBundle(QueryBundle):
    """A query with the instruction to rank its results by.

    It reaches the postprocessor through every engine that passes the bundle on; the README lists
    them. Engines that rewrite the query make a bundle of their own: use `use_instruction` there.

    Raises:
        InputError: If `instruction` has the wrong type.
    """

    # Repeated to make them keyword-only: a second positional argument, meant as the instruction,
    # would become the path of an image.
    query_str: str = field(kw_only=False)
    image_path: str | None = None
    custom_embedding_strs: list[str] | None = None
    embedding: list[float] | None = None
    instruction: InstructionLike = field(
        default=None,
        repr=False,
        metadata=config(encoder=_write_instruction, decoder=_read_instruction),
    )
    """What relevance means here. Left out of the `repr`, because tracers write that down."""

    def __post_init__(self) -> None:
        """Refuse a wrong type where it is passed."""
        Instruction.coerce(self.instruction)


# --- the postprocessor ------------------------------------------------------------------------


@dataclass
class _Outcome:
    """What the end event reports: nothing, until the nodes are ranked."""

    nodes: list[NodeWithScore] = field(default_factory=list)
    tags: dict[str, object] = field(default_factory=dict)


class LanerankRerank(BaseNodePostprocessor):
    """Ranks nodes for a query, under an instruction.

    The instruction is the first one found: that of an `InstructedQueryBundle`, of an enclosing
    `lanerank.use_instruction(...)`, of the instrument tags, of `instruction_from`, of
    `instruction`. Nodes are never looked at for one.

    Results are new `NodeWithScore`s, best first, ties in the order of the input. A node whose
    score is not a finite number comes last, with the score `None`. The end event of each call
    has, in `tags["lanerank"]`, where the instruction came from and its fingerprint, and as
    `"degraded"` why nothing was scored where a `Reranker` keeps the order of the input instead of
    raising.

    Asynchronous calls await a scorer that can be awaited, as that of `Reranker.from_url`, and
    cancelling them cancels its requests. Models are loaded and run in a worker thread.

    Args:
        model: Name or path of a model, by default of the one that comes with lanerank. It is
            loaded when it is first needed, and shared by all postprocessors of the process. A
            `Reranker` or a `Scorer` works too, but cannot be serialised.
        top_n: How many nodes to keep; 2 by default, as in LlamaIndex's other rerankers. `None`
            keeps all.
        instruction: What applies where no other source has an instruction.
        instruction_key: The instrument tag that holds an instruction.
        instruction_from: A callable, or a template such as `"The user works in {department}."`.
            What it sees as metadata are the instrument tags, where `sources` names them. It is
            called in the caller's context, on the event loop if there is one: it must not block.
        sources: The sources that count, in any order: `"bundle"`, `"use_instruction"`,
            `"instrument_tags"`, `"instruction_from"`, `"field"`. `None` is all but the
            instrument tags, because those are copied into every trace.
        require_instruction: Whether finding no instruction is an error.
        attributes: The metadata fields that the model sees, in a lane of their own; none by
            default.
        metadata_mode: Which metadata the node's templates print into the document text; those in
            `attributes` are left out. `NONE` by default, unlike elsewhere in LlamaIndex: what the
            model should know of the metadata belongs into `attributes`.
        long_documents: `"truncate"` or `"max_window"`; `None` leaves it to the model.
        keep_retrieval_score: Whether results carry the score they came with, as
            `metadata["retrieval_score"]`, hidden from language and embedding models.
        callback_manager: Engines put their own in its place.

    Raises:
        InputError: An option is not usable; the message names it.
    """

    model_config = ConfigDict(validate_assignment=True)

    model: _Model
    top_n: Annotated[int, Field(ge=1, strict=True)] | None
    instruction: _Instruction
    instruction_key: str
    instruction_from: _InstructionFrom
    sources: _Sources
    require_instruction: bool
    attributes: tuple[str, ...]
    metadata_mode: MetadataMode
    long_documents: LongDocuments | None
    keep_retrieval_score: bool

    def __init__(
        self,
        *,
        model: str | Path | Reranker | Scorer | None = None,
        top_n: int | None = 2,
        instruction: InstructionLike = None,
        instruction_key: str = "rerank_instruction",
        instruction_from: Callable[[InstructionContext], InstructionLike] | str | None = None,
        sources: Collection[Source | str] | None = None,
        require_instruction: bool = False,
        attributes: Sequence[str] = (),
        metadata_mode: MetadataMode = MetadataMode.NONE,
        long_documents: LongDocuments | None = None,
        keep_retrieval_score: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        """Check the options."""
        try:
            super().__init__(
                model=model,
                top_n=top_n,
                instruction=instruction,
                instruction_key=instruction_key,
                instruction_from=instruction_from,
                sources=sources,
                require_instruction=require_instruction,
                attributes=attributes,
                metadata_mode=metadata_mode,
                long_documents=long_documents,
                keep_retrieval_score=keep_retrieval_score,
                callback_manager=callback_manager or CallbackManager(),
            )
        except ValidationError as error:
            raise _first_problem(error) from None

    @model_validator(mode="after")
    def _template_can_be_filled(self) -> Self:
        if isinstance(self.instruction_from, str):
            try:
                derive_instruction(self.instruction_from, InstructionContext(query=""))
            except InstructionError:
                # It has placeholders, and the tags are all that could fill them.
                if Source.INSTRUMENT_TAGS not in self._allowed:
                    raise InputError(
                        "`instruction_from` has placeholders for instrument tags, got "
                        f"{reprlib.repr(self.instruction_from)}; name 'instrument_tags' and "
                        "'instruction_from' in `sources`, or use a callable"
                    ) from None
        return self

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex serialises this class."""
        return "LanerankRerank"

    @property
    def model_name(self) -> str:
        """The model's name, as events and rankings give it."""
        if isinstance(self.model, str):
            return self.model
        return self.model.scorer.name if isinstance(self.model, Reranker) else self.model.name

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what `to_dict` holds, and fail where it fails.

        LlamaIndex's own way drops what cannot be pickled, and would take the weights along.
        """
        return type(self).from_dict, (self.to_dict(),)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._events(nodes, query_bundle) as outcome:
            ranking = self._rank(nodes, *self._trusted(query_bundle))
            self._report(outcome, nodes, ranking)
        return outcome.nodes

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._events(nodes, query_bundle) as outcome:
            # The trusted lanes are settled here, before the work may move to another thread.
            ranking = await self._arank(nodes, *self._trusted(query_bundle))
            self._report(outcome, nodes, ranking)
        return outcome.nodes

    @property
    def _allowed(self) -> tuple[Source, ...]:
        return _DEFAULT_SOURCES if self.sources is None else self.sources

    def _trusted(self, query_bundle: QueryBundle | None) -> tuple[str, Resolved]:
        """The query and the instruction. Nodes are not an argument, on purpose."""
        if query_bundle is None:
            raise InputError("missing query bundle: pass `query_bundle` or `query_str`, got None")
        bundle = query_bundle
        carried = bundle.instruction if isinstance(bundle, InstructedQueryBundle) else None
        tags = active_instrument_tags.get() if Source.INSTRUMENT_TAGS in self._allowed else {}

        def derive() -> InstructionLike:
            if self.instruction_from is None:
                return None
            context = InstructionContext(query=bundle.query_str, metadata=tags)
            return derive_instruction(self.instruction_from, context)

        resolved = resolve_instruction(
            [
                (Source.BUNDLE, carried),
                (Source.USE_INSTRUCTION, current_instruction()),
                # In a function, because a tag that is one itself must not be called.
                (Source.INSTRUMENT_TAGS, lambda: tags.get(self.instruction_key)),
                (Source.INSTRUCTION_FROM, derive),
                (Source.FIELD, self.instruction),
            ],
            sources=self._allowed,
            require=self.require_instruction,
        )
        return bundle.query_str, resolved

    def _rank(self, nodes: Sequence[NodeWithScore], query: str, resolved: Resolved) -> Ranking:
        if not nodes:
            return Ranking(query=query, model=self.model_name)
        return Reranker.coerce(self.model).rank(
            query,
            self._documents(nodes),
            instruction=resolved,
            attributes=self.attributes,
            top_k=self.top_n,
            long_documents=self.long_documents,
        )

    async def _arank(
        self, nodes: Sequence[NodeWithScore], query: str, resolved: Resolved
    ) -> Ranking:
        if not nodes:
            return Ranking(query=query, model=self.model_name)
        reranker = await _load(self.model)
        return await reranker.arank(
            query,
            self._documents(nodes),
            instruction=resolved,
            attributes=self.attributes,
            top_k=self.top_n,
            long_documents=self.long_documents,
        )

    def _documents(self, nodes: Sequence[NodeWithScore]) -> list[Document]:
        return [Document(self._text(n.node), metadata=self._chosen(n.node)) for n in nodes]

    def _chosen(self, node: BaseNode) -> dict[str, object]:
        return {name: node.metadata[name] for name in self.attributes if name in node.metadata}

    def _text(self, node: BaseNode) -> str:
        if self.metadata_mode is MetadataMode.NONE:
            return node.get_content(metadata_mode=MetadataMode.NONE)
        _check_template(node, "metadata_template", {"key", "value"})
        _check_template(node, "text_template", {"metadata_str", "content"})
        others = {k: v for k, v in node.metadata.items() if k not in self.attributes}
        visible = node.model_copy(update={"metadata": others})
        return visible.get_content(metadata_mode=self.metadata_mode)

    def _report(self, outcome: _Outcome, nodes: Sequence[NodeWithScore], ranking: Ranking) -> None:
        outcome.nodes = [self._scored(nodes[r.index], r.score) for r in ranking]
        outcome.tags["lanerank"] = {
            "instruction_source": ranking.instruction_source,
            "instruction_fingerprint": ranking.instruction_fingerprint,
            "instruction_applied": ranking.instruction_applied,
            "degraded": ranking.degraded,
            "truncated": [nodes[i].node_id for i in ranking.truncated],
            "non_finite": [nodes[i].node_id for i in ranking.non_finite],
        }

    def _scored(self, item: NodeWithScore, score: float) -> NodeWithScore:
        changes: dict[str, object] = {"score": _finite(score)}
        if self.keep_retrieval_score:
            node = item.node
            hidden = {
                name: [*dict.fromkeys([*getattr(node, name), _RETRIEVAL_SCORE])]
                for name in ("excluded_llm_metadata_keys", "excluded_embed_metadata_keys")
            }
            # Written even where there was no score: the document may claim one.
            metadata = {**node.metadata, _RETRIEVAL_SCORE: _finite(item.score)}
            changes["node"] = node.model_copy(update={"metadata": metadata, **hidden})
        return item.model_copy(update=changes)

    @contextmanager
    def _events(
        self, nodes: Sequence[NodeWithScore], query_bundle: QueryBundle | None
    ) -> Iterator[_Outcome]:
        """Report start and end to LlamaIndex's instrumentation and callbacks, errors included."""
        _check_types(nodes, query_bundle)
        outcome = _Outcome()
        dispatcher.event(
            ReRankStartEvent(
                query=query_bundle,
                nodes=list(nodes),
                top_n=self.top_n or len(nodes),
                model_name=self.model_name,
            )
        )
        callback: AbstractContextManager[EventContext | None] = nullcontext()
        if nodes and query_bundle is not None:
            callback = self.callback_manager.event(
                CBEventType.RERANKING,
                payload={
                    EventPayload.NODES: nodes,
                    EventPayload.MODEL_NAME: self.model_name,
                    EventPayload.QUERY_STR: query_bundle.query_str,
                    EventPayload.TOP_K: self.top_n,
                },
            )
        try:
            with callback as event:
                yield outcome
                if event is not None:
                    event.on_end(payload={EventPayload.NODES: outcome.nodes})
        finally:
            dispatcher.event(ReRankEndEvent(nodes=outcome.nodes, tags=outcome.tags))


async def _load(model: str | Reranker | Scorer) -> Reranker:
    # An object has nothing left to load, and then there is no need of a thread.
    if isinstance(model, str):
        return await asyncio.to_thread(Reranker.coerce, model)
    return Reranker.coerce(model)


def _finite(score: float | None) -> float | None:
    """A score that JSON can hold."""
    return float(score) if score is not None and math.isfinite(score) else None


def _check_types(nodes: object, query_bundle: object) -> None:
    if not isinstance(nodes, Sequence) or isinstance(nodes, str):
        raise InputError(f"`nodes` must be a list of NodeWithScore, got {type(nodes).__name__}")
    for i, item in enumerate(nodes):
        if not isinstance(item, NodeWithScore):
            raise InputError(
                f"`nodes[{i}]` must be a NodeWithScore, got {type(item).__name__}; wrap a node "
                "as `NodeWithScore(node=node)`"
            )
    if not isinstance(query_bundle, QueryBundle | None):
        raise InputError(
            f"`query_bundle` must be a QueryBundle, got {type(query_bundle).__name__}: "
            f"{reprlib.repr(query_bundle)}; pass a string as `query_str`"
        )


def _check_template(node: BaseNode, name: str, placeholders: set[str]) -> None:
    """Refuse a node's template that does more than to place its parts.

    It may come from the index: a width such as `{value:>999999999}` would fill the memory.
    """
    template = getattr(node, name, "")
    try:
        fields = [f for f in string.Formatter().parse(template) if f[1] is not None]
        names = [f[1] for f in fields]
        plain = not any(spec or conversion for _, _, spec, conversion in fields)
    except ValueError:
        names, plain = [], False
    if not plain or len(names) != len(placeholders.intersection(names)):
        raise InputError(
            f"the node {node.node_id!r} has a `{name}` that is not usable, "
            f"{reprlib.repr(template)}: it may have {' and '.join(sorted(placeholders))} once "
            "each, without formats; mend the node, or choose `metadata_mode=MetadataMode.NONE`"
        )


def _first_problem(error: ValidationError) -> InputError:
    problem = error.errors(include_url=False)[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    return InputError(
        f"`{problem['loc'][0]}`: {problem['msg']}, got {reprlib.repr(problem['input'])}"
    )
