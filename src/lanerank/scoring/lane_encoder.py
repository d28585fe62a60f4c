"""Inference with a lane encoder: trusted lanes once, documents in batches of similar length."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from lanerank.contracts import Lane, RerankRequest, Scores
from lanerank.errors import InputError
from lanerank.lanes import LaneTokenizer, TokenizedCandidate
from lanerank.scoring.batching import score_in_batches
from lanerank.scoring.modeling_lane_encoder import (
    LaneEncoder,
    LaneStates,
    TrustedLanes,
    trust,
)

_TRUSTED_TOKENS = 8192
"""Tokens of trusted lanes, padding included, that are in memory for requests scored together."""
_CHARS_PER_TOKEN = 4
"""About, to tell how large a request is before it is read."""
_ALONE = 4
"""Forward passes that a request has to fill before it is scored by itself. One that fills fewer is
quicker among others, where candidates of equal length are found (12 requests of 20: 1.2 times)."""


@dataclass(frozen=True, slots=True)
class _TrustedIds:
    """The token ids of the trusted lanes of a request."""

    instruction: tuple[int, ...]
    query: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.instruction) + len(self.query)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it natively, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
            return torch.bfloat16
    return torch.float32


class LaneEncoderScorer:
    """Scores with a lane encoder; safe to call from several threads.

    Args:
        model: The lane encoder; it is moved to `device` and `dtype` in place.
        lanes: Its tokenizer.
        name: The name that rankings carry.
        device: Where to compute.
        dtype: The precision of the encoder; by default `default_dtype(device)`. The head, which
            turns pooled lanes into a score, always computes in float32.
        tokens_per_batch: Upper bound of the tokens in one forward pass, padding included. Bounds
            memory, whatever the number and length of the documents.
        cached_instructions: How many instructions to keep computed across calls.
    """

    def __init__(
        self,
        model: LaneEncoder,
        lanes: LaneTokenizer,
        *,
        name: str = "lane-encoder",
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        tokens_per_batch: int = 2048,
        cached_instructions: int = 32,
    ) -> None:
        """Put the model into inference mode."""
        self.name = name
        self.lanes = lanes
        self.device = torch.device(device)
        self.dtype = dtype or default_dtype(self.device)
        self.model = model.fold_adapters().cast_encoder(self.dtype, self.device)
        torch.nn.Module.eval(self.model).requires_grad_(requires_grad=False)
        self.tokens_per_batch = tokens_per_batch
        self._cached_instructions = cached_instructions
        self._cache: OrderedDict[tuple[int, ...], LaneStates] = OrderedDict()
        self._cache_lock = threading.Lock()

    @property
    def supports_instructions(self) -> bool:
        """Always: the instruction has a lane of its own."""
        return True

    def score(self, request: RerankRequest) -> Scores:
        """Score every candidate of the request.

        Raises:
            InputError: The instruction or the query is longer than its lane, which is never cut.
        """
        [scores] = self.score_many([request])
        return scores

    @overload
    def score_many(
        self, requests: Sequence[RerankRequest], *, return_exceptions: Literal[False] = False
    ) -> list[Scores]: ...
    @overload
    def score_many(
        self, requests: Sequence[RerankRequest], *, return_exceptions: bool
    ) -> list[Scores | InputError]: ...
    def score_many(
        self, requests: Sequence[RerankRequest], *, return_exceptions: bool = False
    ) -> list[Scores] | list[Scores | InputError]:
        """Score several requests; one forward pass may hold candidates of many.

        Each candidate sees the instruction and the query of its own request alone, so the scores
        are those of one request after the other, up to rounding.

        Args:
            requests: What to score, in any mix. The `progress` of one that is scored beside others
                is told once, at the end.
            return_exceptions: As in `asyncio.gather`: a request that cannot be scored has its
                error in the place of its scores, and does not stop the others.

        Raises:
            InputError: The instruction or the query of a request is longer than its lane.
        """
        results: list[Scores | InputError] = [Scores(())] * len(requests)
        lanes: dict[int, _TrustedIds] = {}
        for number, request in enumerate(requests):
            try:
                lanes[number] = self._trusted_ids(request.instruction, request.query)
            except InputError as error:
                if not return_exceptions:
                    raise
                results[number] = error
        with torch.inference_mode():
            for group in self._groups(requests, lanes):
                for places, trusted in self._heard([lanes[number] for number in group]):
                    numbers = [group[place] for place in places]
                    scored = self._score_group([requests[number] for number in numbers], trusted)
                    for number, scores in zip(numbers, scored, strict=True):
                        results[number] = scores
        return results

    def trusted_lanes(self, instruction: str, query: str) -> TrustedLanes:
        """The trusted lanes of a request, computed without any document.

        The instruction lane is a function of the instruction alone, and is kept for later calls.
        There is none for an instruction that does not count for the query.
        """
        [(_, trusted)] = self._heard([self._trusted_ids(instruction, query)])
        return trusted

    def _trusted_ids(self, instruction: str, query: str) -> _TrustedIds:
        lanes = _TrustedIds(
            self.lanes.trusted(Lane.INSTRUCTION, instruction),
            self.lanes.trusted(Lane.QUERY, query),
        )
        room = self.model.config.max_position_embeddings
        if len(lanes.query) > room:
            raise InputError(
                f"`query` has {len(lanes.query)} tokens, the model reads {room}; shorten it"
            )
        return lanes

    def _heard(self, lanes: Sequence[_TrustedIds]) -> Iterator[tuple[list[int], TrustedLanes]]:
        """The trusted lanes of requests that all have an instruction, or all have none.

        In parts, with the places in `lanes` of each: where an instruction does not count, there is
        none.
        """
        trusted = self._trust(lanes)
        instructed = trusted.instruction is not None
        counts = self.model.counts(trusted).tolist() if instructed else [True] * len(lanes)
        if all(counts):
            yield list(range(len(lanes))), trusted
            return
        heard, silent = (
            [p for p, each in enumerate(counts) if each is kind] for kind in (True, False)
        )
        if heard:
            yield heard, _some(trusted, heard)
        yield silent, self._trust([_TrustedIds((), lanes[place].query) for place in silent])

    def _groups(
        self, requests: Sequence[RerankRequest], lanes: Mapping[int, _TrustedIds]
    ) -> Iterator[list[int]]:
        """The requests to score together: small ones that are alike."""
        gathered: dict[bool, list[int]] = {True: [], False: []}
        for number, trusted in lanes.items():
            # A request that fills batches by itself best shares its trusted lanes with nobody.
            chars = sum(len(candidate.text) for candidate in requests[number].candidates)
            if len(lanes) == 1 or chars > _CHARS_PER_TOKEN * _ALONE * self.tokens_per_batch:
                yield [number]
            else:
                # With an instruction the model has other weights than without.
                gathered[bool(trusted.instruction)].append(number)
        for alike in gathered.values():
            group: list[int] = []
            for number in sorted(alike, key=lambda number: len(lanes[number])):
                if group and (len(group) + 1) * len(lanes[number]) > _TRUSTED_TOKENS:
                    yield group
                    group = []
                group.append(number)
            if group:
                yield group

    def _score_group(
        self, requests: Sequence[RerankRequest], trusted: TrustedLanes
    ) -> list[Scores]:
        owner = [number for number, request in enumerate(requests) for _ in request.candidates]
        instructed = trusted.instruction is not None
        echoes = [self.lanes.echoes(each.instruction if instructed else "") for each in requests]
        alone = requests[0] if len(requests) == 1 else None
        # Beside others, a candidate brings a copy of the trusted lanes that it attends to.
        copied = 0 if alone or trusted.joined is None else trusted.joined.mask.shape[1]
        logits, truncated = score_in_batches(
            RerankRequest(
                query="",
                candidates=tuple(c for request in requests for c in request.candidates),
                progress=alone.progress if alone else None,
            ),
            lambda index, candidate: self.lanes.candidate(
                index,
                candidate,
                requests[owner[index]].long_documents,
                echoes[owner[index]],
            ),
            lambda batch: self._logits(
                batch, trusted, None if alone else [owner[window.index] for window in batch]
            ),
            lambda longest: self.tokens_per_batch // max(longest, copied),
        )
        probabilities = torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
        scored, end = [], 0
        for request in requests:
            start, end = end, end + len(request.candidates)
            scored.append(
                Scores(
                    tuple(probabilities[start:end]),
                    tuple(truncated[start:end]),
                    neutral=bool(request.instruction) and not instructed,
                )
            )
            if request.progress is not None and alone is None:
                request.progress(end - start, end - start)
        return scored

    def _trust(self, lanes: Sequence[_TrustedIds]) -> TrustedLanes:
        """The trusted lanes of requests that all have an instruction, or all have none."""
        above = None
        if lanes[0].instruction:
            above = _side_by_side([self._instruction(each.instruction) for each in lanes])
        return trust(self._encode(Lane.QUERY, [each.query for each in lanes], above), above)

    def _instruction(self, ids: tuple[int, ...]) -> LaneStates:
        with self._cache_lock:
            if ids in self._cache:
                self._cache.move_to_end(ids)
                return self._cache[ids]
        states = self._encode(Lane.INSTRUCTION, [ids], None)
        with self._cache_lock:
            self._cache[ids] = states
            while len(self._cache) > self._cached_instructions:
                self._cache.popitem(last=False)
        return states

    def _encode(
        self, lane: Lane, rows: Sequence[tuple[int, ...]], above: LaneStates | None
    ) -> LaneStates:
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return self.model.encode_trusted(lane, ids.to(self.device), mask.to(self.device), above)

    def _logits(
        self,
        batch: Sequence[TokenizedCandidate],
        trusted: TrustedLanes,
        group: Sequence[int] | None,
    ) -> Tensor:
        longest = len(batch[0])
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        lanes = torch.full_like(ids, int(Lane.DOCUMENT))
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, window in enumerate(batch):
            ids[row, : len(window)] = torch.tensor(window.attributes + window.document)
            lanes[row, : len(window.attributes)] = int(Lane.ATTRIBUTES)
            mask[row, : len(window)] = True
        return self.model.score_candidates(
            ids.to(self.device),
            lanes.to(self.device),
            mask.to(self.device),
            trusted,
            None if group is None else torch.tensor(group, device=self.device),
        )


def _side_by_side(states: Sequence[LaneStates]) -> LaneStates:
    """One lane of several requests, the shorter ones padded."""
    if len(states) == 1:
        return states[0]
    longest = max(each.mask.shape[1] for each in states)

    def padded(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts], 1)

    return LaneStates(
        tuple(map(padded, zip(*(each.keys for each in states), strict=True))),
        tuple(map(padded, zip(*(each.values for each in states), strict=True))),
        torch.cat([F.pad(each.mask, (0, longest - each.mask.shape[1])) for each in states]),
        torch.cat([each.total for each in states]),
        torch.cat([F.pad(each.exclusion, (0, longest - each.mask.shape[1])) for each in states]),
        torch.cat([each.excluded for each in states]),
        torch.cat([F.pad(each.tokens, (0, 0, 0, longest - each.mask.shape[1])) for each in states]),
    )


def _some(trusted: TrustedLanes, places: list[int]) -> TrustedLanes:
    """The trusted lanes of some of the requests."""

    def some(states: LaneStates) -> LaneStates:
        return LaneStates(
            tuple(each[:, places] for each in states.keys),
            tuple(each[:, places] for each in states.values),
            states.mask[places],
            states.total[places],
            states.exclusion[places],
            states.excluded[places],
            states.tokens[places],
        )

    instruction = None if trusted.instruction is None else some(trusted.instruction)
    return trust(some(trusted.query), instruction)
