"""Where instructions come from: scopes, resolution order, derivation from user metadata."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import datetime
import enum
import sys
import threading
import typing
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from lanerank.context import (
    InstructionContext,
    Resolved,
    Source,
    current_instruction,
    derive_instruction,
    resolve_instruction,
    use_instruction,
)
from lanerank.errors import InputError, InstructionError, InstructionMissingError
from lanerank.instruction import Instruction, InstructionLike

A, B = Instruction("a"), Instruction("b")


# Scopes


def test_there_is_no_instruction_outside_a_scope() -> None:
    assert current_instruction() is None


def test_a_scope_applies_inside_its_block_only() -> None:
    with use_instruction("a") as entered:
        assert current_instruction() == entered == A
    assert current_instruction() is None


def test_an_inner_scope_replaces_and_then_restores_the_outer_one() -> None:
    with use_instruction(A):
        with use_instruction(B):
            assert current_instruction() == B
        assert current_instruction() == A


@pytest.mark.parametrize("nothing", [None, "", "  ", Instruction()])
def test_an_empty_inner_scope_hides_the_outer_one(nothing: InstructionLike) -> None:
    with use_instruction(A):
        with use_instruction(nothing) as entered:
            assert current_instruction() is entered is None
        assert current_instruction() == A


def test_a_scope_ends_when_its_block_raises() -> None:
    with pytest.raises(KeyError), use_instruction(A):
        raise KeyError
    assert current_instruction() is None


def test_wrong_types_are_refused_on_the_spot() -> None:
    wrong: Any = ["a"]
    with pytest.raises(InputError, match=r"`instruction` must be .* list"):
        use_instruction(wrong)


def test_a_scope_is_for_one_with() -> None:
    scope = use_instruction(A)
    with scope, pytest.raises(InstructionError, match="entered before"):
        scope.__enter__()
    with pytest.raises(InstructionError, match="without being entered"):
        use_instruction(A).__exit__(None, None, None)


def test_a_scope_does_not_decorate_because_async_functions_would_lose_it() -> None:
    assert not callable(use_instruction(A))


def test_leaving_in_another_context_is_reported() -> None:
    scope = use_instruction(A)
    contextvars.copy_context().run(scope.__enter__)
    with pytest.raises(InstructionError, match="another context"):
        scope.__exit__(None, None, None)


# Propagation


def test_tasks_inherit_the_scope_in_which_they_start() -> None:
    async def read() -> Instruction | None:
        await asyncio.sleep(0)
        return current_instruction()

    async def main() -> list[Instruction | None]:
        with use_instruction(A):
            task = asyncio.create_task(read())
            awaited = await read()
        return [await task, awaited, await read()]

    assert asyncio.run(main()) == [A, A, None]


def test_concurrent_tasks_do_not_bleed() -> None:
    async def read(name: str) -> str:
        with use_instruction(name):
            for _ in range(3):
                await asyncio.sleep(0)
            in_thread = await asyncio.to_thread(current_instruction)
        assert current_instruction() is None
        assert in_thread is not None
        return in_thread.render()

    async def main() -> list[str]:
        return await asyncio.gather(*(read(name) for name in "abcdefgh"))

    assert asyncio.run(main()) == list("abcdefgh")


def test_a_scope_opened_in_a_task_stays_in_it() -> None:
    async def main() -> Instruction | None:
        opened, read = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            with use_instruction(A):
                opened.set()
                await read.wait()

        task = asyncio.create_task(hold())
        await opened.wait()
        seen = current_instruction()
        read.set()
        await task
        return seen

    assert asyncio.run(main()) is None


def test_to_thread_carries_the_scope() -> None:
    async def main() -> Instruction | None:
        with use_instruction(A):
            return await asyncio.to_thread(current_instruction)

    assert asyncio.run(main()) == A


def test_executors_carry_the_scope_through_a_copied_context() -> None:
    with ThreadPoolExecutor(1) as pool:
        for instruction in (A, B):
            with use_instruction(instruction):
                job = pool.submit(contextvars.copy_context().run, current_instruction)
            assert job.result() == instruction


@pytest.mark.skipif(
    getattr(sys.flags, "thread_inherit_context", 0) == 1,
    reason="threads of this interpreter inherit the context",
)
def test_bare_threads_and_executors_do_not_carry_the_scope() -> None:
    seen: list[Instruction | None] = []
    with use_instruction(A):
        thread = threading.Thread(target=lambda: seen.append(current_instruction()))
        thread.start()
        thread.join()
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(current_instruction).result())
    assert seen == [None, None]


# Resolving


def test_the_first_offer_wins() -> None:
    found = resolve_instruction([(Source.ARGUMENT, "a"), (Source.FIELD, "b")])
    assert found == Resolved(instruction=A, source=Source.ARGUMENT)


@pytest.mark.parametrize("nothing", [None, "", " \n", Instruction(), lambda: None, lambda: " "])
def test_blank_offers_are_passed_over(nothing: InstructionLike | Callable[[], None]) -> None:
    found = resolve_instruction([(Source.ARGUMENT, nothing), (Source.FIELD, B)])
    assert found.source is Source.FIELD


def test_nothing_found_gives_the_empty_instruction_and_no_source() -> None:
    assert resolve_instruction([]) == Resolved(instruction=Instruction(), source=None)
    assert resolve_instruction([(Source.FIELD, None)]).source is None


def test_later_offers_are_not_called() -> None:
    called: list[str] = []

    def offer(name: str, value: str | None) -> Callable[[], str | None]:
        def call() -> str | None:
            called.append(name)
            return value

        return call

    found = resolve_instruction(
        [
            (Source.HANDLER, offer("first", None)),
            (Source.METADATA, offer("second", "b")),
            (Source.RUNTIME, offer("third", "c")),
        ]
    )
    assert found == Resolved(instruction=B, source=Source.METADATA)
    assert called == ["first", "second"]


@pytest.mark.parametrize("allowed", [[Source.FIELD], {"field"}, ("argument", "field"), "field"])
def test_sources_that_do_not_count_are_not_called(
    allowed: Collection[Source | str],
) -> None:
    def never() -> str:
        raise AssertionError

    offers: list[tuple[Source, InstructionLike | Callable[[], InstructionLike]]]
    offers = [(Source.METADATA, never), (Source.CONFIGURABLE, "forged"), (Source.FIELD, B)]
    assert resolve_instruction(offers, sources=allowed).source is Source.FIELD


def test_no_source_at_all_can_be_allowed() -> None:
    assert not resolve_instruction([(Source.ARGUMENT, A)], sources=()).instruction


def test_unknown_sources_are_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"\['document'\].*argument, use_instruction, .*field"):
        resolve_instruction([], sources=["field", "document"])


@pytest.mark.parametrize("value", [5, ["a"], {"text": "a"}, lambda: 5])
def test_wrong_types_name_the_source(value: object) -> None:
    wrong: Any = value
    with pytest.raises(InputError, match="`configurable` must be a str, an Instruction or None"):
        resolve_instruction([(Source.CONFIGURABLE, wrong)])


def test_an_instruction_that_is_too_long_names_source_length_and_limit() -> None:
    with pytest.raises(InstructionError, match="`metadata` has 11 characters, more than the 10"):
        resolve_instruction([(Source.METADATA, "x" * 11)], max_chars=10)
    assert resolve_instruction([(Source.METADATA, "x" * 10)], max_chars=10).instruction
    with pytest.raises(InstructionError, match="20001"):
        resolve_instruction([(Source.METADATA, Instruction(rules="x" * 20_000))])


def test_a_required_instruction_that_is_missing_lists_where_it_was_looked_for() -> None:
    offers: list[tuple[Source, InstructionLike]] = [(Source.ARGUMENT, None), (Source.HANDLER, "a")]
    with pytest.raises(InstructionMissingError, match="gave one: argument;"):
        resolve_instruction(offers, require=True, sources=["argument"])
    with pytest.raises(InstructionMissingError, match="none was allowed"):
        resolve_instruction(offers, require=True, sources=[])
    assert resolve_instruction(offers, require=True).source is Source.HANDLER


def test_scopes_resolve_as_a_source() -> None:
    with use_instruction(A):
        found = resolve_instruction([(Source.USE_INSTRUCTION, current_instruction)])
    assert found == Resolved(instruction=A, source=Source.USE_INSTRUCTION)


# What the resolver may see


def test_the_context_has_no_place_for_documents() -> None:
    hints = typing.get_type_hints(InstructionContext)
    assert set(hints) == {"query", "configurable", "metadata", "tags", "runtime_context"}
    assert {field.name for field in dataclasses.fields(InstructionContext)} == set(hints)
    signatures = [InstructionContext, Resolved, resolve_instruction, derive_instruction]
    for annotated in signatures:
        assert "Document" not in str(typing.get_type_hints(annotated))
    with pytest.raises(TypeError):
        InstructionContext(query="q", documents=["d"])  # type: ignore[call-arg]


def test_the_context_is_a_read_only_copy() -> None:
    metadata: dict[str, object] = {"department": "crewing"}
    context = InstructionContext(query="q", metadata=metadata)
    metadata["department"] = "finance"
    assert context.metadata == {"department": "crewing"}
    with pytest.raises(TypeError):
        context.metadata["department"] = "finance"  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.query = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        InstructionContext("q")  # type: ignore[call-arg]


def test_the_repr_keeps_secrets_to_itself() -> None:
    secret = {"api_key": "s3cret"}
    context = InstructionContext(
        query="q", configurable=secret, metadata=secret, runtime_context=secret
    )
    assert "s3cret" not in repr(context)


# Deriving


def fill(template: str, **metadata: object) -> InstructionLike:
    return derive_instruction(template, InstructionContext(query="q", metadata=metadata))


def test_a_callable_is_given_the_context() -> None:
    context = InstructionContext(query="q", tags=("t",))
    assert derive_instruction(lambda seen: f"{seen.query} {seen.tags[0]}", context) == "q t"
    assert derive_instruction(lambda _: None, context) is None


def test_a_template_is_filled_from_the_users_metadata() -> None:
    assert fill("The user works in {department}.", department="crewing") == (
        "The user works in crewing."
    )


class Grade(str, enum.Enum):  # noqa: UP042 - the kind whose str() is not its value
    SENIOR = "senior"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0, "0"),
        (0.5, "0.5"),
        (False, "False"),
        (datetime.date(2026, 11, 22), "2026-11-22"),
        (Grade.SENIOR, "senior"),
        ("{department}", "{department}"),
        ("{{x}} {0.__class__}", "{{x}} {0.__class__}"),
    ],
)
def test_plain_values_are_inserted_as_data(value: object, text: str) -> None:
    assert fill("{value}", value=value, department="secret") == text


def test_doubled_braces_are_braces() -> None:
    assert fill("{{a}} {b} {{{b}}}", b="c") == "{a} c {c}"


def test_a_template_without_placeholders_is_itself() -> None:
    assert fill("Prefer A.") == "Prefer A."


@pytest.mark.parametrize("runtime", [{"a": "runtime"}, SimpleNamespace(a="runtime")])
def test_a_request_cannot_replace_what_the_application_says_of_its_user(runtime: object) -> None:
    context = InstructionContext(
        query="q",
        metadata={"a": "metadata", "b": "metadata"},
        configurable={"a": "configurable", "b": "configurable", "user-id": "configurable"},
        runtime_context=runtime,
    )
    assert derive_instruction("{a} {b} {user-id}", context) == "runtime metadata configurable"


def test_a_request_cannot_fill_in_what_the_application_left_open() -> None:
    context = InstructionContext(
        query="q", metadata={"a": "metadata"}, runtime_context=SimpleNamespace(a=None)
    )
    with pytest.raises(InstructionError, match="absent or blank"):
        derive_instruction("{a}", context)


@dataclasses.dataclass(slots=True)
class Runtime:
    team: str = "crewing"


@pytest.mark.parametrize("runtime", [Runtime(), SimpleNamespace(team="crewing")])
def test_attributes_of_the_runtime_context_are_found(runtime: object) -> None:
    context = InstructionContext(query="q", runtime_context=runtime)
    assert derive_instruction("{team}", context) == "crewing"
    with pytest.raises(InstructionError, match="available are team"):
        derive_instruction("{tema}", context)
    for hidden in ("{__doc__}", "{__module__}"):
        with pytest.raises(InstructionError, match="absent"):
            derive_instruction(hidden, context)


def test_missing_names_are_all_listed_with_what_is_there() -> None:
    with pytest.raises(
        InstructionError, match=r"needs 'team', 'site', .*available are department, role"
    ) as caught:
        fill("{team} {department} {site}", department="hidden value", role="r", __pregel="p")
    assert "hidden value" not in str(caught.value)
    assert "pregel" not in str(caught.value)
    with pytest.raises(InstructionError, match="available are none"):
        fill("{team}")


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_a_blank_value_is_missing_rather_than_a_hole_in_the_sentence(blank: object) -> None:
    with pytest.raises(InstructionError, match="'department', absent or blank"):
        fill("The user works in {department}.", department=blank)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, object(), b"a", len])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(InstructionError, match=f"'value'.* {type(value).__name__};"):
        fill("{value}", value=value)


@pytest.mark.parametrize(
    "template",
    ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{}", "{0}", "{ a }", "{a", "a}", "{a!}"],
)
def test_only_plain_placeholders_are_allowed(template: str) -> None:
    with pytest.raises(InputError, match="`instruction_from`"):
        fill(template, a="x", b="y")


def test_other_kinds_of_instruction_from_are_refused() -> None:
    wrong: Any = 5
    with pytest.raises(InputError, match="callable or a template"):
        derive_instruction(wrong, InstructionContext(query="q"))
