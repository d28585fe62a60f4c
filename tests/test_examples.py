"""Every Python example of the README and of docs/ runs and prints what it says."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
from pytest_examples import CodeExample, EvalExample, find_examples

from lanerank.cli import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted(ROOT.glob("docs/*.md"))


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_examples_run_and_print_what_they_say(
    page: Path, eval_example: EvalExample, monkeypatch: pytest.MonkeyPatch
):
    # Examples name files as from the top of the repository.
    monkeypatch.chdir(ROOT)
    eval_example.set_config(line_length=100, target_version="py311")
    examples: list[CodeExample] = [e for e in find_examples(page) if e.prefix == "python"]
    assert len(examples) >= 3 or page != README
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


def commands(page: Path) -> list[str]:
    """The lines of a page's bash examples that call lanerank."""
    examples = re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [line for text in examples for line in text.splitlines() if line.startswith("lanerank ")]


def check_options(line: str) -> None:
    """Let click parse a command without running it."""
    _, name, *arguments = shlex.split(line, comments=True)
    typer.main.get_command(app).commands[name].make_context(name, arguments)


@pytest.mark.parametrize("line", [line for page in DOCS for line in commands(page)])
def test_commands_have_the_options_that_examples_use(line: str):
    check_options(line)


def test_an_example_with_an_unknown_option_fails():
    with pytest.raises(Exception, match="No such option"):
        check_options("lanerank rank-dataset in.parquet out/ --no-such-option")
