"""Inference with a lane encoder: trusted lanes once, documents in batches of similar length."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

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
        with torch.inference_mode():
            trusted = self.trusted_lanes(request.instruction, request.query)
            logits, truncated = score_in_batches(
                request,
                lambda index, candidate: self.lanes.candidate(
                    index, candidate, request.long_documents
                ),
                lambda batch: self._logits(batch, trusted),
                lambda longest: self.tokens_per_batch // longest,
            )
        probabilities = torch.tensor(logits, dtype=torch.float64).sigmoid()
        return Scores(tuple(probabilities.tolist()), tuple(truncated))

    def trusted_lanes(self, instruction: str, query: str) -> TrustedLanes:
        """The trusted lanes of a request, computed without any document.

        The instruction lane is a function of the instruction alone, and is kept for later calls.
        """
        rule = self.lanes.trusted(Lane.INSTRUCTION, instruction)
        above = self._instruction(rule) if rule else None
        ids = self.lanes.trusted(Lane.QUERY, query)
        room = self.model.config.max_position_embeddings
        if len(ids) > room:
            raise InputError(f"`query` has {len(ids)} tokens, the model reads {room}; shorten it")
        query_lane = self._encode(Lane.QUERY, ids, above)
        return trust(query_lane, above)

    def _instruction(self, ids: tuple[int, ...]) -> LaneStates:
        with self._cache_lock:
            if ids in self._cache:
                self._cache.move_to_end(ids)
                return self._cache[ids]
        states = self._encode(Lane.INSTRUCTION, ids, None)
        with self._cache_lock:
            self._cache[ids] = states
            while len(self._cache) > self._cached_instructions:
                self._cache.popitem(last=False)
        return states

    def _encode(self, lane: Lane, ids: Sequence[int], above: LaneStates | None) -> LaneStates:
        row = torch.tensor([ids], dtype=torch.long, device=self.device).reshape(1, -1)
        return self.model.encode_trusted(lane, row, torch.ones_like(row, dtype=torch.bool), above)

    def _logits(self, batch: Sequence[TokenizedCandidate], trusted: TrustedLanes) -> Tensor:
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
        )
