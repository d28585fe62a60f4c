"""What is written down comes back the same; what cannot be written down is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import MetadataMode
from llama_index.postprocessor.lanerank import LanerankRerank
from pydantic_core import PydanticSerializationError

from lanerank import Instruction, InstructionContext, Reranker
from lanerank.context import Source
from lanerank.testing import OverlapScorer

FULL: dict[str, Any] = {
    "model": "owner/model",
    "top_n": 7,
    "instruction": Instruction("blue", rules=["a"], today="2026-01-01") + Instruction("red"),
    "instruction_key": "rule",
    "instruction_from": "The user works in {department}.",
    "sources": (Source.INSTRUMENT_TAGS, Source.INSTRUCTION_FROM),
    "require_instruction": True,
    "attributes": ("date", "site"),
    "metadata_mode": MetadataMode.LLM,
    "long_documents": "max_window",
    "keep_retrieval_score": True,
}
WAYS: dict[str, Callable[[LanerankRerank], LanerankRerank]] = {
    "dict": lambda it: LanerankRerank.from_dict(it.to_dict()),
    "json": lambda it: LanerankRerank.from_json(it.to_json()),
    "pydantic": lambda it: LanerankRerank.model_validate_json(
        json.dumps({k: v for k, v in json.loads(it.model_dump_json()).items() if k != "class_name"})
    ),
    "pickle": lambda it: pickle.loads(pickle.dumps(it)),
}


@pytest.fixture(params=WAYS)
def there_and_back(request) -> Callable[[LanerankRerank], LanerankRerank]:
    return WAYS[request.param]


def test_every_option_comes_back(there_and_back) -> None:
    back = there_and_back(LanerankRerank(**FULL))
    assert type(back) is LanerankRerank
    assert {name: getattr(back, name) for name in FULL} == FULL
    assert set(FULL) == set(LanerankRerank.model_fields) - {"callback_manager"}


def test_defaults_come_back(there_and_back) -> None:
    before = LanerankRerank()
    back = there_and_back(before)
    assert {n: getattr(back, n) for n in FULL} == {n: getattr(before, n) for n in FULL}


@pytest.mark.parametrize("instruction", [None, "", "blue", Instruction(glossary={"a": "b"})])
def test_instructions_come_back_as_they_were(instruction, there_and_back) -> None:
    back = there_and_back(LanerankRerank(instruction=instruction))
    assert back.instruction == instruction
    assert type(back.instruction) is type(instruction)


@pytest.mark.parametrize("sources", [None, (), ("field",)])
def test_sources_come_back_as_they_were(sources, there_and_back) -> None:
    assert there_and_back(LanerankRerank(sources=sources)).sources == sources


def test_the_model_is_written_by_name() -> None:
    # By its name even where it was the default, which another version may choose differently.
    assert LanerankRerank().to_dict()["model"] == "lanerank-mini"
    folder = Path("models") / "mine"
    assert LanerankRerank(model=folder).to_dict()["model"] == str(folder)
    assert LanerankRerank().to_dict()["class_name"] == "LanerankRerank"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": OverlapScorer()}, "`model` is an object and cannot be serialised"),
        ({"model": Reranker(OverlapScorer())}, "`model` is an object .* Reranker"),
        ({"instruction_from": lambda context: "blue"}, "`instruction_from` is a callable"),
        ({"instruction_from": InstructionContext}, "`instruction_from` is a callable"),
    ],
)
@pytest.mark.parametrize(
    "write",
    [
        LanerankRerank.to_dict,
        LanerankRerank.to_json,
        LanerankRerank.model_dump,
        LanerankRerank.model_dump_json,
        pickle.dumps,
    ],
)
def test_objects_and_callables_are_refused(options, message, write) -> None:
    with pytest.raises(PydanticSerializationError, match=message):
        write(LanerankRerank(**options))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="instrution"):
        LanerankRerank.from_dict({**LanerankRerank().to_dict(), "instrution": "blue"})
