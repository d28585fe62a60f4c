"""The public names, pinned: a name comes or goes here first, and in the changelog."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import lanerank
from lanerank import errors

EXCEPTIONS = {
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.LanerankError)
}
PUBLIC = {
    "ComparedDocument",
    "Document",
    "Instruction",
    "InstructionContext",
    "Lane",
    "RankedDocument",
    "Ranking",
    "RankingComparison",
    "Reranker",
    "__version__",
    "compare_rankings",
    "use_instruction",
    *EXCEPTIONS,
}
# Seconds to import, or gigabytes to install; none of it is needed before a model is loaded.
HEAVY = {"torch", "transformers", "sentence_transformers", "accelerate", "scipy", "sklearn"}


def test_all_lists_the_public_names() -> None:
    assert set(lanerank.__all__) == PUBLIC
    assert len(lanerank.__all__) == len(PUBLIC)


def test_every_visible_name_is_listed() -> None:
    visible = {
        name
        for name in dir(lanerank)
        if not name.startswith("_")
        and str(getattr(getattr(lanerank, name), "__module__", "")).startswith("lanerank")
    }
    assert visible | {"__version__"} == set(lanerank.__all__)


def test_errors_map_names_every_exception() -> None:
    assert {name for name in EXCEPTIONS if name not in (errors.__doc__ or "")} == set()


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(lanerank, name))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Rerankr"):
        lanerank.Rerankr  # noqa: B018


def test_version_is_that_of_the_distribution() -> None:
    assert lanerank.__version__ == version("lanerank")


def heavy_modules_after(code: str) -> set[str]:
    """Which of the heavy modules a fresh interpreter has loaded after running the code."""
    code += "\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return HEAVY & set(json.loads(run.stdout))


def test_heavy_module_would_be_seen() -> None:
    assert "scipy" in heavy_modules_after("import scipy")


def test_import_stays_light() -> None:
    assert heavy_modules_after("import lanerank") == set()


def test_looking_at_every_public_name_stays_light() -> None:
    code = "import lanerank\nfor name in lanerank.__all__: getattr(lanerank, name)"
    assert heavy_modules_after(code) == set()
