"""From lanes of text to the ids of a prompt, for models that read one sequence.

Segments are tokenised one by one and meet as ids, so no content can spell a special token, and
what a document says cannot change the ids before or after it. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from lanerank.contracts import Candidate, LongDocuments
from lanerank.errors import InputError, ModelLoadError
from lanerank.lanes import ContentEncoder, clean_text, text_settings
from lanerank.template import Answer, PromptTemplate, Segment

_LEAST_ROOM = 16
"""Tokens that a document must have; with fewer there is nothing left to judge."""
_ATTRIBUTES_BUDGET = 128
"""Tokens of attributes repeated in each window of a long document."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids of a call that are the same for every document."""

    stages: tuple[tuple[int, ...], ...]
    """What comes before the document, in parts that may recur in later calls by themselves."""
    ending: tuple[int, ...]
    """What comes after the document; the answer is read at its last token."""
    document: Segment
    room: int
    """Tokens that the document's segment may have."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """All that comes before the document."""
        return tuple(token for stage in self.stages for token in stage)


@dataclass(frozen=True, slots=True)
class PromptWindow:
    """One window of a candidate with the ending of its prompt."""

    index: int
    """Position of the candidate in the request."""
    ids: tuple[int, ...]
    """The document's ids, then `Prompt.ending`."""

    def __len__(self) -> int:
        """The number of tokens to compute for this window."""
        return len(self.ids)


class PromptTokenizer:
    """Turns lanes into the ids of a contract's prompt.

    Args:
        tokenizer: The model's tokenizer. It is not changed.
        template: The contract, its chat template resolved.
        max_tokens: The longest prompt.

    Raises:
        ModelLoadError: The tokenizer does not fit the contract.
    """

    def __init__(self, tokenizer: Tokenizer, template: PromptTemplate, max_tokens: int) -> None:
        """Check the tokenizer against the contract and tokenise fixed text."""
        if template.chat:
            raise ModelLoadError(
                f"the contract {template.family!r} stands in a model's chat template; pass "
                "`template.in_chat(...)`"
            )
        self.template = template
        self.max_tokens = max_tokens
        self._content = ContentEncoder(
            tokenizer, continues=True, ordinary_tokens=template.ordinary_tokens
        )
        self.reserved_ids = self._content.reserved_ids
        """Ids that content can never produce: every special and added token."""
        opening, continuing = _plain(tokenizer), _plain(tokenizer, continues=True)
        for token in template.special_tokens:
            if _encode(opening, token) != [tokenizer.token_to_id(token)]:
                raise ModelLoadError(
                    f"the tokenizer does not have {token!r} as one token, which the contract "
                    f"{template.family!r} names; use the model's own tokenizer"
                )
        self._fixed = {
            (segment.fixed, first): _encode(opening if first else continuing, segment.fixed)
            for variant in (template.segments, template.segments_without_instruction or ())
            for segment in variant
            for first in (True, False)
            if segment.fixed is not None
        }
        if template.answers is None:
            raise ModelLoadError(f"the contract {template.family!r} has no `answers`")
        answers = (template.answers.positive, template.answers.negative)
        self.answer_ids = tuple(
            _answer(tokenizer, answer, template.family) for answer in answers if answer is not None
        )
        """The id of the positive answer and, where there is one, of the negative."""
        if len(set(self.answer_ids)) < len(self.answer_ids):
            raise ModelLoadError(f"both answers are the token {self.answer_ids[0]}")

    def prompt(self, query: str, instruction: str = "") -> Prompt:
        """The ids around the documents of a call.

        Raises:
            InputError: Instruction and query leave no room for a document. Neither is ever cut,
                because half a rule can mean its opposite.
        """
        segments, instruction = self.template.variant(instruction)
        texts = {"instruction": instruction, "query": query}
        stages: list[list[int]] = [[]]
        ending: list[int] = []
        document = None
        lanes = [segment.lane for segment in segments if segment.lane]
        for place, segment in enumerate(segments):
            if segment.lane == "document":
                document = segment
            elif document is None:
                stages[-1] += self._ids(segment, texts, first=place == 0)
                # An instruction that comes first is computed once for all queries.
                if segment.lane == "instruction" and lanes[:2] == ["instruction", "query"]:
                    stages.append([])
            else:
                ending += self._ids(segment, texts, first=False)
        used = sum(map(len, stages)) + len(ending)
        if document is None or (room := self.max_tokens - used) < _LEAST_ROOM:
            raise InputError(
                f"`instruction` and `query` leave no room for a document: the prompt has {used} "
                f"tokens without one (instruction {len(instruction)}, query {len(query)} "
                f"characters), and this model reads {self.max_tokens}; shorten them"
            )
        return Prompt(
            tuple(tuple(stage) for stage in stages if stage), tuple(ending), document, room
        )

    def windows(
        self, index: int, candidate: Candidate, long_documents: LongDocuments, prompt: Prompt
    ) -> tuple[list[PromptWindow], bool]:
        """The windows of one candidate, and whether a part of it is in none of them.

        Attributes stand in front of the document's text, on a line of their own, in each window.
        """
        segment, room = prompt.document, prompt.room
        before, text = self._document(segment, candidate)
        whole = self._content.beginning(before + text + segment.after, room)
        if len(whole) <= room:
            return [PromptWindow(index, (*whole, *prompt.ending))], False
        after = self._content.encode(segment.after)
        ending = (*after, *prompt.ending)
        if long_documents == "truncate":
            kept = self._content.beginning(before + text, room)[: room - len(after)]
            return [PromptWindow(index, (*kept, *ending))], True
        head = self._content.encode(before)
        limit = min(_ATTRIBUTES_BUDGET, room // 2)
        head, cut = head[:limit], len(head) > limit
        content = self._content.encode(text)
        space = room - len(head) - len(after)
        overlap = space // 8
        starts = range(0, max(1, len(content) - overlap), space - overlap)
        return [
            PromptWindow(index, (*head, *content[start : start + space], *ending))
            for start in starts
        ], cut

    def _document(self, segment: Segment, candidate: Candidate) -> tuple[str, str]:
        attributes = clean_text(candidate.attributes).strip()
        text = clean_text(candidate.text)
        if not attributes:
            return segment.before, self.template.content(segment, text)
        # Neutralised as one text, so that no marker can lie across the two; the length stays.
        joined = self.template.content(segment, f"{attributes}\n{text}")
        end = len(attributes) + 1
        return segment.before + joined[:end], joined[end:]

    def _ids(self, segment: Segment, texts: dict[str, str], *, first: bool) -> list[int]:
        if segment.lane is None:
            return self._fixed[segment.fixed or "", first]
        content = self.template.content(segment, clean_text(texts[segment.lane]))
        return self._content.encode(segment.before + content + segment.after)


def _plain(tokenizer: Tokenizer, *, continues: bool = False) -> Tokenizer:
    """A tokenizer for text of the template, whose special tokens count."""
    normalizer, pre_tokenizer = text_settings(tokenizer, continues=continues)
    usual = text_settings(tokenizer)
    as_it_is = str(usual) == str((normalizer, pre_tokenizer))
    if as_it_is and tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.normalizer, copy.pre_tokenizer = normalizer, pre_tokenizer
    return copy


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _answer(tokenizer: Tokenizer, answer: Answer, family: str) -> int:
    found: int | None = tokenizer.token_to_id(answer.token)
    if found is None or (answer.id is not None and found != answer.id):
        raise ModelLoadError(
            f"the answer {answer.token!r} of the contract {family!r} is the token {found} here, "
            f"not {answer.id if answer.id is not None else 'one token'}; this is not the "
            "tokenizer that the contract was written for"
        )
    shown = tokenizer.decode([found], skip_special_tokens=False)
    if shown.strip() != answer.token:
        raise ModelLoadError(
            f"the answer {answer.token!r} of the contract {family!r} reads {shown!r} as a token; "
            "name a token that stands for its own text"
        )
    return found


@dataclass(frozen=True, slots=True)
class PairWindow:
    """Query and one window of a candidate, framed as the model's tokenizer frames a pair."""

    index: int
    ids: tuple[int, ...]
    types: tuple[int, ...]
    """The segment number of each token, for models that use it."""

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.ids)


class PairTokenizer:
    """Joins query and document as a cross-encoder's tokenizer joins a pair, by ids.

    Args:
        tokenizer: The model's tokenizer. It is not changed.
        max_tokens: The longest pair.

    Raises:
        ModelLoadError: The tokenizer does not frame pairs.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Read the frame off an example."""
        self.max_tokens = max_tokens
        # The unknown token stays: it marks no lane, and the model was trained on it.
        self._content = ContentEncoder(tokenizer, keep_unknown=True)
        self.reserved_ids = self._content.reserved_ids
        """Ids that content can never produce."""
        example = _plain(tokenizer).encode("a", "a")
        parts: list[list[tuple[int, int]]] = [[]]
        last: int | None = None
        for token, kind, sequence in zip(
            example.ids, example.type_ids, example.sequence_ids, strict=True
        ):
            if sequence is None:
                parts[-1].append((token, kind))
            elif sequence != last:
                parts.append([])
                last = sequence
        self._types = tuple(
            next(
                kind
                for kind, found in zip(example.type_ids, example.sequence_ids, strict=True)
                if found == sequence
            )
            for sequence in (0, 1)
        )
        if len(parts) != 3 or not parts[1]:
            raise ModelLoadError(
                "the tokenizer puts nothing between the two texts of a pair; it does not belong "
                "to a cross-encoder"
            )
        self._frame = parts

    def query(self, text: str) -> tuple[int, ...]:
        """The ids of the query.

        Raises:
            InputError: The query leaves no room for a document.
        """
        ids = self._content.encode(text)
        if self._room(ids) < _LEAST_ROOM:
            raise InputError(
                f"`query` has {len(ids)} tokens and leaves no room for a document: this model "
                f"reads {self.max_tokens} in all; shorten it"
            )
        return tuple(ids)

    def windows(
        self,
        index: int,
        candidate: Candidate,
        long_documents: LongDocuments,
        query: tuple[int, ...],
    ) -> tuple[list[PairWindow], bool]:
        """The windows of one candidate, and whether a part of it is in none of them."""
        attributes = candidate.attributes.strip()
        text = f"{attributes}\n{candidate.text}" if attributes else candidate.text
        room = self._room(query)
        content = self._content.encode(text)
        if len(content) <= room or long_documents == "truncate":
            return [self._window(index, query, content[:room])], len(content) > room
        head = self._content.encode(f"{attributes}\n") if attributes else []
        limit = min(_ATTRIBUTES_BUDGET, room // 2)
        head, cut = head[:limit], len(head) > limit
        content = self._content.encode(candidate.text)
        space = room - len(head)
        overlap = space // 8
        starts = range(0, max(1, len(content) - overlap), space - overlap)
        return [
            self._window(index, query, [*head, *content[start : start + space]]) for start in starts
        ], cut

    def _room(self, query: Sequence[int]) -> int:
        return self.max_tokens - len(query) - sum(map(len, self._frame))

    def _window(self, index: int, query: Sequence[int], document: Sequence[int]) -> PairWindow:
        first, second = self._types
        opening, middle, closing = self._frame
        pairs = [
            *opening,
            *((token, first) for token in query),
            *middle,
            *((token, second) for token in document),
            *closing,
        ]
        return PairWindow(
            index, tuple(token for token, _ in pairs), tuple(kind for _, kind in pairs)
        )
