"""Pictures for reports: SVG without script, built as a tree like everything that is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lanerank.display import Element, element, one_line
from lanerank.evaluation.measures import Estimate

_BLUE, _ORANGE = "#0072B2", "#D55E00"
_LABEL_COLUMNS = 44


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One line of an interval chart."""

    label: str
    estimate: Estimate
    baseline: Estimate | None = None
    """Drawn in another colour below, such as the value of a random order."""


def interval_chart(title: str, bars: Sequence[Bar], *, low: float, high: float) -> Element:
    """Values with their intervals on a common scale, one line each.

    Args:
        title: What a screen reader says.
        bars: The lines, from the top.
        low: The left end of the scale; the scale grows where a value lies outside.
        high: The right end.
    """
    shown = [each for bar in bars for each in (bar.estimate, bar.baseline) if each is not None]
    low = min([low, *(each.low for each in shown)])
    high = max([high, *(each.high for each in shown)])
    left, width, pitch, top = 290, 420, 26, 24

    def x(value: float) -> float:
        return round(left + width * (value - low) / ((high - low) or 1), 1)

    bottom = top + pitch * len(bars)
    parts: list[Element] = []
    for tick in _ticks(low, high):
        parts.append(element("path", {"class": "guide", "d": f"M{x(tick)} {top - 6}V{bottom}"}))
        parts.append(
            element("text", {"class": "soft middle", "x": x(tick), "y": top - 10}, f"{tick:g}")
        )
    for row, bar in enumerate(bars):
        y = top + pitch * (row + 0.5)
        parts.append(
            element(
                "text",
                {"class": "before", "x": left - 14, "y": y + 4},
                one_line(bar.label, _LABEL_COLUMNS),
            )
        )
        lines = [(bar.estimate, _BLUE, y if bar.baseline is None else y - 4)]
        if bar.baseline is not None:
            lines.append((bar.baseline, "gray", y + 5))
        for estimate, ink, height in lines:
            tip = f"{estimate.value:.3f} [{estimate.bounds()}], n {estimate.n}"
            parts.append(
                element(
                    "g",
                    {"stroke": ink, "fill": ink},
                    element("title", {}, tip),
                    element(
                        "path",
                        {
                            "d": f"M{x(estimate.low)} {height}H{x(estimate.high)}",
                            "stroke-width": 3,
                            "stroke-opacity": 0.45,
                        },
                    ),
                    element("circle", {"cx": x(estimate.value), "cy": height, "r": 4}),
                )
            )
        parts.append(
            element(
                "text",
                {"x": left + width + 14, "y": y + 4, "class": "soft"},
                f"{bar.estimate.value:.3f}",
            )
        )
    return _svg(title, left + width + 70, bottom + 8, parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One bin of a reliability diagram."""

    score: float
    """The mean score in the bin."""
    share: float
    """The share of relevant documents in the bin."""
    low: float
    """The lower bound of the share."""
    high: float
    """The upper bound of the share."""
    count: int
    """How many pairs the bin has."""


def reliability_diagram(title: str, points: Sequence[Point]) -> Element:
    """Scores against the share that is relevant; on the diagonal a score means what it says."""
    left, top, size = 46, 22, 300

    def x(value: float) -> float:
        return round(left + size * value, 1)

    def y(value: float) -> float:
        return round(top + size * (1 - value), 1)

    parts = [
        element("path", {"class": "guide", "d": f"M{x(0)} {y(0)}L{x(1)} {y(1)}"}),
        element(
            "path",
            {"class": "guide", "fill": "none", "d": f"M{x(0)} {y(1)}V{y(0)}H{x(1)}"},
        ),
        element("text", {"class": "middle", "x": x(0.5), "y": y(0) + 34}, "mean score in the bin"),
        element("text", {"x": left - 40, "y": top - 8}, one_line(title, 60)),
    ]
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(
            element("text", {"class": "soft middle", "x": x(tick), "y": y(0) + 16}, f"{tick:g}")
        )
        parts.append(
            element("text", {"class": "before soft", "x": x(0) - 8, "y": y(tick) + 4}, f"{tick:g}")
        )
    largest = max((point.count for point in points), default=1)
    for point in points:
        ink = _ORANGE if not point.low <= point.score <= point.high else _BLUE
        tip = (
            f"score {point.score:.3f}, relevant {point.share:.3f} "
            f"[{point.low:.3f}, {point.high:.3f}], {point.count} pairs"
        )
        parts.append(
            element(
                "g",
                {"stroke": ink, "fill": ink},
                element("title", {}, tip),
                element(
                    "path",
                    {
                        "d": f"M{x(point.score)} {y(point.low)}V{y(point.high)}",
                        "stroke-width": 2,
                        "stroke-opacity": 0.45,
                    },
                ),
                element(
                    "circle",
                    {
                        "cx": x(point.score),
                        "cy": y(point.share),
                        "r": round(2.5 + 3.5 * math.sqrt(point.count / largest), 1),
                    },
                ),
            )
        )
    return _svg(f"Reliability diagram: {title}", left + size + 20, top + size + 44, parts)


def _ticks(low: float, high: float) -> list[float]:
    """Between three and eight round numbers in a range."""
    power = 10.0 ** math.floor(math.log10((high - low) or 1))
    # In the range are 1 to 10 of `power`; the steps are chosen so that one of them always fits.
    step = next(s for s in (power / 5, power / 2, power, 2 * power) if (high - low) / s <= 7)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(step * number, 10) for number in range(first, last + 1)]


def _svg(title: str, width: float, height: float, parts: Sequence[Element]) -> Element:
    return element(
        "svg",
        {
            "viewBox": f"0 0 {width} {height}",
            "style": f"width: 100%; max-width: {width}px",
            "role": "img",
            "aria-label": one_line(title, 120),
        },
        *parts,
    )
