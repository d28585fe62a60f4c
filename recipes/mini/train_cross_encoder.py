"""Train a plain cross-encoder as lanerank-mini is trained, to compare the two.

`python recipes/mini/train_cross_encoder.py --data build/mini --out build/cross-encoder`

Same start (all-MiniLM-L6-v2), data, order of the data, targets and losses; but no lanes: the
instruction stands before the query in the first text of a pair, the attributes before the document
in the second, and every token attends to every other. All weights are trained, as is usual for a
cross-encoder, at rates of its own. The result loads as any cross-encoder does, with
`on_unsupported="prepend"`. Resumes where an interrupted run stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import tomllib
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from train import (
    MasterWeights,
    attacked_pairs,
    draw,
    learning_rate_factor,
    losses_of,
    minilm_folder,
    rate_at,
    read_groups,
    same_document_pairs,
)
from transformers import BertForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from lanerank.contracts import Candidate
from lanerank.instruction import Instruction
from lanerank.lanes import render_attributes
from lanerank.scoring.lane_encoder import default_dtype
from lanerank.scoring.prompts import PairTokenizer, PairWindow

HERE = Path(__file__).parent
CONTRACT = {
    "family": "cross-encoder-on-concatenated-text",
    "kind": "cross_encoder",
    "mapping": {"official": True},
    "max_tokens": 512,
    "licence": "Apache-2.0",
    "languages": "English",
    "sources": ["recipes/mini/train_cross_encoder.py"],
    "verified": "Trained to be compared with lanerank-mini, on the same data.",
}

log = logging.getLogger("train")


class PairCollator:
    """Turns groups into pairs of texts; token ids are kept, since a pair is seen many times."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Keep up to 400,000 pairs as token ids."""
        self.pairs = PairTokenizer(tokenizer, max_tokens)
        self.query = lru_cache(maxsize=100_000)(self.pairs.query)
        self.window = lru_cache(maxsize=400_000)(self._window)

    def _window(self, query: str, text: str, attributes: str) -> PairWindow:
        candidate = Candidate(text=text, attributes=attributes)
        return self.pairs.windows(0, candidate, "truncate", self.query(query))[0][0]

    def __call__(
        self, groups: Sequence[dict[str, Any]]
    ) -> tuple[list[PairWindow], tuple[Tensor, list[Tensor], Tensor, Tensor]]:
        """Every pair of the groups, and what the losses need: targets, lists, pairs of pairs."""
        windows: list[PairWindow] = []
        targets: list[float] = []
        lists: list[Tensor] = []
        vertical: list[tuple[int, int]] = []
        equal: list[tuple[int, int]] = []
        for group in groups:
            today = date.fromisoformat(group["today"]) if group.get("today") else None
            candidates = [
                (
                    document["text"],
                    render_attributes(document["attributes"], list(document["attributes"]), today),
                )
                for document in group["documents"]
            ]
            starts = []
            for lane in group["lanes"]:
                rule = Instruction(lane["instruction"], today=today).render()
                query = f"{rule} {group['query']}" if lane["instruction"] else group["query"]
                starts.append(len(windows))
                windows += [self.window(query, *candidate) for candidate in candidates]
                targets += [float("nan") if t is None else t for t in lane["targets"]]
                lists.append(torch.arange(starts[-1], len(windows)))
            for pairs, is_neutral in same_document_pairs(group, starts):
                equal += pairs if is_neutral else []
                vertical += [p for p in pairs if abs(targets[p[0]] - targets[p[1]]) > 0.1]
            equal += attacked_pairs(group, starts)
        relations = (
            torch.tensor(targets),
            lists,
            torch.tensor(vertical, dtype=torch.long).reshape(-1, 2),
            torch.tensor(equal, dtype=torch.long).reshape(-1, 2),
        )
        return windows, relations


def logits_of(
    model: BertForSequenceClassification, windows: Sequence[PairWindow], tokens_per_batch: int
) -> Tensor:
    """The logits of the pairs, computed in batches of similar length."""
    order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
    logits: list[Tensor] = []
    left = list(order)
    while left:
        longest = len(windows[left[-1]])
        taken = left[-max(1, tokens_per_batch // longest) :]
        del left[-len(taken) :]
        ids = torch.zeros(len(taken), longest, dtype=torch.long)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, i in enumerate(taken):
            size = len(windows[i])
            ids[row, :size] = torch.tensor(windows[i].ids)
            types[row, :size] = torch.tensor(windows[i].types)
            mask[row, :size] = 1
        output = model(input_ids=ids, attention_mask=mask, token_type_ids=types)
        logits.insert(0, output.logits[:, 0].float())
    return torch.cat(logits)[torch.tensor(order).argsort()]


def save_model(weights: MasterWeights, start: Path, out: Path) -> None:
    """Write the model in float16 with its tokenizer and contract."""
    model = BertForSequenceClassification.from_pretrained(start, num_labels=1)
    with torch.no_grad():
        for name, trained in weights.master.items():
            model.get_parameter(name).copy_(trained)
    torch.nn.Module.to(model, torch.float16).save_pretrained(out)
    (out / "tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes())
    (out / "lanerank.json").write_text(json.dumps(CONTRACT, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Train, saving a checkpoint now and then and the model at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that build_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and the final model")
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--steps", type=int, help="train fewer or more steps than configured")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    disable_progress_bar()
    config = tomllib.loads(arguments.config.read_text())
    own, seed, loss_weights = config["cross_encoder"], config["seed"], config["loss"]
    steps = arguments.steps or own["steps"]
    arguments.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)
    folder = minilm_folder()
    # Attention by plain matrix products trains faster than the fused kernel at this head size.
    model = BertForSequenceClassification.from_pretrained(
        folder, num_labels=1, attn_implementation="eager"
    )
    torch.nn.Module.eval(model)
    live = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kinds = {name: "head" if name.startswith("classifier") else "encoder" for name in live}
    weights = MasterWeights(live, kinds, config["weight_decay"])
    torch.nn.Module.to(model, default_dtype(torch.device("cpu")))
    collate = PairCollator(Tokenizer.from_file(str(folder / "tokenizer.json")), own["max_tokens"])
    pools = read_groups(arguments.data)
    log.info("%s", {name: len(groups) for name, groups in pools.items()})

    checkpoint = arguments.out / "checkpoint.safetensors"
    first = weights.load(checkpoint) if checkpoint.exists() else 0
    started, seen = time.monotonic(), 0
    mean: dict[str, float] = {}
    for step in range(first, steps):
        windows, relations = collate(draw(pools, config["mix"], seed, step))
        losses = losses_of(logits_of(model, windows, own["tokens_per_batch"]), *relations)
        sum(rate_at(loss_weights[n], step) * loss for n, loss in losses.items()).backward()
        factor = learning_rate_factor([steps], config["warmup_steps"], step)
        rates = {kind: factor * rate for kind, rate in own["learning_rate"].items()}
        weights.step(rates, config["clip_norm"])
        seen += sum(map(len, windows))
        for name, loss in losses.items():
            mean[name] = 0.95 * mean.get(name, loss.item()) + 0.05 * loss.item()
        if (step + 1) % 10 == 0:
            rate = seen / (time.monotonic() - started)
            text = " ".join(f"{name} {value:.3f}" for name, value in mean.items())
            log.info("step %d/%d, %.0f tokens/s: %s", step + 1, steps, rate, text)
        if (step + 1) % config["save_every"] == 0 or step + 1 == steps:
            weights.save(checkpoint, step + 1)
            save_model(weights, folder, arguments.out / "model")
    log.info("saved %s", arguments.out / "model")


if __name__ == "__main__":
    main()
