"""`lanerank rank-dataset`: rank whole files, on this machine or on a Ray cluster."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from lanerank.cli.console import (
    DeviceOption,
    JsonFlag,
    UnsupportedOption,
    err,
    out,
    progress_bar,
)
from lanerank.contracts import LongDocuments
from lanerank.errors import InputError
from lanerank.instruction import Instruction


def rank_dataset(
    *,
    source: Annotated[
        str, typer.Argument(help="A Parquet or JSONL file, a folder of them, or a quoted pattern.")
    ],
    destination: Annotated[Path, typer.Argument(help="A folder for the output.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder, a Hugging Face id, or the address of a `lanerank serve`; by default "
            "the model in the package."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or, best, commit on the hub.")
    ] = None,
    form: Annotated[
        Literal["lists", "pairs"],
        typer.Option(help="What a row is: a query and its documents, or a query and one document."),
    ] = "lists",
    query_column: Annotated[str, typer.Option(help="The query.")] = "query",
    documents_column: Annotated[
        str | None,
        typer.Option(help="The documents; by default `documents`, for pairs `document`."),
    ] = None,
    instruction_column: Annotated[
        str | None, typer.Option(help="What relevance means in that row, or null.")
    ] = None,
    instruction: Annotated[
        str | None, typer.Option("--instruction", "-i", help="What relevance means in all rows.")
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            "--attribute", "-a", help="A metadata field, or column of pairs, the model may see."
        ),
    ] = None,
    today: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="The date from which the ages of dates count."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", "-k", help="Keep this many documents of a list.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Names bad rows besides their number.")
    ] = None,
    keep_column: Annotated[
        list[str] | None, typer.Option(help="A column to copy; all by default. Repeatable.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Stands before the names of new columns.")] = "",
    concurrency: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN-MAX",
            help="Workers; by default what the cluster has room for. 0: here, without Ray.",
        ),
    ] = None,
    num_cpus: Annotated[float, typer.Option(help="CPUs for each worker.")] = 1,
    num_gpus: Annotated[float, typer.Option(help="GPUs for each worker.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows scored together; 1024 pairs or 32 lists by default.")
    ] = None,
    rows_per_shard: Annotated[
        int | None,
        typer.Option(help="Rows in a unit of work; 10000 pairs or 200 lists by default."),
    ] = None,
    device: DeviceOption = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Precision.")
    ] = "auto",
    long_documents: Annotated[
        LongDocuments, typer.Option(help="Cut long documents, or score windows of them.")
    ] = "truncate",
    on_unsupported: UnsupportedOption = "raise",
    on_bad_row: Annotated[
        Literal["side_file", "raise"],
        typer.Option(help="What to do with a row that is not usable."),
    ] = "side_file",
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what an earlier run left, and start afresh.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Rank every row of a data set; a run that was interrupted goes on when called again.

    Needs the extra `lanerank[ray]`. A cluster is named by the environment variable `RAY_ADDRESS`;
    without one, Ray starts on this machine.
    """
    # Here, because ranking must work without the extra.
    from lanerank import distributed

    try:
        with progress_bar("Ranking rows", 1, at_least=1) as progress:
            report = distributed.rank_dataset(
                source,
                destination,
                model=model,
                revision=revision,
                form=form,
                query_column=query_column,
                documents_column=documents_column,
                instruction_column=instruction_column,
                instruction=Instruction(instruction, today=today.date() if today else None),
                attributes=tuple(attribute or ()),
                top_k=top_k,
                id_column=id_column,
                keep_columns=keep_column,
                prefix=prefix,
                concurrency=_workers(concurrency),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                batch_size=batch_size,
                rows_per_shard=rows_per_shard,
                device=device,
                dtype=dtype,
                long_documents=long_documents,
                on_unsupported=on_unsupported,
                on_bad_row=on_bad_row,
                resume=not restart,
                progress=progress,
            )
    except KeyboardInterrupt:
        err.print("Interrupted; the same command goes on from here.")
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    earlier = f" ({report.resumed_shards} earlier)" if report.resumed_shards else ""
    out.print(
        f"{report.model}: {report.ranked_rows:,} of {report.rows:,} rows ranked, "
        f"{report.documents:,} documents, {report.shards:,} shards{earlier}, "
        f"{report.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    if report.truncated:
        err.print(f"Documents longer than the model reads: {report.truncated:,}")
    if report.bad_rows:
        where = escape(str(destination / "_bad_rows"))
        err.print(f"[yellow]Bad rows: {report.bad_rows:,}[/yellow], in {where}", soft_wrap=True)


def _workers(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    try:
        least, dash, most = text.partition("-")
        return (int(least), int(most)) if dash else int(least)
    except ValueError:
        raise InputError(
            f"`--concurrency` {text!r} is neither a number nor two of them, such as 2-8"
        ) from None
