"""Judges without a model, and entries for them to judge."""

from __future__ import annotations

import json
import threading
from collections import Counter

from lanerank.training.judge import Judge
from lanerank.training.pairing import plan_pairs
from lanerank.training.panel import JudgePanel
from lanerank.training.questions import Entry


def entry(document: str, query: str = "fish", instruction: str | None = "Prefer red.", **fields):
    return Entry(query=query, instruction=instruction, document=document, **fields)


ENTRIES = [entry(f"fish number {number}") for number in range(8)]
PAIRS = plan_pairs(ENTRIES, games=4)


def shown(prompt: str) -> dict:
    """The JSON object that a judge is shown."""
    return json.loads(prompt.rpartition("\n\n")[2])


def answer(preference: object, reason: str = "because") -> str:
    return json.dumps({"reason": reason, "preference": preference})


class Counting:
    """Prefers the higher number, and counts its calls by what was asked."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self.fail_after = fail_after
        self._lock = threading.Lock()

    def __call__(self, prompt: str) -> str:
        with self._lock:
            if self.fail_after is not None and self.calls.total() >= self.fail_after:
                raise RuntimeError("the line is down")
            self.calls[prompt] += 1
        data = shown(prompt)
        a, b = (int(data[name]["text"].split()[2]) for name in ("document_A", "document_B"))
        return answer((a - b) / 8)


def panel(model: object, **options) -> JudgePanel:
    return JudgePanel(Judge(model, name="judge", wait=0), **options)
