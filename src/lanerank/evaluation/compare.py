"""Two ways to rank the same queries, side by side: models, instructions, or finished runs."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats

from lanerank.comparison import RankingComparison, compare_rankings
from lanerank.display import fragment, one_line
from lanerank.errors import InputError
from lanerank.evaluation.measures import Estimate, bootstrap_interval, describe_interval
from lanerank.evaluation.queries import JudgedQuery
from lanerank.evaluation.runs import (
    DEFAULT_MEASURES,
    Qrels,
    Run,
    check_id,
    checked_grades,
    measure_run,
    order_documents,
    parse_measures,
    rank_biased_overlap,
)
from lanerank.evaluation.sections import comparison_section
from lanerank.evaluation.significance import (
    describe_test,
    holm,
    is_neutral,
    paired_randomisation_test,
)
from lanerank.evaluation.systems import (
    System,
    distinct_labels,
    queries_to_ask,
    ranking_of,
    score_queries,
)

DEFAULT_MARGIN = 0.02
_JUDGED = ir_measures.Judged @ 10
_MOVED = 3


# Reports


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MeasureComparison(_Report):
    """One measure of a group of queries. `n` of each estimate counts queries."""

    a: Estimate
    """Mean of A."""
    b: Estimate
    """Mean of B."""
    difference: Estimate
    """Mean of `B - A`, query by query; above 0 B is better."""
    p_value: float
    """Of the test named in `Comparison.test`, for this measure alone."""
    p_adjusted: float
    """The same by Holm's method, for all the measures of the group together."""
    wins: int
    """Queries on which B is better."""
    ties: int
    losses: int
    """Queries on which A is better."""
    neutral: bool | None
    """Whether the interval of the difference lies inside `(-margin, margin)`, so that A and B are
    equivalent for practical purposes. `False` does not say that they differ: few queries leave it
    open. `None` for fewer than 6 clusters, which cannot tell."""


class GroupComparison(_Report):
    """A group of queries."""

    queries: int
    clusters: int
    """The number of independent units, such as scenarios."""
    measures: Mapping[str, MeasureComparison]
    """By measure; empty without labels."""
    rbo: Estimate
    """Mean `rank_biased_overlap` of the two rankings of a query; 1 is the same order."""
    overlap: Estimate
    """Mean share of the `top_k` best documents that the two rankings have in common."""
    kendall_tau: Estimate | None
    """Mean Kendall rank correlation over the documents that both ranked: 1 the same order, -1 the
    reverse. `None` where no query has two such documents."""
    same_order: int
    """Queries whose documents both put in exactly the same order."""


class MovedDocument(_Report):
    """A document that the two rankings of a query put in different places."""

    id: str
    rank_a: int | None
    """Counted from 1; `None` where A did not rank it."""
    rank_b: int | None


class QueryComparison(_Report):
    """One query."""

    id: str
    instruction_aware: bool | None
    values: Mapping[str, tuple[float, float]]
    """By measure, the value of A and of B; empty without a relevant document or without labels."""
    rbo: float
    overlap: float
    kendall_tau: float | None
    moved: tuple[MovedDocument, ...]
    """The documents that moved furthest, at most three."""


class SystemSummary(_Report):
    """One side of a comparison."""

    label: str
    model: str | None
    """The scorer's name; `None` for a finished run."""
    missing: int
    """Queries that only the other side ranked. Every measure of theirs is 0 here."""
    non_finite: int
    """Documents whose score was NaN or infinite; they sort last."""
    judged: float | None
    """Mean share of the 10 best documents that have a grade (`Judged@10`), over the queries with
    grades; the others count as not relevant. `None` without labels."""


class Comparison(_Report):
    """What `compare` and `compare_runs` found."""

    a: SystemSummary
    b: SystemSummary
    interval: str
    """How the bounds of every estimate were made."""
    test: str
    """How the p-values were made."""
    margin: float
    """Differences inside `(-margin, margin)` do not matter in practice."""
    top_k: int
    """The depth of `overlap`."""
    rbo_p: float
    """The persistence of `rbo`."""
    asked_alike: int = 0
    """Queries that were left out because A and B ask them with the same model and the same words,
    so that their difference is 0 whatever the model does."""
    graded: int
    """Queries that have grades."""
    without_relevant: int
    """Queries with grades none of which is above 0. No order is better than another there, and
    the measures leave them out."""
    unanswered: int
    """Queries of the qrels that neither run ranked; they are left out."""
    pooled: GroupComparison
    """All queries."""
    instruction_aware: GroupComparison | None
    """Queries whose right order depends on the instruction: here an instruction should help."""
    generic: GroupComparison | None
    """Queries whose right order does not: here an instruction should change nothing."""
    per_query: tuple[QueryComparison, ...] = Field(repr=False)
    """Every query, those that changed most first."""
    examples: tuple[RankingComparison, ...] = Field(default=(), exclude=True, repr=False)
    """The queries that changed most with their texts, to look at; not part of the JSON form. Only
    `compare` has the texts."""

    def _repr_html_(self) -> str:
        """Pictures and tables, for notebooks."""
        return fragment(*comparison_section(self))

    def groups(self) -> list[tuple[str, GroupComparison]]:
        """The groups there are with their names, for tables."""
        named = (
            ("all", self.pooled),
            ("instruction-aware", self.instruction_aware),
            ("generic", self.generic),
        )
        return [(name, group) for name, group in named if group is not None]


# Comparing


def compare(
    a: System,
    b: System,
    queries: Iterable[JudgedQuery],
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    margin: float = DEFAULT_MARGIN,
    top_k: int = 3,
    rbo_p: float = 0.9,
    examples: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Rank the same candidates with two systems, and measure the difference `B - A`.

    An instruction that works lifts the measures of the instruction-aware queries and leaves the
    generic ones as they are. The first is a matter of `difference` and `p_adjusted`, the second of
    `neutral`: that no difference was found does not show that there is none.

    A query that both systems ask with the same reranker and the same instruction has the same
    answer twice. It would hide what happens to the others, and is left out and counted, unless A
    and B are one and the same. An enclosing `use_instruction` has no effect. To look at one query,
    see `examples` and `lanerank.compare_rankings`.

    Args:
        a: The baseline.
        b: What is compared with it.
        queries: At least one, for instance from `queries_from_scenarios` or `read_trec`. Without
            grades the report says how rankings differ, and not which is better.
        measures: Measures of ir-measures in its own notation, such as `"RR@10"` or `"P(rel=2)@5"`;
            they mean what they mean there. `"nDCG@10"` therefore has the grade itself as its gain,
            as in trec_eval; the default, `"nDCG(dcg='exp-log2')@10"`, has `2^grade - 1`. Measures
            of yes or no count every grade above 0 as relevant unless they say `rel=2`.
        margin: How large a difference may be and still not matter, in units of the measure.
        top_k: How many of the best documents `overlap` compares.
        rbo_p: The persistence of `rbo`; at 0.9 the 10 best documents have 86% of the weight.
        examples: How many queries to keep as `Comparison.examples`.
        progress: Called after each query with the number done and the number in all.

    Returns:
        The report. It depends on the scores alone: everything random has a fixed seed.

    Raises:
        InputError: An argument is not usable; the message names it. Measures are checked before
            anything is scored.
        LanerankError: A system fails on a query; the message names the query and the system.
    """
    settings = _Settings(parse_measures(measures), margin, top_k, rbo_p)
    given = list(queries)
    asked = queries_to_ask(a, b, given)
    run_a, run_b = score_queries(a, b, asked, progress)
    labels = distinct_labels(a, b)
    comparison = _compare(
        run_a,
        run_b,
        {query.id: query.grades for query in asked if query.grades is not None},
        settings,
        labels=labels,
        models=(a.model, b.model),
        instruction_aware={query.id: query.instruction_aware for query in asked},
        clusters={query.id: query.cluster for query in asked},
    )
    by_id = {query.id: query for query in asked}
    shown = [by_id[each.id] for each in comparison.per_query[: max(0, examples)] if each.moved]
    return comparison.model_copy(
        update={
            "asked_alike": len(given) - len(asked),
            "examples": tuple(
                compare_rankings(
                    {
                        _describe(label, system, query): ranking_of(system, query, run[query.id])
                        for label, system, run in zip(labels, (a, b), (run_a, run_b), strict=True)
                    }
                )
                for query in shown
            ),
        }
    )


def _describe(label: str, system: System, query: JudgedQuery) -> str:
    """A label and, where a query is asked with an instruction, the beginning of it."""
    instruction = system.instruction_for(query.instruction)
    words = one_line(instruction.render(), 48) if instruction else ""
    return f"{label}: {words}" if words and words != label else label


def compare_runs(
    run_a: Run,
    run_b: Run,
    qrels: Qrels | None = None,
    *,
    labels: tuple[str, str] = ("A", "B"),
    instruction_aware: Mapping[str, bool | None] | None = None,
    clusters: Mapping[str, str] | None = None,
    measures: Sequence[str] = DEFAULT_MEASURES,
    margin: float = DEFAULT_MARGIN,
    top_k: int = 3,
    rbo_p: float = 0.9,
) -> Comparison:
    """Compare two finished runs, for instance from `read_run`.

    The queries are those that at least one of the runs ranked. One that a run lacks counts as an
    empty ranking there, with every measure 0; queries of the qrels that neither has are left out.
    Documents without a grade count as not relevant. `Comparison` has the number of each.

    Args:
        run_a: The baseline.
        run_b: What is compared with it.
        qrels: The grades, for instance from `read_qrels`. Without them the report says how rankings
            differ, and not which is better.
        labels: What the report calls the two.
        instruction_aware: Query id to whether its right order depends on the instruction; queries
            that are not named take part in the whole only.
        clusters: Query id to what the query shares with others; by default each is its own cluster.
        measures: As for `compare`, and so are the rest.
        margin: How large a difference may be and still not matter.
        top_k: How many of the best documents `overlap` compares.
        rbo_p: The persistence of `rbo`.

    Raises:
        InputError: An argument is not usable; the message names it.
    """
    settings = _Settings(parse_measures(measures), margin, top_k, rbo_p)
    runs = {"run_a": _checked_run("run_a", run_a), "run_b": _checked_run("run_b", run_b)}
    grades = {
        query: checked_grades(query, found)
        for query, found in _entries("qrels", {} if qrels is None else qrels)
    }
    first, second = runs.values()
    if not first.keys() & second.keys():
        raise InputError(
            f"`run_a` and `run_b` have no query in common: {reprlib.repr(list(first))} and "
            f"{reprlib.repr(list(second))}"
        )
    ranked = [*first, *second]
    if qrels is not None and not grades.keys() & {*ranked}:
        raise InputError(
            f"`qrels` has no query of the runs: {reprlib.repr(list(grades))} and "
            f"{reprlib.repr(ranked)}; leave it out to compare without labels"
        )
    return _compare(
        first,
        second,
        grades,
        settings,
        labels=labels,
        models=(None, None),
        instruction_aware=instruction_aware or {},
        clusters=clusters or {},
    )


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the callers of both functions choose."""

    measures: Mapping[str, ir_measures.Measure]
    margin: float
    top_k: int
    rbo_p: float

    def __post_init__(self) -> None:
        if not self.margin > 0 or not math.isfinite(self.margin):
            raise InputError(f"`margin` must be a number above 0, got {self.margin!r}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 1:
            raise InputError(f"`top_k` must be an int of at least 1, got {self.top_k!r}")
        if not 0 < self.rbo_p < 1:
            raise InputError(f"`rbo_p` must lie between 0 and 1, got {self.rbo_p!r}")


def _compare(
    run_a: Run,
    run_b: Run,
    qrels: Qrels,
    settings: _Settings,
    *,
    labels: tuple[str, str],
    models: tuple[str | None, str | None],
    instruction_aware: Mapping[str, bool | None],
    clusters: Mapping[str, str],
) -> Comparison:
    ids = list(dict.fromkeys([*run_a, *run_b]))
    first, second = (
        {query: order_documents(run.get(query, {})) for query in ids} for run in (run_a, run_b)
    )
    graded = {query: qrels[query] for query in ids if query in qrels}
    relevant = {
        query: grades for query, grades in graded.items() if any(g > 0 for g in grades.values())
    }
    values: dict[str, dict[str, tuple[float, float]]] = {query: {} for query in ids}
    for name, measure in settings.measures.items():
        of_a, of_b = (measure_run(measure, relevant, order) for order in (first, second))
        for query in of_a.keys() & of_b.keys():
            values[query][name] = of_a[query], of_b[query]
    per_query = {
        query: _compare_query(
            query, first[query], second[query], values[query], instruction_aware, settings
        )
        for query in ids
    }
    # Numbered as they come, so that a set of scenarios has the intervals that `evaluate` gives it.
    numbers: dict[str, int] = {}
    members = [
        (numbers.setdefault(clusters.get(query, query), len(numbers)), found)
        for query, found in per_query.items()
    ]
    aware = [member for member in members if member[1].instruction_aware is True]
    generic = [member for member in members if member[1].instruction_aware is False]
    units = "queries" if len(numbers) == len(ids) else "clusters of queries"
    return Comparison(
        a=_summarise(labels[0], models[0], first, run_a, graded),
        b=_summarise(labels[1], models[1], second, run_b, graded),
        interval=describe_interval(units),
        test=describe_test(units),
        margin=settings.margin,
        top_k=settings.top_k,
        rbo_p=settings.rbo_p,
        graded=len(graded),
        without_relevant=len(graded) - len(relevant),
        unanswered=len(qrels.keys() - {*ids}),
        pooled=_compare_group(members, settings),
        instruction_aware=_compare_group(aware, settings) if aware else None,
        generic=_compare_group(generic, settings) if generic else None,
        per_query=tuple(sorted(per_query.values(), key=lambda each: each.rbo)),
    )


_Members = Sequence[tuple[int, QueryComparison]]
"""Queries, each with the number of its cluster."""


def _compare_group(members: _Members, settings: _Settings) -> GroupComparison:
    clusters, queries = zip(*members, strict=True)
    correlated = [(n, each.kendall_tau) for n, each in members if each.kendall_tau is not None]
    return GroupComparison(
        queries=len(members),
        clusters=len(set(clusters)),
        measures=_compare_measures(members, settings),
        rbo=_estimate([each.rbo for each in queries], clusters),
        overlap=_estimate([each.overlap for each in queries], clusters),
        kendall_tau=_estimate([tau for _, tau in correlated], [n for n, _ in correlated])
        if correlated
        else None,
        same_order=sum(not each.moved for each in queries),
    )


def _compare_measures(members: _Members, settings: _Settings) -> dict[str, MeasureComparison]:
    found = {}
    for name in settings.measures:
        terms = [(n, *each.values[name]) for n, each in members if name in each.values]
        if terms:
            clusters, a, b = (np.array(column) for column in zip(*terms, strict=True))
            found[name] = (clusters, a, b, paired_randomisation_test(b - a, clusters))
    adjusted = holm([p_value for *_, p_value in found.values()])
    compared = {}
    for (name, (clusters, a, b, p_value)), p_adjusted in zip(found.items(), adjusted, strict=True):
        difference = _estimate(b - a, clusters)
        compared[name] = MeasureComparison(
            a=_estimate(a, clusters),
            b=_estimate(b, clusters),
            difference=difference,
            p_value=p_value,
            p_adjusted=p_adjusted,
            wins=int((b > a).sum()),
            ties=int((b == a).sum()),
            losses=int((b < a).sum()),
            neutral=is_neutral(difference, np.unique(clusters).size, settings.margin),
        )
    return compared


def _compare_query(
    query: str,
    a: Sequence[str],
    b: Sequence[str],
    values: Mapping[str, tuple[float, float]],
    instruction_aware: Mapping[str, bool | None],
    settings: _Settings,
) -> QueryComparison:
    ranks_a, ranks_b = ({each: rank for rank, each in enumerate(order, 1)} for order in (a, b))
    tau = None
    if len(common := [each for each in a if each in ranks_b]) > 1:
        ranks = ([table[each] for each in common] for table in (ranks_a, ranks_b))
        tau = float(stats.kendalltau(*ranks).statistic)

    def distance(document: str) -> int:
        # One place below the end is the least that a document which was not ranked can have moved.
        return abs(ranks_a.get(document, len(a) + 1) - ranks_b.get(document, len(b) + 1))

    moved = [each for each in {**ranks_a, **ranks_b} if ranks_a.get(each) != ranks_b.get(each)]
    top_k = settings.top_k
    return QueryComparison(
        id=query,
        instruction_aware=instruction_aware.get(query),
        values=values,
        rbo=rank_biased_overlap(a, b, p=settings.rbo_p),
        overlap=len({*a[:top_k]} & {*b[:top_k]}) / max(1, min(top_k, max(len(a), len(b)))),
        kendall_tau=tau,
        moved=tuple(
            MovedDocument(id=each, rank_a=ranks_a.get(each), rank_b=ranks_b.get(each))
            for each in sorted(moved, key=distance, reverse=True)[:_MOVED]
        ),
    )


def _summarise(
    label: str,
    model: str | None,
    rankings: Mapping[str, Sequence[str]],
    run: Run,
    qrels: Qrels,
) -> SystemSummary:
    answered = {query: grades for query, grades in qrels.items() if rankings[query]}
    judged = measure_run(_JUDGED, answered, rankings)
    return SystemSummary(
        label=one_line(label, 60),
        model=model,
        missing=sum(not order for order in rankings.values()),
        non_finite=sum(
            not math.isfinite(value) for scores in run.values() for value in scores.values()
        ),
        judged=float(np.mean(list(judged.values()))) if judged else None,
    )


def _estimate(values: ArrayLike, clusters: ArrayLike) -> Estimate:
    terms = np.asarray(values, dtype=float)
    low, high = bootstrap_interval(terms, clusters)
    return Estimate(
        value=float(terms.mean()),
        low=low,
        high=high,
        n=terms.size,
        clusters=np.unique(np.asarray(clusters)).size,
    )


def _entries(name: str, given: object) -> list[tuple[str, Mapping[str, Any]]]:
    """The entries of a mapping of mappings."""
    if isinstance(given, Mapping) and all(isinstance(each, Mapping) for each in given.values()):
        return list(given.items())
    raise InputError(
        f"`{name}` must map query ids to document ids to numbers, got {reprlib.repr(given)}; read "
        f"a file with {'read_qrels' if name == 'qrels' else 'read_run'}"
    )


def _checked_run(name: str, run: Run) -> dict[str, dict[str, float]]:
    entries = _entries(name, run)
    for query, scores in entries:
        check_id(f"`{name}`: a query id", query)
        for document in scores:
            check_id(f"`{name}[{query!r}]`: a document id", document)
    try:
        return {
            query: {document: float(score) for document, score in scores.items()}
            for query, scores in entries
        }
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` has a score that is no number: {error}") from error
