"""A lane encoder that begins as a BERT-shaped bi-encoder, whose weights it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lanerank.errors import ModelLoadError
from lanerank.scoring.modeling_lane_encoder import LaneEncoder, LaneEncoderConfig

_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "layer_norm_eps",
)
_LAYER_PARTS = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_ADDED = ("lane_embeddings.", "head_", "exclusion_", "late_", "strength_", "plain_")
_NUMBERS = ("instruction_weight", "scale", "bias")


def is_instructed(name: str) -> bool:
    """Whether a parameter of a lane encoder is part of what an instruction adds.

    What turns a plain cosine into a score counts too: within a query it keeps the order.
    """
    return name.startswith(_ADDED) or name in _NUMBERS or name.endswith((".down", ".up", "_gate"))


def is_head(name: str) -> bool:
    """Whether a parameter is neither the bi-encoder's nor a low-rank difference of one."""
    return is_instructed(name) and not name.endswith((".down", ".up"))


def read_bi_encoder(folder: str | Path, *, adapter_rank: int = 40) -> LaneEncoder:
    """A lane encoder that, until it is trained, scores by the cosine of a bi-encoder.

    Args:
        folder: A BERT-shaped bi-encoder with mean pooling, as sentence-transformers writes them:
            `config.json` and `model.safetensors`.
        adapter_rank: The rank of what an instruction will add to each weight matrix. These
            matrices and the head are drawn from torch's generator.

    Raises:
        ModelLoadError: A file is missing or corrupt, or the model is not shaped like BERT.
    """
    folder = Path(folder)
    fields = _fields(folder / "config.json")
    try:
        config = LaneEncoderConfig(
            **{name: fields[name] for name in _SIZES}, adapter_rank=adapter_rank
        )
        config.attributes_budget = min(config.attributes_budget, config.max_position_embeddings)
        model = LaneEncoder(config)
        state = _state(load_file(folder / "model.safetensors"), config.num_hidden_layers)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise ModelLoadError(
            f"{folder} is no BERT-shaped bi-encoder that can be read "
            f"({' '.join(repr(error).split())[:300]}); give one, or a lane encoder"
        ) from error
    lost = [name for name in missing if not is_instructed(name)]
    if lost or unexpected:
        raise ModelLoadError(
            f"the weights in {folder} do not fit: missing {lost}, unexpected {unexpected}"
        )
    return model


def convert_bi_encoder(
    folder: str | Path, destination: str | Path, *, adapter_rank: int = 40
) -> Path:
    """Write what `read_bi_encoder` makes of a bi-encoder.

    Args:
        folder: See `read_bi_encoder`; with a `tokenizer.json`.
        destination: The folder to write; made if it is missing.
        adapter_rank: See `read_bi_encoder`.

    Returns:
        The destination.

    Raises:
        ModelLoadError: A file is missing or corrupt, or the model is not shaped like BERT.
    """
    folder, destination = Path(folder), Path(destination)
    model = read_bi_encoder(folder, adapter_rank=adapter_rank)
    destination.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(destination)
    try:
        shutil.copy(folder / "tokenizer.json", destination)
    except FileNotFoundError as error:
        raise ModelLoadError(f"{folder} has no tokenizer.json; add it") from error
    return destination


def is_bi_encoder(folder: Path) -> bool:
    """Whether a folder says that its model is BERT."""
    path = folder / "config.json"
    return path.is_file() and _fields(path).get("model_type") == "bert"


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ModelLoadError(f"{path} is no JSON object; fetch the model again")
    if fields.get("model_type") == "bert":
        for name, needed in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if fields.get(name, needed) != needed:
                raise ModelLoadError(
                    f"{path} has `{name}` {fields[name]!r}, and a lane encoder computes with "
                    f"{needed!r}; start from another model"
                )
    return fields


def _state(bert: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights under the names that a lane encoder has for them."""
    bert = {name.removeprefix("bert."): each.float() for name, each in bert.items()}
    state = {
        "word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        # The bi-encoder's texts are all of token type 0.
        "position_embeddings.weight": bert["embeddings.position_embeddings.weight"]
        + bert["embeddings.token_type_embeddings.weight"][:1],
    }
    for part in ("weight", "bias"):
        state[f"embedding_norm.{part}"] = bert[f"embeddings.LayerNorm.{part}"]
        for index in range(layers):
            old, new = f"encoder.layer.{index}", f"layers.{index}"
            state[f"{new}.qkv.{part}"] = torch.cat(
                [bert[f"{old}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            )
            for ours, theirs in _LAYER_PARTS.items():
                state[f"{new}.{ours}.{part}"] = bert[f"{old}.{theirs}.{part}"]
    return state
