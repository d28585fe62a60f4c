"""The same documents under different instructions, or models: who moved, and how far."""

from __future__ import annotations

import reprlib
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from lanerank.contracts import Document, Ranking, describe_instruction
from lanerank.display import (
    MAX_ROWS,
    Element,
    describe_score,
    document_cell,
    element,
    fragment,
    one_line,
    table,
)
from lanerank.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedDocument:
    """One document of a comparison. The tuples have one place for each label."""

    index: int
    """Position in the list that was ranked."""
    document: Document
    """The document as given."""
    ranks: tuple[int | None, ...]
    """Counted from 1; `None` where the ranking did not keep the document."""
    scores: tuple[float | None, ...]
    """`None` where the ranking did not keep the document."""

    @property
    def moves(self) -> tuple[int | None, ...]:
        """How many places it is above its rank in the first ranking; negative below it.

        `None` where one of the two rankings did not keep the document.
        """
        first = self.ranks[0]
        return tuple(None if first is None or rank is None else first - rank for rank in self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RankingComparison:
    """What each ranking made of each document; `compare_rankings` makes one.

    It shows as a chart and a table in a notebook, and as a table in a terminal.
    """

    labels: tuple[str, ...]
    """What each ranking is called."""
    rankings: tuple[Ranking, ...]
    """The first is the one that the others are compared with."""
    documents: tuple[ComparedDocument, ...]
    """In the order of the first ranking; those that it did not keep come last."""

    def __len__(self) -> int:
        """The number of documents that any of the rankings kept."""
        return len(self.documents)

    def __iter__(self) -> Iterator[ComparedDocument]:
        """Iterate over the documents, in the order of the first ranking."""
        return iter(self.documents)

    def __repr__(self) -> str:
        """A table: the rank, the score and the move under each label."""
        lines = [f"query: {one_line(self.rankings[0].query, 80)}"]
        lines.append("  ".join(f"{one_line(label, 15):<15}" for label in self.labels))
        for row in self.documents[:MAX_ROWS]:
            cells = ("{:>3} {:>6} {:<4}".format(*_cell(row, i)) for i in range(len(self.labels)))
            lines.append("  ".join((*cells, _name(row, 60))))
        if len(self) > MAX_ROWS:
            lines.append(f"and {len(self) - MAX_ROWS} more documents")
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        """A bump chart and a table, for notebooks."""
        return fragment(*self.html_content())

    def html_content(self) -> list[Element]:
        """The elements of the chart and the table, for a page that has more than these."""
        colours = _colours(self.documents)
        notes = [", ".join(dict.fromkeys(ranking.model for ranking in self.rankings))]
        if len(self) > MAX_ROWS:
            notes.append(f"the first {MAX_ROWS} of {len(self)} documents")
        chart = [_chart(self, colours)] if len(self.labels) > 1 and self.documents else []
        return [
            element("p", {}, element("b", {}, one_line(self.rankings[0].query, 200))),
            element("p", {"class": "soft"}, one_line("; ".join(notes), 300)),
            *chart,
            element("div", {"class": "compact"}, _table(self, colours)),
        ]


def compare_rankings(rankings: Mapping[str, Ranking]) -> RankingComparison:
    """Set rankings of the same documents for the same query side by side.

    Args:
        rankings: Each under a label of your choice, such as the name of its instruction or model.
            The first is the one that the others are compared with. They may have been cut by
            `top_k`.

    Raises:
        InputError: There is no ranking, or they are not of the same query and documents.
    """
    if not isinstance(rankings, Mapping) or not rankings:
        raise InputError(
            "`rankings` must be a mapping from labels to rankings with at least one entry, got "
            f"{reprlib.repr(rankings)}; pass `{{'without': ranking, 'with': other}}`"
        )
    for label, ranking in rankings.items():
        if not isinstance(label, str) or not isinstance(ranking, Ranking):
            raise InputError(
                f"`rankings` must map a str to a Ranking, got {type(label).__name__} "
                f"{reprlib.repr(label)} to {type(ranking).__name__}"
            )
    documents = _same_documents(rankings)
    places = [
        {result.index: (rank, result.score) for rank, result in enumerate(ranking, 1)}
        for ranking in rankings.values()
    ]
    return RankingComparison(
        labels=tuple(rankings),
        rankings=tuple(rankings.values()),
        documents=tuple(
            ComparedDocument(
                index=index,
                document=document,
                ranks=tuple(place[index][0] if index in place else None for place in places),
                scores=tuple(place[index][1] if index in place else None for place in places),
            )
            for index, document in documents.items()
        ),
    )


def _same_documents(rankings: Mapping[str, Ranking]) -> dict[int, Document]:
    """The documents by index, in the order in which the rankings first name them."""
    baseline, first = next(iter(rankings.items()))
    documents: dict[int, Document] = {}
    for label, ranking in rankings.items():
        if ranking.query != first.query:
            raise InputError(
                f"`rankings[{label!r}]` is for the query {reprlib.repr(ranking.query)} and "
                f"`rankings[{baseline!r}]` for {reprlib.repr(first.query)}; compare rankings of "
                "one query"
            )
        for result in ranking:
            known = documents.setdefault(result.index, result.document)
            if (known.id, known.text) != (result.document.id, result.document.text):
                raise InputError(
                    f"`rankings[{label!r}]` has {reprlib.repr(result.document.text)} as document "
                    f"{result.index}, another has {reprlib.repr(known.text)}; rank the same "
                    "list, in the same order, for every label"
                )
    return documents


# What both tables say


def _name(row: ComparedDocument, width: int) -> str:
    label = f"{row.document.id}: " if row.document.id else ""
    return one_line(label + row.document.text, width)


def _cell(row: ComparedDocument, column: int) -> tuple[str, str, str]:
    """Rank, score and move of a document under one label."""
    rank, score, move = row.ranks[column], row.scores[column], row.moves[column]
    if rank is None or score is None:
        return ("\N{EN DASH}", "", "")
    return (str(rank), describe_score(score), _arrow(move) if column else "")


def _arrow(move: int | None) -> str:
    if move is None:
        return "new"
    return f"▲{move}" if move > 0 else f"▼{-move}" if move < 0 else "="


def _table(comparison: RankingComparison, colours: Mapping[int, str]) -> Element:
    headings = [
        element(
            "th",
            {"class": "number", "title": one_line(describe_instruction(ranking), 100)},
            one_line(label, 40),
        )
        for label, ranking in zip(comparison.labels, comparison.rankings, strict=True)
    ]
    rows = []
    for row in comparison.documents[:MAX_ROWS]:
        cells = [_html_cell(row, i) for i in range(len(comparison.labels))]
        cells[0].set("style", f"border-left: 4px solid {colours.get(row.index, 'transparent')}")
        document = row.document
        rows.append((*cells, document_cell(document.text, document.id, document.metadata)))
    return table((*headings, element("th", {"class": "text"}, "document")), rows)


def _html_cell(row: ComparedDocument, column: int) -> Element:
    rank, score, move = _cell(row, column)
    direction = {"▲": "up", "▼": "down"}.get(move[:1], "soft")
    return element(
        "td",
        {"class": "number"},
        element("b", {}, rank),
        " ",
        element("span", {"class": "soft"}, score),
        " ",
        element("span", {"class": direction}, move),
    )


# The bump chart

# Okabe and Ito's colours for every kind of colour vision, without the yellow that is lost on a
# light page and the black that is lost on a dark one. Documents beyond these are grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_ROWS = 12
"""Ranks with a row and a label of their own; those below share a narrow band."""
_BAND = 90
_ROW, _TOP, _NAME, _PITCH = 28, 44, 266, 180
_NAME_COLUMNS = 34
"""How much of a document's name fits the width of `_NAME`."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a column and a rank are, in pixels."""

    columns: int
    depth: int
    """The number of ranks."""
    cut: bool
    """Whether a ranking did not keep a document that another kept."""

    def x(self, column: int) -> float:
        return _NAME + column * _PITCH

    def y(self, rank: int | None) -> float:
        if rank is None:
            return self.y(self.depth) + _ROW
        y = _TOP + _ROW * (min(rank, _ROWS) - 0.5)
        if rank > _ROWS:
            y += _ROW / 2 + (rank - _ROWS) * min(8, _BAND / (self.depth - _ROWS))
        return round(y, 1)

    @property
    def width(self) -> float:
        return self.x(self.columns - 1) + _NAME

    @property
    def height(self) -> float:
        return self.y(None if self.cut else self.depth) + _ROW / 2


def _best_rank(row: ComparedDocument) -> int:
    return min(rank for rank in row.ranks if rank is not None)


def _colours(documents: tuple[ComparedDocument, ...]) -> dict[int, str]:
    """Colours by index, for the documents that get furthest up under any label."""
    return {
        row.index: colour
        for row, colour in zip(sorted(documents, key=_best_rank), _COLOURS, strict=False)
    }


def _chart(comparison: RankingComparison, colours: Mapping[int, str]) -> Element:
    columns = range(len(comparison.labels))
    layout = _Layout(
        columns=len(columns),
        depth=max(map(len, comparison.rankings)),
        cut=any(None in row.ranks for row in comparison),
    )
    bottom = layout.height - _ROW / 2
    guides = [
        element("path", {"class": "guide", "d": f"M{layout.x(i)} {_TOP}V{bottom}"}) for i in columns
    ]
    headings = [
        _text("heading", layout.x(i), _TOP - 14 - 16 * line, words)
        for i in columns
        for line, words in enumerate(reversed(_wrap(comparison.labels[i])))
    ]
    notes = []
    if layout.depth > _ROWS:
        middle = (layout.y(_ROWS + 1) + layout.y(layout.depth)) / 2 + 4
        notes.append(_text("before soft", _NAME - 18, middle, f"ranks from {_ROWS + 1}"))
    if layout.cut:
        notes.append(_text("before soft", _NAME - 18, layout.y(None) + 4, "not kept"))
    shown = [row for row in comparison if _best_rank(row) <= _ROWS]
    # The coloured ones last, on top of the others.
    shown.sort(key=lambda row: row.index in colours)
    traces = [_trace(row, comparison.labels, layout, colours.get(row.index)) for row in shown]
    return element(
        "svg",
        {
            "viewBox": f"0 0 {layout.width} {layout.height}",
            "style": f"width: 100%; min-width: {layout.width * 0.7:.0f}px; "
            f"max-width: {layout.width}px",
            "role": "img",
            "aria-label": "How the ranks of the documents change; the table below has the numbers",
        },
        *guides,
        *headings,
        *notes,
        *traces,
    )


def _trace(
    row: ComparedDocument, labels: tuple[str, ...], layout: _Layout, colour: str | None
) -> Element:
    """The line of one document, with a dot and a rank in each column and its name at both ends."""
    kind = "named" if colour else "other"
    ink = colour or "gray"
    group = element(
        "g",
        {"class": f"document {kind}", "stroke": ink, "fill": ink},
        element("title", {}, _tooltip(row, labels)),
    )
    points = [(layout.x(i), layout.y(rank), rank) for i, rank in enumerate(row.ranks)]
    for (x, y, rank), (next_x, next_y, next_rank) in pairwise(points):
        if rank is None and next_rank is None:
            continue
        middle = (x + next_x) / 2
        curve = f"M{x} {y}C{middle} {y} {middle} {next_y} {next_x} {next_y}"
        path = {"class": "out" if None in (rank, next_rank) else "in", "d": curve}
        group.append(element("path", path))
    for x, y, rank in points:
        in_full = rank is not None and rank <= _ROWS
        if rank is not None:
            group.append(element("circle", {"cx": x, "cy": y, "r": 10 if in_full else 3}))
        if in_full:
            group.append(_text("rank", x, y + 4, str(rank)))
    name = _name(row, _NAME_COLUMNS)
    for (x, y, rank), side, gap in ((points[0], "before", -18), (points[-1], "after", 18)):
        if rank is not None and rank <= _ROWS:
            group.append(_text(side, x + gap, y + 4, name))
    return group


def _text(kind: str, x: float, y: float, words: str) -> Element:
    return element("text", {"class": kind, "x": x, "y": y}, words)


def _wrap(label: str) -> list[str]:
    lines = textwrap.wrap(one_line(label, 60), 24, max_lines=2, placeholder="…")
    return [one_line(line, 24) for line in lines]


def _tooltip(row: ComparedDocument, labels: tuple[str, ...]) -> str:
    lines = [_name(row, 200)]
    for i, label in enumerate(labels):
        rank, score, move = _cell(row, i)
        place = f"rank {rank}, score {score} {move}" if score else "not kept"
        lines.append(f"{one_line(label, 40)}: {place}".rstrip())
    return "\n".join(lines)
