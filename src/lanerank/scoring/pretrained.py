"""Scorers from a folder in the format of transformers, by a contract.

Weights come from safetensors files, and code never comes from the folder unless that is allowed by
name. A weight that is missing is an error: transformers would fill it at random and go on.
"""

from __future__ import annotations

import importlib.util
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lanerank.errors import MissingExtraError, ModelLoadError
from lanerank.scoring.causal_lm import CausalLMScorer
from lanerank.scoring.cross_encoder import CrossEncoderScorer, FirstToken
from lanerank.template import PromptTemplate

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "torch.nn.modules.activation.GELU": nn.GELU,
    "torch.nn.modules.activation.Tanh": nn.Tanh,
    "torch.nn.modules.linear.Identity": nn.Identity,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What transformers may be told about loading a model."""

    device: torch.device
    dtype: torch.dtype
    attn_implementation: str | None = None
    """`"eager"`, `"sdpa"`, `"flash_attention_2"`, ...; by default what transformers prefers."""
    device_map: str | None = None
    """`"auto"` spreads the model over devices; replaces `device`."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Load weights in 8 or 4 bits, through bitsandbytes."""
    compile: bool = False
    """Compile the model with `torch.compile` at the first call."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the weights."""
    tokens_per_batch: int | None = None
    """See the scorer; its own default if `None`."""
    share_prefix: bool = True
    """See `CausalLMScorer`."""


def load_pretrained(
    folder: Path, template: PromptTemplate, name: str, options: ModelOptions
) -> CausalLMScorer | CrossEncoderScorer:
    """Build the scorer that a contract asks for.

    Raises:
        MissingExtraError: Quantisation needs a package that is not installed.
        ModelLoadError: Files are missing, corrupt or refused, or do not fit the contract.
    """
    _require_safetensors(folder)
    tokenizer = _tokenizer(folder, options)
    batch = (
        {} if options.tokens_per_batch is None else {"tokens_per_batch": options.tokens_per_batch}
    )
    if template.kind == "causal_lm":
        if template.chat:
            template = template.in_chat(lambda text: _chat(tokenizer, text, folder))
        model = _model(AutoModelForCausalLM, folder, options)
        if options.compile:
            model.get_decoder().compile(dynamic=True)
        return CausalLMScorer(
            model,
            tokenizer.backend_tokenizer,
            template,
            name=name,
            share_prefix=options.share_prefix,
            **batch,
        )
    head = _modular_head(folder)
    kind = AutoModelForSequenceClassification if head is None else AutoModel
    model = _model(kind, folder, options)
    if head is not None:
        head.to(model.device, model.dtype)
    if options.compile:
        model.compile(dynamic=True)
    return CrossEncoderScorer(
        model, tokenizer.backend_tokenizer, template, head=head, name=name, **batch
    )


def _require_safetensors(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f" (it has {', '.join(others)}, which can run code when read)" if others else ""
        raise ModelLoadError(
            f"{folder} has neither model.safetensors nor {index.name}{found}; convert or fetch the "
            "weights as safetensors"
        )
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not usable ({error!r}); fetch it again") from error
    missing = sorted(shard for shard in shards if not (folder / str(shard)).is_file())
    if missing:
        raise ModelLoadError(
            f"{folder} lacks {', '.join(missing)}, which {index.name} names; fetch the model again"
        )


def _tokenizer(folder: Path, options: ModelOptions) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:
        raise ModelLoadError(f"{folder} has no usable tokenizer: {_first_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelLoadError(
            f"{folder} has a tokenizer of type {type(tokenizer).__name__}, which works in Python "
            "code; add a tokenizer.json"
        )
    return tokenizer


def _chat(tokenizer: PreTrainedTokenizerFast, text: str, folder: Path) -> str:
    if tokenizer.chat_template is None:
        raise ModelLoadError(
            f"{folder} has no chat template, which this contract needs; write a contract with the "
            "full prompt as `segments`"
        )
    # Models that can think first are told not to; templates without that switch ignore it.
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return str(rendered)


def _model(kind: Any, folder: Path, options: ModelOptions) -> PreTrainedModel:  # noqa: ANN401 - transformers' auto classes share no type
    extra: dict[str, Any] = {}
    if options.quantization is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtraError(
                f"`quantization={options.quantization!r}` needs bitsandbytes; "
                "pip install bitsandbytes"
            )
        bits = {f"load_in_{options.quantization}": True}
        extra["quantization_config"] = BitsAndBytesConfig(**bits)
    spread = options.device_map
    if spread is None and options.quantization is not None:
        spread = str(options.device)
    if spread is not None:
        extra["device_map"] = spread
    if options.attn_implementation is not None:
        extra["attn_implementation"] = options.attn_implementation
    try:
        model, report = kind.from_pretrained(
            folder,
            dtype=options.dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
            **extra,
        )
    except Exception as error:
        raise ModelLoadError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    lost = [*report["missing_keys"], *report["mismatched_keys"]]
    if lost:
        raise ModelLoadError(
            f"{folder} lacks weights of {type(model).__name__} or has them in another shape: "
            f"{', '.join(map(str, sorted(lost)[:3]))} ({len(lost)} in all); it is not the model "
            "that the contract is about"
        )
    loaded: PreTrainedModel = model if spread is not None else model.to(options.device)
    return loaded


def _modular_head(folder: Path) -> nn.Sequential | None:
    """The layers after the encoder of a model in the modular format of sentence-transformers."""
    listing = folder / "modules.json"
    if not listing.is_file():
        return None
    try:
        modules = json.loads(listing.read_text(encoding="utf-8"))[1:]
        layers = OrderedDict(
            (str(place), _layer(folder / module["path"], module["type"].rsplit(".", 1)[-1]))
            for place, module in enumerate(modules)
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(
            f"{listing} names layers that cannot be built: {_first_line(error)}"
        ) from error
    return nn.Sequential(layers) if layers else None


def _layer(folder: Path, kind: str) -> nn.Module:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if kind == "Pooling":
        mode = config.get("pooling_mode") or (
            "cls" if config.get("pooling_mode_cls_token") else "another"
        )
        if mode != "cls":
            raise ValueError(f"pooling {mode!r} is not supported, only 'cls' is")
        return FirstToken()
    state = load_file(folder / "model.safetensors")
    if kind == "LayerNorm":
        norm = nn.LayerNorm(config["dimension"])
        norm.load_state_dict({name.removeprefix("norm."): each for name, each in state.items()})
        return norm
    if kind == "Dense":
        linear = nn.Linear(config["in_features"], config["out_features"], config.get("bias", True))
        linear.load_state_dict({name.removeprefix("linear."): each for name, each in state.items()})
        return nn.Sequential(linear, _ACTIVATIONS[config["activation_function"]]())
    raise ValueError(f"a layer of type {kind!r} is not supported")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
