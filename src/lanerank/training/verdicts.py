"""What judges said, and the file that remembers it, so that no question is paid for twice."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from lanerank.errors import InputError

_APPLICATION_ID = 0x6C616E65
_VERSION = 1
_KEYS_PER_QUERY = 500
_LOCK_SECONDS = 60.0

_Count = Annotated[int, Field(ge=0)]


class Cost(BaseModel):
    """What was sent to judges and came back, answers that were not usable included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calls: _Count = 0
    """How often a model was called."""
    characters_sent: _Count = 0
    characters_received: _Count = 0
    metered_calls: _Count = 0
    """The calls for which the model said how many tokens they took."""
    input_tokens: _Count = 0
    """In the metered calls."""
    output_tokens: _Count = 0
    """In the metered calls."""

    def __add__(self, other: Cost) -> Cost:
        """Both together."""
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in _COUNTS})


_COUNTS = tuple(Cost.model_fields)


class Verdict(BaseModel):
    """A judge's answer to one question."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """`Question.key`: the judge, the wording and the pair in the order shown."""
    judge: str
    """The judge's name."""
    preference: Annotated[float, Field(ge=-1, le=1)]
    """1 where the entry shown first is far better, -1 where the other is."""
    reason: str
    """Why, in the judge's words. It may quote documents: show it as data."""
    cost: Cost = Cost()
    """What the answer took."""


class VerdictStore:
    """A SQLite file of verdicts by key.

    Each verdict is a transaction of its own: after a crash the file holds every answer that came
    before it. Threads may share a store, and processes may share a file.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file, or make it.

        Raises:
            InputError: The file cannot be opened, or is not one of these.
        """
        self._path = path
        self._lock = threading.Lock()
        with self._explained():
            self._db = sqlite3.connect(
                path, timeout=_LOCK_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self._prepare()
        except InputError:
            self._db.close()
            raise

    def get(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """The verdicts that are known, by key."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, Verdict] = {}
        with self._lock, self._explained():
            for start in range(0, len(wanted), _KEYS_PER_QUERY):
                part = wanted[start : start + _KEYS_PER_QUERY]
                marks = ", ".join("?" * len(part))
                rows = self._db.execute(
                    f"SELECT key, judge, preference, reason, cost FROM verdicts "
                    f"WHERE key IN ({marks})",
                    part,
                )
                for key, judge, preference, reason, cost in rows:
                    found[key] = Verdict(
                        key=key,
                        judge=judge,
                        preference=preference,
                        reason=reason,
                        cost=Cost.model_validate_json(cost),
                    )
        return found

    def put(self, verdict: Verdict, version: str) -> None:
        """Keep a verdict on questions worded in this version; the first on a key stays."""
        with self._lock, self._explained():
            self._db.execute(
                "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)",
                (
                    verdict.key,
                    verdict.judge,
                    version,
                    verdict.preference,
                    verdict.reason,
                    verdict.cost.model_dump_json(),
                ),
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        """The store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _prepare(self) -> None:
        # One transaction, since two processes may find the file empty at the same time.
        self._db.execute("BEGIN IMMEDIATE")
        with contextlib.closing(self._db.cursor()) as cursor:
            (tables,) = cursor.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:
                cursor.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                cursor.execute(f"PRAGMA user_version = {_VERSION}")
                cursor.execute(
                    "CREATE TABLE verdicts (key TEXT PRIMARY KEY, judge TEXT NOT NULL, "
                    "prompt TEXT NOT NULL, preference REAL NOT NULL, reason TEXT NOT NULL, "
                    "cost TEXT NOT NULL)"
                )
            marks = tuple(
                cursor.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("application_id", "user_version")
            )
            cursor.execute("COMMIT")
        if marks != (_APPLICATION_ID, _VERSION):
            raise InputError(
                f"`cache`: {str(self._path)!r} is a database of something else or of another "
                "version of lanerank; give another path"
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(
                f"`cache`: {str(self._path)!r} cannot be used: {error}; give the path of a file "
                "made by a judge panel, or of a new file in a folder that exists"
            ) from error
