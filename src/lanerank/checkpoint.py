"""Finding a model's files and turning them into a scorer."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
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

from lanerank.calibration import CALIBRATION_FILE, Calibrator
from lanerank.contracts import Scorer
from lanerank.errors import InputError, ModelLoadError
from lanerank.lanes import LaneBudgets, LaneTokenizer
from lanerank.scoring.lane_encoder import LaneEncoderScorer, default_dtype
from lanerank.scoring.modeling_lane_encoder import LaneEncoder, LaneEncoderConfig
from lanerank.scoring.pretrained import ModelOptions, load_pretrained
from lanerank.template import (
    LOCAL_CONTRACT,
    PromptTemplate,
    contract_for,
    known_models,
    read_contract,
)

DEFAULT_MODEL = "lanerank-mini"
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["8bit", "4bit"]

_EMBEDDED = Path(__file__).parent / "models"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")
_TRANSFORMERS_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "model*.safetensors"),
    *("model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "vocab.json"),
    *("added_tokens.json", "merges.txt", "modules.json", "[0-9]_*/*", LOCAL_CONTRACT),
    CALIBRATION_FILE,
)
_SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 1,
    "max_position_embeddings": 3,
    "attributes_budget": 3,
    "adapter_rank": 1,
}
"""The least that each size of a lane encoder may be; two tokens of a lane are for framing."""
_LARGEST = 10_000_000
"""The most that any of them may be. What is larger overflows in torch, and is a typing mistake."""


def load_scorer(
    name_or_path: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: DtypeName = "auto",
    local_files_only: bool = False,
    contract: str | Path | PromptTemplate | None = None,
    attn_implementation: str | None = None,
    device_map: str | None = None,
    quantization: Quantization | None = None,
    compile_model: bool = False,
    trust_remote_code: bool = False,
    tokens_per_batch: int | None = None,
    share_prefix: bool = True,
    calibrated: bool = True,
) -> Scorer:
    """Load a model.

    Args:
        name_or_path: A folder, `"lanerank-mini"` (the default, in the package; a folder of that
            name is `"./lanerank-mini"`), or the id of a model on the Hugging Face hub. Only the
            last one uses the network.
        revision: Branch, tag or commit on the hub; refused for a folder and for lanerank-mini.
        device: `"cpu"`, `"cuda"`, `"mps"`, ...; `"auto"` takes CUDA if there is one, else the CPU.
        dtype: Precision; `"auto"` is bfloat16 where the device has it natively, else float32.
        local_files_only: Never ask the hub; use what an earlier call has cached.
        contract: The prompt of a causal language model, or the facts of a cross-encoder: a model
            id or family that lanerank knows, a JSON file, or a `PromptTemplate`. By default that
            of the hub id, or the `lanerank.json` in the folder.
        attn_implementation: As in transformers: `"eager"`, `"sdpa"`, `"flash_attention_2"`, ...
        device_map: As in transformers: `"auto"` spreads the model over devices.
        quantization: `"8bit"` or `"4bit"`, through bitsandbytes.
        compile_model: Compile the model with `torch.compile` at the first call.
        trust_remote_code: Run Python code from the model's repository, for the few models that
            cannot do without.
        tokens_per_batch: Bounds memory; the scorer's own default if `None`.
        share_prefix: Compute what comes before the documents once per call; turn it off for
            causal models that keep more than keys and values of what they read.
        calibrated: Calibrate the scores where a `calibration.json` lies beside the weights. Turn
            it off to fit another, or where `contract` is not the one it was fitted with.

    Raises:
        InputError: An option is not known, not present, or not for this kind of model.
        MissingExtraError: Quantisation needs a package that is not installed.
        ModelLoadError: Files are missing, corrupt, or of a kind that lanerank does not load.
    """
    if dtype not in get_args(DtypeName):
        raise InputError(f"`dtype` must be one of {', '.join(get_args(DtypeName))}, got {dtype!r}")
    if quantization not in (None, *get_args(Quantization)):
        raise InputError(f"`quantization` must be '8bit', '4bit' or None, got {quantization!r}")
    if tokens_per_batch is not None and (type(tokens_per_batch) is not int or tokens_per_batch < 1):
        raise InputError(
            f"`tokens_per_batch` must be an int of at least 1, got {tokens_per_batch!r}; leave it "
            "out for the scorer's own default"
        )
    where = _device(device)
    precision = None if dtype == "auto" else getattr(torch, dtype)
    options = ModelOptions(
        device=where,
        dtype=precision or default_dtype(where),
        attn_implementation=attn_implementation,
        device_map=device_map,
        quantization=quantization,
        compile=compile_model,
        trust_remote_code=trust_remote_code,
        tokens_per_batch=tokens_per_batch,
        share_prefix=share_prefix,
    )
    name = str(name_or_path or DEFAULT_MODEL)
    template = _contract(name, contract)
    _refuse(name, template, options)
    folder = _folder(
        name,
        revision=revision,
        local_files_only=local_files_only,
        known=template is not None,
        code=trust_remote_code,
    )
    label = name
    if folder.exists() and Path(name).exists():
        # `.` and `..` say nothing of the folder.
        label = folder.name if folder.name.strip(".") else folder.resolve().name
    if template is None and (folder / LOCAL_CONTRACT).is_file():
        template = read_contract(folder / LOCAL_CONTRACT)
        _refuse(name, template, options)
    # Before the weights, which take longer to read. A link to nowhere is no missing file.
    saved = calibrated and os.path.lexists(folder / CALIBRATION_FILE)
    calibrator = Calibrator.load(folder) if saved else None
    scorer: Scorer
    if template is not None:
        scorer = load_pretrained(folder, template, label, options)
    else:
        scorer = _load_lane_encoder(folder, name, label, options, precision)
    return scorer if calibrator is None else calibrator.wrap(scorer)


def _load_lane_encoder(
    folder: Path, name: str, label: str, options: ModelOptions, dtype: torch.dtype | None
) -> LaneEncoderScorer:
    config = _config(folder, name)
    changed = [
        option
        for option in ("attn_implementation", "device_map", "quantization", "compile")
        if getattr(options, option)
    ]
    if changed:
        raise InputError(
            f"`{changed[0]}` is not for a lane encoder, which {name!r} is; leave it out"
        )
    tokenizer = _tokenizer(folder / "tokenizer.json", config)
    lanes = LaneTokenizer(tokenizer, _budgets(config))
    model = _weights(folder / "model.safetensors", config)
    limit = options.tokens_per_batch
    batch = {} if limit is None else {"tokens_per_batch": limit}
    return LaneEncoderScorer(model, lanes, name=label, device=options.device, dtype=dtype, **batch)


def _contract(name: str, contract: str | Path | PromptTemplate | None) -> PromptTemplate | None:
    if isinstance(contract, PromptTemplate):
        return contract
    if isinstance(contract, Path) or (isinstance(contract, str) and contract.endswith(".json")):
        return read_contract(contract)
    if contract is not None:
        return contract_for(contract)
    # A folder of that name goes before the hub, and says itself what it holds.
    return None if Path(name).is_dir() else dict(known_models()).get(name)


def _refuse(name: str, template: PromptTemplate | None, options: ModelOptions) -> None:
    if template is None:
        return
    if template.kind == "refused":
        raise ModelLoadError(f"{name!r} is refused: {template.reason}")
    facts = template.models.get(name)
    if facts is not None and facts.remote_code and not options.trust_remote_code:
        raise ModelLoadError(
            f"{name!r} runs Python code from its repository; read that code, and if you trust it "
            "pass `trust_remote_code=True`, best with a `revision`"
        )


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


def _folder(
    name: str, *, revision: str | None, local_files_only: bool, known: bool, code: bool
) -> Path:
    # First, so that no folder of that name can pass for the model in the package.
    folder = _EMBEDDED / name if name == DEFAULT_MODEL else Path(name)
    if folder.is_dir():
        if revision is not None:
            kind = "comes with lanerank" if name == DEFAULT_MODEL else "is a folder"
            raise InputError(
                f"`revision={revision!r}` is for a model on the Hugging Face hub, and {name!r} "
                f"{kind}; leave it out"
            )
        return folder
    if Path(name).is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1:
        raise ModelLoadError(
            f"there is no folder {name!r}, and it is not an id of the form 'owner/model'; "
            f"pass a folder with {', '.join(_FILES)}, or leave it out for {DEFAULT_MODEL}"
        )
    patterns = [*_TRANSFORMERS_FILES, *(["*.py"] if code else [])]
    try:
        if not known:
            # What the model is comes first: weights may have many gigabytes.
            small = _fetch(name, ["config.json", LOCAL_CONTRACT], revision, local_files_only)
            if not (small / LOCAL_CONTRACT).is_file():
                _config(small, name)
                patterns = [*_FILES, CALIBRATION_FILE]
        return _fetch(name, patterns, revision, local_files_only)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelLoadError(
            f"cannot fetch {name!r} from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the id and the "
            "network, or pass a folder that holds the files" + ("" if known else _near(name))
        ) from error


def _near(name: str) -> str:
    known = [model for model, _ in known_models()]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f"; models with a contract and such a name: {', '.join(map(repr, near))}" if near else ""


def _fetch(
    name: str,
    patterns: list[str],
    revision: str | None,
    local_files_only: bool,  # noqa: FBT001 - handed on
) -> Path:
    return Path(
        snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=local_files_only,
        )
    )


def _config(folder: Path, name: str) -> LaneEncoderConfig:
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
            f"{path} describes a model of type {kind!r}, and no contract says what {name!r} was "
            "trained on; pass `contract=` (the id of a model whose prompt it shares, "
            "'yes-no-judge' for a chat model, or a JSON file), or put a "
            f"{LOCAL_CONTRACT} beside the weights{_near(name)}"
        )
    try:
        config = LaneEncoderConfig.from_dict(fields)
    except (AttributeError, TypeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ModelLoadError(f"{path} is not usable: {reason}") from error
    for field, expected in _unusable_fields(config):
        raise ModelLoadError(
            f"{path} is not usable: `{field}` must be {expected}, got {getattr(config, field)!r}; "
            "correct it, or fetch the model again"
        )
    if config.hidden_size % config.num_attention_heads:
        raise ModelLoadError(
            f"{path} is not usable: `hidden_size` {config.hidden_size} is not a multiple of "
            f"`num_attention_heads` {config.num_attention_heads}"
        )
    return config


def _unusable_fields(config: LaneEncoderConfig) -> Iterator[tuple[str, str]]:
    """The fields that are not usable, each with what it must be."""
    # Types are compared and not asked for, since True is an int too.
    for name, least in _SIZES.items():
        if type(size := getattr(config, name)) is not int or not least <= size <= _LARGEST:
            yield name, f"a whole number from {least} to {_LARGEST}"
    padding = config.pad_token_id
    if padding is not None and (type(padding) is not int or not 0 <= padding < config.vocab_size):
        yield "pad_token_id", f"null or a whole number from 0 to {config.vocab_size - 1}"
    # NaN, which Python reads in JSON too, is in no range.
    if type(eps := config.layer_norm_eps) is not float or not 0 < eps < 1:
        yield "layer_norm_eps", "a number above 0 and below 1"
    if type(below := config.neutral_below) not in (int, float) or not 0 <= below <= 1:
        yield "neutral_below", "a number from 0 to 1"


def _budgets(config: LaneEncoderConfig) -> LaneBudgets:
    positions = config.max_position_embeddings
    return LaneBudgets(
        instruction=positions,
        query=positions,
        attributes=min(config.attributes_budget, positions),
        document=positions,
        window_overlap=positions // 8,
    )


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
