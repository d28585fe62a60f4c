"""The lane encoder: a BERT-shaped reranker whose lanes see only themselves and those above.

The attention rule, for a token of a candidate (attributes or document lane) in head `h`:

    a = softmax(q Kᶜ) Vᶜ + tanh(g_h) · softmax(q Kᵗ) Vᵗ

where `c` is the candidate's own sequence (document tokens see attributes, not the reverse) and
`t` are the trusted lanes (instruction, query). Trusted tokens never see a candidate, and the
instruction never sees the query. So the trusted keys and values are computed once and shared by
all candidates, and no document can change them.

The gates `g` start at zero and the head starts as the cosine of mean-pooled lanes: initialised
from a bi-encoder, an untrained lane encoder without an instruction *is* that bi-encoder, and
training adds to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from lanerank.contracts import Lane

_MASKED = -1e4
"""Added to the attention logits of tokens that must not be seen; exact zero after softmax."""


class LaneEncoderConfig(PreTrainedConfig):
    """Sizes of a lane encoder; the defaults are those of lanerank-mini."""

    model_type = "lanerank_lane_encoder"

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    attributes_budget: int = 128
    """Tokens that the attributes lane may have; the other lanes use all positions."""


@dataclass(frozen=True)
class LaneStates:
    """One trusted lane after the encoder, for a batch of `n` texts padded to `t` tokens."""

    keys: tuple[Tensor, ...]
    """For each layer, `(n, heads, t, head size)`."""
    values: tuple[Tensor, ...]
    """For each layer, `(n, heads, t, head size)`."""
    mask: Tensor
    """`(n, t)`, true where there is a token."""
    total: Tensor
    """`(n, hidden size)`, float32: the sum of the last layer over the lane's tokens."""


def join_lanes(first: LaneStates, second: LaneStates) -> LaneStates:
    """The two lanes side by side, as the lanes below see them."""
    return LaneStates(
        tuple(torch.cat(pair, 2) for pair in zip(first.keys, second.keys, strict=True)),
        tuple(torch.cat(pair, 2) for pair in zip(first.values, second.values, strict=True)),
        torch.cat([first.mask, second.mask], 1),
        first.total + second.total,
    )


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    # Plain matrix products: at head size 32 they beat the fused CPU kernel, which is made for
    # long sequences and large heads.
    logits = queries @ keys.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ values


def _visible(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention bias that hides padding: `(n, 1, 1, t)`."""
    return ((~mask).to(dtype) * _MASKED)[:, None, None, :]


class LaneEncoderLayer(nn.Module):
    """A post-norm transformer layer with gated attention to the trusted lanes."""

    def __init__(self, config: LaneEncoderConfig) -> None:
        """Build the layer with its gates closed."""
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.head_size = size // self.heads
        self.qkv = nn.Linear(size, 3 * size)
        self.attention_output = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, size)
        self.output_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.trusted_gate = nn.Parameter(torch.zeros(self.heads))

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys and values, each `(n, heads, t, head size)`."""
        n, t, _ = hidden.shape
        qkv = self.qkv(hidden).view(n, t, 3, self.heads, self.head_size).permute(2, 0, 3, 1, 4)
        return qkv[0] * self.head_size**-0.5, qkv[1], qkv[2]

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer after attention."""
        attended = attended.transpose(1, 2).flatten(2)
        hidden = self.attention_norm(hidden + self.attention_output(attended))
        widened = F.gelu(self.intermediate(hidden))
        finished: Tensor = self.output_norm(hidden + self.output(widened))
        return finished


class LaneEncoder(PreTrainedModel):
    """Scores candidates against an instruction and a query, each in a lane of its own.

    `encode_trusted` computes a trusted lane, `score_candidates` scores candidates against the
    joined trusted lanes; `forward` does both for a batch. Training and inference use the same
    three methods.
    """

    config_class = LaneEncoderConfig
    base_model_prefix = "lane_encoder"

    def __init__(self, config: LaneEncoderConfig) -> None:
        """Build the model with random weights; `from_pretrained` loads trained ones."""
        super().__init__(config)
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.lane_embeddings = nn.Embedding(len(Lane), size)
        self.embedding_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            LaneEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.instruction_weight = nn.Parameter(torch.tensor(0.6))
        self.head_hidden = nn.Linear(5 * size, size)
        self.head_output = nn.Linear(size, 1)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers does not annotate it

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if module is getattr(self, "head_output", None):
            nn.init.zeros_(module.weight)

    def cast_encoder(self, dtype: torch.dtype, device: torch.device | None = None) -> LaneEncoder:
        """Compute the encoder in `dtype` and the head in float32; returns the model."""
        nn.Module.to(self, device=device)
        encoder = (self.word_embeddings, self.position_embeddings, self.lane_embeddings)
        for module in (*encoder, self.embedding_norm, self.layers):
            module.to(dtype)
        for linear in (self.head_hidden, self.head_output):
            linear.float()
        for parameter in (self.scale, self.bias, self.instruction_weight):
            parameter.data = parameter.data.float()
        return self

    def encode_trusted(
        self, lane: Lane, ids: Tensor, mask: Tensor, above: LaneStates | None = None
    ) -> LaneStates:
        """Compute one trusted lane.

        Args:
            lane: `Lane.INSTRUCTION` or `Lane.QUERY`.
            ids: Token ids, `(n, t)`; `t` may be 0 where no text of the batch has the lane.
            mask: `(n, t)`, true where there is a token.
            above: The lane that this one may also attend to (the instruction, for the query).
        """
        hidden = self._embed(ids, self._lane_like(ids, lane))
        visible = mask if above is None else torch.cat([above.mask, mask], 1)
        # A text without tokens in this lane (no instruction) would leave nothing to attend to;
        # its rows are padding, so what they hold is never read.
        bias = _visible(visible, hidden.dtype) if not bool(visible.all()) else None
        keys, values = [], []
        for index, layer in enumerate(cast("list[LaneEncoderLayer]", self.layers)):
            q, k, v = layer.project(hidden)
            keys.append(k)
            values.append(v)
            if above is not None:
                k = torch.cat([above.keys[index], k], 2)
                v = torch.cat([above.values[index], v], 2)
            hidden = layer.finish(hidden, _attend(q, k, v, bias))
        total = (hidden.float() * mask.unsqueeze(-1)).sum(1)
        return LaneStates(tuple(keys), tuple(values), mask, total)

    def score_candidates(
        self,
        ids: Tensor,
        lanes: Tensor,
        mask: Tensor,
        instruction: LaneStates,
        query: LaneStates,
        trusted: LaneStates,
        group: Tensor | None = None,
    ) -> Tensor:
        """Score candidates against the trusted lanes.

        Args:
            ids: `(b, t)`: the attributes lane, then the document lane, then padding.
            lanes: `(b, t)`: `Lane.ATTRIBUTES` or `Lane.DOCUMENT` for each token.
            mask: `(b, t)`, true where there is a token.
            instruction: The instruction lanes of the `n` requests in the batch.
            query: The query lanes of the same requests.
            trusted: `join_lanes(instruction, query)`, joined once by the caller.
            group: `(b,)`: for each candidate the request it belongs to. `None` where `n` is 1.

        Returns:
            `(b,)` float32 logits; their sigmoid is the score.
        """
        hidden = self._embed(ids, lanes)
        dtype = hidden.dtype
        is_attribute = lanes == Lane.ATTRIBUTES
        own = _visible(mask, dtype) if not bool(mask.all()) else None
        if bool(is_attribute.any()):
            # Attributes do not see the document: what the index says of a text must not depend
            # on what the text says of itself.
            hidden_from_attributes = is_attribute[:, :, None] & ~is_attribute[:, None, :]
            block = hidden_from_attributes[:, None].to(dtype) * _MASKED
            own = block if own is None else torch.maximum(own + block, block.new_tensor(_MASKED))
        above = trusted.mask if group is None else trusted.mask[group]
        above_bias = _visible(above, dtype) if not bool(above.all()) else None
        for index, layer in enumerate(cast("list[LaneEncoderLayer]", self.layers)):
            q, k, v = layer.project(hidden)
            attended = _attend(q, k, v, own)
            trusted_k, trusted_v = trusted.keys[index], trusted.values[index]
            if group is not None:
                trusted_k, trusted_v = trusted_k[group], trusted_v[group]
            gate = layer.trusted_gate.tanh().to(dtype)[:, None, None]
            attended = attended + gate * _attend(q, trusted_k, trusted_v, above_bias)
            hidden = layer.finish(hidden, attended)
        weight = mask.unsqueeze(-1)
        document = (hidden.float() * weight).sum(1) / weight.sum(1)
        return self._head(document, instruction, query, group)

    def forward(
        self,
        instruction_ids: Tensor,
        query_ids: Tensor,
        candidate_ids: Tensor,
        candidate_lanes: Tensor,
        group: Tensor,
    ) -> Tensor:
        """Score a batch of requests, each with its own trusted lanes.

        Args:
            instruction_ids: `(n, i)`, padded with `config.pad_token_id`.
            query_ids: `(n, q)`, padded.
            candidate_ids: `(b, t)`, padded.
            candidate_lanes: `(b, t)`.
            group: `(b,)`, the request of each candidate.

        Returns:
            `(b,)` float32 logits.
        """
        pad = self.config.pad_token_id
        instruction = self.encode_trusted(Lane.INSTRUCTION, instruction_ids, instruction_ids != pad)
        query = self.encode_trusted(Lane.QUERY, query_ids, query_ids != pad, instruction)
        trusted = join_lanes(instruction, query)
        mask = candidate_ids != pad
        return self.score_candidates(
            candidate_ids, candidate_lanes, mask, instruction, query, trusted, group
        )

    def _embed(self, ids: Tensor, lanes: Tensor) -> Tensor:
        # Each lane has positions of its own, counted from its first token.
        steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        attributes = (lanes == Lane.ATTRIBUTES).sum(1, keepdim=True)
        positions = torch.where(lanes == Lane.ATTRIBUTES, steps, steps - attributes)
        # Padding may reach further than any lane does; what it holds is never read.
        positions = positions.clamp(max=self.config.max_position_embeddings - 1)
        embedded: Tensor = self.embedding_norm(
            self.word_embeddings(ids)
            + self.position_embeddings(positions)
            + self.lane_embeddings(lanes)
        )
        return embedded

    @staticmethod
    def _lane_like(ids: Tensor, lane: Lane) -> Tensor:
        return torch.full_like(ids, int(lane))

    def _head(
        self,
        document: Tensor,
        instruction: LaneStates,
        query: LaneStates,
        group: Tensor | None,
    ) -> Tensor:
        """`scale · cos(trusted, document) + bias + MLP(products of the pooled lanes)`.

        `trusted` is `(1 - w) · query + w · instruction`, and the query alone where there is no
        instruction.
        """
        pooled_query = F.normalize(query.total, dim=-1)
        pooled_instruction = F.normalize(instruction.total, dim=-1)
        has_instruction = instruction.mask.any(1, keepdim=True).float()
        weight = self.instruction_weight.sigmoid() * has_instruction
        mixed = (1 - weight) * pooled_query + weight * pooled_instruction
        pooled = [F.normalize(mixed, dim=-1), pooled_query, pooled_instruction]
        if group is not None:
            pooled = [lane[group] for lane in pooled]
        document = F.normalize(document, dim=-1)
        cosine = (pooled[0] * document).sum(-1)
        # Products of unit vectors are of the order 1 / size; the factor brings them near 1.
        size = document.shape[-1]
        products = [lane * document * size for lane in pooled]
        singles = [document * size**0.5, pooled[2].expand_as(document) * size**0.5]
        features = torch.cat([*products, *singles], -1)
        extra: Tensor = self.head_output(F.gelu(self.head_hidden(features))).squeeze(-1)
        return self.scale * cosine + self.bias + extra
