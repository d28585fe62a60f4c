"""The settings of a server: one file, which the command line can overrule."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from lanerank.checkpoint import DtypeName
from lanerank.errors import FileFormatError, InputError
from lanerank.serving.server import fitted
from lanerank.serving.settings import ServerSettings

EVERYTHING = """
model: org/name
device: cuda
dtype: bfloat16
long_documents: max_window
on_unsupported: prepend
host: 0.0.0.0
port: 9000
token_env: RANKER_TOKEN
max_documents: 10
max_bytes: 1000
max_queued: 3
timeout_s: 1.5
batching: {max_size: 8, wait_ms: 0}
replicas: {min: 2, max: 4, target_ongoing_requests: 5}
num_cpus: 2
num_gpus: 0.5
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "server.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_every_setting_can_stand_in_the_file(write) -> None:
    settings = ServerSettings.read(write(EVERYTHING))
    assert settings.batching.max_size == 8
    assert settings.replicas.max == 4
    defaults = ServerSettings()
    same = [
        name
        for name in type(settings).model_fields
        if settings_of(settings, name) == settings_of(defaults, name)
    ]
    assert same == []


def settings_of(settings: ServerSettings, name: str) -> object:
    return getattr(settings, name)


def test_an_empty_file_is_the_defaults(write) -> None:
    assert ServerSettings.read(write("")) == ServerSettings.read() == ServerSettings()


def test_the_command_line_overrules_the_file_one_value_at_a_time(write) -> None:
    path = write("port: 9000\nbatching: {max_size: 8, wait_ms: 7}\n")
    settings = ServerSettings.read(
        path, {"batching.max_size": 16, "replicas.max": "3", "model": None, "dtype": "float32"}
    )
    assert (settings.port, settings.dtype, settings.model) == (9000, "float32", None)
    assert (settings.batching.max_size, settings.batching.wait_ms) == (16, 7)
    assert (settings.replicas.min, settings.replicas.max) == (1, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "there is no setting `prot`; there are model, device"),
        ("port: 0", "`port`: .* greater than or equal to 1, got 0"),
        ("port: many", "`port`: .* got 'many'"),
        ("batching: {size: 3}", "no setting `batching.size`"),
        ("batching: 3", "`batching`: .* got 3"),
        ("replicas: {min: 3, max: 2}", "`max` is 2, less than `min`, which is 3"),
        ("dtype: int3", "`dtype`: .*'bfloat16'.* got 'int3'"),
        ("device: cuda\nnum_gpus: 0", "give it a GPU"),
        ("- port", "expected settings such as"),
        ("token_env: 'no name'", "expected the name of an environment variable"),
    ],
)
def test_a_setting_that_is_not_usable_is_named(text, message, write) -> None:
    with pytest.raises(InputError, match=message):
        ServerSettings.read(write(text))


def test_a_file_that_is_not_yaml_is_refused_with_its_line(write) -> None:
    with pytest.raises(FileFormatError, match=r"server.yaml:2: not YAML"):
        ServerSettings.read(write("port: 9000\nhost: [1]]\n"))


def test_a_file_that_is_not_there_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=r"nowhere.yaml' is not a file"):
        ServerSettings.read(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    "text", ["token: s3cr3t!", "token_env: s3cr3t!", "batching: {token: s3cr3t!}"]
)
def test_a_token_in_the_file_is_refused_and_not_repeated(text, write) -> None:
    with pytest.raises(InputError, match="environment variable") as caught:
        ServerSettings.read(write(text))
    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_token_comes_from_the_environment(monkeypatch) -> None:
    settings = ServerSettings(token_env="RANKER_TOKEN")
    monkeypatch.setenv("RANKER_TOKEN", "s3cr3t")
    token = settings.token()
    assert token is not None
    assert token.get_secret_value() == "s3cr3t"
    assert "s3cr3t" not in f"{token!r} {settings!r}"
    assert ServerSettings().token() is None


@pytest.mark.parametrize(
    ("value", "message"),
    [(None, "no such environment variable"), ("", "no such"), ("s3cr3t\n", "white space")],
)
def test_a_token_that_is_missing_or_not_usable_is_refused(value, message, monkeypatch) -> None:
    monkeypatch.delenv("RANKER_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("RANKER_TOKEN", value)
    with pytest.raises(InputError, match=message) as caught:
        ServerSettings(token_env="RANKER_TOKEN").token()
    assert "s3cr3t" not in str(caught.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ServerSettings().port = 1


def test_the_precisions_are_those_that_a_checkpoint_takes() -> None:
    assert get_args(ServerSettings.model_fields["dtype"].annotation) == get_args(DtypeName)


@pytest.mark.parametrize(
    ("settings", "resources", "cpus", "gpus"),
    [
        ({}, {"CPU": 8.0}, 8.0, None),
        ({"replicas": {"max": 3}}, {"CPU": 8.0}, 2.0, None),
        ({"replicas": {"max": 30}}, {"CPU": 8.0}, 1.0, None),
        ({"num_cpus": 3}, {"CPU": 8.0}, 3.0, None),
        ({}, {"CPU": 8.0, "GPU": 2.0}, 8.0, 1.0),
        ({"replicas": {"max": 4}}, {"CPU": 8.0, "GPU": 2.0}, 2.0, 0.5),
        ({"device": "cpu"}, {"CPU": 8.0, "GPU": 2.0}, 8.0, None),
        ({"num_gpus": 0}, {"CPU": 8.0, "GPU": 2.0}, 8.0, 0.0),
    ],
)
def test_what_is_left_open_is_what_the_machine_has(settings, resources, cpus, gpus) -> None:
    found = fitted(ServerSettings(**settings), resources)
    assert (found.num_cpus, found.num_gpus) == (cpus, gpus)
