"""The public names, and what importing them brings along."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import langchain_lanerank

# Seconds to import, or not to be had at all; none of it is needed before a model is loaded.
HEAVY = {"torch", "transformers", "langgraph", "langchain", "langchain_classic"}


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_the_public_names_are_these_and_documented():
    assert set(langchain_lanerank.__all__) == {
        "InstructionHandler",
        "LanerankRerank",
        "LanerankRetriever",
        "RerankInput",
        "RerankResult",
    }
    for name in langchain_lanerank.__all__:
        assert inspect.getdoc(getattr(langchain_lanerank, name))


def test_types_travel_with_the_package():
    assert (Path(langchain_lanerank.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    ("module", "heavy"), [("langchain_lanerank", set()), ("langgraph.runtime", {"langgraph"})]
)
def test_importing_it_stays_light(module, heavy):
    loaded = json.loads(run(f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"))
    assert HEAVY & set(loaded) == heavy


def test_it_works_without_langgraph():
    code = """
import sys
sys.modules["langgraph"] = None
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from lanerank.testing import OverlapScorer
from langchain_lanerank import LanerankRerank, LanerankRetriever
retriever = LanerankRetriever(
    base_retriever=RunnableLambda(lambda _: [Document("red fish"), Document("blue fish")]),
    reranker=LanerankRerank(model=OverlapScorer()),
)
config = {"configurable": {"rerank_instruction": "blue"}}
print(RunnableLambda(retriever.invoke).invoke("fish", config)[0].page_content)
"""
    assert run(code) == "blue fish\n"
