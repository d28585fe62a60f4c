"""Every Python example of the README and of docs/ runs and prints what it says."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
from pydantic import BaseModel
from pytest_examples import CodeExample, EvalExample, find_examples
from typer.testing import CliRunner

from lanerank.cli import app
from lanerank.training import Quadruple, check, losses
from lanerank.training.config import DataSource, LossWeights, TrainingConfig

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
    command: Any = typer.main.get_command(app)
    name, *arguments = shlex.split(line, comments=True)
    while commands := getattr(command, "commands", None):
        name, *arguments = arguments
        command = commands[name]
    command.make_context(name, arguments)


@pytest.mark.parametrize("line", [line for page in DOCS for line in commands(page)])
def test_commands_have_the_options_that_examples_use(line: str):
    check_options(line)


@pytest.mark.parametrize("name", ["rank-dataset in.parquet out/", "data check rows.jsonl"])
def test_an_example_with_an_unknown_option_fails(name: str):
    with pytest.raises(Exception, match="No such option"):
        check_options(f"lanerank {name} --no-such-option")


# docs/training.md

TRAINING = ROOT / "docs" / "training.md"
RECIPE = ROOT / "recipes" / "your-own"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the page's commands, with a third of the data and two steps of training."""
    text = (RECIPE / "scenarios.jsonl").read_text()
    (tmp_path / "scenarios.jsonl").write_text("".join(text.splitlines(keepends=True)[:8]))
    config = (RECIPE / "config.toml").read_text()
    for old, new in (("steps = 20", "steps = 2"), ("evaluate_every = 10", "evaluate_every = 2")):
        assert old in config
        config = config.replace(old, new)
    (tmp_path / "config.toml").write_text(config)
    [judge] = re.findall(
        r"^```python\n# (my_judges\.py)\n(.*?)^```", TRAINING.read_text(), re.M | re.S
    )
    (tmp_path / judge[0]).write_text(judge[1])
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_judges", None)


def test_the_commands_of_the_page_on_training_lead_from_data_to_a_model(shop: Path):
    for line in commands(TRAINING):
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:])
        assert result.exit_code == 0, (line, result.output, result.exception)
    assert (shop / "runs" / "bakery" / "model.safetensors").is_file()
    assert "Apache-2.0" in (shop / "runs" / "DATASHEET.md").read_text()
    assert (shop / "runs" / "judged.jsonl").is_file()


def test_the_page_shows_the_configuration_of_the_recipe():
    assert f"```toml\n{(RECIPE / 'config.toml').read_text()}```" in TRAINING.read_text()


def field_tables(model: type[BaseModel], heading: str = "") -> str:
    """Every field of a configuration with its default and its choices, in Markdown tables."""
    lines = [f"### `[{heading}]`\n" if heading else "", "| field | default | |", "|---|---|---|"]
    inner = []
    for name, field in model.model_fields.items():
        parts = list(leaves(field.annotation))
        tables = [each for each in parts if isinstance(each, type) and issubclass(each, BaseModel)]
        path = f"{heading}.{name}" if heading else name
        inner += [field_tables(each, path) for each in tables]
        default = f"`{toml(field.default)}`"
        if field.is_required():
            default = "required"
        elif field.default is None or field.default == "":
            default = "none"
        elif tables:
            default = "see below"
        said = " ".join((field.description or "").split())
        # A description that quotes a choice names all of them.
        choices = [f"`{toml(each)}`" for each in parts if isinstance(each, str)]
        if choices and choices[0] not in said:
            said = f"{said} One of {', '.join(choices)}.".strip()
        lines.append(f"| `{name}` | {default} | {said} |")
    return "\n".join([*lines, *(f"\n{table}" for table in inner)])


def leaves(annotation: object) -> Iterator[object]:
    """The types and literal values of which an annotation is made."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from leaves(part)


def toml(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else repr(value).replace("'", '"')


def fields_of_the_page() -> str:
    page = TRAINING.read_text()
    return page.partition("TrainingConfig -->\n")[2].partition("\n<!-- end of fields -->")[0]


def test_the_page_lists_every_field_with_its_default():
    assert fields_of_the_page() == field_tables(TrainingConfig).strip()
    for name in (*TrainingConfig.model_fields, *LossWeights.model_fields, *DataSource.model_fields):
        assert f"| `{name}` |" in fields_of_the_page()


def test_a_field_that_the_page_lacks_is_noticed():
    class Longer(TrainingConfig):
        momentum: float = 0.9

    added = set(field_tables(Longer).splitlines()) - set(fields_of_the_page().splitlines())
    assert added == {"| `momentum` | `0.9` |  |"}


def test_the_page_names_every_field_check_and_loss():
    page = TRAINING.read_text()
    row = Quadruple(query="a", instruction=None, document="b", score=1)
    names = [*Quadruple.model_fields, *(each.check for each in check([row], dev=[row]).findings)]
    for table in page.partition("## Losses")[2].partition("\n\n## ")[0].splitlines():
        if found := re.match(r"\| `(\w+)` \| `(\w+)` \|", table):
            assert found[1] in LossWeights.model_fields
            assert callable(getattr(losses, found[2]))
            names.append(found[1])
    assert set(LossWeights.model_fields) <= set(names)
    assert [name for name in names if f"`{name}`" not in page] == []
