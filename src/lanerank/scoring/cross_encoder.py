"""Plain cross-encoders: query and document as one pair, one score, no instruction."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from lanerank.contracts import Candidate, RerankRequest, Scores
from lanerank.errors import InstructionNotSupportedError, ModelLoadError
from lanerank.scoring.batching import score_in_batches
from lanerank.scoring.prompts import PairTokenizer, PairWindow
from lanerank.template import PromptTemplate

_OFFSET_POSITIONS = {"camembert", "roberta", "xlm-roberta"}
"""Architectures that count positions from one after the padding token's id."""


class CrossEncoderScorer:
    """Scores with a cross-encoder; safe to call from several threads.

    Args:
        model: A sequence classifier with one label, or an encoder for `head`; on its device and
            in its precision. It is put into inference mode.
        tokenizer: Its tokenizer, which frames pairs.
        template: Its contract, for the mapping to [0, 1] and the longest pair.
        head: Turns the last hidden states `(b, t, size)` into scores `(b, 1)`, where the model has
            no classifier of its own.
        name: The name that rankings carry; the family of the contract by default.
        tokens_per_batch: Upper bound of the tokens in one forward pass, padding included.

    Raises:
        ModelLoadError: The model gives more than one score, or the tokenizer frames no pairs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        *,
        head: nn.Module | None = None,
        name: str | None = None,
        tokens_per_batch: int = 4096,
    ) -> None:
        """Put the model into inference mode."""
        labels = getattr(model.config, "num_labels", 1)
        if head is None and labels != 1:
            raise ModelLoadError(
                f"a cross-encoder has one score, this model has {labels} labels; it is a "
                "classifier for something else"
            )
        for module in (model, head):
            if module is not None:
                nn.Module.eval(module).requires_grad_(requires_grad=False)
        self.model, self.head = model, head
        self.template = template
        self.name = name or template.family
        self.pairs = PairTokenizer(tokenizer, _longest_pair(model, template))
        self.tokens_per_batch = tokens_per_batch
        accepted = inspect.signature(model.forward).parameters
        self._takes_types = "token_type_ids" in accepted
        self._padding = getattr(model.config, "pad_token_id", None) or 0

    @property
    def supports_instructions(self) -> bool:
        """Never: query and document are all that the model was trained on."""
        return False

    def score(self, request: RerankRequest) -> Scores:
        """Score every candidate of the request.

        Raises:
            InputError: The query leaves no room for a document.
            InstructionNotSupportedError: There is an instruction.
        """
        if request.instruction:
            raise InstructionNotSupportedError(
                f"{self.name!r} has no place for an instruction; score without one"
            )
        query = self.pairs.query(request.query)

        def windows_of(index: int, candidate: Candidate) -> tuple[list[PairWindow], bool]:
            return self.pairs.windows(index, candidate, request.long_documents, query)

        with torch.inference_mode():
            raw, truncated = score_in_batches(
                request,
                windows_of,
                self._score_batch,
                lambda longest: self.tokens_per_batch // longest,
            )
        return Scores(self.template.mapping.apply(raw), tuple(truncated))

    def _score_batch(self, batch: Sequence[PairWindow]) -> Tensor:
        ids = torch.full((len(batch), len(batch[0])), self._padding)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, window in enumerate(batch):
            ids[row, : len(window)] = torch.tensor(window.ids)
            types[row, : len(window)] = torch.tensor(window.types)
            mask[row, : len(window)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_types:
            inputs["token_type_ids"] = types
        device = next(self.model.get_input_embeddings().parameters()).device
        outputs = self.model(**{name: tensor.to(device) for name, tensor in inputs.items()})
        scores = outputs.logits if self.head is None else self.head(outputs.last_hidden_state)
        raw: Tensor = scores[:, 0].float()
        return raw


class FirstToken(nn.Module):
    """The hidden state of the first token: `(b, t, size)` to `(b, size)`."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Take it."""
        return hidden[:, 0]


def _longest_pair(model: PreTrainedModel, template: PromptTemplate) -> int:
    config = model.config
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return template.max_tokens
    if config.model_type in _OFFSET_POSITIONS:
        positions -= (config.pad_token_id or 0) + 1
    return min(template.max_tokens, positions)
