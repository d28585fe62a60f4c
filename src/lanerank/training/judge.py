"""Pairwise judges: chat models of any framework, asked which of two entries is the better one."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import stamina

from lanerank.display import one_line
from lanerank.errors import InputError, JudgeError
from lanerank.lanes import clean_text
from lanerank.training.questions import Question, read_answer
from lanerank.training.verdicts import Cost, Verdict

_REMINDER = """
Your last reply could not be read. Reply with one JSON object and nothing else: \
{"reason": "<text>", "preference": <number from -1 to 1>}"""

_MOST_SECONDS = 30.0
_QUOTE_WIDTH = 200


@dataclass(frozen=True, slots=True)
class _Reply:
    text: object
    input_tokens: int | None = None
    output_tokens: int | None = None


class Judge:
    """A chat model that says which of two entries is the better one, and why.

    Args:
        model: A LangChain chat model or other runnable (it has `invoke`), a LlamaIndex LLM (it has
            `complete`), or a function from a prompt to a reply. It is called from several threads.
            Clients of both frameworks repeat requests that a server refused; so should a function.
        name: Stands for the model and all its settings: answers are remembered under it, so that
            another model, or a temperature, is another name.
        attempts: How often a question is asked, at most, until the answer can be read. A
            `ConnectionError` or `TimeoutError` counts as an attempt, and all other exceptions of
            the model end the question at once.
        wait: Seconds before a question is asked again after such an exception, twice as many each
            further time, up to 30.

    Raises:
        InputError: An argument is not usable.
    """

    def __init__(self, model: object, *, name: str, attempts: int = 3, wait: float = 1.0) -> None:
        """Check the arguments, and find out how the model is called."""
        if not isinstance(name, str) or not name.strip():
            raise InputError(
                f"`name` must be a text such as 'gpt-5-mini, temperature 0', got {name!r}"
            )
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise InputError(f"`attempts` must be an integer from 1, got {attempts!r}")
        if not 0 <= wait < float("inf"):
            raise InputError(f"`wait` must be a number of seconds, got {wait!r}")
        self.name = name
        self.attempts = attempts
        self.wait = wait
        self._call = _caller(model)

    def ask(self, question: Question) -> Verdict:
        """The verdict on a question.

        Raises:
            JudgeError: No attempt gave an answer that can be read, or the model failed.
        """
        cost, reply = Cost(), _Reply("")
        system = question.system
        try:
            for attempt in stamina.retry_context(
                on=_pause,
                attempts=self.attempts,
                timeout=None,
                wait_initial=self.wait,
                wait_max=max(self.wait, _MOST_SECONDS),
                wait_jitter=self.wait / 2,
            ):
                with attempt:
                    cost += Cost(calls=1, characters_sent=len(system) + len(question.data))
                    reply = self._call(system, question.data)
                    cost += _received(reply)
                    # Without it a model at temperature 0 would say the same again. A part of the
                    # task: what a judge made of a function reads has to end in the JSON object.
                    system = question.system + _REMINDER
                    answer = read_answer(_text(reply.text))
        except InputError as error:
            said = reply.text if isinstance(reply.text, str) else reprlib.repr(reply.text)
            raise JudgeError(
                f"the judge {self.name!r} gave no usable answer in {cost.calls} attempts; the last "
                f"was {one_line(said, _QUOTE_WIDTH)!r}: {error}; check that its answers are not "
                "cut off, or take a model that keeps to a format",
                judge=self.name,
                cost=cost,
            ) from error
        except Exception as error:
            raise JudgeError(
                f"the judge {self.name!r} failed at attempt {cost.calls} with "
                f"{type(error).__name__}: {one_line(str(error), _QUOTE_WIDTH)}; what was answered "
                "before is kept if the panel has a cache",
                judge=self.name,
                cost=cost,
            ) from error
        return Verdict(
            key=question.key(self.name),
            judge=self.name,
            preference=answer.preference,
            # Models have been seen to send lone surrogates, which no file can hold.
            reason=clean_text(answer.reason),
            cost=cost,
        )


def _pause(error: Exception) -> bool | float:
    """Whether to ask again, or after how many seconds."""
    if isinstance(error, InputError):
        return 0.0
    return isinstance(error, ConnectionError | TimeoutError)


def _text(reply: object) -> str:
    if isinstance(reply, str):
        return reply
    raise InputError(f"expected text, got {type(reply).__name__}")


def _received(reply: _Reply) -> Cost:
    metered = reply.input_tokens is not None and reply.output_tokens is not None
    return Cost(
        characters_received=len(reply.text) if isinstance(reply.text, str) else 0,
        metered_calls=int(metered),
        input_tokens=reply.input_tokens or 0 if metered else 0,
        output_tokens=reply.output_tokens or 0 if metered else 0,
    )


# Models of frameworks, told apart by what they can do


def _caller(model: object) -> Callable[[str, str], _Reply]:
    if not isinstance(model, type):
        for method, call in (("invoke", _invoke), ("complete", _complete)):
            if callable(found := getattr(model, method, None)):
                return partial(call, found)
        if callable(model):
            return partial(_apply, model)
    raise InputError(
        "`model` must be a LangChain chat model, a LlamaIndex LLM, or a function from a prompt to "
        f"a reply; got {reprlib.repr(model)}"
    )


def _invoke(invoke: Callable[[object], object], system: str, data: str) -> _Reply:
    message = invoke([("system", system), ("human", data)])
    usage = getattr(message, "usage_metadata", None)
    return _Reply(
        _joined(getattr(message, "content", message)),
        _count(usage, "input_tokens"),
        _count(usage, "output_tokens"),
    )


def _complete(complete: Callable[[str], object], system: str, data: str) -> _Reply:
    response = complete(f"{system}\n\n{data}")
    usage = getattr(response, "additional_kwargs", None)
    return _Reply(
        getattr(response, "text", response),
        _count(usage, "prompt_tokens"),
        _count(usage, "completion_tokens"),
    )


def _apply(function: Callable[[str], object], system: str, data: str) -> _Reply:
    return _Reply(function(f"{system}\n\n{data}"))


def _joined(content: object) -> object:
    """The text of a message: a string, or a list of blocks of which some are thoughts or images."""
    if not isinstance(content, list):
        return content
    parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
    return "".join(part for part in parts if isinstance(part, str))


def _count(usage: object, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and value >= 0 else None
