"""The model card: what a model was made of, what was measured, and what it is not for."""

from __future__ import annotations

import json
from pathlib import Path

from lanerank.evaluation.measures import Estimate
from lanerank.training.config import TrainingConfig
from lanerank.training.markdown import table
from lanerank.training.report import TrainingReport

CARD_FILE = "README.md"

_KINDS = {
    "lane_encoder": "a lane encoder, in which instruction and query are read before any document, "
    "in lanes that no document can enter",
    "cross_encoder": "a plain cross-encoder that reads the instruction before the query, as one "
    "text, and has no lane for the instruction",
    "causal_lm": "a causal language model, asked by the contract in `lanerank.json`",
}
_MEANINGS = {
    "ndcg": "nDCG@10",
    "ndcg_instructed": "nDCG@10 with an instruction",
    "ndcg_plain": "nDCG@10 without an instruction",
    "flip_accuracy": "flip accuracy: scores of one document under two instructions in the right "
    "order",
    "neutral_drift": "mean change of a score by an instruction that should change nothing",
    "ece": "expected calibration error, before calibration",
    "brier": "Brier score, before calibration",
}
_FEW_QUERIES = 50


def write_card(folder: Path, report: TrainingReport) -> Path:
    """Write the card of a model into its folder."""
    path = folder / CARD_FILE
    path.write_text(render_card(report), encoding="utf-8")
    return path


def render_card(report: TrainingReport) -> str:
    """The card as Markdown, with the facts on top that the Hugging Face hub reads."""
    config = report.config
    name = config.card.name or config.output.name
    sections = [
        _front_matter(config),
        f"# {name}",
        f"A reranker that follows instructions: {_KINDS[config.kind]}. Trained with lanerank from "
        f"{_base(config)}.",
        _usage(config),
        "## Intended use",
        config.card.intended_use or "Not stated by those who trained it.",
        "## Measures",
        _measures(report),
        "## Training data",
        _data(report),
        "## Training",
        _training(report),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(report)),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(config: TrainingConfig) -> str:
    card = config.card
    facts: dict[str, object] = {
        "library_name": "lanerank",
        "pipeline_tag": "text-ranking",
        "tags": ["reranker", "instruction-following", config.kind.replace("_", "-")],
    }
    if card.licence:
        facts["license"] = card.licence.lower()
    if card.languages:
        facts["language"] = list(card.languages)
    if card.base_model:
        facts["base_model"] = card.base_model
    # JSON values are YAML values too, whatever the texts hold.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
    return "\n".join(["---", *lines, "---"])


def _base(config: TrainingConfig) -> str:
    return config.card.base_model or f"`{Path(config.model).name}`"


def _usage(config: TrainingConfig) -> str:
    option = ', on_unsupported="prepend"' if config.kind == "cross_encoder" else ""
    return "\n".join(
        [
            "```python",
            "from lanerank import Reranker",
            "",
            f'reranker = Reranker.from_pretrained("path/to/{config.output.name}"{option})',
            "ranking = reranker.rank(query, documents, instruction=instruction)",
            "```",
        ]
    )


def _measures(report: TrainingReport) -> str:
    before = dict(report.before.rows_of_estimates())
    after = report.after.rows_of_estimates()
    rows = [
        (_meaning(name), _cell(before.get(name)), _cell(value), str(value.n))
        for name, value in after
    ]
    return "\n\n".join(
        [
            f"On {report.after.queries} development queries with {report.after.rows} rows. "
            f"Intervals: {report.after.interval}. The same data chose the checkpoint, so the "
            "figures are a little too good; measure on data of your own."
            + (" The calibrator was fitted on them as well." if report.calibrator else ""),
            table(("measure", "before training", "after", "n"), rows),
        ]
    )


def _data(report: TrainingReport) -> str:
    sources = report.config.card.data
    listed = table(
        ("name", "licence", "source"), [(each.name, each.licence, each.source) for each in sources]
    )
    stated = listed if sources else "Sources and licences: not stated by those who trained it."
    files = table(("file", "SHA-256"), [(f"`{each.name}`", each.sha256) for each in report.data])
    return "\n\n".join(
        [
            f"{report.rows} quadruples (query, instruction, document, score) of {report.queries} "
            "queries.",
            stated,
            files,
        ]
    )


def _training(report: TrainingReport) -> str:
    config = report.config
    weights = config.loss_weights
    losses = table(
        ("loss", "weight", "terms in one pass"),
        [(name, f"{weights[name]:g}", str(count)) for name, count in report.terms.items()],
    )
    body, head = config.rates
    stopped = ", where training stopped for want of progress" if report.stopped_early else ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n\n".join(
        [
            f"{report.steps} steps{stopped}; the weights are those of step {report.best_step}. "
            f"{config.groups_per_batch * config.accumulate} groups a step, learning rate {body:g}"
            + (f", of the head {head:g}" if config.kind != "causal_lm" else "")
            + f", at most {config.max_tokens} tokens, {config.precision}, seed {config.seed}. "
            f"{versions}. `training.json` has the whole configuration and every evaluation.",
            losses,
        ]
    )


def _limits(report: TrainingReport) -> list[str]:
    config, after = report.config, report.after
    limits = [*config.card.limits]
    if report.worse_than_start:
        limits.append(report.worse_than_start)
    limits += [
        f"The loss `{name}` had no data, so nothing was learnt from it."
        for name, count in report.terms.items()
        if not count
    ]
    if after.queries < _FEW_QUERIES:
        limits.append(
            f"Measured on {after.queries} queries only, so the intervals above are wide or hide "
            "how much they leave open."
        )
    if report.calibrator is None:
        reason = report.not_calibrated or "none was asked for"
        limits.append(f"Scores are not calibrated ({reason}): they order documents.")
    if after.flip_accuracy is None:
        limits.append(
            "Whether scores follow the instruction was not measured: no document had different "
            "scores under two instructions in the development data."
        )
    if config.kind == "cross_encoder":
        limits.append(
            "The instruction shares a text with the query, and every token sees the document: what "
            "a document says can change how the instruction is read."
        )
    limits.append(
        "A document that merely claims to be what an instruction asks for can pass for it; "
        "`lanerank injection` measures how easily."
    )
    return limits


def _meaning(name: str) -> str:
    measure, _, kind = name.partition("/")
    return f"{_MEANINGS[measure]}, kind `{kind}`" if kind else _MEANINGS[measure]


def _cell(value: Estimate | None) -> str:
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})" if value else ""
