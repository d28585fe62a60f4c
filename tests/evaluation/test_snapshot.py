import json
import math
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanerank import Document, Instruction, Reranker, use_instruction
from lanerank.errors import FileFormatError, InputError, InstructionNotSupportedError, ScorerError
from lanerank.evaluation import Scenario
from lanerank.evaluation.cases import Case, read_cases
from lanerank.evaluation.scoring import score_scenario
from lanerank.evaluation.snapshot import Snapshot, take_snapshot
from lanerank.testing import OverlapScorer, ScriptedScorer


def overlap() -> Reranker:
    return Reranker(OverlapScorer())


def a_case(**changes) -> Case:
    fields = {"id": "fish", "query": "red fish", "documents": ["blue fish", "red fish", "cow"]}
    return Case(**fields | changes)


class Asked:
    """A reranker that keeps what it was asked, and gives as many scores as it is told to."""

    scorer = OverlapScorer()

    def __init__(self, scores=(0.5,)):
        self.scores = scores
        self.calls = []

    def score(self, query, documents, *, instruction=None, attributes=()):
        self.calls.append((query, documents, instruction, attributes))
        return self.scores


# Taking one


def test_records_scores_and_ranks():
    snapshot = take_snapshot(overlap(), [a_case(), a_case(id="b", instruction="Prefer blue.")])
    assert snapshot.model == "overlap"
    assert [case.id for case in snapshot.cases] == ["fish", "b"]
    documents = snapshot.cases[0].documents
    assert [(doc.score, doc.rank) for doc in documents] == [(0.5, 2), (1.0, 1), (0.0, 3)]
    documents = snapshot.cases[1].documents
    assert [(doc.score, doc.rank) for doc in documents] == [(0.5, 1), (0.3333, 2), (0.0, 3)]
    assert [case.instruction for case in snapshot.cases] == [
        None,
        Instruction("Prefer blue.").fingerprint,
    ]


def test_asks_as_the_application_does():
    asked = Asked()
    document = Document("a", id="x", metadata={"date": "2025-03-01", "by": "me"})
    case = a_case(
        documents=[document], instruction="New ones.", attributes=["date"], today="2025-06-30"
    )
    take_snapshot(asked, [case])
    dated = Instruction("New ones.", today=date(2025, 6, 30))
    assert asked.calls == [("red fish", [document], dated, ("date",))]


def test_a_scope_around_the_call_has_no_say():
    with use_instruction("Prefer cow."):
        inside = take_snapshot(overlap(), [a_case()])
    assert inside == take_snapshot(overlap(), [a_case()])


def test_scenarios_are_scored_as_evaluate_does(tmp_path):
    line = {
        "id": "s",
        "domain": "d",
        "query": "fish",
        "today": "2025-06-30",
        "documents": [
            {"id": "a", "text": "red fish", "metadata": {"date": "2025-03-01"}},
            {"id": "b", "text": "cow", "metadata": {"type": "old"}},
        ],
        "lanes": [
            {"kind": "none", "instruction": None, "grades": {"a": 1, "b": 0}},
            {"kind": "recency", "instruction": "3 months old", "grades": {"a": 3, "b": 0}},
        ],
    }
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(line))
    snapshot = take_snapshot(overlap(), read_cases(path))
    scenario = Scenario.model_validate(line)
    for case, lane in zip(snapshot.cases, scenario.lanes, strict=True):
        text = lane.instruction
        instruction = Instruction(text, today=scenario.today) if text else None
        expected = score_scenario(overlap(), scenario, instruction)
        assert [doc.score for doc in case.documents] == [round(score, 4) for score in expected]
        assert case.instruction == (instruction and instruction.fingerprint)


def test_equal_scores_keep_the_order_given_and_lost_ones_go_last():
    scores = {"a": math.nan, "b": 0.2, "c": math.inf, "d": 0.2, "e": 0.20001}
    snapshot = take_snapshot(Reranker(ScriptedScorer(scores)), [a_case(documents=list(scores))])
    documents = snapshot.cases[0].documents
    assert [doc.score for doc in documents] == [None, 0.2, None, 0.2, 0.2]
    assert [doc.rank for doc in documents] == [4, 2, 5, 3, 1]


def test_there_is_no_minus_zero():
    snapshot = take_snapshot(Reranker(ScriptedScorer({"a": -1e-9})), [a_case(documents=["a"])])
    assert str(snapshot.cases[0].documents[0].score) == "0.0"


def test_content_is_what_the_model_sees():
    def content(attributes, **metadata):
        case = a_case(documents=[Document("a", metadata=metadata)], attributes=attributes)
        return take_snapshot(overlap(), [case]).cases[0].documents[0].content

    bare = content([], type="x")
    assert bare == content([], type="y") == content(["date"], type="x")
    assert bare != content(["type"], type="x") != content(["type"], type="y")
    assert content(["type"], type="x", by="me") == content(["type"], by="you", type="x")


def test_says_how_far_it_is():
    done = []
    cases = [a_case(id=name) for name in "abc"]
    take_snapshot(overlap(), cases, progress=lambda number, whole: done.append((number, whole)))
    assert done == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("cases", "problem"),
    [
        ([], "`cases` is empty"),
        ("cases.jsonl", "`cases` must be a list of `Case`, got 'cases.jsonl'"),
        (a_case(), "`cases` must be a list of `Case`, got Case"),
        ([a_case(), {}], r"`cases\[1\]` must be a `Case`, got dict"),
        ([a_case(), a_case()], "`cases`: id used more than once: 'fish'"),
    ],
)
def test_unusable_cases_are_refused(cases, problem):
    with pytest.raises(InputError, match=problem):
        take_snapshot(overlap(), cases)


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ScorerError, match="1 scores for 3 documents of case 'fish'"):
        take_snapshot(Asked(), [a_case()])


def test_an_error_names_its_case():
    reranker = Reranker(OverlapScorer(supports_instructions=False))
    with pytest.raises(InstructionNotSupportedError) as caught:
        take_snapshot(reranker, [a_case(), a_case(id="b", instruction="Prefer blue.")])
    assert caught.value.__notes__ == ["while scoring case 'b'"]


# The file


def test_the_file_has_a_line_for_each_document(tmp_path):
    cases = [
        a_case(documents=[{"id": "d1", "text": "blue fish"}, "red fish"]),
        a_case(id="second", instruction="Prefer blue.", documents=["ü"]),
    ]
    path = tmp_path / "snapshot.json"
    snapshot = take_snapshot(overlap(), cases).model_copy(update={"lanerank": "0.1.0"})
    snapshot.save(path)
    assert path.read_text(encoding="utf-8") == (
        """\
{
  "format": "lanerank-snapshot",
  "version": 1,
  "lanerank": "0.1.0",
  "model": "overlap",
  "cases": [
    {"id": "fish", "query": "560fa2a5359064b0", "instruction": null, "documents": [
      {"id": "d1", "content": "4b4547ac29f2736c", "score": 0.5, "rank": 2},
      {"id": null, "content": "6988c70fba1eac5d", "score": 1.0, "rank": 1}
    ]},
    {"id": "second", "query": "560fa2a5359064b0", "instruction": "945d43b3e74df38c", "documents": [
      {"id": null, "content": "7b89bcce8f04ec14", "score": 0.0, "rank": 1}
    ]}
  ]
}
"""
    )


def test_no_text_of_the_user_is_in_the_file(tmp_path):
    secret = "sesquipedalian"
    case = a_case(
        query=secret,
        instruction={"rules": [secret], "glossary": {secret: secret}},
        attributes=["type"],
        documents=[Document(secret, metadata={"type": secret})],
    )
    take_snapshot(overlap(), [case]).save(tmp_path / "s.json")
    assert secret not in (tmp_path / "s.json").read_text()


def test_a_shown_id_does_not_act(tmp_path):
    documents = [
        {"id": 'a"\\\u202e\u2028\x9b\0\U000e0001', "text": "a"},
        {"id": "ф🚢", "text": "b"},
    ]
    snapshot = take_snapshot(overlap(), [a_case(documents=documents)])
    path = tmp_path / "s.json"
    snapshot.save(path)
    text = path.read_text(encoding="utf-8")
    assert all(char.isprintable() or char == "\n" for char in text)
    assert '"ф🚢"' in text
    assert Snapshot.load(path) == snapshot


@given(data=st.data())
def test_a_round_trip_keeps_every_byte(data, troublesome_text, tmp_path_factory):
    texts = data.draw(st.lists(troublesome_text, min_size=1, max_size=4))
    score = st.floats(allow_subnormal=False)
    scorer = ScriptedScorer({text: data.draw(score) for text in texts}, name=texts[0])
    instruction, query = data.draw(troublesome_text), f"q{texts[0]}"
    case = a_case(query=query, instruction=instruction, documents=texts)
    snapshot = take_snapshot(Reranker(scorer), [case])
    first, second = (tmp_path_factory.mktemp("trip") / name for name in ("a.json", "b.json"))
    snapshot.save(first)
    loaded = Snapshot.load(first)
    loaded.save(second)
    assert loaded == snapshot
    assert first.read_bytes() == second.read_bytes()


def test_a_file_in_the_way_is_replaced_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    small, large = (take_snapshot(overlap(), [a_case(documents=["a"] * n)]) for n in (1, 9))
    large.save(path)
    small.save(str(path))
    assert Snapshot.load(path) == small

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match="No space left"):
        large.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    snapshot = take_snapshot(overlap(), [a_case()])
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "no" / "s.json", tmp_path / "file" / "s.json"):
        with pytest.raises(InputError, match=r"`path`: .* cannot be written: .*; give a file in"):
            snapshot.save(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "s.json"
    take_snapshot(overlap(), [a_case(documents=[{"id": "a", "text": "b"}, "c"])]).save(path)
    return path


def changed(path, change) -> Path:
    """The file after a change of what its JSON holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


DAMAGES = {
    "another format": (
        lambda s: s.update(format="junit"),
        'it lacks "format": "lanerank-snapshot"',
    ),
    "no format": (lambda s: s.pop("format"), "is not a snapshot"),
    "a later version": (
        lambda s: s.update(version=2, lanerank="9.1.0", news=[]),
        "has version 2 of the format, written by lanerank '9.1.0'; this is lanerank",
    ),
    "no version": (lambda s: s.pop("version"), "has version None of the format"),
    "no model": (lambda s: s.pop("model"), "is damaged: `model`: Field required"),
    "an unknown field": (lambda s: s.update(note=1), "`note`: Extra inputs are not permitted"),
    "cases of another type": (lambda s: s.update(cases={}), "`cases`: Input should be"),
    "a case twice": (lambda s: s.update(cases=s["cases"] * 2), "id used more than once in `cases`"),
    "no hash": (lambda s: s["cases"][0].update(query="red fish"), "`cases.0.query`: String should"),
    "a document twice": (
        lambda s: s["cases"][0]["documents"][1].update(id="a"),
        "`cases.0`: id used more than once in `documents`: 'a'",
    ),
    "a rank twice": (
        lambda s: s["cases"][0]["documents"][1].update(rank=1),
        r"the ranks of 2 `documents` are \[1, 1\]",
    ),
    "a score as text": (
        lambda s: s["cases"][0]["documents"][0].update(score="0.5"),
        "`cases.0.documents.0.score`: Input should be a valid number",
    ),
    "a score beyond numbers": (
        lambda s: s["cases"][0]["documents"][0].update(score=10**400),
        "`cases.0.documents.0.score`",
    ),
}


@pytest.mark.parametrize(("change", "problem"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_foreign_files_are_refused(written, change, problem):
    with pytest.raises(InputError, match=problem) as caught:
        Snapshot.load(changed(written, change))
    assert str(caught.value).startswith(f"`path`: {str(written)!r} ")


@pytest.mark.parametrize(
    ("damage", "line", "problem"),
    [
        (lambda text: b"", 1, "not valid JSON"),
        (lambda text: text[:-30], 9, "not valid JSON"),
        (lambda text: text.replace(b"  ]\n", b"<<<<<<< HEAD\n  ]\n"), 11, "not valid JSON"),
        (lambda text: text.replace(b'"rank": 1', b'"rank": NaN'), 1, "NaN is not a JSON value"),
        (lambda text: text.replace(b'"a"', b'"\xff"'), 8, "not UTF-8"),
        (lambda text: b"[]", 1, "expected a JSON object"),
        (lambda text: b'{"cases":' * 100_000, 1, "not usable JSON"),
        (lambda text: text.replace(b"{\n", b'{\n"model": "x",\n', 1), 1, "key used more than once"),
    ],
    ids=["empty", "cut", "conflict", "nan", "encoding", "list", "deep", "key twice"],
)
def test_broken_json_is_refused_with_its_line(written, damage, line, problem):
    written.write_bytes(damage(written.read_bytes()))
    with pytest.raises(FileFormatError, match=problem) as caught:
        Snapshot.load(written)
    assert (caught.value.path, caught.value.line) == (str(written), line)


def test_a_missing_file_is_an_input_error(tmp_path):
    for place in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read: .*; give a file that"):
            Snapshot.load(place)
