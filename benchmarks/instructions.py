"""Do lanes help? Four rerankers on the same questions: `python benchmarks/instructions.py`.

- lanerank-mini: the lane encoder in the package;
- the bi-encoder it starts from (all-MiniLM-L6-v2), given "instruction query" as one text and the
  attributes before the document;
- a cross-encoder with full attention, of the same size and start, trained by
  recipes/mini/train_cross_encoder.py on the same data with the same losses, given instruction and
  query as one text;
- SmolLM2-135M-Instruct as a yes/no judge, not trained for ranking.

Measured on the development scenarios of recipes/mini, which no training saw: following,
calibration, and what attacks in documents do. Writes benchmarks/results/instructions.json and the
page benchmarks/results/instructions.md. Takes about half an hour on two cores.

The cross-encoder's weights are not in the repository. Train them first (about 40 minutes):

    python recipes/mini/build_data.py --out build/mini
    python recipes/mini/train_cross_encoder.py --data build/mini --out build/cross-encoder
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from causal_lm import unpack
from quality import BiEncoderScorer, minilm_folder, read_development_scenarios
from rich.console import Console
from rich.progress import Progress
from sentence_transformers import SentenceTransformer

from lanerank import Reranker
from lanerank.evaluation import (
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


def main() -> None:
    """Measure the systems and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cross-encoder", type=Path, help="the folder `model` of its training")
    parser.add_argument("--limit", type=int, help="use only this many scenarios")
    parser.add_argument("--judge-limit", type=int, default=40, help="scenarios for the slow judge")
    parser.add_argument("--sample", type=int, default=6000, help="documents scored under attack")
    parser.add_argument("--skip-judge", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "instructions.json")
    arguments = parser.parse_args()
    scenarios = read_development_scenarios()[: arguments.limit]
    few = scenarios[:: max(1, len(scenarios) // arguments.judge_limit)][: arguments.judge_limit]
    console = Console()

    reports: dict[str, dict[str, Any]] = {}

    def run(label: str, reranker: Reranker, chosen: list[Scenario], sample: int) -> None:
        reports[label] = measure(reranker, chosen, sample)
        console.print(f"{label}: done")

    run("lanerank-mini", Reranker.from_pretrained(), scenarios, arguments.sample)
    bi_encoder = SentenceTransformer(str(minilm_folder()), device="cpu")
    run(
        "bi-encoder",
        Reranker(BiEncoderScorer(bi_encoder, "bi-encoder on concatenated text")),
        scenarios,
        arguments.sample,
    )
    if arguments.cross_encoder:
        cross_encoder = Reranker.from_pretrained(arguments.cross_encoder, on_unsupported="prepend")
        run("cross-encoder", cross_encoder, scenarios, arguments.sample)
    if not arguments.skip_judge:
        with tempfile.TemporaryDirectory() as folder:
            unpack(Path(folder))
            judge = Reranker.from_pretrained(folder, contract="yes-no-judge")
            run("SmolLM2-135M judge", judge, few, arguments.sample // 4)

    out = {
        label: {part: report.model_dump(mode="json") for part, report in found.items()}
        for label, found in reports.items()
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    page = write_page(reports, len(scenarios), len(few))
    arguments.out.with_suffix(".md").write_text(page, encoding="utf-8")
    console.print(f"written: {arguments.out} and {arguments.out.with_suffix('.md')}")


def write_page(reports: dict[str, dict[str, Any]], scenarios: int, few: int) -> str:
    """The page, in Markdown."""
    systems = list(reports)

    def measured(part: str, measure: str) -> list[Estimate | None]:
        found: list[Estimate | None] = []
        for label in systems:
            value: Any = reports[label][part]
            for step in measure.split("."):
                if value is not None:
                    value = value.get(step) if isinstance(value, dict) else getattr(value, step)
            found.append(value)
        return found

    def table(rows: list[tuple[str, str, str]]) -> str:
        lines = [
            "| measure | " + " | ".join(systems) + " |",
            "|---" * (len(systems) + 1) + "|",
        ]
        for label, part, measure in rows:
            cells = " | ".join(cell(each) for each in measured(part, measure))
            lines.append(f"| {label} | {cells} |")
        return "\n".join(lines)

    first = reports[systems[0]]
    families = first["injection"].by_family
    kinds = first["evaluation"].by_kind
    sections = [
        "# Do lanes help?",
        "",
        f"Written by `benchmarks/instructions.py`, which says what the systems are. {scenarios} "
        f"development scenarios that no training saw; SmolLM2 on {few} of them, because it is "
        "slow. Values with 95% bootstrap intervals over scenarios. lanerank-mini, the bi-encoder "
        "and the cross-encoder start from the same weights (all-MiniLM-L6-v2) and are of the same "
        "size; the cross-encoder was trained on the same data, in the same order, with the same "
        "losses.",
        "",
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
                for name in first["following"].conditions
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
                    for kind in first["calibration"].by_kind
                ),
            ]
        ),
        "",
        "## Injection",
        "",
        "Attacked against the same document with harmless text of equal length.",
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
