"""Pairs per second of `rank_dataset`, against the same pairs through `Reranker.score`.

The workload: the 120 queries of medquad with 20 documents each (2,400 pairs, about 106 tokens a
document), all under one instruction. What is timed is the steady part of a run, from the first
shard that is done to the last, since starting takes as long for a million pairs as for a thousand;
how long it takes is told apart. The rounds alternate between the systems, because other work on
the machine comes and goes; the table shows medians and ranges. Processor time, that of the driver
and of all workers, depends far less on what else is running; it is what a pair costs.

Two further figures bound what the parts around the model cost: the speed of the same run with a
model that takes no time, and how long it takes to reach the end of a large row group.

`python benchmarks/bulk.py` prints a table and writes benchmarks/results/bulk.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from lanerank import Reranker
from lanerank.contracts import RerankRequest, Scores
from lanerank.distributed import rank_dataset
from lanerank.distributed.parquet import ParquetFormat
from lanerank.distributed.rows import Columns, Shard

HERE = Path(__file__).parent
DATA = HERE / "data" / "generic_dev_medquad.jsonl.gz"
INSTRUCTION = (
    "The reader is a patient without medical training. Prefer answers that say what to do and when "
    "to see a doctor over lists of genes and statistics."
)
SHARD = 240
CORES = os.cpu_count() or 1


class Constant:
    """A model that takes no time."""

    name = "constant"
    supports_instructions = True

    def score(self, request: RerankRequest) -> Scores:
        """The same for all."""
        return Scores((0.5,) * len(request.candidates))


def no_model() -> Reranker:
    """See `Constant`."""
    return Reranker(Constant())


def processor_seconds(workers: dict[int, float]) -> float:
    """What this process and the workers of Ray Data have used so far, all threads together.

    Args:
        workers: By process, what was used when it was last seen; brought up to date here, since a
            worker that has nothing left to do ends before the last shard is done.
    """
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        if (process.info["cmdline"] or [""])[0].startswith("ray::MapWorker"):
            times = process.info["cpu_times"]
            workers[process.pid] = times.user + times.system
    return time.process_time() + sum(workers.values())


def steady(source: Path, folder: Path, **options: Any) -> dict[str, float]:  # noqa: ANN401 - handed on
    """Pairs per second between the first shard that is done and the last, and the start."""
    done: list[tuple[float, float, int]] = []
    workers: dict[int, float] = {}
    started = time.perf_counter()
    report = rank_dataset(
        source,
        folder,
        instruction=INSTRUCTION,
        resume=False,
        progress=lambda rows, _: done.append(
            (time.perf_counter(), processor_seconds(workers), rows)
        ),
        **options,
    )
    (first, used, before), (last, used_at_last, rows) = done[0], done[-1]
    pairs = (rows - before) * report.documents / report.rows
    return {
        "pairs_per_second": pairs / (last - first),
        "processor_ms_per_pair": (used_at_last - used) / pairs * 1000,
        "seconds_to_first_shard": first - started,
    }


def direct(queries: list[dict[str, Any]], reranker: Reranker) -> dict[str, float]:
    """The same pairs, one query after the other."""
    started, used = time.perf_counter(), time.process_time()
    for row in queries:
        reranker.score(row["query"], row["documents"], instruction=INSTRUCTION)
    pairs = sum(len(row["documents"]) for row in queries)
    return {
        "pairs_per_second": pairs / (time.perf_counter() - started),
        "processor_ms_per_pair": (time.process_time() - used) / pairs * 1000,
    }


def bytes_per_pair(folder: Path, pairs: int) -> dict[str, float]:
    """The size of the input and, with all of its columns kept, of the output."""
    source = folder / "pairs.parquet"
    rank_dataset(source, folder / "size", form="pairs", model=no_model, concurrency=0)
    out = sum(part.stat().st_size for part in (folder / "size").glob("part-*"))
    return {"input": source.stat().st_size / pairs, "output": out / pairs}


def without_model(pairs: list[dict[str, str]], folder: Path) -> float:
    """Pairs per second of reading, grouping, building rankings and writing, in one process."""
    source = folder / "many.parquet"
    pq.write_table(pa.Table.from_pylist(pairs * 20), source)
    options = {"form": "pairs", "model": no_model, "concurrency": 0, "rows_per_shard": 6000}
    return steady(source, folder / "constant", **options)["pairs_per_second"]


def end_of_row_group(folder: Path, rows: int = 400_000) -> dict[str, float]:
    """Seconds to read the first and the last 1,000 rows of a row group."""
    generator = random.Random(0)
    words = [f"{generator.getrandbits(32):x}" for _ in range(5000)]
    texts = [" ".join(generator.choices(words, k=70)) for _ in range(rows)]
    source = folder / "group.parquet"
    table = pa.table({"query": ["fish"] * rows, "document": texts})
    pq.write_table(table, source, row_group_size=rows)
    seconds = {}
    columns = Columns(form="pairs", query_column="query", documents_column="document")
    for place, begin in (("first", 0), ("last", rows - 1000)):
        shard = Shard(file=0, first=begin + 1, rows=1000)
        started = time.perf_counter()
        found = sum(len(b.rows) for b in ParquetFormat().read(source, shard, columns, 1024))
        seconds[f"{place}_shard"] = time.perf_counter() - started
        assert found == 1000
    return {"rows": rows, "bytes": source.stat().st_size, **seconds}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=120)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bulk.json")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lanerank-bulk-"))
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines][: arguments.queries]
    queries = [
        {"query": row["query"], "documents": [d["text"] for d in row["documents"]]} for row in found
    ]
    pairs = [
        {"query": row["query"], "document": text} for row in queries for text in row["documents"]
    ]
    mixed = random.Random(0).sample(pairs, len(pairs))
    for name, rows in (("lists", queries), ("pairs", pairs), ("mixed", mixed)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    tokenizer = Tokenizer.from_file(
        str(HERE.parent / "src/lanerank/models/lanerank-mini/tokenizer.json")
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokens = statistics.mean(len(tokenizer.encode(pair["document"]).ids) for pair in pairs)

    reranker = Reranker.from_pretrained(device="cpu")
    in_pairs = {"form": "pairs", "rows_per_shard": SHARD, "batch_size": SHARD}
    one = {**in_pairs, "concurrency": 1, "num_cpus": CORES}
    each = {**in_pairs, "concurrency": CORES, "num_cpus": 1}
    runs: dict[str, Callable[[Path], dict[str, float]]] = {
        "Reranker.score": lambda _: direct(queries, reranker),
        "lists, in process": lambda out: steady(
            folder / "lists.parquet", out, rows_per_shard=12, batch_size=12, concurrency=0
        ),
        "pairs, in process": lambda out: steady(
            folder / "pairs.parquet", out, concurrency=0, **in_pairs
        ),
        "pairs in random order, in process": lambda out: steady(
            folder / "mixed.parquet", out, concurrency=0, **in_pairs
        ),
        f"pairs, 1 worker of {CORES} CPUs": lambda out: steady(
            folder / "pairs.parquet", out, **one
        ),
        f"pairs, {CORES} workers of 1 CPU": lambda out: steady(
            folder / "pairs.parquet", out, **each
        ),
    }
    console = Console()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    direct(queries[:5], reranker)
    for number in range(arguments.rounds):
        for name, run in runs.items():
            results[name].append(run(folder / "out"))
            speed, cost = (
                results[name][-1]["pairs_per_second"],
                results[name][-1]["processor_ms_per_pair"],
            )
            console.print(
                f"round {number + 1}: {name}: {speed:.0f} pairs/s, {cost:.1f} ms", style="dim"
            )
            shutil.rmtree(folder / "out", ignore_errors=True)
    size = bytes_per_pair(folder, len(pairs))
    bare = without_model(pairs, folder)
    group = end_of_row_group(folder)
    shutil.rmtree(folder)

    table = Table(title=f"{len(pairs)} pairs, {tokens:.0f} tokens a document, {CORES} cores")
    for heading in ("system", "pairs/s", "range", "processor ms a pair", "start, s"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    summary: dict[str, dict[str, float]] = {}
    for name, measured in results.items():
        speeds = [each["pairs_per_second"] for each in measured]
        costs = [each["processor_ms_per_pair"] for each in measured]
        starts = [m["seconds_to_first_shard"] for m in measured if "seconds_to_first_shard" in m]
        summary[name] = {
            "median": statistics.median(speeds),
            "min": min(speeds),
            "max": max(speeds),
            "processor_ms_per_pair": statistics.median(costs),
            **({"seconds_to_first_shard": statistics.median(starts)} if starts else {}),
        }
        table.add_row(
            name,
            f"{statistics.median(speeds):.0f}",
            f"{min(speeds):.0f} to {max(speeds):.0f}",
            f"{statistics.median(costs):.1f}",
            f"{statistics.median(starts):.1f}" if starts else "",
        )
    table.add_row("pairs without a model, in process", f"{bare:.0f}", "", "", "")
    console.print(table)
    console.print(
        f"Reading 1,000 rows of a row group of {group['rows']:,.0f}: the first "
        f"{group['first_shard']:.2f} s, the last {group['last_shard']:.2f} s"
    )
    result = {
        "workload": {
            "pairs": len(pairs),
            "documents_per_query": len(queries[0]["documents"]),
            "mean_document_tokens": tokens,
            "instruction": INSTRUCTION,
        },
        "machine": {
            "cores": CORES,
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "load_at_end": os.getloadavg()[0],
        },
        "pairs_per_second": summary,
        "bytes_per_pair": size,
        "without_model_pairs_per_second": bare,
        "row_group": group,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
