"""Runs, which are rankings of document ids by query, and what is measured on them."""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Mapping, Sequence

import ir_measures
import numpy as np

from lanerank.contracts import order_by_score
from lanerank.display import one_line
from lanerank.errors import InputError

Run = Mapping[str, Mapping[str, float]]
"""Query id to document id to score. Ties keep the order of the mapping."""

Qrels = Mapping[str, Mapping[str, int]]
"""Query id to document id to grade; 0 and below is not relevant."""

DEFAULT_MEASURES = ("nDCG(dcg='exp-log2')@10",)
"""nDCG@10 with the gain `2^grade - 1`, as everywhere in lanerank."""

_HIGHEST_GRADE = 100
_HIGHEST_EXPONENT = 15
"""The highest grade that may become a gain as a power of 2."""


def measure_label(measure: str) -> str:
    """What tables call a measure: as ir-measures does, but nDCG@10 for lanerank's own default."""
    return "nDCG@10" if measure == DEFAULT_MEASURES[0] else measure


def order_documents(scores: Mapping[str, float]) -> list[str]:
    """Document ids, best first; ties keep their order, scores that are not finite come last."""
    ids = list(scores)
    return [ids[index] for index in order_by_score(tuple(scores.values()))]


def parse_measures(texts: Sequence[str]) -> dict[str, ir_measures.Measure]:
    """Measures of ir-measures from its notation, by their names.

    Each is tried on a toy ranking, so that one that cannot be computed is found before anything
    expensive is done.

    Raises:
        InputError: A text is no measure, or one that cannot be computed here.
    """
    if isinstance(texts, str):
        raise InputError(f"`measures` must be a list of str, got {texts!r}; put it in a list")
    measures = {}
    for text in texts:
        try:
            # Its parser uses names of `ast` that are deprecated in Python 3.12 and 3.13.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                measure = ir_measures.parse_measure(text.strip())
            _check_numbers(measure)
            list(ir_measures.iter_calc([_exact(measure, {})], {"0": {"0": 1}}, {"0": {"0": 1.0}}))
        except Exception as error:
            raise InputError(
                f"`measures` has {text!r}, which ir-measures cannot compute "
                f"({one_line(str(error), 300)}); write for example 'nDCG@10', 'RR@10', 'AP', "
                f"'P(rel=2)@5' or \"{DEFAULT_MEASURES[0]}\""
            ) from error
        measures[str(measure)] = measure
    return measures


def measure_run(
    measure: ir_measures.Measure, qrels: Qrels, rankings: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """The value of a measure for each query of the qrels.

    Args:
        measure: One from `parse_measures`.
        qrels: The grades. Documents without one count as not relevant.
        rankings: Document ids, best first, by query.

    Returns:
        The values by query id: 0 for a query without a ranking, none where the measure has no
        value.

    Raises:
        InputError: The measure does not take such grades.
    """
    if not qrels:
        return {}
    # Ids become numbers, since some providers write files in which a blank would end an id; scores
    # become ranks, since each provider breaks ties in its own way.
    grades: dict[str, dict[str, int]] = {}
    run: dict[str, dict[str, float]] = {}
    for number, (query, found) in enumerate(qrels.items()):
        order = rankings.get(query, ())
        documents = {each: str(i) for i, each in enumerate(dict.fromkeys([*found, *order]))}
        grades[str(number)] = {documents[each]: grade for each, grade in found.items()}
        if order:
            run[str(number)] = {documents[each]: float(-rank) for rank, each in enumerate(order)}
    exact = _exact(measure, qrels)
    try:
        values = {
            int(metric.query_id): float(metric.value)
            for metric in ir_measures.iter_calc([exact], grades, run)
        }
    except Exception as error:
        raise InputError(
            f"`measures`: ir-measures cannot compute {measure} for these grades and rankings: "
            f"{one_line(str(error), 300)}"
        ) from error
    ids = list(qrels)
    return {ids[number]: value for number, value in values.items() if math.isfinite(value)}


def rank_biased_overlap(first: Sequence[str], second: Sequence[str], *, p: float = 0.9) -> float:
    """How much two rankings agree, the top counting most: extrapolated RBO.

    With `X_d` the number of items that the first `d` places of both have in common, and for
    rankings of the same length `k` (Webber, Moffat and Zobel, ACM TOIS 28(4), 2010, equation 23):
    `RBO = (1 - p) * sum over d = 1..k of p^(d-1) * X_d / d + p^k * X_k / k`. Where one is longer
    (`l` items against `s`, equation 32), the shorter is taken to go on as it was: at each depth `d`
    beyond `s`, `X_s * (d - s) / (s * d)` is added to `X_d / d`.

    Args:
        first: Items, best first, none of them twice.
        second: Likewise.
        p: The persistence of the reader, who goes on from each place to the next with this
            probability. 0.9 gives the first 10 places 86% of the weight.

    Returns:
        1 for the same order, 0 for nothing in common; a ranking without items has nothing in common
        with one that has some. Two orders of the same items have them all in common in the end, so
        that even the reverse of 10 items has 0.51.

    Raises:
        InputError: `p` is not between 0 and 1, or a ranking has an item twice.
    """
    if not 0 < p < 1:
        raise InputError(f"`p` must lie between 0 and 1, got {p!r}")
    for name, items in (("first", first), ("second", second)):
        if len(set(items)) < len(items):
            raise InputError(f"`{name}` has an item more than once: {reprlib.repr(items)}")
    shorter, longer = sorted((len(first), len(second)))
    if not shorter:
        return float(not longer)
    places = {item: place for place, item in enumerate(second, 1)}
    # An item becomes common to both at the larger of its two places.
    entered = [max(place, places[item]) for place, item in enumerate(first, 1) if item in places]
    common = np.cumsum(np.bincount(np.array(entered, dtype=np.int64), minlength=longer + 1))[1:]
    depths = np.arange(1, longer + 1)
    beyond = np.maximum(depths - shorter, 0)
    agreement = common / depths + common[shorter - 1] * beyond / (shorter * depths)
    seen = (1 - p) * float(np.sum(agreement * p ** (depths - 1.0)))
    return min(1.0, seen + float(agreement[-1]) * p**longer)


def checked_grades(query: str, grades: Mapping[str, int]) -> dict[str, int]:
    """The grades of a query as a plain mapping.

    Raises:
        InputError: One is no integer, or out of range.
    """
    for document, grade in grades.items():
        whole = isinstance(grade, int | np.integer) and not isinstance(grade, bool)
        # The memory that trec_eval asks for grows with the grade, until it crashes.
        if not whole or abs(grade) > _HIGHEST_GRADE:
            raise InputError(
                f"`grades` of query {query!r} has {grade!r} for document {document!r}; grades are "
                f"integers from -{_HIGHEST_GRADE} to {_HIGHEST_GRADE}, 0 and below not relevant"
            )
    return {document: int(grade) for document, grade in grades.items()}


def check_id(name: str, value: str) -> None:
    """Refuse an id that is no text, or that no report could be written with.

    Raises:
        InputError: It is such an id; the message calls it `name`.
    """
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise InputError(
            f"{name} must be a str without lone surrogates, got {value!r}; use another id"
        ) from None


def _check_numbers(measure: ir_measures.Measure) -> None:
    """Refuse what would end the process: a cutoff of 0, or gains beyond the memory."""
    gains = measure.params.get("gains", {})
    if any(type(value) is int and value < 1 for value in measure.params.values()):
        raise ValueError("numbers must be at least 1")
    if any(abs(number) > 2**_HIGHEST_EXPONENT for number in (*gains, *gains.values())):
        raise ValueError(f"gains must be at most {2**_HIGHEST_EXPONENT}")


def _exact(measure: ir_measures.Measure, qrels: Qrels) -> ir_measures.Measure:
    """The measure in a form that ir-measures computes exactly.

    `dcg='exp-log2'` needs perl and rounds to five digits; a map of gains is the same measure.
    """
    if measure.NAME != "nDCG" or measure["dcg"] != "exp-log2":
        return measure
    grades = {grade for found in qrels.values() for grade in found.values()}
    if max(grades, default=0) > _HIGHEST_EXPONENT:
        raise InputError(
            f"`measures`: {measure} has the gain 2^grade - 1 and is meant for grades up to "
            f"{_HIGHEST_EXPONENT}, but there is a grade {max(grades)}; use 'nDCG@10', whose gain "
            "is the grade itself"
        )
    exact: ir_measures.Measure = measure(
        dcg="log2", gains={grade: 2 ** max(grade, 0) - 1 for grade in grades}
    )
    return exact
