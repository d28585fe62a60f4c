"""Every example of the README and of the docstrings runs and prints what it says."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

from langchain_lanerank import compressor, retriever

README = Path(__file__).parents[1] / "README.md"


def test_readme_examples_run_and_print_what_they_say(eval_example: EvalExample):
    eval_example.set_config(line_length=100, target_version="py311")
    examples: list[CodeExample] = [e for e in find_examples(README) if e.prefix == "python"]
    assert len(examples) >= 3
    names: dict[str, object] = {}
    for example in examples:
        run = (
            eval_example.run_print_update
            if eval_example.update_examples
            else eval_example.run_print_check
        )
        problem = ""
        try:
            names |= run(example, module_globals=names)
        except Exception as error:  # noqa: BLE001 - pytest 9 cannot show the traceback made of it
            problem = repr(error)
        assert not problem, example


@pytest.mark.parametrize("module", [compressor, retriever])
def test_docstring_examples_run_and_print_what_they_say(module):
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_an_example_that_prints_something_else_fails(eval_example: EvalExample, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n#> 3\n```\n")
    [example] = find_examples(page)
    with pytest.raises(pytest.fail.Exception):
        eval_example.run_print_check(example)
