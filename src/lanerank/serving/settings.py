"""The settings of a server: one YAML file, of which the command line can replace every value."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from lanerank.contracts import LongDocuments
from lanerank.errors import FileFormatError, InputError
from lanerank.reranker import OnUnsupported

_CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Batching(BaseModel):
    """How requests of several clients are put together for the model."""

    model_config = _CLOSED

    max_size: int = Field(32, ge=1)
    """Requests that the model is given at a time. How much of them is in one forward pass is the
    scorer's own concern, so this does not bound memory."""
    wait_ms: float = Field(2.0, ge=0)
    """How long an idle model waits for company of a request. A busy one needs no wait: what
    arrives meanwhile is its next batch."""


class Replicas(BaseModel):
    """How many copies of the model run. Ray Serve moves between the two bounds."""

    model_config = _CLOSED

    min: int = Field(1, ge=1)
    max: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(16.0, gt=0)
    """The load at which a copy is added: requests being scored or waiting, for each copy."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"`max` is {self.max}, less than `min`, which is {self.min}")
        return self


class ServerSettings(BaseModel):
    """Everything about a server that can be set."""

    model_config = _CLOSED

    model: str | None = None
    """A folder or a Hugging Face id; by default the model that comes with lanerank. The files must
    be there, or within reach, on every node that runs a replica."""
    device: str = "auto"
    """`"cpu"`, `"cuda"`, `"mps"`, or `"auto"`. Ray shows a replica only the GPUs of `num_gpus`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The model's precision."""
    long_documents: LongDocuments = "truncate"
    """What happens to documents longer than the model reads, where a request does not say."""
    on_unsupported: OnUnsupported = "raise"
    """What happens to an instruction if the model takes none; answers say what did."""
    host: str = "127.0.0.1"
    """The address to listen on; `"0.0.0.0"` is every one that the machine has."""
    port: int = Field(8000, ge=1, le=65535)
    token_env: str | None = None
    """The environment variable that holds the bearer token which clients must show; without it
    everybody is served. The token itself stands in no file. Every node needs the variable."""
    max_documents: int = Field(1000, ge=1)
    """Documents in a request."""
    max_bytes: int = Field(16_000_000, ge=1)
    """Bytes of a request's body. Counted while it is read, so that no more of it is kept."""
    max_queued: int = Field(256, ge=1)
    """Requests that wait for a replica; those beyond are refused with the status 429."""
    timeout_s: float = Field(60.0, gt=0)
    """How long a request may take, its reading and waiting included; then it is refused with the
    status 503."""
    batching: Batching = Batching()
    replicas: Replicas = Replicas()
    num_cpus: float | None = Field(None, gt=0)
    """Processor cores for each replica, which are also the threads of its model. `lanerank serve`
    on its own shares out those of the machine; otherwise the default is 1."""
    num_gpus: float | None = Field(None, ge=0)
    """GPUs for each replica. `lanerank serve` on its own takes one if there is one; otherwise the
    default is 1 where `device` is `"cuda"`, and 0 elsewhere."""

    @field_validator("token_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        # Whoever writes the token itself here must not find it in a log.
        if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
            raise ValueError("expected the name of an environment variable, not the token itself")
        return value

    @model_validator(mode="after")
    def _has_its_gpu(self) -> Self:
        if self.device.startswith("cuda") and self.num_gpus == 0:
            raise ValueError(f"`device` is {self.device!r} and `num_gpus` is 0; give it a GPU")
        return self

    @classmethod
    def read(
        cls, path: str | Path | None = None, overrides: Mapping[str, object] | None = None
    ) -> ServerSettings:
        """The settings of a YAML file, with some of them replaced.

        Args:
            path: The file; without one there are only defaults to replace.
            overrides: Values by name, those of an inner group by a dotted name such as
                `"batching.max_size"`. `None` replaces nothing.

        Raises:
            FileFormatError: The file is not YAML.
            InputError: There is no such file or setting, or a value is not usable.
        """
        values = {} if path is None else _parse(Path(path))
        for name, value in (overrides or {}).items():
            if value is None:
                continue
            group, _, inner = name.rpartition(".")
            if group:
                given = values.get(group) or {}
                # What is not a mapping is for the validation to refuse.
                value = {**given, inner: value} if isinstance(given, Mapping) else given
            values[group or name] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{path or 'the settings'}: {describe(error)}") from None

    def token(self) -> SecretStr | None:
        """The token that clients must show, from the environment; `None` if they need none.

        Raises:
            InputError: The variable is not set, or holds what no header could.
        """
        if self.token_env is None:
            return None
        value = os.environ.get(self.token_env, "")
        if not value:
            raise InputError(
                f"`token_env` is {self.token_env!r}, and no such environment variable is set; set "
                "it to the token, on every node where a server runs"
            )
        if not all("!" <= char <= "~" for char in value):
            raise InputError(
                f"the token in {self.token_env} has white space or characters beyond ASCII, which "
                "no header can hold"
            )
        return SecretStr(value)


def describe(error: ValidationError) -> str:
    """What is wrong with some settings, as one line without any value that could be a secret."""
    problems = []
    for problem in error.errors(include_url=False):
        where = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            known = ", ".join(ServerSettings.model_fields)
            problems.append(
                f"there is no setting `{where}`; there are {known}"
                + ("; a token stands in an environment variable" if "token" in where else "")
            )
            continue
        message = problem["msg"].removeprefix("Value error, ")
        plain = problem["type"] != "value_error" and isinstance(problem["input"], str | int | float)
        got = f", got {reprlib.repr(problem['input'])}" if plain else ""
        problems.append(f"`{where}`: {message}{got}" if where else message)
    return "; ".join(problems)


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"`config` {str(path)!r} is not a file; pass a YAML file of settings")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "not readable"
        raise FileFormatError(path, mark.line + 1 if mark else 1, f"not YAML: {problem}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected settings such as `port: 8000`, got no mapping")
    return values
