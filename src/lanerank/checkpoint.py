"""Finding a model's files and turning them into a scorer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lanerank.contracts import Scorer
from lanerank.errors import InputError, ModelLoadError
from lanerank.lanes import LaneBudgets, LaneTokenizer
from lanerank.scoring.lane_encoder import LaneEncoderScorer
from lanerank.scoring.modeling_lane_encoder import LaneEncoder, LaneEncoderConfig

DEFAULT_MODEL = "lanerank-mini"
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

_EMBEDDED = Path(__file__).parent / "models"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "attributes_budget",
)


def load_scorer(
    name_or_path: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
    local_files_only: bool = False,
) -> Scorer:
    """Load a model.

    Args:
        name_or_path: A folder, a model shipped with lanerank (`"lanerank-mini"`, the default), or
            the id of a model on the Hugging Face hub. Only the last one uses the network.
        revision: Branch, tag or commit on the hub.
        device: `"cpu"`, `"cuda"`, `"mps"`, ...; `"auto"` takes CUDA if there is one, else the CPU.
        dtype: Precision; `"auto"` is bfloat16 where the device has it natively, else float32.
        local_files_only: Never ask the hub; use what an earlier call has cached.

    Raises:
        InputError: `device` or `dtype` is not known or not present.
        ModelLoadError: Files are missing, corrupt, or of a kind that lanerank does not load.
    """
    if dtype not in get_args(DtypeName):
        raise InputError(f"`dtype` must be one of {', '.join(get_args(DtypeName))}, got {dtype!r}")
    where = _device(device)
    precision = None if dtype == "auto" else getattr(torch, dtype)
    name = str(name_or_path or DEFAULT_MODEL)
    folder = _folder(name, revision=revision, local_files_only=local_files_only)
    config = _config(folder)
    tokenizer = _tokenizer(folder / "tokenizer.json", config)
    lanes = LaneTokenizer(tokenizer, _budgets(config, folder / "config.json"))
    model = _weights(folder / "model.safetensors", config)
    label = folder.name if folder.exists() and Path(name).exists() else name
    return LaneEncoderScorer(model, lanes, name=label, device=where, dtype=precision)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"`device={device!r}` cannot be used here ({reason}); use 'cpu' or 'auto'"
        ) from error
    return where


def _folder(name: str, *, revision: str | None, local_files_only: bool) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if (_EMBEDDED / name).is_dir():
        return _EMBEDDED / name
    if Path(name).is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1:
        raise ModelLoadError(
            f"there is no folder {name!r}, and it is not an id of the form 'owner/model'; "
            f"pass a folder with {', '.join(_FILES)}, or leave it out for {DEFAULT_MODEL}"
        )
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_FILES),
                local_files_only=local_files_only,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"cannot fetch {name!r} from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the id and the "
            "network, or pass a folder that holds the files"
        ) from error


def _config(folder: Path) -> LaneEncoderConfig:
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{path} is missing; a model folder holds {', '.join(_FILES)}"
        ) from error
    except ValueError as error:
        raise ModelLoadError(f"{path} is not JSON ({error}); fetch the model again") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind != LaneEncoderConfig.model_type:
        raise ModelLoadError(
            f"{path} describes a model of type {kind!r}; this version of lanerank loads "
            f"{LaneEncoderConfig.model_type!r}"
        )
    try:
        config = LaneEncoderConfig.from_dict(fields)
    except (TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelLoadError(f"{path} is not usable: {reason}") from error
    for name in _SIZES:
        if type(size := getattr(config, name)) is not int or size < 1:
            raise ModelLoadError(f"{path} is not usable: `{name}` must be positive, got {size!r}")
    if config.hidden_size % config.num_attention_heads:
        raise ModelLoadError(
            f"{path} is not usable: `hidden_size` {config.hidden_size} is not a multiple of "
            f"`num_attention_heads` {config.num_attention_heads}"
        )
    return config


def _budgets(config: LaneEncoderConfig, path: Path) -> LaneBudgets:
    positions = config.max_position_embeddings
    try:
        return LaneBudgets(
            instruction=positions,
            query=positions,
            attributes=min(config.attributes_budget, positions),
            document=positions,
            window_overlap=positions // 8,
        )
    except InputError as error:
        raise ModelLoadError(f"{path} is not usable: {error}") from error


def _tokenizer(path: Path, config: LaneEncoderConfig) -> Tokenizer:
    if not path.is_file():
        raise ModelLoadError(f"{path} is missing; a model folder holds {', '.join(_FILES)}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise ModelLoadError(f"{path} is not a tokenizer: {error}; fetch it again") from error
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise ModelLoadError(
            f"{path} has token ids up to {largest}, the `vocab_size` in config.json is "
            f"{config.vocab_size}: they belong to different models; fetch the model again"
        )
    return tokenizer


def _weights(path: Path, config: LaneEncoderConfig) -> LaneEncoder:
    # Not `LaneEncoder.from_pretrained`, which fills missing weights at random and only warns.
    try:
        state = load_file(path)
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{path} is missing; a model folder holds {', '.join(_FILES)}"
        ) from error
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} is corrupt ({error}); fetch the model again") from error
    with torch.device("meta"):
        model = LaneEncoder(config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ModelLoadError(f"{path} does not fit its config.json: {reason}") from error
    return model
