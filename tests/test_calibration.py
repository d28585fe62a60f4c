"""Calibrators: what they learn, what they never change, and what they refuse to read."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import math
import pickle
import subprocess
import sys
import tempfile
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from lanerank import Reranker
from lanerank.calibration import CALIBRATION_FILE, CalibratedScorer, Calibrator
from lanerank.contracts import (
    AsyncScorer,
    Candidate,
    RerankRequest,
    Scorer,
    Scores,
    score_async,
)
from lanerank.errors import InputError, ModelLoadError, ScorerError
from lanerank.testing import OverlapScorer, ScriptedScorer

METHODS = ("temperature", "platt", "isotonic")
PLATT = {"method": "platt", "slope": 0.5, "intercept": -1.0, "pairs": 100}
STEPS = {"method": "isotonic", "knots": [[0.2, 0.1], [0.4, 0.5], [0.6, 0.5]], "pairs": 100}


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def simulate(slope=1.0, intercept=0.0, n=20_000, seed=0):
    """Scores with labels whose true probability is `sigmoid(slope * logit + intercept)`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, n)
    return sigmoid(logits), rng.random(n) < sigmoid(slope * logits + intercept)


# Fitting


class Logits(ClassifierMixin, BaseEstimator):
    """A classifier whose decision is its one feature, for scikit-learn to calibrate."""

    def fit(self, features, labels):
        self.classes_ = np.unique(labels)
        return self

    def decision_function(self, features):
        return features[:, 0]

    def predict(self, features):
        return self.classes_[(features[:, 0] > 0).astype(int)]


@pytest.mark.parametrize(
    ("method", "theirs"),
    [("temperature", "temperature"), ("platt", "sigmoid"), ("isotonic", "isotonic")],
)
def test_a_fit_agrees_with_scikit_learn(method, theirs) -> None:
    scores, labels = simulate(0.6, -0.8, n=1000)
    features = np.log(scores / (1 - scores))[:, None]
    frozen = FrozenEstimator(Logits().fit(features, labels))
    reference = CalibratedClassifierCV(frozen, method=theirs).fit(features, labels)
    expected = reference.predict_proba(features)[:, 1]
    calibrator = Calibrator.fit(scores, labels, method)
    assert calibrator.apply(scores) == pytest.approx(expected, abs=1e-6)
    assert calibrator.pairs == 1000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature) -> None:
    calibrator = Calibrator.fit(*simulate(1 / temperature), "temperature")
    assert calibrator.temperature == pytest.approx(temperature, rel=0.05)
    assert calibrator.slope is calibrator.intercept is calibrator.knots is None


@pytest.mark.parametrize(("slope", "intercept"), [(1.0, 0.0), (0.4, -1.5), (2.5, 1.0)])
def test_a_known_slope_and_shift_are_found(slope, intercept) -> None:
    calibrator = Calibrator.fit(*simulate(slope, intercept))
    assert calibrator.method == "platt"
    assert calibrator.slope == pytest.approx(slope, rel=0.06)
    assert calibrator.intercept == pytest.approx(intercept, abs=0.06)


def test_isotonic_regression_follows_any_rising_curve() -> None:
    rng = np.random.default_rng(3)
    scores = rng.random(50_000)
    calibrator = Calibrator.fit(scores, rng.random(50_000) < scores**3, "isotonic")
    points = np.linspace(0.05, 0.95, 19)
    assert calibrator.apply(points) == pytest.approx(points**3, abs=0.04)


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_exactly_0_and_1_can_be_fitted_and_calibrated(method) -> None:
    scores, labels = simulate(n=400)
    scores, labels = np.r_[scores, 0.0, 1.0, 1.0], np.r_[labels, 0, 1, 0]
    values = Calibrator.fit(scores, labels, method).apply([0.0, 0.5, 1.0])
    assert 0 <= values[0] < values[1] < values[2] <= 1


def test_pairs_that_a_threshold_separates_have_a_finite_slope() -> None:
    calibrator = Calibrator.fit([0.2, 0.3, 0.6, 0.7], [0, 0, 1, 1])
    values = calibrator.apply([0.2, 0.3, 0.6, 0.7])
    assert 0.1 < values[0] < values[1] < 0.5 < values[2] < values[3] < 0.9


def test_a_fit_depends_neither_on_order_nor_on_the_type_of_labels() -> None:
    scores, labels = simulate(0.7, n=300)
    for method in METHODS:
        forwards = Calibrator.fit(scores, labels, method)
        backwards = Calibrator.fit(scores[::-1].tolist(), labels[::-1].astype(int).tolist(), method)
        points = np.linspace(0, 1, 11)
        assert forwards.apply(points) == pytest.approx(backwards.apply(points), abs=1e-6)


FALLING = ([0.9, 0.8, 0.3, 0.2], [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("scores", "labels", "method", "message"),
    [
        ([0.1, 0.9], [0, 1], "sigmoid", r"`method` must be one of .*, got 'sigmoid'"),
        ([0.1, 1.5], [0, 1], "platt", r"`scores` must be numbers in \[0, 1\], got 1\.5"),
        ([0.1, -0.5], [0, 1], "platt", r"`scores` must be numbers in \[0, 1\], got -0\.5"),
        (["0.1", "0.9"], [0, 1], "platt", r"`scores` must be numbers in \[0, 1\], got \['0\.1'"),
        ([0.1, None], [0, 1], "platt", r"`scores` must be numbers in \[0, 1\], got \[0\.1, None"),
        ([0.1, [0.9]], [0, 1], "platt", r"`scores` must be numbers in \[0, 1\]"),
        ([0.1, math.nan], [0, 1], "platt", "`scores` holds values that are not finite"),
        ([0.1, math.inf], [0, 1], "platt", "`scores` holds values that are not finite"),
        ([0.1], [0, 1], "platt", r"same length, got the shapes \(1,\) and \(2,\)"),
        ([[0.1, 0.9]], [[0, 1]], "platt", r"two lists of the same length, got the shapes"),
        ([], [], "platt", r"both must occur, got \[\]"),
        ([0.1, 0.9], [1, 1], "isotonic", r"both must occur, got \[1\.0\]"),
        ([0.1, 0.9, 0.5], [0, 1, 0.5], "platt", r"`labels` must be 0 or 1"),
        ([0.1, 0.9], [0, 2], "platt", r"`labels` must be numbers in \[0, 1\], got 2"),
        (*FALLING, "temperature", "on the wrong side of 0.5 that the highest temperature"),
        ([0.1, 0.2, 0.3], [0, 1, 1], "temperature", "wrong side of 0.5 .* use method 'platt'"),
        (*FALLING, "platt", "do not rise with `labels`"),
        (*FALLING, "isotonic", "do not rise with `labels`"),
        ([0.3, 0.3], [0, 1], "platt", "do not rise with `labels`"),
        ([0.3, 0.3], [0, 1], "isotonic", "do not rise with `labels`"),
        ([0.2, 0.8], [0, 1], "temperature", "on the right side of 0.5 that the lowest temp"),
        ([0.5, 0.5 + 1e-7] * 500, [0, 1] * 500, "platt", "`slope`: Input should be less"),
    ],
)
def test_a_fit_that_makes_no_sense_is_refused(scores, labels, method, message) -> None:
    with pytest.raises(InputError, match=message):
        Calibrator.fit(scores, labels, method)


@pytest.mark.parametrize(
    ("method", "absent"), [("platt", "sklearn"), ("isotonic", "sklearn"), ("temperature", "scipy")]
)
def test_a_fit_without_its_package_says_what_to_install(method, absent) -> None:
    code = (
        "import sys\n"
        "for name in ('sklearn', 'scipy'): sys.modules[name] = None\n"
        "from lanerank.calibration import Calibrator\n"
        "from lanerank.errors import MissingExtraError\n"
        f"assert Calibrator(**{PLATT!r}).apply([0.5])[0] < 0.5\n"
        f"try: Calibrator.fit([0.6, 0.7, 0.2], [0, 1, 0], {method!r})\n"
        "except MissingExtraError as error: print(error)\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"needs {absent}" in run.stdout
    assert 'pip install "lanerank[eval]"' in run.stdout
    assert run.stdout.endswith("False\n")


# Applying


FACTOR = st.floats(1e-3, 1e3)


def knots(pairs):
    """Rising knots from any pairs of numbers."""
    scores, levels = (sorted(values) for values in zip(*pairs, strict=True))
    levels[-1] = 1.0
    return tuple(zip(scores, levels, strict=True))


CALIBRATORS = st.one_of(
    st.builds(lambda t: Calibrator(method="temperature", temperature=t, pairs=9), FACTOR),
    st.builds(
        lambda a, b: Calibrator(method="platt", slope=a, intercept=b, pairs=9),
        FACTOR,
        st.floats(-1e3, 1e3),
    ),
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 0.999)),
        min_size=2,
        max_size=8,
        unique_by=lambda pair: pair[0],
    ).map(lambda pairs: Calibrator(method="isotonic", knots=knots(pairs), pairs=9, note="é")),
)
SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(CALIBRATORS, SCORES)
def test_no_two_scores_are_ever_turned_round(calibrator, scores) -> None:
    near = [math.nextafter(score, 2) for score in scores if score < 1]
    ends = [knot[0] for knot in calibrator.knots or ()]
    ascending = np.sort([*scores, *near, *ends, *(math.nextafter(end, 0) for end in ends)])
    values = calibrator.apply(ascending)
    assert (np.diff(values) >= 0).all()
    assert values.min() >= 0
    assert values.max() <= 1


@given(
    st.floats(0.1, 3),
    st.floats(-3, 3),
    st.lists(st.integers(1000, 999_000), min_size=2, max_size=30, unique=True),
)
def test_temperature_and_platt_scaling_keep_scores_apart(slope, intercept, millionths) -> None:
    scores = np.sort(millionths) / 1e6
    platt = Calibrator(method="platt", slope=slope, intercept=intercept, pairs=9)
    temperature = Calibrator(method="temperature", temperature=slope, pairs=9)
    assert (np.diff(platt.apply(scores)) > 0).all()
    if slope > 0.3:
        assert (np.diff(temperature.apply(scores)) > 0).all()


@given(CALIBRATORS, SCORES)
def test_a_score_does_not_depend_on_its_neighbours(calibrator, scores) -> None:
    alone = [float(calibrator.apply([score])[0]) for score in scores]
    assert calibrator.apply(scores).tolist() == alone


def test_values_by_hand() -> None:
    assert Calibrator(**PLATT).apply(0.5) == pytest.approx(1 / (1 + math.e))
    half = Calibrator(method="temperature", temperature=2.0, pairs=9)
    assert half.apply([0.5, 0.8]) == pytest.approx([0.5, 2 / 3])
    values = Calibrator(**STEPS).apply([0.0, 0.2, 0.3, 0.45, 0.55, 1.0])
    assert values == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("fields", [PLATT, STEPS])
def test_what_is_not_finite_stays_and_the_input_is_not_changed(fields) -> None:
    given = np.array([[0.3, math.nan], [math.inf, -math.inf]])
    before = given.copy()
    values = Calibrator(**fields).apply(given)
    assert values.shape == (2, 2)
    assert math.isnan(values[0, 1])
    assert values[1].tolist() == [math.inf, -math.inf]
    assert np.array_equal(given, before, equal_nan=True)
    assert Calibrator(**fields).apply([]).tolist() == []


@pytest.mark.parametrize("scores", [[1.2], [-1e-9], ["0.5"], "0.5", None, [0.1, [0.2]], [1j]])
def test_scores_that_are_no_probabilities_are_refused(scores) -> None:
    with pytest.raises(InputError, match=r"`scores` must be numbers in \[0, 1\]"):
        Calibrator(**PLATT).apply(scores)


# Files


@given(CALIBRATORS)
def test_a_calibrator_is_the_same_bits_after_saving_and_loading(calibrator) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert calibrator.save(folder).name == CALIBRATION_FILE
        loaded = Calibrator.load(folder)
    assert loaded == calibrator
    points = np.linspace(0, 1, 101)
    assert loaded.apply(points).tobytes() == calibrator.apply(points).tobytes()


def test_the_file_is_json_for_people(tmp_path) -> None:
    Calibrator(**PLATT, note="kinds: none, glossary").save(tmp_path)
    content = json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8"))
    assert content == {**PLATT, "note": "kinds: none, glossary"}


def test_a_file_that_cannot_be_written_whole_leaves_the_earlier_one(tmp_path, monkeypatch) -> None:
    Calibrator(**STEPS).save(tmp_path)

    def half(path: Path, text: str, **_: object) -> None:
        path.write_bytes(text[:20].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(InputError, match="No space left"):
        Calibrator(**PLATT).save(tmp_path)
    assert Calibrator.load(tmp_path) == Calibrator(**STEPS)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_saving_replaces_an_earlier_file(tmp_path) -> None:
    Calibrator(**STEPS).save(tmp_path)
    Calibrator(**PLATT).save(str(tmp_path))
    assert Calibrator.load(str(tmp_path)) == Calibrator(**PLATT)


def test_saving_into_a_folder_that_is_not_there_is_an_error(tmp_path) -> None:
    with pytest.raises(InputError, match=r"`folder`: cannot write .*give the existing folder"):
        Calibrator(**PLATT).save(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "beta"}, "`method`: Input should be 'temperature', 'platt' or 'isotonic'"),
        ({"method": ...}, "`method`: Field required"),
        ({"pairs": ...}, "`pairs`: Field required"),
        ({"pairs": 1}, "`pairs`: .* got 1"),
        ({"pairs": 10.5}, "`pairs`: .* got 10.5"),
        ({"pairs": True}, "`pairs`: .* got True"),
        ({"pairs": "100"}, "`pairs`: .* got '100'"),
        ({"slope": ...}, "'platt' has the parameters slope and intercept, got intercept"),
        ({"slope": None}, "'platt' has the parameters slope and intercept, got intercept"),
        ({"slope": -0.5}, "`slope`: .* got -0.5"),
        ({"slope": 0}, "`slope`: .* got 0"),
        ({"slope": 1e9}, "`slope`: .* got 1000000000.0"),
        ({"slope": "0.5"}, "`slope`: .* got '0.5'"),
        ({"slope": True}, "`slope`: .* got True"),
        ({"slope": [0.5]}, "`slope`: .* got \\[0.5\\]"),
        ({"intercept": 1e4}, "`intercept`: .* got 10000.0"),
        ({"temperature": 2.0}, "got temperature and slope and intercept"),
        ({"note": 3}, "`note`: .* got 3"),
        ({"version": 2}, "`version`: Extra inputs are not permitted, got 2"),
        ({"self": 2}, "`self`: Extra inputs are not permitted, got 2"),
        ({"x" * 999 + "\n": 2}, "`x+\\.\\.\\.x+.*`: Extra inputs"),
        ({"method": "isotonic"}, "'isotonic' has the parameters knots, got slope and intercept"),
        (STEPS | {"slope": ..., "intercept": ..., "knots": []}, "must rise and never fall"),
        (STEPS | {"slope": ..., "intercept": ..., "knots": [[0.1, 0.2]]}, "must rise and never"),
        (STEPS | {"slope": ..., "intercept": ..., "knots": [[0, 0.5], [1, 0.5]]}, "must rise and"),
        (STEPS | {"slope": ..., "intercept": ..., "knots": [[0, 0.9], [1, 0.5]]}, "never fall"),
        (STEPS | {"slope": ..., "intercept": ..., "knots": [[0.2, 0], [0.2, 1]]}, "rise from each"),
        (STEPS | {"slope": ..., "intercept": ..., "knots": [[0, 0], [2, 1]]}, r"`knots\.1\.0`"),
        (STEPS | {"slope": ..., "intercept": ..., "knots": [[0, 0], [1]]}, r"`knots\.1\.1`"),
        (STEPS | {"slope": ..., "intercept": ..., "knots": "ab"}, "`knots`"),
    ],
)
def test_bad_parameters_are_refused_in_code_and_in_files(changes, message, tmp_path) -> None:
    fields = {name: value for name, value in {**PLATT, **changes}.items() if value is not ...}
    with pytest.raises(InputError, match=message):
        Calibrator(**fields)
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(fields))
    with pytest.raises(ModelLoadError, match=rf"calibration\.json cannot be used .*{message}") as e:
        Calibrator.load(tmp_path)
    assert "load the model with `calibrated=False`" in str(e.value)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameters_that_are_not_finite_are_refused(value) -> None:
    for name in ("slope", "intercept"):
        with pytest.raises(InputError, match=f"`{name}`"):
            Calibrator(**{**PLATT, name: value})


def test_a_note_that_no_file_can_hold_is_refused() -> None:
    with pytest.raises(InputError, match="`note`: expected text without surrogates"):
        Calibrator(**PLATT, note="\ud800")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="half"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"3", id="number"),
        pytest.param(b"\xff\xfe", id="binary"),
        pytest.param(b"\x80\x04K\x01.", id="pickle"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"a":' * 100_000, id="deep objects"),
        pytest.param(b'{"method":"platt","slope":NaN,"intercept":0,"pairs":9}', id="NaN"),
        pytest.param(b'{"method":"platt","slope":1e999,"intercept":0,"pairs":9}', id="infinite"),
        pytest.param(b'{"method":"platt","slope":1,"intercept":0,"pairs":1e999}', id="many pairs"),
        pytest.param(b'{"quantization": {"bits": 4}}', id="of another library"),
        pytest.param(b'{"__class__": "os.system", "args": ["true"]}', id="an object"),
    ],
)
def test_a_file_that_is_no_calibrator_is_refused_with_one_line(content, tmp_path) -> None:
    (tmp_path / CALIBRATION_FILE).write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"calibration\.json cannot be used") as caught:
        Calibrator.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_model_that_cannot_be_loaded(tmp_path) -> None:
    with pytest.raises(ModelLoadError, match=r"calibration\.json cannot be used .*: No such file"):
        Calibrator.load(tmp_path)


def test_calibrators_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Calibrator(**PLATT).slope = 2.0


# Wrapping


def request(*texts, **fields):
    candidates = tuple(Candidate(text=text) for text in texts)
    return RerankRequest(query="red fish", candidates=candidates, **fields)


def test_a_wrapped_scorer_gives_calibrated_scores_and_says_so() -> None:
    calibrator = Calibrator(**PLATT)
    wrapped = calibrator.wrap(OverlapScorer())
    assert isinstance(wrapped, Scorer)
    assert isinstance(wrapped, CalibratedScorer)
    assert wrapped.name == "overlap (calibrated: platt)"
    asked = request("a red fish", "a red hat", "a coach", instruction="prefer hat")
    raw = OverlapScorer().score(asked)
    assert wrapped.score(asked) == Scores(tuple(calibrator.apply(raw.values).tolist()))
    assert all(type(value) is float for value in wrapped.score(asked).values)


@pytest.mark.parametrize("supported", [True, False])
def test_a_wrapped_scorer_has_the_same_instruction_channel(supported) -> None:
    wrapped = Calibrator(**PLATT).wrap(OverlapScorer(supports_instructions=supported))
    assert wrapped.supports_instructions is supported


def test_the_request_reaches_the_scorer_as_it_is() -> None:
    inner = ScriptedScorer({"a": 0.2, "b": 0.7})
    asked = request("a", "b", instruction="rule", progress=print)
    Calibrator(**PLATT).wrap(inner).score(asked)
    assert inner.requests[0] is asked


@pytest.mark.parametrize("fields", [PLATT, {**PLATT, "slope": 3.0}])
def test_a_ranking_keeps_its_order(fields) -> None:
    texts = [f"{'red ' * (i % 3)} {'fish' * (i % 2)} {'sea' * (i % 5 == 0)}" for i in range(30)]
    plain = Reranker(OverlapScorer()).rank("red fish", texts, instruction="sea")
    wrapped = Calibrator(**fields).wrap(OverlapScorer())
    calibrated = Reranker(wrapped).rank("red fish", texts, instruction="sea")
    assert [each.index for each in calibrated] == [each.index for each in plain]
    assert [each.score for each in calibrated] != [each.score for each in plain]
    assert calibrated.model == "overlap (calibrated: platt)"
    assert calibrated.instruction_applied == "lane"


def test_isotonic_regression_makes_ties_which_keep_input_order() -> None:
    scores = {"low": 0.1, "good": 0.45, "better": 0.55}
    plain, tied = (
        [each.document.text for each in Reranker(scorer).rank("q", list(scores))]
        for scorer in (ScriptedScorer(scores), Calibrator(**STEPS).wrap(ScriptedScorer(scores)))
    )
    assert plain == ["better", "good", "low"]
    assert tied == ["good", "better", "low"]


def test_scores_that_are_not_finite_are_reported_as_without_a_calibrator() -> None:
    scorer = ScriptedScorer({"a": math.nan, "b": 0.5, "c": math.inf})
    ranking = Reranker(Calibrator(**PLATT).wrap(scorer)).rank("q", ["a", "b", "c"])
    assert ranking.non_finite == (0, 2)
    assert [each.index for each in ranking] == [1, 0, 2]
    assert math.isnan(ranking[1].score)


@dataclass(frozen=True)
class Fixed:
    """A scorer that gives always the same answer, right or wrong."""

    answer: Scores
    name: str = "fixed"
    supports_instructions: bool = True

    def score(self, request):
        return self.answer


def test_truncation_flags_are_handed_on() -> None:
    wrapped = Calibrator(**PLATT).wrap(Fixed(Scores((0.5, 0.6), (True, False))))
    assert wrapped.score(request("a", "b")).truncated == (True, False)


@pytest.mark.parametrize("values", [(0.5, 7.0), (0.5, "0.6"), (0.5, None), (-1.0, 0.0)])
def test_a_scorer_whose_scores_are_no_probabilities_cannot_be_calibrated(values) -> None:
    reranker = Reranker(Calibrator(**PLATT).wrap(Fixed(Scores(values))))
    with pytest.raises(ScorerError, match=r"'fixed' cannot be calibrated: .*\[0, 1\]"):
        reranker.rank("q", ["a", "b"])


def test_what_stands_in_for_scores_is_not_calibrated() -> None:
    answer = Scores((0.0, 0.0), degraded="out of reach")
    assert Calibrator(**PLATT).wrap(Fixed(answer)).score(request("a", "b")) == answer


@dataclass(frozen=True)
class Awaitable(Fixed):
    """A scorer that has to be awaited."""

    def score(self, request):
        raise AssertionError("not awaited")

    async def ascore(self, request):
        return self.answer


def test_a_wrapped_scorer_can_be_awaited_as_the_scorer_can() -> None:
    calibrator, answer = Calibrator(**PLATT), Scores((0.3, 0.9), (True, False))
    expected = calibrator.wrap(Fixed(answer)).score(request("a", "b"))
    for scorer in (Fixed(answer), Awaitable(answer)):
        wrapped = calibrator.wrap(scorer)
        assert isinstance(wrapped, AsyncScorer) is isinstance(scorer, AsyncScorer)
        assert asyncio.run(score_async(wrapped, request("a", "b"))) == expected
        ranking = asyncio.run(Reranker(wrapped).arank("q", ["a", "b"]))
        assert [each.index for each in ranking] == [1, 0]


@dataclass(frozen=True)
class Many(Fixed):
    """A scorer that takes several requests at a time, and cannot score the query "bad"."""

    def score(self, request):
        raise AssertionError("one at a time")

    def score_many(self, requests, *, return_exceptions=False):
        assert return_exceptions
        error = InputError("too long")
        return [error if request.query == "bad" else self.answer for request in requests]


def test_a_wrapped_scorer_scores_requests_together_as_the_scorer_can() -> None:
    calibrator, answer = Calibrator(**PLATT), Scores((0.3, 0.9), (True, False))
    assert not hasattr(calibrator.wrap(Fixed(answer)), "score_many")
    # A process of a cluster gets a copy.
    wrapped = pickle.loads(pickle.dumps(calibrator.wrap(Many(answer))))
    assert wrapped == calibrator.wrap(Many(answer))
    asked = request("a", "b")
    first, bad, last = wrapped.score_many(
        [asked, replace(asked, query="bad"), asked], return_exceptions=True
    )
    assert first == last == calibrator.wrap(Fixed(answer)).score(asked)
    assert isinstance(bad, InputError)


def test_scores_that_cannot_be_calibrated_do_not_cost_those_of_other_requests() -> None:
    class Odd(Many):
        def score_many(self, requests, *, return_exceptions=False):
            return [Scores((1.5,)) if r.query == "odd" else self.answer for r in requests]

    wrapped = Calibrator(**PLATT).wrap(Odd(Scores((0.5,))))
    asked = request("a")
    several = [asked, replace(asked, query="odd"), asked]
    first, odd, last = wrapped.score_many(several, return_exceptions=True)
    assert first == last
    assert isinstance(odd, ScorerError)
    with pytest.raises(ScorerError, match="cannot be calibrated"):
        wrapped.score_many(several)


def test_a_wrapped_scorer_is_let_go_with_its_wrapper() -> None:
    scorer = Many(Scores((0.5,)))
    there = weakref.ref(scorer)
    wrapped = Calibrator(**PLATT).wrap(scorer)
    gc.disable()
    try:
        del scorer, wrapped
        assert there() is None
    finally:
        gc.enable()


def test_a_wrong_number_of_scores_is_still_found() -> None:
    reranker = Reranker(Calibrator(**PLATT).wrap(Fixed(Scores((0.5,)))))
    with pytest.raises(ScorerError, match="gave 1 scores"):
        reranker.rank("q", ["a", "b"])


def test_wrappers_combine() -> None:
    first, second = Calibrator(**PLATT), Calibrator(**STEPS)
    wrapped = second.wrap(first.wrap(Fixed(Scores((0.3, 0.9)))))
    assert wrapped.name == "fixed (calibrated: platt) (calibrated: isotonic)"
    expected = second.apply(first.apply([0.3, 0.9])).tolist()
    assert list(wrapped.score(request("a", "b")).values) == expected


def test_threads_get_the_same_scores() -> None:
    wrapped = Calibrator(**STEPS).wrap(OverlapScorer())
    asked = [request(*(f"red fish {i}" for i in range(n))) for n in range(1, 40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(wrapped.score, asked)) == [wrapped.score(each) for each in asked]
