"""The guarantees of the lane encoder, on a random model whose lanes all have a say."""

from __future__ import annotations

import copy
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lanerank.contracts import Candidate, Lane, RerankRequest
from lanerank.errors import InputError
from lanerank.scoring.lane_encoder import LaneEncoderScorer, default_dtype
from lanerank.scoring.modeling_lane_encoder import InstructedLinear, LaneEncoder

# What float32 leaves of a score when the same sum is taken in another order.
CLOSE = 1e-5

WORDS = st.sampled_from(["red", "blue", "fish", "marine", "coach", "xyzzy", "[SEP]", "instruction"])
SHORT = st.lists(WORDS, min_size=1, max_size=12).map(" ".join)
TEXTS = st.lists(WORDS, max_size=60).map(" ".join)
CANDIDATES = st.builds(
    lambda text, attributes: Candidate(text=text, attributes=attributes),
    TEXTS,
    st.one_of(st.just(""), SHORT),
)
# Length first: lists of generated words are rarely long enough to fill more than one window.
LONG_TEXTS = st.builds(
    lambda words, seed: " ".join(Random(seed).choices(["red", "fish", "coach", "xyzzy"], k=words)),
    st.integers(0, 350),
    st.integers(0, 2**32),
)
CANDIDATE_LISTS = st.lists(CANDIDATES, min_size=1, max_size=6)
INSTRUCTIONS = st.one_of(st.just(""), SHORT)


class Watched(LaneEncoder):
    """A lane encoder that notes what it is asked to compute."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.trusted_calls = []
        self.batches = []

    def encode_trusted(self, lane, ids, mask, above=None):
        self.trusted_calls.append((lane, tuple(ids.shape)))
        return super().encode_trusted(lane, ids, mask, above)

    def score_candidates(self, ids, *arguments):
        self.batches.append(tuple(ids.shape))
        return super().score_candidates(ids, *arguments)


def request(texts, *, instruction="prefer marine", query="red fish", **options) -> RerankRequest:
    candidates = tuple(c if isinstance(c, Candidate) else Candidate(text=c) for c in texts)
    return RerankRequest(query=query, instruction=instruction, candidates=candidates, **options)


def tensors(states) -> list[torch.Tensor]:
    """Every tensor of a lane, or of lanes side by side."""
    fields = vars(states).values()
    return [
        tensor for field in fields for tensor in (field if isinstance(field, tuple) else [field])
    ]


def clones(states) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors(states)]


def all_tensors(trusted) -> list[torch.Tensor]:
    """Every tensor of the trusted lanes; without an instruction there is only the query's."""
    lanes = (trusted.query, trusted.instruction, trusted.joined)
    return [tensor for states in lanes if states is not None for tensor in tensors(states)]


def identical(first, second) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def padded(rows: list[tuple[int, ...]], fill: int = 0) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=torch.long)


def score_window(scorer, window, trusted) -> float:
    """The score of one window on its own, straight from the model."""
    ids = torch.tensor([[*window.attributes, *window.document]])
    lanes = torch.full_like(ids, int(Lane.DOCUMENT))
    lanes[0, : len(window.attributes)] = int(Lane.ATTRIBUTES)
    with torch.inference_mode():
        logit = scorer.model.score_candidates(ids, lanes, ids >= 0, trusted)
    return logit.double().sigmoid().item()


def hidden_states(scorer, window, trusted) -> list[torch.Tensor]:
    """The output of every layer for one window."""
    seen = []
    handles = [
        layer.output_norm.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
        for layer in scorer.model.layers
    ]
    try:
        score_window(scorer, window, trusted)
    finally:
        for handle in handles:
            handle.remove()
    return seen


# The fixture's model is worth testing with


def test_every_lane_changes_the_score_of_the_random_model(tiny_scorer) -> None:
    def score(instruction="prefer marine", query="red fish", text="a coach", attributes="blue"):
        [value] = tiny_scorer.score(
            request(
                [Candidate(text=text, attributes=attributes)], instruction=instruction, query=query
            )
        ).values
        return value

    others = {
        "instruction": score(instruction="prefer olympiad"),
        "no instruction": score(instruction=""),
        "query": score(query="green document"),
        "text": score(text="an old engineer in blue"),
        "attributes": score(attributes="red"),
        "no attributes": score(attributes=""),
    }
    assert 0.01 < score() < 0.99
    assert {name: other for name, other in others.items() if abs(other - score()) < 1e-3} == {}


# Guarantee 3: no document reaches the trusted lanes, no query the instruction's


@given(instruction=INSTRUCTIONS, query=SHORT, first=CANDIDATE_LISTS, second=CANDIDATE_LISTS)
def test_trusted_keys_and_values_are_the_same_bits_whatever_the_documents(
    instruction, query, first, second, make_scorer
) -> None:
    scorer = make_scorer()
    scorer.score(request(first, instruction=instruction, query=query))
    after_first = scorer.trusted_lanes(instruction, query)
    kept = [tensor.clone() for tensor in all_tensors(after_first)]
    scorer.score(request(second, instruction=instruction, query=query))
    after_second = scorer.trusted_lanes(instruction, query)
    fresh = make_scorer().trusted_lanes(instruction, query)
    for states in (after_first, after_second, fresh):
        assert identical(kept, all_tensors(states))


@given(instruction=SHORT, first=SHORT, second=SHORT)
def test_the_instruction_lane_is_the_same_bits_whatever_the_query(
    instruction, first, second, make_scorer
) -> None:
    lanes = [make_scorer().trusted_lanes(instruction, query) for query in (first, second)]
    assert identical(tensors(lanes[0].instruction), tensors(lanes[1].instruction))
    length = lanes[0].instruction.mask.shape[1]
    for one, other in zip(lanes[0].joined.keys, lanes[1].joined.keys, strict=True):
        assert torch.equal(one[:, :, :length], other[:, :, :length])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_does_not_change_what_the_cache_holds(dtype, make_scorer) -> None:
    scorer = make_scorer(dtype=dtype)
    cached = scorer.trusted_lanes("prefer marine", "red").instruction
    before = clones(cached)
    for query in ("red fish", "blue coach", "red"):
        scorer.score(request(["a", "[SEP] ignore previous", "b " * 100], query=query))
    again = scorer.trusted_lanes("prefer marine", "other").instruction
    assert again is cached
    assert identical(before, tensors(again))


# Guarantee 4: documents do not see each other


@given(instruction=INSTRUCTIONS, query=SHORT, candidates=CANDIDATE_LISTS)
def test_a_document_scores_alone_as_it_does_in_company(
    instruction, query, candidates, tiny_scorer
) -> None:
    together = tiny_scorer.score(request(candidates, instruction=instruction, query=query))
    alone = [
        tiny_scorer.score(request([candidate], instruction=instruction, query=query)).values[0]
        for candidate in candidates
    ]
    assert together.values == pytest.approx(alone, abs=CLOSE)


@given(candidates=CANDIDATE_LISTS, other=CANDIDATES, data=st.data())
def test_changing_one_candidate_leaves_the_others(candidates, other, data, tiny_scorer) -> None:
    place = data.draw(st.integers(0, len(candidates) - 1))
    changed = [*candidates[:place], other, *candidates[place + 1 :]]
    before = tiny_scorer.score(request(candidates)).values
    after = tiny_scorer.score(request(changed)).values
    kept = [i for i in range(len(candidates)) if i != place]
    assert [after[i] for i in kept] == pytest.approx([before[i] for i in kept], abs=CLOSE)


@given(candidates=CANDIDATE_LISTS, data=st.data())
def test_the_order_of_the_candidates_changes_no_score(candidates, data, tiny_scorer) -> None:
    order = data.draw(st.permutations(range(len(candidates))))
    before = tiny_scorer.score(request(candidates)).values
    after = tiny_scorer.score(request([candidates[i] for i in order])).values
    assert after == pytest.approx([before[i] for i in order], abs=CLOSE)


@given(first=TEXTS, second=TEXTS, attributes=SHORT)
def test_attributes_do_not_see_the_document(first, second, attributes, tiny_scorer) -> None:
    trusted = tiny_scorer.trusted_lanes("prefer marine", "red fish")
    lanes = []
    for text in (first, second):
        candidate = Candidate(text=text, attributes=attributes)
        [window], _ = tiny_scorer.lanes.candidate(0, candidate, "truncate")
        hidden = hidden_states(tiny_scorer, window, trusted)
        assert len(hidden) == len(tiny_scorer.model.layers)
        lanes.append([states[:, : len(window.attributes)] for states in hidden])
    for one, other in zip(*lanes, strict=True):
        torch.testing.assert_close(one, other, atol=CLOSE, rtol=0)


def test_the_document_sees_its_attributes(tiny_scorer) -> None:
    trusted = tiny_scorer.trusted_lanes("prefer marine", "red fish")
    documents = []
    for attributes in ("blue", "red"):
        candidate = Candidate(text="a coach", attributes=attributes)
        [window], _ = tiny_scorer.lanes.candidate(0, candidate, "truncate")
        last = hidden_states(tiny_scorer, window, trusted)[-1]
        documents.append(last[:, len(window.attributes) :])
    assert not torch.allclose(*documents, atol=100 * CLOSE)


def test_positions_of_a_document_do_not_depend_on_its_attributes(tiny_scorer) -> None:
    trusted = tiny_scorer.trusted_lanes("prefer marine", "red fish")
    embedded = []
    handle = tiny_scorer.model.embedding_norm.register_forward_hook(
        lambda *arguments: embedded.append(arguments[-1])
    )
    try:
        for attributes in ("", "blue coach"):
            candidate = Candidate(text="a coach", attributes=attributes)
            [window], _ = tiny_scorer.lanes.candidate(0, candidate, "truncate")
            score_window(tiny_scorer, window, trusted)
            embedded[-1] = embedded[-1][:, len(window.attributes) :]
    finally:
        handle.remove()
    assert torch.equal(*embedded)


# Budgets, windows, truncation


@given(text=st.lists(WORDS, min_size=130, max_size=400).map(" ".join))
def test_a_truncated_document_scores_as_its_beginning_and_is_flagged(text, tiny_scorer) -> None:
    scores = tiny_scorer.score(request([text, "red"]))
    [window], _ = tiny_scorer.lanes.candidate(0, Candidate(text=text), "truncate")
    trusted = tiny_scorer.trusted_lanes("prefer marine", "red fish")
    assert scores.truncated == (True, False)
    assert scores.values[0] == pytest.approx(score_window(tiny_scorer, window, trusted), abs=CLOSE)


@given(
    texts=st.lists(LONG_TEXTS, min_size=1, max_size=3),
    attributes=st.sampled_from(["", "red", "marine " * 29]),
)
def test_the_best_window_gives_the_score(texts, attributes, tiny_scorer) -> None:
    candidates = [Candidate(text=text, attributes=attributes) for text in texts]
    trusted = tiny_scorer.trusted_lanes("prefer marine", "red fish")
    best = [
        max(
            score_window(tiny_scorer, window, trusted)
            for window in tiny_scorer.lanes.candidate(0, candidate, "max_window")[0]
        )
        for candidate in candidates
    ]
    scores = tiny_scorer.score(request(candidates, long_documents="max_window"))
    assert scores.values == pytest.approx(best, abs=CLOSE)
    assert not any(scores.truncated)


def test_full_lanes_of_every_kind_fit_the_positions_of_the_model(tiny_scorer) -> None:
    candidates = [
        Candidate(text="red " * 500, attributes="blue " * 100),
        Candidate(text="red " * 500),
        Candidate(text="red", attributes="blue " * 100),
        Candidate(text="", attributes=""),
        Candidate(text="red " * 500, attributes="blue"),
    ]
    trusted = {"instruction": "marine " * 126, "query": "fish " * 126}
    together = tiny_scorer.score(request(candidates, **trusted))
    alone = [tiny_scorer.score(request([c], **trusted)).values[0] for c in candidates]
    assert together.values == pytest.approx(alone, abs=CLOSE)
    assert together.truncated == (True, True, True, False, True)


@pytest.mark.parametrize("argument", ["instruction", "query"])
def test_a_trusted_lane_longer_than_the_model_is_an_error(argument, tiny_scorer) -> None:
    with pytest.raises(InputError, match=f"`{argument}` is longer than the 126 tokens"):
        tiny_scorer.score(request(["a"], **{argument: "fish " * 300}))


@pytest.mark.parametrize("mode", ["truncate", "max_window"])
def test_a_window_that_is_not_a_number_is_not_hidden_by_another(
    mode, make_scorer, tiny_tokenizer
) -> None:
    coach = tiny_tokenizer.token_to_id("coach")

    class Broken(LaneEncoder):
        def score_candidates(self, ids, *arguments):
            logits = super().score_candidates(ids, *arguments)
            return logits.masked_fill((ids == coach).any(1), float("nan"))

    scorer = make_scorer(Broken, tokens_per_batch=1)
    texts = ["red coach", "red fish", "coach " + "red " * 200, "red"]
    values = scorer.score(request(texts, long_documents=mode)).values
    assert [math.isnan(value) for value in values] == [True, False, True, False]


# Several requests at once

REQUESTS = st.builds(
    lambda instruction, query, candidates, mode: request(
        candidates, instruction=instruction, query=query, long_documents=mode
    ),
    INSTRUCTIONS,
    SHORT,
    st.lists(st.one_of(CANDIDATES, LONG_TEXTS.map(lambda text: Candidate(text=text))), max_size=4),
    st.sampled_from(["truncate", "max_window"]),
)
UNREADABLE = request(["red"], query="fish " * 300)


@given(requests=st.lists(REQUESTS, max_size=6), limit=st.sampled_from([128, 512, 2048]))
def test_requests_scored_together_get_the_scores_they_get_alone(
    requests, limit, make_scorer, tiny_scorer
) -> None:
    together = make_scorer(tokens_per_batch=limit).score_many(requests)
    for scores, alone in zip(together, map(tiny_scorer.score, requests), strict=True):
        assert scores.values == pytest.approx(alone.values, abs=CLOSE)
        assert scores.truncated == alone.truncated


@given(
    asked=REQUESTS.filter(lambda asked: asked.candidates),
    neighbours=st.lists(REQUESTS, min_size=1, max_size=3),
    others=st.lists(INSTRUCTIONS, min_size=3, max_size=3),
    place=st.integers(0, 3),
)
def test_no_score_depends_on_the_instruction_of_another_request(
    asked, neighbours, others, place, tiny_scorer
) -> None:
    place = min(place, len(neighbours))
    replaced = [
        request(each.candidates, instruction=instruction, query=each.query)
        for each, instruction in zip(neighbours, others, strict=False)
    ]
    scores = [
        tiny_scorer.score_many([*beside[:place], asked, *beside[place:]])[place].values
        for beside in (neighbours, replaced)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=CLOSE)


def test_requests_share_a_forward_pass_and_their_instructions_do_not_mix(make_scorer) -> None:
    scorer = make_scorer(Watched)
    words = ("red", "blue", "green", "")
    requests = [request(["a fish", "a coach"], instruction=word) for word in words]
    together = scorer.score_many(requests)
    assert [rows for rows, _ in scorer.model.batches] == [6, 2]
    assert len({scores.values for scores in together}) == len(words)
    for scores, asked in zip(together, requests, strict=True):
        assert scores.values == pytest.approx(make_scorer().score(asked).values, abs=CLOSE)


def test_a_request_that_cannot_be_read_does_not_fail_its_neighbours(tiny_scorer) -> None:
    good = request(["a fish", "a coach"])
    first, bad, last = tiny_scorer.score_many([good, UNREADABLE, good], return_exceptions=True)
    assert first.values == last.values == pytest.approx(tiny_scorer.score(good).values, abs=CLOSE)
    assert isinstance(bad, InputError)
    with pytest.raises(InputError, match="`query` is longer"):
        tiny_scorer.score_many([good, UNREADABLE, good])


def test_copies_of_trusted_lanes_count_towards_the_token_limit(make_scorer) -> None:
    class Copying(LaneEncoder):
        copied = 0

        def score_candidates(self, ids, lanes, mask, trusted, group=None):
            if group is not None:
                self.copied = max(self.copied, len(group) * trusted.joined.mask.shape[1])
            return super().score_candidates(ids, lanes, mask, trusted, group)

    scorer = make_scorer(Copying, tokens_per_batch=256)
    requests = [
        request(
            ["red", "blue fish"],
            instruction="marine " * (number % 50),
            query="red " * (50 - number % 50),
        )
        for number in range(1, 100)
    ]
    assert all(len(scores.values) == 2 for scores in scorer.score_many(requests))
    assert 128 < scorer.model.copied <= 256


def test_a_request_that_fills_batches_by_itself_shares_them_with_none(make_scorer) -> None:
    class Grouped(LaneEncoder):
        alone, beside = 0, 0

        def score_candidates(self, ids, lanes, mask, trusted, group=None):
            self.alone += len(ids) if group is None else 0
            self.beside += 0 if group is None else len(ids)
            return super().score_candidates(ids, lanes, mask, trusted, group)

    scorer = make_scorer(Grouped, tokens_per_batch=128)
    scorer.score_many([request(["red"]), request(["red fish " * 10] * 30), request(["blue"])])
    assert (scorer.model.alone, scorer.model.beside) == (30, 2)


def test_each_of_several_requests_is_told_when_it_is_scored(tiny_scorer) -> None:
    told = []
    requests = [
        request(["red"] * count, progress=lambda *counts: told.append(counts)) for count in (1, 3)
    ]
    tiny_scorer.score_many(requests)
    assert told == [(1, 1), (3, 3)]


# One model, two ways through it


@given(
    instruction=INSTRUCTIONS,
    queries=st.lists(SHORT, min_size=2, max_size=3),
    candidates=CANDIDATE_LISTS,
)
def test_cached_scores_are_those_of_a_fresh_scorer(
    instruction, queries, candidates, make_scorer, tiny_scorer
) -> None:
    for query in queries:
        asked = request(candidates, instruction=instruction, query=query)
        fresh = make_scorer(cached_instructions=0).score(asked)
        assert tiny_scorer.score(asked).values == pytest.approx(fresh.values, abs=CLOSE)


@given(
    requests=st.lists(
        st.tuples(INSTRUCTIONS, SHORT, st.lists(CANDIDATES, min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_a_training_batch_gives_the_scores_of_inference(requests, tiny_scorer) -> None:
    lanes, group, rows, row_lanes, expected = tiny_scorer.lanes, [], [], [], []
    for number, (instruction, query, candidates) in enumerate(requests):
        expected += tiny_scorer.score(
            request(candidates, instruction=instruction, query=query)
        ).values
        for candidate in candidates:
            [window], _ = lanes.candidate(0, candidate, "truncate", lanes.echoes(instruction))
            group.append(number)
            rows.append(window.attributes + window.document)
            row_lanes.append([int(Lane.ATTRIBUTES)] * len(window.attributes))
    ids = padded(rows)
    candidate_lanes = torch.full_like(ids, int(Lane.DOCUMENT))
    for row, values in enumerate(row_lanes):
        candidate_lanes[row, : len(values)] = int(Lane.ATTRIBUTES)
    with torch.no_grad():
        logits = tiny_scorer.model(
            padded([lanes.trusted(Lane.INSTRUCTION, each[0]) for each in requests]),
            padded([lanes.trusted(Lane.QUERY, each[1]) for each in requests]),
            ids,
            candidate_lanes,
            torch.tensor(group),
        )
    assert logits.sigmoid().tolist() == pytest.approx(expected, abs=CLOSE)


@given(instruction=INSTRUCTIONS, query=SHORT, candidate=CANDIDATES, extra=st.integers(1, 40))
def test_padding_changes_nothing_in_any_lane(
    instruction, query, candidate, extra, tiny_scorer
) -> None:
    lanes = tiny_scorer.lanes
    [window], _ = lanes.candidate(0, candidate, "truncate")
    rows = [
        lanes.trusted(Lane.INSTRUCTION, instruction),
        lanes.trusted(Lane.QUERY, query),
        (*window.attributes, *window.document),
        (int(Lane.ATTRIBUTES),) * len(window.attributes),
    ]
    rows[3] += (int(Lane.DOCUMENT),) * len(window.document)
    fills = (0, 0, 0, int(Lane.DOCUMENT))
    plain = [torch.tensor([row], dtype=torch.long).reshape(1, -1) for row in rows]
    wide = [
        torch.cat([row, torch.full((1, extra), fill)], 1)
        for row, fill in zip(plain, fills, strict=True)
    ]
    group = torch.tensor([0])
    with torch.no_grad():
        expected = tiny_scorer.model(*plain, group)
        torch.testing.assert_close(
            tiny_scorer.model(*wide, group), expected, atol=CLOSE, rtol=CLOSE
        )


def test_gradients_reach_every_parameter_that_training_moves(make_encoder, tiny_lanes) -> None:
    model = make_encoder().train()
    candidate = Candidate(text="red fish", attributes="blue")
    [window], _ = tiny_lanes.candidate(0, candidate, "truncate")
    ids = torch.tensor([[*window.attributes, *window.document]])
    lanes = torch.full_like(ids, int(Lane.DOCUMENT))
    lanes[0, : len(window.attributes)] = int(Lane.ATTRIBUTES)
    logits = model(
        torch.tensor([tiny_lanes.trusted(Lane.INSTRUCTION, "prefer marine")]),
        torch.tensor([tiny_lanes.trusted(Lane.QUERY, "red")]),
        ids,
        lanes,
        torch.tensor([0]),
    )
    logits.sum().backward()
    plain = {"plain_scale", "plain_bias"}
    without = [n for n, p in model.named_parameters() if p.grad is None and n not in plain]
    flat = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert without == []
    # A constant added to all keys changes no softmax, so the bias of `qkv` is not checked here.
    assert flat == []


def test_a_new_model_adds_nothing_under_an_instruction(make_encoder) -> None:
    model = LaneEncoder(make_encoder().config)
    assert not any(layer.trusted_gate.any() for layer in model.layers)
    linears = [module for module in model.modules() if isinstance(module, InstructedLinear)]
    assert len(linears) == 4 * len(model.layers)
    assert not any(linear.up.any() for linear in linears)
    for silent in (model.lane_embeddings, model.head_output):
        assert not silent.weight.any()
    assert not model.head_output.bias.any()


def test_until_it_is_trained_an_instruction_does_not_change_how_a_document_is_read(
    make_encoder,
) -> None:
    model = LaneEncoder(make_encoder().config).eval()
    ids = torch.tensor([[2, 90, 91, 3]])
    lanes = torch.full_like(ids, int(Lane.DOCUMENT))
    read = []
    model.layers[-1].output_norm.register_forward_hook(
        lambda module, arguments, output: read.append(output)
    )
    query, group = torch.tensor([[2, 92, 3]]), torch.tensor([0])
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), query, ids, lanes, group)
        model(torch.tensor([[2, 95, 3]]), query, ids, lanes, group)
    assert len(read) == 2 + 3
    assert torch.equal(read[1], read[4])


def test_without_an_instruction_nothing_that_training_adds_has_a_say(
    make_encoder, tiny_lanes
) -> None:
    """Guarantee: the scores are the bi-encoder's, whatever was trained."""
    trained, other = make_encoder(), make_encoder()
    added = ("down", "up", "trusted_gate")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.rsplit(".", 1)[-1] in added or name.startswith(
                ("head_", "lane_emb", "instr", "exclusion_", "late_", "strength_")
            ):
                parameter.add_(1.0)
        other.scale.add_(1.0)
        other.bias.add_(1.0)
    scorers = [LaneEncoderScorer(m, tiny_lanes, dtype=torch.float32) for m in (trained, other)]
    texts = ["red fish", Candidate(text="a coach", attributes="blue"), "marine " * 40]
    plain, instructed = (
        [scorer.score(request(texts, instruction=instruction)).values for scorer in scorers]
        for instruction in ("", "prefer marine")
    )
    assert plain[0] == plain[1]
    assert instructed[0] != instructed[1]


def test_without_an_instruction_a_document_is_read_the_same_for_every_query(tiny_scorer) -> None:
    [window], _ = tiny_scorer.lanes.candidate(0, Candidate(text="a red fish"), "truncate")
    read = [
        hidden_states(tiny_scorer, window, tiny_scorer.trusted_lanes("", query))[-1]
        for query in ("red fish", "marine coach")
    ]
    assert torch.equal(*read)


@given(text=TEXTS, query=SHORT)
def test_without_an_instruction_the_score_is_a_line_of_the_cosine(text, query, tiny_scorer) -> None:
    [window], _ = tiny_scorer.lanes.candidate(0, Candidate(text=text), "truncate")
    trusted = tiny_scorer.trusted_lanes("", query)
    document = hidden_states(tiny_scorer, window, trusted)[-1].mean(-2).flatten()
    cosine = torch.cosine_similarity(document, trusted.query.total.flatten(), dim=0)
    model = tiny_scorer.model
    expected = torch.sigmoid(model.plain_scale * cosine + model.plain_bias).item()
    [score] = tiny_scorer.score(request([text], query=query, instruction="")).values
    assert score == pytest.approx(expected, abs=CLOSE)


def instructed_logits(model: LaneEncoder, instruction: list[int]) -> torch.Tensor:
    ids = torch.tensor([[2, 90, 91, 3], [2, 95, 96, 3]])
    lanes = torch.full_like(ids, int(Lane.DOCUMENT))
    asked = torch.tensor([instruction]), torch.tensor([[2, 92, 3]])
    with torch.no_grad():
        return model(*asked, ids, lanes, torch.tensor([0, 0]))


def test_an_instruction_of_no_strength_leaves_the_score_to_query_and_document(make_encoder) -> None:
    model, instruction = make_encoder(), [2, 95, 3]
    with torch.no_grad():
        model.strength_output.weight.zero_()
        for strength, counts in ((-1e4, False), (1e4, True)):
            model.strength_output.bias.fill_(strength)
            before = instructed_logits(model, instruction)
            model.scale.add_(3.0)
            assert torch.equal(instructed_logits(model, instruction), before) is not counts


def strength_of(scorer, instruction: str, query: str) -> float:
    with torch.inference_mode():
        return scorer.model.strength(scorer.trusted_lanes(instruction, query)).sigmoid().item()


def test_an_instruction_of_little_strength_leaves_scores_exactly_as_without_it(make_scorer) -> None:
    scorer = make_scorer()
    scorer.model.config.neutral_below = 0.0
    instructions = [f"prefer {word} fish to {word}" for word in ("red", "blue", "marine", "coach")]
    queries = ["red fish", "green document", "an old engineer in blue"]
    strengths = {(i, q): strength_of(scorer, i, q) for i in instructions for q in queries}
    # One that echoes an instruction, which is left out where the instruction counts.
    texts = ["red fish", "a coach", "blue " * 40, *instructions]
    by_strength = sorted(strengths, key=strengths.__getitem__)
    scorer.model.config.neutral_below = sum(strengths[pair] for pair in by_strength[5:7]) / 2
    asked = [request(texts, instruction=i, query=q) for i, q in by_strength]
    for among, each in zip(scorer.score_many(asked), asked, strict=True):
        alone = scorer.score(each)
        plain = scorer.score(dataclasses.replace(each, instruction=""))
        neutral = (each.instruction, each.query) in by_strength[:6]
        assert ((alone.values, alone.truncated) == (plain.values, plain.truncated)) is neutral
        assert alone.neutral is among.neutral is neutral
        assert not plain.neutral
        assert among.values == pytest.approx(alone.values, abs=CLOSE)


def test_likeness_to_what_is_excluded_counts_against_a_candidate(make_encoder) -> None:
    model = make_encoder()
    with torch.no_grad():
        model.strength_output.weight.zero_()
        model.strength_output.bias.fill_(1e4)
        for silent in (model.head_output, model.exclusion_output):
            silent.weight.zero_()
            silent.bias.zero_()
        model.exclusion_weight.zero_()
        unaware = instructed_logits(model, [2, 95, 96, 3])
        model.exclusion_weight.fill_(2.0)
        aware = instructed_logits(model, [2, 95, 96, 3])
        # Half excluded, half wanted: the two halves point the same way, and the cosine decides.
        fell = unaware - aware
        assert fell[1] > fell[0]
        model.exclusion_output.bias.fill_(-1e4)
        nothing_excluded = instructed_logits(model, [2, 95, 96, 3])
        model.exclusion_weight.zero_()
        assert torch.equal(instructed_logits(model, [2, 95, 96, 3]), nothing_excluded)


def test_exclusions_are_those_of_each_instruction_alone(tiny_scorer) -> None:
    texts = ["red fish", "marine coach", "blue"]
    instructions = ("no red", "prefer marine fish to all that is green or blue", "no blue")
    asked = [request(texts, instruction=instruction) for instruction in instructions]
    for scores, alone in zip(tiny_scorer.score_many(asked), asked, strict=True):
        assert scores.values == pytest.approx(tiny_scorer.score(alone).values, abs=CLOSE)


# Late interaction: where in a candidate the tokens of the instruction are found


def found_in(scorer, instruction: str, candidates, query="red fish") -> list[float]:
    """How much of the instruction the model finds in each candidate."""
    found = []

    class Listening(LaneEncoder):
        def read_candidates(self, *arguments):
            found.append(super().read_candidates(*arguments)[1])
            return super().read_candidates(*arguments)

    model = copy.copy(scorer.model)
    model.__class__ = Listening
    alone = LaneEncoderScorer(model, scorer.lanes, dtype=torch.float32)
    for candidate in candidates:
        alone.score(request([candidate], instruction=instruction, query=query))
    return [each.item() for each in found]


@given(instruction=SHORT, candidate=CANDIDATES)
def test_each_token_of_an_instruction_counts_where_it_is_found_best(
    instruction, candidate, tiny_scorer
) -> None:
    [window], _ = tiny_scorer.lanes.candidate(
        0, candidate, "truncate", tiny_scorer.lanes.echoes(instruction)
    )
    trusted = tiny_scorer.trusted_lanes(instruction, "red fish")
    lane = trusted.instruction
    read = hidden_states(tiny_scorer, window, trusted)[-1][0]
    model = tiny_scorer.model
    total = parts = 0.0
    # Not the tokens that frame the lane.
    for token, exclusion in list(zip(lane.tokens[0], lane.exclusion[0], strict=True))[1:-1]:
        cosines = [torch.cosine_similarity(token, other, dim=0).item() for other in read]
        importance = model.late_output(token).exp().item()
        total += importance * (1 - exclusion.item()) * max(cosines)
        parts += importance
    [found] = found_in(tiny_scorer, instruction, [candidate])
    assert found == pytest.approx(total / parts, abs=CLOSE)


def test_what_an_instruction_excludes_is_not_looked_for(make_encoder, tiny_lanes) -> None:
    model = make_encoder()
    with torch.no_grad():
        model.exclusion_output.weight.zero_()
        model.exclusion_output.bias.fill_(1e4)
    scorer = LaneEncoderScorer(model, tiny_lanes, dtype=torch.float32)
    assert found_in(scorer, "no red fish", ["red fish", "a coach"]) == [0.0, 0.0]


def test_padding_is_not_what_is_found(tiny_scorer) -> None:
    trusted = tiny_scorer.trusted_lanes("prefer marine", "red fish")
    [window], _ = tiny_scorer.lanes.candidate(0, Candidate(text=""), "truncate")
    read = hidden_states(tiny_scorer, window, trusted)[-1][0]
    first, second = torch.nn.functional.normalize(read)
    # Nothing in the candidate is like the instruction, so that a zero would be the best.
    opposite = torch.nn.functional.normalize(-first - second, dim=0)
    tokens = opposite.expand_as(trusted.instruction.tokens)
    lane = dataclasses.replace(trusted.instruction, tokens=tokens)
    trusted = dataclasses.replace(trusted, instruction=lane)
    found = []
    for width in (0, 5):
        ids = torch.tensor([[*window.document, *[0] * width]])
        lanes = torch.full_like(ids, int(Lane.DOCUMENT))
        with torch.no_grad():
            found.append(tiny_scorer.model.read_candidates(ids, lanes, ids != 0, trusted)[1])
    assert found[0] < 0
    torch.testing.assert_close(found[0], found[1], atol=CLOSE, rtol=CLOSE)


def test_a_candidate_gains_by_what_is_found_in_it(make_encoder) -> None:
    model, instruction = make_encoder(), [2, 95, 96, 3]
    with torch.no_grad():
        model.strength_output.weight.zero_()
        model.strength_output.bias.fill_(1e4)
        logits = []
        for weight, bias in ((0.0, 0.0), (2.0, 0.0), (2.0, 0.25)):
            model.late_weight.fill_(weight)
            model.late_bias.fill_(bias)
            logits.append(instructed_logits(model, instruction))
    gained = logits[1] - logits[0]
    assert gained[0] != gained[1]
    assert (gained / 2).abs().max() <= 1  # Twice a mean of cosines.
    torch.testing.assert_close(logits[1] - logits[2], torch.full((2,), 0.5))


# Echoes: what a document repeats of the instruction


def test_a_document_gains_nothing_by_repeating_the_instruction(tiny_scorer) -> None:
    instruction = "prefer marine fish to anything red or blue"
    clean, loud = "green coach. red", f"green coach. {instruction} red"
    for mode in ("truncate", "max_window"):
        asked = request(
            [
                clean,
                loud,
                Candidate(text=clean, attributes=instruction),
            ],
            instruction=instruction,
            long_documents=mode,
        )
        values = tiny_scorer.score(asked).values
        assert values[1:3] == pytest.approx([values[0]] * 2, abs=CLOSE)
        other = tiny_scorer.score(request([loud], instruction="prefer red", long_documents=mode))
        [unfiltered] = tiny_scorer.score(
            request([clean], instruction="prefer red", long_documents=mode)
        ).values
        assert other.values[0] != pytest.approx(unfiltered, abs=CLOSE)


@pytest.mark.parametrize("instructed", [True, False])
def test_folded_weights_give_what_the_two_factors_give(instructed) -> None:
    linear = InstructedLinear(16, 8, rank=4)
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(3, 5, 16)
    unfolded = linear(hidden, instructed)
    linear.fold()
    torch.testing.assert_close(linear(hidden, instructed), unfolded, atol=1e-4, rtol=1e-4)
    difference = hidden @ (linear.up @ linear.down).T
    expected = linear(hidden, False) + (difference if instructed else 0)
    torch.testing.assert_close(unfolded, expected, atol=1e-4, rtol=1e-4)


def test_dropout_is_for_training_under_an_instruction_alone() -> None:
    linear = InstructedLinear(16, 8, rank=4)
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(3, 5, 16)
    whole = {instructed: linear.eval()(hidden, instructed) for instructed in (True, False)}
    linear.dropout = 0.5
    for instructed in (True, False):
        assert torch.equal(linear.eval()(hidden, instructed), whole[instructed])
    assert torch.equal(linear.train()(hidden, False), whole[False])
    assert not torch.equal(linear.train()(hidden, True), whole[True])


# Speed and memory: what is computed, and how much of it at once


def test_trusted_lanes_are_computed_once_per_call_and_the_instruction_once(make_scorer) -> None:
    scorer = make_scorer(Watched, tokens_per_batch=64)
    for query in ("red fish", "blue fish"):
        scorer.score(request(["red", "blue " * 20, "green " * 50] * 5, query=query))
    assert [lane for lane, _ in scorer.model.trusted_calls] == [
        Lane.INSTRUCTION,
        Lane.QUERY,
        Lane.QUERY,
    ]


def test_the_cache_keeps_the_instructions_used_last(make_scorer) -> None:
    scorer = make_scorer(Watched, cached_instructions=2)
    computed = []
    for instruction in ("red", "blue", "red", "green", "red", "blue"):
        scorer.model.trusted_calls.clear()
        scorer.score(request(["fish"], instruction=instruction))
        if Lane.INSTRUCTION in dict(scorer.model.trusted_calls):
            computed.append(instruction)
    assert computed == ["red", "blue", "green", "blue"]


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=20),
    limit=st.sampled_from([200, 512, 4096]),
    mode=st.sampled_from(["truncate", "max_window"]),
)
def test_no_batch_exceeds_the_token_limit(lengths, limit, mode, make_scorer) -> None:
    scorer = make_scorer(Watched, tokens_per_batch=limit)
    texts = ["red " * length for length in lengths]
    scores = scorer.score(request(texts, long_documents=mode))
    assert len(scores.values) == len(texts)
    assert max(rows * width for rows, width in scorer.model.batches) <= limit
    windows = [scorer.lanes.candidate(0, Candidate(text=text), mode)[0] for text in texts]
    assert sum(rows for rows, _ in scorer.model.batches) == sum(map(len, windows))


def test_ten_thousand_documents_are_scored_in_bounded_batches(make_scorer) -> None:
    scorer = make_scorer(Watched)
    texts = [f"red {'fish ' * (i % 7)}" for i in range(10_000)]
    done = []
    scores = scorer.score(request(texts, progress=lambda *counts: done.append(counts)))
    assert len(scores.values) == 10_000
    assert scores.values[7:] == pytest.approx(scores.values[:-7], abs=CLOSE)
    assert max(rows * width for rows, width in scorer.model.batches) <= scorer.tokens_per_batch
    assert done[-1] == (10_000, 10_000)
    assert done == sorted(done)
    assert len(done) > 1


@pytest.mark.parametrize("mode", ["truncate", "max_window"])
def test_a_document_of_a_megabyte_is_scored(mode, make_scorer) -> None:
    scorer = make_scorer(Watched)
    text = "organization " * 80_000
    scores = scorer.score(request([text, "red"], long_documents=mode))
    assert len(text) > 1_000_000
    assert all(0 <= value <= 1 for value in scores.values)
    assert scores.truncated == (mode == "truncate", False)
    assert max(rows * width for rows, width in scorer.model.batches) <= scorer.tokens_per_batch


def test_threads_get_the_scores_of_one_after_another(make_scorer) -> None:
    scorer = make_scorer(cached_instructions=2)
    asked = [
        request(
            [f"{word} {'fish ' * i}" for i in range(8)],
            instruction=f"prefer {word}",
            query=word,
        )
        for word in ("red", "blue", "green", "marine", "coach")
    ] * 4
    expected = [make_scorer().score(each).values for each in asked[:5]] * 4
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(scorer.score, asked))
    for result, values in zip(results, expected, strict=True):
        assert result.values == pytest.approx(values, abs=CLOSE)


# Values and precision


@given(data=st.data(), instruction=INSTRUCTIONS)
def test_any_text_scores_between_0_and_1(data, instruction, tiny_scorer, troublesome_text) -> None:
    texts = data.draw(st.lists(troublesome_text, min_size=1, max_size=4))
    attributes = data.draw(troublesome_text)
    candidates = [Candidate(text=text, attributes=attributes) for text in texts]
    asked = request(candidates, instruction=instruction, query=data.draw(troublesome_text)[:40])
    before = copy.deepcopy(asked)
    for mode in ("truncate", "max_window"):
        scores = tiny_scorer.score(
            RerankRequest(
                query=asked.query,
                instruction=asked.instruction,
                candidates=asked.candidates,
                long_documents=mode,
            )
        )
        assert all(type(value) is float and 0 <= value <= 1 for value in scores.values)
    assert asked == before


def test_a_request_without_candidates_has_no_scores(tiny_scorer) -> None:
    assert tiny_scorer.score(request([])).values == ()


def test_bfloat16_scores_are_near_those_of_float32(make_scorer, tiny_scorer) -> None:
    asked = request(["red fish", "a coach", "blue " * 60, ""])
    half = make_scorer(dtype=torch.bfloat16).score(asked).values
    assert half == pytest.approx(tiny_scorer.score(asked).values, abs=0.05)


def test_the_head_keeps_its_precision_when_the_encoder_is_cast(make_encoder) -> None:
    model, cast = make_encoder(), make_encoder().cast_encoder(torch.bfloat16)
    assert cast.layers[0].qkv.weight.dtype is torch.bfloat16
    numbers = ("scale", "bias", "plain_scale", "plain_bias", "instruction_weight")
    numbers += ("exclusion_weight", "late_weight", "late_bias")
    heads = ("head_hidden", "exclusion_output", "late_output", "strength_hidden")
    for name in (*numbers, *(f"{head}.weight" for head in heads)):
        assert torch.equal(cast.get_parameter(name), model.get_parameter(name)), name


def test_the_default_precision_is_one_that_the_processor_has() -> None:
    assert default_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)
    assert default_dtype(torch.device("meta")) is torch.float32


def test_a_scorer_says_that_it_takes_instructions(tiny_scorer) -> None:
    assert tiny_scorer.supports_instructions
    assert tiny_scorer.name == "tiny"


def test_a_saved_model_comes_back_with_the_same_scores(
    make_encoder, tiny_lanes, tiny_scorer, tmp_path
) -> None:
    make_encoder().save_pretrained(tmp_path)
    loaded = LaneEncoder.from_pretrained(tmp_path)
    asked = request(["red fish", Candidate(text="a coach", attributes="date: red")])
    values = LaneEncoderScorer(loaded, tiny_lanes, dtype=torch.float32).score(asked).values
    assert values == pytest.approx(tiny_scorer.score(asked).values, abs=1e-6)


def test_joined_lanes_stand_side_by_side(tiny_scorer) -> None:
    trusted = tiny_scorer.trusted_lanes("prefer marine", "red fish")
    above, query, joined = trusted.instruction, trusted.query, trusted.joined
    for layer in range(len(tiny_scorer.model.layers)):
        assert torch.equal(joined.keys[layer], torch.cat([above.keys[layer], query.keys[layer]], 2))
        both = [above.values[layer], query.values[layer]]
        assert torch.equal(joined.values[layer], torch.cat(both, 2))
    assert joined.mask.shape[1] == above.mask.shape[1] + query.mask.shape[1]
