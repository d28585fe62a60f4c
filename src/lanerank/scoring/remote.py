"""A scorer that asks a server or a hosted service, by its contract. Needs the extra `remote`.

An answer counts only if it has exactly one finite number for each document; anything else is a
`RemoteError`.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, get_args

from pydantic import SecretStr

from lanerank.contracts import Candidate, RerankRequest, Scores
from lanerank.display import one_line
from lanerank.errors import InputError, InstructionNotSupportedError, RemoteError
from lanerank.lanes import clean_text
from lanerank.markers import Steps, at_once
from lanerank.scoring.transport import Backoff, Transport, find_address, find_key
from lanerank.service import (
    Draft,
    ScoreKind,
    ServiceContract,
    check_rendering,
    read_service,
    service_for,
)
from lanerank.template import PromptTemplate, contract_for, known_models, read_contract

T = TypeVar("T")

_BACKOFF = Backoff()
_PER_DOCUMENT = 200
"""Bytes that names, quotes and a service's own counting add to a document, at most."""

_TURN = 0.005
"""Seconds after which others on an event loop get their turn."""

_WHOLE = re.compile(r"(?:[^\\]++|\\u.{4}|\\[^u])*+")
"""As much of a JSON string as does not end within an escape."""

_PROBE = RerankRequest(
    query="bank",
    candidates=(
        Candidate(text="Open a savings account and earn interest every month."),
        Candidate(text="The rowers landed where the river had washed out the grass."),
    ),
)
_PROBE_INSTRUCTION = "The user plans a boat trip: 'bank' means the side of a river, never money."


class RemoteScorer:
    """Scores by asking a service over HTTP.

    It may be called from several threads and event loops, which share its connections as far as
    they can. A pickled copy opens its own, and carries the key in plain text.

    Args:
        url: The server's address, with or without the contract's path. By default a hosted
            service's own.
        service: A name that lanerank knows (see `lanerank models --services`), a JSON file, or a
            `ServiceContract`.
        model: The name by which the service knows the model.
        api_key: The key. By default that of the environment variable which the contract names,
            which a hosted service gets at its own address only.
        template: How the model wants to be asked, where its exact hub id as `model` does not tell:
            a model id or family that lanerank knows, a JSON file, or a `PromptTemplate`. A server
            that takes no instruction gets the prompt rendered by it; for others it says which
            markers texts must not imitate.
        instructions: Whether the model follows instructions. Say `False` for a plain cross-encoder,
            and an instruction is refused instead of being lost on the way.
        scores: What the scores are, if not what the contract says: `"unit"` for [0, 1], `"logit"`
            to apply a sigmoid, `"raw"` to take any number.
        timeout: Seconds that one attempt may take.
        max_retries: How often a request is repeated that found no server, took too long, or got the
            status 408, 425, 429, 500, 502, 503 or 504.
        concurrency: How many requests may be under way at a time.
        backoff: How long to wait in between.

    Raises:
        InputError: An option is not usable, or a key is required and missing.
        ModelLoadError: A file is not a contract.
    """

    def __init__(
        self,
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
        backoff: Backoff = _BACKOFF,
    ) -> None:
        """Check everything; nothing is sent."""
        contract = _service(service)
        _check_model(model, contract)
        if scores is not None and scores not in get_args(ScoreKind):
            raise InputError(f"`scores` must be one of {get_args(ScoreKind)}, got {scores!r}")
        address = find_address(url, contract)
        self.contract = contract
        self.model = model
        self.scores = scores
        self.template = _template(template, model, contract)
        self.supports_instructions = instructions and contract.carries_instructions(self.template)
        self._transport = Transport(
            contract,
            address,
            find_key(api_key, contract, address),
            timeout=timeout,
            max_retries=max_retries,
            concurrency=concurrency,
            backoff=backoff,
        )

    @property
    def name(self) -> str:
        """The service, and the model where it is named."""
        service = self.contract.service
        return service if self.model is None else f"{service}:{self.model}"

    @property
    def url(self) -> str:
        """The whole address."""
        return self._transport.url

    def __repr__(self) -> str:
        """Name the service, the model and the address."""
        return f"RemoteScorer({self.name!r}, url={self.url!r})"

    def score(self, request: RerankRequest) -> Scores:
        """Score every candidate of the request.

        Raises:
            InputError: The query is too long for the service, or windows are asked for and the
                service cannot be told.
            InstructionNotSupportedError: The instruction would not reach the model.
            RemoteError: The service did not give one number for each candidate.
        """
        parts = at_once(self._parts(request))
        tell = _teller(request)

        def ask(part: _Part) -> Scores:
            try:
                return self._read(part, self._transport.post(part.body))
            except RemoteError as error:
                if not part.divides(error):
                    raise
            halves = part.halves()
            return _whole(halves, [ask(half) for half in halves])

        answers = []
        with closing(self._transport.map(ask, parts)) as given:
            for part, answer in zip(parts, given, strict=True):
                answers.append(answer)
                tell(part.count)
        return _whole(parts, answers)

    async def ascore(self, request: RerankRequest) -> Scores:
        """`score` on the event loop, without a thread; cancelling it cancels the requests.

        Others on the loop get their turn while long documents are made ready to be sent.
        """
        parts = await _in_turns(self._parts(request))
        tell = _teller(request)

        async def ask(part: _Part) -> Scores:
            try:
                answer = self._read(part, await self._transport.apost(part.body))
            except RemoteError as error:
                if not part.divides(error):
                    raise
            else:
                tell(part.count)
                return answer
            halves = part.halves()
            return _whole(halves, [await ask(half) for half in halves])

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(part)) for part in parts]
        except ExceptionGroup as errors:
            # One failure is enough, and callers look for the error itself.
            raise errors.exceptions[0] from None
        return _whole(parts, [task.result() for task in tasks])

    def probe(self) -> None:
        """Check that an instruction reaches the model: it has to change a known pair's scores.

        Nothing is asked of a service that has no way for one.

        Raises:
            InstructionNotSupportedError: It changes nothing; the message names the usual causes.
            RemoteError: The service did not answer as it should.
        """
        if not self.supports_instructions:
            return
        instructed = replace(_PROBE, instruction=_PROBE_INSTRUCTION)
        # A server that batches with other requests does not repeat a score to the last bit; the
        # third answer says how far apart two equal questions lie.
        plain, changed, again = (
            self.score(request).values for request in (_PROBE, instructed, _PROBE)
        )
        noise = max(abs(one - two) for one, two in zip(plain, again, strict=True))
        effect = max(abs(one - two) for one, two in zip(plain, changed, strict=True))
        if effect > 2 * noise + 1e-7:
            return
        causes = "".join(f"\n- {cause}" for cause in self.contract.causes)
        raise InstructionNotSupportedError(
            f"{self.name!r} at {self.url} gave a known pair the scores {plain} without and "
            f"{changed} with an instruction: it does not reach the model. Usual causes:{causes}\n"
            "Mend the server, pass `instructions=False` if the model takes none, or skip this "
            "check with `probe=False`"
        )

    def close(self) -> None:
        """Close the connections of all threads; a later call opens new ones.

        Those of asynchronous calls close with their event loop, or by `aclose`.
        """
        self._transport.close()

    async def aclose(self) -> None:
        """Close the connections of this event loop, and those of all threads."""
        await self._transport.aclose()

    def __enter__(self) -> Self:
        """Give the scorer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections of all threads."""
        self.close()

    async def __aenter__(self) -> Self:
        """Give the scorer."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the connections of this event loop and of all threads."""
        await self.aclose()

    def _parts(self, request: RerankRequest) -> Steps[list[_Part]]:
        """The requests to send: each within the limits of the service, in the input's order."""
        limits = self.contract.limits
        draft = yield from self.contract.draft(
            query=clean_text(request.query),
            instruction=clean_text(request.instruction),
            model=self.model,
            template=self.template,
            long_documents=request.long_documents,
        )
        # What a document costs without its text: many services count the query with each.
        empty = yield from draft.document("", "")
        fixed = len(_json(draft.body([empty]))) + _PER_DOCUMENT
        if fixed > limits.bytes // 2:
            raise InputError(
                f"`query` and `instruction` leave too little room for documents: they take {fixed} "
                f"bytes, and {self.contract.service!r} takes {limits.bytes} for one document with "
                "both; shorten them"
            )
        parts: list[_Part] = []
        documents: list[tuple[str, str]] = []
        cut: list[bool] = []
        used = 0
        for candidate in request.candidates:
            whole = clean_text(candidate.text), clean_text(candidate.attributes).strip()
            attributes = _beginning(whole[1], limits.bytes - fixed)
            text = _beginning(whole[0], limits.bytes - fixed - _size(attributes))
            cost = fixed + _size(attributes) + _size(text)
            if documents and (len(documents) == limits.documents or used + cost > limits.bytes):
                parts.append(_Part.of(draft, documents, cut))
                documents, cut, used = [], [], 0
            documents.append((yield from draft.document(text, attributes)))
            cut.append((text, attributes) != whole)
            used += cost
            yield
        if documents:
            parts.append(_Part.of(draft, documents, cut))
        return parts

    def _read(self, part: _Part, answer: SecretStr) -> Scores:
        found = self._scores(part, answer.get_secret_value())
        if isinstance(found, Scores):
            return found
        # Read again, since a message quotes pieces, and half of a key would not be found in them.
        text = self._transport.redacted(answer.get_secret_value())
        problem = self._scores(part, text)
        raise self._transport.error(
            f"gave an answer that is not usable, {problem}; it begins {one_line(text, 200)!r}", 200
        )

    def _scores(self, part: _Part, text: str) -> Scores | str:
        """The scores of an answer, or what is wrong with it."""
        try:
            return self.contract.read(json.loads(text), part.count, scores=self.scores)
        except json.JSONDecodeError as error:
            return f"it is no JSON ({error})"
        except (ValueError, RecursionError) as error:
            return str(error)


@dataclass(frozen=True, slots=True)
class _Part:
    """One request to send."""

    draft: Draft
    """Where the query and the instruction come from."""
    documents: tuple[tuple[str, str], ...]
    """As they are sent."""
    cut: tuple[bool, ...]
    """For each document, whether it was cut to fit."""
    body: bytes

    @classmethod
    def of(cls, draft: Draft, documents: Sequence[tuple[str, str]], cut: Sequence[bool]) -> _Part:
        return cls(draft, tuple(documents), tuple(cut), _json(draft.body(documents)))

    def halves(self) -> list[_Part]:
        middle = self.count // 2
        return [
            self.of(self.draft, self.documents[half], self.cut[half])
            for half in (slice(middle), slice(middle, None))
        ]

    @property
    def count(self) -> int:
        return len(self.cut)

    def divides(self, error: RemoteError) -> bool:
        """Whether halves may pass: a server's own limits can be lower than its contract's."""
        return error.status == 413 and self.count > 1


def _teller(request: RerankRequest) -> Callable[[int], None]:
    """Reports progress: takes how many more documents are scored."""
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        if request.progress is not None:
            request.progress(done, len(request.candidates))

    return tell


async def _in_turns(steps: Steps[T]) -> T:
    """What steps come to, with a turn for others on the event loop now and then."""
    begun = time.monotonic()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
        if time.monotonic() - begun > _TURN:
            await asyncio.sleep(0)
            begun = time.monotonic()


def _whole(parts: Sequence[_Part], answers: Sequence[Scores]) -> Scores:
    values: list[float] = []
    truncated: list[bool] = []
    for part, answer in zip(parts, answers, strict=True):
        values += answer.values
        told = answer.truncated or (False,) * part.count
        truncated += (ours or theirs for ours, theirs in zip(part.cut, told, strict=True))
    return Scores(
        tuple(values),
        tuple(truncated) if any(truncated) else (),
        neutral=any(answer.neutral for answer in answers),
    )


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _size(text: str) -> int:
    """Bytes in the body, where a control character takes six and a quote two."""
    return len(_json(text))


def _beginning(text: str, room: int) -> str:
    content = _json(text)
    if len(content) <= room:
        return text
    # Without the quotes.
    kept = _WHOLE.findall(content[1 : max(room - 1, 1)].decode(errors="ignore"))[0]
    return str(json.loads(f'"{kept}"'))


def _service(service: str | Path | ServiceContract) -> ServiceContract:
    if isinstance(service, ServiceContract):
        return service
    if isinstance(service, Path) or (isinstance(service, str) and service.endswith(".json")):
        return read_service(service)
    if isinstance(service, str):
        return service_for(service)
    raise InputError(
        f"`service` must be a name, a JSON file or a `ServiceContract`, got {service!r}"
    )


def _check_model(model: str | None, contract: ServiceContract) -> None:
    if model is None and contract.url is not None:
        raise InputError(f"`model` is missing; {contract.service!r} serves several, name one")
    if model is not None and not isinstance(model, str):
        raise InputError(f"`model` must be a str or None, got {model!r}")
    if model in contract.refused:
        raise InputError(f"`model` {model!r} is refused: {contract.refused[model]}; use another")


def _template(
    template: str | Path | PromptTemplate | None, model: str | None, contract: ServiceContract
) -> PromptTemplate | None:
    if template is not None and contract.isolates_lanes:
        raise InputError(
            f"`template` is not for {contract.service!r}, which knows how its model is asked; "
            "leave it out"
        )
    if isinstance(template, Path) or (isinstance(template, str) and template.endswith(".json")):
        template = read_contract(template)
    elif isinstance(template, str):
        template = contract_for(template)
    elif template is None:
        template = dict(known_models()).get(model or "")
    if template is None:
        return None
    if template.kind == "refused":
        raise InputError(f"`model` {model!r} is refused: {template.reason}; use another")
    if contract.instruction is not None and contract.instruction.template:
        check_rendering(template, contract)
    return template
