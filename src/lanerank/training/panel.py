"""A panel of judges at work on many pairs: remembered, counted, and several at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from lanerank.errors import InputError, JudgeError
from lanerank.evaluation.measures import Estimate, estimate_mean
from lanerank.training.judge import Judge
from lanerank.training.quadruples import Entry
from lanerank.training.questions import PROMPT_VERSION, Question
from lanerank.training.verdicts import Cost, Verdict, VerdictStore

Order = Literal["random", "both"]
"""Which of a pair is shown first: one drawn at random for each judge, or each in turn."""

JudgeProgress = Callable[[int, int, Cost], None]
"""Called after each question with the number done, the number in all, and what they took."""

_FROZEN = ConfigDict(frozen=True, extra="forbid")
_LEANING = 0.1


class Vote(BaseModel):
    """What one judge said of one pair, shown in one order."""

    model_config = _FROZEN

    judge: str
    """The judge's name."""
    shown_first: Literal["first", "second"]
    """Which entry of the comparison was shown first."""
    preference: Annotated[float, Field(ge=-1, le=1)]
    """1 where the comparison's first entry is far better, whatever the order shown."""
    reason: str
    """Why, in the judge's words, with A for the entry shown first. Show it as data."""


class Comparison(BaseModel):
    """How two entries compare."""

    model_config = _FROZEN

    first: int
    """Position in the list of entries."""
    second: int
    """Position in the list of entries."""
    preference: Annotated[float, Field(ge=-1, le=1)]
    """1 where the first is far better, -1 where the second is: the mean of the votes."""
    votes: tuple[Vote, ...] = ()
    """What it is the mean of; empty where the preference comes from elsewhere."""

    @property
    def win(self) -> float:
        """The share of a game that the first entry wins, in [0, 1]; a half for a tie."""
        return (1 + self.preference) / 2


class JudgingPlan(BaseModel):
    """What judging would take; no judge was asked."""

    model_config = _FROZEN

    pairs: int
    questions: int
    """How many different questions the pairs come to: judges and orders multiply them."""
    remembered: int
    """The questions whose answer is in the cache."""
    calls: int
    """The questions to ask. Answers that cannot be read add to these."""
    characters_sent: int
    """The length of these questions, task included; four characters are about a token of English.
    Answers come to some 300 characters each, and more where a model thinks aloud."""


class Judgements(BaseModel):
    """What a panel found."""

    model_config = _FROZEN

    comparisons: tuple[Comparison, ...]
    """In the order of the pairs, without those on which no judge gave an answer."""
    questions: int
    """As in the plan."""
    remembered: int
    """As in the plan."""
    cost: Cost
    """What this run took; what was remembered cost nothing."""
    failures: tuple[str, ...]
    """The questions without an answer, each with its pair."""
    position_bias: Estimate | None
    """The mean preference for the entry shown first; 0 for a judge that does not care. A term is
    one vote."""
    order_flips: Estimate | None
    """Of the judges and pairs shown in both orders, the share in which another entry was preferred
    after the swap; `None` where none was. A tie is no flip."""
    judge_agreement: Estimate | None
    """Over two judges and a pair, the share that prefer the same entry, ties not counted; `None`
    for a single judge."""

    def warnings(self) -> list[str]:
        """What a person should know of the judges, a sentence each."""
        found = []
        if self.failures:
            found.append(
                f"{len(self.failures)} questions have no answer; the first: {self.failures[0]}."
            )
        bias = self.position_bias
        if bias and abs(bias.value) >= _LEANING and not bias.low <= 0 <= bias.high:
            place = "first" if bias.value > 0 else "second"
            found.append(
                f"The judges lean to the entry shown {place} (mean preference "
                f"{abs(bias.value):.2f}); ask each pair in both orders."
            )
        return found


class JudgePanel:
    """Judges whose votes are averaged.

    Args:
        judges: One or several. A judge that should vote twice is given twice, under two names.
        cache: A SQLite file that keeps every answer as it arrives and is made if it does not exist:
            a run that was broken off goes on where it stopped, and asks nothing twice. `None`
            remembers nothing after the run.
        order: Which entry of a pair is shown first. `"random"` asks half as much as `"both"`, and a
            leaning towards one place is evened out over pairs; `"both"` evens it out in each pair.
        seed: Draws the order, from the content of the pair, so that it stays the same whatever
            other pairs are judged.
        concurrency: How many questions may be under way at a time, over all judges.
        max_failures: How many questions may stay without an answer before the run ends with the
            error of the next. Answers that have come are kept in the cache.

    Raises:
        InputError: An argument is not usable.
    """

    def __init__(
        self,
        judges: Judge | Sequence[Judge],
        *,
        cache: str | Path | None = None,
        order: Order = "random",
        seed: int = 0,
        concurrency: int = 4,
        max_failures: int = 0,
    ) -> None:
        """Check the arguments."""
        members = (judges,) if isinstance(judges, Judge) else tuple(judges)
        if not members or not all(isinstance(judge, Judge) for judge in members):
            raise InputError(f"`judges` must be a `Judge` or several, got {judges!r}")
        names = [judge.name for judge in members]
        if len(set(names)) < len(names):
            raise InputError(
                f"`judges` must have different names, got {names}; answers are remembered by them"
            )
        if order not in get_args(Order):
            raise InputError(f"`order` must be one of {get_args(Order)}, got {order!r}")
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("max_failures", max_failures, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"`{name}` must be an integer from {least}, got {value!r}")
        self.judges = members
        self.cache = None if cache is None else Path(cache)
        self.order = order
        self.seed = seed
        self.concurrency = concurrency
        self.max_failures = max_failures

    def plan(self, entries: Sequence[Entry], pairs: Iterable[tuple[int, int]]) -> JudgingPlan:
        """What `compare` would ask, after what is remembered; no judge is asked.

        Args:
            entries: As for `compare`.
            pairs: As for `compare`.

        Raises:
            InputError: An argument or the cache is not usable.
        """
        pairs = tuple(pairs)
        asked = _unique(self._ballots(entries, pairs))
        known: set[str] = set()
        if self.cache is not None and self.cache.exists():
            with VerdictStore(self.cache) as store:
                known = set(store.get(asked))
        open_ = [ballot for key, ballot in asked.items() if key not in known]
        return JudgingPlan(
            pairs=len(pairs),
            questions=len(asked),
            remembered=len(known),
            calls=len(open_),
            characters_sent=sum(ballot.question().length for ballot in open_),
        )

    def compare(
        self,
        entries: Sequence[Entry],
        pairs: Iterable[tuple[int, int]],
        *,
        progress: JudgeProgress | None = None,
    ) -> Judgements:
        """Ask every judge about every pair.

        Args:
            entries: What is compared.
            pairs: Positions of two entries with the same request, or with the same document; for
                instance from `plan_pairs`.
            progress: Called in the calling thread, once at the start with what is remembered.

        Raises:
            InputError: An argument or the cache is not usable.
            JudgeError: More than `max_failures` questions stayed without an answer.
        """
        # An iterator would be used up by the questions, and leave no comparison of the answers.
        pairs = tuple(pairs)
        ballots = list(self._ballots(entries, pairs))
        asked = _unique(ballots)
        with VerdictStore(self.cache or ":memory:") as store:
            verdicts = store.get(asked)
            remembered = len(verdicts)
            run = _Run(store, self.max_failures, progress, remembered, len(asked))
            open_ = {key: ballot for key, ballot in asked.items() if key not in verdicts}
            verdicts |= run.ask(open_, self.concurrency)
        votes: dict[int, list[Vote]] = defaultdict(list)
        for ballot in ballots:
            if verdict := verdicts.get(ballot.key):
                votes[ballot.place].append(ballot.vote(verdict))
        comparisons = tuple(
            Comparison(
                first=first,
                second=second,
                preference=math.fsum(vote.preference for vote in votes[place]) / len(votes[place]),
                votes=tuple(votes[place]),
            )
            for place, (first, second) in enumerate(pairs)
            if place in votes
        )
        queries = [entries[comparison.first].query_key for comparison in comparisons]
        clusters = {query: number for number, query in enumerate(dict.fromkeys(queries))}
        clustered = [
            (clusters[query], comparison.votes)
            for query, comparison in zip(queries, comparisons, strict=True)
        ]
        return Judgements(
            comparisons=comparisons,
            questions=len(asked),
            remembered=remembered,
            cost=run.cost,
            failures=tuple(run.failures),
            position_bias=estimate_mean(
                (cluster, [_for_shown_first(vote) for vote in cast]) for cluster, cast in clustered
            ),
            order_flips=estimate_mean(
                (cluster, _flips(cast)) for cluster, cast in clustered if self.order == "both"
            ),
            judge_agreement=estimate_mean(
                (cluster, _agreements(cast)) for cluster, cast in clustered
            ),
        )

    def _ballots(
        self, entries: Sequence[Entry], pairs: Iterable[tuple[int, int]]
    ) -> Iterator[_Ballot]:
        for place, (first, second) in enumerate(pairs):
            if not (0 <= first < len(entries) and 0 <= second < len(entries)) or first == second:
                raise InputError(
                    f"`pairs[{place}]` must be two different positions in the {len(entries)} "
                    f"entries, got {(first, second)!r}"
                )
            pair = (entries[first], entries[second])
            orders = (Question.compare(*pair), Question.compare(*reversed(pair)))
            for judge in self.judges:
                for swapped in self._orders(judge, *orders):
                    key = orders[swapped].key(judge.name)
                    yield _Ballot(place, judge, pair, swapped, key)

    def _orders(self, judge: Judge, forward: Question, backward: Question) -> tuple[bool, ...]:
        """For each question to the judge, whether the pair is swapped."""
        if self.order == "both":
            return False, True
        # The draw must not depend on which of the two happened to come first in the list.
        content = json.dumps([self.seed, judge.name, min(forward.data, backward.data)])
        low = bool(hashlib.sha256(content.encode()).digest()[0] % 2)
        return (low == (forward.data < backward.data),)


@dataclass(frozen=True, slots=True)
class _Ballot:
    """One question to one judge. The question is worded when it is needed: texts are large."""

    place: int
    """Of the pair in the list of pairs."""
    judge: Judge
    pair: tuple[Entry, Entry]
    swapped: bool
    """Whether the second entry of the pair is shown first."""
    key: str

    def question(self) -> Question:
        return Question.compare(*(reversed(self.pair) if self.swapped else self.pair))

    def vote(self, verdict: Verdict) -> Vote:
        return Vote(
            judge=self.judge.name,
            shown_first="second" if self.swapped else "first",
            # From 0, since the negative of a tie would be -0.0.
            preference=0.0 - verdict.preference if self.swapped else verdict.preference,
            reason=verdict.reason,
        )


def _unique(ballots: Iterable[_Ballot]) -> dict[str, _Ballot]:
    unique: dict[str, _Ballot] = {}
    for ballot in ballots:
        unique.setdefault(ballot.key, ballot)
    return unique


class _Run:
    """The questions of one run, on their way."""

    def __init__(
        self,
        store: VerdictStore,
        max_failures: int,
        progress: JudgeProgress | None,
        done: int,
        total: int,
    ) -> None:
        self.cost = Cost()
        self.failures: list[str] = []
        self._store = store
        self._max_failures = max_failures
        self._progress = progress
        self._done = done
        self._total = total

    def ask(self, asked: dict[str, _Ballot], concurrency: int) -> dict[str, Verdict]:
        """The verdicts that came, by key."""
        verdicts: dict[str, Verdict] = {}
        self._report()
        threads = ThreadPoolExecutor(concurrency, thread_name_prefix="lanerank-judge")
        try:
            for job in as_completed([threads.submit(self._answer, b) for b in asked.values()]):
                verdict = self._outcome(job)
                if verdict is not None:
                    verdicts[verdict.key] = verdict
                self._done += 1
                self._report()
        finally:
            # Leaving early: what is under way ends and is kept, and nothing new begins.
            threads.shutdown(wait=True, cancel_futures=True)
        return verdicts

    def _answer(self, ballot: _Ballot) -> Verdict:
        try:
            verdict = ballot.judge.ask(ballot.question())
        except JudgeError as error:
            first, second = ballot.pair
            raise JudgeError(
                f"{error} (the pair is [{first}] against [{second}])",
                judge=error.judge,
                cost=error.cost,
            ) from error
        self._store.put(verdict, PROMPT_VERSION)
        return verdict

    def _outcome(self, job: Future[Verdict]) -> Verdict | None:
        try:
            verdict = job.result()
        except JudgeError as error:
            if isinstance(error.cost, Cost):
                self.cost += error.cost
            self.failures.append(str(error))
            if len(self.failures) > self._max_failures:
                raise
            return None
        self.cost += verdict.cost
        return verdict

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._done, self._total, self.cost)


# What votes say of judges


def _for_shown_first(vote: Vote) -> float:
    return vote.preference if vote.shown_first == "first" else -vote.preference


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _flips(votes: Sequence[Vote]) -> list[float]:
    by_judge: dict[str, list[int]] = defaultdict(list)
    for vote in votes:
        by_judge[vote.judge].append(_sign(vote.preference))
    return [float(signs[0] * signs[1] < 0) for signs in by_judge.values() if len(signs) == 2]


def _agreements(votes: Sequence[Vote]) -> list[float]:
    preferred: dict[str, float] = defaultdict(float)
    for vote in votes:
        preferred[vote.judge] += vote.preference
    signs = [_sign(value) for value in preferred.values()]
    return [float(a == b) for a, b in combinations(signs, 2) if a and b]
