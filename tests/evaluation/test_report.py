from datetime import date
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanerank import Document, Instruction, Reranker
from lanerank.display import element, page
from lanerank.errors import InputError, ScorerError
from lanerank.evaluation import REPORT_PARTS, Estimate, Report, Scenario, make_report
from lanerank.evaluation.charts import (
    Bar,
    Point,
    _ticks,
    interval_chart,
    reliability_diagram,
)
from lanerank.evaluation.scoring import Remembering
from lanerank.testing import OverlapScorer

HOSTILE = "</style></title></svg><script>alert(1)</script><img src=x onerror='x'>\u202e\0"


class Named:
    def __init__(self, name):
        self.name = name


class Scripted:
    """Scores by a function of (query, rendered instruction or None, document)."""

    def __init__(self, function, name="scripted"):
        self.scorer = Named(name)
        self.function = function
        self.asked = []

    def score(self, query, documents, *, instruction=None, attributes=()):
        text = None if instruction is None else instruction.render()
        self.asked += [(query, text, document.text) for document in documents]
        return [self.function(query, text, document) for document in documents]


def scenarios(count=8, mark=""):
    """Two instructions that want opposite halves of the documents, and a query that needs none."""
    built = []
    for number in range(count):
        halves = {"boats": ["a ferry", "a tug"], "trains": ["a tram", "an express"]}
        documents = [
            {"id": f"d{i}", "text": f"{text} for trip {number} {mark}"}
            for i, text in enumerate([*halves["boats"], *halves["trains"]])
        ]
        lanes = [
            ("none", None, [3, 0, 2, 0]),
            ("user_context", f"{mark}I love boats", [3, 2, 0, 0]),
            ("business_rule", f"{mark}Trains only", [0, 0, 3, 2]),
        ]
        built.append(
            Scenario.model_validate(
                {
                    "id": f"s{number}{mark}",
                    "domain": f"travel {number % 2} {mark}",
                    "query": f"trip {number} {mark}",
                    "documents": documents,
                    "lanes": [
                        {
                            "kind": kind,
                            "instruction": text,
                            "grades": {f"d{i}": grade for i, grade in enumerate(grades)},
                        }
                        for kind, text, grades in lanes
                    ],
                }
            )
        )
    return built


def oracle(given):
    grades = {
        (scenario.query, lane.instruction, document.text): lane.grades[document.id] / 3
        for scenario in given
        for lane in scenario.lanes
        for document in scenario.documents
    }
    return lambda query, text, document: grades.get((query, text, document.text), 0.25)


class Tags(HTMLParser):
    """What a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_a_report_answers_every_question_in_words():
    given = scenarios()
    report = make_report(Scripted(oracle(given), "oracle"), given, sample=200)
    text = report.to_html()
    assert "Does the instruction help where it should?" in text
    assert "Yes: nDCG@10 is" in text
    assert "Yes, in 1.000 [1.000, 1.000] of the cases" in text
    labels = f"{report.comparison.a.label}, {report.comparison.b.label}"
    for heading in (f"Comparison: {labels}", "Following", "Calibration"):
        assert f"<h2>{heading}</h2>" in text
    tags = [tag for tag, _ in Tags(text).tags]
    assert tags.count("svg") >= 5
    assert not {"script", "img", "link", "iframe"} & set(tags)


def test_a_scorer_that_ignores_instructions_is_told_so():
    given = scenarios()
    report = make_report(Scripted(lambda q, t, d: 0.5), given, parts=("comparison", "following"))
    text = report.to_html()
    assert "Yes: nDCG@10" not in text
    assert "Not beyond chance" in text
    assert report.injection is None
    assert "Documents that give orders" not in text


def test_one_scenario_proves_nothing():
    given = scenarios()[:1]
    report = make_report(Scripted(oracle(given), "oracle"), given, parts=("following",))
    assert "Too few scenarios to tell, in 1.000 [no interval] of the cases" in report.to_html()


def test_an_instruction_that_harms_is_told_so():
    given = scenarios()
    wanted = oracle(given)

    def contrary(query, text, document):
        return 1 - wanted(query, text, document) if text else 0.5

    report = make_report(Scripted(contrary), given, parts=("comparison",))
    assert "No, it harms" in report.to_html()


def test_a_report_survives_json_and_the_page_is_the_same_without_the_examples():
    given = scenarios(3)
    report = make_report(
        Reranker(OverlapScorer()), given, sample=60, today=date(2026, 3, 10), title="Trips"
    )
    again = Report.model_validate_json(report.model_dump_json())
    assert again.model_dump() == report.model_dump()
    assert again.created == date(2026, 3, 10)
    assert "<title>Trips</title>" in again.to_html()


def test_hostile_text_stays_text():
    given = scenarios(3, HOSTILE)
    report = make_report(
        Scripted(oracle(given), f"model {HOSTILE}"), given, sample=100, title=f"Title {HOSTILE}"
    )
    text = report.to_html()
    found = Tags(text)
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert "\u202e" not in text
    assert "\0" not in text
    assert any("<script>alert(1)" in words for words in found.words)
    # What was written as a tree is a tree again.
    body = text[text.index("<body>") : text.index("</html>")]
    assert ElementTree.fromstring(body).find(".//svg") is not None


def test_a_page_forbids_scripts_and_fetching():
    text = page("a <b>", element("p", {}, "words"))
    policy = next(a["content"] for tag, a in Tags(text).tags if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "<title>a &lt;b&gt;</title>" in text


def test_progress_names_each_part():
    seen = {}
    given = scenarios(2)
    make_report(
        Reranker(OverlapScorer()),
        given,
        sample=40,
        progress=lambda part, done, total: seen.__setitem__(part, (done, total)),
    )
    assert tuple(seen) == REPORT_PARTS
    assert all(done == total for done, total in seen.values())


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match="`scenarios` is empty"):
        make_report(Reranker(OverlapScorer()), [])
    with pytest.raises(InputError, match=r"`parts` must be of comparison, .*'speed'"):
        make_report(Reranker(OverlapScorer()), scenarios(1), parts=("speed",))


# Nothing is scored twice


def test_a_report_asks_for_no_pair_twice():
    given = scenarios(3)
    reranker = Scripted(oracle(given))
    make_report(reranker, given, sample=60)
    assert len(reranker.asked) == len(set(reranker.asked))


def test_remembered_scores_are_those_of_the_reranker():
    reranker = Scripted(lambda query, text, document: len(f"{query}{text}{document.text}") / 99)
    remembering = Remembering(reranker)
    documents = [Document("a"), Document("bb", metadata={"kind": ["x"]}), Document("a")]
    for instruction in (None, Instruction("short"), Instruction("a longer one")):
        for _ in range(2):
            expected = reranker.score("q", documents, instruction=instruction)
            assert remembering.score("q", documents, instruction=instruction) == expected
    assert remembering.scorer.name == "scripted"


@pytest.mark.parametrize(
    "change",
    [
        {"query": "other"},
        {"instruction": Instruction("other")},
        {"instruction": Instruction("rule", today="2026-01-02")},
        {"attributes": ("other",)},
        {"documents": [Document("other")]},
        {"documents": [Document("text", metadata={"date": "2026-01-01"})]},
    ],
)
def test_whatever_a_model_may_see_makes_another_pair(change):
    reranker = Scripted(lambda *_: 0.5)
    remembering = Remembering(reranker)
    asked = {
        "query": "query",
        "documents": [Document("text")],
        "instruction": Instruction("rule"),
        "attributes": ("date",),
    }
    for settings in (asked, asked, asked | change):
        options = dict(settings)
        remembering.score(options.pop("query"), options.pop("documents"), **options)
    assert len(reranker.asked) == 2


def test_a_missing_score_is_not_remembered():
    class Short(Scripted):
        def score(self, query, documents, **options):
            return super().score(query, documents, **options)[1:]

    with pytest.raises(ScorerError, match="0 scores for 1 documents"):
        Remembering(Short(lambda *_: 0.5)).score("q", [Document("a")])


# Charts


@given(st.floats(-5, 5), st.floats(1e-3, 20))
def test_a_scale_has_a_few_round_ticks_inside(low, width):
    ticks = _ticks(low, low + width)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-6 <= tick <= low + width + 1e-6 for tick in ticks)


def test_a_chart_places_values_on_its_scale():
    half = Estimate(value=0.5, low=0.25, high=0.75, n=8)
    chart = interval_chart("t", [Bar(label=HOSTILE, estimate=half, baseline=half)], low=0, high=1)
    circles = [float(node.get("cx")) for node in chart.iter("circle")]
    bars = [node.get("d") for node in chart.iter("path") if "H" in node.get("d")]
    assert circles == [500.0, 500.0]
    assert bars == ["M395.0 33.0H605.0", "M395.0 42.0H605.0"]


def test_a_diagram_marks_the_points_that_miss_the_diagonal():
    points = [
        Point(score=0.2, share=0.25, low=0.1, high=0.4, count=10),
        Point(score=0.9, share=0.5, low=0.4, high=0.6, count=10),
    ]
    diagram = reliability_diagram("t", points)
    inks = [node.get("fill") for node in diagram.iter("g")]
    assert inks[0] != inks[1]
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in diagram.iter("circle")]
    assert dots == [(106.0, 247.0), (316.0, 172.0)]
