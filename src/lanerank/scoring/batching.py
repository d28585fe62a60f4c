"""What scorers that load a model have in common: batches of similar length, best of windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from lanerank.contracts import Candidate, RerankRequest

_CANDIDATES_PER_CHUNK = 1024
"""How many candidates are tokenised and sorted by length at a time; bounds memory."""
_BUSY_TOKENS = 1024
"""Tokens from which on larger batches are hardly faster for each token."""
_SIMILAR = 0.9
"""The least length of a window beside the longest of a batch, once the batch is large enough."""


class Window(Protocol):
    """A part of a candidate that the model reads in one go."""

    @property
    def index(self) -> int:
        """Position of the candidate in the request."""
        ...

    def __len__(self) -> int:
        """Number of tokens."""
        ...


W = TypeVar("W", bound=Window)


def score_in_batches(
    request: RerankRequest,
    windows_of: Callable[[int, Candidate], tuple[Sequence[W], bool]],
    logits_of: Callable[[Sequence[W]], Tensor],
    rows_of: Callable[[int], int],
) -> tuple[list[float], list[bool]]:
    """Score the candidates of a request in batches of similar length.

    Args:
        request: What to score; `request.progress` is told after every batch.
        windows_of: The windows of a candidate, and whether a part of it is in none of them.
        logits_of: Raw scores of a batch of windows, longest first: `(b,)`.
        rows_of: How many windows may be in a batch whose longest has the given length.

    Returns:
        For each candidate the raw score of its best window, and whether it was cut.
    """
    total = len(request.candidates)
    best = [float("-inf")] * total
    truncated = [False] * total
    done = 0
    for start in range(0, total, _CANDIDATES_PER_CHUNK):
        windows: list[W] = []
        waiting: dict[int, int] = {}
        chunk = request.candidates[start : start + _CANDIDATES_PER_CHUNK]
        for index, candidate in enumerate(chunk, start):
            parts, truncated[index] = windows_of(index, candidate)
            windows += parts
            waiting[index] = len(parts)
        for batch in _batches(windows, rows_of):
            for window, logit in zip(batch, logits_of(batch).tolist(), strict=True):
                # NaN compares false: once there it stays, instead of being hidden by another
                # window.
                if math.isnan(logit) or logit > best[window.index]:
                    best[window.index] = logit
                waiting[window.index] -= 1
                done += waiting[window.index] == 0
            if request.progress is not None:
                request.progress(done, total)
    return best, truncated


def _batches(windows: list[W], rows_of: Callable[[int], int]) -> Iterator[list[W]]:
    """Windows of similar length together, so that little of a batch is padding."""
    ordered = sorted(windows, key=len, reverse=True)
    start = 0
    while start < len(ordered):
        longest = len(ordered[start])
        end = min(start + max(1, rows_of(longest)), len(ordered))
        # A batch that keeps the processor busy may end before padding costs more than a new one.
        busy = start + -(-_BUSY_TOKENS // longest)
        while end > busy and len(ordered[end - 1]) < _SIMILAR * longest:
            end -= 1
        yield ordered[start:end]
        start = end
