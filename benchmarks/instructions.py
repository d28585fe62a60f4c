"""Do lanes help? Four rerankers on the same questions: `python benchmarks/instructions.py`.

- lanerank-mini: the lane encoder in the package;
- the bi-encoder it starts from (all-MiniLM-L6-v2), given "instruction query" as one text and the
  attributes before the document;
- a cross-encoder with full attention, of the same size and start, trained by
  recipes/mini/train_cross_encoder.py with the same losses on scores, given instruction and query as
  one text; the committed figures are of one trained on the first two series of scenarios alone;
- SmolLM2-135M-Instruct as a yes/no judge, not trained for ranking.

Measured on the development scenarios of recipes/mini, which no training saw: following,
calibration, and what attacks in documents do. Writes benchmarks/results/instructions.json and the
page benchmarks/results/instructions.md. What these have is not measured again, but for
lanerank-mini with other weights. Takes about half an hour on two cores.

The cross-encoder's weights are not in the repository. Train them first (about 40 minutes):

    python recipes/mini/build_data.py --out build/mini
    python recipes/mini/train_cross_encoder.py --data build/mini --out build/cross-encoder
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from causal_lm import unpack
from quality import BiEncoderScorer, minilm_folder, read_development_scenarios
from rich.console import Console
from rich.progress import Progress
from sentence_transformers import SentenceTransformer

from lanerank import Reranker
from lanerank.evaluation import (
    LANE_KINDS,
    Estimate,
    Scenario,
    evaluate,
    measure_calibration,
    measure_following,
    measure_injection,
)
from lanerank.evaluation.scoring import Remembering

HERE = Path(__file__).parent


def measure(reranker: Reranker, scenarios: list[Scenario], sample: int) -> dict[str, Any]:
    """All reports of one system."""
    remembering = Remembering(reranker)
    with Progress(transient=True) as bars:

        def progress(label: str) -> Any:  # noqa: ANN401 - rich's own callback
            task = bars.add_task(f"{reranker.scorer.name}: {label}", total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        return {
            "evaluation": evaluate(remembering, scenarios, progress=progress("evaluate")),
            "following": measure_following(remembering, scenarios, progress=progress("following")),
            "calibration": measure_calibration(
                remembering, scenarios, progress=progress("calibration")
            ),
            "injection": measure_injection(
                remembering, scenarios, sample=sample, progress=progress("injection")
            ),
        }


def cell(estimate: Estimate | None) -> str:
    """A value and its interval."""
    if estimate is None:
        return "n/a"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def find(report: dict[str, Any], path: str) -> Estimate | None:
    """An estimate of a report, by its path: `overall.shift`."""
    value: Any = report
    for step in path.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return None if value is None else Estimate.model_validate(value)


def spread(scenarios: list[Scenario], limit: int | None) -> list[Scenario]:
    """So many scenarios, evenly spread over the files; all without a limit."""
    if limit is None:
        return scenarios
    return [scenarios[i * len(scenarios) // limit] for i in range(min(limit, len(scenarios)))]


def main() -> None:
    """Measure the systems that are not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cross-encoder", type=Path, help="the folder `model` of its training")
    parser.add_argument("--limit", type=int, help="use only this many, evenly spread")
    parser.add_argument("--judge-limit", type=int, default=20, help="scenarios for the slow judge")
    parser.add_argument("--sample", type=int, default=6000, help="documents scored under attack")
    parser.add_argument("--again", action="append", help="measure this system though it is there")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "instructions.json")
    arguments = parser.parse_args()
    scenarios = spread(read_development_scenarios(), arguments.limit)
    few = spread(scenarios, arguments.judge_limit)
    console = Console()
    reports: dict[str, dict[str, Any]] = {}
    if arguments.out.exists():
        reports = json.loads(arguments.out.read_text(encoding="utf-8"))
    again = set(arguments.again or ())
    packaged = files("lanerank") / "models" / "lanerank-mini" / "model.safetensors"
    weights = hashlib.sha256(packaged.read_bytes()).hexdigest()
    if reports.get("lanerank-mini", {}).get("weights") != weights:
        again.add("lanerank-mini")

    def run(label: str, load: Callable[[], Reranker], chosen: list[Scenario], sample: int) -> None:
        if label in reports and label not in again:
            console.print(f"{label}: measured before")
            return
        found = measure(load(), chosen, sample)
        reports[label] = {part: each.model_dump(mode="json") for part, each in found.items()}
        if label == "lanerank-mini":
            reports[label]["weights"] = weights
        # After each, because the whole takes long.
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
        console.print(f"{label}: done")

    def load_bi_encoder() -> Reranker:
        model = SentenceTransformer(str(minilm_folder()), device="cpu")
        return Reranker(BiEncoderScorer(model, "bi-encoder on concatenated text"))

    def load_cross_encoder() -> Reranker:
        return Reranker.from_pretrained(arguments.cross_encoder, on_unsupported="prepend")

    run("lanerank-mini", Reranker.from_pretrained, scenarios, arguments.sample)
    run("bi-encoder", load_bi_encoder, scenarios, arguments.sample)
    if arguments.cross_encoder:
        run("cross-encoder", load_cross_encoder, scenarios, arguments.sample)
    with tempfile.TemporaryDirectory() as folder:

        def load_judge() -> Reranker:
            unpack(Path(folder))
            return Reranker.from_pretrained(folder, contract="yes-no-judge")

        run("SmolLM2-135M judge", load_judge, few, arguments.sample // 8)
    page = arguments.out.with_suffix(".md")
    page.write_text(write_page(reports, len(scenarios), len(few)), encoding="utf-8")
    console.print(f"written: {arguments.out} and {page}")


COMPARED = (
    # What is compared in words, and whether more is better.
    ("nDCG@10 with the instruction", "evaluation", "ndcg_instructed", True),
    *((f"nDCG@10, {kind}", "evaluation", f"by_kind.{kind}.ndcg", True) for kind in LANE_KINDS),
    ("flip accuracy", "following", "flip_accuracy.model", True),
    ("p-MRR between instructions", "following", "p_mrr.model", True),
    ("robustness@10", "following", "robustness.model", True),
    ("negation accuracy", "following", "negation_accuracy.model", True),
    ("nDCG@10 amid boilerplate", "following", "conditions.long.ndcg", True),
    ("ECE", "calibration", "pooled.ece", False),
    ("Brier score", "calibration", "pooled.brier", False),
    ("neutral drift", "evaluation", "neutral_drift", False),
    ("score shift under attack", "injection", "overall.shift", False),
    ("share of attacks that lift a document", "injection", "overall.success", False),
)


def write_verdict(reports: dict[str, dict[str, Any]], ours: str, theirs: str) -> list[str]:
    """Where the intervals of two systems are apart, and which way."""
    better: list[str] = []
    worse: list[str] = []
    open_: list[str] = []
    for label, part, path, more in COMPARED:
        a, b = (find(reports[name][part], path) for name in (ours, theirs))
        if a is None or b is None:
            continue
        text = f"{label} ({a.value:.3f} against {b.value:.3f})"
        if a.low > b.high or b.low > a.high:
            (better if (a.value > b.value) is more else worse).append(text)
        else:
            open_.append(text)
    return [
        f"**{ours} against {theirs}**, by intervals that do not overlap:",
        "",
        f"- better: {'; '.join(better) or 'nothing'}",
        f"- worse: {'; '.join(worse) or 'nothing'}",
        f"- not told apart: {'; '.join(open_) or 'nothing'}",
        "",
    ]


def write_page(reports: dict[str, dict[str, Any]], scenarios: int, few: int) -> str:
    """The page, in Markdown."""
    systems = list(reports)

    def measured(part: str, path: str) -> list[Estimate | None]:
        return [find(reports[label][part], path) for label in systems]

    def table(rows: list[tuple[str, str, str]]) -> str:
        lines = [
            "| measure | " + " | ".join(systems) + " |",
            "|---" * (len(systems) + 1) + "|",
        ]
        for label, part, path in rows:
            cells = " | ".join(cell(each) for each in measured(part, path))
            lines.append(f"| {label} | {cells} |")
        return "\n".join(lines)

    first = reports[systems[0]]
    families = first["injection"]["by_family"]
    kinds = first["evaluation"]["by_kind"]
    sections = [
        "# Do lanes help?",
        "",
        f"Written by `benchmarks/instructions.py`, which says what the systems are. {scenarios} "
        f"development scenarios that no training saw; SmolLM2 on {few} of them, because it is "
        "slow. Values with 95% bootstrap intervals over scenarios. lanerank-mini, the bi-encoder "
        "and the cross-encoder start from the same weights (all-MiniLM-L6-v2) and are of the same "
        "size. The cross-encoder was trained with the same losses on scores, but on an earlier "
        "state of the data: 1,050 of the 4,419 scenarios, and no attacked twins.",
        "",
        "## In short",
        "",
        *(line for other in systems[1:3] for line in write_verdict(reports, systems[0], other)),
        "## Following",
        "",
        table(
            [
                ("nDCG@10 with the instruction", "evaluation", "ndcg_instructed"),
                ("nDCG@10 without it", "evaluation", "ndcg_withheld"),
                ("lift", "evaluation", "lift"),
                ("nDCG@10, queries without instruction", "evaluation", "ndcg_none"),
                ("flip accuracy", "following", "flip_accuracy.model"),
                ("flip accuracy, random scorer", "following", "flip_accuracy.random"),
                ("p-MRR between instructions", "following", "p_mrr.model"),
                ("p-MRR from no instruction", "following", "p_mrr_from_none.model"),
                ("SICR", "following", "sicr.model"),
                ("WISE", "following", "wise.model"),
                ("robustness@10", "following", "robustness.model"),
                ("negation accuracy", "following", "negation_accuracy.model"),
                ("negation lift", "following", "negation_lift"),
            ]
        ),
        "",
        "nDCG@10 by kind of instruction:",
        "",
        table([(kind, "evaluation", f"by_kind.{kind}.ndcg") for kind in kinds]),
        "",
        "nDCG@10 when something else stands in the instruction's place (graded as if the "
        "instruction were there; `negated` should fall, `irrelevant` be as `withheld`):",
        "",
        table(
            [
                (name, "following", f"conditions.{name}.ndcg")
                for name in first["following"]["conditions"]
            ]
        ),
        "",
        "## Calibration",
        "",
        table(
            [
                ("ECE", "calibration", "pooled.ece"),
                ("Brier score", "calibration", "pooled.brier"),
                ("best threshold", "calibration", "pooled.threshold"),
                ("F1 at it", "calibration", "pooled.f1"),
                ("spread of the best threshold", "calibration", "threshold_spread"),
                ("neutral drift", "evaluation", "neutral_drift"),
                *(
                    (f"ECE, {kind}", "calibration", f"by_kind.{kind}.ece")
                    for kind in first["calibration"]["by_kind"]
                ),
            ]
        ),
        "",
        "## Injection",
        "",
        "Attacked against the same document with harmless text of equal length. Scores of the "
        "bi-encoder are cosines in a narrow band, so that its shifts, and its drift above, are "
        "small for that reason too; ranks compare better.",
        "",
        table(
            [
                ("score shift", "injection", "overall.shift"),
                ("mean absolute shift", "injection", "overall.absolute_shift"),
                ("ranks gained", "injection", "overall.rank_change"),
                ("ranks better", "injection", "overall.success"),
                ("ranks worse", "injection", "overall.backfire"),
                ("crosses 0.5", "injection", "overall.crossing"),
                ("lane transfer", "injection", "overall.lane_transfer"),
                *(
                    (f"score shift, {name}", "injection", f"by_family.{name}.shift")
                    for name in families
                ),
            ]
        ),
        "",
    ]
    return "\n".join(sections)


if __name__ == "__main__":
    main()
