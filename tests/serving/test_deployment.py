"""What the processes of the server do between HTTP and the model, without Ray."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

import pytest
from typer.testing import CliRunner

from lanerank.calibration import Calibrator
from lanerank.cli import app
from lanerank.contracts import Candidate, RerankRequest, Scores
from lanerank.errors import InputError, LanerankError, MissingExtraError, ModelError
from lanerank.scoring.fallback import FallbackScorer
from lanerank.serving.deployment import _Deadline, score_each
from lanerank.testing import OverlapScorer, ScriptedScorer

GOOD = RerankRequest(query="red", candidates=(Candidate(text="red fish"),))
UNKNOWN = RerankRequest(query="red", candidates=(Candidate(text="unknown"),))
POISON = RerankRequest(query="poison", candidates=(Candidate(text="red fish"),))


@dataclass
class Fragile:
    """Scores several requests at a time, and fails with all of them if one is poison."""

    name: str = "fragile"
    supports_instructions: bool = True
    together: list[int] = field(default_factory=list)

    def score(self, request: RerankRequest) -> Scores:
        if request.query == "poison":
            raise RuntimeError("the words of a document")
        return OverlapScorer().score(request)

    def score_many(
        self, requests: Sequence[RerankRequest], *, return_exceptions: bool
    ) -> list[Scores | LanerankError]:
        assert return_exceptions
        self.together.append(len(requests))
        return [self.score(request) for request in requests]


def test_a_scorer_that_can_gets_all_requests_at_once() -> None:
    scorer = Fragile()
    assert score_each(scorer, [GOOD, GOOD]) == [Scores((1.0,))] * 2
    assert scorer.together == [2]


@pytest.mark.parametrize(
    "wrap", [Calibrator(method="temperature", temperature=1.0, pairs=2).wrap, FallbackScorer]
)
def test_a_wrapped_scorer_gets_them_at_once_too(wrap) -> None:
    scorer = Fragile()
    assert score_each(wrap(scorer), [GOOD, GOOD]) == [wrap(OverlapScorer()).score(GOOD)] * 2
    assert scorer.together == [2]


def test_the_errors_of_a_lane_encoder_stay_with_their_requests(tiny_scorer) -> None:
    long = RerankRequest(query="fish " * 300, candidates=GOOD.candidates)
    first, bad, last = score_each(tiny_scorer, [GOOD, long, GOOD])
    assert first == last
    assert isinstance(first, Scores)
    assert isinstance(bad, InputError)


def test_a_scorer_that_cannot_gets_one_after_the_other() -> None:
    good, bad, again = score_each(ScriptedScorer({"red fish": 0.5}), [GOOD, UNKNOWN, GOOD])
    assert good == again == Scores((0.5,))
    assert isinstance(bad, InputError)


def test_one_request_cannot_fail_the_others(caplog) -> None:
    good, bad, again = score_each(Fragile(), [GOOD, POISON, GOOD])
    assert good == again == Scores((1.0,))
    assert isinstance(bad, ModelError)
    assert "RuntimeError" in str(bad)
    assert "RuntimeError while scoring" in caplog.text
    assert "the words of a document" not in f"{bad} {caplog.text}"


def test_a_request_that_nobody_waits_for_any_more_is_not_begun() -> None:
    gone = replace(GOOD, progress=_Deadline(monotonic() - 1))
    first, bad, last = score_each(OverlapScorer(), [GOOD, gone, GOOD])
    assert first == last == Scores((1.0,))
    assert isinstance(bad, ModelError)
    assert "timeout_s" in str(bad)


def test_a_request_that_takes_too_long_stops_in_the_middle(tiny_scorer) -> None:
    told: list[int] = []

    def out_of_time(done: int, total: int) -> None:
        told.append(done)
        # The model has begun, and there is more to do.
        _Deadline(monotonic() - 1 if 0 < done < total else monotonic() + 60)(done, total)

    many = tuple(Candidate(text="red fish " * 40) for _ in range(200))
    long = RerankRequest(query="red", candidates=many, progress=out_of_time)
    [bad] = score_each(tiny_scorer, [long])
    assert isinstance(bad, ModelError)
    assert max(told) < len(many)


# The command


@pytest.mark.parametrize(
    ("option", "value", "setting"),
    [
        ("--dtype", "int3", "dtype"),
        ("--port", "0", "port"),
        ("--token-env", "no name", "token_env"),
        ("--max-documents", "0", "max_documents"),
        ("--max-bytes", "0", "max_bytes"),
        ("--max-queued", "0", "max_queued"),
        ("--timeout", "0", "timeout_s"),
        ("--batch-size", "0", "batching.max_size"),
        ("--batch-wait-ms", "-1", "batching.wait_ms"),
        ("--min-replicas", "0", "replicas.min"),
        ("--max-replicas", "0", "replicas.max"),
        ("--target-ongoing-requests", "0", "replicas.target_ongoing_requests"),
        ("--num-cpus", "0", "num_cpus"),
        ("--num-gpus", "-1", "num_gpus"),
    ],
)
def test_each_option_reaches_its_setting(option, value, setting) -> None:
    with pytest.raises(InputError, match=f"`{setting}`:"):
        CliRunner().invoke(app, ["serve", option, value], catch_exceptions=False)


def test_options_that_must_agree_are_checked_together() -> None:
    with pytest.raises(InputError, match="`device` is 'cuda' and `num_gpus` is 0"):
        CliRunner().invoke(
            app, ["serve", "--device", "cuda", "--num-gpus", "0"], catch_exceptions=False
        )


def test_a_token_that_is_not_set_stops_the_command_before_anything_is_started(monkeypatch) -> None:
    monkeypatch.delenv("RANKER_TOKEN", raising=False)
    with pytest.raises(InputError, match="RANKER_TOKEN"):
        CliRunner().invoke(app, ["serve", "--token-env", "RANKER_TOKEN"], catch_exceptions=False)


# The extra


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("package", ["ray", "fastapi", "prometheus_client"])
def test_without_the_extra_its_name_is_told(package) -> None:
    run = python(
        f"import sys; sys.modules[{package!r}] = None\n"
        "from lanerank.cli import main; sys.argv = ['lanerank', 'serve']; main()"
    )
    assert run.returncode == 2
    assert run.stderr.replace("\n", " ").startswith(
        f"Error: `lanerank.serving` needs {package}, not installed here."
    )
    assert 'pip install "lanerank[serve]"' in run.stderr
    assert "Traceback" not in run.stderr


def test_a_missing_extra_is_an_import_error() -> None:
    assert issubclass(MissingExtraError, ImportError)


@pytest.mark.parametrize(
    ("module", "light"),
    [
        ("lanerank", {"ray", "fastapi", "prometheus_client", "torch", "yaml"}),
        ("lanerank.cli", {"ray", "fastapi", "prometheus_client", "torch", "yaml"}),
        ("lanerank.serving", {"ray", "torch"}),
        ("lanerank.serving.deployment", {"torch"}),
    ],
)
def test_importing_loads_no_more_than_it_must(module, light) -> None:
    run = python(f"import sys, {module}; print(*sorted({light!r} & sys.modules.keys()))")
    assert run.stdout.split() == []
    assert run.returncode == 0, run.stderr
