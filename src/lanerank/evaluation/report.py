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
    element,
    one_line,
    page,
    table,
)
from lanerank.errors import InputError
from lanerank.evaluation.calibration import CalibrationReport, measure_calibration
from lanerank.evaluation.compare import Comparison, compare
from lanerank.evaluation.following import FollowingReport, measure_following
from lanerank.evaluation.injection import (
    SAMPLE,
    InjectionReport,
    measure_injection,
)
from lanerank.evaluation.measures import Estimate, describe_interval
from lanerank.evaluation.queries import queries_from_scenarios
from lanerank.evaluation.runs import measure_label
from lanerank.evaluation.scenarios import Scenario
from lanerank.evaluation.scoring import Remembering, SupportsScore
from lanerank.evaluation.sections import (
    calibration_section,
    comparison_section,
    following_section,
    headings,
    injection_section,
    row,
    words,
)
from lanerank.evaluation.systems import System

ReportPart = Literal["comparison", "following", "calibration", "injection"]
"""A question that a report answers."""

REPORT_PARTS: tuple[ReportPart, ...] = get_args(ReportPart)


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
            sections += comparison_section(self.comparison)
        if self.following is not None:
            sections += following_section(self.following)
        if self.calibration is not None:
            sections += calibration_section(self.calibration)
        if self.injection is not None:
            sections += injection_section(self.injection)
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
        words(facts),
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
        difference = measured.difference
        verdict = verdicts[0 if difference.low > 0 else 2 if difference.high < 0 else 1]
        if measured.neutral is None:
            verdict = "Too few queries to tell"
        elif measured.neutral:
            verdict = "Yes" if "alone" in question else "It changes nothing that matters"
        yield (
            question,
            f"{verdict}: {measure_label(name)} is {measured.a.value:.3f} without and "
            f"{measured.b.value:.3f} with it, a difference of {_signed(difference)}, on "
            f"{group.queries} queries.",
        )


def _answer_following(report: FollowingReport | None) -> Iterable[tuple[str, str]]:
    if report is None:
        return
    if flips := report.flip_accuracy:
        verdict = "Yes" if flips.model.low > flips.random.high else "Not beyond chance"
        if flips.model.clusters == 1:
            verdict = "Too few scenarios to tell"
        yield (
            "Does a document's score move as the instruction says?",
            f"{verdict}, in {_range(flips.model)} of the cases; "
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


def _all_numbers(report: Report) -> list[Element]:
    """Every estimate there is, folded away."""
    rows = [
        row(
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
            table(headings(("measure", "value", "low", "high", "n")), rows),
        )
    ]


# Pieces


def _range(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.bounds()}]"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.bounds('+')}]"
