"""Scorers for the tests of applications: deterministic, instant, without weights.

>>> from lanerank import Reranker
>>> from lanerank.testing import OverlapScorer
>>> Reranker(OverlapScorer()).rank("red", ["a blue fish", "a red fish"])[0].index
1
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lanerank.contracts import RerankRequest, Scores
from lanerank.errors import InputError

_WORD = re.compile(r"\w+")


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))


@dataclass(frozen=True)
class OverlapScorer:
    """Scores by shared words, those of the instruction counting double.

    Enough to see in a test that an instruction reached the model: it changes the scores.
    """

    name: str = "overlap"
    supports_instructions: bool = True

    def score(self, request: RerankRequest) -> Scores:
        """The share of the trusted lanes' words that a candidate has, in [0, 1]."""
        query, instruction = _words(request.query), _words(request.instruction)
        whole = len(query) + 2 * len(instruction)
        values = []
        for candidate in request.candidates:
            found = _words(f"{candidate.attributes} {candidate.text}")
            shared = len(query & found) + 2 * len(instruction & found)
            values.append(shared / whole if whole else 0.0)
        return Scores(tuple(values))


@dataclass(frozen=True)
class ScriptedScorer:
    """Gives each text the score it is told to, and keeps the requests it got.

    Raises:
        InputError: On a text that has no score.
    """

    scores: Mapping[str, float]
    """Score by document text."""
    by_instruction: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Scores that replace those above under a rendered instruction."""
    name: str = "scripted"
    supports_instructions: bool = True
    requests: list[RerankRequest] = field(default_factory=list, compare=False, repr=False)
    """Every request so far, for assertions."""

    def score(self, request: RerankRequest) -> Scores:
        """Look the scores up."""
        self.requests.append(request)
        table = {**self.scores, **self.by_instruction.get(request.instruction, {})}
        unknown = [c.text for c in request.candidates if c.text not in table]
        if unknown:
            raise InputError(f"ScriptedScorer has no score for {unknown[0]!r}; add it to `scores`")
        return Scores(tuple(table[c.text] for c in request.candidates))
