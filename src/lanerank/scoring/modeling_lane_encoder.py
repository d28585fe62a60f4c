"""The lane encoder: a BERT-shaped reranker whose lanes see only themselves and those above.

The attention rule, for a token of a candidate (attributes or document lane) in head `h`, where
there is an instruction:

    a = softmax(q Kᶜ) Vᶜ + tanh(g_h) · softmax(q Kᵗ) Vᵗ

where `c` is the candidate's own sequence (document tokens see attributes, not the reverse) and
`t` are the trusted lanes (instruction, query). Trusted tokens never see a candidate, and the
instruction never sees the query. So the trusted keys and values are computed once and shared by
all candidates, and no document can change them.

What training adds (gates, low-rank differences of the weights, lane embeddings, the head) applies
only where there is an instruction. Without one, a lane encoder initialised from a bi-encoder *is*
that bi-encoder, trained or not: the score grows with the cosine of mean-pooled query and candidate,
and only how fast it grows, and from where, is learned.

Two things are read from the trusted lanes alone. Each token of the instruction has an *exclusion*,
the probability that it names what is not wanted; what is wanted and what is excluded are pooled
apart, so that likeness to the latter can count against a candidate. And the instruction has a
*strength* for the query: one that changes little counts little, and below `neutral_below` it counts
as none, so that scores are exactly those without it on the same candidates.

A mean over all tokens of a candidate says little of the one phrase that an instruction asks for. So
there is also *late interaction*: each token of the instruction is looked for in the candidate, and
counts with the likeness of the token that is most like it.
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
    adapter_rank: int = 40
    """Rank of what an instruction adds to each weight matrix."""
    neutral_below: float = 0.2
    """Instructions of less strength count as none, where scores are not for training."""


@dataclass(frozen=True)
class LaneKeys:
    """What the lanes below attend to, for a batch of `n` texts padded to `t` tokens."""

    keys: tuple[Tensor, ...]
    """For each layer, `(heads, n, t, head size)`."""
    values: tuple[Tensor, ...]
    """For each layer, `(heads, n, t, head size)`."""
    mask: Tensor
    """`(n, t)`, true where there is a token."""


@dataclass(frozen=True)
class LaneStates(LaneKeys):
    """One trusted lane after the encoder."""

    total: Tensor
    """`(n, hidden size)`, float32: the sum of the last layer over the lane's tokens."""
    exclusion: Tensor
    """`(n, t)`, float32: the probability that a token of an instruction names what is not wanted;
    zero for padding and in the query lane."""
    excluded: Tensor
    """`(n, hidden size)`, float32: the sum of the last layer weighted by `exclusion`."""
    tokens: Tensor
    """`(n, t, hidden size)`, float32: the last layer in unit vectors, zero for padding."""


@dataclass(frozen=True)
class TrustedLanes:
    """The trusted lanes of `n` requests: all that a candidate gets to see above itself."""

    query: LaneStates
    instruction: LaneStates | None = None
    """`None` where the requests have no instruction."""
    joined: LaneKeys | None = None
    """Both lanes side by side, as the lanes below see them; `None` without an instruction."""


def trust(query: LaneStates, instruction: LaneStates | None) -> TrustedLanes:
    """Put the trusted lanes of some requests together."""
    joined = None if instruction is None else _join(instruction, query)
    return TrustedLanes(query, instruction, joined)


def _join(first: LaneKeys, second: LaneKeys) -> LaneKeys:
    return LaneKeys(
        tuple(torch.cat(pair, 2) for pair in zip(first.keys, second.keys, strict=True)),
        tuple(torch.cat(pair, 2) for pair in zip(first.values, second.values, strict=True)),
        torch.cat([first.mask, second.mask], 1),
    )


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    # Plain matrix products: at head size 32 they beat the fused CPU kernel, which is made for
    # long sequences and large heads. Heads come first, so that candidates that share their keys
    # are the rows of one product.
    logits = queries @ keys.transpose(-1, -2)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(-1) @ values


def _visible(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention bias that hides padding: `(n, 1, t)`."""
    return ((~mask).to(dtype) * _MASKED)[:, None, :]


class InstructedLinear(nn.Module):
    """A linear map with a low-rank difference that applies where there is an instruction.

    `y = W x + b`, and `y = (W + U D) x + b` under an instruction (LoRA, Hu et al., ICLR 2022, with
    the condition in place of the task). `U` starts at zero.
    """

    def __init__(self, inner: int, outer: int, rank: int) -> None:
        """Build the map; `rank` is the number of rows of `D`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outer, inner))
        self.bias = nn.Parameter(torch.zeros(outer))
        self.down = nn.Parameter(torch.empty(rank, inner))
        self.up = nn.Parameter(torch.zeros(outer, rank))
        self.dropout = 0.0
        """The share of the low-rank features that training leaves out."""
        self.register_buffer("folded", None, persistent=False)

    @torch.no_grad()
    def fold(self) -> None:
        """Keep `W + U D` beside `W`, so that an instruction costs no more than none."""
        self.folded = self.weight + (self.up.float() @ self.down.float()).to(self.weight.dtype)

    def forward(self, hidden: Tensor, instructed: bool) -> Tensor:  # noqa: FBT001 - an input
        """Apply the map to `(..., inner)`."""
        if not instructed:
            return F.linear(hidden, self.weight, self.bias)
        if self.folded is not None:
            return F.linear(hidden, self.folded, self.bias)
        plain = F.linear(hidden, self.weight, self.bias)
        features = F.dropout(F.linear(hidden, self.down), self.dropout, self.training)
        return plain + F.linear(features, self.up)


class LaneEncoderLayer(nn.Module):
    """A post-norm transformer layer with gated attention to the trusted lanes."""

    def __init__(self, config: LaneEncoderConfig) -> None:
        """Build the layer with its gates closed."""
        super().__init__()
        size, rank = config.hidden_size, config.adapter_rank
        self.heads = config.num_attention_heads
        self.head_size = size // self.heads
        self.qkv = InstructedLinear(size, 3 * size, rank)
        self.attention_output = InstructedLinear(size, size, rank)
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.intermediate = InstructedLinear(size, config.intermediate_size, rank)
        self.output = InstructedLinear(config.intermediate_size, size, rank)
        self.output_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.trusted_gate = nn.Parameter(torch.zeros(self.heads))

    def project(self, hidden: Tensor, instructed: bool) -> tuple[Tensor, Tensor, Tensor]:  # noqa: FBT001 - an input
        """Scaled queries, keys and values, each `(heads, n, t, head size)`."""
        n, t, _ = hidden.shape
        projected = self.qkv(hidden, instructed).view(n, t, 3, self.heads, self.head_size)
        qkv = projected.permute(2, 3, 0, 1, 4).contiguous()
        return qkv[0] * self.head_size**-0.5, qkv[1], qkv[2]

    def finish(self, hidden: Tensor, attended: Tensor, instructed: bool) -> Tensor:  # noqa: FBT001 - an input
        """The rest of the layer after attention."""
        attended = attended.permute(1, 2, 0, 3).flatten(2)
        hidden = self.attention_norm(hidden + self.attention_output(attended, instructed))
        widened = F.gelu(self.intermediate(hidden, instructed))
        finished: Tensor = self.output_norm(hidden + self.output(widened, instructed))
        return finished


class LaneEncoder(PreTrainedModel):
    """Scores candidates against an instruction and a query, each in a lane of its own.

    `encode_trusted` computes a trusted lane, `score_candidates` scores candidates against the
    trusted lanes; `forward` does both for a batch. Training and inference use the same methods.
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
        """Added under an instruction; the plain encoder does not know of lanes."""
        self.embedding_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            LaneEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.plain_scale = nn.Parameter(torch.tensor(8.0))
        self.plain_bias = nn.Parameter(torch.tensor(-3.0))
        self.scale = nn.Parameter(torch.tensor(8.0))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        self.instruction_weight = nn.Parameter(torch.tensor(0.6))
        self.head_hidden = nn.Linear(5 * size, size)
        self.head_output = nn.Linear(size, 1)
        self.exclusion_output = nn.Linear(size, 1)
        self.exclusion_weight = nn.Parameter(torch.tensor(0.3))
        self.late_output = nn.Linear(size, 1, bias=False)  # A constant changes no softmax.
        self.late_weight = nn.Parameter(torch.tensor(6.0))
        self.late_bias = nn.Parameter(torch.tensor(0.4))
        self.strength_hidden = nn.Linear(3 * size, size // 8)
        self.strength_output = nn.Linear(size // 8, 1)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers does not annotate it

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, InstructedLinear)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, (nn.Linear, InstructedLinear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, InstructedLinear):
            nn.init.normal_(module.down, std=0.02)
            nn.init.zeros_(module.up)
        outputs = ("head_output", "exclusion_output", "late_output", "strength_output")
        for start_at_zero in (*outputs, "lane_embeddings"):
            if module is getattr(self, start_at_zero, None):
                nn.init.zeros_(module.weight)
        # An instruction counts, and excludes nothing, until training has told them apart.
        for name, start in (("exclusion_output", -3.0), ("strength_output", 2.0)):
            if module is getattr(self, name, None):
                nn.init.constant_(module.bias, start)

    def cast_encoder(self, dtype: torch.dtype, device: torch.device | None = None) -> LaneEncoder:
        """Compute the encoder in `dtype` and the head in float32; returns the model."""
        nn.Module.to(self, device=device)
        encoder = (self.word_embeddings, self.position_embeddings, self.lane_embeddings)
        for module in (*encoder, self.embedding_norm, self.layers):
            module.to(dtype)
        for name, child in self.named_children():
            if name.startswith(("head_", "exclusion_", "late_", "strength_")):
                child.float()
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.float()
        return self

    def fold_adapters(self) -> LaneEncoder:
        """Make instructed scoring as quick as plain scoring; for inference. Returns the model."""
        for module in self.modules():
            if isinstance(module, InstructedLinear):
                module.fold()
        return self

    def encode_trusted(
        self, lane: Lane, ids: Tensor, mask: Tensor, above: LaneStates | None = None
    ) -> LaneStates:
        """Compute one trusted lane.

        Args:
            lane: `Lane.INSTRUCTION` or `Lane.QUERY`.
            ids: Token ids, `(n, t)`.
            mask: `(n, t)`, true where there is a token.
            above: The instruction that a query may also attend to; `None` where there is none.
        """
        instructed = lane is Lane.INSTRUCTION or above is not None
        hidden = self._embed(ids, torch.full_like(ids, int(lane)), instructed)
        visible = mask if above is None else torch.cat([above.mask, mask], 1)
        bias = _visible(visible, hidden.dtype) if not bool(visible.all()) else None
        keys, values = [], []
        for index, layer in enumerate(cast("list[LaneEncoderLayer]", self.layers)):
            q, k, v = layer.project(hidden, instructed)
            keys.append(k)
            values.append(v)
            if above is not None:
                k = torch.cat([above.keys[index], k], 2)
                v = torch.cat([above.values[index], v], 2)
            hidden = layer.finish(hidden, _attend(q, k, v, bias), instructed)
        hidden = hidden.float() * mask.unsqueeze(-1)
        exclusion = hidden.new_zeros(mask.shape)
        if lane is Lane.INSTRUCTION:
            exclusion = self.exclusion_output(hidden).squeeze(-1).sigmoid() * mask
        excluded = (hidden * exclusion.unsqueeze(-1)).sum(1)
        tokens = F.normalize(hidden, dim=-1)
        return LaneStates(
            tuple(keys), tuple(values), mask, hidden.sum(1), exclusion, excluded, tokens
        )

    def strength(self, trusted: TrustedLanes) -> Tensor:
        """Logits of how much the instructions count for their queries, `(n,)`.

        Args:
            trusted: The trusted lanes of requests that have an instruction.
        """
        hidden = F.gelu(self.strength_hidden(self.strength_inputs(trusted)))
        strength: Tensor = self.strength_output(hidden).squeeze(-1)
        return strength

    def strength_inputs(self, trusted: TrustedLanes) -> Tensor:
        """What the strength is read from, `(n, 3 * hidden size)`: both lanes and their product."""
        size = self.config.hidden_size
        query = F.normalize(trusted.query.total, dim=-1) * size**0.5
        instruction = F.normalize(cast("LaneStates", trusted.instruction).total, dim=-1) * size**0.5
        return torch.cat([query, instruction, query * instruction], -1)

    def counts(self, trusted: TrustedLanes) -> Tensor:
        """Whether the instructions are strong enough to count for their queries, `(n,)`.

        Args:
            trusted: The trusted lanes of requests that have an instruction.
        """
        neutral_below: float = self.config.neutral_below
        # A strength that is NaN counts: it shows in the scores, in place of hiding what is broken.
        return ~(self.strength(trusted).sigmoid() < neutral_below)

    def score_candidates(
        self,
        ids: Tensor,
        lanes: Tensor,
        mask: Tensor,
        trusted: TrustedLanes,
        group: Tensor | None = None,
    ) -> Tensor:
        """Score candidates against the trusted lanes.

        Args:
            ids: `(b, t)`: the attributes lane, then the document lane, then padding.
            lanes: `(b, t)`: `Lane.ATTRIBUTES` or `Lane.DOCUMENT` for each token.
            mask: `(b, t)`, true where there is a token.
            trusted: The trusted lanes of the `n` requests in the batch.
            group: `(b,)`: for each candidate the request it belongs to. `None` where `n` is 1.

        Returns:
            `(b,)` float32 logits; their sigmoid is the score.
        """
        pooled, found = self.read_candidates(ids, lanes, mask, trusted, group)
        return self.head(pooled, found, trusted, group)

    def read_candidates(
        self,
        ids: Tensor,
        lanes: Tensor,
        mask: Tensor,
        trusted: TrustedLanes,
        group: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the head gets to see of candidates; the arguments are those of `score_candidates`.

        Returns:
            The mean of the last layer, `(b, hidden size)`, and how much of the instruction is found
            in each candidate, `(b,)`; `None` without an instruction. Both float32.
        """
        above = trusted.joined
        instructed = above is not None
        hidden = self._embed(ids, lanes, instructed)
        dtype = hidden.dtype
        is_attribute = lanes == Lane.ATTRIBUTES
        own = _visible(mask, dtype) if not bool(mask.all()) else None
        if bool(is_attribute.any()):
            # Attributes do not see the document: what the index says of a text must not depend
            # on what the text says of itself.
            hidden_from_attributes = is_attribute[:, :, None] & ~is_attribute[:, None, :]
            block = hidden_from_attributes.to(dtype) * _MASKED
            own = block if own is None else torch.maximum(own + block, block.new_tensor(_MASKED))
        for index, layer in enumerate(cast("list[LaneEncoderLayer]", self.layers)):
            q, k, v = layer.project(hidden, instructed)
            attended = _attend(q, k, v, own)
            if above is not None:
                attended = attended + self._attend_above(layer, index, q, above, group)
            hidden = layer.finish(hidden, attended, instructed)
        weight = mask.unsqueeze(-1)
        hidden = hidden.float() * weight
        pooled = hidden.sum(1) / weight.sum(1)
        found = None
        if trusted.instruction is not None:
            found = self._late_interaction(hidden, mask, trusted.instruction, group)
        return pooled, found

    def _late_interaction(
        self, hidden: Tensor, mask: Tensor, instruction: LaneStates, group: Tensor | None
    ) -> Tensor:
        """How much of the instruction is found anywhere in each candidate, `(b,)`.

        For each token of the instruction the largest cosine with a token of the candidate (Khattab
        and Zaharia, ColBERT, SIGIR 2020), in a mean that is weighted by what is learned of a token,
        and leaves out its exclusion and the tokens that frame the lane.
        """
        tokens = instruction.tokens
        # A token is not part of the lane's frame where one stands on either side of it.
        inside = F.pad(instruction.mask[:, 2:], (1, 1))
        learned: Tensor = self.late_output(tokens).squeeze(-1)
        importance = learned.masked_fill(~inside, _MASKED).softmax(-1)
        importance = importance * (1 - instruction.exclusion)
        if group is not None:
            tokens, importance = tokens[group], importance[group]
        cosines = F.normalize(hidden, dim=-1) @ tokens.transpose(-1, -2)
        best = cosines.masked_fill(~mask.unsqueeze(-1), -1.0).amax(1)
        return (best * importance).sum(-1)

    @staticmethod
    def _attend_above(
        layer: LaneEncoderLayer, index: int, q: Tensor, above: LaneKeys, group: Tensor | None
    ) -> Tensor:
        keys, values, mask = above.keys[index], above.values[index], above.mask
        if group is not None:
            keys, values, mask = keys[:, group], values[:, group], mask[group]
        bias = _visible(mask, q.dtype) if not bool(mask.all()) else None
        shape = q.shape
        if group is None:
            q = q.flatten(1, 2).unsqueeze(1)
        attended = _attend(q, keys, values, bias).view(shape)
        return layer.trusted_gate.tanh().to(q.dtype)[:, None, None, None] * attended

    def forward(
        self,
        instruction_ids: Tensor,
        query_ids: Tensor,
        candidate_ids: Tensor,
        candidate_lanes: Tensor,
        group: Tensor,
    ) -> Tensor:
        """Score a batch of requests, each with its own trusted lanes, for training.

        Every instruction counts by its strength, however small, so that strengths can be learned.

        Args:
            instruction_ids: `(n, i)`, padded with `config.pad_token_id`; all padding for a
                request without an instruction.
            query_ids: `(n, q)`, padded.
            candidate_ids: `(b, t)`, padded.
            candidate_lanes: `(b, t)`.
            group: `(b,)`, the request of each candidate.

        Returns:
            `(b,)` float32 logits.
        """
        pad = self.config.pad_token_id
        instructed = (instruction_ids != pad).any(1)
        logits = torch.zeros(len(candidate_ids), device=candidate_ids.device)
        # Requests with and without an instruction take different weights.
        for flag in (True, False):
            requests = (instructed == flag).nonzero().squeeze(1)
            rows = (instructed[group] == flag).nonzero().squeeze(1)
            if not len(rows):
                continue
            above = None
            if flag:
                ids = instruction_ids[requests]
                above = self.encode_trusted(Lane.INSTRUCTION, ids, ids != pad)
            ids = query_ids[requests]
            query = self.encode_trusted(Lane.QUERY, ids, ids != pad, above)
            ids, lanes = candidate_ids[rows], candidate_lanes[rows]
            # The place of each request among those of its kind.
            place = (instructed == flag).cumsum(0)[group[rows]] - 1
            scored = self.score_candidates(ids, lanes, ids != pad, trust(query, above), place)
            logits = logits.index_copy(0, rows, scored)
        return logits

    def _embed(self, ids: Tensor, lanes: Tensor, instructed: bool) -> Tensor:  # noqa: FBT001 - an input
        # Each lane has positions of its own, counted from its first token.
        steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        attributes = (lanes == Lane.ATTRIBUTES).sum(1, keepdim=True)
        positions = torch.where(lanes == Lane.ATTRIBUTES, steps, steps - attributes)
        # Padding may reach further than any lane does; what it holds is never read.
        positions = positions.clamp(max=self.config.max_position_embeddings - 1)
        embedded = self.word_embeddings(ids) + self.position_embeddings(positions)
        if instructed:
            embedded = embedded + self.lane_embeddings(lanes)
        normed: Tensor = self.embedding_norm(embedded)
        return normed

    def head(
        self, pooled: Tensor, found: Tensor | None, trusted: TrustedLanes, group: Tensor | None
    ) -> Tensor:
        """The logits of candidates from what `read_candidates` returned.

        Without an instruction, `s · cos(query, document) + b`: the order is that of the cosine.
        With an instruction,

            w · (scale · (cos(wanted, document) - e · cos(excluded, document)) + bias + MLP(...)
                 + l · (found - m))
              + (1 - w) · the logit without an instruction

        where `w` is the sigmoid of `strength`, `wanted` mixes the query and what the instruction
        does not exclude, `e` is a learned weight times the largest exclusion of a token, and the
        MLP reads products of the pooled lanes.
        """

        def each(requests: Tensor) -> Tensor:
            return requests if group is None else requests[group]  # One row for each candidate.

        # Elements and products of unit vectors are small; the factors bring them near 1.
        size = pooled.shape[-1]
        document = F.normalize(pooled, dim=-1)
        query = F.normalize(trusted.query.total, dim=-1)
        query = each(query)
        plain: Tensor = self.plain_scale * (query * document).sum(-1) + self.plain_bias
        lane = trusted.instruction
        if lane is None:
            return plain
        instruction = each(F.normalize(lane.total - lane.excluded, dim=-1))
        most = lane.exclusion.amax(1, keepdim=True)
        excluded = each(F.normalize(lane.excluded, dim=-1) * most)
        weight = self.instruction_weight.sigmoid()
        wanted = F.normalize((1 - weight) * query + weight * instruction, dim=-1)
        cosine = ((wanted - self.exclusion_weight * excluded) * document).sum(-1)
        products = [other * document * size for other in (query, instruction, excluded)]
        singles = [document * size**0.5, instruction.expand_as(document) * size**0.5]
        features = torch.cat([*products, *singles], -1)
        extra: Tensor = self.head_output(F.gelu(self.head_hidden(features))).squeeze(-1)
        share = each(self.strength(trusted).sigmoid())
        late = self.late_weight * (cast("Tensor", found) - self.late_bias)
        instructed = self.scale * cosine + self.bias + extra + late
        logits: Tensor = share * instructed + (1 - share) * plain
        return logits
