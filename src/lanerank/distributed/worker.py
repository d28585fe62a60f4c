"""Ranking one shard: read it, rank it batch by batch, write its output, record that it is done."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from lanerank import errors
from lanerank.distributed.jsonl import json_line
from lanerank.distributed.plan import InputFile, Settings, describe, format_of
from lanerank.distributed.ranking import RankedRow, RowRanker
from lanerank.distributed.rows import Row, Shard
from lanerank.distributed.store import BAD_ROWS, ShardRecord, Store, whole_file
from lanerank.errors import BulkError, InputError, LanerankError
from lanerank.instruction import Instruction
from lanerank.reranker import Reranker

OnBadRow = Literal["side_file", "raise"]
_ATTEMPTS = 4
"""How often a shard may be begun. Ray restarts a worker that dies, and would do so for ever."""


class Failure(BaseModel):
    """Why a shard could not be ranked, in a form that crosses from one process to another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    error: str
    """The name of one of lanerank's exceptions."""
    message: str
    traceback: str = ""
    """Where it happened, if nobody foresaw it."""

    @classmethod
    def of(cls, error: LanerankError) -> Failure:
        """An error as lanerank knows it; a class derived elsewhere is named in the message."""
        kind = type(error)
        known = next(each for each in kind.__mro__ if vars(errors).get(each.__name__) is each)
        name = "" if kind is known else f"{kind.__name__}: "
        return cls(error=known.__name__, message=f"{name}{error}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a worker has to know of the run."""

    source: Path
    """The folder that the files' names are relative to."""
    destination: Path
    run: str
    """`Manifest.fingerprint` of the run."""
    settings: Settings
    files: tuple[InputFile, ...]
    model: str | Callable[[], Reranker] | None
    instruction: Instruction
    batch_size: int
    on_bad_row: OnBadRow


class ShardRanker:
    """Ranks shards one after the other, with a model that it loads once."""

    def __init__(self, job: Job) -> None:
        """Load nothing yet, so that a model that cannot be loaded is a `Failure` like any other."""
        self._job = job
        self._store = Store(job.destination)

    def __call__(self, number: int, shard: Shard) -> ShardRecord | Failure:
        """Rank a shard, unless an earlier attempt has done it."""
        try:
            return self._store.record(number, self._job.run) or self._rank(number, shard)
        except LanerankError as error:
            return Failure.of(error)

    def close(self) -> None:
        """Let go of what ranking holds open."""
        if "_ranker" in self.__dict__:
            self._ranker.close()

    @cached_property
    def _ranker(self) -> RowRanker:
        settings = self._job.settings
        return RowRanker(
            self._load(),
            settings.columns,
            top_k=settings.top_k,
            instruction=self._job.instruction,
        )

    def _load(self) -> Reranker:
        model, settings = self._job.model, self._job.settings
        if callable(model):
            made = model()
            if not isinstance(made, Reranker):
                raise InputError(f"`model` must make a `Reranker`, {settings.model} gave {made!r}")
            return made
        if model is not None and "://" in model:
            return Reranker.from_url(
                model, service="lanerank", on_unsupported=settings.on_unsupported
            )
        return Reranker.from_pretrained(
            model,
            revision=settings.revision,
            device=settings.device,
            dtype=settings.dtype,
            long_documents=settings.long_documents,
            on_unsupported=settings.on_unsupported,
        )

    def _rank(self, number: int, shard: Shard) -> ShardRecord:
        job, file, columns = self._job, self._job.files[shard.file], self._job.settings.columns
        path = job.source / file.name
        if self._store.attempt(number) > _ATTEMPTS:
            last = shard.first + shard.rows - 1
            raise BulkError(
                f"rows {shard.first} to {last} of {str(path)!r} ended their worker's process "
                f"{_ATTEMPTS} times, as too little memory would; try a smaller `batch_size`"
            )
        if describe(path, file.name) != file:
            raise BulkError(f"{str(path)!r} has changed since the run began; start afresh")
        format_ = format_of(path)
        output = f"part-{number:06d}{path.suffix}"
        ranked = documents = truncated = 0
        bad: list[bytes] = []
        with whole_file(job.destination / output) as out:
            # Closed also after an error, while there is a file to close it on.
            with closing(format_.writer(out, path, columns)) as writer:
                for batch in format_.read(path, shard, columns, job.batch_size):
                    results = self._ranker(batch.rows)
                    writer.write(
                        batch, [r.added if isinstance(r, RankedRow) else None for r in results]
                    )
                    for row, result in zip(batch.rows, results, strict=True):
                        if isinstance(result, RankedRow):
                            ranked += 1
                            documents += result.documents
                            truncated += result.truncated
                        else:
                            bad.append(self._bad_row(file.name, row, result))
            if ranked + len(bad) != shard.rows:
                raise BulkError(
                    f"{str(path)!r} has {ranked + len(bad)} rows from row {shard.first} on where "
                    f"{shard.rows} were expected; it has changed since the run began, start afresh"
                )
            if not self._store.holds(job.run):
                raise BulkError(f"another run has taken {str(job.destination)!r}; this one ends")
        names = [output]
        side = f"{BAD_ROWS}/part-{number:06d}.jsonl"
        if bad:
            names.append(side)
            with whole_file(job.destination / side) as out:
                out.writelines(bad)
        else:
            # An earlier attempt may have found rows bad that are ranked now.
            (job.destination / side).unlink(missing_ok=True)
        record = ShardRecord(
            shard=number,
            run=job.run,
            model=self._ranker.model,
            rows=shard.rows,
            ranked_rows=ranked,
            bad_rows=len(bad),
            documents=documents,
            truncated=truncated,
            files={name: (job.destination / name).stat().st_size for name in names},
        )
        self._store.finish(record)
        return record

    def _bad_row(self, file: str, row: Row, reason: str) -> bytes:
        if self._job.on_bad_row == "raise":
            raise BulkError(
                f"row {row.number} of {file!r}: {reason}; correct it, or choose "
                "`on_bad_row='side_file'`"
            )
        known: dict[str, object] = {"file": file, "row": row.number}
        if self._job.settings.columns.id_column is not None:
            known["id"] = row.id if isinstance(row.id, str | int | None) else str(row.id)
        return json_line({**known, "reason": reason})
