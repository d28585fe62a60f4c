"""A datasheet: what a set of quadruples holds, told from the rows themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lanerank.errors import InputError
from lanerank.evaluation.scenarios import LANE_KINDS
from lanerank.training.checks import check
from lanerank.training.findings import Finding, words
from lanerank.training.markdown import plain, table
from lanerank.training.quadruples import Quadruple, group_by_query

_UNNAMED = "not named"
_BINS = 10
_BAR = 30
_ROUNDING = 1e-9


def datasheet(
    rows: Sequence[Quadruple],
    *,
    title: str,
    licences: Mapping[str, str],
    dev: Sequence[Quadruple] | None = None,
) -> str:
    """Describe a data set in Markdown: counts, sources, kinds, scores, lengths, checks, the split.

    The sheet holds what can be counted. How the texts were chosen, who judged them, and what the
    set must not be used for cannot be read off the rows: the last section asks for it.

    Args:
        rows: The training set, or all rows.
        title: The heading.
        licences: The licence of each `source`, in words; a source without one is reported so.
        dev: The development set, where there is one.

    Returns:
        The page. Texts of the rows are quoted so that they cannot act as markup.

    Raises:
        InputError: There are no rows, or `licences` names a source that no row has.
    """
    report = check(rows, dev=dev)
    every = [*rows, *(dev or ())]
    sources = {row.source for row in every if row.source is not None}
    if unknown := sorted(set(licences) - sources):
        raise InputError(
            f"`licences` names {unknown[0]!r}, which is the `source` of no row; "
            f"there are {sorted(sources)!r}"
        )
    sides = {"training": rows} if dev is None else {"training": rows, "development": dev}
    sections = [
        f"# {plain(title)}",
        "Generated from the rows by `lanerank.training.datasheet`. One row is a query, an "
        "instruction or none, a document, and a score from 0 (not relevant) to 1 (exactly what is "
        "wanted).",
        "## Contents",
        _contents(sides),
        "## Sources and licences",
        _sources(every, licences),
        "## Kinds of instructions",
        _kinds(every),
        "## Scores",
        _scores(every),
        "## Lengths",
        _lengths(every),
        "## Checks",
        "Of the training set"
        + (".\n\n" if dev is None else " against the development set.\n\n")
        + _checks(report.findings),
        "## Not in the rows",
        "To be told by the people who made the set: how queries and documents were chosen; who or "
        "what gave the scores, under which guide, and how often a second judge agrees; personal "
        "data and consent; for what the set should not be used.",
    ]
    return "\n\n".join(sections) + "\n"


def _contents(sides: Mapping[str, Sequence[Quadruple]]) -> str:
    counts = [_counts(rows) for rows in sides.values()]
    lines = [(name, *(each[name] for each in counts)) for name in counts[0]]
    total = sum(map(len, sides.values()))
    lines.append(("share of the rows", *(f"{len(rows) / total:.1%}" for rows in sides.values())))
    return table(("", *sides), lines)


def _counts(rows: Sequence[Quadruple]) -> dict[str, str]:
    numbers = {
        "rows": len(rows),
        "queries": len(group_by_query(rows)),
        "different documents": len({row.document for row in rows}),
        "different instructions": len({row.instruction for row in rows} - {None}),
        "rows without an instruction": sum(row.instruction is None for row in rows),
        "rows with attributes": sum(bool(row.attributes) for row in rows),
        "rows with a date of the search": sum(row.today is not None for row in rows),
        "rows with an uncertainty": sum(row.uncertainty is not None for row in rows),
        "rows with a weight": sum(row.weight != 1 for row in rows),
    }
    return {name: f"{number:,}" for name, number in numbers.items()}


def _sources(rows: Sequence[Quadruple], licences: Mapping[str, str]) -> str:
    counts = Counter(row.source for row in rows)
    return table(
        ("source", "rows", "licence"),
        [
            (
                _UNNAMED if source is None else plain(source),
                f"{number:,}",
                plain(licences.get(source or "", "not stated")),
            )
            for source, number in counts.most_common()
        ],
    )


def _kinds(rows: Sequence[Quadruple]) -> str:
    counts = Counter(row.kind for row in rows)
    return table(
        ("kind", "rows", "mean score"),
        [
            (
                kind or _UNNAMED,
                f"{counts[kind]:,}",
                f"{np.mean([row.score for row in rows if row.kind == kind]):.2f}",
            )
            for kind in (*LANE_KINDS, None)
            if counts[kind]
        ],
    )


def _scores(rows: Sequence[Quadruple]) -> str:
    # Exact at the edges, where 0.6 * 10 is 6 but 0.6 lies below the sixth edge of a histogram.
    places = np.floor(np.array([row.score for row in rows]) * _BINS + _ROUNDING).astype(int)
    counts = np.bincount(np.minimum(places, _BINS - 1), minlength=_BINS).tolist()
    lines = [
        f"{place / _BINS:.1f} to {(place + 1) / _BINS:.1f}  "
        f"{'█' * round(_BAR * count / max(counts)):{_BAR}}  {count:,}"
        for place, count in enumerate(counts)
    ]
    return "\n".join(["```text", *lines, "```"])


def _lengths(rows: Sequence[Quadruple]) -> str:
    texts = {
        "query": {row.query for row in rows},
        "instruction": {row.instruction for row in rows if row.instruction is not None},
        "document": {row.document for row in rows},
    }
    lines = []
    for name, different in texts.items():
        if different:
            counts = [len(words(text)) for text in different]
            quantiles = np.percentile(counts, [5, 50, 95, 100])
            lines.append((name, *(f"{number:.0f}" for number in quantiles)))
    return "Words of the different texts, at percentiles.\n\n" + table(
        ("", "5", "50", "95", "longest"), lines
    )


def _checks(findings: Iterable[Finding]) -> str:
    lines, notes = [], []
    for finding in findings:
        value = "" if finding.value is None else _number(finding.value)
        if finding.interval is not None:
            value += f" ({' to '.join(map(_number, finding.interval))})"
        lines.append((finding.check, finding.severity, value, finding.message))
        if finding.severity != "ok":
            notes.append(f"- **{finding.check}** ({finding.severity}): {finding.remedy}.")
            notes += [f"  - {plain(example)}" for example in finding.examples]
    found = table(("check", "result", "value", "what it is"), lines)
    return "\n\n".join([found, "\n".join(notes)] if notes else [found])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:.3g}"
