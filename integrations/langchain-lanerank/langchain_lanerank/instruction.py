"""What a LangChain run says of the instruction. Nothing here is ever given a document."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import cast

from lanerank import InputError
from lanerank.context import InstructionContext
from lanerank.instruction import Instruction, InstructionLike
from langchain_core.callbacks import BaseCallbackHandler, Callbacks
from langchain_core.runnables import RunnableConfig


class InstructionHandler(BaseCallbackHandler):
    """Carries an instruction in `config["callbacks"]`.

    A handler reaches every retriever below the call it is given to. It is not traced, and no JSON
    can forge it, because it is a Python object. Of several that hold an instruction the one added
    last counts. It listens to nothing.
    """

    ignore_llm = True
    ignore_retry = True
    ignore_chain = True
    ignore_agent = True
    ignore_retriever = True
    ignore_chat_model = True
    ignore_custom_event = True

    def __init__(self, instruction: InstructionLike) -> None:
        """Check the instruction.

        Raises:
            InputError: If it is not a str, an `Instruction` or `None`.
        """
        self.instruction = Instruction.coerce(instruction)
        """The instruction it carries."""


def find_handler_instruction(callbacks: Callbacks, config: RunnableConfig) -> Instruction | None:
    """The instruction of the nearest `InstructionHandler`: the call's own, then the run's.

    Raises:
        InputError: If the callbacks are neither a list nor a manager.
    """
    for handler in (*_nearest_first(callbacks), *_nearest_first(config.get("callbacks"))):
        if isinstance(handler, InstructionHandler) and handler.instruction:
            return handler.instruction
    return None


def _nearest_first(callbacks: Callbacks) -> Iterable[BaseCallbackHandler]:
    if callbacks is None:
        return ()
    # LangChain also takes the manager of a single run, which is of another class.
    handlers = callbacks if isinstance(callbacks, list) else getattr(callbacks, "handlers", None)
    if handlers is None:
        # A handler that is not in a list would be passed over, and its instruction with it.
        raise InputError(
            "`callbacks` must be a list of handlers or a callback manager, got "
            f"{type(callbacks).__name__}; wrap a single handler in a list"
        )
    return reversed(handlers)


def read_context(query: str, callbacks: Callbacks, config: RunnableConfig) -> InstructionContext:
    """What the run says of itself and its user.

    Args:
        query: The query being ranked for.
        callbacks: The callbacks of the call. Their metadata and tags go first: they are what
            LangChain hands down where it does not hand down the configuration.
        config: The configuration of the run, as `ensure_config` completes it.
    """
    tags = (*getattr(callbacks, "tags", ()), *(config.get("tags") or ()))
    return InstructionContext(
        query=query,
        configurable=config.get("configurable") or {},
        metadata={**(config.get("metadata") or {}), **getattr(callbacks, "metadata", {})},
        tags=tuple(dict.fromkeys(tags)),
        runtime_context=_runtime_context(),
    )


def look_up(values: object, key: str) -> InstructionLike:
    """The instruction under a key of a mapping, or in the attribute of that name.

    A mapping there is an instruction by its parts, as JSON writes it.

    Raises:
        InputError: If the parts are not those of an instruction.
    """
    found = values.get(key) if isinstance(values, Mapping) else getattr(values, key, None)
    if isinstance(found, Mapping):
        return Instruction(**{str(name): part for name, part in found.items()})
    # Anything else may be there too; `resolve_instruction` refuses what is no instruction.
    return cast("InstructionLike", found)


def _runtime_context() -> object | None:
    """The context object of the LangGraph run around this call, `None` outside of one."""
    if "langgraph.runtime" not in sys.modules:
        # No graph can be running, and LangGraph need not be installed.
        return None
    from langgraph.runtime import get_runtime

    try:
        runtime = get_runtime()
    except (RuntimeError, KeyError):
        # Outside of any run, or in one whose configuration has no configurable part.
        return None
    # In a chain without a graph there is no runtime, whatever the annotation says.
    return cast("object | None", getattr(runtime, "context", None))
