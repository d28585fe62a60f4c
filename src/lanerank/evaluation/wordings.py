"""Texts that stand in the place of an instruction: reworded, negated, lengthened, another one."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from lanerank.errors import InputError
from lanerank.evaluation.scenarios import INSTRUCTED_KINDS, Scenario
from lanerank.instruction import Instruction

Condition = Literal["withheld", "matched", "irrelevant", "negated", "long", "paraphrased"]
"""What stands in the place of a lane's instruction: nothing, itself, the instruction of a scenario
of another domain, its opposite, itself amid boilerplate, itself in other words."""

CONDITIONS: tuple[Condition, ...] = get_args(Condition)
"""Every condition, in the order of reports."""

Wordings = Mapping[tuple[Condition, str], str | None]
"""Texts by condition and name; the name is empty where a condition has a single text."""

_PREFIXES = {
    "please_note": "Please note: ",
    "context": "Context for this search: ",
    "in_mind": "Rank the results with this in mind. ",
}
_SUFFIXES = {"take_into_account": "Please take this into account."}
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")

_NEGATION = "Leave out every document that fits the following, and keep the rest: "

# Some 400 tokens of English, of which the lane encoder reads 512. One token is about five
# characters of it, while a character of another script can be a token of its own.
_LONG_SIZE = 2_000
_BOILERPLATE = (
    "This service is provided by the group's central office.",
    "It is available on every day of the year, apart from announced maintenance.",
    "Maintenance is announced at least five working days ahead.",
    "By using the service you accept the terms that were sent to you when your account was opened.",
    "Accounts are personal and must not be shared with colleagues.",
    "Passwords are changed every ninety days, and nobody will ever ask you for yours.",
    "Sessions end by themselves after thirty minutes without activity.",
    "Requests are logged so that faults can be traced, and the logs are deleted after four weeks.",
    "We thank all departments for their patience during the move to the new platform.",
    "The look of the pages may differ slightly between browsers.",
    "If a page does not load, wait a moment and try again before you report a fault.",
    "Faults are reported with the form that is linked at the bottom of each page.",
    "Please give your telephone extension so that we can call you back.",
    "The office answers most messages within one working day.",
    "Suggestions for improvement are welcome and are discussed once a month.",
    "A short introduction for new colleagues takes place on the first Monday of each month.",
    "Places are limited, and a line manager has to agree.",
    "The canteen, the post room and the parking lot are run by the building's owner.",
    "Visitors sign in at the reception desk and wear a badge.",
    "Printing is charged to the cost centre that is entered in your profile.",
    "Changes of name or cost centre take effect on the following day.",
    "Lost property is kept at the reception desk for six months.",
    "Meeting rooms are booked in the calendar and released if nobody turns up within ten minutes.",
    "The wording of this notice has been agreed with the works council.",
    "An earlier notice with the same title is hereby replaced.",
    "This notice is reviewed once a year and carries no signature.",
)


class Wording:
    """The texts that stand in the place of an instruction."""

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        conditions: Collection[Condition],
        paraphrases: Mapping[str, Sequence[str]],
        negations: Mapping[str, str],
        seed: int,
    ) -> None:
        """Check the texts that were given; the conditions are those of `measure_following`."""
        unknown = {conditions} if isinstance(conditions, str) else {*conditions} - {*CONDITIONS}
        if unknown:
            raise InputError(
                f"`conditions` must be a list of {', '.join(map(repr, CONDITIONS))}; got "
                f"{reprlib.repr(conditions)}"
            )
        wanted = {"withheld", "matched", *conditions}
        self.conditions = tuple(condition for condition in CONDITIONS if condition in wanted)
        self._instructions = [
            (scenario.domain, lane.instruction)
            for scenario in scenarios
            for lane in scenario.lanes
            if lane.instruction and lane.kind in INSTRUCTED_KINDS
        ]
        self._paraphrases = self._supplied("paraphrases", "paraphrased", paraphrases)
        opposites = {text: [opposite] for text, opposite in negations.items()}
        self._negations = self._supplied("negations", "negated", opposites)
        self._rng = np.random.default_rng(seed)

    def _supplied(
        self, name: str, condition: Condition, given: Mapping[str, Sequence[str]]
    ) -> Mapping[str, Sequence[str]]:
        if given and condition not in self.conditions:
            raise InputError(f"`{name}` needs {condition!r} among the `conditions`")
        known = {text for _, text in self._instructions}
        for text, others in given.items():
            if text not in known:
                raise InputError(
                    f"`{name}`: no instructed lane has the instruction {reprlib.repr(text)}; give "
                    "its text exactly as in the scenarios"
                )
            if isinstance(others, str) or not all(isinstance(t, str) and t.strip() for t in others):
                raise InputError(
                    f"`{name}`: expected texts that are not blank, got {reprlib.repr(others)} for "
                    f"{reprlib.repr(text)}"
                )
        return given

    def foreign(self, domain: str) -> str | None:
        """The instruction of a scenario of another domain, if there is one."""
        others = [text for other, text in self._instructions if other != domain]
        return others[self._rng.integers(len(others))] if others else None

    def of(self, text: str, foreign: str | None) -> Wordings:
        """The texts in the place of one instruction, `withheld` and `matched` first."""
        supplied = enumerate(self._paraphrases.get(text, ()), start=1)
        texts: dict[Condition, Mapping[str, str | None]] = {
            "withheld": {"": None},
            "matched": {"": text},
            "irrelevant": {"": foreign} if foreign else {},
            "negated": {"": self._negations.get(text, [_NEGATION + text])[0]},
            "long": _lengthened(text),
            "paraphrased": _reworded(text) | {f"supplied_{i}": other for i, other in supplied},
        }
        return {
            (condition, name): wording
            for condition in self.conditions
            for name, wording in texts[condition].items()
        }


def _reworded(text: str) -> dict[str, str | None]:
    wordings: dict[str, str | None] = {name: prefix + text for name, prefix in _PREFIXES.items()}
    for name, suffix in _SUFFIXES.items():
        wordings[name] = (Instruction(text) + suffix).render()
    first, *rest = _SENTENCE_BREAK.split(text.strip())
    if rest:
        wordings["rotated"] = (Instruction(" ".join(rest)) + first).render()
    return wordings


def _lengthened(text: str) -> dict[str, str | None]:
    room = _LONG_SIZE - sum(1 if letter.isascii() else 5 for letter in text)
    lengths = np.cumsum([len(sentence) + 1 for sentence in _BOILERPLATE])
    notice = " ".join(_BOILERPLATE[: int(np.searchsorted(lengths, room, side="right"))])
    if not notice:
        return {}
    return {
        "rule_first": (Instruction(text) + notice).render(),
        "rule_last": (Instruction(notice) + text).render(),
    }
