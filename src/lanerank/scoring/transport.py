"""Asking a service over HTTP: connections, keys, time limits, repetition. Knows no documents.

Needs the extra `remote`. A key stands in requests only, and in no log, `repr` or error.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import ssl
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from queue import LifoQueue
from typing import Any, TypeVar

from pydantic import SecretStr

from lanerank.display import one_line
from lanerank.errors import InputError, MissingExtraError, RemoteError
from lanerank.service import Key, ServiceContract

try:
    import httpx
    import stamina
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"asking a service needs {error.name}; pip install 'lanerank[remote]'"
    ) from error

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""What may pass by itself."""

_ROOM = 1_000_000
"""Bytes that any answer may have; one to a long request may have more."""
_ERROR_ROOM = 100_000
"""Bytes that are read, for the message, of an answer that is no success."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """How long to wait before asking again, in seconds."""

    first: float = 0.25
    """Before the first repetition; each later one waits twice as long."""
    most: float = 8.0
    """What the doubling ends at."""
    jitter: float = 0.5
    """At most this much is added at random, so that clients do not return together."""
    most_asked: float = 30.0
    """The longest `Retry-After` that is waited for; asked to wait longer, give up at once."""


class Transport:
    """Posts JSON to one address and gives the answers as text, wrapped since it may hold the key.

    Connections are kept, and passed from thread to thread. Calls on an event loop have their own,
    which close with the loop. Copies and forked processes open their own.

    Args:
        contract: The service; gives its name and how it wants to be shown a key.
        url: The whole address.
        key: What authorises the requests.
        timeout: Seconds that one attempt may take.
        max_retries: How often a request is repeated that found no server, took too long, or got a
            status that may pass by itself.
        concurrency: How many requests may be under way at a time.
        backoff: How long to wait in between.

    Raises:
        InputError: An option is not usable.
    """

    def __init__(
        self,
        contract: ServiceContract,
        url: str,
        key: SecretStr | None,
        *,
        timeout: float,
        max_retries: int,
        concurrency: int,
        backoff: Backoff,
    ) -> None:
        """Check the options; nothing is sent."""
        if isinstance(timeout, bool) or not isinstance(timeout, int | float):
            raise InputError(f"`timeout` must be a number of seconds, got {timeout!r}")
        if not 0 < timeout < math.inf:
            raise InputError(f"`timeout` must be finite and more than 0 seconds, got {timeout!r}")
        self.contract = contract
        self.url = url
        self.timeout = float(timeout)
        self.max_retries = _count("max_retries", max_retries, least=0)
        self.concurrency = _count("concurrency", concurrency, least=1)
        self.backoff = backoff
        self._key = key
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._shared: _Shared | None = None
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _OfLoop] = (
            weakref.WeakKeyDictionary()
        )

    def __getstate__(self) -> dict[str, Any]:
        """Everything but connections, which belong to a process; the key in plain text."""
        state = self.__dict__.copy()
        for name in ("_lock", "_shared", "_loops"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start without connections."""
        self.__dict__.update(state)
        self._start()

    def map(
        self, ask: Callable[[Item], Result], items: Sequence[Item]
    ) -> Generator[Result, None, None]:
        """What `ask` gives for each item, in order, with several under way at a time.

        Closing the generator, or a failure, keeps what has not begun from beginning.
        """
        # A single request needs no other thread.
        yield from self._of_process().threads.map(ask, items) if len(items) > 1 else map(ask, items)

    def post(self, body: bytes) -> SecretStr:
        """The answer to one request.

        Raises:
            RemoteError: The request failed for good.
        """
        slots = self._of_process().slots

        def ask() -> SecretStr:
            with slots.take() as client:
                answer = self._fetch(client, body)
            return self._text(answer)

        # Without arguments, since hooks of stamina may log them.
        return stamina.RetryingCaller(**self._retrying())(self._wait, ask)

    async def apost(self, body: bytes) -> SecretStr:
        """The answer to one request, without a thread; cancelling it closes the connection.

        Raises:
            RemoteError: The request failed for good.
        """
        own = await self._of_loop()

        async def ask() -> SecretStr:
            async with own.slots:
                return self._text(await self._afetch(own.client, body))

        return await stamina.AsyncRetryingCaller(**self._retrying())(self._wait, ask)

    def close(self) -> None:
        """Close the connections of all threads; a later call opens new ones."""
        with self._lock:
            shared, self._shared = self._shared, None
        if shared is not None:
            shared.end()

    async def aclose(self) -> None:
        """Close the connections of this event loop, and those of all threads."""
        with self._lock:
            own = self._loops.pop(asyncio.get_running_loop(), None)
        if own is not None:
            await own.closing.aclose()
        self.close()

    def error(
        self, problem: str, status: int | None = None, retry_after: float | None = None
    ) -> RemoteError:
        """An error of this service, with the remedy for its kind."""
        name = self.contract.service
        return RemoteError(
            self.redacted(f"the service {name!r} at {self.url} {problem}; {_remedy(status)}"),
            service=name,
            url=self.url,
            status=status,
            retry_after=retry_after,
        )

    def redacted(self, text: str) -> str:
        """A text without the key, which services have been seen to repeat."""
        return text if self._key is None else text.replace(self._key.get_secret_value(), "[key]")

    # Attempts

    def _fetch(self, client: httpx.Client, body: bytes) -> _Answer:
        end = time.monotonic() + self.timeout
        try:
            with client.stream("POST", self.url, content=body) as response:
                answer = _Answer(response, len(body))
                answer.read(end)
        except httpx.HTTPError as error:
            problem = self._describe(error)
        else:
            return answer
        # Out here, so that neither the request with its headers nor what came back hangs on to it.
        raise self.error(problem)

    async def _afetch(self, client: httpx.AsyncClient, body: bytes) -> _Answer:
        try:
            async with (
                asyncio.timeout(self.timeout),
                client.stream("POST", self.url, content=body) as response,
            ):
                answer = _Answer(response, len(body))
                await answer.aread()
        except (httpx.HTTPError, TimeoutError) as error:
            problem = self._describe(error)
        else:
            return answer
        raise self.error(problem)

    def _text(self, answer: _Answer) -> SecretStr:
        """The answer, if it is one."""
        status, headers = answer.response.status_code, answer.response.headers
        if not answer.response.is_success:
            asked = _retry_after(headers.get("retry-after"))
            told = "" if asked is None else f", asking to wait {asked:g} s"
            if answer.response.is_redirect and "location" in headers:
                told = f", sending to {headers['location']!r}, which is not followed"
            # Before it is cut, since half of a key would not be found.
            said = one_line(self.redacted(_said(answer.text)), 300)
            raise self.error(f"answered with the status {status}{told}: {said!r}", status, asked)
        if headers.get("content-encoding", "identity") != "identity":
            raise self.error("answered in a compressed form that was not asked for", status)
        if answer.too_large:
            raise self.error(f"gave an answer of more than {answer.limit} bytes", status)
        return SecretStr(answer.text)

    def _wait(self, error: Exception) -> bool | float:
        """Whether to ask again, or after how many seconds."""
        if not isinstance(error, RemoteError):
            return False
        if error.status is not None and error.status not in RETRIED_STATUS:
            return False
        asked = error.retry_after
        if asked is None:
            return True
        return asked if asked <= self.backoff.most_asked else False

    def _retrying(self) -> dict[str, Any]:
        return {
            "attempts": self.max_retries + 1,
            "timeout": None,
            "wait_initial": self.backoff.first,
            "wait_max": self.backoff.most,
            "wait_jitter": self.backoff.jitter,
        }

    def _describe(self, error: Exception) -> str:
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            return f"did not answer within {self.timeout:g} s ({type(error).__name__})"
        return f"cannot be reached: {type(error).__name__}: {error}"

    # Connections

    def _options(self) -> dict[str, Any]:
        key, shape = self._key, self.contract.key
        return {
            "auth": None if key is None or shape is None else _Authorization(key, shape),
            "follow_redirects": False,
            "headers": {
                "Accept": "application/json",
                # An answer is small, and one that unpacks to gigabytes must not be unpacked.
                "Accept-Encoding": "identity",
                "Content-Type": "application/json",
            },
            "limits": httpx.Limits(max_connections=self.concurrency),
            "timeout": httpx.Timeout(self.timeout, pool=None),
            "verify": _certificates(),
        }

    def _of_process(self) -> _Shared:
        """The connections of this process: one that was forked must not use its parent's."""
        with self._lock:
            if self._shared is None or self._shared.process != os.getpid():
                options = self._options()
                slots = _Slots(lambda: httpx.Client(**options), self.concurrency)
                threads = ThreadPoolExecutor(self.concurrency, "lanerank-remote")
                end = weakref.finalize(self, _end, slots, threads)
                self._shared = _Shared(slots, threads, end, os.getpid())
            return self._shared

    async def _of_loop(self) -> _OfLoop:
        """The connections of this event loop, which no other could use."""
        loop = asyncio.get_running_loop()
        with self._lock:
            own = self._loops.get(loop)
            if own is not None:
                return own
            # The connections know their loop, so its end alone does not take them from here.
            for ended in [known for known in self._loops if known.is_closed()]:
                del self._loops[ended]
            client = httpx.AsyncClient(**self._options())
            own = _OfLoop(client, asyncio.Semaphore(self.concurrency), _until_closed(client))
            self._loops[loop] = own
        await anext(own.closing)
        return own


class _Slots:
    """Clients that one thread has at a time, made when they are needed.

    httpx may share a client between threads, but while one looks whether an idle connection is
    still good, another may begin to use it and find it closed.
    """

    def __init__(self, make: Callable[[], httpx.Client], count: int) -> None:
        self._make = make
        self._made: list[httpx.Client] = []
        # The last one in is the first one out: its connection is the most likely to be open.
        self._free: LifoQueue[httpx.Client | None] = LifoQueue()
        for _ in range(count):
            self._free.put(None)

    @contextmanager
    def take(self) -> Iterator[httpx.Client]:
        """A client that nobody else has, as soon as there is one."""
        client = self._free.get()
        try:
            if client is None:
                client = self._make()
                self._made.append(client)
            yield client
        finally:
            self._free.put(client)

    def close(self) -> None:
        for client in self._made:
            client.close()


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the threads of a process share."""

    slots: _Slots
    threads: ThreadPoolExecutor
    end: weakref.finalize[..., Transport]
    """Closes both, at the latest when the transport is gone."""
    process: int


def _end(slots: _Slots, threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=False, cancel_futures=True)
    slots.close()


@dataclass(frozen=True, slots=True)
class _OfLoop:
    """What the calls on one event loop share."""

    client: httpx.AsyncClient
    slots: asyncio.Semaphore
    closing: AsyncGenerator[None, None]


async def _until_closed(client: httpx.AsyncClient) -> AsyncGenerator[None, None]:
    """Close a client with its event loop, which ends the generators that were begun on it."""
    try:
        yield
    finally:
        await client.aclose()


class _Answer:
    """An answer as it arrives, up to a limit."""

    def __init__(self, response: httpx.Response, asked: int) -> None:
        self.response = response
        # A service may repeat the texts, with each character written as `\uXXXX`.
        self.limit = _ROOM + 6 * asked if response.is_success else _ERROR_ROOM
        self.pieces: list[bytes] = []
        self._size = 0

    @property
    def too_large(self) -> bool:
        return self._size > self.limit

    @property
    def text(self) -> str:
        return b"".join(self.pieces).decode("utf-8", "replace")

    def read(self, end: float) -> None:
        """Read until the end, the limit, or the time `end` of the monotonic clock."""
        for piece in self.response.iter_raw():
            self._keep(piece)
            if self.too_large:
                return
            if time.monotonic() > end:
                raise httpx.ReadTimeout("the answer came too slowly")

    async def aread(self) -> None:
        """Read until the end or the limit; the caller minds the time."""
        async for piece in self.response.aiter_raw():
            self._keep(piece)
            if self.too_large:
                return

    def _keep(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self._size += len(piece)


class _Authorization(httpx.Auth):
    """Puts the key into a request at the last moment, so that it stands nowhere else."""

    def __init__(self, key: SecretStr, shape: Key) -> None:
        self._key = key
        self._shape = shape

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers[self._shape.header] = self._shape.prefix + self._key.get_secret_value()
        yield request


@cache
def _certificates() -> ssl.SSLContext:
    """Whom to trust, read once: that takes longer than many a request."""
    return httpx.create_ssl_context()


def find_address(url: str | None, contract: ServiceContract) -> str:
    """Where requests go: the address and the contract's path, of which the address may have a part.

    Raises:
        InputError: It is no address, or has parts that could hold a secret.
    """
    given = contract.url if url is None else url
    if given is None:
        raise InputError(
            f"`url` is missing; {contract.service!r} runs where you started it, such as "
            "'http://localhost:8000'"
        )
    try:
        parsed = httpx.URL(given)
    except (httpx.InvalidURL, TypeError) as error:
        raise InputError(f"`url` {given!r} is no address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InputError(f"`url` must be 'http://HOST' or 'https://HOST', got {given!r}")
    if parsed.userinfo or parsed.query or parsed.fragment:
        # Not shown: it may hold a secret, and so might any log that shows the address.
        raise InputError(
            f"`url` of {parsed.host!r} has a user, a query or a fragment; leave them out, and pass "
            "a key as `api_key`"
        )
    base, steps = parsed.path.rstrip("/"), contract.path.strip("/").split("/")
    shared = next(
        count
        for count in range(len(steps), -1, -1)
        if base.endswith("".join(f"/{step}" for step in steps[:count]))
    )
    return str(parsed.copy_with(path=base + "".join(f"/{step}" for step in steps[shared:])))


def find_key(
    api_key: str | SecretStr | None, contract: ServiceContract, url: str
) -> SecretStr | None:
    """The key for an address: the one given, or that of the contract's environment variable.

    The latter is not for an address other than a hosted service's own.

    Raises:
        InputError: It is required and missing, or not usable; the message does not show it.
    """
    shape = contract.key
    if shape is None:
        if api_key is not None:
            raise InputError(f"`api_key` is given, and {contract.service!r} has no place for one")
        return None
    home = contract.url is None or _origin(contract.url) == _origin(url)
    if api_key is None and home:
        api_key = os.environ.get(shape.environment)
    if not api_key:
        if shape.required and home:
            raise InputError(
                f"{contract.service!r} wants a key: pass `api_key`, or set {shape.environment}"
            )
        return None
    if not isinstance(api_key, str | SecretStr):
        raise InputError(f"`api_key` must be a str or SecretStr, got {type(api_key).__name__}")
    key = SecretStr(api_key) if isinstance(api_key, str) else api_key
    # httpx would show the value of a header that it cannot send.
    if not all("!" <= char <= "~" for char in key.get_secret_value()):
        raise InputError(
            "`api_key` has white space or characters beyond ASCII, which no header can hold; it "
            "may have been copied with a line end"
        )
    return key


def _origin(url: str) -> tuple[str, str, int | None]:
    parsed = httpx.URL(url)
    return parsed.scheme, parsed.host, parsed.port


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, from either form that the header has."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            when = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return None
        seconds = (when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _said(text: str) -> str:
    """What an answer that is no success says in words, without the request that it may repeat."""
    try:
        return "; ".join(_messages(json.loads(text))) or text
    except (ValueError, RecursionError):
        return text


def _messages(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _messages(each)
    elif isinstance(value, dict):
        for name in ("error", "detail", "message", "msg"):
            yield from _messages(value.get(name))


def _remedy(status: int | None) -> str:
    if status is None:
        return "check that the service runs there, or raise `timeout` or `max_retries`"
    if status in (401, 403):
        return (
            "check the key; one from the environment goes to a service's own address only, so pass "
            "`api_key` for another"
        )
    if status == 429:
        return "lower `concurrency`, or ask for a higher limit"
    if status >= 500:
        return "look at the service's log"
    if status >= 400:
        return "check `service`, `model` and the address, and that the texts are not too long"
    if status >= 300:
        return "pass the address it sends to, if you trust it"
    return "check that `service` is what runs there"


def _count(name: str, value: object, *, least: int) -> int:
    if type(value) is not int or value < least:
        raise InputError(f"`{name}` must be an int, at least {least}, got {value!r}")
    return value
