"""What a run has to do: its settings, its input files, and the shards they are cut into.

A shard is a range of rows of one file. It is the unit of work, of retry and of resumption, so the
same input and settings always give the same shards, and a shard always gives the same output.
"""

from __future__ import annotations

import glob
import hashlib
import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lanerank.contracts import LongDocuments
from lanerank.display import one_line
from lanerank.distributed.jsonl import JsonlFormat
from lanerank.distributed.parquet import ParquetFormat
from lanerank.distributed.rows import Columns, Format, Shard
from lanerank.errors import InputError, LanerankError
from lanerank.reranker import OnUnsupported

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
"""As in `lanerank.checkpoint`, which loads torch."""
_FORMATS: tuple[Format, ...] = (ParquetFormat(), JsonlFormat())
_SAMPLES, _SAMPLE = 32, 1 << 16
"""How many places of each of a model's files are looked at, to tell two models apart, and how many
bytes at each."""


class Settings(BaseModel):
    """All that decides what the output is. A run is continued only under the same settings.

    How many rows are scored together and by whom is absent: it moves scores by rounding alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lanerank: str = version("lanerank")
    """The library's version."""
    model: str
    """The name, the folder's name, the address, or where the function is that makes it."""
    model_digest: str | None = None
    """Tells the contents of a folder, or the arguments of a `partial`, from others."""
    revision: str | None = None
    device: str = "auto"
    dtype: DtypeName = "auto"
    instruction: str = ""
    """The instruction for all rows, rendered."""
    columns: Columns
    top_k: int | None = Field(default=None, strict=True, ge=1)
    long_documents: LongDocuments = "truncate"
    on_unsupported: OnUnsupported = "raise"
    rows_per_shard: int


class InputFile(BaseModel):
    """A file of the input, as it was when the run began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Relative to the folder that holds the input, so that the whole may be moved."""
    size: int
    """In bytes."""
    modified: int
    """The time of the last change, in nanoseconds since 1970."""


class Manifest(BaseModel):
    """A whole run, as it lies beside its output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Settings
    files: tuple[InputFile, ...]
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """The number of rows of the input."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that identify the run."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the input is."""

    base: Path
    """The folder that the names of the files are relative to."""
    files: tuple[InputFile, ...]

    def shards(self, columns: Columns, size: int) -> tuple[Shard, ...]:
        """Cut every file into ranges of at most `size` rows.

        Raises:
            InputError: A file cannot be read, or has no such columns, or not of the type they must
                have.
        """
        shards: list[Shard] = []
        for number, file in enumerate(self.files):
            path = self.base / file.name
            with reached("source", path):
                format_of(path).check(path, columns)
                shards += format_of(path).split(path, number, size)
        return tuple(shards)


def find_source(source: str | Path) -> Source:
    """The files that a path, a folder or a pattern stands for, in the order of their names.

    Raises:
        InputError: There are none, or they are not all of one format.
    """
    path, text = check_path("source", source), str(source)
    with reached("source", text):
        base, found = _matching(path, text)
    if not found:
        raise InputError(
            f"`source` {text!r} is no file, folder or pattern that any file matches; pass Parquet "
            "or JSONL files"
        )
    found.sort(key=lambda each: each.relative_to(base).parts)
    if len({format_of(each).suffix for each in found}) > 1:
        raise InputError(
            f"`source` {text!r} holds files of several formats, and the output has the format of "
            "the input; choose one with a pattern such as '*.parquet'"
        )
    with reached("source", text):
        files = tuple(describe(each, _named(each, base)) for each in found)
        return Source(base.resolve(), files)


def _matching(path: Path, pattern: str) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files."""
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        return path, [
            each
            for each in path.rglob("*")
            if not any(part.startswith((".", "_")) for part in each.relative_to(path).parts)
            and each.is_file()
        ]
    found = [Path(name) for name in glob.glob(pattern, recursive=True)]
    found = [each for each in found if each.is_file()]
    base = Path(os.path.commonpath([each.parent for each in found])) if found else path
    return base, found


def _named(path: Path, base: Path) -> str:
    name = str(path.relative_to(base))
    if not _is_text(name):
        raise InputError(
            f"`source` has a file whose name is not UTF-8, {str(path)!r}, which no manifest can "
            "hold; rename it"
        )
    return name


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def reaches(pattern: str | Path, path: Path) -> bool:
    """Whether a pattern matches a path, which need not be there yet."""
    parts = Path(pattern).parts
    fixed = list(takewhile(lambda part: not glob.has_magic(part), parts))
    base = Path(*fixed).resolve()
    return path.is_relative_to(base) and _matches(path.relative_to(base).parts, parts[len(fixed) :])


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[n:], pattern[1:]) for n in range(len(path) + 1))
    return bool(path) and fnmatch(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def format_of(path: Path) -> Format:
    """The format of a file, by the end of its name.

    Raises:
        InputError: The end is not that of a known format.
    """
    for known in _FORMATS:
        if path.suffix == known.suffix:
            return known
    raise InputError(
        f"`source` has the file {str(path)!r}; expected names that end in "
        f"{' or '.join(each.suffix for each in _FORMATS)}, and no compression around them"
    )


def describe(path: Path, name: str) -> InputFile:
    """What tells whether a file is still the same."""
    status = path.stat()
    return InputFile(name=name, size=status.st_size, modified=status.st_mtime_ns)


def digest(folder: Path) -> str:
    """16 hexadecimal digits that change with the model in a folder.

    Looks at names, sizes and samples of each file, so that many gigabytes take no time.
    """
    content = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        size = path.stat().st_size
        content.update(os.fsencode(f"{path.relative_to(folder).as_posix()}\0{size}\0"))
        with path.open("rb") as file:
            # All over it, since training may leave all but the middle layers as they are.
            for number in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE) * number // (_SAMPLES - 1))
                content.update(file.read(_SAMPLE))
    return content.hexdigest()[:16]


def differences(old: Manifest, settings: Settings, files: Sequence[InputFile]) -> list[str]:
    """What a run is asked that the one before it was not, a phrase each."""
    before, now = old.settings.model_dump(), settings.model_dump()
    before |= before.pop("columns")
    now |= now.pop("columns")
    found = [
        f"`{name}` was {before[name]!r}, now {now[name]!r}"
        for name in before
        if before[name] != now[name]
    ]
    old_files = {file.name: file for file in old.files}
    new_files = {file.name: file for file in files}
    for name in sorted(old_files.keys() | new_files.keys()):
        if name not in new_files:
            found.append(f"the input file {name!r} is gone")
        elif name not in old_files:
            found.append(f"the input file {name!r} is new")
        elif old_files[name] != new_files[name]:
            found.append(f"the input file {name!r} has changed")
    return found


def check_path(argument: str, value: str | Path) -> Path:
    """An argument as a path.

    Raises:
        InputError: It is of another type, empty, an address in object storage, or holds what the
            name of a file cannot.
    """
    if not isinstance(value, str | Path):
        raise InputError(f"`{argument}` must be a str or a Path, got {reprlib.repr(value)}")
    text = str(value)
    if not text.strip():
        raise InputError(f"`{argument}` is {text!r}; pass a path, such as '.' for this folder")
    if "://" in text:
        raise InputError(
            f"`{argument}` must be a path, got the address {text!r}: object storage can neither "
            "rename a file nor lock a folder in one step, which resuming relies on; mount it on "
            "every machine, or copy the files"
        )
    try:
        named = b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise InputError(
            f"`{argument}` {one_line(text, 200)!r} holds a NUL or half of a character, which the "
            "name of a file cannot; leave it out"
        )
    return Path(text)


@contextmanager
def reached(argument: str, path: str | Path) -> Iterator[None]:
    """Say which argument it was where the system refuses a path.

    Raises:
        InputError: It did: the name is too long, part of it is a file, links lead in a circle, ...
    """
    try:
        yield
    except LanerankError:
        raise
    # The second is what Python before 3.13 makes of links in a circle.
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(
            f"`{argument}` {one_line(str(path), 200)!r} cannot be used: {why}; check each folder "
            "in it and what you may do there, or choose another"
        ) from error
