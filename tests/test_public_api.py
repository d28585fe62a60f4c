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
    return HEAVY & set(json.loads(run.stdout.splitlines()[-1]))


def test_heavy_module_would_be_seen() -> None:
    assert "scipy" in heavy_modules_after("import scipy")


def test_import_stays_light() -> None:
    assert heavy_modules_after("import lanerank") == set()


def test_looking_at_every_public_name_stays_light() -> None:
    code = "import lanerank\nfor name in lanerank.__all__: getattr(lanerank, name)"
    assert heavy_modules_after(code) == set()


def test_data_and_judges_of_training_do_without_torch() -> None:
    code = "from lanerank.training import *"
    assert "torch" in heavy_modules_after(code)
    code = (
        "import lanerank.training as t\nt.check, t.Judge, t.fit_tournament, t.read_config, dir(t)"
    )
    assert heavy_modules_after(code) & {"torch", "transformers", "accelerate"} == set()


def test_every_name_of_training_is_there() -> None:
    from lanerank import training

    assert len(set(training.__all__)) == len(training.__all__)
    assert set(training.__all__) <= set(dir(training))
    values = {name: getattr(training, name) for name in training.__all__}
    explained = [
        value for value in values.values() if inspect.isroutine(value) or inspect.isclass(value)
    ]
    assert len(explained) > 50
    assert [value for value in explained if not inspect.getdoc(value)] == []
    assert training.train.__module__ == "lanerank.training.trainer"
    with pytest.raises(AttributeError, match="Trianer"):
        training.Trianer  # noqa: B018


def test_commands_for_data_do_without_torch(tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q", "instruction": null, "document": "d", "score": 1}\n')
    code = f"from lanerank.cli import app\napp(['data', 'check', {str(rows)!r}, '--json'], "
    code += "standalone_mode=False)\nprint()"
    assert heavy_modules_after(code) & {"torch", "transformers", "accelerate"} == set()


@pytest.mark.parametrize("absent", [("stamina",), ("scipy", "choix")])
def test_training_names_its_extra(absent: tuple[str, ...]) -> None:
    code = f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
    code += "from lanerank.errors import MissingExtraError\n"
    code += "try: import lanerank.training\nexcept MissingExtraError as error: print(error)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    named = " and ".join(sorted(absent))
    assert f"`lanerank.training` needs {named}, not installed here" in run.stdout
    assert 'pip install "lanerank[train]"' in run.stdout
