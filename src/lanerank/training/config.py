"""What a training run is told: one TOML file, read into a value that cannot change."""

from __future__ import annotations

import os
import reprlib
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from lanerank.calibration import CalibrationMethod
from lanerank.errors import FileFormatError, InputError
from lanerank.evaluation.scenarios import NotBlank

ModelKind = Literal["lane_encoder", "cross_encoder", "causal_lm"]
"""What is trained; see `TrainingConfig.kind`."""

EMBEDDED_MODEL = "lanerank-mini"

_RATES: dict[ModelKind, tuple[float, float]] = {
    "lane_encoder": (5e-4, 2e-3),
    "cross_encoder": (5e-5, 5e-4),
    "causal_lm": (2e-4, 2e-4),
}
_CLOSED = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _beside_config(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path())
    return Path(os.path.normpath(folder / path.expanduser()))


_File = Annotated[Path, AfterValidator(_beside_config)]
_Files = Annotated[tuple[_File, ...], Field(min_length=1)]
_Count = Annotated[int, Field(strict=True, ge=1)]
_Weight = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
_Rate = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(strict=True, ge=0, lt=1)]


class LossWeights(BaseModel):
    """How much each of `lanerank.training.losses` counts; 0 leaves it out."""

    model_config = _CLOSED

    pointwise: _Weight = 1.0
    """`pointwise_bce`: what a score is."""
    listwise: _Weight = 0.5
    """`listwise_softmax`: the order under an instruction."""
    horizontal: _Weight = 0.0
    """`horizontal_pairs`: the same, pair by pair."""
    vertical: _Weight = 0.7
    """`vertical_pairs`: what an instruction changes."""
    consistency: _Weight = 1.0
    """`null_instruction_consistency`: rows of kind `neutral` beside those without instruction."""
    invariance: _Weight = 1.0
    """`injection_invariance`; only where there is an `[injection]`."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any(self.model_dump().values()):
            raise ValueError("every weight is 0, so there is nothing to learn")
        return self


class InjectionSettings(BaseModel):
    """Documents with injected texts, made while training."""

    model_config = _CLOSED

    attacks: _File
    """A JSON file in the format of `lanerank.evaluation.read_attacks`. Take other wordings than
    those with which you measure."""
    share: Annotated[float, Field(strict=True, gt=0, le=1)] = 0.1
    """The share of rows that get a twin with an injected and one with a neutral text."""


class LaneEncoderSettings(BaseModel):
    """What is special about training a lane encoder."""

    model_config = _CLOSED

    train: Literal["instructed", "all"] = "instructed"
    """`"instructed"` moves only what an instruction adds, and the scale of plain scores, so that
    the order without an instruction stays that of the start; `"all"` moves every weight."""
    adapter_rank: _Count = 40
    """The rank of what an instruction adds, where `model` is a bi-encoder."""


class LoraSettings(BaseModel):
    """The low-rank differences that are trained of a causal language model (Hu et al., 2022)."""

    model_config = _CLOSED

    rank: _Count = 16
    """The inner dimension of each difference; a higher one can learn more and takes more memory."""
    alpha: _Rate = 32.0
    """The differences are scaled by `alpha / rank`."""
    dropout: _Share = 0.05
    """The share of a difference's inputs that each forward pass of training sets to 0."""
    target_modules: NotBlank | tuple[NotBlank, ...] = "all-linear"
    """Which layers get them, as in peft."""


class DataSource(BaseModel):
    """Where training data come from, for the model card."""

    model_config = _CLOSED

    name: NotBlank
    """What the data are called."""
    licence: NotBlank
    """Their licence, as an SPDX identifier or in words."""
    source: str = ""
    """An address or a citation."""


class CardSettings(BaseModel):
    """What the model card says that no measure can tell."""

    model_config = _CLOSED

    name: str = ""
    """The model's name; by default that of the output folder."""
    licence: NotBlank | None = None
    """The model's licence, as an SPDX identifier."""
    languages: tuple[NotBlank, ...] = ()
    """Language codes, such as `"en"`."""
    base_model: str = ""
    """Where the starting model comes from: a hub id or a citation."""
    intended_use: str = ""
    """What the model is for, in Markdown; by default the card says that this is not stated."""
    limits: tuple[NotBlank, ...] = ()
    """What the model is bad at, one sentence each; they join those that the run found."""
    data: tuple[DataSource, ...] = ()
    """Where the training data come from; by default the card says that this is not stated."""


class TrainingConfig(BaseModel):
    """A training run. Relative paths are relative to the file that `read_config` reads."""

    model_config = _CLOSED

    model: NotBlank
    """The folder to start from, or `"lanerank-mini"`. For a lane encoder also the folder of a
    BERT-shaped bi-encoder."""
    kind: ModelKind
    """`"lane_encoder"`; `"cross_encoder"`, which reads the instruction before the query and loads
    with `on_unsupported="prepend"`; or `"causal_lm"`, trained by LoRA."""
    train: _Files
    """Files of quadruples, as `read_quadruples` takes them."""
    dev: _Files
    """Files of quadruples with other queries, for evaluation, early stopping and calibration."""
    output: _File
    """The folder for the model. Until the run is finished, checkpoints are in its `checkpoints`."""
    contract: NotBlank | None = None
    """How a causal language model is asked: a model id or family that lanerank knows, or a JSON
    file. By default the `lanerank.json` in the folder of `model`."""

    steps: _Count | None = None
    """Updates of the weights; either this or `epochs`."""
    epochs: _Count | None = None
    """Passes over the training data; either this or `steps`."""
    groups_per_batch: _Count = 8
    """Queries in one forward pass, each with its documents under all its instructions."""
    accumulate: _Count = 1
    """Forward passes for one update; raise it where memory is short."""
    documents_per_group: _Count = 32
    """Groups with more documents are divided into parts, which bounds memory."""
    max_tokens: Annotated[int, Field(strict=True, ge=32)] = 512
    """The longest document lane, pair or prompt, which the model's own limit may lower."""

    learning_rate: _Rate | None = None
    """By default 5e-4 for a lane encoder, of which low-rank differences are trained, 5e-5 for a
    cross-encoder and 2e-4 for LoRA."""
    head_learning_rate: _Rate | None = None
    """For what is new and small: the gates, head and embeddings of lanes, 2e-3 by default, and the
    classifier of a cross-encoder, 5e-4."""
    warmup: _Share = 0.1
    """The share of steps in which the rates rise to their values; then they fall to 0."""
    weight_decay: _Weight = 0.01
    """Of matrices; biases and norms have none."""
    clip_norm: _Weight = 1.0
    """The largest norm of the gradient; 0 leaves it as it is."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the computation; trained weights and optimiser state stay in float32."""
    device: Literal["auto", "cpu"] = "auto"
    """Where to compute: `"auto"` takes an accelerator if torch finds one; `"cpu"` does not."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 7
    """Decides the order of the data, the parts of large groups, new weights, dropout and injected
    texts."""
    losses: LossWeights = LossWeights()
    """How much each loss counts; 0 leaves it out."""
    min_gap: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.1
    """The least difference of two targets that pairs and flips count as one."""
    injection: InjectionSettings | None = None
    """Texts to put into documents, for the loss `invariance`; by default none."""
    lane_encoder: LaneEncoderSettings | None = None
    """Only for that kind."""
    lora: LoraSettings | None = None
    """Only for a causal language model."""

    evaluate_every: _Count = 100
    """Steps between evaluations on the development data, each with a checkpoint."""
    patience: _Count | None = 5
    """Evaluations without a better value after which training stops. TOML has no null: a number
    larger than there are evaluations never stops."""
    select_by: Literal["ndcg", "flip_accuracy", "both"] = "both"
    """What decides between checkpoints: nDCG@10, the share of flips that are right, or their
    mean."""
    calibrate: CalibrationMethod | Literal["none"] = "platt"
    """Fit a calibrator on the development data and save it beside the weights."""
    card: CardSettings = CardSettings()
    """What the model card says that no measure can tell."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`")
        for field, kind in (("lane_encoder", "lane_encoder"), ("lora", "causal_lm")):
            if getattr(self, field) is not None and self.kind != kind:
                raise ValueError(f"`{field}` is for `kind = {kind!r}`, this is {self.kind!r}")
        if self.contract is not None and self.kind != "causal_lm":
            raise ValueError(f"`contract` is for `kind = 'causal_lm'`, this is {self.kind!r}")
        if self.head_learning_rate is not None and self.kind == "causal_lm":
            raise ValueError("`head_learning_rate`: LoRA trains no head; leave it out")
        if shared := sorted(set(map(str, self.train)) & set(map(str, self.dev))):
            raise ValueError(f"`dev` holds a file of `train`: {shared[0]!r}; give other queries")
        for name, path in self._start.items():
            if Path(path).resolve().is_relative_to(self.output.resolve()):
                raise ValueError(
                    f"`{name}` {path!r} lies in `output` {str(self.output)!r}, where a run "
                    "overwrites and deletes files; give another folder as `output`"
                )
        return self

    @property
    def loss_weights(self) -> dict[str, float]:
        """The losses that take part, by their names in `LossWeights`, with their weights."""
        weights: dict[str, float] = self.losses.model_dump()
        if self.injection is None:
            del weights["invariance"]
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rates of the body and of the head."""
        body, head = _RATES[self.kind]
        return self.learning_rate or body, self.head_learning_rate or head

    @property
    def _start(self) -> dict[str, str]:
        """The fields that name what is on disk to start from."""
        paths = {} if self.model == EMBEDDED_MODEL else {"model": self.model}
        if self.contract is not None and self.contract.endswith(".json"):
            paths["contract"] = self.contract
        return paths

    def relative_to(self, folder: Path) -> TrainingConfig:
        """The same with every path relative to a folder, as it can be published.

        A path on another drive, which no relative path leads to, keeps its name only.
        """

        def near(path: str | Path) -> Path:
            try:
                return Path(os.path.relpath(path, folder))
            except ValueError:
                return Path(Path(path).name)

        changes: dict[str, object] = {
            "train": tuple(map(near, self.train)),
            "dev": tuple(map(near, self.dev)),
            "output": near(self.output),
            **{name: str(near(path)) for name, path in self._start.items()},
        }
        if self.injection is not None:
            attacks = near(self.injection.attacks)
            changes["injection"] = self.injection.model_copy(update={"attacks": attacks})
        return self.model_copy(update=changes)


def read_config(path: str | Path) -> TrainingConfig:
    """Read a configuration.

    Args:
        path: A TOML file. Relative paths in it are relative to its folder.

    Raises:
        FileFormatError: The file is not TOML.
        InputError: There is no such file, or a field is missing, not known or not usable.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"`path`: {str(path)!r} cannot be read: {error.strerror}; give a TOML file"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason}), as TOML must be") from error
    except tomllib.TOMLDecodeError as error:
        raise FileFormatError(path, _line(str(error)), f"not TOML: {error}") from error
    folder = path.parent.absolute()
    for name in ("model", "contract"):
        values |= _located(name, values.get(name), folder)
    try:
        return TrainingConfig.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from None


def _located(name: str, value: object, folder: Path) -> dict[str, object]:
    """A field that may be a path, relative to the configuration where it is one."""
    if not isinstance(value, str) or not value.strip():
        return {}
    is_path = value != EMBEDDED_MODEL if name == "model" else value.endswith(".json")
    return {name: os.path.normpath(folder / Path(value).expanduser())} if is_path else {}


def _line(message: str) -> int:
    _, found, rest = message.partition("at line ")
    number = rest.split(",")[0].split(")")[0]
    return int(number) if found and number.isdecimal() else 1


def _explain(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        where = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            problems.append(f"there is no field `{where}`; there are {_known(problem['loc'])}")
            continue
        message = problem["msg"].removeprefix("Value error, ")
        plain = problem["type"] not in ("missing", "value_error")
        got = f", got {reprlib.repr(problem['input'])}" if plain else ""
        problems.append(f"`{where}`: {message}{got}" if where else f"{message}{got}")
    return "; ".join(problems)


_TABLES: dict[str, type[BaseModel]] = {
    "losses": LossWeights,
    "injection": InjectionSettings,
    "lane_encoder": LaneEncoderSettings,
    "lora": LoraSettings,
    "card": CardSettings,
    "data": DataSource,
}


def _known(where: tuple[int | str, ...]) -> str:
    tables = [step for step in where[:-1] if isinstance(step, str)]
    holder = _TABLES[tables[-1]] if tables else TrainingConfig
    return ", ".join(holder.model_fields)
