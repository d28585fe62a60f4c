"""Measures of a reranker on quadruples that were held out."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from lanerank import Reranker, use_instruction
from lanerank.contracts import RerankRequest, Scores
from lanerank.errors import InputError, InstructionNotSupportedError, ScorerError
from lanerank.testing import OverlapScorer, ScriptedScorer
from lanerank.training import DevelopmentReport, Quadruple, measure_development

RED, BLUE = "only red", "only blue"
SETTINGS = {
    RED: ("business_rule", 1.0, 0.0),
    BLUE: ("business_rule", 0.0, 1.0),
    None: ("none", 0.5, 0.0),
    "ignore the date": ("neutral", 0.5, 0.0),
}
ROWS = [
    Quadruple(query=noun, instruction=text, document=f"{colour} {noun}", score=score, kind=kind)
    for noun in ("fish", "team")
    for text, (kind, *scores) in SETTINGS.items()
    for colour, score in zip(("red", "blue"), scores, strict=True)
]
TARGETS = {(row.query, row.instruction or "", row.document): row.score for row in ROWS}


class Told:
    """Scores as a function of the request and the text says."""

    name = "told"
    supports_instructions = True

    def __init__(self, say: Callable[[RerankRequest, str], float]) -> None:
        self.say = say
        self.requests: list[RerankRequest] = []

    def score(self, request: RerankRequest) -> Scores:
        self.requests.append(request)
        return Scores(tuple(self.say(request, each.text) for each in request.candidates))


def target(request: RerankRequest, text: str) -> float:
    return TARGETS[request.query, request.instruction, text]


def test_a_perfect_and_a_deaf_reranker_are_told_apart() -> None:
    perfect = measure_development(Reranker(Told(target)), ROWS)
    assert perfect.flip_accuracy.value == perfect.ndcg_instructed.value == 1
    assert perfect.neutral_drift.value == 0
    # Red under four instructions and blue under four: 1, 0, 0.5, 0.5 and 0, 1, 0, 0.
    assert perfect.flip_accuracy.n == 2 * (5 + 3)
    assert (perfect.queries, perfect.rows, perfect.ndcg.n) == (2, 16, 8)
    deaf = measure_development(Reranker(OverlapScorer()), [r for r in ROWS if r.instruction])
    assert (deaf.ndcg_plain, deaf.neutral_drift) == (None, None)
    blind = Reranker(Told(lambda request, text: 0.5))
    assert measure_development(blind, ROWS).flip_accuracy.value == 0


def test_the_order_of_rows_plays_no_part() -> None:
    reranker = Reranker(Told(lambda request, text: len(text + request.instruction) / 50))
    found = measure_development(reranker, ROWS)
    mixed = measure_development(reranker, [*ROWS[8:], *reversed(ROWS[:8])])
    assert [value.value for _, value in mixed.rows_of_estimates()] == pytest.approx(
        [value.value for _, value in found.rows_of_estimates()]
    )


def test_the_model_is_asked_once_for_a_request_with_attributes_and_the_day() -> None:
    scorer = Told(lambda request, text: 0.5)
    rows = [
        Quadruple(
            query="fish",
            instruction=text,
            document=document,
            score=0.5,
            metadata={"date": "2026-01-10", "secret": "x"},
            attributes=("date",),
            today="2026-03-10",
        )
        for text in (RED, None)
        for document in ("one", "two")
    ]
    told: list[tuple[int, int]] = []
    measure_development(
        Reranker(scorer), [*rows, *ROWS], progress=lambda *numbers: told.append(numbers)
    )
    # Rows of "fish" with attributes are asked apart from those without.
    assert len(scorer.requests) == 2 + 2 * len(SETTINGS)
    assert told == [(1, 2), (2, 2)]
    first, second = scorer.requests[:2]
    assert [each.text for each in first.candidates] == ["one", "two"]
    assert first.instruction == "only red. Today is 2026-03-10."
    assert second.instruction == ""
    assert {each.attributes for each in first.candidates} == {"date: 2026-01-10 (8 weeks old)"}
    # Without an instruction no age is given, as in training.
    assert {each.attributes for each in second.candidates} == {"date: 2026-01-10"}


def test_a_scope_around_the_measurement_is_not_an_instruction_of_the_rows() -> None:
    scorer = Told(target)
    with use_instruction("only green"):
        assert measure_development(Reranker(scorer), ROWS).flip_accuracy.value == 1
    assert {request.instruction for request in scorer.requests} == {t or "" for t in SETTINGS}


def test_a_model_without_a_channel_is_measured_as_it_is_used() -> None:
    class Joined(Told):
        supports_instructions = False

    with pytest.raises(InstructionNotSupportedError, match="on_unsupported"):
        measure_development(Reranker(Joined(lambda request, text: 0.5)), ROWS)
    colours = Reranker(
        Joined(lambda request, text: float(text.split()[0] in request.query)),
        on_unsupported="prepend",
    )
    assert measure_development(colours, ROWS).flip_accuracy.value > 0.4
    ignoring = Reranker(colours.scorer, on_unsupported="ignore")
    assert measure_development(ignoring, ROWS).flip_accuracy.value == 0


def test_scores_that_are_no_probabilities_have_no_calibration() -> None:
    wide = measure_development(Reranker(Told(lambda r, t: 10 * target(r, t) - 5)), ROWS)
    assert (wide.ece, wide.brier) == (None, None)
    assert wide.flip_accuracy.value == 1
    broken = measure_development(Reranker(Told(lambda request, text: float("nan"))), ROWS)
    assert broken.non_finite == broken.rows == 16
    assert broken.flip_accuracy.value == 0


def test_the_gap_decides_what_a_flip_is() -> None:
    assert measure_development(Reranker(Told(target)), ROWS, min_gap=0.6).flip_accuracy.n == 8


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        ([], {}, "`rows` is empty"),
        (ROWS, {"min_gap": 0}, "`min_gap`.*got 0"),
        (ROWS, {"min_gap": float("nan")}, "`min_gap`.*got nan"),
    ],
)
def test_arguments_are_checked(rows, options, problem) -> None:
    with pytest.raises(InputError, match=problem):
        measure_development(Reranker(Told(target)), rows, **options)


def test_a_reranker_that_lacks_scores_is_named() -> None:
    class Short:
        scorer = ScriptedScorer({}, name="short")

        def score(self, query, documents, *, instruction=None, attributes=()):
            return [0.5]

    with pytest.raises(ScorerError, match="'short' returned 1 scores for 2 documents"):
        measure_development(Short(), ROWS)


def test_a_notebook_gets_a_table() -> None:
    report = measure_development(Reranker(Told(target)), ROWS)
    assert DevelopmentReport.model_validate_json(report.model_dump_json()) == report
    page = ElementTree.fromstring(report._repr_html_())
    shown = [["".join(cell.itertext()) for cell in line] for line in page.iter("tr")]
    assert shown[0] == ["measure", "value", "n"]
    assert ["flip_accuracy", "1.000 [1.000, 1.000]", "16"] in shown
    assert len(shown) == 1 + len(report.rows_of_estimates())
    assert "16 rows of 2 queries" in "".join(page.itertext())
