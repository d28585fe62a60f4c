"""`rank_dataset`: plan a run or continue one, and check that every row is accounted for."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import date
from functools import partial
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from lanerank.context import Source as InstructionSource
from lanerank.context import current_instruction, resolve_instruction
from lanerank.contracts import LongDocuments
from lanerank.distributed.cluster import Concurrency, rank_shards
from lanerank.distributed.plan import (
    DtypeName,
    Manifest,
    Settings,
    Source,
    check_path,
    differences,
    digest,
    find_source,
    reached,
    reaches,
)
from lanerank.distributed.rows import Columns, Form
from lanerank.distributed.store import BAD_ROWS, ShardRecord, Store
from lanerank.distributed.worker import Job, OnBadRow
from lanerank.errors import BulkError, InputError
from lanerank.instruction import Instruction, InstructionLike
from lanerank.reranker import OnUnsupported, Progress, Reranker

_DEFAULT_MODEL = "lanerank-mini"
_ROWS_PER_SHARD = {"pairs": 10_000, "lists": 200}
_BATCH_SIZE = {"pairs": 1024, "lists": 32}


class BulkReport(BaseModel):
    """What a run has done. `rows` is always `ranked_rows + bad_rows`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """The name that the model gives itself."""
    rows: int
    """Rows of the input."""
    ranked_rows: int
    """Rows of the output."""
    bad_rows: int
    """Rows that are in the side files instead."""
    documents: int
    """Documents scored, in all rows."""
    truncated: int
    """Documents of the output that the model did not read whole."""
    shards: int
    """Pieces that the input was cut into."""
    resumed_shards: int
    """How many of these an earlier call had done."""
    seconds: float
    """How long this call took."""


def rank_dataset(
    source: str | Path,
    destination: str | Path,
    *,
    model: str | Path | Callable[[], Reranker] | None = None,
    revision: str | None = None,
    form: Form = "lists",
    query_column: str = "query",
    documents_column: str | None = None,
    instruction_column: str | None = None,
    instruction: InstructionLike = None,
    attributes: Sequence[str] = (),
    top_k: int | None = None,
    id_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
    prefix: str = "",
    concurrency: Concurrency = None,
    batch_size: int | None = None,
    rows_per_shard: int | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    device: str = "auto",
    dtype: DtypeName = "auto",
    long_documents: LongDocuments = "truncate",
    on_unsupported: OnUnsupported = "raise",
    on_bad_row: OnBadRow = "side_file",
    resume: bool = True,
    progress: Progress | None = None,
) -> BulkReport:
    """Rank every row of a data set, on this machine or on a Ray cluster.

    The input is cut into shards, ranges of rows that are ranked, retried and resumed as a whole. A
    worker reads its shard, writes it to a file of its own and records it, so no row passes through
    the driver, and memory is bounded by a batch. A run that was interrupted goes on when it is
    called again in the same way; no row is lost or ranked twice into the output.

    Args:
        source: A Parquet or JSONL file, a folder of them, or a pattern such as `"in/*.parquet"`.
        destination: A folder for `part-*` files in the format of the input, with the new columns
            beside the old. Bad rows are in `_bad_rows`, with file, row and reason.
        model: As for `Reranker.from_pretrained`; the address of a server of lanerank's own; or a
            function without arguments (`functools.partial` gives it some) that makes the
            `Reranker`, called once in each worker. By default the model in the package.
        revision: Branch, tag or commit on the hub. Give a commit: a branch may move during a run.
        form: `"lists"`, a row is a query and its list of documents, which are texts or structs
            with a `text` and optionally an `id` and `metadata`; or `"pairs"`, a row is a query and
            one document. Pairs of one query are fastest if they follow each other.
        query_column: The query.
        documents_column: The documents; by default `"documents"`, for pairs `"document"`.
        instruction_column: What relevance means in that row, or null. The column is trusted.
        instruction: What relevance means in all rows; that of the row comes below it. Without
            one, that of an enclosing `use_instruction(...)` applies.
        attributes: The metadata fields that the model may see; for pairs, columns.
        top_k: Keep this many documents of a list; all by default.
        id_column: Names rows in the side files.
        keep_columns: The old columns to copy; all by default.
        prefix: Stands before the names of the new columns: `ranking` (a list of `index`, `id`,
            `score` and `truncated`, best first) or, for pairs, `score` and `truncated`; then
            `model`, `instruction_fingerprint` and `instruction_applied`.
        concurrency: How many workers; two numbers are the least and the most of a pool that grows.
            By default what the cluster has room for. 0 ranks in this process, without Ray.
        batch_size: How many rows are read and scored together: 1,024 pairs or 32 lists by default.
        rows_per_shard: 10,000 pairs or 200 lists by default: a few minutes on a CPU.
        num_cpus: CPUs for each worker, and its number of threads.
        num_gpus: GPUs for each worker; may be a fraction.
        device: As for `from_pretrained`; `"auto"` is the GPU that the worker was given, if any.
        dtype: As for `from_pretrained`. `"auto"` depends on the machine: choose one if the workers
            differ.
        long_documents: See `Reranker`.
        on_unsupported: See `Reranker`.
        on_bad_row: `"side_file"`, or `"raise"` to end the run at the first one.
        resume: Say `False` to delete what an earlier run left in `destination`, and start afresh.
        progress: Called with the number of rows that are done, and of all rows.

    Returns:
        The counts, which were checked against the files.

    Raises:
        InputError: An argument is not usable; the message names it.
        BulkError: The folder holds a run with other settings or one that is under way, or a worker
            failed. What is done is kept.
        MissingExtraError: Ray is not installed.
        LanerankError: What the model raised, if it was not about one row.
    """
    started = time.monotonic()
    if on_bad_row not in get_args(OnBadRow):
        raise InputError(f"`on_bad_row` must be one of {get_args(OnBadRow)}, got {on_bad_row!r}")
    if form == "pairs" and top_k is not None:
        raise InputError(f"`top_k` is for lists, got {top_k!r} with `form='pairs'`; leave it out")
    if progress is not None and not callable(progress):
        raise InputError(f"`progress` must be a function of two numbers, got {progress!r}")
    _check_workers(concurrency, num_cpus, num_gpus, device)
    given = {
        "revision": revision is not None,
        "device": device != "auto",
        "dtype": dtype != "auto",
        "long_documents": long_documents != "truncate",
        "on_unsupported": on_unsupported != "raise",
    }
    _check_model_options(model, [name for name, chosen in given.items() if chosen])
    found = find_source(source)
    store = Store(_folder(destination, source, found))
    name, content, loaded = _identify(model)
    whole = _instruction(instruction)
    try:
        settings = Settings(
            model=name,
            model_digest=content,
            revision=revision,
            device=device,
            dtype=dtype,
            instruction=whole.render(),
            columns=Columns(
                form=form,
                query_column=query_column,
                documents_column=documents_column
                or ("document" if form == "pairs" else "documents"),
                instruction_column=instruction_column,
                id_column=id_column,
                attributes=_names("attributes", attributes),
                keep_columns=None if keep_columns is None else _names("keep_columns", keep_columns),
                prefix=prefix,
            ),
            top_k=None if top_k is None else _at_least_1("top_k", top_k, 1),
            long_documents=long_documents,
            on_unsupported=on_unsupported,
            rows_per_shard=_at_least_1("rows_per_shard", rows_per_shard, _ROWS_PER_SHARD[form]),
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InputError(
            f"`{problem['loc'][-1]}`: {problem['msg']}, got {problem['input']!r}"
        ) from error
    _check_text(settings)
    batch = _at_least_1("batch_size", batch_size, _BATCH_SIZE[form])
    with store.lock():
        manifest = _open_run(store, settings, found, resume=resume)
        job = Job(
            source=found.base,
            destination=store.folder,
            run=manifest.fingerprint,
            settings=settings,
            files=manifest.files,
            model=loaded,
            instruction=whole,
            batch_size=batch,
            on_bad_row=on_bad_row,
        )
        records = [store.record(number, job.run) for number in range(len(manifest.shards))]
        todo = {n: manifest.shards[n] for n, record in enumerate(records) if record is None}
        done = manifest.rows - sum(shard.rows for shard in todo.values())
        ranked = rank_shards(
            job, todo, concurrency=concurrency, num_cpus=num_cpus, num_gpus=num_gpus
        )
        with closing(ranked):
            for record in ranked:
                done += record.rows
                if progress is not None:
                    progress(done, manifest.rows)
        resumed = len(records) - len(todo)
        return _report(store, manifest, resumed, time.monotonic() - started)


def _open_run(store: Store, settings: Settings, found: Source, *, resume: bool) -> Manifest:
    """The run that the folder holds, or a new one."""
    manifest = store.manifest()
    if manifest is not None and resume:
        if changes := differences(manifest, settings, found.files):
            shown = "; ".join([*changes[:5], *(["..."] if len(changes) > 5 else [])])
            raise BulkError(
                f"{str(store.folder)!r} holds a run that differs: {shown}. Call it as before to go "
                "on, start afresh with `resume=False` (`--restart`), or choose another folder"
            )
    else:
        # Before anything is deleted, since the columns may be wrong.
        shards = found.shards(settings.columns, settings.rows_per_shard)
        if manifest is not None:
            store.clear()
        manifest = Manifest(settings=settings, files=found.files, shards=shards)
    store.begin(manifest)
    return manifest


def _report(store: Store, manifest: Manifest, resumed: int, seconds: float) -> BulkReport:
    """Count again, from what lies in the folder."""
    records: list[ShardRecord] = []
    for number, shard in enumerate(manifest.shards):
        record = store.record(number, manifest.fingerprint)
        if record is None or record.rows != shard.rows:
            raise BulkError(
                f"shard {number} is not in {str(store.folder)!r} as it was written; run again"
            )
        records.append(record)
    ranked = sum(record.ranked_rows for record in records)
    bad = sum(record.bad_rows for record in records)
    if ranked + bad != manifest.rows:
        raise BulkError(
            f"{manifest.rows} rows went in, {ranked} came out and {bad} are bad: "
            f"{manifest.rows - ranked - bad} are not accounted for; start afresh"
        )
    if strange := store.parts() - {name for record in records for name in record.files}:
        raise BulkError(
            f"{str(store.folder)!r} holds {sorted(strange)[0]!r}, which this run did not write; "
            "delete it"
        )
    models = {record.model for record in records}
    if len(models) > 1:
        raise BulkError(
            f"the shards were ranked by several models, {', '.join(sorted(models))}: `model` did "
            "not make the same one each time; start afresh"
        )
    return BulkReport(
        model=models.pop(),
        rows=manifest.rows,
        ranked_rows=ranked,
        bad_rows=bad,
        documents=sum(record.documents for record in records),
        truncated=sum(record.truncated for record in records),
        shards=len(records),
        resumed_shards=resumed,
        seconds=seconds,
    )


def _folder(destination: str | Path, source: str | Path, found: Source) -> Path:
    path = check_path("destination", destination)
    with reached("destination", path):
        folder = path.resolve()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"`destination` {str(destination)!r} is a file; pass a folder")
    inputs = [found.base / file.name for file in found.files]
    within = Path(source).is_dir() and folder.is_relative_to(found.base)
    outputs = [folder / f"part-000000{inputs[0].suffix}", folder / BAD_ROWS / "part-000000.jsonl"]
    again = any(reaches(source, path) for path in outputs)
    if within or again or any(path.is_relative_to(folder) for path in inputs):
        raise InputError(
            f"`destination` {str(destination)!r} and `source` {str(source)!r} overlap: the output "
            "would be input the next time; choose a folder beside it"
        )
    return folder


def _instruction(instruction: InstructionLike) -> Instruction:
    whole = resolve_instruction(
        [
            (InstructionSource.ARGUMENT, Instruction.coerce(instruction)),
            (InstructionSource.USE_INSTRUCTION, current_instruction()),
        ]
    ).instruction
    if whole.effective_today(date.min) != whole.effective_today(date.max):
        raise InputError(
            "`instruction` has a recency part and no `today`, so that a run past midnight would "
            "follow two of them; say from which day ages count: `Instruction(..., today=...)`"
        )
    return whole


def _check_workers(concurrency: Concurrency, num_cpus: float, num_gpus: float, device: str) -> None:
    """Raise an `InputError` where the numbers of processors make no sense."""
    for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise InputError(f"`{name}` must be a number of at least 0, got {value!r}")
    if concurrency == 0 and (num_cpus, num_gpus) != (1, 0):
        raise InputError(
            f"`num_cpus` {num_cpus!r} and `num_gpus` {num_gpus!r} are for workers, and "
            "`concurrency=0` has none; leave them out"
        )
    if concurrency != 0 and device.startswith("cuda") and not num_gpus:
        raise InputError(f"`device={device!r}` needs `num_gpus`; workers see no GPU without")


def _check_model_options(model: object, given: Sequence[str]) -> None:
    """Raise an `InputError` where an option would have no effect on such a model."""
    if callable(model) and given:
        raise InputError(f"`{given[0]}` has no effect on a function as `model`; set it in there")
    lost = [name for name in given if name != "on_unsupported"]
    if isinstance(model, str) and "://" in model and lost:
        raise InputError(f"`{lost[0]}` has no effect on a server as `model`; set it there")


def _identify(
    model: str | Path | Callable[[], Reranker] | None,
) -> tuple[str, str | None, str | Callable[[], Reranker] | None]:
    """How the manifest calls a model, what tells its folder from others, and what to load."""
    if model is None or model == _DEFAULT_MODEL:
        return _DEFAULT_MODEL, None, None
    if isinstance(model, str | Path):
        if not str(model).strip():
            raise InputError(f"`model` is {model!r}; name one, or leave it out for lanerank-mini")
        with reached("model", model):
            if Path(model).is_dir():
                # Workers have other working directories.
                folder = Path(model).resolve()
                return folder.name, digest(folder), str(folder)
        return str(model), None, str(model)
    if isinstance(model, Reranker) or not callable(model):
        raise InputError(
            f"`model` must be a name, a folder, an address or a function that makes a `Reranker`, "
            f"got {model!r}; every worker loads its own"
        )
    function, given = model, None
    if isinstance(model, partial):
        # Hashed, since there may be a key among them.
        function, given = model.func, repr((model.args, sorted(model.keywords.items())))
    if not hasattr(function, "__qualname__") or " at 0x" in (given or ""):
        raise InputError(
            "`model` must be a function, or a `functools.partial` of one with arguments such as "
            "texts and numbers, so that another process can tell that it is the same and go on; "
            f"got {function!r}"
        )
    name = f"{function.__module__}.{function.__qualname__}"
    return name, given and hashlib.sha256(given.encode()).hexdigest()[:16], model


def _check_text(settings: Settings) -> None:
    """Raise an `InputError` where a text is none that a file can hold."""
    values = settings.model_dump()
    values |= values.pop("columns")
    for name, value in values.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"`{name}` holds half of a character, which no file can, got {value!r}; leave it "
                "out"
            ) from None


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"`{argument}` must be a list of names, got {names!r}")
    return tuple(names)


def _at_least_1(argument: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"`{argument}` must be an int of at least 1, got {value!r}")
    if value > sys.maxsize:
        # Not shown: it may have more digits than Python writes.
        raise InputError(
            f"`{argument}` must be an int from 1 to {sys.maxsize}, got a larger one; leave it out "
            "for the default"
        )
    return value
