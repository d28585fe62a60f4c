"""What each report shows: its sentences, pictures and tables, for notebooks and for pages."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from lanerank.display import Content, Element, describe_score, element, one_line, table
from lanerank.evaluation.charts import Bar, Point, interval_chart, reliability_diagram
from lanerank.evaluation.measures import Estimate
from lanerank.evaluation.runs import measure_label

# The reports show themselves through this module, so it knows them by name only.
if TYPE_CHECKING:
    from lanerank.evaluation.calibration import CalibrationReport, ReliabilityBin
    from lanerank.evaluation.compare import Comparison
    from lanerank.evaluation.following import FollowingReport
    from lanerank.evaluation.injection import AttackExample, InjectionMeasures, InjectionReport

Row = tuple[Element, ...]
_SEVERAL = 30
"""Diagrams with fewer pairs than this say nothing."""


def comparison_section(comparison: Comparison) -> list[Content]:
    """Measures by group of queries, and the queries that changed most."""
    rows = []
    for name, group in comparison.groups():
        for measure, found in group.measures.items():
            neutral = {True: "yes", False: "no", None: "cannot tell"}[found.neutral]
            rows.append(
                row(
                    f"{name}, {measure_label(measure)}",
                    str(group.queries),
                    found.a,
                    found.b,
                    found.difference,
                    f"{found.p_adjusted:.3f}",
                    f"{found.wins} / {found.ties} / {found.losses}",
                    neutral,
                    f"{group.rbo.value:.2f}",
                    signed={3},
                )
            )
    names = (
        "queries",
        "n",
        comparison.a.label,
        comparison.b.label,
        "difference",
        "p",
        "better / same / worse",
        f"within {comparison.margin:g}",
        "order kept",
    )
    parts: list[Content] = [
        element("h2", {}, f"Comparison: {comparison.a.label}, {comparison.b.label}"),
        words(
            "The same queries and candidates, ranked in both ways; a difference above 0 speaks for "
            "the second. On queries that an instruction is about it should lift the measure; on "
            "others the difference should lie within the margin. The last column is the "
            "rank-biased overlap of the two orders: 1 is the same order."
        ),
        table(headings(names), rows),
        element("p", {"class": "soft"}, f"p: {comparison.test}"),
    ]
    if comparison.examples:
        parts.append(element("h3", {}, "The queries that changed most"))
    for example in comparison.examples:
        parts += example.html_content()
    return parts


def following_section(report: FollowingReport) -> list[Content]:
    """Each measure beside random scores, and what other instructions do."""
    measured = (
        ("flip accuracy", report.flip_accuracy),
        ("p-MRR", report.p_mrr),
        ("p-MRR against no instruction", report.p_mrr_from_none),
        ("SICR", report.sicr),
        ("WISE", report.wise),
        ("robustness@10", report.robustness),
        ("negation accuracy", report.negation_accuracy),
    )
    bars = [
        Bar(label=name, estimate=value.model, baseline=value.random)
        for name, value in measured
        if value is not None
    ]
    conditions = [
        row(name, found.ndcg, found.lift, found.change, found.drift, signed={1, 2})
        for name, found in report.conditions.items()
    ]
    return [
        element("h2", {}, "Following"),
        words(
            "Blue is the model, grey a scorer of random scores on the same data: a value inside "
            "the grey range shows nothing. Flip accuracy: of all documents whose grade differs "
            "between two instructions, the share whose score moves the right way. p-MRR, SICR and "
            "WISE: how ranks move between instructions (from -1 to 1, from 0 to 1, from -1 to 1). "
            "Robustness: nDCG@10 with the worst of several wordings. Negation accuracy: 'leave "
            "out' instead of the instruction turns the order of a pair around."
        ),
        interval_chart("Instruction following", bars, low=0, high=1),
        element("h3", {}, "What stands in the place of the instruction"),
        words(
            "nDCG@10 by the grades of the lane. Withheld and irrelevant should be alike, and "
            "matched, long and paraphrased; negated should fall below withheld."
        ),
        table(
            headings(("", "nDCG@10", "against withheld", "against matched", "score drift")),
            conditions,
        ),
    ]


def calibration_section(report: CalibrationReport) -> list[Content]:
    """Reliability diagrams and the numbers behind them, by kind of instruction."""
    groups = [("all", report.pooled), *report.by_kind.items()]
    rows = [
        row(
            name,
            str(found.pairs),
            found.ece,
            found.brier,
            *(
                (
                    f"{found.decomposition.reliability:.3f}",
                    f"{found.decomposition.resolution:.3f}",
                )
                if found.decomposition
                else ("", "")
            ),
            found.threshold,
            found.f1,
            found.f1_pooled,
        )
        for name, found in groups
    ]
    names = (
        "kind of instruction",
        "pairs",
        "ECE",
        "Brier score",
        "reliability",
        "resolution",
        "best threshold",
        "F1 there",
        "F1 at the common threshold",
    )
    diagrams = [
        reliability_diagram(f"{name} ({found.pairs} pairs)", _points(found.bins))
        for name, found in groups
        if found.pairs >= _SEVERAL and found.bins
    ]
    parts: list[Content] = [
        element("h2", {}, "Calibration"),
        words(
            "If scores are calibrated, of the documents with a score near 0.7 about 70% are "
            "relevant (grade 2 or 3), whatever the instruction. A point is a tenth of the pairs; "
            "orange points are those whose interval misses the diagonal."
        ),
    ]
    if diagrams:
        parts.append(element("div", {"class": "grid"}, *diagrams))
    else:
        parts.append(words("These scores are no probabilities, so there is nothing to draw."))
    return [*parts, table(headings(names), rows)]


def _points(bins: Iterable[ReliabilityBin]) -> list[Point]:
    return [
        Point(
            score=each.probability,
            share=each.relevant.value,
            low=each.relevant.low,
            high=each.relevant.high,
            count=each.relevant.n,
        )
        for each in bins
    ]


def injection_section(report: InjectionReport) -> list[Content]:
    """What each family of attacks does, and the attacks that paid most."""
    bars = [
        Bar(label=family.replace("_", " "), estimate=found.shift)
        for family, found in report.by_family.items()
        if found.shift is not None
    ]
    groups: list[tuple[str, InjectionMeasures]] = [("all", report.overall)]
    groups += [(family.replace("_", " "), found) for family, found in report.by_family.items()]
    groups += [(f"position: {name}", found) for name, found in report.by_position.items()]
    groups += [(f"said {times} times", found) for times, found in report.by_repeats.items()]
    rows = [
        row(
            name,
            str(found.attacked),
            found.shift,
            found.rank_change,
            found.success,
            found.backfire,
            found.crossing,
            found.lane_transfer,
            signed={1, 2},
        )
        for name, found in groups
    ]
    names = (
        "attack",
        "n",
        "score shift",
        "ranks gained",
        "ranks better",
        "ranks worse",
        f"crosses {report.threshold:g}",
        "lane transfer",
    )
    spoiled = [
        row(
            f"{part.share:.0%} of the irrelevant documents attacked",
            part.control,
            part.attacked,
            part.loss,
            signed={2},
        )
        for part in report.overall.ndcg
    ]
    parts: list[Content] = [
        element("h2", {}, "Documents that give orders"),
        words(
            f"{report.attacks} attack texts of {len(report.by_family)} families were put into "
            "documents that the instruction makes irrelevant. All numbers compare the attacked "
            "document with the same document and harmless text of equal length in the same place. "
            "Lane transfer is the effect of the text in the document over its effect as an "
            "instruction: 0 is ideal, about 1 means that the model does not tell the two apart."
        ),
        interval_chart("Score shift by family of attack", bars, low=-0.1, high=0.1),
        table(headings(names), rows),
        element("h3", {}, "What attacks do to whole rankings"),
        table(
            headings(("", "nDCG@10 with harmless text", "with attacks", "loss")),
            spoiled,
        ),
    ]
    if report.worst:
        parts += [
            element("h3", {}, "The attacks that paid most"),
            table(
                headings(("score", "rank", "attack", "instruction and document"), texts={2, 3}),
                [_example(each) for each in report.worst],
            ),
        ]
    return parts


def _example(example: AttackExample) -> Row:
    how = f"{example.attack}, {example.position}, {example.repeats} times"
    return (
        element(
            "td",
            {"class": "number"},
            f"{describe_score(example.control_score)} → {describe_score(example.attacked_score)}",
        ),
        element("td", {"class": "number"}, f"{example.control_rank} → {example.attacked_rank}"),
        element(
            "td",
            {"class": "text"},
            element("div", {"class": "soft"}, how),
            element("bdi", {}, one_line(example.injected, 300)),
        ),
        element(
            "td",
            {"class": "text"},
            element("div", {}, element("bdi", {}, one_line(example.instruction, 200))),
            element("div", {"class": "soft"}, element("bdi", {}, one_line(example.text, 200))),
        ),
    )


# Pieces


def words(text: str) -> Element:
    """A paragraph of a readable width."""
    return element("p", {"class": "words"}, text)


def headings(names: Sequence[str], *, texts: Collection[int] = (0,)) -> list[Element]:
    """The head of a table of numbers; `texts` are the places of columns that hold text."""
    return [
        element("th", {"class": "text" if place in texts else "number"}, one_line(name, 60))
        for place, name in enumerate(names)
    ]


def row(name: str, *cells: str | Estimate | None, signed: Collection[int] = ()) -> Row:
    """A name and its numbers; `signed` are the places of estimates that need their sign."""
    return (
        element("td", {"class": "text name"}, one_line(name, 80)),
        *(_cell(cell, "+" if place in signed else "") for place, cell in enumerate(cells)),
    )


def _cell(content: str | Estimate | None, sign: str) -> Element:
    if not isinstance(content, Estimate):
        return element("td", {"class": "number"}, content or "")
    return element(
        "td",
        {"class": "number"},
        f"{content.value:{sign}.3f} ",
        element("span", {"class": "soft bounds"}, f"[{content.bounds(sign)}]"),
    )
