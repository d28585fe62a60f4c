"""`lanerank data`: training data, made of what is there already, checked, split and described."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from lanerank.cli.console import JsonFlag, err, out, printable
from lanerank.cli.outputs import OverwriteFlag, new_files
from lanerank.errors import InputError

if TYPE_CHECKING:
    from lanerank.training import CheckReport, Quadruple

data_app = typer.Typer(
    help="Make, check, split and describe training data. Needs `lanerank[train]`.",
    no_args_is_help=True,
)

_STYLES = {"ok": "green", "hint": "cyan", "warning": "yellow", "error": "bold red"}
_MESSAGE_WIDTH = 400

_Quadruples = Annotated[
    list[Path], typer.Argument(metavar="FILE", help="Quadruples: JSONL, JSONL.gz or Parquet.")
]
_Output = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="The file to write: .jsonl, .jsonl.gz or .parquet."),
]
_Development = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="The development set, to compare with. Repeatable."),
]
_Source = Annotated[
    str, typer.Option(help="Goes into every row, and tells sources apart in a datasheet.")
]
_Scores = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        metavar="GRADE=SCORE",
        help="The score of a grade, from 0 to 1; give it for every grade, or for none.",
    ),
]


@data_app.command("check")
def check_data(
    *,
    files: _Quadruples,
    dev: _Development = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 for a warning too, not only for an error.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Look for what ruins instruction training, and say what to do about it.

    For instance: no document whose score changes with the instruction, instructions that repeat the
    document, length or position that give the score away, a development set that was trained on.
    Exits with 1 if there is an error, and with `--strict` also for a warning; hints never count.
    """
    from lanerank import training

    rows = training.read_quadruples(files)
    report = training.check(rows, dev=training.read_quadruples(dev) if dev else None)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
    else:
        _print_checks(report)
    if report.defeats_training or (strict and not report.passed):
        raise typer.Exit(1)


@data_app.command()
def from_scenarios(
    *,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE", help="Graded scenarios, as for `lanerank evaluate`."),
    ],
    output: _Output,
    score: _Scores = None,
    source: _Source = "scenarios",
    overwrite: OverwriteFlag = False,
) -> None:
    """Make quadruples of graded scenarios: every document under every lane is a row.

    Grades from 0 to 3 become scores evenly spaced from 0 to 1, unless `--score` says otherwise:
    `--score 0=0.02 --score 1=0.25 --score 2=0.75 --score 3=0.97`.
    """
    from lanerank import evaluation, training

    scores = _scores(score) or training.SCENARIO_SCORES
    with new_files({"OUT": output}, overwrite=overwrite, quadruples=True) as [part]:
        rows = training.quadruples_from_scenarios(
            evaluation.read_scenarios(files), scores=scores, source=source
        )
        _refuse_nothing(rows, files)
        training.write_quadruples(part, rows)
    _tell(output, rows)


@data_app.command()
def from_trec(
    *,
    output: _Output,
    topics: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="JSONL with `id`, `query` and `instruction`, lines `id<TAB>query`, or TREC's own "
            "format with `--instruction-field`.",
        ),
    ],
    qrels: Annotated[
        Path, typer.Option(metavar="FILE", help="Lines `query iteration document grade`.")
    ],
    documents: Annotated[
        Path,
        typer.Option(metavar="FILE", help="JSONL with `id` and `text`, and optionally `metadata`."),
    ],
    instruction_field: Annotated[
        Literal["narrative", "description"] | None,
        typer.Option(
            help="Topics are in TREC's format (`<top>`, `<num>`, ...), and this field is the "
            "instruction."
        ),
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", "-a", help="A metadata field the model may see. Repeatable."),
    ] = None,
    score: _Scores = None,
    source: _Source = "trec",
    overwrite: OverwriteFlag = False,
) -> None:
    """Make quadruples of a TREC collection: every judged document under its topic's narrative.

    A grade is divided by the highest one, and grades below 0 become 0, unless `--score` says
    otherwise. Topics with the same query and different narratives show what an instruction changes.
    """
    from lanerank import evaluation, training

    with new_files({"OUT": output}, overwrite=overwrite, quadruples=True) as [part]:
        rows = training.quadruples_from_trec(
            topics=evaluation.read_topics(topics)
            if instruction_field is None
            else training.read_trec_topics(topics, instruction=instruction_field),
            qrels=qrels,
            documents=documents,
            scores=_scores(score),
            attributes=tuple(attribute or ()),
            source=source,
        )
        training.write_quadruples(part, rows)
    _tell(output, rows)


@data_app.command()
def from_triples(
    *,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="Lines `query<TAB>document<TAB>score` (.tsv, .txt), or JSONL with these fields.",
        ),
    ],
    output: _Output,
    lowest: Annotated[float, typer.Option(help="The score in the file that becomes 0.")] = 0.0,
    highest: Annotated[float, typer.Option(help="The score in the file that becomes 1.")] = 1.0,
    source: _Source = "triples",
    overwrite: OverwriteFlag = False,
) -> None:
    """Make quadruples of scored pairs that know no instruction.

    They teach nothing about instructions, but what to do without one.
    """
    from lanerank import training

    with new_files({"OUT": output}, overwrite=overwrite, quadruples=True) as [part]:
        rows = training.quadruples_from_triples(file, lowest=lowest, highest=highest, source=source)
        _refuse_nothing(rows, [file])
        training.write_quadruples(part, rows)
    _tell(output, rows)


@data_app.command("split")
def split_data(
    *,
    files: _Quadruples,
    train: Annotated[Path, typer.Option(metavar="OUT", help="The rows to train on.")],
    dev: Annotated[Path, typer.Option(metavar="OUT", help="The rows to measure on.")],
    share: Annotated[float, typer.Option(help="The share of the rows in the second file.")] = 0.1,
    seed: Annotated[
        int | None, typer.Option(help="Draws the split; a fixed number by default.")
    ] = None,
    overwrite: OverwriteFlag = False,
) -> None:
    """Split rows so that no query and no document is on both sides.

    Rows that share a query or a document, directly or over other rows, stay together.
    """
    from lanerank import training
    from lanerank.evaluation.measures import SEED

    outputs = {"--train": train, "--dev": dev}
    with new_files(outputs, overwrite=overwrite, quadruples=True) as [train_file, dev_file]:
        rows = training.read_quadruples(files)
        try:
            parts = training.split(rows, dev=share, seed=SEED if seed is None else seed)
        except InputError as error:
            error.add_note("`dev` is `--share` on the command line")
            raise
        training.write_quadruples(train_file, parts.train)
        training.write_quadruples(dev_file, parts.dev)
    _tell(train, parts.train)
    _tell(dev, parts.dev)


@data_app.command("datasheet")
def write_datasheet(
    *,
    files: _Quadruples,
    output: Annotated[Path, typer.Argument(metavar="OUT.md", help="The Markdown file to write.")],
    dev: _Development = None,
    licence: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE=LICENCE", help="The licence of the rows of a source. Repeatable."
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="The heading; by default the name of the file.")
    ] = None,
    overwrite: OverwriteFlag = False,
) -> None:
    """Describe data in Markdown: counts, sources, licences, kinds, scores, lengths, checks.

    What cannot be read off the rows, such as who judged them, is left for you to add at the end.
    """
    from lanerank import training

    licences = dict(_assigned("--licence", each) for each in licence or ())
    with new_files({"OUT.md": output}, overwrite=overwrite) as [part]:
        page = training.datasheet(
            training.read_quadruples(files),
            title=output.stem if title is None else title,
            licences=licences,
            dev=training.read_quadruples(dev) if dev else None,
        )
        part.write_text(page, encoding="utf-8")
    err.print(f"Described in {printable(str(output), 200)}", highlight=False, soft_wrap=True)


def _scores(given: Sequence[str] | None) -> Mapping[int, float] | None:
    scores: dict[int, float] = {}
    for each in given or ():
        grade, score = _assigned("--score", each)
        try:
            scores[int(grade)] = float(score)
        except ValueError:
            raise InputError(
                f"`--score` must be a grade and a number, such as 3=0.97, got {each!r}"
            ) from None
    return scores or None


def _refuse_nothing(rows: Sequence[Quadruple], files: Sequence[Path]) -> None:
    if not rows:
        names = ", ".join(repr(str(file)) for file in files)
        raise InputError(f"`FILE` {names}: nothing to make rows of; give files with content")


def _assigned(option: str, text: str) -> tuple[str, str]:
    # From the right: a source may hold the sign, a licence or a number does not.
    name, sign, value = text.rpartition("=")
    if not sign or not name.strip() or not value.strip():
        raise InputError(f"`{option}` must be NAME=VALUE, got {text!r}")
    return name.strip(), value.strip()


def _tell(path: Path, rows: Sequence[Quadruple]) -> None:
    queries = len({row.query_key for row in rows})
    err.print(
        f"{len(rows):,} rows of {queries:,} queries in {printable(str(path), 200)}",
        highlight=False,
        soft_wrap=True,
    )


def _print_checks(report: CheckReport) -> None:
    table = Table(title=f"{report.rows:,} rows of {report.queries:,} queries", title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what it is")
    for found in report.findings:
        value = "" if found.value is None else f"{found.value:.3g}"
        style = _STYLES[found.severity]
        severity = f"[{style}]{found.severity}[/{style}]"
        table.add_row(found.check, severity, value, printable(found.message, _MESSAGE_WIDTH))
    out.print(table)
    for found in report.problems:
        out.print(
            f"\n[{_STYLES[found.severity]}]{found.severity}[/] [bold]{found.check}[/bold]: "
            f"{printable(found.remedy, _MESSAGE_WIDTH)}.",
            highlight=False,
        )
        for example in found.examples:
            out.print(f"  {printable(example, _MESSAGE_WIDTH)}", style="dim", highlight=False)
    if not report.problems:
        out.print("Nothing found.", style="green")
