"""Let two models score what nobody graded: `teach.py --data D --model RUN/model --cross-encoder C`.

A cross-encoder with full attention and lanerank-mini err in different places, so the mean of their
logits orders better than either. It becomes the target of documents of two neighbouring scenarios
under instructions of three; `train.py` reads the file that this writes beside the others.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from build_data import Encoder, write_jsonl
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import trange
from train import Collator, minilm_folder, outputs_of, read_groups
from train_cross_encoder import PairCollator, logits_of
from transformers import BertForSequenceClassification

from lanerank.lanes import LaneTokenizer
from lanerank.scoring.lane_encoder import default_dtype
from lanerank.scoring.modeling_lane_encoder import LaneEncoder

SCENARIOS = ("scenarios", "late", "fifth", "sixth")
Group = dict[str, Any]


def combinations(
    groups: list[Group], neighbours: np.ndarray, rng: random.Random, count: int
) -> list[Group]:
    """The query of a group, with documents and instructions of it and of its neighbours.

    Args:
        groups: The graded groups.
        neighbours: `(groups, n)`, the indices of the groups with the nearest queries, nearest
            first.
        rng: Draws everything.
        count: How many to make, at most one for each group.
    """
    order = list(range(len(groups)))
    rng.shuffle(order)
    made: list[Group] = []
    for index in order[:count]:
        own = groups[index]
        near, far = (groups[rng.choice(neighbours[index][:n])] for n in (8, neighbours.shape[1]))
        documents = [
            *rng.sample(own["documents"], min(5, len(own["documents"]))),
            *rng.sample(near["documents"], min(3, len(near["documents"]))),
        ]
        rng.shuffle(documents)
        lanes: list[dict[str, Any]] = []
        for group in (own, near, far):
            known = [lane["instruction"] for lane in lanes]
            # "The latest" of another scenario would need its today.
            suitable = [
                {**lane, "targets": [None] * len(documents)}
                for lane in group["lanes"]
                if lane["instruction"]
                and lane["instruction"] not in known
                and (group is own or lane["kind"] != "recency")
            ]
            lanes += [rng.choice(suitable)] if suitable else []
        if len(lanes) > 1:
            name = f"taught-{len(made)}"
            made.append({**own, "id": name, "source": "taught", "documents": documents})
            made[-1]["lanes"] = lanes
    return made


def nearest(groups: list[Group], encode: Encoder, count: int) -> np.ndarray:
    """For each group those with the most similar queries, without itself."""
    vectors = encode([group["query"] for group in groups])
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -1)
    return np.argsort(-similar, axis=1)[:, :count]


def with_targets(groups: list[Group], logits: Tensor) -> list[Group]:
    """The groups with the sigmoid of the logits, `(pairs,)` in the order of `Collator`."""
    targets = iter(logits.sigmoid().tolist())
    return [
        {
            **group,
            "lanes": [
                {**lane, "targets": [round(next(targets), 4) for _ in lane["targets"]]}
                for lane in group["lanes"]
            ],
        }
        for group in groups
    ]


def main() -> None:
    """Make the combinations, score them and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that build_data.py wrote")
    parser.add_argument("--model", type=Path, required=True, help="what train.py has saved so far")
    parser.add_argument("--cross-encoder", type=Path, required=True, help="a trained one")
    parser.add_argument("--count", type=int, default=3000, help="groups to make (3000)")
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    pools = read_groups(options.data)
    graded = [group for name in SCENARIOS for group in pools[name]]
    neighbours = nearest(graded, Encoder(options.data / "embeddings.npz"), 40)
    groups = combinations(graded, neighbours, random.Random(options.seed), options.count)

    dtype = default_dtype(torch.device("cpu"))
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    model = LaneEncoder.from_pretrained(options.model).eval().float().cast_encoder(dtype)
    cross_encoder = BertForSequenceClassification.from_pretrained(
        options.cross_encoder, attn_implementation="eager"
    )
    torch.nn.Module.to(torch.nn.Module.eval(cross_encoder), dtype)
    pairs, collate = PairCollator(tokenizer, 512), Collator(LaneTokenizer(tokenizer), 4096)
    taught: list[Group] = []
    with torch.inference_mode():
        for start in trange(0, len(groups), 16, unit=" x 16 groups"):
            some = groups[start : start + 16]
            one = outputs_of(model, collate(some)).logits
            other = logits_of(cross_encoder, pairs(some)[0], 4096)
            taught += with_targets(some, (one + other) / 2)
    write_jsonl(options.data / "taught.jsonl.gz", taught)


if __name__ == "__main__":
    main()
