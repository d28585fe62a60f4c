"""The recipe of lanerank-mini: where training starts, and that it can be resumed."""

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lanerank.contracts import Candidate, Lane, RerankRequest
from lanerank.lanes import LaneTokenizer
from lanerank.scoring.lane_encoder import LaneEncoderScorer

RECIPE = Path(__file__).parents[1] / "recipes" / "mini"
DOCUMENTS = (
    "The ferry to the island leaves at nine.",
    "Ships need a pilot in these waters, because the channel is narrow and the tide is strong.",
    "A recipe for lentil soup",
    "",
)


@pytest.fixture(scope="module")
def train():
    # As for a script: its neighbours can be imported.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPE)
        yield from _train()


def _train():
    spec = importlib.util.spec_from_file_location("mini_train", RECIPE / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mini_train"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mini_train"]


@pytest.fixture(scope="module")
def collate(train):
    tokenizer = Tokenizer.from_file(str(train.minilm_folder() / "tokenizer.json"))
    return train.Collator(LaneTokenizer(tokenizer), 256)


def group(query):
    return {
        "source": "scenarios",
        "query": query,
        "today": "2026-03-10",
        "documents": [{"text": text, "attributes": {"date": "2026-01-10"}} for text in DOCUMENTS],
        "lanes": [
            {"kind": "none", "instruction": None, "targets": [0.9, 0.5, 0.02, None]},
            {"kind": "user_context", "instruction": "I cook.", "targets": [0.0, 0.0, 1.0, 0.0]},
            {"kind": "neutral", "instruction": "Be brief.", "targets": [0.9, 0.5, 0.02, None]},
        ],
    }


def master_weights(train, model):
    live = train.freeze_bi_encoder(model)
    return train.MasterWeights(live, dict.fromkeys(live, "all"), weight_decay=0.1)


def test_before_training_the_model_is_the_bi_encoder(train):
    from sentence_transformers import SentenceTransformer

    folder = train.minilm_folder()
    model = train.read_bi_encoder(folder)
    lanes = LaneTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))
    scorer = LaneEncoderScorer(model, lanes, dtype=torch.float32)
    candidates = tuple(Candidate(text=text) for text in DOCUMENTS)
    scores = scorer.score(RerankRequest(query="when does the boat leave", candidates=candidates))

    reference = SentenceTransformer(str(folder), device="cpu")
    vectors = reference.encode(["when does the boat leave", *DOCUMENTS], normalize_embeddings=True)
    expected = torch.sigmoid(torch.tensor(8 * (vectors[1:] @ vectors[0]) - 3))
    assert torch.allclose(torch.tensor(scores.values).float(), expected, atol=1e-4)


def test_training_and_inference_give_the_same_scores(train, collate):
    torch.manual_seed(0)
    model = train.read_bi_encoder(train.minilm_folder())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if train.is_instructed(name) and parameter.dim():
                parameter.normal_(std=0.05)
    batch = collate([group("boats")])
    with torch.no_grad():
        trained = train.outputs_of(model, batch).logits.sigmoid().tolist()
    scorer = LaneEncoderScorer(model, collate.lanes, dtype=torch.float32)
    inferred = []
    for lane in group("boats")["lanes"]:
        text = f"{lane['instruction']} Today is 2026-03-10." if lane["instruction"] else ""
        candidates = tuple(
            Candidate(text=document, attributes="date: 2026-01-10 (8 weeks old)")
            for document in DOCUMENTS
        )
        request = RerankRequest(query="boats", instruction=text, candidates=candidates)
        inferred += scorer.score(request).values
    assert trained == pytest.approx(inferred, abs=1e-5)


def test_the_collator_pairs_lanes_of_the_same_document(collate):
    batch = collate([group("boats"), group("ships")])
    assert len(batch.targets) == 2 * 3 * len(DOCUMENTS)
    # Unlabelled targets are no evidence that an instruction changed anything.
    assert not batch.targets[batch.vertical].isnan().any()
    assert len(batch.equal) == 2 * len(DOCUMENTS)
    assert [part.instruction_ids is None for part in batch.requests] == [True, False]
    assert [len(part.query_ids) for part in batch.requests] == [2, 4]


def test_an_attacked_copy_deserves_the_score_of_the_clean_document(collate):
    batch = collate([{**group("boats"), "twins": [[0, 2]]}])
    neutral = len(DOCUMENTS)
    # Under the two instructions; without one there is nothing to train.
    assert batch.equal[neutral:].tolist() == [[4, 6], [8, 10]]


def test_instructions_carry_labels_for_what_they_exclude_and_whether_they_count(collate):
    asked = group("boats")
    asked["lanes"][1]["instruction"] = "Leave out ferries, show pilots."
    [_, part] = collate([asked]).requests
    [excluding, neutral] = part.exclusions.tolist()
    words = collate.lanes.content("leave out ferries, show pilots.")
    ferries = collate.lanes.content("ferries")
    at = 1 + words.index(ferries[0])
    assert [i for i, label in enumerate(excluding) if label] == [*range(at, at + len(ferries))]
    assert not any(neutral)
    assert part.strengths.tolist() == [1.0, 0.0]
    [_, unknown] = collate([{**asked, "source": "condaqa"}]).requests
    assert unknown.exclusions[0].isnan().any()


@pytest.mark.parametrize(
    ("instruction", "excluded"),
    [
        ("Leave out anything about the planet.", ["anything about the planet"]),
        ("Exclude everything but the planet", []),
        ("Not the planet but the god.", ["the planet"]),
        ("Anything but vegetarian. It has to be ready.", ["vegetarian"]),
        ("Texts on war must not appear", ["Texts on war"]),
        ("Neither rice nor beans; show peas", ["rice nor beans"]),
        ("Nothing but drama", []),
        ("No topics other than drama.", ["topics"]),
        ("I sail, and I fish.", []),
    ],
)
def test_cues_tell_what_an_instruction_excludes(train, instruction, excluded):
    spans = train.excluded_spans(instruction)
    assert [instruction[start:end].strip() for start, end in spans] == excluded


def test_a_resumed_run_draws_the_groups_it_would_have_drawn(train):
    pools = {"scenarios": [{"n": n} for n in range(10)], "rules": [{"n": -n} for n in range(3)]}
    mix = {"scenarios": 1.5, "rules": 0.5}
    drawn = [train.draw(pools, mix, 7, step) for step in range(40)]
    assert drawn == [train.draw(pools, mix, 7, step) for step in range(40)]
    counts = [sum(g == {"n": n} for groups in drawn for g in groups) for n in range(1, 10)]
    assert set(counts) == {6}  # 60 draws from 10 groups: whole epochs


def test_a_pool_may_enter_late_and_change_its_rate(train):
    pools = {"a": [{"a": n} for n in range(100)], "late": [{"late": n} for n in range(100)]}
    mix = {"a": [[0, 2.5], [4, 1.0]], "late": [[4, 1.5]]}
    counts = [[g for g in train.draw(pools, mix, 7, step)] for step in range(8)]
    assert [sum("a" in g for g in step) for step in counts] == [2, 3, 2, 3, 1, 1, 1, 1]
    assert [sum("late" in g for g in step) for step in counts] == [0, 0, 0, 0, 1, 2, 1, 2]
    seen = [g["a"] for step in counts for g in step if "a" in g]
    assert len(set(seen)) == len(seen) == 14


def test_a_checkpoint_restores_weights_and_optimiser(train, tmp_path):
    model = train.read_bi_encoder(train.minilm_folder())
    weights = master_weights(train, model)

    def step(weights, model):
        sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
        weights.step({"all": 1e-2}, 1.0)

    step(weights, model)
    weights.save(tmp_path / "checkpoint.safetensors", 1)
    step(weights, model)

    other = train.read_bi_encoder(train.minilm_folder())
    resumed = master_weights(train, other)
    assert resumed.load(tmp_path / "checkpoint.safetensors") == 1
    step(resumed, other)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_losses_are_least_where_the_targets_are_met(train):
    targets = torch.tensor([0.97, 0.02, 0.02, 0.97])
    lists = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    pairs = torch.tensor([[0, 2], [3, 1]])
    right, wrong = torch.tensor([4.0, -4.0, -4.0, 4.0]), torch.tensor([-4.0, 4.0, 4.0, -4.0])
    for loss in (
        lambda x: train.pointwise_loss(x, targets),
        lambda x: train.listwise_loss(x, targets, lists),
        lambda x: train.vertical_loss(x, targets, pairs),
    ):
        assert loss(right) < loss(torch.zeros(4)) < loss(wrong)
    assert train.equality_loss(right, torch.tensor([[0, 3]])) == 0
    assert train.equality_loss(right, torch.tensor([[0, 1]])) > 1


def test_late_interaction_has_to_rank_by_itself(train, collate):
    model, batch = train.read_bi_encoder(train.minilm_folder()), collate([group("boats")])
    out = train.outputs_of(model, batch)
    n = len(DOCUMENTS)
    assert out.late.isnan().tolist() == [True] * n + [False] * 2 * n

    losses, counts = (
        dict(zip(train.LOSSES, each, strict=True)) for each in train.losses_of_step(out, batch)
    )
    assert all(map(torch.isfinite, losses.values()))
    # Of the pairs that count, one half has a side without an instruction.
    assert counts["late_vertical"].item() == pytest.approx(0.9 + 0.5 + 0.98)
    assert counts["vertical"] == 2 * counts["late_vertical"]
    assert counts["late_listwise"] == 1

    (losses["late_listwise"] + losses["late_vertical"]).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "layers.0.qkv.up" in trained
    assert not any(name.startswith(("head_", "late_weight", "scale")) for name in trained)


def test_tokens_are_masked_alike_in_all_lanes_of_a_group(train, collate):
    def documents(masked, seed):
        batch = collate([group("boats")], masked, seed)
        rows = {}
        for part in batch.requests:
            for positions, ids, _, _ in part.passes:
                for position, row in zip(positions.tolist(), ids.tolist(), strict=True):
                    rows[position] = [each for each in row if each]
        return [rows[position] for position in range(len(rows))]

    whole, some, all_ = documents(0.0, ""), documents(0.5, "a"), documents(1.0, "a")
    n = len(DOCUMENTS)
    assert some[:n] == some[n : 2 * n] == some[2 * n :]
    assert some == documents(0.5, "a")
    assert some != documents(0.5, "b")
    frame = set(collate.lanes.frame(()))
    for before, after, masked in zip(whole, some, all_, strict=True):
        assert train.MASK not in before
        assert {new for old, new in zip(before, after, strict=True) if old != new} == {train.MASK}
        assert set(masked) == {*frame, train.MASK}
        assert [each in frame for each in masked] == [each in frame for each in before]


def test_late_alone_teaches_the_encoder_nothing_through_pooled_lanes(train, collate):
    model, batch = train.read_bi_encoder(train.minilm_folder()), collate([group("boats")])
    with torch.no_grad():
        model.late_weight.zero_()
        model.strength_output.weight.normal_()
        model.head_output.weight.normal_(std=0.1)
    whole = train.outputs_of(model, batch)
    alone = train.outputs_of(model, batch, late_alone=True)
    assert torch.equal(whole.logits, alone.logits)

    def trained(out):
        model.zero_grad()
        train.pointwise_loss(out.logits, batch.targets).backward(retain_graph=True)
        return {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    head = {"head_hidden.weight", "strength_hidden.weight", "scale"}
    assert trained(alone) > head
    assert not any(name.startswith("layers.") for name in trained(alone))
    assert trained(whole) > {*head, "layers.0.qkv.up"}


def test_a_strength_fitted_anew_tells_neutral_instructions_from_others(train, collate):
    model = train.read_bi_encoder(train.minilm_folder())
    groups = [group(query) for query in ("boats", "ships", "soup")]
    with torch.no_grad():
        inputs, labels = train.strength_examples(model, collate.lanes, [*groups, group("boats")])
    # Each pair once, and none without an instruction.
    assert inputs.shape == (6, 3 * 384)
    assert sorted(labels.tolist()) == [0.0] * 3 + [1.0] * 3
    options = {"seed": 1, "epochs": 40, "batch": 4, "learning_rate": 1e-2, "weight_decay": 0.1}
    options |= {"dropout": 0.1, "neutral_weight": 2.0}
    fitted = train.fit_strength(inputs, labels, 48, options)
    model.load_state_dict(fitted, strict=False)
    [_, part] = collate([group("canoes")]).requests
    ids, queries = part.instruction_ids, part.query_ids
    with torch.no_grad():
        instruction = model.encode_trusted(Lane.INSTRUCTION, ids, ids != 0)
        query = model.encode_trusted(Lane.QUERY, queries, queries != 0, instruction)
        strengths = model.strength(train.trust(query, instruction)).sigmoid()
    assert (strengths > 0.5).tolist() == (part.strengths > 0).tolist() == [True, False]


def test_short_instructions_are_beginnings_and_general_wishes(train):
    import build_data

    told = group("boats")
    told["lanes"][1]["instruction"] = "I cook for a camp, and the boats bring what we eat."
    context = build_data.Context(20, build_data.Wordings(), None)
    records = list(build_data.short_instructions(context, [told]))
    assert {record["query"] for record in records} == {"boats"}
    said = [lane["instruction"] for record in records for lane in record["lanes"]]
    assert said[0].rstrip(".") == "I cook for a camp"
    assert "Be brief" not in {text.rstrip(".") for text in said}
    assert {"Prefer spreadsheets.", "We are a brewery."} <= {
        text.rstrip(".") + "." for text in said
    }
    assert {text[-1] == "." for text in said} == {True, False}


def test_training_leaves_the_bi_encoder_as_it_was(train, collate, tmp_path):
    folder = train.minilm_folder()
    model = train.read_bi_encoder(folder)
    weights = master_weights(train, model)
    batch = collate([group("boats")])
    for _ in range(5):
        train.pointwise_loss(train.outputs_of(model, batch).logits, batch.targets).backward()
        weights.step({"all": 1e-2}, 1.0)
    train.save_model(
        model,
        weights.master,
        {"pooled": 0.5, "late_weight": 7.0, "late_bias": 0.1},
        folder,
        tmp_path,
    )
    start = train.read_bi_encoder(folder).state_dict()
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        kept = not train.is_instructed(name) or name.startswith("plain_")
        assert torch.equal(tensor, start[name].half()) is kept, name


def test_the_plain_score_is_the_line_that_fits_the_targets(train, collate):
    model = train.read_bi_encoder(train.minilm_folder())
    plain = {**group("boats"), "lanes": group("boats")["lanes"][:1]}
    cosines, targets = train.cosines_of(model, collate([plain]))
    assert targets.isnan().sum() == 1
    line = train.fit_line(cosines, targets)

    known = ~targets.isnan()
    logits = line["plain_scale"] * cosines[known] + line["plain_bias"]
    errors = logits.sigmoid() - targets[known]
    # Where the cross-entropy of a line is least, errors have mean zero and go with no cosine.
    assert errors.mean().abs() < 1e-3
    assert (errors * cosines[known]).mean().abs() < 1e-3


def test_a_rate_holds_from_its_step_on(train):
    assert [train.rate_at([[2, 1e-3], [4, 5e-4]], step) for step in range(6)] == [
        *(0.0, 0.0),
        *(1e-3, 1e-3),
        *(5e-4, 5e-4),
    ]
    assert train.rate_at(2, 100) == 2.0


def test_the_learning_rate_falls_to_zero_in_each_cycle(train):
    rates = [train.learning_rate_factor([10, 30], 2, step) for step in range(30)]
    assert rates[:2] == [0.5, 0.9]
    assert rates[9] == pytest.approx(0.1)
    assert rates[10:12] == [0.5, 0.95]
    assert rates[29] == pytest.approx(0.05)
    assert rates[1:10] == sorted(rates[1:10], reverse=True)


def test_processes_share_the_groups_of_a_step_by_size(train):
    groups = [{**group(str(n)), "lanes": group("")["lanes"] * (n + 1)} for n in range(7)]
    shares = [train.share_of(groups, process, 2) for process in (0, 1)]
    assert sorted(g["query"] for share in shares for g in share) == [str(n) for n in range(7)]
    assert [sum(len(g["lanes"]) for g in share) for share in shares] == [42, 42]


CONFIG = """
seed = 3
cycles = [2, 4]
means = [[1.0], [0.25, 0.75]]
warmup_steps = 1
weight_decay = 0.01
clip_norm = 1.0
tokens_per_batch = 256
save_every = 2
masked = [[2, 0.2]]
adapter_dropout = [[2, 0.2]]
late_alone_from = 3
[learning_rate]
adapters = 1e-3
gates = 1e-2
head = [[0, 1e-3], [2, 5e-4]]
others = 1e-3
[mix]
scenarios = 2
[loss]
pointwise = 1.0
listwise = 0.5
vertical = 0.7
equality = 1.0
exclusion = 0.5
strength = 0.1
late_listwise = 0.3
late_vertical = [[2, 0.4]]
[saved]
pooled = 0.5
late_weight = 8.0
late_bias = 0.25

[strength]
seed = 1
epochs = 3
batch = 2
learning_rate = 1e-2
weight_decay = 0.1
dropout = 0.5
neutral_weight = 2.0
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The script itself, as it is run, on two groups; returns the weights."""
    folder = tmp_path_factory.mktemp("run")
    plain = {**group("boats"), "source": "plain", "lanes": group("boats")["lanes"][:1]}
    # Of unlike size, and one of them without a pair that should be equal.
    small = {**group("soup"), "lanes": group("soup")["lanes"][1:2]}
    with gzip.open(folder / "train.jsonl.gz", "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(g) + "\n" for g in [group("boats"), small, plain])
    short = {"query": "boats", "lanes": [{"kind": "short", "instruction": "Sailing"}]}
    (folder / "short.jsonl.gz").write_bytes(gzip.compress(json.dumps(short).encode()))
    (folder / "config.toml").write_text(CONFIG, encoding="utf-8")

    def run(out, processes, *options):
        command = [sys.executable, RECIPE / "train.py", "--data", folder, "--out", folder / out]
        command += ["--config", folder / "config.toml", "--processes", processes, *options]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return load_file(folder / out / "model" / "model.safetensors")

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def whole(run):
    return run("my whole run", 2)


@pytest.fixture(scope="module")
def half(run):
    return run("halves", 2, "--steps", 2)


def test_an_interrupted_run_ends_as_the_whole_one_would(run, half, whole):
    resumed = run("halves", 2)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_the_model_is_the_mean_of_the_ends_of_cycles(run, whole):
    first, second = (
        load_file(run.folder / "my whole run" / f"step-{n}.safetensors") for n in (2, 4)
    )
    for name, share in (("scale", 0.5), ("layers.0.qkv.up", 1.0), ("head_hidden.weight", 1.0)):
        mean = share * (0.25 * first[name] + 0.75 * second[name])
        assert torch.allclose(whole[name].float(), mean, atol=2e-3, rtol=1e-3), name
        last = share * second[name]
        assert not torch.allclose(whole[name].float(), last, atol=1e-6, rtol=1e-6), name
    assert (whole["late_weight"], whole["late_bias"]) == (8.0, 0.25)
    fitted, before = (w["strength_hidden.weight"].float() for w in (whole, second))
    assert not torch.allclose(fitted, before, atol=1e-2)


def test_the_number_of_processes_does_not_change_what_is_learned(run, half, train):
    start = train.read_bi_encoder(train.minilm_folder()).state_dict()
    # Up to the steps that leave things out by chance.
    trained = [run("one", 1, "--steps", 2), half, run("three", 3, "--steps", 2)]
    one, *others = (
        torch.cat([w[n].flatten() - start[n].half().flatten() for n in half if n.endswith("_gate")])
        for w in trained
    )
    # In bfloat16, batches of other shapes find another token most like one of the instruction's.
    for other in others:  # With three, one of them has nothing to do.
        assert (other - one).float().norm() < 0.1 * one.float().norm()
