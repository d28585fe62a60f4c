"""Which attacks go into which documents: drawn evenly, the same for the same seed."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

from lanerank.contracts import Document
from lanerank.evaluation.attacks import Attack, Position, neutral_text
from lanerank.evaluation.scenarios import Scenario, ScenarioLane, attribute_fields
from lanerank.instruction import Instruction
from lanerank.lanes import render_attributes

SHARES = (0.1, 0.3)
"""The shares of the irrelevant documents that are attacked at once; a strike is on the larger."""

_STRIKES_PER_LANE = 5


class Card(NamedTuple):
    """An attack in one form."""

    attack: Attack
    position: Position
    repeats: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A lane of a scenario that has an instruction and documents to attack."""

    number: int
    """The scenario's, and so the cluster of everything that is measured here."""
    scenario: Scenario
    lane: ScenarioLane
    targets: tuple[int, ...]
    """Which documents may be attacked."""

    @property
    def instruction(self) -> Instruction:
        """The instruction with its date."""
        return Instruction(self.lane.instruction, today=self.scenario.today)

    @property
    def grades(self) -> list[int]:
        """The grades of the scenario's documents."""
        return [self.lane.grades[document.id] for document in self.scenario.documents]

    @property
    def documents(self) -> list[Document]:
        """The scenario's documents, clean."""
        return [
            Document(document.text, metadata=document.metadata, id=document.id)
            for document in self.scenario.documents
        ]

    def at_once(self, share: float) -> int:
        """How many documents are attacked where a share of those that may be is."""
        # Rounded first, because 0.1 * 30 is a little above 3.
        return math.ceil(round(share * len(self.targets), 9))

    def placeholders(self) -> dict[str, str]:
        """What the placeholders of attacks stand for; no attribute where no document has one."""
        values = {"query": self.scenario.query, "instruction": self.lane.instruction or ""}
        fields, today = attribute_fields(self.scenario), self.scenario.today
        graded = zip(self.grades, self.scenario.documents, strict=True)
        for grade, document in sorted(graded, key=lambda pair: -pair[0]):
            line = render_attributes(document.metadata, fields, today)
            if grade and line:
                return {**values, "attribute": line}
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """An attack in one form, put into some documents of a lane."""

    card: Card
    targets: tuple[int, ...]
    text: str
    """What is put in."""
    control: str
    """What is put in instead, to compare."""


def find_settings(scenarios: Sequence[Scenario], seed: int) -> list[Setting]:
    """The lanes where there is something to attack, in random order.

    One lane of every scenario comes first, then a second one of each, and so on: a sample then has
    as many different scenarios as it can.
    """
    rng = random.Random(f"{seed} settings")
    turns: list[tuple[int, Setting]] = []
    for number, scenario in rng.sample(list(enumerate(scenarios)), len(scenarios)):
        found = []
        for lane in scenario.lanes:
            targets = tuple(
                place
                for place, document in enumerate(scenario.documents)
                if lane.grades[document.id] == 0 and not document.injected
            )
            if lane.instruction and targets:
                found.append(Setting(number=number, scenario=scenario, lane=lane, targets=targets))
        turns += enumerate(rng.sample(found, len(found)))
    return [setting for _, setting in sorted(turns, key=lambda turn: turn[0])]


class Dealer:
    """Deals what was dealt least so far, by chance where several were.

    Families come up equally often, and in each of them wordings, positions and repeats, as far as
    they can be used where it is their turn.
    """

    def __init__(self, cards: Iterable[Card], prose: Sequence[str], seed: int) -> None:
        """Take the forms of attacks, and the prose and the seed of their controls."""
        self._prose, self._seed = prose, seed
        self._rng = random.Random(f"{seed} strikes")
        self._families: dict[str, list[Card]] = {}
        for card in cards:
            self._families.setdefault(card.attack.family, []).append(card)
        self._times: Counter[tuple[str, object]] = Counter()

    def deal(self, setting: Setting, before: Sequence[Strike]) -> list[Strike]:
        """Some strikes for a lane, different from those that it had before."""
        values = setting.placeholders()
        had = {strike.card for strike in before}
        fresh = {
            family: [c for c in cards if c not in had and c.attack.placeholders <= values.keys()]
            for family, cards in self._families.items()
        }
        strikes: list[Strike] = []
        while len(strikes) < _STRIKES_PER_LANE and any(fresh.values()):
            family = min((name for name in fresh if fresh[name]), key=self._family_turn)
            card = min(fresh[family], key=self._card_turn)
            fresh[family].remove(card)
            self._times.update(_kinds(card))
            text = card.attack.fill(values, repeats=card.repeats)
            targets = self._rng.sample(setting.targets, setting.at_once(max(SHARES)))
            control = neutral_text(text, self._prose, seed=self._seed)
            strikes.append(Strike(card=card, targets=tuple(targets), text=text, control=control))
        return strikes

    def _family_turn(self, family: str) -> tuple[float, ...]:
        return self._times["family", family], self._rng.random()

    def _card_turn(self, card: Card) -> tuple[float, ...]:
        return *(self._times[kind] for kind in _kinds(card)[1:]), self._rng.random()


def _kinds(card: Card) -> list[tuple[str, object]]:
    family = card.attack.family
    of_family = [(family, card.attack.id), (family, card.position), (family, card.repeats)]
    return [("family", family), *of_family]


Plan = list[tuple[Setting, list[Strike]]]


def plan_strikes(settings: Sequence[Setting], dealer: Dealer, sample: int) -> Plan:
    """Strikes for lane after lane, until the sample is used up or nothing is left to deal."""
    plan: Plan = [(setting, []) for setting in settings]
    spent = idle = 0
    for setting, strikes in cycle(plan):
        more = dealer.deal(setting, strikes)
        extra = cost(setting, [*strikes, *more]) - cost(setting, strikes)
        idle = 0 if more else idle + 1
        if idle == len(plan) or (spent and spent + extra > sample):
            break
        strikes += more
        spent += extra
    return [(setting, strikes) for setting, strikes in plan if strikes]


def cost(setting: Setting, strikes: Sequence[Strike]) -> int:
    """How many documents are scored: the list, and each target with attack and control.

    Attack and control are put into the document once, and into the instruction once.
    """
    clean = len(setting.scenario.documents) if strikes else 0
    return clean + sum(4 * len(strike.targets) for strike in strikes)
