"""Neutralising lane markers: ordinary text such as `<query>` that tells lanes apart.

Special tokens are kept out of content by the way it is tokenised. Markers made of plain characters
cannot be, so content that imitates one loses the signs that make it a marker. The same goes for the
special tokens of a server that gets one string, in which they are plain characters too.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work in steps of some milliseconds, which returns what it comes to. `at_once` does it all; an
event loop can turn to others between two steps."""

# Letters that look like others, and signs that look like those of markers. Compatibility forms
# (full-width, mathematical, ...) are folded by normalisation and need no place here.
_LOOK_ALIKES = str.maketrans(
    "аеорсухіјѕԁһԛԝтмкнвαοιεντρυκɑɡıℓ‹›〈〉⟨⟩❮❯˂˃ᐸᐳ꞉∶։׃⁄∕╱⧸❲❳〔〕【】",  # noqa: RUF001 - look-alikes on purpose
    "aeopcyxijsdhqwtmkhbaoievtpukagil<><><><><><>::::////[][][]",
)
_UNSEEN = {"Mn", "Me", "Cf", "Cc", "Cs", "Co", "Cn"}
_BLANK_LETTERS = set("\u115f\u1160\u3164\uffa0\u2800")
_LINE_ENDS = set("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")


class _Fold(dict[int, str]):
    """What a character looks like to a reader who does not look closely, worked out on demand."""

    def __missing__(self, code: int) -> str:
        self[code] = folded = self._fold(chr(code))
        return folded

    @staticmethod
    def _fold(char: str) -> str:
        if char in _LINE_ENDS:
            return "\n"
        if char.isspace() or char in _BLANK_LETTERS:
            return " "
        decomposed = unicodedata.normalize("NFKD", char.translate(_LOOK_ALIKES)).casefold()
        seen = (part for part in decomposed if unicodedata.category(part) not in _UNSEEN)
        return "".join(seen).translate(_LOOK_ALIKES)


_FOLD = _Fold()


def check_markers(markers: tuple[str, ...]) -> None:
    """Refuse what has no sign that could be taken from it, or has a `-`, which signs become.

    Raises:
        ValueError: One of the markers is no marker.
    """
    for marker in markers:
        folded = marker.translate(_FOLD)
        if "-" in folded or all(char.isalnum() or char.isspace() for char in folded):
            raise ValueError(
                f"`markers` cannot hold {marker!r}: each needs a sign, such as '<' or ':', and "
                "none may have '-', which replaces the signs"
            )


# Of folded text, where all letters are small. A name has two letters or more, since `<|x|>` is
# arithmetic; it has no white space at its ends, since `f <| x |> g` is a program; and it has no two
# hyphens in a row, which is what signs become.
_NAME = r"[^\W\d][\w.:/▁]{1,63}+"
_NAMES = r"[^\W\d](?:[\w.:/▁]|[ -](?![ |>-])){1,63}+"
_ANGLED = (
    # <|start|>, <|/tool|>, <|tool▁calls▁begin|> (whose bars may be wide), <|turn>, <|DSML|invoke>
    rf"\|(?:/?{_NAMES}\|>|{_NAME}>|dsml\|)",
    r"/\|dsml\|",
    # <turn|>
    rf"{_NAME}\|>",
    # <end_of_turn>, <start_function_call>
    r"(?:start|begin|end)_(?:of|function)_\w{1,63}+>",
    # <bos>, <BOS_TOKEN>
    r"(?:bos|eos|sos|sop|eop|bom|eom|eod|eoh|eoa|pad|cls|sep|mask|unk)(?:_token)?>",
    # <extra_id_1>, <SPECIAL_10>: kept in reserve, and the marks of turns in some families.
    r"(?:extra_id|special|unused|reserved(?:_special_token)?)_?\d{1,6}+>",
    # <_user>, <seed:bos>, <longcat_user>
    r"_(?:user|bot|system|start|end|pad)>",
    r"/?(?:seed:|longcat_)[^\W\d]\w{1,40}+>",
)
_BRACKETED = (
    # [|user|], by name, since [|x|] is a list to some programmers.
    r"\|(?:system|user|assistant|tool|human|ai|bos|eos|pad|endofturn)\|\]",
    # [unused0]
    r"unused_?\d{1,6}+\]",
)
_LONGEST_CHAT_TOKEN = 100
"""More than the characters that one may have."""
_CHAT_TOKENS = (rf"<(?=[\w|/])(?:{'|'.join(_ANGLED)})", rf"\[(?:{'|'.join(_BRACKETED)})")

_SIGN = re.compile(r"[^\w\s]|_")


class _Blunt(dict[int, str]):
    """A hyphen for a character that looks like a sign, any other as it is; worked out on demand."""

    def __missing__(self, code: int) -> str:
        self[code] = blunt = "-" if _SIGN.search(_FOLD[code]) else chr(code)
        return blunt


_BLUNT = _Blunt()


_STRETCH = 1 << 14
"""How many characters are looked at in a step, which takes some milliseconds at most."""


def neutralise(text: str, markers: tuple[str, ...], *, chat_tokens: bool = False) -> str:
    """A text of the same length in which none of the markers survives.

    The signs of a marker (`<`, `:`, `[`, ...) become `-`. Upper and lower case, white space,
    characters without width, full-width forms and look-alike letters make no difference. A marker
    that begins with a letter, such as `query:`, counts at the beginning of a line only, which is
    where prompts have it; in running text the words are innocent.

    Args:
        text: What a lane holds.
        markers: What it must not hold.
        chat_tokens: Whether all that has the form of a chat model's special token is a marker too:
            `<|any_word|>`, `<|turn>`, `<end_of_turn>`, `<extra_id_1>`. A server that turns one
            string into ids reads such a token in a document as its own. Which model it serves
            cannot be known from here, and a list of all names would never be complete. Tags of HTML
            and XML, `[INFO]`, `f <| x |> g` and `0 < |x|` do not have that form.

    >>> neutralise("see </ Query >, or ask your query: now", ("</query>", "query:"))
    'see -- Query -, or ask your query: now'
    >>> neutralise("<b>Sea</b><|channel|>", (), chat_tokens=True)
    '<b>Sea</b>--channel--'
    """
    return at_once(neutralising(text, markers, chat_tokens=chat_tokens))


def neutralising(text: str, markers: tuple[str, ...], *, chat_tokens: bool = False) -> Steps[str]:
    """`neutralise` in steps, between which an event loop may turn to others."""
    if not markers and not chat_tokens:
        return text
    pattern = _pattern(markers, chat_tokens=chat_tokens)
    while True:
        pieces = [text[place : place + _STRETCH] for place in range(0, len(text), _STRETCH)]
        folded: list[str] = []
        for piece in pieces:
            folded.append(piece.translate(_FOLD))
            yield
        spans: list[tuple[int, int]] = []
        for span in pattern.spans("".join(folded)):
            if span is None:
                yield
            else:
                spans.append(span)
        if not spans:
            return text
        blunt = "".join((yield from _blunted(pieces, folded, spans)))
        if blunt == text:  # A marker without a sign, which no text can lose.
            return text
        # Neutralising one marker could lay bare another, so go on until there is none.
        text = blunt


def at_once(steps: Steps[T]) -> T:
    """What steps come to, without a pause between them."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Finds markers in folded text.

    Two expressions, since the engine leaps to the places where a sign or a line begins. With both
    in one it would try every character, which takes ten times as long.
    """

    signs: re.Pattern[str]
    """Markers that begin with a sign."""
    labels: re.Pattern[str] | None
    """Markers that begin with a letter, and the line end before them."""
    reach: re.Pattern[str]
    """As much text as a marker may need."""

    def spans(self, folded: str) -> Iterator[tuple[int, int] | None]:
        """Where markers begin and end, from left to right, none over another.

        `None` comes between two of them now and then, and says no more than that time has passed.
        """
        lines = f"\n{folded}" if self.labels else ""
        place = limit = 0
        while limit < len(folded):
            limit, end = self._window(folded, limit)
            for start, stop in self._within(folded, lines, place, end):
                if start >= limit:
                    break
                yield start, stop
                place = stop
            place = max(place, limit)
            yield None

    def _window(self, folded: str, limit: int) -> tuple[int, int]:
        """How far to look for beginnings of markers next, and where the last of them may end."""
        limit = min(limit + _STRETCH, len(folded))
        # Markers may hold any amount of white space, which is soon passed over.
        while (end := self._reached(folded, limit)) - limit > _STRETCH:
            limit = end
        return limit, end

    def _reached(self, folded: str, place: int) -> int:
        found = self.reach.match(folded, place)
        return found.end() if found else place

    def _within(self, folded: str, lines: str, place: int, end: int) -> Iterator[tuple[int, int]]:
        if self.labels is None:
            for found in self.signs.finditer(folded, place, end):
                yield found.span()
            return
        sign = label = (-1, 0)
        while True:
            if sign[0] < place:
                match = self.signs.search(folded, place, end)
                sign = match.span() if match else _NOWHERE
            if label[0] < place:
                # Where the line end is in `lines`, the label is in `folded`.
                match = self.labels.search(lines, place, end + 1)
                label = (match.start(), match.end() - 1) if match else _NOWHERE
            if (first := min(sign, label)) == _NOWHERE:
                return
            yield first
            place = first[1]


_NOWHERE = (sys.maxsize, sys.maxsize)


@lru_cache(maxsize=64)
def _pattern(markers: tuple[str, ...], *, chat_tokens: bool) -> _Pattern:
    signs: list[list[str]] = []
    labels: list[list[str]] = []
    for marker in markers:
        parts = re.findall(r"\w+|[^\w\s]", marker.translate(_FOLD))
        steps = [step for part in parts for step in (_GAP, *map(re.escape, part))][1:]
        if steps:
            (labels if parts[0][0].isalnum() else signs).append(steps)
    anywhere = [*_branches(signs), *(_CHAT_TOKENS if chat_tokens else ())]
    longest = max([_LONGEST_CHAT_TOKEN, *map(len, (*signs, *labels))])
    return _Pattern(
        re.compile("|".join(anywhere) or r"(?!)"),
        re.compile(rf"\n *+{_one_of(labels)}") if labels else None,
        re.compile(rf"(?:\s*+\S){{0,{longest}}}+\s*+"),
    )


_GAP = r"\s*+"


def _branches(markers: Sequence[Sequence[str]]) -> list[str]:
    """Expressions that match what the first marker would that matches.

    The beginning that some share is written once: tried one by one, forty markers make a text of
    nothing but `<` take ten times as long.
    """
    groups: dict[str, list[Sequence[str]]] = {}
    end = []
    for steps in markers:
        if not steps:
            end = [""]  # It matches wherever those after it would.
            break
        groups.setdefault(steps[0], []).append(steps[1:])
    if _GAP in groups and len(groups) > 1:
        # "a b" and "ab", of which either may come first.
        return ["".join(steps) for steps in markers]
    return [first + _one_of(rest) for first, rest in groups.items()] + end


def _one_of(markers: Sequence[Sequence[str]]) -> str:
    shared = ""
    while all(markers) and len({steps[0] for steps in markers}) == 1:
        shared += markers[0][0]
        markers = [steps[1:] for steps in markers]
    branches = _branches(markers)
    return shared + (branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})")


def _blunted(
    pieces: Sequence[str], folded: Sequence[str], spans: Sequence[tuple[int, int]]
) -> Steps[list[str]]:
    """The pieces of a text without the signs in some places of its folded form."""
    blunt = []
    number = offset = 0
    for piece, seen in zip(pieces, folded, strict=True):
        end = offset + len(seen)
        after = bisect_left(spans, (end, 0))
        own = list(spans[number:after]) if seen else []
        if own:
            # What begins in one piece may end in the next.
            own[0] = (max(own[0][0], offset), own[0][1])
            own[-1] = (own[-1][0], min(own[-1][1], end))
            number = after - (spans[after - 1][1] > end)
        blunt.append(_blunt(piece, seen, offset, own))
        offset = end
        yield
    return blunt


def _blunt(text: str, folded: str, offset: int, spans: Sequence[tuple[int, int]]) -> str:
    if not spans:
        return text
    widths = {char: len(_FOLD[ord(char)]) for char in set(text)}
    # Where in `text` each character of `folded` came from.
    origin: Sequence[int] = range(len(text))
    if max(widths.values()) > 1:
        origin = [place for place, char in enumerate(text) for _ in range(widths[char])]
        chars = list(text)
        for start, end in spans:
            for sign in _SIGN.finditer(folded, start - offset, end - offset):
                chars[origin[sign.start()]] = "-"
        return "".join(chars)
    if min(widths.values()) == 0:
        origin = list(compress(origin, map(widths.__getitem__, text)))
    kept: list[str] = []
    done = 0
    for start, end in spans:
        first, last = origin[start - offset], origin[end - offset - 1] + 1
        kept += text[done:first], text[first:last].translate(_BLUNT)
        done = last
    return "".join((*kept, text[done:]))
