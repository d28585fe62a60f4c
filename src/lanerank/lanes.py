"""From lanes of text to token ids: marker integrity, budgets, attributes and windows.

Every lane is tokenised on its own and lanes meet only as lists of token ids, so nothing that a
text says can move a token into another lane. Nothing here needs torch.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from tokenizers import Tokenizer, models
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from lanerank.contracts import Candidate, Lane, LongDocuments
from lanerank.errors import InputError, ModelLoadError

_MAX_ATTRIBUTE_CHARS = 200
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}(?:$|[T ])")
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
    for field in fields:
        value = metadata.get(field)
        # A value that brought its own separator could pass for another field.
        text = " ".join(clean_text(_as_text(value)).split()).translate(_SEMICOLONS)
        if not text:
            continue
        date = _as_date(value) if today else None
        age = f" ({describe_age(date, today)})" if date and today else ""
        parts.append(f"{clean_text(field)}: {text[:_MAX_ATTRIBUTE_CHARS]}{age}")
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


class EchoFilter:
    """Leaves out what a document repeats of an instruction, word for word, as the model reads both.

    Nothing resembles an instruction more than the instruction itself, so a document that guesses
    it, or has read it in another answer, could lift itself by saying it again. Six words in a row,
    or all of an instruction of four or five, are no coincidence: of 86,877 honest pairs of an
    instruction and a document in the project's scenarios, one shares as many. Words are compared as
    ids, so that what a tokenizer drops or folds disguises nothing. An echo in other words is for
    the model to resist.

    Args:
        instruction: The ids of an instruction; from one of fewer than four words nothing is left
            out.
        silent: Ids without a letter or digit, which no word is made of.
        continuing: Ids that continue a word.
    """

    def __init__(
        self,
        instruction: Sequence[int] = (),
        silent: Container[int] = (),
        continuing: Container[int] = (),
    ) -> None:
        """Note the runs of words to look for."""
        self._silent, self._continuing = silent, continuing
        words = [word for _, word in self._words(instruction)]
        self._length = max(4, min(6, len(words)))
        self._runs = set(zip(*(words[i:] for i in range(self._length)), strict=False))

    def __call__(self, content: list[int]) -> list[int]:
        """The content without any run of words that the instruction has too."""
        if not self._runs:
            return content
        kept: list[tuple[int, tuple[int, ...]]] = []
        echoed: tuple[tuple[int, ...], ...] = ()
        words = self._words(content)
        for start, word in words:
            run = (*echoed[1:], word)
            if echoed and run in self._runs:  # The echo goes on.
                echoed = run
                continue
            kept.append((start, word))
            echoed = tuple(each for _, each in kept[-self._length :])
            if echoed in self._runs:
                # Words to either side of an echo may be another one, put around it.
                del kept[-self._length :]
            else:
                echoed = ()
        if len(kept) == len(words):
            return content
        starts = [start for start, _ in words]
        ends = dict(pairwise([*starts, len(content)]))
        return [
            *content[: starts[0]],
            *(token for start, _ in kept for token in content[start : ends[start]]),
        ]

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
        return EchoFilter(self.content(instruction), self._silent, self._continuing)

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
