"""Where an instruction comes from: scopes, sources in order of priority, and templates.

Nothing here can see a document. The types have no field for one, so no source, callable or
template can take an instruction from retrieved text.
"""

from __future__ import annotations

import re
import reprlib
import string
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from types import MappingProxyType, TracebackType

from lanerank.errors import InputError, InstructionError, InstructionMissingError
from lanerank.instruction import Instruction, InstructionLike

_current: ContextVar[Instruction | None] = ContextVar("lanerank_instruction", default=None)
_NAME = r"[^\W\d][\w-]*"


class Source(StrEnum):
    """Where an instruction was found. A ranking carries the name."""

    ARGUMENT = "argument"
    """The `instruction=` of the call."""
    USE_INSTRUCTION = "use_instruction"
    """An enclosing `use_instruction(...)`."""
    HANDLER = "handler"
    """A typed callback handler; cannot be forged from JSON."""
    BUNDLE = "bundle"
    """A query bundle that carries an instruction."""
    CONFIGURABLE = "configurable"
    """The `configurable` values of a run's configuration; may be user input on a server."""
    METADATA = "metadata"
    """The metadata of a run, never of a document; may be user input, and is traced."""
    INSTRUMENT_TAGS = "instrument_tags"
    """Instrumentation tags, where they are opted into; traced."""
    RUNTIME = "runtime"
    """The runtime context object of an agent or graph; may be user input on a server."""
    INSTRUCTION_FROM = "instruction_from"
    """A callable or a template over an `InstructionContext`."""
    FIELD = "field"
    """The default set on the component."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionContext:
    """What `instruction_from` may look at. Documents are absent on purpose.

    The mappings are read-only copies. The `repr` leaves them out, since they may hold secrets.
    """

    query: str
    """The query being ranked for."""
    configurable: Mapping[str, object] = field(default_factory=dict, repr=False)
    """The `configurable` values of the run's configuration."""
    metadata: Mapping[str, object] = field(default_factory=dict, repr=False)
    """What the application says of the run and its user."""
    tags: tuple[str, ...] = ()
    """The tags of the run."""
    runtime_context: object | None = field(default=None, repr=False)
    """The runtime context object of an agent or graph, as it is."""

    def __post_init__(self) -> None:
        """Copy the mappings, so that nothing reaches back into the caller's configuration."""
        object.__setattr__(self, "configurable", MappingProxyType(dict(self.configurable)))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """The instruction that counts, and where it was found."""

    instruction: Instruction
    """The empty instruction where no source gave one."""
    source: Source | None = None
    """`None` where no source gave one."""


class _Scope:
    """One `with use_instruction(...)` block.

    Not built on `contextlib.contextmanager`, whose objects also work as decorators: on an async
    function the scope would close before the body runs, and the instruction would be lost.
    """

    def __init__(self, instruction: Instruction) -> None:
        self._instruction = instruction or None
        self._token: Token[Instruction | None] | None = None

    def __enter__(self) -> Instruction | None:
        if self._token is not None:
            raise InstructionError(
                "this `use_instruction(...)` was entered before; make a new one for each `with`"
            )
        self._token = _current.set(self._instruction)
        return self._instruction

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._token is None:
            raise InstructionError("`use_instruction(...)` was left without being entered")
        try:
            _current.reset(self._token)
        except ValueError:
            raise InstructionError(
                "`use_instruction(...)` was left in another context than it was entered in, so "
                "code between may not have seen the instruction; enter and leave it in the same "
                "task or thread, or pass `instruction=` to the call"
            ) from None


def use_instruction(
    instruction: InstructionLike,
) -> AbstractContextManager[Instruction | None, None]:
    """Apply an instruction to every ranking inside a `with` block.

    It reaches asyncio tasks started inside the block, `asyncio.to_thread`, and functions run
    through `contextvars.copy_context().run`. It does not reach threads started by hand, bare
    `ThreadPoolExecutor` workers or `loop.run_in_executor`: pass `instruction=` there. Do not
    `yield` inside the block, since the consumer of the generator would see the instruction.

    Args:
        instruction: Replaces that of an outer block (write `outer + inner` to layer them);
            `None` hides it.

    Returns:
        A context manager, for one `with`, that gives the instruction.

    Raises:
        InputError: At once, if `instruction` has the wrong type.
    """
    return _Scope(Instruction.coerce(instruction))


def current_instruction() -> Instruction | None:
    """The instruction of the innermost `use_instruction` block, `None` outside of any."""
    return _current.get()


def resolve_instruction(
    offers: Iterable[tuple[Source, InstructionLike | Callable[[], InstructionLike]]],
    *,
    sources: Collection[Source | str] | None = None,
    require: bool = False,
    max_chars: int = 20_000,
) -> Resolved:
    """Take the first instruction that is offered, in the order of the offers.

    Args:
        offers: What each source has, best first. A callable is called only when its turn comes;
            `None` and blank offers are passed over.
        sources: The sources that count, all by default. Others are neither called nor looked at.
        require: Whether finding none is an error.
        max_chars: The most characters that a rendered instruction may have.

    Raises:
        InputError: If an offer has the wrong type, or `sources` an unknown name.
        InstructionError: If the instruction found is longer than `max_chars`.
        InstructionMissingError: If `require` is set and no source gave an instruction.
    """
    allowed = _known_sources(sources)
    looked_at: list[Source] = []
    for source, offer in offers:
        if source not in allowed:
            continue
        looked_at.append(source)
        value = offer() if callable(offer) else offer
        instruction = Instruction.coerce(value, name=f"the instruction from `{source}`")
        if instruction.is_empty:
            continue
        if (length := len(instruction.render())) > max_chars:
            raise InstructionError(
                f"the instruction from `{source}` has {length} characters, more than the "
                f"{max_chars} that it may have; shorten it to what decides the order"
            )
        return Resolved(instruction=instruction, source=source)
    if require:
        raise InstructionMissingError(
            "an instruction is required, and none of the sources looked at gave one: "
            f"{', '.join(dict.fromkeys(looked_at)) or 'none was allowed'}; pass `instruction=` or "
            "use one of these sources"
        )
    return Resolved(instruction=Instruction())


def derive_instruction(
    instruction_from: Callable[[InstructionContext], InstructionLike] | str,
    context: InstructionContext,
) -> InstructionLike:
    """An instruction computed from what the application knows of the run and its user.

    Args:
        instruction_from: A callable, or a template such as
            `"The user works in {department}."`. Names are looked up in the runtime context (keys or
            public attributes), then in the metadata, then in the configurable values: what the
            application built itself goes before what a request may have brought. Values are text,
            numbers, booleans or dates, and are inserted as they are: braces in them mean nothing,
            but sentences in them become part of the instruction. `{{` and `}}` stand for braces.
        context: Where to look.

    Raises:
        InputError: If the template has anything but plain `{name}` placeholders.
        InstructionError: If the context lacks a name, or its value is not plain.
    """
    if isinstance(instruction_from, str):
        return _fill(instruction_from, context)
    if callable(instruction_from):
        return instruction_from(context)
    raise InputError(
        "`instruction_from` must be a callable or a template str, got "
        f"{type(instruction_from).__name__}: {reprlib.repr(instruction_from)}"
    )


def _known_sources(sources: Collection[Source | str] | None) -> frozenset[Source]:
    if sources is None:
        return frozenset(Source)
    names = [sources] if isinstance(sources, str) else list(sources)
    if unknown := [name for name in names if name not in list(Source)]:
        raise InputError(f"`sources` has unknown names {unknown!r}; known are {', '.join(Source)}")
    return frozenset(map(Source, names))


def _fill(template: str, context: InstructionContext) -> str:
    pieces = _parse(template)
    values = {name: _look_up(name, context) for _, name in pieces if name is not None}
    # A sentence with a hole in it would be followed all the same, so a blank is no value.
    missing = [name for name, value in values.items() if value is None or not str(value).strip()]
    if missing:
        raise InstructionError(
            f"`instruction_from` needs {', '.join(map(repr, missing))}, absent or blank here; "
            f"available are {', '.join(_names(context)) or 'none'}; set them in the metadata of "
            "the run, or use a callable that can do without"
        )
    plain = {name: _plain(name, value) for name, value in values.items()}
    return "".join(text + ("" if name is None else plain[name]) for text, name in pieces)


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Pairs of literal text and the name that follows it."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"`instruction_from` is not a template, {error}: {reprlib.repr(template)}; write "
            "`{{` and `}}` for braces"
        ) from None
    for _, name, spec, conversion in fields:
        # Attributes, indexes, conversions and formats would reach into or call into objects.
        if name is not None and (spec or conversion or not re.fullmatch(_NAME, name)):
            raise InputError(
                f"`instruction_from` has the placeholder {name!r} with "
                f"{'a conversion or format' if spec or conversion else 'more than a name'}; only "
                "plain `{name}` is allowed, use a callable for anything else"
            )
    return [(text, name) for text, name, _, _ in fields]


def _look_up(name: str, context: InstructionContext) -> object:
    runtime = context.runtime_context
    if not isinstance(runtime, Mapping) and not name.startswith("_") and hasattr(runtime, name):
        return getattr(runtime, name)
    for mapping in (runtime, context.metadata, context.configurable):
        if isinstance(mapping, Mapping) and name in mapping:
            return mapping[name]
    return None


def _names(context: InstructionContext) -> list[str]:
    names = {str(name) for name in (*context.metadata, *context.configurable)}
    runtime = context.runtime_context
    if not isinstance(runtime, Mapping):
        runtime = getattr(runtime, "__dataclass_fields__", None) or getattr(runtime, "__dict__", {})
    names.update(map(str, runtime))
    return sorted(name for name in names if not name.startswith("_"))


def _plain(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | date):
        return str(value)
    raise InstructionError(
        f"`instruction_from` cannot insert {name!r}: expected a str, number, bool or date, got "
        f"{type(value).__name__}; use a callable to turn it into text"
    )
