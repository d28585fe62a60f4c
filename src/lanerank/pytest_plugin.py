"""The fixture `lanerank_snapshot`: a test fails when rankings move.

pytest loads this module wherever lanerank is installed, so it imports nothing that takes time.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lanerank.errors import InputError

if TYPE_CHECKING:
    from lanerank.evaluation.cases import Case
    from lanerank.evaluation.scoring import SupportsScore

_UPDATE = "--lanerank-update"
_NAME = re.compile(r"\w[\w.-]*")
_written = pytest.StashKey[dict[Path, str]]()


class RankingSnapshots:
    """Compares rankings with the snapshots in the folder `snapshots` beside the test's file."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        """Belong to one test."""
        self._config = request.config
        self._test = request.node.nodeid
        self._folder = request.path.parent / "snapshots"

    def check(
        self,
        reranker: SupportsScore,
        cases: Sequence[Case],
        *,
        name: str,
        score_tolerance: float | None = 0.02,
        tie_tolerance: float | None = None,
        rank_tolerance: int = 0,
        top_k: int | None = 10,
    ) -> None:
        """Fail the test if rankings have moved since the snapshot `snapshots/<name>.json`.

        With `--lanerank-update` the snapshot is written instead. A second check against the same
        file in that run compares as usual.

        Args:
            reranker: What to check.
            cases: For instance from `lanerank.evaluation.read_cases`.
            name: Of the snapshot: letters, digits, `_`, `-` and `.`.
            score_tolerance: This and the others as in `lanerank.evaluation.check_snapshot`.
            tie_tolerance: How close two scores are a near-tie.
            rank_tolerance: The most places that a document may move.
            top_k: Only the best `top_k` are judged by rank.

        Raises:
            InputError: An argument is not usable, or the file is no snapshot.
            MissingExtraError: `lanerank[eval]` is not installed.
        """
        # Here, because scipy and ir_measures are for tests that check rankings.
        from lanerank.evaluation.drift import check_snapshot
        from lanerank.evaluation.snapshot import Snapshot, take_snapshot

        __tracebackhide__ = True
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                f"`name` must be letters, digits, '_', '-' and '.', got {name!r}; the snapshot "
                "stands in the folder `snapshots` beside the test"
            )
        path = self._folder / f"{name}.json"
        written = self._config.stash[_written]
        if self._config.getoption(_UPDATE) and path not in written:
            self._folder.mkdir(exist_ok=True)
            take_snapshot(reranker, cases).save(path)
            written[path] = self._test
            return
        command = f"pytest {shlex.quote(self._test)} {_UPDATE}"
        if not path.exists():
            pytest.fail(f"there is no snapshot {path}; make it with\n{command}", pytrace=False)
        report = check_snapshot(
            Snapshot.load(path),
            reranker,
            cases,
            score_tolerance=score_tolerance,
            tie_tolerance=tie_tolerance,
            rank_tolerance=rank_tolerance,
            top_k=top_k,
        )
        if not report.ok:
            pytest.fail(
                f"rankings are not those of {path}\n{report}\nif they are meant to be, "
                f"replace it with\n{command}",
                pytrace=False,
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes snapshots."""
    parser.getgroup("lanerank").addoption(
        _UPDATE,
        action="store_true",
        help="write the snapshots of rankings instead of comparing with them",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Begin without snapshots written."""
    config.stash[_written] = {}


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """List the snapshots written: it should not go unseen."""
    for path, test in config.stash[_written].items():
        terminalreporter.write_line(f"lanerank: {test} wrote {path}")


@pytest.fixture
def lanerank_snapshot(request: pytest.FixtureRequest) -> RankingSnapshots:
    """Checks of rankings against snapshots beside the test's file."""
    return RankingSnapshots(request)
