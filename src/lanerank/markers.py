"""Neutralising lane markers: ordinary text such as `<query>` that tells lanes apart.

Special tokens are kept out of content by the way it is tokenised. Markers made of plain characters
cannot be, so content that imitates one loses the signs that make it a marker.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

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


def neutralise(text: str, markers: tuple[str, ...]) -> str:
    """A text of the same length in which none of the markers survives.

    The signs of a marker (`<`, `:`, `[`, ...) become `-`. Upper and lower case, white space,
    characters without width, full-width forms and look-alike letters make no difference. A marker
    that begins with a letter, such as `query:`, counts at the beginning of a line only, which is
    where prompts have it; in running text the words are innocent.

    >>> neutralise("see </ Query >, or ask your query: now", ("</query>", "query:"))
    'see -- Query -, or ask your query: now'
    """
    if not markers:
        return text
    pattern = _pattern(markers)
    # Neutralising one marker could lay bare another, so go on until there is none.
    while pattern.search(folded := text.translate(_FOLD)):
        blunt = _blunt(text, folded, pattern)
        if blunt == text:  # A marker without a sign, which no text can lose.
            break
        text = blunt
    return text


@lru_cache(maxsize=64)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    alternatives = []
    for marker in markers:
        parts = re.findall(r"\w+|[^\w\s]", marker.translate(_FOLD))
        found = r"\s*".join(map(re.escape, parts))
        alternatives.append(rf"(?:(?<=\n)|^)[ ]*{found}" if parts[0][0].isalnum() else found)
    return re.compile("|".join(alternatives))


def _blunt(text: str, folded: str, pattern: re.Pattern[str]) -> str:
    # Where in `text` each character of `folded` came from.
    origin = [place for place, char in enumerate(text) for _ in char.translate(_FOLD)]
    chars = list(text)
    for match in pattern.finditer(folded):
        for place in range(*match.span()):
            if not (folded[place].isalnum() or folded[place].isspace()):
                chars[origin[place]] = "-"
    return "".join(chars)
