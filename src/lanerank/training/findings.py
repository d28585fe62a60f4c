"""What checks report, and the parts of a data set that they look at."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from itertools import islice
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from lanerank.display import Content, Element, element, fragment, one_line, table
from lanerank.evaluation.measures import Estimate
from lanerank.evaluation.sections import headings
from lanerank.evaluation.sections import words as paragraph
from lanerank.training.quadruples import Quadruple

Severity = Literal["ok", "hint", "warning", "error"]
"""How bad a finding is: an `error` defeats the training, a `warning` costs quality, a `hint` is for
the reader to judge."""

CHANGE = 0.2
"""From this difference on two scores of a document are different, and not noise of the judge."""

_ROUNDING = 1e-9
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_EXAMPLES = 3
_EXAMPLE_WIDTH = 100

Setting = tuple[str | None, date | None]
"""The instruction under which a row was scored, and the day."""


class Finding(BaseModel):
    """What one check found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str
    """The name of the check."""
    severity: Severity
    value: float | None
    """The measured number, which `message` explains; `None` where there was nothing to measure."""
    interval: tuple[float, float] | None = None
    """Its 95% bootstrap interval over queries; `None` where the number is no mean over queries."""
    message: str
    """What was measured, in words."""
    examples: tuple[str, ...] = ()
    """Some of the worst cases, on one line each with shortened texts; none where all is well."""
    remedy: str = ""
    """What to do; empty where all is well."""


class CheckReport(BaseModel):
    """What `check` found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    queries: int
    findings: tuple[Finding, ...]
    """One for each check, also where all is well."""

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are not `ok`, the worst first."""
        bad = [finding for finding in self.findings if finding.severity != "ok"]
        order = get_args(Severity)
        return tuple(sorted(bad, key=lambda finding: -order.index(finding.severity)))

    @property
    def passed(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(finding.severity in ("ok", "hint") for finding in self.findings)

    @property
    def defeats_training(self) -> bool:
        """Whether there is an error."""
        return any(finding.severity == "error" for finding in self.findings)

    def _repr_html_(self) -> str:
        """A table, the worst first, for notebooks."""
        well = [finding for finding in self.findings if finding.severity == "ok"]
        return fragment(
            paragraph(f"{self.rows} rows of {self.queries} queries"),
            table(
                headings(("severity", "value", "check"), texts=(2,)),
                [_cells(each) for each in (*self.problems, *well)],
            ),
        )


def _cells(found: Finding) -> tuple[Element, ...]:
    parts: list[Content] = [
        element("div", {}, element("b", {}, found.check)),
        element("div", {}, f"{found.message}."),
    ]
    if found.remedy:
        parts.append(element("div", {}, f"{found.remedy}."))
    parts += [
        element("div", {"class": "soft"}, element("bdi", {}, case)) for case in found.examples
    ]
    return (
        element("td", {"class": "number"}, found.severity),
        element("td", {"class": "number"}, "" if found.value is None else f"{found.value:.3g}"),
        element("td", {"class": "text"}, *parts),
    )


def finding(
    name: str,
    severity: Severity,
    value: Estimate | float | None,
    message: str,
    remedy: str,
    examples: Iterable[str] = (),
) -> Finding:
    """A finding that keeps a few of the examples, and those and the remedy only where needed."""
    bad = severity != "ok"
    return Finding(
        check=name,
        severity=severity,
        value=value.value if isinstance(value, Estimate) else value,
        interval=(value.low, value.high) if isinstance(value, Estimate) else None,
        message=message,
        examples=tuple(islice(examples, _EXAMPLES)) if bad else (),
        remedy=remedy if bad else "",
    )


def differ(scores: Iterable[float]) -> bool:
    """Whether the highest and the lowest score differ by `CHANGE` or more."""
    values = list(scores)
    return max(values) - min(values) >= CHANGE - _ROUNDING


def setting(row: Quadruple) -> Setting:
    """What else than the query decides how a document scores."""
    return row.instruction, row.today


def lists(group: Iterable[Quadruple]) -> Iterable[list[Quadruple]]:
    """The rows of a query under each setting of the instruction."""
    found: dict[Setting, list[Quadruple]] = defaultdict(list)
    for row in group:
        found[setting(row)].append(row)
    return found.values()


def words(text: str) -> list[str]:
    """The words of a text; a Chinese or Japanese character counts as one."""
    return _WORD.findall(text)


def quoted(text: str) -> str:
    """The beginning of a text, in quotes and on one line."""
    return f"“{one_line(text, _EXAMPLE_WIDTH)}”"
