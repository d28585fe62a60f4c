"""Rerankers that are causal language models: a prompt, and the logits of its answer tokens.

What comes before the document is computed once and shared by all documents as keys and values.
Documents follow in batches of similar length, padded on the right: every row then has the same
positions, and in a causal model nothing that follows a token can change it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from lanerank.contracts import Candidate, RerankRequest, Scores
from lanerank.errors import InstructionNotSupportedError, ModelLoadError
from lanerank.scoring.batching import score_in_batches
from lanerank.scoring.prompts import Prompt, PromptTokenizer, PromptWindow
from lanerank.template import PromptTemplate

_PROBE = ("Which fish live in the sea?", "The cod lives in the cold waters of the Atlantic.")
_PROBE_INSTRUCTIONS = ("Prefer texts about salt water.", "Leave out everything about fish.")
_TOLERANCE = {torch.float32: (1e-3, 1e-3), torch.float16: (0.1, 0.02), torch.bfloat16: (0.5, 0.05)}
"""How far two ways to the same logit may lie apart: absolute, and as a share of it."""


@dataclass(frozen=True, slots=True)
class PrefixStates:
    """Keys and values of the tokens before the document, for each layer `(1, heads, t, size)`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __len__(self) -> int:
        """The number of tokens."""
        return self.keys[0].shape[-2] if self.keys else 0


class _SharedLayer(CacheLayerMixin):
    """Hands out shared keys and values in front of a batch's own, and keeps nothing.

    The caches of transformers would keep the joined tensors of all layers; here one layer's live
    at a time, and the shared ones cannot change.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers does not annotate it
        self._shared_keys, self._shared_values = keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the shared states are there from the beginning."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """The shared states and those of the batch, joined."""
        shape = (len(key_states), -1, -1, -1)
        keys = torch.cat([self._shared_keys.expand(shape), key_states], -2)
        return keys, torch.cat([self._shared_values.expand(shape), value_states], -2)

    def get_seq_length(self) -> int:
        """The number of shared tokens, however often `update` was called."""
        return self._shared_keys.shape[-2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a batch sees."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


class CausalLMScorer:
    """Scores with a causal language model by its contract; safe to call from several threads.

    On construction a short prompt is scored in the plain way and in this one. If they differ, or
    an instruction changes nothing, the model is refused.

    Args:
        model: The model with its language-modelling head, on its device and in its precision. It
            is put into inference mode.
        tokenizer: Its tokenizer.
        template: Its contract, with any chat template resolved (`PromptTemplate.in_chat`).
        name: The name that rankings carry; the family of the contract by default.
        tokens_per_batch: Upper bound of the tokens whose keys and values one forward pass holds:
            rows times shared and own tokens, padding included. Bounds memory, whatever the number
            of documents; a single document may exceed it.
        cached_prefixes: How many prefixes to keep computed across calls.
        share_prefix: Compute the prefix once. Without, every document is a sequence of its own, as
            models need that keep more than keys and values of what they read.

    Raises:
        ModelLoadError: Tokenizer, contract and model do not fit together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        *,
        name: str | None = None,
        tokens_per_batch: int = 16_384,
        cached_prefixes: int = 8,
        share_prefix: bool = True,
    ) -> None:
        """Put the model into inference mode and check that it does what the contract says."""
        self.model = model
        nn.Module.eval(model).requires_grad_(requires_grad=False)
        self.template = template
        self.name = name or template.family
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        limit = template.max_tokens if positions is None else min(template.max_tokens, positions)
        self.prompts = PromptTokenizer(tokenizer, template, limit)
        self.tokens_per_batch = tokens_per_batch
        self.share_prefix = share_prefix
        self._cached_prefixes = cached_prefixes
        self._cache: OrderedDict[tuple[tuple[int, ...], ...], PrefixStates] = OrderedDict()
        self._lock = threading.Lock()
        self._decoder = model.get_decoder()
        self._rows, self._bias = self._answer_rows()
        with torch.inference_mode():
            self._check()
        self._cache.clear()

    @property
    def supports_instructions(self) -> bool:
        """Whether the contract has a place for an instruction."""
        return self.template.supports_instructions

    def score(self, request: RerankRequest) -> Scores:
        """Score every candidate of the request.

        Raises:
            InputError: Instruction and query leave no room for a document.
            InstructionNotSupportedError: There is an instruction and no place for it.
        """
        raw, truncated = self.raw_scores(request)
        return Scores(self.template.mapping.apply(raw), tuple(truncated))

    def raw_scores(self, request: RerankRequest) -> tuple[list[float], list[bool]]:
        """Scores before they are mapped to [0, 1], and whether each candidate was cut."""
        if request.instruction and not self.supports_instructions:
            raise InstructionNotSupportedError(
                f"{self.name!r} has no place for an instruction; score without one"
            )
        prompt = self.prompts.prompt(request.query, request.instruction)
        if not request.candidates:
            return [], []

        def windows_of(index: int, candidate: Candidate) -> tuple[list[PromptWindow], bool]:
            return self.prompts.windows(index, candidate, request.long_documents, prompt)

        shared = len(prompt.prefix)
        with torch.inference_mode():
            states = self._shared_states(prompt)
            return score_in_batches(
                request,
                windows_of,
                lambda batch: self._score_batch(batch, prompt, states),
                lambda longest: self.tokens_per_batch // (shared + longest),
            )

    def prefix_states(self, prompt: Prompt) -> PrefixStates:
        """Keys and values of all that comes before the document, a function of that alone.

        Each stage is computed on top of the stage before it, always in the same way, so that the
        result does not depend on what was computed earlier.
        """
        states = PrefixStates((), ())
        for end in range(1, len(prompt.stages) + 1):
            key = prompt.stages[:end]
            with self._lock:
                found = self._cache.get(key)
                if found is not None:
                    self._cache.move_to_end(key)
            if found is None:
                found = self._extend(states, prompt.stages[end - 1])
                with self._lock:
                    self._cache[key] = found
                    while len(self._cache) > self._cached_prefixes:
                        self._cache.popitem(last=False)
            states = found
        return states

    def _shared_states(self, prompt: Prompt) -> PrefixStates | None:
        return self.prefix_states(prompt) if self.share_prefix and prompt.stages else None

    def _extend(self, states: PrefixStates, ids: tuple[int, ...]) -> PrefixStates:
        # The cache joins and never writes into what it is given, so `states` stay as they are.
        cache = DynamicCache(list(zip(states.keys, states.values, strict=True)) or None)
        row = torch.tensor([ids], device=self._device)
        with torch.inference_mode():
            self._decoder(input_ids=row, past_key_values=cache, use_cache=True)
        keys, values = [], []
        for layer in cache.layers:
            if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
                raise TypeError(f"a layer keeps {type(layer).__name__}, not keys and values")
            keys.append(layer.keys)
            values.append(layer.values)
        extended = PrefixStates(tuple(keys), tuple(values))
        if len(extended) != len(states) + len(ids):
            raise TypeError(f"it keeps {len(extended)} of {len(states) + len(ids)} tokens")
        return extended

    @property
    def _device(self) -> torch.device:
        # Where a model is spread over devices, its input goes to the first.
        return next(self.model.get_input_embeddings().parameters()).device

    def _score_batch(
        self, batch: Sequence[PromptWindow], prompt: Prompt, states: PrefixStates | None
    ) -> Tensor:
        if states is None:
            prefix = prompt.prefix
            return self._difference(self._forward([(*prefix, *window.ids) for window in batch]))
        pairs = zip(states.keys, states.values, strict=True)
        cache = Cache([_SharedLayer(keys, values) for keys, values in pairs])
        return self._difference(self._forward([window.ids for window in batch], cache))

    def _forward(self, rows: Sequence[tuple[int, ...]], cache: Cache | None = None) -> Tensor:
        """The logits of the answers at the last token of each row: `(b, answers)`, float32."""
        ends = torch.tensor([len(row) for row in rows]) - 1
        longest = int(ends.max()) + 1
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        inputs = {
            "input_ids": ids.to(self._device),
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        each = torch.arange(len(rows), device=self._device)
        if self._rows is None:
            # Only the positions at which some row ends: the vocabulary is large.
            kept, places = torch.unique(ends.to(self._device), return_inverse=True)
            logits = self.model(**inputs, logits_to_keep=kept).logits
            answers: Tensor = logits[each, places][:, list(self.prompts.answer_ids)].float()
            return answers
        hidden = self._decoder(**inputs).last_hidden_state
        last = hidden[each.to(hidden.device), ends.to(hidden.device)].float()
        return nn.functional.linear(last.to(self._rows.device), self._rows, self._bias)

    @staticmethod
    def _difference(logits: Tensor) -> Tensor:
        positive = logits[:, 0]
        return positive - logits[:, 1] if logits.shape[1] > 1 else positive

    def _answer_rows(self) -> tuple[Tensor | None, Tensor | None]:
        """The rows of the output head that matter, in float32; none if the head is not plain."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            return None, None
        ids = list(self.prompts.answer_ids)
        bias = None if head.bias is None else head.bias[ids].detach().float()
        return head.weight[ids].detach().float(), bias

    def _check(self) -> None:
        instructions = _PROBE_INSTRUCTIONS if self.supports_instructions else ("",)
        query, document = _PROBE
        prompts = [self.prompts.prompt(query, each) for each in instructions]
        candidate = Candidate(text=document)
        windows = [self.prompts.windows(0, candidate, "truncate", each)[0] for each in prompts]
        whole = torch.tensor([(*prompts[0].prefix, *windows[0][0].ids)], device=self._device)
        logits = self.model(input_ids=whole, use_cache=False).logits
        plain = logits[:, -1, list(self.prompts.answer_ids)].float()
        if not bool(plain.isfinite().all()):
            raise ModelLoadError(
                f"{self.name!r} gives logits that are not finite in {self.model.dtype}; choose "
                "another `dtype`"
            )
        hidden = self._decoder(input_ids=whole, use_cache=False).last_hidden_state
        if self._rows is not None and not torch.allclose(
            self.model.get_output_embeddings()(hidden).float(), logits.float(), atol=1e-3, rtol=1e-2
        ):
            # The model does more to its logits than one matrix product, so let it.
            self._rows = self._bias = None
        expected = self._difference(plain)
        try:
            raw = [
                self._score_batch(batch, prompt, self._shared_states(prompt))
                for batch, prompt in zip(windows, prompts, strict=True)
            ]
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ModelLoadError(
                f"{self.name!r} cannot share what comes before the document "
                f"({type(error).__name__}: {error}); pass `share_prefix=False`"
            ) from error
        if not self._close(raw[0], expected):
            remedy = "pass `share_prefix=False`" if self.share_prefix else "do not use it"
            raise ModelLoadError(
                f"{self.name!r} scores a probe {raw[0].item():.4f} where plain transformers has "
                f"{expected.item():.4f}; {remedy}"
            )
        if len(raw) > 1 and raw[0].item() == raw[1].item():
            raise ModelLoadError(
                f"{self.name!r} gives the same score under opposite instructions: the contract "
                f"{self.template.family!r} does not reach it"
            )

    def _close(self, ours: Tensor, theirs: Tensor) -> bool:
        absolute, relative = _TOLERANCE.get(self.model.dtype, _TOLERANCE[torch.bfloat16])
        return torch.allclose(ours.cpu(), theirs.cpu(), atol=absolute, rtol=relative)
