"""What stands between the network and the application: token, size, strict JSON, error answers."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import traceback
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope

from lanerank.display import one_line
from lanerank.errors import (
    InputError,
    InstructionError,
    InstructionNotSupportedError,
    LanerankError,
)
from lanerank.serving.schemas import ErrorAnswer, Problem
from lanerank.serving.settings import ServerSettings

log = logging.getLogger(__name__)

_JSON = "application/json"
_AGAIN = {"Retry-After": "1"}
_SHOWN_PROBLEMS = 3
_SHOWN_CHARS = 100
"""How much of a name that the caller chose an answer repeats."""


class Refusal(HTTPException):
    """An answer that is no success, in a form that programs can rely on."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Name the kind of problem, and the field that has it."""
        super().__init__(status, message, headers)
        self.kind = kind
        self.param = param

    @classmethod
    def busy(cls) -> Refusal:
        """More requests wait than may."""
        return cls(
            429,
            "overloaded",
            "too many requests are waiting for the model; ask again after the seconds that "
            "`Retry-After` says, and with fewer at a time",
            headers=_AGAIN,
        )

    @classmethod
    def unavailable(cls, why: str) -> Refusal:
        """Nobody is there to answer, which may pass."""
        return cls(503, "unavailable", f"{why}; ask again later", headers=_AGAIN)


class StrictRequest(Request):
    """A request whose body is read up to a limit, and parsed as JSON and nothing looser."""

    def __init__(self, scope: Scope, receive: Receive, settings: ServerSettings) -> None:
        """Take over a request of which nothing was read."""
        super().__init__(scope, receive)
        self.settings = settings

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The body in pieces; whoever reads it stops at the limit."""
        size = 0
        async for piece in super().stream():
            size += len(piece)
            self.check_size(size)
            yield piece

    async def json(self) -> Any:  # noqa: ANN401 - any JSON value
        """The body as JSON values."""
        body = await self.body()
        try:
            # Python's own parser takes NaN and lone surrogates.
            value = from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise Refusal(400, "invalid_json", f"the body is not JSON: {error}") from None
        documents = value.get("documents") if isinstance(value, dict) else None
        # Before they are checked one by one: a short text can hold millions, and each costs memory.
        if isinstance(documents, list) and len(documents) > self.settings.max_documents:
            raise Refusal(
                413,
                "too_many_documents",
                f"`documents` has {len(documents)} entries, more than the "
                f"{self.settings.max_documents} that this server takes; send several requests",
                param="documents",
            )
        return value

    def check_head(self) -> None:
        """Refuse what need not be read."""
        if self.method != "POST":
            return
        # Browsers send other types to any site, without asking it first.
        media = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != _JSON:
            raise Refusal(
                415,
                "unsupported_media_type",
                f"`Content-Type` is {one_line(media, _SHOWN_CHARS)!r}, expected {_JSON!r}",
            )
        length = self.headers.get("content-length", "")
        self.check_size(int(length[:20]) if length.isdecimal() else 0)

    def check_size(self, size: int) -> None:
        """Refuse a body of more bytes than the limit."""
        if size > self.settings.max_bytes:
            raise Refusal(
                413,
                "too_large",
                f"the body has more than the {self.settings.max_bytes} bytes that this server "
                "reads; send several requests",
            )


def guarded_route(settings: ServerSettings) -> type[APIRoute]:
    """Routes that ask for the token before anything is read, and let no defect show.

    Raises:
        InputError: The environment variable of the token is not set.
    """
    token = settings.token()
    expected = None if token is None else _digest(token.get_secret_value())

    class GuardedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def guarded(request: Request) -> Response:
                if expected is not None:
                    _check_token(request, expected)
                strict = StrictRequest(request.scope, request.receive, settings)
                strict.check_head()
                try:
                    # Around reading as well: a body that never ends must not hold a place.
                    async with asyncio.timeout(settings.timeout_s):
                        return await handle(strict)
                except (HTTPException, RequestValidationError):
                    raise
                except Exception as error:  # noqa: BLE001 - whatever it is, callers get an answer
                    raise _refusal(error, self.path) from None

            return guarded

    return GuardedRoute


def explain_errors(app: FastAPI) -> None:
    """Give every answer of the application that is no success the shape of an `ErrorAnswer`."""

    @app.exception_handler(HTTPException)
    async def explain_http(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Refusal):
            problem = Problem(type=error.kind, message=error.detail, param=error.param)
        elif error.status_code == 404:
            problem = Problem(type="not_found", message="no such path; see /openapi.json")
        elif error.status_code == 405:
            problem = Problem(
                type="method_not_allowed", message="no such method here; see the header `Allow`"
            )
        else:
            problem = Problem(type="invalid_request", message=error.detail)
        return _answer(error.status_code, problem, error.headers)

    @app.exception_handler(RequestValidationError)
    async def explain_validation(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        # Every place begins with the word `body`.
        places = [one_line(".".join(map(str, each["loc"][1:])), _SHOWN_CHARS) for each in found]
        told = [
            f"{f'`{place}`' if place else 'the body'}: {_said(each)}"
            for place, each in zip(places, found[:_SHOWN_PROBLEMS], strict=False)
        ]
        more = len(found) - len(told)
        message = "; ".join(told) + (f"; and {more} more" if more else "")
        return _answer(
            422, Problem(type="invalid_request", message=message, param=places[0] or None)
        )


def _check_token(request: Request, expected: bytes) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Digests have one length, so that the time tells nothing of the token, its length included.
    same = hmac.compare_digest(_digest(given.strip()), expected)
    if not same or scheme.lower() != "bearer":
        raise Refusal(
            401,
            "unauthorized",
            "send the token of this server as `Authorization: Bearer TOKEN`",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _said(problem: Mapping[str, Any]) -> str:
    if problem["type"] in ("model_type", "model_attributes_type"):
        return "expected an object"
    return str(problem["msg"]).removeprefix("Value error, ")


def _answer(status: int, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(ErrorAnswer(error=problem).model_dump(), status, headers)


def _refusal(error: Exception, path: str) -> Refusal:
    """The answer to what went wrong, without anything that the caller has no business to know."""
    if isinstance(error, InstructionNotSupportedError):
        return Refusal(400, "instruction_not_supported", str(error), param="instruction")
    if isinstance(error, InstructionError):
        return Refusal(400, "invalid_instruction", str(error), param="instruction")
    if isinstance(error, InputError):
        named = re.match(r"`(\w+)", str(error))
        return Refusal(400, "invalid_input", str(error), param=named[1] if named else None)
    if isinstance(error, TimeoutError):
        return Refusal.unavailable("no answer came in the time that this server allows")
    # The message of an exception can hold what a document says; where it was raised does not.
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s while answering %s\n%s", type(error).__name__, path, frames)
    log.debug("the error in full", exc_info=error)
    kind = "model_error" if isinstance(error, LanerankError) else "internal_error"
    return Refusal(500, kind, "the server could not answer; its log says where it failed")
