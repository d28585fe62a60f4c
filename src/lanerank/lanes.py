"""From lanes of text to token ids: marker integrity, budgets, attributes and windows.

Every lane is tokenised on its own and lanes meet only as lists of token ids, so nothing that a
text says can move a token into another lane. Nothing here needs torch.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise, product
from typing import Any

from tokenizers import Tokenizer, models
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from lanerank.contracts import Candidate, Lane, LongDocuments
from lanerank.errors import InputError, ModelLoadError

_MAX_ATTRIBUTE_CHARS = 200
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?:$|[T ])")
# "MI means heart attack.", as an instruction words its glossary, and as people write one.
_DEFINITION = re.compile(
    r"(?:^|(?<=[.!?;:\n]))[^.!?;:\n]{1,40}?(?: means | stands for | = )[^.!?;\n]+[.!?;]?"
)
# Every character that a tokenizer's normalisation (NFC to NFKC) may turn into a semicolon.
_SEMICOLONS = str.maketrans(dict.fromkeys(";\u037e\ufe14\ufe54\uff1b", ","))


def clean_text(text: str) -> str:
    """Drop NUL bytes and replace lone surrogates by U+FFFD, so that any `str` can be encoded."""
    if text.isascii():
        return text.replace("\0", "")
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return whole.replace("\0", "")


def describe_age(date: dt.date, today: dt.date) -> str:
    """How long before `today` a date lies, in the words a person would use.

    Small models cannot subtract dates, so the attributes lane says the difference.
    """
    days = (today - date).days
    if days < 0:
        return "in the future"
    if days == 0:
        return "today"
    for unit, length in (("year", 365.25), ("month", 30.44), ("week", 7), ("day", 1)):
        count = int(days / length + 0.05)
        # Below two years months tell more than years; below two months weeks do.
        if count >= 2 or (unit == "day" and count):
            return f"{count} {unit}{'s' if count > 1 else ''} old"
    return "1 day old"


def render_attributes(
    metadata: Mapping[str, object], fields: Sequence[str], today: dt.date | None = None
) -> str:
    """The attributes lane of one document: `"date: 2025-01-15 (3 months old); region: DE"`.

    Args:
        metadata: The document's metadata.
        fields: The names to take, in this order. A name that is absent, or whose value is `None`,
            not a number (as pandas marks what is missing) or blank, is left out.
        today: If given, a value that is a date (or an ISO 8601 string) is followed by its age.

    Returns:
        One line; the empty string if no field has a value. A value that cannot be written as text,
        as an integer of thousands of digits, counts as absent. Values longer than 200 characters
        are cut, because an attribute is a fact about a document and not another document, and a
        semicolon in a value becomes a comma, because only fields are told apart by semicolons.
    """
    parts = []
    for name in fields:
        value = metadata.get(name)
        # A value that brought its own separator could pass for another field.
        text = " ".join(clean_text(_as_text(value)).split()).translate(_SEMICOLONS)
        if not text:
            continue
        date = _as_date(value) if today else None
        age = f" ({describe_age(date, today)})" if date and today else ""
        parts.append(f"{clean_text(name)}: {text[:_MAX_ATTRIBUTE_CHARS]}{age}")
    return "; ".join(parts)


def _as_text(value: object) -> str:
    """A value as text; blank where it is missing or has none."""
    try:
        if value is None or _is_nan(value):
            return ""
        if isinstance(value, (list, tuple, set, frozenset)):
            # Every item takes a character at least, so that no more of them are read.
            return ", ".join(map(str, islice(value, _MAX_ATTRIBUTE_CHARS)))
        return str(value)
    except Exception:  # noqa: BLE001 - one document must not be able to stop the ranking of all
        return ""


def _is_nan(value: object) -> bool:
    """Whether a value stands for a missing one, as NaN, NaT and NA do in tables."""
    try:
        return bool(value != value)
    except ValueError:  # An array.
        return False
    except TypeError:  # NA of pandas, which is neither.
        return True


def _as_date(value: object) -> dt.date | None:
    if isinstance(value, dt.datetime):
        return value.date()
    if isinstance(value, dt.date):
        return value
    if isinstance(value, str) and _DATE.match(value.strip()):
        try:
            return dt.date.fromisoformat(value.strip()[:10])
        except ValueError:
            return None
    return None


class ContentEncoder:
    """Turns content into ids of which none is reserved, whatever the text says.

    Args:
        tokenizer: The model's tokenizer. Its vocabulary is shared, its added tokens are not: text
            that spells one is plain characters.
        continues: Whether content always follows other text, so that no blank is put before it
            where the tokenizer does so at the beginning of a text.
        keep_unknown: Whether the token for characters that the model cannot read may occur.
        ordinary_tokens: A regular expression of added tokens that are not reserved, because the
            model met them in ordinary text, such as runs of line ends.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        continues: bool = False,
        keep_unknown: bool = False,
        ordinary_tokens: str = "",
    ) -> None:
        """Take what turns text into ids, and nothing that the caller could change later."""
        added = tokenizer.get_added_tokens_decoder()
        unknown = getattr(tokenizer.model, "unk_token", None) if keep_unknown else None
        ordinary = {
            number: token
            for number, token in added.items()
            if not token.special and re.fullmatch(ordinary_tokens, token.content)
        }
        self.reserved_ids: frozenset[int] = frozenset(
            number
            for number, token in added.items()
            if number not in ordinary and token.content != unknown
        )
        """Ids that content can never produce: special and added tokens."""
        self._tokenizer = Tokenizer(tokenizer.model)
        self._tokenizer.add_tokens(list(ordinary.values()))
        normalizer, pre_tokenizer = text_settings(tokenizer, continues=continues)
        self._tokenizer.normalizer, self._tokenizer.pre_tokenizer = normalizer, pre_tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of them reserved.

        The tokenizer already reads `"[SEP]"` as plain characters; the filter makes it a property
        of this function rather than of the tokenizer.
        """
        ids = self._tokenizer.encode(clean_text(text), add_special_tokens=False).ids
        return [token for token in ids if token not in self.reserved_ids]

    def beginning(
        self, text: str, room: int, leave_out: Callable[[list[int]], list[int]] = list
    ) -> list[int]:
        """The ids of a text, or of enough of its beginning to tell that it exceeds `room`.

        A document of a megabyte need not be tokenised to its end to keep its first 512 tokens.
        The cut can only change the last words, which lie far beyond `room`. `leave_out` is
        applied to the ids, however many it leaves out.
        """
        for chars in (32 * room, 256 * room):
            if len(text) <= chars:
                break
            content = leave_out(self.encode(text[:chars]))
            if len(content) > 2 * room:
                return content[: 2 * room]
        return leave_out(self.encode(text))


def text_settings(
    tokenizer: Tokenizer, *, continues: bool = False
) -> tuple[Normalizer | None, PreTokenizer | None]:
    """What a tokenizer does to a text before it looks into its vocabulary.

    Args:
        tokenizer: Whose settings to copy.
        continues: Leave out the blank that some put before a text.
    """
    # A tokenizer without vocabulary, so that large ones are not written out and read again.
    bare = Tokenizer(models.BPE())
    bare.normalizer, bare.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    fields = json.loads(bare.to_str())
    if continues:
        for name in ("normalizer", "pre_tokenizer"):
            fields[name] = _without_first_blank(fields[name])
    settings = Tokenizer.from_str(json.dumps(fields))
    return settings.normalizer, settings.pre_tokenizer


def _without_first_blank(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    changed = dict(part)
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            kept = (_without_first_blank(inner) for inner in part[name])
            changed[name] = [inner for inner in kept if inner is not None]
    if "prepend_scheme" in part:
        changed["prepend_scheme"] = "never"
    if "add_prefix_space" in part:
        changed["add_prefix_space"] = False
    return changed


@dataclass(frozen=True, slots=True)
class TokenizedCandidate:
    """One window of a candidate: the attributes lane and a part of the document lane."""

    index: int
    """Position of the candidate in the request."""
    attributes: tuple[int, ...]
    document: tuple[int, ...]

    def __len__(self) -> int:
        """The number of tokens of both lanes."""
        return len(self.attributes) + len(self.document)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneBudgets:
    """How many tokens each lane may have, framing tokens included."""

    instruction: int = 512
    query: int = 512
    attributes: int = 128
    document: int = 512
    window_overlap: int = 64
    """Tokens that two neighbouring windows of a long document share."""

    def __post_init__(self) -> None:
        """Refuse lanes without room for content, and windows that would not advance."""
        for lane in ("instruction", "query", "attributes", "document"):
            if (budget := getattr(self, lane)) < 3:
                raise InputError(
                    f"`{lane}` must be at least 3 tokens, two of them for framing, got {budget}"
                )
        room = self.document - 2
        if not 0 <= self.window_overlap < room:
            raise InputError(
                f"`window_overlap` must be at least 0 and below the {room} tokens of a window, "
                f"got {self.window_overlap}"
            )


@dataclass(slots=True)
class _Seen:
    """A word of a document, and how it can be part of an echo."""

    start: int
    word: tuple[int, ...]
    links: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """By its place in the instruction: how long an echo ends here, and the position and the place
    of the word before in that echo (both -1 at its beginning)."""
    reached: set[int] = field(default_factory=set)
    """How far in the instruction echoes have come of which words were left out after this one."""


class EchoFilter:
    """Leaves out what a document repeats of an instruction, as the model reads both.

    Nothing resembles an instruction more than the instruction itself, so a document that guesses
    it, or has read it in another answer, could lift itself by saying it again. Six words in their
    order, or all of an instruction of four or five, are no coincidence, even with up to three other
    words between two of them and one of them skipped: of 23,348 honest pairs of an instruction and
    a document in the project's scenarios, five share as many. Words are compared as ids, so that
    what a tokenizer drops or folds disguises nothing. An echo in other words, or in another order,
    is for the model to resist.

    A document that repeats nothing but definitions stays whole: so reads an honest glossary.

    Args:
        instruction: The ids of an instruction; from one of fewer than four words nothing is left
            out.
        silent: Ids without a letter or digit, which no word is made of.
        continuing: Ids that continue a word.
        demands: The ids of the instruction without its definitions; the same by default.
    """

    _BETWEEN = 3
    """How many words of a document may stand between two words of an echo."""
    _SKIPPED = 1
    """How many words of the instruction may be missing between the two."""

    def __init__(
        self,
        instruction: Sequence[int] = (),
        silent: Container[int] = (),
        continuing: Container[int] = (),
        demands: Sequence[int] | None = None,
    ) -> None:
        """Note where in the instruction each of its words stands."""
        self._silent, self._continuing = silent, continuing
        words = [word for _, word in self._words(instruction)]
        self._length = max(4, min(6, len(words)))
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._count = len(words)
        for place, word in enumerate(words if len(words) >= self._length else ()):
            self._places.setdefault(word, []).append(place)
        self._of_demands: EchoFilter | None = None
        if demands is not None and list(demands) != list(instruction):
            self._of_demands = EchoFilter(demands, silent, continuing)

    def __call__(self, content: list[int]) -> list[int]:
        """The content without the words that echo the instruction."""
        words = self._words(content) if self._places else []
        if not self._may_echo(words) or (self._of_demands and self._of_demands(content) is content):
            return content
        kept = self._kept(words)
        if len(kept) == len(words):
            return content
        starts = [start for start, _ in words]
        ends = dict(pairwise([*starts, len(content)]))
        return [
            *content[: starts[0]],
            *(token for start in kept for token in content[start : ends[start]]),
        ]

    def _may_echo(self, words: Sequence[tuple[int, tuple[int, ...]]]) -> bool:
        """Whether any words may be an echo; quick, and wrong only where it says that they may."""
        # By place: where in the document its word came last, and how long an echo may end there.
        # Nothing comes at the places before the first, which are the last of the lists.
        came = [-1 - self._BETWEEN - len(words)] * (self._count + 1 + self._SKIPPED)
        lengths = [0] * (self._count + 1 + self._SKIPPED)
        for now, (_, word) in enumerate(words):
            since = now - 1 - self._BETWEEN
            # From the last, so that no word follows itself.
            for place in reversed(self._places.get(word, [])):
                length = 1
                for earlier in range(place - 1, place - 2 - self._SKIPPED, -1):
                    if came[earlier] >= since:
                        length = max(length, lengths[earlier] + 1)
                if length >= self._length:
                    return True
                lengths[place] = max(length, lengths[place]) if came[place] >= since else length
                came[place] = now
        return False

    def _kept(self, words: Sequence[tuple[int, tuple[int, ...]]]) -> list[int]:
        """Where those words begin that are no part of an echo."""
        left = [_Seen(-1, ())]  # Stands for what is before the first word.
        waiting = [_Seen(start, word) for start, word in reversed(words)]
        while waiting:
            seen = waiting.pop()
            left.append(seen)
            places = self._link(left)
            if not places:
                continue
            place = max(places, key=lambda place: seen.links[place][0])
            index, echo = len(left) - 1, set[int]()
            while index > 0:
                echo.add(index)
                _, index, place = left[index].links[place]
            # What stood between the words of the echo is looked at anew, since it may be another
            # one together with what stands around.
            first = min(echo)
            span = list(enumerate(left[first:], first))
            del left[first:]
            last, again = left[-1], []
            for index, other in span:
                if index in echo:
                    last.reached |= other.reached
                else:
                    last = other
                    again.append(other)
            last.reached |= places
            waiting += reversed(again)
        return [seen.start for seen in left[1:]]

    def _link(self, left: Sequence[_Seen]) -> set[int]:
        """Link the last word to those before it; its places in the echoes that it is part of."""
        last = len(left) - 1
        seen, near = left[last], range(last - 1, max(-1, last - 2 - self._BETWEEN), -1)
        seen.links = {}
        goes_on: set[int] = set()
        for place in self._places.get(seen.word, ()):
            count, *before = 0, -1, -1
            for index, earlier in product(near, range(place - 1, place - 2 - self._SKIPPED, -1)):
                if earlier in left[index].reached:
                    left[index].reached.remove(earlier)
                    goes_on.add(place)
                elif (link := left[index].links.get(earlier)) and link[0] > count:
                    count, *before = link[0], index, earlier
            seen.links[place] = (count + 1, before[0], before[1])
        if goes_on:
            seen.links.update(dict.fromkeys(goes_on, (self._length, -1, -1)))
            return goes_on
        return {place for place, link in seen.links.items() if link[0] >= self._length}

    def _words(self, content: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        """Where each word begins, and its ids."""
        words: list[tuple[int, tuple[int, ...]]] = []
        for place, token in enumerate(content):
            if token in self._silent:
                continue
            if token in self._continuing and words:
                start, begun = words[-1]
                words[-1] = start, (*begun, token)
            else:
                words.append((place, (token,)))
        return words


class LaneTokenizer:
    """Turns each lane into `[CLS] content [SEP]`, with content that cannot contain a marker.

    Args:
        tokenizer: The model's tokenizer. It is copied, so that its settings are ours alone.
        budgets: Token limits of the lanes.
        cls_token: The token that opens a lane.
        sep_token: The token that closes a lane.

    Raises:
        ModelLoadError: The tokenizer does not have one of the two tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        budgets: LaneBudgets | None = None,
        *,
        cls_token: str = "[CLS]",
        sep_token: str = "[SEP]",
    ) -> None:
        """Look up the two tokens that frame a lane."""
        self.budgets = budgets or LaneBudgets()
        self._encoder = ContentEncoder(tokenizer)
        self.reserved_ids = self._encoder.reserved_ids
        """Ids that content can never produce: every special and added token."""
        self._cls, self._sep = _marker(tokenizer, cls_token), _marker(tokenizer, sep_token)
        prefix = getattr(tokenizer.model, "continuing_subword_prefix", None)
        vocabulary = tokenizer.get_vocab()
        self._continuing = frozenset(
            number for token, number in vocabulary.items() if prefix and token.startswith(prefix)
        )
        self._silent = frozenset(
            number for token, number in vocabulary.items() if not any(map(str.isalnum, token))
        )

    def content(self, text: str) -> list[int]:
        """The ids of a text, none of them reserved, and none for characters it cannot read."""
        return self._encoder.encode(text)

    def echoes(self, instruction: str) -> EchoFilter:
        """What leaves an instruction out of the documents that are read under it."""
        demands = _DEFINITION.sub(" ", instruction)
        whole, without = self.content(instruction), self.content(demands)
        return EchoFilter(whole, self._silent, self._continuing, without)

    def frame(self, content: Sequence[int]) -> tuple[int, ...]:
        """Content between the two tokens that open and close a lane."""
        return (self._cls, *content, self._sep)

    def trusted(self, lane: Lane, text: str) -> tuple[int, ...]:
        """The ids of the instruction or query lane, whole.

        Returns:
            The framed ids; for an empty instruction, no ids at all.

        Raises:
            InputError: The text is longer than the lane's budget, since a trusted lane is never cut
                (half a rule can mean its opposite); or an instruction holds nothing but
                characters that the tokenizer does not know.
        """
        if lane is Lane.INSTRUCTION and not text.strip():
            return ()
        budget = self.budgets.instruction if lane is Lane.INSTRUCTION else self.budgets.query
        ids = self.frame(self._encoder.beginning(text, budget))
        if len(ids) > budget:
            raise InputError(
                f"`{lane.name.lower()}` is longer than the {budget - 2} tokens this model reads "
                f"(it has {len(text)} characters, beginning {text[:40]!r}); shorten it"
            )
        # A query that cannot be read ranks badly, for all to see; an instruction would be lost.
        if lane is Lane.INSTRUCTION and len(ids) == len(self.frame(())):
            raise InputError(
                f"`instruction` has no character that this model can read: {text[:40]!r}; word it "
                "in a language of the model"
            )
        return ids

    def candidate(
        self,
        index: int,
        candidate: Candidate,
        long_documents: LongDocuments,
        echoes: EchoFilter | None = None,
    ) -> tuple[list[TokenizedCandidate], bool]:
        """The windows of one candidate, and whether a part of it is in none of them.

        With `"truncate"` there is one window, from the beginning of the document; with
        `"max_window"` windows overlap and cover the document to its end. What `echoes` leaves out
        is in no window, and does not count as cut.
        """
        budgets = self.budgets
        without_echoes = echoes or EchoFilter()
        attributes = without_echoes(self.content(candidate.attributes))
        cut = len(attributes) > budgets.attributes - 2
        framed = self.frame(attributes[: budgets.attributes - 2]) if attributes else ()
        room = budgets.document - 2
        if long_documents == "truncate":
            content = self._encoder.beginning(candidate.text, room, without_echoes)
            window = TokenizedCandidate(index, framed, self.frame(content[:room]))
            return [window], cut or len(content) > room
        content = without_echoes(self.content(candidate.text))
        step = room - budgets.window_overlap
        last = max(0, len(content) - budgets.window_overlap)
        starts = range(0, max(1, last), step)
        return [
            TokenizedCandidate(index, framed, self.frame(content[start : start + room]))
            for start in starts
        ], cut


def _marker(tokenizer: Tokenizer, token: str) -> int:
    token_id: int | None = tokenizer.token_to_id(token)
    if token_id is None:
        raise ModelLoadError(f"the tokenizer has no {token!r} token; use the model's own")
    return token_id
