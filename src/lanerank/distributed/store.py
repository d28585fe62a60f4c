"""The destination folder: what lies in it, files that appear whole or not at all, the lock.

    part-000000.parquet          output, one file for each shard
    _bad_rows/part-000000.jsonl  the shard's rows that could not be ranked, with the reason
    _shards/000000.json          the record that the shard is done, written last
    _manifest.json               settings, input files and shards of the run
    _lock, _running.json         held and written while a run is under way

Names that begin with a line are passed over by the usual readers of whole folders.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from lanerank.distributed.plan import Manifest, reached
from lanerank.errors import BulkError

BAD_ROWS = "_bad_rows"
_MANIFEST = "_manifest.json"
_RECORDS = "_shards"
_LOCK = "_lock"
_RUNNING = "_running.json"
_PARTS = ("part-*.parquet", "part-*.jsonl", f"{BAD_ROWS}/part-*.jsonl")
_DRAFT = "[0-9a-f]" * 32 + ".tmp"
_LEFTOVERS = (
    *(f".{name}.{_DRAFT}" for name in (_MANIFEST, _RUNNING, "part-*")),
    *(f"{folder}/.*.{_DRAFT}" for folder in (BAD_ROWS, _RECORDS)),
    f"{_RECORDS}/*.attempts",
)
"""What processes leave that are killed, and nothing that might be somebody else's."""


class ShardRecord(BaseModel):
    """What became of a shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: int
    run: str
    """`Manifest.fingerprint` of the run."""
    model: str
    """The name that the model gives itself."""
    rows: int
    ranked_rows: int
    bad_rows: int
    documents: int
    """How many documents were scored."""
    truncated: int
    """How many documents of the output were not read whole."""
    files: dict[str, int]
    """The files written, relative to the destination, with their sizes in bytes."""


class Store:
    """The destination folder of a run.

    Args:
        folder: Where it is; made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        """Look at nothing yet."""
        self.folder = folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out, on all machines that share the folder.

        The operating system holds the lock and lets go of it when the process ends, however it
        ends; so there is no lock to be found that nobody holds.

        Raises:
            BulkError: Another run holds it, or the folder holds something else.
            InputError: The folder cannot be made, or not be written to.
        """
        with reached("destination", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Before anything is written or deleted: a folder that is refused stays as it is.
            self.manifest()
        running = self.folder / _RUNNING
        lock = FileLock(self.folder / _LOCK, timeout=0)
        with reached("destination", self.folder):
            self._acquire(lock, running)
        try:
            who = {"host": socket.gethostname(), "pid": os.getpid()}
            with reached("destination", self.folder), whole_file(running) as file:
                file.write(json.dumps(who).encode())
            try:
                for path in self._matching(_LEFTOVERS):
                    path.unlink(missing_ok=True)
                yield
            finally:
                running.unlink(missing_ok=True)
        finally:
            lock.release()

    def _acquire(self, lock: FileLock, running: Path) -> None:
        try:
            lock.acquire()
        except Timeout:
            who = json.loads(running.read_bytes()) if running.is_file() else {}
            raise BulkError(
                f"another run writes to {str(self.folder)!r} (process {who.get('pid', '?')} on "
                f"{who.get('host', '?')}); wait for it, or choose another folder"
            ) from None

    def manifest(self) -> Manifest | None:
        """The manifest of the run that the folder holds, `None` if it is empty.

        Raises:
            BulkError: The folder holds something else, or a manifest that cannot be read.
        """
        path = self.folder / _MANIFEST
        if path.is_file():
            try:
                return Manifest.model_validate_json(path.read_bytes())
            except ValidationError as error:
                raise BulkError(
                    f"{str(path)!r} is not a manifest that this version of lanerank reads "
                    f"({error.error_count()} problems); choose another folder, or delete this one"
                ) from error
        ours = {self.folder / _LOCK, self.folder / _RUNNING, *self._matching(_LEFTOVERS)}
        if others := set(self.folder.iterdir()) - ours:
            raise BulkError(
                f"`destination` {str(self.folder)!r} holds {min(others).name!r} and no manifest "
                "of a run; choose a new or an empty folder"
            )
        return None

    def begin(self, manifest: Manifest) -> None:
        """Write the manifest into the folder, and make the folders that workers write to."""
        # In this order, and also where a run goes on: it may have ended between the two.
        with whole_file(self.folder / _MANIFEST) as file:
            file.write(manifest.model_dump_json(indent=1).encode())
        for name in (BAD_ROWS, _RECORDS):
            (self.folder / name).mkdir(exist_ok=True)

    def clear(self) -> None:
        """Delete what a run has written, and nothing else; the manifest last."""
        for name in (BAD_ROWS, _RECORDS):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in self.parts():
            (self.folder / name).unlink()
        (self.folder / _MANIFEST).unlink(missing_ok=True)

    def holds(self, run: str) -> bool:
        """Whether the folder is still that run's: a worker may outlive the run that it was for."""
        manifest = self.manifest()
        return manifest is not None and manifest.fingerprint == run

    def record(self, shard: int, run: str) -> ShardRecord | None:
        """The record of a shard that is done; `None` if it is not, or its files are not there."""
        try:
            content = (self.folder / _RECORDS / f"{shard:06d}.json").read_bytes()
            record = ShardRecord.model_validate_json(content)
            sizes = {name: (self.folder / name).stat().st_size for name in record.files}
        except (FileNotFoundError, ValidationError):
            return None
        return record if record.run == run and sizes == record.files else None

    def attempt(self, shard: int) -> int:
        """Count that a shard is begun, and say how often it was in this run."""
        path = self._attempts(shard)
        with path.open("ab") as file:
            file.write(b".")
        return path.stat().st_size

    def finish(self, record: ShardRecord) -> None:
        """Record that a shard is done."""
        with whole_file(self.folder / _RECORDS / f"{record.shard:06d}.json") as file:
            file.write(record.model_dump_json().encode())
        self._attempts(record.shard).unlink(missing_ok=True)

    def _attempts(self, shard: int) -> Path:
        return self.folder / _RECORDS / f"{shard:06d}.attempts"

    def parts(self) -> set[str]:
        """The names of the output files and the side files, relative to the folder."""
        return {path.relative_to(self.folder).as_posix() for path in self._matching(_PARTS)}

    def _matching(self, patterns: Sequence[str]) -> list[Path]:
        return [path for pattern in patterns for path in self.folder.glob(pattern)]


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name, whole and on the disk, when the block ends without an error."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
