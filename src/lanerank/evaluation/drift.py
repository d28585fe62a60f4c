"""Whether rankings moved: the cases of a snapshot, scored again."""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy import stats

from lanerank.display import one_line
from lanerank.errors import InputError
from lanerank.evaluation.cases import Case
from lanerank.evaluation.measures import FloatArray, IntArray
from lanerank.evaluation.scoring import SupportsScore
from lanerank.evaluation.snapshot import (
    SCORE_DIGITS,
    RecordedCase,
    RecordedDocument,
    Snapshot,
    take_snapshot,
)

SCORE_TOLERANCE = 0.02
"""Several times what a change of precision does to a score."""

TOP_K = 10
"""As far as most readers of a ranking look."""

Beyond = Literal["score", "rank"]

_NAME_WIDTH = 60
_MAX_CASES = 10
_MAX_NAMES = 5


class DocumentDrift(BaseModel):
    """A document that moved beyond tolerance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int
    """Position in the case's documents, from 0."""
    document: str
    """The document's id; without one, its number and the beginning of its text."""
    beyond: tuple[Beyond, ...]
    """What is beyond tolerance."""
    recorded_score: float | None
    """The score of the snapshot; `None` where it was not finite."""
    score: float | None
    """The score now; `None` where it is not finite."""
    score_change: float | None
    """`score - recorded_score`; `None` where either is not finite."""
    recorded_rank: int
    """The rank of the snapshot among the documents compared, from 1."""
    rank: int
    """The rank now among the documents compared, from 1."""
    places: int
    """Places won, or lost if below 0, against documents that are no near-ties."""


class CaseDrift(BaseModel):
    """What became of a case that is in the snapshot and among the cases checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """The case's id."""
    documents: int
    """The number of documents compared: those whose content is the recorded one."""
    moved: tuple[DocumentDrift, ...]
    """The documents that moved beyond tolerance, worst first."""
    max_score_change: float | None
    """The largest `|score_change|` of all documents compared; `None` where there is none."""
    kendall_tau: float | None
    """Kendall's tau between the orders then and now: 1 for the same, -1 for the reverse; near-ties
    count too. `None` for fewer than two documents."""
    recorded_instruction: str | None
    """The fingerprint of the instruction in the snapshot; `None` without one."""
    instruction: str | None
    """The fingerprint now. Another wording is reported, and is not drift by itself."""
    query_changed: bool
    """Whether the query is another one; then no document is compared."""
    changed_documents: tuple[str, ...]
    """Documents whose text or attributes are not the recorded ones."""
    new_documents: tuple[str, ...]
    """Documents that the snapshot does not have."""
    removed_documents: tuple[str, ...]
    """Ids, or hashes of the content, of documents that only the snapshot has."""

    @property
    def reworded(self) -> bool:
        """Whether the instruction is not the recorded one."""
        return self.instruction != self.recorded_instruction

    @property
    def outdated(self) -> bool:
        """Whether the query or the documents are not the recorded ones."""
        return self.query_changed or any(
            (self.changed_documents, self.new_documents, self.removed_documents)
        )


class DriftReport(BaseModel):
    """What moved since a snapshot; `str(report)` is a summary for people."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ok: bool
    """Whether nothing moved beyond tolerance, and nothing escaped the check: a new, missing or
    outdated case is not ok, because no one looked at it."""
    recorded_model: str
    """The scorer's name in the snapshot."""
    model: str
    """The name of the scorer checked."""
    recorded_lanerank: str
    """The version of lanerank that took the snapshot."""
    lanerank: str
    """The version of lanerank that checked it."""
    score_tolerance: float | None
    """As given to `check_snapshot`."""
    tie_tolerance: float
    """As given to `check_snapshot`, or its default."""
    rank_tolerance: int
    """As given to `check_snapshot`."""
    top_k: int | None
    """As given to `check_snapshot`."""
    documents: int
    """The number of documents compared."""
    mean_score_change: float | None
    """The mean of `score - recorded_score` over the documents compared: close to 0 for noise; where
    it is not, a threshold chosen on the old scores no longer fits. `None` where there is none."""
    max_score_change: float | None
    """The largest `|score - recorded_score|` of them."""
    cases: tuple[CaseDrift, ...]
    """The cases compared, in the order given."""
    new_cases: tuple[str, ...]
    """Ids of cases that the snapshot does not have."""
    missing_cases: tuple[str, ...]
    """Ids of cases that only the snapshot has."""

    def __str__(self) -> str:
        """What moved, the worst first, on a bounded number of lines."""
        return "\n".join(_summarise(self))


def check_snapshot(
    snapshot: Snapshot,
    reranker: SupportsScore,
    cases: Sequence[Case],
    *,
    score_tolerance: float | None = SCORE_TOLERANCE,
    tie_tolerance: float | None = None,
    rank_tolerance: int = 0,
    top_k: int | None = TOP_K,
    progress: Callable[[int, int], None] | None = None,
) -> DriftReport:
    """Score the cases of a snapshot again, and say what moved.

    A case is known by its id. A document is known by its id, or else by its content, wherever it
    stands in the list; it is compared if its content is the recorded one. A score moved if it
    changed by more than `score_tolerance`, or stopped or began to be finite. Two documents changed
    places if one was ahead by more than `tie_tolerance` and now is behind by more than that:
    near-ties, then or now, may swap, and as long as no score changes by more than `tie_tolerance`,
    no rank counts as moved. A rank moved if more than `rank_tolerance` places were won or lost, on
    balance, against documents that changed places with it.

    Args:
        snapshot: How it was.
        reranker: What to check: the recorded model, or another.
        cases: The cases as they are now, in any order. Instructions may be worded anew.
        score_tolerance: The largest change of a score that is not drift. With `None` the ranks
            alone are judged, for a model whose scores mean something else.
        tie_tolerance: The largest difference between scores that makes a near-tie. By default
            `score_tolerance`, but not above 0.02, so that leniency with scores does not hide a
            change of order.
        rank_tolerance: The most places that a document may move.
        top_k: Only documents among the best `top_k`, then or now, are judged by rank; `None` for
            all, 0 for none.
        progress: Called after each case with the number done and the number in all.

    Returns:
        The report. It depends on the scores alone.

    Raises:
        InputError: If a tolerance is not usable, or the cases are not; see `take_snapshot`.
        ScorerError: If the reranker does not return one score for each document.
    """
    if not isinstance(snapshot, Snapshot):
        raise InputError(
            f"`snapshot` must be a `Snapshot`, got {reprlib.repr(snapshot)}; `Snapshot.load` reads "
            "one from a file"
        )
    limits = _Limits.check(score_tolerance, tie_tolerance, rank_tolerance, top_k)
    now = take_snapshot(reranker, cases, progress=progress)
    recorded = {case.id: case for case in snapshot.cases}
    compared = [
        _compare(recorded[case.id], found, case, limits)
        for case, found in zip(cases, now.cases, strict=True)
        if case.id in recorded
    ]
    drifts = tuple(drift for drift, _ in compared)
    changes = np.concatenate([np.empty(0), *(changes for _, changes in compared)])
    new_cases = tuple(case.id for case in cases if case.id not in recorded)
    given = {case.id for case in cases}
    missing_cases = tuple(name for name in recorded if name not in given)
    return DriftReport(
        ok=not (new_cases or missing_cases or any(d.moved or d.outdated for d in drifts)),
        recorded_model=snapshot.model,
        model=now.model,
        recorded_lanerank=snapshot.lanerank,
        lanerank=now.lanerank,
        score_tolerance=score_tolerance,
        tie_tolerance=limits.tie,
        rank_tolerance=rank_tolerance,
        top_k=top_k,
        documents=sum(drift.documents for drift in drifts),
        mean_score_change=_mean(changes),
        max_score_change=_largest(changes),
        cases=drifts,
        new_cases=new_cases,
        missing_cases=missing_cases,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    """The tolerances, checked; infinite where they do not apply."""

    score: float
    tie: float
    rank: int
    top_k: float

    @classmethod
    def check(cls, score: float | None, tie: float | None, rank: int, top_k: int | None) -> _Limits:
        for name, number in (("score_tolerance", score), ("tie_tolerance", tie)):
            if number is not None and not (_is(int | float, number) and 0 <= number < math.inf):
                raise InputError(f"`{name}` must be a number from 0, or None, got {number!r}")
        if not (_is(int, rank) and rank >= 0):
            raise InputError(f"`rank_tolerance` must be an int from 0, got {rank!r}")
        if top_k is not None and not (_is(int, top_k) and top_k >= 0):
            raise InputError(f"`top_k` must be an int from 0, or None, got {top_k!r}")
        score = math.inf if score is None else score
        return cls(
            score=score,
            tie=min(score, SCORE_TOLERANCE) if tie is None else tie,
            rank=rank,
            top_k=math.inf if top_k is None else top_k,
        )


def _is(kind: type | UnionType, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _compare(
    recorded: RecordedCase, found: RecordedCase, case: Case, limits: _Limits
) -> tuple[CaseDrift, FloatArray]:
    """What became of a case, and the change of each score compared; NaN where it has none."""
    names = [
        document.id or one_line(f"#{number} {document.text}", _NAME_WIDTH)
        for number, document in enumerate(case.documents, 1)
    ]
    pairs = _match(recorded.documents, found.documents)
    changed = [j for i, j in pairs if recorded.documents[i].content != found.documents[j].content]
    query_changed = recorded.query != found.query
    same = [(i, j) for i, j in pairs if j not in changed and not query_changed]
    before = [recorded.documents[i] for i, _ in same]
    after = [found.documents[j] for _, j in same]

    old, new = _scores(before), _scores(after)
    old_ranks, new_ranks = _ranks(before), _ranks(after)
    changes = _differences(new, old)
    places = _places(old, new, limits.tie)
    by_score = (np.isnan(old) != np.isnan(new)) | (np.abs(changes) > limits.score)
    watched = np.minimum(old_ranks, new_ranks) <= limits.top_k
    by_rank = watched & (np.abs(places) > limits.rank)
    moved = [
        DocumentDrift(
            index=same[k][1],
            document=names[same[k][1]],
            beyond=tuple(
                name
                for name, far in zip(get_args(Beyond), (by_score[k], by_rank[k]), strict=True)
                if far
            ),
            recorded_score=before[k].score,
            score=after[k].score,
            score_change=_number(changes[k]),
            recorded_rank=int(old_ranks[k]),
            rank=int(new_ranks[k]),
            places=int(places[k]),
        )
        for k in np.flatnonzero(by_score | by_rank)
    ]
    known, matched = {i for i, _ in pairs}, {j for _, j in pairs}
    drift = CaseDrift(
        id=case.id,
        documents=len(same),
        moved=tuple(sorted(moved, key=_severity, reverse=True)),
        max_score_change=_largest(changes),
        kendall_tau=_kendall_tau(old_ranks, new_ranks),
        recorded_instruction=recorded.instruction,
        instruction=found.instruction,
        query_changed=query_changed,
        changed_documents=tuple(names[j] for j in changed),
        new_documents=tuple(name for j, name in enumerate(names) if j not in matched),
        removed_documents=tuple(
            document.id or document.content
            for i, document in enumerate(recorded.documents)
            if i not in known
        ),
    )
    return drift, changes


def _match(
    recorded: Sequence[RecordedDocument], found: Sequence[RecordedDocument]
) -> list[tuple[int, int]]:
    """Positions of the same document: by id, the rest by content, equal ones in their order."""
    by_id = {document.id: i for i, document in enumerate(recorded) if document.id is not None}
    partners = {j: by_id[doc.id] for j, doc in enumerate(found) if doc.id in by_id}
    taken = set(partners.values())
    by_content: defaultdict[str, deque[int]] = defaultdict(deque)
    for i, document in enumerate(recorded):
        if i not in taken:
            by_content[document.content].append(i)
    for j, document in enumerate(found):
        if j not in partners and by_content[document.content]:
            partners[j] = by_content[document.content].popleft()
    return [(i, j) for j, i in sorted(partners.items())]


def _scores(documents: Sequence[RecordedDocument]) -> FloatArray:
    return np.array([document.score for document in documents], dtype=float)


def _ranks(documents: Sequence[RecordedDocument]) -> IntArray:
    """The ranks among these documents alone, from 1."""
    ranks = np.array([document.rank for document in documents], dtype=np.int64)
    return np.argsort(np.argsort(ranks)) + 1


def _differences(left: FloatArray | float, right: FloatArray) -> FloatArray:
    # Rounded like the scores, so that 0.52 - 0.50 is 0.02 and not a little more.
    with np.errstate(invalid="ignore", over="ignore"):
        return np.round(left - right, SCORE_DIGITS)


def _places(old: FloatArray, new: FloatArray, tie: float) -> IntArray:
    """Places won, or lost below 0, on balance against documents that are no near-ties."""
    # What has no finite score is behind the rest, and level with its like.
    old, new = (np.where(np.isnan(scores), -np.inf, scores) for scores in (old, new))
    places = np.zeros(len(old), dtype=np.int64)
    for k in range(len(old)):
        was_ahead, is_ahead = (_differences(scores[k], scores) for scores in (old, new))
        won = (was_ahead < -tie) & (is_ahead > tie)
        lost = (was_ahead > tie) & (is_ahead < -tie)
        places[k] = won.sum() - lost.sum()
    return places


def _kendall_tau(old_ranks: IntArray, new_ranks: IntArray) -> float | None:
    if len(old_ranks) < 2:
        return None
    return round(float(stats.kendalltau(old_ranks, new_ranks).statistic), SCORE_DIGITS)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _mean(changes: FloatArray) -> float | None:
    finite = changes[~np.isnan(changes)]
    return round(float(finite.mean()), SCORE_DIGITS) + 0.0 if finite.size else None


def _largest(changes: FloatArray) -> float | None:
    finite = changes[~np.isnan(changes)]
    return float(np.abs(finite).max()) if finite.size else None


def _severity(document: DocumentDrift) -> tuple[float, int]:
    """Lost scores come first, then changes of score, then changes of rank alone."""
    change = math.inf if document.score_change is None else abs(document.score_change)
    return change if "score" in document.beyond else 0.0, abs(document.places)


def _summarise(report: DriftReport) -> Iterator[str]:
    moved = [case for case in report.cases if case.moved]
    moved.sort(key=lambda case: _severity(case.moved[0]), reverse=True)
    documents = sum(len(case.moved) for case in moved)
    verdict = "ok" if report.ok else "drift" if moved else "out of date"
    yield (
        f"{verdict}: {documents} of {report.documents} documents, in {len(moved)} of "
        f"{len(report.cases)} cases, moved beyond tolerance"
    )
    score = "any" if report.score_tolerance is None else f"{report.score_tolerance:g}"
    watched = "all" if report.top_k is None else f"the best {report.top_k}"
    yield (
        f"tolerance: {score} in score, {report.rank_tolerance} in rank among {watched}, near-ties "
        f"within {report.tie_tolerance:g}"
    )
    yield f"model: {_then_now(report.recorded_model, report.model)}"
    if report.recorded_lanerank != report.lanerank:
        yield f"lanerank: {_then_now(report.recorded_lanerank, report.lanerank)}"
    if report.mean_score_change is not None:
        yield (
            f"change of scores: {report.mean_score_change:+.4f} on average, "
            f"{report.max_score_change:.4f} at most"
        )
    for case in moved[:_MAX_CASES]:
        yield from _describe_moves(case)
    yield from _and_more(len(moved) - _MAX_CASES, "the cases that moved")
    outdated = [case for case in report.cases if case.outdated]
    for case in outdated[:_MAX_CASES]:
        yield f"out of date: {_describe_content(case)}"
    yield from _and_more(len(outdated) - _MAX_CASES, "the cases out of date")
    for title, names in (
        ("not in the snapshot", report.new_cases),
        ("only in the snapshot", report.missing_cases),
        ("worded anew", [case.id for case in report.cases if case.reworded]),
    ):
        if names:
            yield f"{title}: {_listed(names)}"


def _describe_moves(case: CaseDrift) -> Iterator[str]:
    tau = "" if case.kendall_tau is None else f", Kendall's tau {case.kendall_tau:.2f}"
    yield f"{_shown(case.id)}: {len(case.moved)} of {case.documents} documents{tau}"
    for each in case.moved[:_MAX_NAMES]:
        change = "" if each.score_change is None else f" ({each.score_change:+.4f})"
        score = _then_now(*map(_describe_score, (each.recorded_score, each.score)))
        rank = _then_now(str(each.recorded_rank), str(each.rank))
        yield f"  {_shown(each.document)}: score {score}{change}, rank {rank}"
    yield from _and_more(len(case.moved) - _MAX_NAMES, "its documents", "  ")


def _describe_content(case: CaseDrift) -> str:
    parts = ["another query"] if case.query_changed else []
    for title, names in (
        ("changed", case.changed_documents),
        ("new", case.new_documents),
        ("gone", case.removed_documents),
    ):
        if names:
            parts.append(f"{title} {_listed(names)}")
    return f"{_shown(case.id)}: {'; '.join(parts)}"


def _describe_score(score: float | None) -> str:
    return "not finite" if score is None else f"{score:.{SCORE_DIGITS}f}"


def _then_now(then: str, now: str) -> str:
    return _shown(now) if then == now else f"{_shown(then)} -> {_shown(now)}"


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(map(_shown, names[:_MAX_NAMES])) + rest


def _and_more(number: int, what: str, indent: str = "") -> Iterator[str]:
    if number > 0:
        yield f"{indent}and {number} more of {what}"


def _shown(name: str) -> str:
    return one_line(name, _NAME_WIDTH)
