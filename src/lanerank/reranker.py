"""The object a user holds: documents in, a ranking out."""

from __future__ import annotations

import asyncio
import logging
import math
import reprlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, SupportsFloat, TypeVar, get_args

from lanerank.context import Resolved, Source, current_instruction, resolve_instruction
from lanerank.contracts import (
    AsyncScorer,
    Candidate,
    Document,
    LongDocuments,
    RankedDocument,
    Ranking,
    RerankRequest,
    Scorer,
    Scores,
    order_by_score,
)
from lanerank.errors import InputError, InstructionNotSupportedError, ScorerError
from lanerank.instruction import InstructionLike
from lanerank.lanes import render_attributes

if TYPE_CHECKING:
    from pydantic import SecretStr

    from lanerank.checkpoint import DtypeName, Quantization
    from lanerank.scoring.fallback import OnError
    from lanerank.service import ScoreKind, ServiceContract
    from lanerank.template import PromptTemplate

log = logging.getLogger(__name__)
_T = TypeVar("_T")

OnUnsupported = Literal["raise", "prepend", "ignore"]
Applied = Literal["lane", "neutral", "prepended", "ignored"]
DocumentLike = str | Document | Mapping[str, object]
Progress = Callable[[int, int], None]


class Reranker:
    """Ranks documents for a query, under an instruction.

    Args:
        scorer: What scores; `Reranker.from_pretrained` loads one.
        long_documents: What happens to a document longer than the model reads: `"truncate"` reads
            its beginning, `"max_window"` scores overlapping windows and takes the best.
        on_unsupported: What happens to an instruction that the model has no channel for:
            `"raise"`, `"prepend"` it to the query, or `"ignore"` it. A ranking says which.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        long_documents: LongDocuments = "truncate",
        on_unsupported: OnUnsupported = "raise",
    ) -> None:
        """Check the options."""
        self.scorer = scorer
        self.long_documents = _one_of("long_documents", long_documents, LongDocuments)
        self.on_unsupported = _one_of("on_unsupported", on_unsupported, OnUnsupported)

    @classmethod
    def check(cls, value: object, *, name: str = "model") -> ModelLike:
        """The value, if `coerce` takes it; nothing is loaded.

        Raises:
            InputError: It does not. The message calls the argument `name`.
        """
        # A class has the members of a scorer too.
        if not isinstance(value, type) and isinstance(value, str | Path | Reranker | Scorer | None):
            return value
        raise InputError(
            f"`{name}` must be a name or folder, a `Reranker`, a `Scorer`, or None for the model "
            f"that comes with lanerank; got {type(value).__name__}: {reprlib.repr(value)}"
        )

    @classmethod
    def coerce(cls, value: ModelLike) -> Reranker:
        """A reranker from whatever the `model` setting of an adapter takes.

        A name or folder is loaded with the defaults of `from_pretrained`, once for the whole
        process, also when threads ask for it at the same time.

        Raises:
            InputError: The value is of another type.
            ModelLoadError: The model cannot be loaded.
        """
        value = cls.check(value)
        if isinstance(value, Reranker):
            return value
        if isinstance(value, Scorer):
            return cls(value)
        name = None if value is None else str(value)
        if name not in _loaded:
            with _loading:
                if name not in _loaded:
                    _loaded[name] = cls.from_pretrained(name)
        return _loaded[name]

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: DtypeName = "auto",
        local_files_only: bool = False,
        contract: str | Path | PromptTemplate | None = None,
        attn_implementation: str | None = None,
        device_map: str | None = None,
        quantization: Quantization | None = None,
        compile_model: bool = False,
        trust_remote_code: bool = False,
        tokens_per_batch: int | None = None,
        share_prefix: bool = True,
        calibrated: bool = True,
        long_documents: LongDocuments = "truncate",
        on_unsupported: OnUnsupported = "raise",
    ) -> Reranker:
        """Load a model; without a name the one that comes with lanerank, which works offline.

        Args:
            name_or_path: A folder, `"lanerank-mini"` (the default), or an id on the Hugging Face
                hub.
            revision: Branch, tag or commit on the hub; refused for a folder and for lanerank-mini.
            device: `"cpu"`, `"cuda"`, `"mps"`; `"auto"` takes CUDA if there is one.
            dtype: `"float32"`, `"bfloat16"`, `"float16"`; `"auto"` is bfloat16 where the device
                has it natively.
            local_files_only: Never ask the hub.
            contract: How the model wants to be asked, where its exact hub id does not tell: a
                model id or family that lanerank knows, a JSON file, or a `PromptTemplate`.
            attn_implementation: As in transformers, for models that are not lane encoders.
            device_map: As in transformers; `"auto"` spreads the model over devices.
            quantization: `"8bit"` or `"4bit"`, through bitsandbytes.
            compile_model: Compile the model with `torch.compile` at the first call.
            trust_remote_code: Run Python code from the model's repository.
            tokens_per_batch: Bounds memory; the scorer's own default if `None`.
            share_prefix: Compute what comes before the documents once per call (causal models).
            calibrated: Calibrate the scores where a `calibration.json` lies beside the weights.
            long_documents: See the class.
            on_unsupported: See the class.

        Raises:
            InputError: An option is not known, not present, or not for this kind of model.
            MissingExtraError: Quantisation needs a package that is not installed.
            ModelLoadError: The model cannot be loaded.
        """
        # The one local import: torch is loaded with the first model, not with lanerank.
        from lanerank.checkpoint import load_scorer

        scorer = load_scorer(
            name_or_path,
            revision=revision,
            device=device,
            dtype=dtype,
            local_files_only=local_files_only,
            contract=contract,
            attn_implementation=attn_implementation,
            device_map=device_map,
            quantization=quantization,
            compile_model=compile_model,
            trust_remote_code=trust_remote_code,
            tokens_per_batch=tokens_per_batch,
            share_prefix=share_prefix,
            calibrated=calibrated,
        )
        return cls(scorer, long_documents=long_documents, on_unsupported=on_unsupported)

    @classmethod
    def from_url(
        cls,
        url: str | None = None,
        *,
        service: str | Path | ServiceContract,
        model: str | None = None,
        api_key: str | SecretStr | None = None,
        template: str | Path | PromptTemplate | None = None,
        instructions: bool = True,
        scores: ScoreKind | None = None,
        timeout: float = 30.0,
        max_retries: int = 3,
        concurrency: int = 4,
        on_error: OnError = "raise",
        probe: bool = True,
        on_unsupported: OnUnsupported = "raise",
    ) -> Reranker:
        """Rank with a server or a hosted service; needs the extra `remote`, and no torch.

        Args:
            url: The server's address; by default a hosted service's own.
            service: `"vllm"`, `"sglang"`, `"cohere"`, ... (see `lanerank models --services`), a
                JSON file, or a `ServiceContract`.
            model: The name by which the service knows the model.
            api_key: The key; by default that of the service's environment variable.
            template: How the model wants to be asked, where its exact hub id as `model` does not
                tell; see `lanerank.scoring.remote.RemoteScorer`.
            instructions: Say `False` for a model that follows none, and one is refused.
            scores: `"unit"`, `"logit"` or `"raw"`, where they are not what the service usually
                gives.
            timeout: Seconds that one attempt may take.
            max_retries: How often a request is repeated that may succeed the next time.
            concurrency: How many requests may be under way at a time.
            on_error: `"raise"`, or `"input_order"` to keep the order of the input where the service
                fails; the ranking then has `degraded` set and all its scores are 0.0.
            probe: Check now that an instruction changes the scores of a known pair. Whatever
                `on_error` is, a service that fails this check raises.
            on_unsupported: See the class.

        Raises:
            InputError: An option is not usable.
            InstructionNotSupportedError: The probe found that instructions change nothing.
            MissingExtraError: The extra is not installed.
            ModelLoadError: A file is not a contract.
            RemoteError: The service did not answer the probe as it should.
        """
        # Local imports, since most users have no need of an HTTP client.
        from lanerank.scoring.fallback import FallbackScorer, OnError
        from lanerank.scoring.remote import RemoteScorer

        _one_of("on_error", on_error, OnError)
        scorer = RemoteScorer(
            url,
            service=service,
            model=model,
            api_key=api_key,
            template=template,
            instructions=instructions,
            scores=scores,
            timeout=timeout,
            max_retries=max_retries,
            concurrency=concurrency,
        )
        reranker = cls(
            FallbackScorer(scorer) if on_error == "input_order" else scorer,
            on_unsupported=on_unsupported,
        )
        if probe:
            scorer.probe()
        return reranker

    def rank(
        self,
        query: str,
        documents: Sequence[DocumentLike],
        *,
        instruction: InstructionLike | Resolved = None,
        attributes: Sequence[str] = (),
        top_k: int | None = None,
        long_documents: LongDocuments | None = None,
        progress: Progress | None = None,
    ) -> Ranking:
        """Order documents by relevance to the query under the instruction.

        Args:
            query: What is searched for.
            documents: Texts, `Document`s, or mappings with a `"text"` and optionally an `"id"`
                and `"metadata"`; other keys of a mapping count as metadata.
            instruction: What relevance means here. Without one, that of an enclosing
                `use_instruction(...)` applies. A `Resolved`, as adapters for frameworks get it
                from `resolve_instruction`, is final: the ranking carries its source.
            attributes: The metadata fields that the model may see; none by default.
            top_k: Keep this many; all by default.
            long_documents: Overrides the reranker's own setting.
            progress: Called with the number of documents scored so far and in all.

        Returns:
            The best documents first; ties keep the input's order. No documents, empty ranking.

        Raises:
            InputError: An argument is not usable; the message names it.
            InstructionNotSupportedError: The model has no channel for the instruction.
            ScorerError: The scorer did not give one number for each document.
        """
        _check_top_k(top_k)
        items = _documents(documents)
        resolved = _resolve(instruction)
        request, applied = self._request(query, items, resolved, attributes, long_documents)
        scores = self._score(_with_progress(request, progress))
        return self._ranking(query, items, resolved, applied, scores, top_k)

    def _ranking(
        self,
        query: str,
        items: tuple[Document, ...],
        resolved: Resolved,
        applied: Applied | None,
        scores: Scores,
        top_k: int | None,
    ) -> Ranking:
        finite = [math.isfinite(value) for value in scores.values]
        non_finite = tuple(i for i, ok in enumerate(finite) if not ok)
        if non_finite:
            log.warning(
                "%s gave no finite score for documents %s; they sort last",
                self.scorer.name,
                reprlib.repr(non_finite),
            )
        if scores.degraded is not None:
            log.warning("the input's order is kept, nothing was scored: %s", scores.degraded)
        if applied and scores.degraded:
            applied = "ignored"  # What was not scored was not instructed either.
        elif applied == "lane" and scores.neutral:
            applied = "neutral"
        cut = scores.truncated or (False,) * len(items)
        return Ranking(
            results=tuple(
                RankedDocument(index=i, score=scores.values[i], document=items[i], truncated=cut[i])
                for i in order_by_score(scores.values)[:top_k]
            ),
            query=query,
            model=self.scorer.name,
            instruction_fingerprint=resolved.instruction.fingerprint if applied else None,
            instruction_source=str(resolved.source) if applied and resolved.source else None,
            instruction_applied=applied,
            non_finite=non_finite,
            degraded=scores.degraded,
        )

    def score(
        self,
        query: str,
        documents: Sequence[DocumentLike],
        *,
        instruction: InstructionLike | Resolved = None,
        attributes: Sequence[str] = (),
        long_documents: LongDocuments | None = None,
        progress: Progress | None = None,
    ) -> list[float]:
        """The scores in the order of the documents; arguments and errors as for `rank`.

        Where `rank` would be `degraded`, this raises a `ScorerError`: numbers have no place to say
        that they mean nothing.
        """
        items = _documents(documents)
        resolved = _resolve(instruction)
        request, _ = self._request(query, items, resolved, attributes, long_documents)
        scores = self._score(_with_progress(request, progress))
        if scores.degraded is not None:
            raise ScorerError(scores.degraded)
        return list(scores.values)

    async def arank(
        self,
        query: str,
        documents: Sequence[DocumentLike],
        *,
        instruction: InstructionLike | Resolved = None,
        attributes: Sequence[str] = (),
        top_k: int | None = None,
        long_documents: LongDocuments | None = None,
        progress: Progress | None = None,
    ) -> Ranking:
        """`rank` without blocking the event loop, and without a thread where the scorer allows it.

        A scorer that can be awaited, as that of `from_url`, leaves nothing behind when the call is
        cancelled. A thread cannot be stopped and ends by itself.
        """
        if not isinstance(self.scorer, AsyncScorer):
            return await asyncio.to_thread(
                self.rank,
                query,
                documents,
                instruction=instruction,
                attributes=attributes,
                top_k=top_k,
                long_documents=long_documents,
                progress=progress,
            )
        _check_top_k(top_k)
        items = _documents(documents)
        resolved = _resolve(instruction)
        request, applied = self._request(query, items, resolved, attributes, long_documents)
        request = _with_progress(request, progress)
        scores = self._checked(request, await self.scorer.ascore(request) if items else Scores(()))
        return self._ranking(query, items, resolved, applied, scores, top_k)

    def __repr__(self) -> str:
        """Name the model."""
        return f"Reranker({self.scorer.name!r})"

    def _request(
        self,
        query: str,
        items: tuple[Document, ...],
        resolved: Resolved,
        attributes: Sequence[str],
        long_documents: LongDocuments | None,
    ) -> tuple[RerankRequest, Applied | None]:
        if not isinstance(query, str) or not query.strip():
            raise InputError(f"`query` must be a str that is not blank, got {query!r}")
        fields = _fields(attributes)
        today = resolved.instruction.effective_today()
        text = resolved.instruction.render(today)
        applied: Applied | None = "lane" if text else None
        if text and not self.scorer.supports_instructions:
            if self.on_unsupported == "raise":
                raise InstructionNotSupportedError(
                    f"{self.scorer.name!r} has no channel for an instruction, got "
                    f"{reprlib.repr(text)}; use a model that has one, or choose "
                    "`on_unsupported='prepend'` or 'ignore'"
                )
            prepend = self.on_unsupported == "prepend"
            applied = "prepended" if prepend else "ignored"
            query = f"{text} {query}" if prepend else query
            text = ""
        request = RerankRequest(
            query=query,
            instruction=text,
            candidates=tuple(
                Candidate(
                    text=item.text,
                    attributes=render_attributes(item.metadata, fields, today) if fields else "",
                )
                for item in items
            ),
            long_documents=self.long_documents if long_documents is None else long_documents,
        )
        return request, applied

    def _score(self, request: RerankRequest) -> Scores:
        if not request.candidates:
            return Scores(())
        return self._checked(request, self.scorer.score(request))

    def _checked(self, request: RerankRequest, scores: Scores) -> Scores:
        expected = len(request.candidates)
        if len(scores.values) != expected or len(scores.truncated) not in (0, expected):
            raise ScorerError(
                f"{self.scorer.name!r} gave {len(scores.values)} scores and "
                f"{len(scores.truncated)} truncation flags for {expected} documents"
            )
        try:
            return replace(
                scores,
                values=tuple(map(_number, scores.values)),
                truncated=tuple(scores.truncated),
            )
        except (TypeError, ValueError) as error:
            raise ScorerError(f"{self.scorer.name!r} gave a score that is no number") from error


ModelLike = str | Path | Reranker | Scorer | None
"""What `Reranker.coerce` makes a reranker of; `None` is the model that comes with lanerank."""

_loaded: dict[str | None, Reranker] = {}
_loading = threading.Lock()


def _check_top_k(top_k: int | None) -> None:
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise InputError(f"`top_k` must be an int or None, got {top_k!r}")
    if top_k is not None and top_k < 1:
        raise InputError(f"`top_k` must be at least 1, got {top_k}; leave it out to keep all")


def _number(value: object) -> float:
    # `float` would also read text.
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _resolve(instruction: InstructionLike | Resolved) -> Resolved:
    if isinstance(instruction, Resolved):
        return instruction
    return resolve_instruction(
        [(Source.ARGUMENT, instruction), (Source.USE_INSTRUCTION, current_instruction())]
    )


def _with_progress(request: RerankRequest, progress: Progress | None) -> RerankRequest:
    return replace(request, progress=progress) if progress else request


def _documents(documents: Iterable[DocumentLike]) -> tuple[Document, ...]:
    if isinstance(documents, (str, bytes, Mapping, Document)) or not isinstance(
        documents, Iterable
    ):
        raise InputError(
            f"`documents` must be a list of str, Document or mapping, got "
            f"{type(documents).__name__}; wrap a single document in a list"
        )
    if hasattr(documents, "columns"):
        # Iterating over a table of pandas gives the names of its columns.
        raise InputError(
            "`documents` must be a list of str, Document or mapping, got a "
            f"{type(documents).__name__} with columns; give its rows as mappings, in pandas "
            "`table.to_dict('records')`, or use `rank_dataset`"
        )
    return tuple(_document(i, item) for i, item in enumerate(documents))


def _document(index: int, item: object) -> Document:
    if isinstance(item, Document):
        return item
    if isinstance(item, str):
        return Document(item)
    if not isinstance(item, Mapping):
        raise InputError(
            f"`documents[{index}]` must be a str, Document or mapping, got "
            f"{type(item).__name__}: {reprlib.repr(item)}"
        )
    if not isinstance(item.get("text"), str):
        raise InputError(
            f"`documents[{index}]` has no 'text' that is a str; its keys are "
            f"{reprlib.repr(list(item))}"
        )
    metadata = item.get("metadata") or {}
    identifier = item.get("id")
    if not isinstance(metadata, Mapping):
        raise InputError(
            f"`documents[{index}]['metadata']` must be a mapping, got {reprlib.repr(metadata)}"
        )
    others = {k: v for k, v in item.items() if k not in ("text", "id", "metadata")}
    try:
        return Document(
            item["text"],
            id=None if identifier is None else str(identifier),
            metadata={**others, **metadata},
        )
    except InputError as error:
        raise InputError(f"`documents[{index}]`: {error}") from error


def _fields(attributes: Iterable[str]) -> tuple[str, ...]:
    listed = isinstance(attributes, Iterable) and not isinstance(attributes, str)
    names = tuple(attributes) if listed else ()
    if not listed or not all(isinstance(name, str) for name in names):
        raise InputError(f"`attributes` must be a list of metadata field names, got {attributes!r}")
    # A field is read once, however often a request asks for it.
    return tuple(dict.fromkeys(names))


def _one_of(name: str, value: _T, literal: object) -> _T:
    if value not in get_args(literal):
        raise InputError(f"`{name}` must be one of {get_args(literal)}, got {value!r}")
    return value
