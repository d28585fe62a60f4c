"""Files that a command writes: refused before there is work to lose, whole or not there at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lanerank.cli.console import STANDARD_STREAM
from lanerank.errors import InputError

OverwriteFlag = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output that is there already.")
]
_PathT = TypeVar("_PathT", str, Path, None)


def check_outputs(
    outputs: Mapping[str, Path], *, overwrite: bool = True, quadruples: bool = False
) -> None:
    """Refuse outputs that cannot be written, before there is work to lose.

    Args:
        outputs: The paths, each under the option or argument that gave it.
        overwrite: Whether files of these names may be replaced.
        quadruples: Whether the ends of the names have to be formats of quadruples.

    Raises:
        InputError: A name is given twice, taken, or of no format, or its folder does not exist or
            takes no files.
    """
    options: dict[Path, str] = {}
    for option, path in outputs.items():
        named = f"`{option}`: the output {str(path)!r}"
        if path.is_dir():
            raise InputError(f"{named} is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise InputError(
                f"{named} is there already; give another name, or replace it with --overwrite"
            )
        if not path.parent.is_dir():
            raise InputError(f"{named}: there is no folder {str(path.parent)!r}; make it first")
        target = path.resolve()
        if not _is_device(path) and not os.access(target.parent, os.W_OK):
            raise InputError(
                f"{named}: nothing can be written in {str(target.parent)!r}; give another folder"
            )
        if (first := options.setdefault(target, option)) != option:
            raise InputError(f"{named} is that of `{first}` too; give two outputs two names")
        if quadruples:
            _check_format(option, path)


def check_output(parameter: typer.CallbackParam, path: _PathT) -> _PathT:
    """The callback of an option that names an output, `-` allowed: checked with the arguments."""
    if path is not None and str(path) != STANDARD_STREAM:
        check_outputs({parameter.opts[0]: Path(path)})
    return path


@contextmanager
def new_files(
    outputs: Mapping[str, Path], *, overwrite: bool = True, quadruples: bool = False
) -> Iterator[list[Path]]:
    """Places to write files, which take their names when all of them are complete.

    After an error nothing is there under the names that was not there before. Arguments and errors
    are those of `check_outputs`.
    """
    check_outputs(outputs, overwrite=overwrite, quadruples=quadruples)
    with ExitStack() as stack:
        parts = {}
        for path in outputs.values():
            if _is_device(path):
                # Written to as it is: a file in the place of /dev/null would be the end of it.
                parts[path] = path
                continue
            # So that a link keeps pointing to what it names.
            target = path.resolve()
            # Beside the file, so that it can be renamed; under its own name, whose end is a format.
            folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
            parts[target] = Path(stack.enter_context(folder)) / path.name
        yield list(parts.values())
        for target, part in parts.items():
            if part != target:
                os.replace(part, target)


def _is_device(path: Path) -> bool:
    """Whether something is there that is no file, such as a pipe."""
    return path.exists() and not path.is_file()


def _check_format(option: str, path: Path) -> None:
    # Here, because other outputs must work without the extra.
    from lanerank import training

    try:
        training.quadruple_format(path)
    except InputError as error:
        error.add_note(f"`path` is `{option}` on the command line")
        raise
