"""Every Python example of the README runs and prints what it says."""

from pathlib import Path

import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

README = Path(__file__).parents[1] / "README.md"


def test_readme_examples_run_and_print_what_they_say(eval_example: EvalExample):
    eval_example.set_config(line_length=100, target_version="py311")
    examples: list[CodeExample] = [e for e in find_examples(README) if e.prefix == "python"]
    assert len(examples) >= 3
    names: dict[str, object] = {}
    for example in examples:
        if eval_example.update_examples:
            names |= eval_example.run_print_update(example, module_globals=names)
        else:
            names |= eval_example.run_print_check(example, module_globals=names)


def test_an_example_that_prints_something_else_fails(eval_example: EvalExample, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n#> 3\n```\n")
    [example] = find_examples(page)
    with pytest.raises(pytest.fail.Exception):
        eval_example.run_print_check(example)
