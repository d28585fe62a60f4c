"""One page that says whether an instruction works, for someone who did not write it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import date
from importlib.metadata import version
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from lanerank.display import (
    Content,
    Element,
    describe_score,
    element,
    one_line,
    page,
    table,
)
from lanerank.errors import InputError
from lanerank.evaluation.calibration import CalibrationReport, ReliabilityBin, measure_calibration
from lanerank.evaluation.charts import Bar, Point, interval_chart, reliability_diagram
from lanerank.evaluation.compare import Comparison, compare
from lanerank.evaluation.following import FollowingReport, measure_following
from lanerank.evaluation.injection import (
    SAMPLE,
    AttackExample,
    InjectionMeasures,
    InjectionReport,
    measure_injection,
)
from lanerank.evaluation.measures import Estimate, describe_interval
from lanerank.evaluation.queries import queries_from_scenarios
from lanerank.evaluation.runs import DEFAULT_MEASURES
from lanerank.evaluation.scenarios import Scenario
from lanerank.evaluation.scoring import Remembering, SupportsScore
from lanerank.evaluation.systems import System

ReportPart = Literal["comparison", "following", "calibration", "injection"]
"""A question that a report answers."""

REPORT_PARTS: tuple[ReportPart, ...] = get_args(ReportPart)
Row = tuple[Element, ...]
_MEASURES = {DEFAULT_MEASURES[0]: "nDCG@10"}
_SEVERAL = 30
"""Diagrams with fewer pairs than this say nothing."""


class Report(BaseModel):
    """Everything that was measured of one model on some scenarios; `make_report` makes one.

    `to_html()` is the page, `model_dump_json()` the same in numbers. A part is `None` where it was
    not asked for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    model: str
    """The scorer's name."""
    lanerank_version: str
    created: date
    scenarios: int
    documents: int
    """The number of documents, each counted once."""
    domains: tuple[str, ...]
    """The subject areas of the scenarios."""
    comparison: Comparison | None = None
    """The instruction against none, on the same queries and candidates."""
    following: FollowingReport | None = None
    calibration: CalibrationReport | None = None
    injection: InjectionReport | None = None

    def to_html(self) -> str:
        """One self-contained page: no script, nothing fetched, everything from outside escaped."""
        sections: list[Content] = [*_heading(self), *_summary(self)]
        if self.comparison is not None:
            sections += _comparison(self.comparison)
        if self.following is not None:
            sections += _following(self.following)
        if self.calibration is not None:
            sections += _calibration(self.calibration)
        if self.injection is not None:
            sections += _injection(self.injection)
        return page(self.title, *sections, *_all_numbers(self))


def make_report(
    reranker: SupportsScore,
    scenarios: Sequence[Scenario],
    *,
    parts: Collection[ReportPart] = REPORT_PARTS,
    title: str = "Does the instruction work?",
    sample: int = SAMPLE,
    today: date | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure everything and put it on one page.

    With all parts a lane takes about 12 requests of all documents of its scenario; no pair is
    scored twice.

    Args:
        reranker: The model.
        scenarios: At least one, for instance from `read_scenarios`.
        parts: The questions to answer; all by default.
        title: The heading of the page.
        sample: About how many documents to score under attack, as in `measure_injection`.
        today: The date on the page; by default the current one.
        progress: Called with the part, the number done and the number in all.

    Raises:
        InputError: There are no scenarios, or a part is not known.
        ScorerError: The reranker does not return one score for each document.
    """
    if not scenarios:
        raise InputError("`scenarios` is empty; give at least one, for example from read_scenarios")
    if unknown := [part for part in parts if part not in REPORT_PARTS]:
        raise InputError(f"`parts` must be of {', '.join(REPORT_PARTS)}; got {unknown[0]!r}")
    remembering = Remembering(reranker)

    def advance(part: ReportPart) -> Callable[[int, int], None] | None:
        return (lambda done, total: progress(part, done, total)) if progress else None

    comparison = following = calibration = injection = None
    if "comparison" in parts:
        comparison = compare(
            System(remembering, None, "without"),
            System(remembering, label="with"),
            queries_from_scenarios(scenarios),
            progress=advance("comparison"),
        )
    if "following" in parts:
        following = measure_following(remembering, scenarios, progress=advance("following"))
    if "calibration" in parts:
        calibration = measure_calibration(remembering, scenarios, progress=advance("calibration"))
    if "injection" in parts:
        injection = measure_injection(
            remembering, scenarios, sample=sample, progress=advance("injection")
        )
    return Report(
        title=title,
        model=reranker.scorer.name,
        lanerank_version=version("lanerank"),
        created=today or date.today(),
        scenarios=len(scenarios),
        documents=sum(len(scenario.documents) for scenario in scenarios),
        domains=tuple(sorted({scenario.domain for scenario in scenarios})),
        comparison=comparison,
        following=following,
        calibration=calibration,
        injection=injection,
    )


# The page


def _heading(report: Report) -> list[Element]:
    facts = (
        f"{report.model}, lanerank {report.lanerank_version}, {report.created.isoformat()}. "
        f"{report.scenarios} scenarios with {report.documents} documents from "
        f"{len(report.domains)} subject areas: "
        f"{one_line(', '.join(report.domains), 400)}."
    )
    note = (
        "Numbers in brackets are intervals: with other scenarios of the same kind the value would "
        f"most likely lie in them ({describe_interval()}). Hover over a picture for its numbers."
    )
    return [
        element("h1", {}, one_line(report.title, 120)),
        _words(facts),
        element("p", {"class": "soft"}, note),
    ]


def _summary(report: Report) -> list[Element]:
    """Each question with its answer in one sentence."""
    rows = [
        (element("th", {"class": "text"}, question), element("td", {"class": "text"}, answer))
        for question, answer in (
            *_answer_comparison(report.comparison),
            *_answer_following(report.following),
            *_answer_calibration(report.calibration),
            *_answer_injection(report.injection),
        )
    ]
    return [element("h2", {}, "In short"), table((), rows)]


def _answer_comparison(comparison: Comparison | None) -> Iterable[tuple[str, str]]:
    if comparison is None:
        return
    for question, group, verdicts in (
        (
            "Does the instruction help where it should?",
            comparison.instruction_aware,
            ("Yes", "Not shown", "No, it harms"),
        ),
        (
            "Does it leave other queries alone?",
            comparison.generic,
            ("It even helps", "No difference was found", "No, it harms"),
        ),
    ):
        if group is None or not group.measures:
            continue
        name, measured = next(iter(group.measures.items()))
        name = _MEASURES.get(name, name)
        difference = measured.difference
        verdict = verdicts[0 if difference.low > 0 else 2 if difference.high < 0 else 1]
        if measured.neutral:
            verdict = "Yes" if "alone" in question else "It changes nothing that matters"
        yield (
            question,
            f"{verdict}: {name} is {measured.a.value:.3f} without and {measured.b.value:.3f} with "
            f"it, a difference of {_signed(difference)}, on {group.queries} queries.",
        )


def _answer_following(report: FollowingReport | None) -> Iterable[tuple[str, str]]:
    if report is None:
        return
    if flips := report.flip_accuracy:
        beyond = flips.model.low > flips.random.high
        yield (
            "Does a document's score move as the instruction says?",
            f"{'Yes' if beyond else 'Not beyond chance'}, in {_range(flips.model)} of the cases; "
            f"a random order would in {flips.random.value:.3f}.",
        )
    matched = report.conditions.get("matched")
    paraphrased = report.conditions.get("paraphrased")
    if matched and paraphrased and paraphrased.change and report.robustness and matched.ndcg:
        yield (
            "Does the wording matter?",
            f"Reworded instructions change nDCG@10 by {_signed(paraphrased.change)}; with the "
            f"worst of several wordings it is {report.robustness.model.value:.3f} where the "
            f"original has {matched.ndcg.value:.3f}.",
        )
    irrelevant = report.conditions.get("irrelevant")
    if irrelevant and irrelevant.lift:
        yield (
            "What does an instruction that has nothing to do with the query change?",
            f"nDCG@10 by {_signed(irrelevant.lift)} against no instruction.",
        )


def _answer_calibration(report: CalibrationReport | None) -> Iterable[tuple[str, str]]:
    if report is None or report.pooled.ece is None:
        return
    text = (
        f"On average a score is {_range(report.pooled.ece)} away from the share of relevant "
        "documents among those with such a score."
    )
    if report.threshold_spread is not None and report.pooled.threshold is not None:
        text += (
            f" The best threshold is {report.pooled.threshold.value:.2f}, and differs by up to "
            f"{report.threshold_spread.value:.2f} between kinds of instruction."
        )
    yield "Do scores mean what they say?", text


def _answer_injection(report: InjectionReport | None) -> Iterable[tuple[str, str]]:
    overall = report.overall if report else None
    if report is None or overall is None or overall.shift is None:
        return
    text = f"Injected text moves the score of an irrelevant document by {_signed(overall.shift)}"
    if overall.success and overall.backfire:
        text += (
            f"; it ranks better in {overall.success.value:.0%} of the cases and worse in "
            f"{overall.backfire.value:.0%}"
        )
    if overall.crossing:
        text += f", and {overall.crossing.value:.1%} get above a threshold of {report.threshold:g}"
    yield "Can a document talk its way up?", text + ", all against harmless text of equal length."


def _comparison(comparison: Comparison) -> list[Content]:
    rows = []
    for name, group in comparison.groups():
        for measure, found in group.measures.items():
            neutral = {True: "yes", False: "no", None: "cannot tell"}[found.neutral]
            rows.append(
                _row(
                    f"{name}, {_MEASURES.get(measure, measure)}",
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
    headings = (
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
        element("h2", {}, "With and without the instruction"),
        _words(
            "The same queries and candidates, ranked with the instruction and without. On queries "
            "that the instruction is about it should lift the measure; on others the difference "
            "should lie within the margin. The last column is the rank-biased overlap of the two "
            "orders: 1 is the same order."
        ),
        table(_headings(headings), rows),
        element("p", {"class": "soft"}, f"p: {comparison.test}"),
    ]
    if comparison.examples:
        parts.append(element("h3", {}, "The queries that changed most"))
    for example in comparison.examples:
        parts += example.html_content()
    return parts


def _following(report: FollowingReport) -> list[Content]:
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
        _row(name, found.ndcg, found.lift, found.change, found.drift, signed={1, 2})
        for name, found in report.conditions.items()
    ]
    return [
        element("h2", {}, "Following"),
        _words(
            "Blue is the model, grey a scorer of random scores on the same data: a value inside "
            "the grey range shows nothing. Flip accuracy: of all documents whose grade differs "
            "between two instructions, the share whose score moves the right way. p-MRR, SICR and "
            "WISE: how ranks move between instructions (from -1 to 1, from 0 to 1, from -1 to 1). "
            "Robustness: nDCG@10 with the worst of several wordings. Negation accuracy: 'leave "
            "out' instead of the instruction turns the order of a pair around."
        ),
        interval_chart("Instruction following", bars, low=0, high=1),
        element("h3", {}, "What stands in the place of the instruction"),
        _words(
            "nDCG@10 by the grades of the lane. Withheld and irrelevant should be alike, and "
            "matched, long and paraphrased; negated should fall below withheld."
        ),
        table(
            _headings(("", "nDCG@10", "against withheld", "against matched", "score drift")),
            conditions,
        ),
    ]


def _calibration(report: CalibrationReport) -> list[Content]:
    groups = [("all", report.pooled), *report.by_kind.items()]
    rows = [
        _row(
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
    headings = (
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
        _words(
            "If scores are calibrated, of the documents with a score near 0.7 about 70% are "
            "relevant (grade 2 or 3), whatever the instruction. A point is a tenth of the pairs; "
            "orange points are those whose interval misses the diagonal."
        ),
    ]
    if diagrams:
        parts.append(element("div", {"class": "grid"}, *diagrams))
    else:
        parts.append(_words("These scores are no probabilities, so there is nothing to draw."))
    return [*parts, table(_headings(headings), rows)]


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


def _injection(report: InjectionReport) -> list[Content]:
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
        _row(
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
    headings = (
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
        _row(
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
        _words(
            f"{report.attacks} attack texts of {len(report.by_family)} families were put into "
            "documents that the instruction makes irrelevant. All numbers compare the attacked "
            "document with the same document and harmless text of equal length in the same place. "
            "Lane transfer is the effect of the text in the document over its effect as an "
            "instruction: 0 is ideal, about 1 means that the model does not tell the two apart."
        ),
        interval_chart("Score shift by family of attack", bars, low=-0.1, high=0.1),
        table(_headings(headings), rows),
        element("h3", {}, "What attacks do to whole rankings"),
        table(
            _headings(("", "nDCG@10 with harmless text", "with attacks", "loss")),
            spoiled,
        ),
    ]
    if report.worst:
        parts += [
            element("h3", {}, "The attacks that paid most"),
            table(
                _headings(("score", "rank", "attack", "instruction and document"), texts={2, 3}),
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


def _all_numbers(report: Report) -> list[Element]:
    """Every estimate there is, folded away."""
    rows = [
        _row(
            f"{part}/{name}",
            f"{each.value:.4f}",
            f"{each.low:.4f}",
            f"{each.high:.4f}",
            str(each.n),
        )
        for part, found in (
            ("following", report.following),
            ("calibration", report.calibration),
            ("injection", report.injection),
        )
        if found is not None
        for name, each in found.rows()
    ]
    if not rows:
        return []
    return [
        element(
            "details",
            {},
            element("summary", {}, "Every estimate"),
            table(_headings(("measure", "value", "low", "high", "n")), rows),
        )
    ]


# Pieces


def _words(text: str) -> Element:
    return element("p", {"class": "words"}, text)


def _headings(names: Sequence[str], *, texts: Collection[int] = (0,)) -> list[Element]:
    return [
        element("th", {"class": "text" if place in texts else "number"}, one_line(name, 60))
        for place, name in enumerate(names)
    ]


def _row(name: str, *cells: str | Estimate | None, signed: Collection[int] = ()) -> Row:
    """A name and its numbers; `signed` are the places of estimates that need their sign."""
    return (
        element("td", {"class": "text name"}, one_line(name, 80)),
        *(_cell(cell, "+" if place in signed else "") for place, cell in enumerate(cells)),
    )


def _cell(content: str | Estimate | None, sign: str) -> Element:
    if not isinstance(content, Estimate):
        return element("td", {"class": "number"}, content or "")
    bounds = f"[{content.low:{sign}.3f}, {content.high:{sign}.3f}]"
    return element(
        "td",
        {"class": "number"},
        f"{content.value:{sign}.3f} ",
        element("span", {"class": "soft bounds"}, bounds),
    )


def _range(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
