"""Tables and harmless text in Markdown, for model cards and datasheets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lanerank.display import one_line

_WIDTH = 400
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~!&])")
_BAR = re.compile(r"(?<!\\)\|")


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table. A cell may hold markup, but no bar or line break in it ends it early.

    Args:
        head: The names of the columns.
        lines: The cells below them.
    """
    every = [head, ["---"] * len(head), *lines]
    cells = ([_BAR.sub(r"\\|", " ".join(cell.split())) for cell in line] for line in every)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def plain(text: str) -> str:
    """A text on one line that Markdown and HTML take as it is."""
    return _MARKUP.sub(r"\\\1", one_line(text, _WIDTH))
