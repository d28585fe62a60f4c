"""The instruction: what it accepts, how it is worded, how layers combine, what identifies it."""

from __future__ import annotations

import copy
import datetime
import doctest
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lanerank import instruction as instruction_module
from lanerank.errors import InputError
from lanerank.instruction import Instruction, InstructionLike

NOVEMBER = datetime.date(2026, 11, 22)
MAY = datetime.date(2020, 5, 1)

FULL = Instruction(
    "We recruit ship officers",
    user_context="The user works in crewing.",
    rules=["Prefer signed documents", "Leave out drafts!"],
    disambiguation="Treat 'IMO' as the International Maritime Organization.",
    glossary={"STCW": "the convention on seafarer training", "PSC": "port state control."},
    recency="Prefer documents from the last six months",
    today=NOVEMBER,
)

words = st.text(st.sampled_from("abÅé .!'{}\n"), max_size=8)
terms = st.dictionaries(st.sampled_from(["IMO", "imo", "ECL", " "]), words, max_size=3)
days = st.none() | st.dates()
flat = st.builds(
    Instruction,
    text=st.none() | words,
    rules=st.lists(words, max_size=2),
    user_context=st.none() | words,
    disambiguation=words,
    glossary=terms,
    recency=st.none() | words,
    today=days,
)
nested = st.builds(
    lambda top, layers: Instruction.model_validate({**top.model_dump(), "layers": layers}),
    flat,
    st.lists(flat, max_size=2),
)
instructions = (
    st.recursive(flat, lambda inner: st.builds(lambda a, b: a + b, inner, inner)) | nested
)


# What it accepts


def test_text_is_accepted_by_position_and_stripped() -> None:
    assert Instruction(" Prefer recent. \n") == Instruction(text="Prefer recent.")


def test_a_single_string_is_one_rule() -> None:
    assert Instruction(rules="One.").rules == ("One.",)
    assert Instruction(disambiguation="Hint.").disambiguation == ("Hint.",)


def test_blank_parts_count_as_absent() -> None:
    blank = Instruction(
        " ",
        rules=["", " \n"],
        user_context="",
        disambiguation=" ",
        glossary={"IMO": " ", " ": "x"},
        recency="\t",
        layers=[Instruction(""), Instruction(layers=[Instruction(" ")])],
    )
    assert blank == Instruction()
    assert blank.is_empty
    assert not blank
    assert blank.render() == ""
    assert blank.glossary == {}


def test_none_counts_as_absent_so_that_json_nulls_are_welcome() -> None:
    nulls: dict[str, Any] = dict.fromkeys(Instruction.model_fields)
    assert Instruction(**nulls) == Instruction()


@pytest.mark.parametrize("part", [n for n in Instruction.model_fields if n != "layers"])
def test_any_part_makes_it_true(part: str) -> None:
    values: dict[str, Any] = {"glossary": {"a": "b"}, "today": MAY}
    assert Instruction(**{part: values.get(part, "x")})


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"text": 5}, "`text`"),
        ({"text": b"bytes"}, "`text`"),
        ({"rules": ["a", 5]}, "`rules.1`"),
        ({"rules": {"a", "b"}}, "no fixed order"),
        ({"glossary": {"IMO": 5}}, "`glossary.IMO`"),
        ({"glossary": {"IMO": "a", "IMO ": "b"}}, "twice"),
        ({"today": 20261122}, "`today`"),
        ({"today": "tomorrow"}, "2026-11-22"),
        ({"today": datetime.datetime(2026, 11, 22, 9)}, "`.date\\(\\)`"),
        ({"layers": ["text"]}, "`layers.0`"),
        ({"rule": "typo"}, "`rule`.*its parts are text, rules"),
    ],
)
def test_unusable_parts_are_named(parts: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Instruction(**parts)


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FULL.text = "other"  # type: ignore[misc]


def test_later_changes_of_the_callers_objects_change_nothing() -> None:
    rules, glossary = ["Prefer A."], {"IMO": "maritime"}
    made = Instruction(rules=rules, glossary=glossary)
    before = made.fingerprint
    rules.append("Prefer B.")
    glossary["IMO"] = "olympiad"
    assert made.fingerprint == before
    assert made.glossary == {"IMO": "maritime"}
    assert glossary == {"IMO": "olympiad"}


def test_the_glossary_cannot_be_changed() -> None:
    assert isinstance(FULL.glossary, Mapping)
    with pytest.raises(TypeError):
        FULL.glossary["STCW"] = "other"  # type: ignore[index]
    assert hash(FULL.glossary) == hash(copy.deepcopy(FULL).glossary)


def test_coerce_takes_what_instruction_arguments_take() -> None:
    assert Instruction.coerce(None) == Instruction()
    assert Instruction.coerce("  x ") == Instruction("x")
    assert Instruction.coerce(FULL) is FULL


@pytest.mark.parametrize("value", [5, ["a"], {"text": "a"}, b"a", object()])
def test_coerce_names_the_argument_the_type_and_the_remedy(value: object) -> None:
    wrong: Any = value
    with pytest.raises(InputError, match=rf"`setting` must be .* {type(value).__name__}: .*Pass"):
        Instruction.coerce(wrong, name="`setting`")


# Wording


def test_every_part_is_rendered_in_its_place_as_sentences() -> None:
    assert FULL.render() == (
        "We recruit ship officers. The user works in crewing. Prefer signed documents. "
        "Leave out drafts! Treat 'IMO' as the International Maritime Organization. "
        "STCW means the convention on seafarer training. PSC means port state control. "
        "Prefer documents from the last six months. Today is 2026-11-22."
    )


@pytest.mark.parametrize("text", ["no full stop", "two\nlines", "Ends (here)", "x\ud800\x00"])
def test_a_text_on_its_own_is_left_as_it_is(text: str) -> None:
    assert Instruction(text).render() == text


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("Prefer A", "Prefer A."),
        ("Prefer A?", "Prefer A?"),
        ("Prefer 'A.'", "Prefer 'A.'"),
        ("Prefer (A)", "Prefer (A)."),
        ("優先する。", "優先する。"),
    ],
)
def test_sentences_are_ended_once(rule: str, sentence: str) -> None:
    assert Instruction(rules=rule).render() == sentence


def test_the_operators_part_comes_first_and_today_once_at_the_end() -> None:
    operator = Instruction("Prefer signed documents", recency="Prefer new ones", today=MAY)
    user = Instruction("I am a nurse", recency="Old ones are fine", today=NOVEMBER)
    assert (operator + user).render() == (
        "Prefer signed documents. Prefer new ones. I am a nurse. Old ones are fine. "
        "Today is 2020-05-01."
    )


def test_an_earlier_layers_term_wins_whatever_its_case() -> None:
    operator = Instruction(glossary={"IMO": "the maritime organization"})
    user = Instruction(glossary={"imo": "the olympiad", "ECL": "a logic family"})
    assert (operator + user).render() == (
        "IMO means the maritime organization. ECL means a logic family."
    )
    assert (user + operator).render() == "imo means the olympiad. ECL means a logic family."


def test_terms_that_differ_by_case_stay_apart_within_one_layer() -> None:
    both = Instruction(glossary={"Polish": "of Poland", "polish": "a shoe cream"})
    assert both.render() == "Polish means of Poland. polish means a shoe cream."


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (Instruction("x"), None),
        (Instruction(today=MAY), MAY),
        (Instruction(recency="New ones."), NOVEMBER),
        (Instruction(recency="New ones.") + Instruction(today=MAY), MAY),
        (Instruction("x") + Instruction(recency="New ones."), NOVEMBER),
        (Instruction(today=MAY) + Instruction(today=NOVEMBER), MAY),
    ],
)
def test_effective_today(instruction: Instruction, expected: datetime.date | None) -> None:
    assert instruction.effective_today(NOVEMBER) == expected
    sentence = "Today is"
    assert (sentence in instruction.render(NOVEMBER)) == (expected is not None)
    assert instruction.render(NOVEMBER).endswith(f"{sentence} {expected}.") == bool(expected)


def test_recency_brings_in_the_current_date() -> None:
    before = datetime.date.today()
    today = Instruction(recency="New ones.").effective_today()
    assert today is not None
    assert before <= today <= datetime.date.today()


@given(instructions)
def test_nothing_is_rendered_for_the_empty_instruction_only(instruction: Instruction) -> None:
    assert bool(instruction) == bool(instruction.render())


# Layering


def wording(instruction: Instruction) -> tuple[str, str, Instruction]:
    return instruction.render(NOVEMBER), instruction.fingerprint, instruction


@given(instructions, instructions, instructions)
def test_layering_is_associative(a: Instruction, b: Instruction, c: Instruction) -> None:
    assert wording((a + b) + c) == wording(a + (b + c))


@given(instructions)
def test_the_empty_instruction_is_the_identity(a: Instruction) -> None:
    for same in (a + Instruction(), Instruction() + a, a + None, None + a, a + " ", "" + a):
        assert wording(same) == wording(a)
        assert hash(same) == hash(a)


@given(instructions, instructions)
def test_lower_layers_never_change_what_the_upper_one_says(a: Instruction, b: Instruction) -> None:
    if a.effective_today(MAY) is None:
        assert (a + b).render(MAY).startswith(a.render(MAY))
    if any(layer.today for layer in (a, *a.layers)):
        assert (a + b).effective_today(MAY) == a.effective_today(MAY)


@given(instructions, st.lists(instructions, max_size=2))
def test_layers_given_to_the_constructor_are_those_of_addition(
    top: Instruction, layers: list[Instruction]
) -> None:
    own = {**top.model_dump(), "layers": [*top.layers, *layers]}
    added = top
    for layer in layers:
        added = added + layer
    assert wording(Instruction(**own)) == wording(added)


def test_strings_can_be_layered_from_both_sides() -> None:
    assert Instruction("a") + "b" == "a" + Instruction("b")
    assert ("a" + Instruction("b")).render() == "a. b."


def test_layering_leaves_both_sides_as_they_were() -> None:
    a, b = Instruction("a"), Instruction("b")
    a + b
    assert (a, b) == (Instruction("a"), Instruction("b"))


def test_other_types_cannot_be_layered() -> None:
    with pytest.raises(TypeError):
        Instruction("a") + 5  # type: ignore[operator]
    with pytest.raises(TypeError):
        5 + Instruction("a")  # type: ignore[operator]


# Identity


def test_the_fingerprints_that_logs_hold_stay_valid() -> None:
    assert Instruction("Prefer recent documents.").fingerprint == "1bd47504d5e8f751"
    assert (FULL + Instruction("Å user", glossary={"imo": "x"})).fingerprint == "7987e6876bffa03d"


def test_an_implicit_today_is_not_part_of_the_fingerprint_and_an_explicit_one_is() -> None:
    implicit = Instruction(recency="Prefer new ones.")
    assert implicit.render(MAY) != implicit.render(NOVEMBER)
    explicit = {
        Instruction(recency="Prefer new ones.", today=day).fingerprint for day in (MAY, NOVEMBER)
    }
    assert len(explicit | {implicit.fingerprint}) == 3


@pytest.mark.parametrize("value", ["x", " x\n", Instruction("x"), Instruction() + "x"])
def test_coerced_values_share_a_fingerprint(value: InstructionLike) -> None:
    assert Instruction.coerce(value).fingerprint == Instruction("x").fingerprint


def test_each_part_counts_in_the_fingerprint() -> None:
    variants = [Instruction("x"), Instruction(rules="x"), Instruction(user_context="x")]
    variants += [Instruction(disambiguation="x"), Instruction(recency="x"), Instruction()]
    variants += [Instruction(rules=["x", "y"]), Instruction(rules="x") + Instruction(rules="y")]
    variants += [
        Instruction(glossary={"a": "b", "c": "d"}),
        Instruction(glossary={"c": "d", "a": "b"}),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(set(variants)) == len(variants)


@given(instructions, instructions)
def test_equal_means_same_fingerprint_hash_and_wording(a: Instruction, b: Instruction) -> None:
    assert (a == b) == (a.fingerprint == b.fingerprint)
    if a == b:
        assert hash(a) == hash(b)
        assert a.render(MAY) == b.render(MAY)


@given(st.text(st.characters(codec=None), max_size=6))
def test_any_text_has_a_fingerprint(text: str) -> None:
    assert len(Instruction(text, rules=text, glossary={text: text}).fingerprint) == 16


def test_lone_surrogates_and_null_bytes_have_a_fingerprint() -> None:
    odd = [Instruction(text) for text in ("a\ud800", "a\udfff", "a\x00", "a")]
    assert len({instruction.fingerprint for instruction in odd}) == 4
    assert odd[0].text == "a\ud800"


def test_it_differs_from_other_types() -> None:
    assert Instruction("x") != "x"
    assert Instruction() != None  # noqa: E711 - the comparison is what is tested


# Serialising


@settings(max_examples=50)
@given(instructions)
def test_dumps_copies_and_pickles_round_trip(instruction: Instruction) -> None:
    assert Instruction.model_validate(instruction.model_dump()) == instruction
    assert Instruction.model_validate_json(instruction.model_dump_json()) == instruction
    assert pickle.loads(pickle.dumps(instruction)) == instruction
    assert copy.deepcopy(instruction) == instruction


def test_the_dump_holds_plain_values() -> None:
    dump = FULL.model_dump(mode="json", exclude_defaults=True)
    assert type(dump["glossary"]) is dict
    assert dump["today"] == "2026-11-22"
    assert "layers" not in dump


def test_it_can_be_a_field_of_another_model() -> None:
    class Settings(BaseModel):
        instruction: str | Instruction | None = None

    assert Settings(instruction=FULL).instruction is FULL
    assert Settings.model_validate_json(
        '{"instruction": {"rules": ["a"]}}'
    ).instruction == Instruction(rules="a")
    with pytest.raises(ValidationError, match="Extra inputs"):
        Settings.model_validate({"instruction": {"rule": "a"}})


def test_the_examples_of_the_docstrings_run() -> None:
    result = doctest.testmod(instruction_module)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("field", ["self", "text_", "rule"])
def test_a_field_that_is_not_one_is_named(field) -> None:
    with pytest.raises(ValueError, match=field):
        Instruction.model_validate({field: "x"})
