"""Every Python example of the README runs and prints what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core.instrumentation import get_dispatcher
from pytest_examples import CodeExample, EvalExample, find_examples

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Take out the event handlers that an example puts in."""
    handlers = get_dispatcher().event_handlers
    before = list(handlers)
    yield
    handlers[:] = before


def test_readme_examples_run_and_print_what_they_say(eval_example: EvalExample) -> None:
    eval_example.set_config(line_length=100, target_version="py311")
    examples: list[CodeExample] = [e for e in find_examples(README) if e.prefix == "python"]
    assert len(examples) >= 4
    names: dict[str, object] = {}
    for example in examples:
        if eval_example.update_examples:
            names |= eval_example.run_print_update(example, module_globals=names)
        else:
            names |= eval_example.run_print_check(example, module_globals=names)
