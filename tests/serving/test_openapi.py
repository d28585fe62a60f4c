"""The server against its own description, with requests made from it and spoilt on purpose."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from lanerank.serving.app import create_app
from lanerank.serving.settings import ServerSettings

HEADERS = {"Authorization": "Bearer s3cr3t"}
OPERATIONS = {
    "/v1/rerank": "POST",
    "/v2/rerank": "POST",
    "/score": "POST",
    "/health": "GET",
    "/metrics": "GET",
}


@pytest.fixture(scope="module")
def schema(tiny_scorer):
    """The description of a server over a real model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKER_TOKEN", "s3cr3t")
        app = create_app(tiny_scorer, ServerSettings(token_env="RANKER_TOKEN"))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def test_every_path_is_tried(schema) -> None:
    found = {result.ok().path: result.ok().method.upper() for result in schema.get_all_operations()}
    assert found == OPERATIONS


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *((path, GenerationMode.POSITIVE) for path in OPERATIONS),
        *(
            (path, GenerationMode.NEGATIVE)
            for path, method in OPERATIONS.items()
            if method == "POST"
        ),
    ],
)
def test_every_answer_is_one_that_the_description_has(path, mode, schema) -> None:
    operation = schema[path][OPERATIONS[path]]

    @settings(max_examples=40)
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case) -> None:
        # A description cannot say which texts a model reads, or what it is called.
        case.call_and_validate(headers=HEADERS, excluded_checks=[positive_data_acceptance])

    check()
