"""From a model's score to a probability: fitted once, saved beside the model, applied by a wrapper.

>>> calibrator = Calibrator(method="platt", slope=0.5, intercept=-1.0, pairs=1000)
>>> calibrator.apply([0.1, 0.5, 0.9]).round(3).tolist()
[0.109, 0.269, 0.525]
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from uuid import uuid4

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from lanerank.contracts import AsyncScorer, ManyScorer, RerankRequest, Scorer, Scores
from lanerank.errors import (
    InputError,
    LanerankError,
    MissingExtraError,
    ModelLoadError,
    ScorerError,
)

FloatArray = NDArray[np.float64]
CalibrationMethod = Literal["temperature", "platt", "isotonic"]

CALIBRATION_FILE = "calibration.json"
"""The name of a calibrator that lies beside a model's weights."""

_STEEPEST = 1e3
_CLIP = 1e-12
"""Scores nearer to 0 or 1 count as this near, so that their logits are finite: at most 27.6."""
_PARAMETERS = {
    "temperature": ("temperature",),
    "platt": ("slope", "intercept"),
    "isotonic": ("knots",),
}

_Factor = Annotated[StrictFloat, Field(ge=1 / _STEEPEST, le=_STEEPEST)]
_Share = Annotated[StrictFloat, Field(ge=0, le=1)]


def _writable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("expected text without surrogates, which no file can hold") from error
    return text


class Calibrator(BaseModel):
    """A rising map from a model's score to the probability that the document is relevant.

    | method | map, with `z = log(s / (1 - s))` | parameters |
    |---|---|---|
    | `"temperature"` | `sigmoid(z / temperature)` (Guo et al., ICML 2017): 0.5 stays 0.5 | 1 |
    | `"platt"` | `sigmoid(slope * z + intercept)` (Platt, 1999) | 2 |
    | `"isotonic"` | straight lines between knots (Zadrozny and Elkan, KDD 2002) | many |

    No method ever turns two documents round. Temperature and Platt scaling also keep scores apart
    as far as floats can: those within 1e-12 of 0 or of 1 count as equal, and a steep slope runs
    into 0 or 1. Isotonic regression is flat in places: there documents tie, and a ranking keeps
    them in input order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: CalibrationMethod
    temperature: _Factor | None = None
    """Above 1 the model was too sure of itself."""
    slope: _Factor | None = None
    intercept: Annotated[StrictFloat, Field(ge=-_STEEPEST, le=_STEEPEST)] | None = None
    """Below 0 the model gave too high scores."""
    knots: tuple[tuple[_Share, _Share], ...] | None = None
    """Pairs of score and probability, both rising; beyond the outer ones the map is flat."""
    pairs: Annotated[StrictInt, Field(ge=2)]
    """How many pairs of score and label it was fitted on."""
    note: Annotated[StrictStr, AfterValidator(_writable)] = ""
    """What it was fitted on, in words: model, data, kinds of instruction."""

    def __init__(self, /, **fields: Any) -> None:  # noqa: ANN401 - pydantic validates them
        """Check the parameters.

        Raises:
            InputError: A field is missing, has the wrong type or range, or is of another method.
        """
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = reprlib.repr(".".join(map(str, problem["loc"]))).strip("'\"")
            got = problem["input"] if problem["loc"] and problem["type"] != "missing" else ...
            raise InputError(
                f"the calibrator is not usable: {f'`{where}`: ' if where else ''}"
                + problem["msg"].removeprefix("Value error, ")
                + ("" if got is ... else f", got {reprlib.repr(got)}")
            ) from error

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = [name for group in _PARAMETERS.values() for name in group]
        given = [name for name in names if getattr(self, name) is not None]
        if tuple(given) != _PARAMETERS[self.method]:
            raise ValueError(
                f"method {self.method!r} has the parameters "
                f"{' and '.join(_PARAMETERS[self.method])}, got {' and '.join(given) or 'none'}"
            )
        if self.knots is not None:
            scores, levels = ([knot[i] for knot in self.knots] for i in (0, 1))
            if not all(a < b for a, b in pairwise(scores)):
                raise ValueError("the scores of `knots` must rise from each to the next")
            if not all(a <= b for a, b in pairwise(levels)) or levels[:1] == levels[-1:]:
                raise ValueError("the probabilities of `knots` must rise and never fall")
        return self

    @classmethod
    def fit(
        cls,
        scores: ArrayLike,
        labels: ArrayLike,
        method: CalibrationMethod = "platt",
        *,
        note: str = "",
    ) -> Self:
        """Fit a calibrator; needs the extra `lanerank[eval]`.

        Args:
            scores: Scores in [0, 1], as the model gives them.
            labels: Whether each of them is relevant: 0 or 1. Both must occur.
            method: Platt scaling by default: two parameters, which a few hundred pairs settle and
                which can mend a model that is too generous as well as one that is too sure.
                Isotonic regression wants thousands.
            note: What the pairs are, for whoever finds the file.

        Returns:
            The calibrator.

        Raises:
            InputError: An argument is not usable, the scores do not rise with relevance, or no
                temperature is best.
            MissingExtraError: scikit-learn or scipy is not installed.
        """
        if method not in get_args(CalibrationMethod):
            raise InputError(
                f"`method` must be one of {get_args(CalibrationMethod)}, got {method!r}"
            )
        values, relevant = _in_unit_interval("scores", scores), _in_unit_interval("labels", labels)
        if values.ndim != 1 or values.shape != relevant.shape:
            raise InputError(
                "`scores` and `labels` must be two lists of the same length, got the shapes "
                f"{values.shape} and {relevant.shape}"
            )
        if not np.isfinite(values).all():
            raise InputError("`scores` holds values that are not finite; leave those pairs out")
        if set(relevant.tolist()) != {0.0, 1.0}:
            raise InputError(
                "`labels` must be 0 or 1, and both must occur, got "
                f"{reprlib.repr(sorted(set(relevant.tolist())))}; add pairs of the other kind"
            )
        fit = {
            "temperature": _fit_temperature,
            "platt": _fit_platt,
            "isotonic": _fit_isotonic,
        }[method]
        try:
            parameters = fit(values, relevant)
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"fitting a calibrator needs {error.name}, not installed here. "
                'Install the extra: pip install "lanerank[eval]"'
            ) from error
        return cls(method=method, pairs=values.size, note=note, **parameters)

    def apply(self, scores: ArrayLike) -> FloatArray:
        """The calibrated scores.

        Args:
            scores: Scores in [0, 1], of any shape. What is not finite stays as it is.

        Returns:
            Probabilities of the same shape.

        Raises:
            InputError: A score is no number, or lies outside [0, 1].
        """
        values = _in_unit_interval("scores", scores)
        finite = np.isfinite(values)
        calibrated = values.copy()
        calibrated[finite] = self._map(values[finite])
        return calibrated

    def _map(self, scores: FloatArray) -> FloatArray:
        if self.knots is not None:
            return _interpolate(self.knots, scores)
        logits = _logit(scores)
        if self.temperature is not None:
            logits = logits / self.temperature
        elif self.slope is not None and self.intercept is not None:
            logits = self.slope * logits + self.intercept
        # This form and no other: each of its steps is monotone also when rounded.
        return 1 / (1 + np.exp(-np.clip(logits, -700, 700)))

    def wrap(self, scorer: Scorer) -> CalibratedScorer:
        """The scorer with calibrated scores."""
        return CalibratedScorer(scorer, self)

    def save(self, folder: str | Path) -> Path:
        """Write `calibration.json` into the folder of a model, replacing one that is there.

        `Reranker.from_pretrained` finds it there, whatever kind of model it is.

        Raises:
            InputError: The file cannot be written.
        """
        path = Path(folder) / CALIBRATION_FILE
        text = self.model_dump_json(indent=2, exclude_none=True)
        draft = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        try:
            draft.write_text(text + "\n", encoding="utf-8")
            # Whole or not at all: with half a file the model could not be loaded any more.
            draft.replace(path)
        except OSError as error:
            raise InputError(
                f"`folder`: cannot write {str(path)!r} ({error.strerror}); give the existing "
                "folder of a model"
            ) from error
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read the `calibration.json` of a folder; equal to the calibrator that was saved.

        Raises:
            ModelLoadError: The file is missing or is no calibrator.
        """
        path = Path(folder) / CALIBRATION_FILE
        try:
            fields = from_json(path.read_bytes(), allow_inf_nan=False)
            if not isinstance(fields, dict):
                raise InputError("it is no JSON object")
            return cls(**fields)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ModelLoadError(
                f"{path} cannot be used as a calibration: {reason}; fit and save it again, or load "
                "the model with `calibrated=False`"
            ) from error


@dataclass(frozen=True)
class CalibratedScorer:
    """A scorer whose scores go through a calibrator; as safe for threads as the scorer itself.

    It has `ascore` and `score_many` where the scorer has them, and only there, because whoever
    calls it chooses between threads, batches and waiting by what is there.
    """

    scorer: Scorer
    """What scores."""
    calibrator: Calibrator

    def __post_init__(self) -> None:
        """Take over what the scorer can do beyond `score`."""
        # Not bound methods: in a cycle, a large model would stay until garbage is collected.
        scorer, calibrator = self.scorer, self.calibrator
        if isinstance(scorer, AsyncScorer):
            object.__setattr__(self, "ascore", partial(_ascore, scorer, calibrator))
        if isinstance(scorer, ManyScorer):
            object.__setattr__(self, "score_many", partial(_score_many, scorer, calibrator))

    @property
    def name(self) -> str:
        """The scorer's name, with the method of calibration."""
        return f"{self.scorer.name} (calibrated: {self.calibrator.method})"

    @property
    def supports_instructions(self) -> bool:
        """As the scorer."""
        return self.scorer.supports_instructions

    def score(self, request: RerankRequest) -> Scores:
        """Score every candidate of the request, and calibrate; what is not finite stays so.

        Raises:
            ScorerError: The scorer gave something other than numbers in [0, 1].
        """
        return _calibrated(self.scorer, self.calibrator, self.scorer.score(request))


async def _ascore(scorer: AsyncScorer, calibrator: Calibrator, request: RerankRequest) -> Scores:
    return _calibrated(scorer, calibrator, await scorer.ascore(request))


def _score_many(
    scorer: ManyScorer,
    calibrator: Calibrator,
    requests: Sequence[RerankRequest],
    *,
    return_exceptions: bool = False,
) -> list[Scores | LanerankError]:
    answers: list[Scores | LanerankError] = []
    for answer in scorer.score_many(requests, return_exceptions=return_exceptions):
        if isinstance(answer, Scores):
            try:
                answer = _calibrated(scorer, calibrator, answer)
            except ScorerError as error:
                if not return_exceptions:
                    raise
                answer = error
        answers.append(answer)
    return answers


def _calibrated(scorer: Scorer, calibrator: Calibrator, scores: Scores) -> Scores:
    # What stands in for scores says nothing about relevance, and must go on doing so.
    if scores.degraded is not None:
        return scores
    try:
        values = calibrator.apply(scores.values)
    except InputError as error:
        raise ScorerError(
            f"{scorer.name!r} cannot be calibrated: {error}; use it as it is"
        ) from error
    return replace(scores, values=tuple(values.tolist()))


def _in_unit_interval(name: str, values: ArrayLike) -> FloatArray:
    try:
        array = np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"`{name}` must be numbers in [0, 1]: {error}") from error
    # numpy would also read text.
    if array.dtype.kind not in "biuf":
        raise InputError(f"`{name}` must be numbers in [0, 1], got {reprlib.repr(values)}")
    array = array.astype(np.float64)
    outside = np.isfinite(array) & ((array < 0) | (array > 1))
    if outside.any():
        raise InputError(f"`{name}` must be numbers in [0, 1], got {float(array[outside][0])!r}")
    return array


def _logit(scores: FloatArray) -> FloatArray:
    inside = np.clip(scores, _CLIP, 1 - _CLIP)
    logits: FloatArray = np.log(inside / (1 - inside))
    return logits


def _interpolate(knots: tuple[tuple[float, float], ...], scores: FloatArray) -> FloatArray:
    positions, levels = np.array(knots).T
    right = np.searchsorted(positions, scores, side="right")
    # Rounding could carry a point of a line past its end, and so above its neighbour.
    below, above = np.maximum(right - 1, 0), np.minimum(right, len(levels) - 1)
    between: FloatArray = np.interp(scores, positions, levels)
    return between.clip(levels[below], levels[above])


def _fit_temperature(scores: FloatArray, labels: FloatArray) -> dict[str, object]:
    from scipy.optimize import minimize_scalar

    logits = _logit(scores)
    margins = np.where(labels == 1, logits, -logits)
    # The loss is convex in 1 / temperature, and has its minimum at 0 or at infinity otherwise.
    if margins.sum() <= 0 or margins.min() >= 0:
        side, extreme = ("wrong", "highest") if margins.sum() <= 0 else ("right", "lowest")
        raise InputError(
            f"`scores` lie so far on the {side} side of 0.5 that the {extreme} temperature would "
            "always fit best; use method 'platt', which can shift scores too"
        )
    limit = np.log(_STEEPEST)
    best = minimize_scalar(
        lambda log_temperature: np.logaddexp(0, -margins / np.exp(log_temperature)).mean(),
        bounds=(-limit, limit),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return {"temperature": float(np.exp(best.x))}


def _fit_platt(scores: FloatArray, labels: FloatArray) -> dict[str, object]:
    from sklearn.linear_model import LogisticRegression

    # Platt's targets instead of 0 and 1: without them pairs that a threshold separates have no
    # best slope. Each pair counts as both labels, by its target.
    relevant = labels == 1
    high = (relevant.sum() + 1) / (relevant.sum() + 2)
    low = 1 / ((~relevant).sum() + 2)
    target = np.where(relevant, high, low)
    logits = _logit(scores)
    if np.ptp(logits) == 0:
        raise _not_rising()
    # Standardised, so that the solver does as well with logits that lie close together.
    mean, deviation = logits.mean(), logits.std()
    feature = ((logits - mean) / deviation)[:, None]
    model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-9)
    model.fit(
        np.concatenate([feature, feature]),
        np.repeat([1, 0], len(target)),
        np.concatenate([target, 1 - target]),
    )
    slope = float(model.coef_[0, 0] / deviation)
    if slope <= 0:
        raise _not_rising()
    return {"slope": slope, "intercept": float(model.intercept_[0] - slope * mean)}


def _fit_isotonic(scores: FloatArray, labels: FloatArray) -> dict[str, object]:
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=0, y_max=1).fit(scores, labels)
    positions, levels = model.X_thresholds_.tolist(), model.y_thresholds_.tolist()
    if levels[0] == levels[-1]:
        raise _not_rising()
    return {"knots": tuple(zip(positions, levels, strict=True))}


def _not_rising() -> InputError:
    return InputError(
        "`scores` do not rise with `labels`, so that no map that keeps the order of documents "
        "would help; check that the labels belong to these scores"
    )
