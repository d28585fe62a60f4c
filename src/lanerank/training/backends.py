"""The three kinds of models that can be trained: how each reads rows, scores them and is saved.

Texts become ids by the tokenizers that scorers use, so that training and inference read the same.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lanerank.checkpoint import load_scorer
from lanerank.contracts import Candidate, Lane
from lanerank.errors import InputError, MissingExtraError, ModelLoadError
from lanerank.lanes import LaneTokenizer
from lanerank.scoring.causal_lm import CausalLMScorer
from lanerank.scoring.cross_encoder import CrossEncoderScorer
from lanerank.scoring.lane_encoder import LaneEncoderScorer
from lanerank.scoring.modeling_lane_encoder import InstructedLinear, LaneEncoder
from lanerank.scoring.pretrained import ModelOptions, load_pretrained
from lanerank.template import LOCAL_CONTRACT, PromptTemplate, contract_for, read_contract
from lanerank.training.bi_encoder import convert_bi_encoder, is_bi_encoder, is_head, is_instructed
from lanerank.training.config import (
    EMBEDDED_MODEL,
    LaneEncoderSettings,
    LoraSettings,
    TrainingConfig,
)
from lanerank.training.groups import Row

_CACHED_TEXTS = 100_000
_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("added_tokens.json", "chat_template.jinja"),
)

Inputs = dict[str, Tensor]


class Backend(Protocol):
    """A model to train, and what is special about its kind."""

    @property
    def model(self) -> nn.Module:
        """What the optimiser moves, in training mode or not."""
        ...

    def check(self, row: Row) -> None:
        """Refuse a row whose trusted texts the model cannot read.

        Raises:
            InputError: Instruction or query are too long.
        """
        ...

    def inputs(self, rows: Sequence[Row]) -> Inputs:
        """The arguments of a forward pass for these rows."""
        ...

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """The logit of each row, `(n,)`, float32; its sigmoid is the score.

        Args:
            model: `self.model`, perhaps wrapped.
            inputs: From `inputs`, on the model's device.
        """
        ...

    def is_head(self, name: str) -> bool:
        """Whether a parameter learns at the rate of the head."""
        ...

    def restore(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint that the trainer wrote."""
        ...

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write the model, so that `Reranker.from_pretrained` loads it.

        Args:
            folder: Exists already.
            facts: Fields of the contract, where the kind needs one: licence, languages, ...
        """
        ...


def load_backend(config: TrainingConfig, scratch: Path) -> Backend:
    """The model to start from.

    Args:
        config: Says which.
        scratch: An existing folder, for what a start needs to write.

    Raises:
        InputError: The model is not of the kind that the configuration names.
        MissingExtraError: A package is missing.
        ModelLoadError: The model cannot be loaded.
    """
    if config.model != EMBEDDED_MODEL and not Path(config.model).is_dir():
        raise InputError(
            f"`model`: there is no folder {config.model!r}; give one (`hf download` fetches models "
            f"from the hub), or {EMBEDDED_MODEL!r}"
        )
    if config.kind == "lane_encoder":
        return LaneEncoderBackend.load(config, scratch)
    if config.kind == "cross_encoder":
        return CrossEncoderBackend.load(config)
    return CausalLMBackend.load(config)


class LaneEncoderBackend:
    """Trains a lane encoder: trusted lanes once for each request, candidates grouped under them."""

    def __init__(self, model: LaneEncoder, lanes: LaneTokenizer, tokenizer: Path) -> None:
        """Keep up to 100,000 texts as token ids, since each is seen under several instructions."""
        self.model = model
        self.lanes = lanes
        self._tokenizer = tokenizer
        self._trusted = lru_cache(_CACHED_TEXTS)(lanes.trusted)
        self._echoes = lru_cache(_CACHED_TEXTS)(lanes.echoes)
        self._candidate = lru_cache(_CACHED_TEXTS)(self._encode)

    @classmethod
    def load(cls, config: TrainingConfig, scratch: Path) -> LaneEncoderBackend:
        """Load a lane encoder, or make one of a bi-encoder; see `load_backend`."""
        settings = config.lane_encoder or LaneEncoderSettings()
        start: str | Path = config.model
        if config.model != EMBEDDED_MODEL and is_bi_encoder(Path(config.model)):
            start = convert_bi_encoder(
                config.model, scratch / "start", adapter_rank=settings.adapter_rank
            )
        scorer = load_scorer(start, device="cpu", dtype="float32", calibrated=False)
        if not isinstance(scorer, LaneEncoderScorer):
            raise InputError(
                f"`kind` is 'lane_encoder', and {config.model!r} is none; give a lane encoder or a "
                "BERT-shaped bi-encoder"
            )
        model = scorer.model
        for module in model.modules():
            # The copies for inference, which would not see what training changes.
            if isinstance(module, InstructedLinear):
                module.register_buffer("folded", None, persistent=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(settings.train == "all" or is_instructed(name))
        budgets = scorer.lanes.budgets
        longest = min(budgets.document, config.max_tokens)
        budgets = replace(budgets, document=longest, window_overlap=longest // 8)
        tokenizer = _folder(start) / "tokenizer.json"
        return cls(model, LaneTokenizer(Tokenizer.from_file(str(tokenizer)), budgets), tokenizer)

    def check(self, row: Row) -> None:
        """See `Backend`."""
        self._trusted(Lane.INSTRUCTION, row.instruction)
        query = self._trusted(Lane.QUERY, row.query)
        room = self.model.config.max_position_embeddings
        if len(query) > room:
            raise InputError(f"`query` has {len(query)} tokens, the model reads {room}; shorten it")

    def inputs(self, rows: Sequence[Row]) -> Inputs:
        """See `Backend`; the arguments of `LaneEncoder.forward`."""
        requests: dict[tuple[str, str], int] = {}
        group = [requests.setdefault((row.instruction, row.query), len(requests)) for row in rows]
        candidates = [self._candidate(row.candidate, row.instruction) for row in rows]
        ids = _padded([above + document for above, document in candidates])
        lanes = torch.full_like(ids, int(Lane.DOCUMENT))
        for place, (above, _) in enumerate(candidates):
            lanes[place, : len(above)] = int(Lane.ATTRIBUTES)
        return {
            "instruction_ids": _padded(
                [self._trusted(Lane.INSTRUCTION, instruction) for instruction, _ in requests]
            ),
            "query_ids": _padded([self._trusted(Lane.QUERY, query) for _, query in requests]),
            "candidate_ids": ids,
            "candidate_lanes": lanes,
            "group": torch.tensor(group),
        }

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """See `Backend`."""
        logits: Tensor = model(**inputs)
        return logits.float()

    def is_head(self, name: str) -> bool:
        """See `Backend`."""
        return is_head(name)

    def restore(self, checkpoint: Path) -> None:
        """See `Backend`."""
        self.model.load_state_dict(load_file(checkpoint / "model.safetensors"))

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """See `Backend`; a lane encoder needs no contract."""
        self.model.save_pretrained(folder)
        shutil.copyfile(self._tokenizer, folder / "tokenizer.json")

    def _encode(
        self, candidate: Candidate, instruction: str
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # As the scorer reads it, which leaves out what repeats the instruction.
        echoes = self._echoes(instruction)
        [window], _ = self.lanes.candidate(0, candidate, "truncate", echoes)
        return window.attributes, window.document


class CrossEncoderBackend:
    """Trains a plain cross-encoder that reads the instruction before the query."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, template: PromptTemplate
    ) -> None:
        """Frame pairs as the scorer does."""
        self.model = model
        self.template = template
        self._tokenizer = tokenizer
        scorer = CrossEncoderScorer(model, tokenizer.backend_tokenizer, template)
        # The scorer froze the model that it was lent.
        model.requires_grad_(requires_grad=True)
        self.pairs = scorer.pairs
        self._query = lru_cache(_CACHED_TEXTS)(self.pairs.query)
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._padding = model.config.pad_token_id or 0

    @classmethod
    def load(cls, config: TrainingConfig) -> CrossEncoderBackend:
        """Load an encoder, with or without a classifier of one label; see `load_backend`."""
        folder = _folder(config.model)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                num_labels=1,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelLoadError(
                f"`model`: {str(folder)!r} cannot be trained as a cross-encoder: {reason}"
            ) from error
        # A new classifier begins at random, and with it a pooler; nothing else may.
        body = f"{model.base_model_prefix}."
        lost = [
            name
            for name in map(str, report["missing_keys"])
            if name.startswith(body) and not name.startswith(f"{body}pooler")
        ]
        if lost or report["mismatched_keys"]:
            raise ModelLoadError(
                f"`model`: {str(folder)!r} lacks weights of {type(model).__name__}, such as "
                f"{[*lost, *report['mismatched_keys']][0]}; fetch it again"
            )
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ModelLoadError(f"{str(folder)!r} has no tokenizer.json; add one")
        template = PromptTemplate(
            family="trained-cross-encoder", kind="cross_encoder", max_tokens=config.max_tokens
        )
        return cls(model, tokenizer, template)

    def check(self, row: Row) -> None:
        """See `Backend`."""
        self._query(self._first(row))

    def inputs(self, rows: Sequence[Row]) -> Inputs:
        """See `Backend`; the arguments of transformers' sequence classifiers."""
        windows = [
            self.pairs.windows(0, row.candidate, "truncate", self._query(self._first(row)))[0][0]
            for row in rows
        ]
        ids = _padded([window.ids for window in windows], self._padding)
        lengths = torch.tensor([len(window) for window in windows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_types:
            inputs["token_type_ids"] = _padded([window.types for window in windows])
        return inputs

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """See `Backend`."""
        raw: Tensor = model(**inputs).logits[:, 0]
        return raw.float()

    def is_head(self, name: str) -> bool:
        """See `Backend`: all but the encoder."""
        return not name.startswith(f"{self.model.base_model_prefix}.")

    def restore(self, checkpoint: Path) -> None:
        """See `Backend`."""
        best = type(self.model).from_pretrained(checkpoint, use_safetensors=True)
        self.model.load_state_dict(best.state_dict())

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """See `Backend`."""
        self.model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        _write_contract(folder, self.template.model_copy(update=facts))

    @staticmethod
    def _first(row: Row) -> str:
        # As `Reranker` does with `on_unsupported="prepend"`.
        return f"{row.instruction} {row.query}" if row.instruction else row.query


class CausalLMBackend:
    """Trains low-rank differences of a causal language model, on the logits of its answers."""

    def __init__(
        self, scorer: CausalLMScorer, written: PromptTemplate, folder: Path, lora: LoraSettings
    ) -> None:
        """Put the adapters on.

        Args:
            scorer: Has the model and the tokenizer of its prompts.
            written: The contract as it was given, before a chat template was filled in.
            folder: Has the tokenizer's files.
            lora: Rank and place of the adapters.
        """
        from peft import LoraConfig, TaskType, get_peft_model

        targets = lora.target_modules
        self.prompts = scorer.prompts
        self.mapping = scorer.template.mapping
        self._written, self._folder = written, folder
        adapters = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes floats, and says int
            lora_dropout=lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
        with warnings.catch_warnings():
            # peft asks transformers by a name that is to go; nothing that a user could mend.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            self.model = get_peft_model(scorer.model, adapters)
        self._prompt = lru_cache(_CACHED_TEXTS)(self.prompts.prompt)

    @classmethod
    def load(cls, config: TrainingConfig) -> CausalLMBackend:
        """Load a model with its contract; see `load_backend`."""
        if importlib.util.find_spec("peft") is None:
            raise MissingExtraError(
                "training a causal language model needs peft, not installed here. "
                'Install the extra: pip install "lanerank[train]"'
            )
        folder = _folder(config.model)
        template = _contract(config, folder)
        if template.kind != "causal_lm":
            raise InputError(
                f"`contract` {template.family!r} is for a {template.kind.replace('_', ' ')}, and "
                "`kind` is 'causal_lm'"
            )
        template = template.model_copy(
            update={"max_tokens": min(template.max_tokens, config.max_tokens)}
        )
        # Weights that stay as they are may be held in the precision of the computation.
        dtype = getattr(torch, config.precision)
        options = ModelOptions(device=torch.device("cpu"), dtype=dtype)
        scorer = load_pretrained(folder, template, folder.name, options)
        if not isinstance(scorer, CausalLMScorer):
            raise InputError(f"`model`: {config.model!r} is no causal language model")
        return cls(scorer, template, folder, config.lora or LoraSettings())

    def check(self, row: Row) -> None:
        """See `Backend`."""
        self._prompt(row.query, row.instruction)

    def inputs(self, rows: Sequence[Row]) -> Inputs:
        """See `Backend`: ids padded on the right, and the place of each row's last token."""
        sequences = []
        for row in rows:
            prompt = self._prompt(row.query, row.instruction)
            [window], _ = self.prompts.windows(0, row.candidate, "truncate", prompt)
            sequences.append((*prompt.prefix, *window.ids))
        return {
            "input_ids": _padded(sequences),
            "ends": torch.tensor([len(sequence) - 1 for sequence in sequences]),
        }

    def logits(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """See `Backend`."""
        # In a causal model nothing sees the padding that follows it. Logits are computed only for
        # positions at which some row ends, because the vocabulary is large.
        kept, places = torch.unique(inputs["ends"], return_inverse=True)
        every = model(input_ids=inputs["input_ids"], use_cache=False, logits_to_keep=kept).logits
        rows = torch.arange(len(places), device=every.device)
        answers = every[rows, places][:, list(self.prompts.answer_ids)].float()
        raw: Tensor = answers[:, 0] - answers[:, 1] if answers.shape[1] > 1 else answers[:, 0]
        return (raw - self.mapping.shift) / self.mapping.scale

    def is_head(self, name: str) -> bool:
        """See `Backend`: there is none."""
        return False

    def restore(self, checkpoint: Path) -> None:
        """See `Backend`."""
        self.model.load_adapter(str(checkpoint), "default")

    def save(self, folder: Path, facts: dict[str, Any]) -> None:
        """See `Backend`; the adapters are merged into the weights, and are gone afterwards."""
        merged = cast("Any", self.model).merge_and_unload()
        merged.save_pretrained(folder)
        for pattern in _TOKENIZER_FILES:
            for path in self._folder.glob(pattern):
                shutil.copyfile(path, folder / path.name)
        _write_contract(folder, self._written.model_copy(update={**facts, "models": {}}))


def _folder(model: str | Path) -> Path:
    if model == EMBEDDED_MODEL:
        return Path(str(files("lanerank"))) / "models" / EMBEDDED_MODEL
    return Path(model)


def _contract(config: TrainingConfig, folder: Path) -> PromptTemplate:
    if config.contract is not None:
        is_file = config.contract.endswith(".json")
        return read_contract(config.contract) if is_file else contract_for(config.contract)
    if not (folder / LOCAL_CONTRACT).is_file():
        raise InputError(
            f"`contract` is missing, and {str(folder)!r} has no {LOCAL_CONTRACT}: say how the "
            "model is asked, by a model id, a family such as 'yes-no-judge', or a JSON file"
        )
    return read_contract(folder / LOCAL_CONTRACT)


def _write_contract(folder: Path, template: PromptTemplate) -> None:
    # Reasoned defaults may change; what the model was trained with may not.
    fields = template.model_dump(mode="json", exclude_none=True)
    text = json.dumps(fields, indent=2, ensure_ascii=False)
    (folder / LOCAL_CONTRACT).write_text(f"{text}\n", encoding="utf-8")


def _padded(sequences: Sequence[Sequence[int]], padding: int = 0) -> Tensor:
    """Ids of different lengths as `(n, longest)`, at least one wide."""
    padded = torch.full((len(sequences), max(1, *map(len, sequences))), padding)
    for place, ids in enumerate(sequences):
        padded[place, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return padded
