"""A model loads whole or not at all, and the message says which file is wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lanerank import Reranker, checkpoint
from lanerank.calibration import CalibratedScorer, Calibrator
from lanerank.checkpoint import load_scorer
from lanerank.contracts import Candidate, RerankRequest, Scorer
from lanerank.errors import InputError, MissingExtraError, ModelLoadError
from lanerank.scoring.causal_lm import CausalLMScorer
from lanerank.scoring.cross_encoder import CrossEncoderScorer
from lanerank.scoring.lane_encoder import LaneEncoderScorer
from lanerank.template import PromptTemplate

REQUEST = RerankRequest(
    query="red fish",
    instruction="prefer marine",
    candidates=(Candidate(text="a red fish"), Candidate(text="a coach", attributes="date: old")),
)


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not ...}))


def edit_weights(folder, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


# What loads


def test_a_folder_gives_the_scores_of_the_model_that_was_saved(
    tiny_model_folder, tiny_scorer
) -> None:
    scorer = load_scorer(tiny_model_folder, dtype="float32")
    assert isinstance(scorer, Scorer)
    assert scorer.score(REQUEST).values == pytest.approx(
        tiny_scorer.score(REQUEST).values, abs=1e-6
    )


@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_a_model_in_a_folder_is_named_after_it(tiny_model_folder, as_type) -> None:
    assert load_scorer(as_type(tiny_model_folder)).name == "tiny"


def test_loading_does_not_change_the_files(folder) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    load_scorer(folder, dtype="bfloat16").score(REQUEST)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_precision_load_in_any(folder, dtype, stored, tiny_scorer) -> None:
    def store(state) -> None:
        state.update({name: tensor.to(stored) for name, tensor in state.items()})

    edit_weights(folder, store)
    values = load_scorer(folder, dtype=dtype).score(REQUEST).values
    assert values == pytest.approx(tiny_scorer.score(REQUEST).values, abs=0.05)


def test_lanes_take_their_budgets_from_the_config(tiny_model_folder) -> None:
    budgets = load_scorer(tiny_model_folder).lanes.budgets
    assert (budgets.instruction, budgets.query, budgets.document) == (128, 128, 128)
    assert budgets.attributes == 32
    assert 0 < budgets.window_overlap < 64


@pytest.mark.parametrize("positions", [16, 40, 64])
@pytest.mark.parametrize("mode", ["truncate", "max_window"])
def test_a_model_with_few_positions_reads_long_documents(folder, positions, mode) -> None:
    edit_config(folder, max_position_embeddings=positions)

    def shorten(state) -> None:
        table = state["position_embeddings.weight"]
        state["position_embeddings.weight"] = table[:positions].clone()

    edit_weights(folder, shorten)
    long = Candidate(text="red fish " * 200, attributes="date: old " * 20)
    scores = load_scorer(folder).score(
        RerankRequest(query="red", candidates=(long, Candidate(text="red")), long_documents=mode)
    )
    assert all(0 < value < 1 for value in scores.values)
    assert scores.truncated == (True, False)


# What does not


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def shorten(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(folder) -> None:
    edit_weights(folder, lambda state: state.pop("layers.1.qkv.weight"))


def add_tensor(folder) -> None:
    edit_weights(folder, lambda state: state.update(surplus=torch.zeros(1)))


def reshape_tensor(folder) -> None:
    edit_weights(folder, lambda state: state.update({"head_output.weight": torch.zeros(1, 31)}))


def integer_tensor(folder) -> None:
    weight = torch.zeros(1, 32, dtype=torch.int64)
    edit_weights(folder, lambda state: state.update({"head_output.weight": weight}))


def configure(**changes):
    return lambda folder: edit_config(folder, **changes)


def plain_tokenizer(folder) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("[CLS]", "[XXX]"))


def large_vocabulary(folder) -> None:
    path = folder / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["vocab"]["zebra"] = 100_000
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(remove("config.json"), "config.json is missing", id="no config"),
        pytest.param(remove("model.safetensors"), "safetensors is missing", id="no weights"),
        pytest.param(remove("tokenizer.json"), "tokenizer.json is missing", id="no tokenizer"),
        pytest.param(write("config.json", b"{"), "config.json is not JSON", id="half a config"),
        pytest.param(write("config.json", b""), "config.json is not JSON", id="empty config"),
        pytest.param(write("config.json", b"\xff\xfe"), "config.json is not JSON", id="no text"),
        pytest.param(write("config.json", b"[1]"), "type None", id="config is a list"),
        pytest.param(configure(model_type="bert"), "type 'bert'", id="another model"),
        pytest.param(configure(model_type=...), "type None", id="no model type"),
        pytest.param(configure(hidden_size="big"), "config.json", id="size is text"),
        pytest.param(configure(hidden_size=-32), "config.json", id="negative size"),
        pytest.param(configure(hidden_size=64), "does not fit its config", id="another size"),
        pytest.param(configure(num_attention_heads=0), "config.json", id="no heads"),
        pytest.param(configure(num_attention_heads=5), "config.json", id="heads do not divide"),
        pytest.param(configure(num_hidden_layers=3), "does not fit its config", id="more layers"),
        pytest.param(configure(max_position_embeddings=2), "config.json", id="no positions"),
        pytest.param(configure(attributes_budget=0), "config.json", id="no attributes"),
        pytest.param(configure(dtype="float7"), "config.json is not usable", id="no such dtype"),
        pytest.param(write("model.safetensors", b""), "is corrupt", id="empty weights"),
        pytest.param(write("model.safetensors", b"garbage" * 99), "is corrupt", id="garbage"),
        pytest.param(shorten, "is corrupt", id="truncated weights"),
        pytest.param(drop_tensor, "layers.1.qkv.weight", id="missing tensor"),
        pytest.param(add_tensor, "surplus", id="extra tensor"),
        pytest.param(reshape_tensor, "head_output.weight", id="wrong shape"),
        pytest.param(integer_tensor, "does not fit its config", id="wrong type"),
        pytest.param(write("tokenizer.json", b"{}"), "not a tokenizer", id="empty tokenizer"),
        pytest.param(write("tokenizer.json", b"\xff"), "not a tokenizer", id="binary tokenizer"),
        pytest.param(plain_tokenizer, r"no '\[CLS\]' token", id="tokenizer without markers"),
        pytest.param(large_vocabulary, "vocab", id="tokenizer of another model"),
    ],
)
def test_a_damaged_model_is_refused_with_one_line_that_names_the_cause(
    folder, damage, message
) -> None:
    damage(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_scorer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "values", "expected"),
    [
        ("hidden_size", (-32, 0, True, "32", 32.0, None, 10**18), "a whole number from 1 to"),
        ("attributes_budget", (2, -1, False), "a whole number from 3 to"),
        ("pad_token_id", (-1, 10**6, "0", True), "null or a whole number from 0 to"),
        ("layer_norm_eps", (0.0, -1e-12, 1.5, math.nan, "1e-12", True), "a number above 0"),
        ("neutral_below", (5, -0.1, math.nan, "0.2", True, None), "a number from 0 to 1"),
    ],
)
def test_a_field_of_a_config_that_is_not_usable_is_named_with_its_value_and_range(
    folder, field, values, expected
) -> None:
    for value in values:
        edit_config(folder, **{field: value})
        message = re.escape(f"`{field}` must be {expected}") + f".*, got {re.escape(repr(value))};"
        with pytest.raises(ModelLoadError, match=message):
            load_scorer(folder)


@pytest.mark.parametrize("changes", [{"neutral_below": 0}, {"neutral_below": 1.0}])
def test_the_ends_of_a_range_belong_to_it(folder, changes) -> None:
    edit_config(folder, **changes)
    assert load_scorer(folder).score(REQUEST).neutral is (changes["neutral_below"] == 1)


@pytest.mark.parametrize(
    "name", ["no-such-model", "/no/such/folder", "./missing", "a/b/c", "..", "../lanerank-mini/x"]
)
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError):
        load_scorer(name)


@pytest.mark.parametrize("name", ["lanerank/no-such-model", "not a/valid id", "-x/--y"])
@pytest.mark.parametrize("local_files_only", [True, False])
def test_a_hub_id_that_cannot_be_fetched_is_an_error_that_names_it(name, local_files_only) -> None:
    with pytest.raises(ModelLoadError, match=f"cannot fetch '{name}'") as caught:
        load_scorer(name, local_files_only=local_files_only)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["tpu9", "", "cuda:99", "cpu:x", "CPU please"])
def test_an_unknown_device_is_refused(device, tiny_model_folder) -> None:
    with pytest.raises(InputError, match="`device="):
        load_scorer(tiny_model_folder, device=device)


@pytest.mark.parametrize("dtype", ["float64", "int8", "", None, 16])
def test_an_unknown_precision_is_refused(dtype, tiny_model_folder) -> None:
    with pytest.raises(InputError, match="`dtype` must be one of auto, float32"):
        load_scorer(tiny_model_folder, dtype=dtype)


@pytest.mark.parametrize("limit", [-5, 0, 1.5, True, "x"])
def test_a_batch_limit_that_is_no_number_of_tokens_is_refused(limit, tiny_model_folder) -> None:
    with pytest.raises(InputError, match=f"`tokens_per_batch` must be an int .*, got {limit!r}"):
        load_scorer(tiny_model_folder, tokens_per_batch=limit)


@pytest.mark.parametrize("name", ["folder", "lanerank-mini", None])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(name, folder) -> None:
    with pytest.raises(InputError, match="`revision='main'` is for a model on the Hugging Face"):
        load_scorer(folder if name == "folder" else name, revision="main")


def test_weights_that_are_not_numbers_load_and_their_scores_are_reported(folder) -> None:
    edit_weights(folder, lambda state: state["bias"].fill_(float("nan")))
    values = load_scorer(folder).score(REQUEST).values
    assert all(math.isnan(value) for value in values)


# Causal language models and cross-encoders, by contract

CONTRACT = {
    "family": "mine",
    "kind": "causal_lm",
    "segments": [
        {"fixed": "<|im_start|>user\nRule:"},
        {"lane": "instruction", "before": " ", "after": "\n"},
        {"lane": "query", "before": "Find: ", "after": "\n"},
        {"lane": "document"},
        {"fixed": "<|im_end|>\n<|im_start|>assistant\n"},
    ],
    "default_instruction": "Anything goes.",
    "special_tokens": ["<|im_start|>", "<|im_end|>"],
    "answers": {"positive": {"token": "yes"}, "negative": {"token": "no"}},
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def causal_model(tmp_path_factory):
    """A random Qwen3 with a small tokenizer and a chat template, in several files."""
    folder = tmp_path_factory.mktemp("models") / "causal"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["yes", "no", "fish"] * 9, trainer)
    special = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = CHAT
    wrapped.save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file()
    (folder / "lanerank.json").write_text(json.dumps(CONTRACT))
    return folder


@pytest.fixture
def causal_folder(causal_model, tmp_path):
    return shutil.copytree(causal_model, tmp_path / "causal")


@pytest.fixture(scope="module")
def cross_encoder_folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models") / "pairs"
    tokenizer = Tokenizer.from_str(tiny_tokenizer.to_str())
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_folder_with_a_contract_gives_the_scorer_it_asks_for(causal_model) -> None:
    scorer = load_scorer(causal_model, dtype="float32")
    assert isinstance(scorer, CausalLMScorer)
    assert (scorer.name, scorer.template.family) == ("causal", "mine")
    values = scorer.score(REQUEST).values
    model = Qwen3ForCausalLM.from_pretrained(causal_model, dtype=torch.float32)
    prompt = scorer.prompts.prompt(REQUEST.query, REQUEST.instruction)
    [window], _ = scorer.prompts.windows(0, REQUEST.candidates[0], "truncate", prompt)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.prefix, *window.ids]])).logits[0, -1]
    yes, no = scorer.prompts.answer_ids
    assert values[0] == pytest.approx((logits[yes] - logits[no]).sigmoid().item(), abs=1e-5)


def test_a_contract_can_be_handed_over_in_three_ways(causal_folder, tmp_path) -> None:
    (causal_folder / "lanerank.json").rename(tmp_path / "mine.json")
    ways = (tmp_path / "mine.json", str(tmp_path / "mine.json"), PromptTemplate(**CONTRACT))
    values = [load_scorer(causal_folder, contract=way).score(REQUEST).values for way in ways]
    assert values[0] == values[1] == values[2]


def test_a_contract_that_is_handed_over_goes_before_the_one_in_the_folder(causal_model) -> None:
    scorer = load_scorer(causal_model, contract="yes-no-judge")
    assert scorer.template.family == "yes-no-judge"
    opening = scorer.template.segments[0].fixed
    assert opening.startswith("<|im_start|>user\nJudge whether")
    assert scorer.template.segments[-1].fixed.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_reranker_takes_the_options_of_causal_models(causal_model) -> None:
    reranker = Reranker.from_pretrained(
        causal_model, attn_implementation="eager", tokens_per_batch=64, share_prefix=False
    )
    ranking = reranker.rank("red fish", ["a red fish", "a coach"], instruction="prefer marine")
    assert ranking.instruction_applied == "lane"
    assert reranker.scorer.model.config._attn_implementation == "eager"
    assert (reranker.scorer.tokens_per_batch, reranker.scorer.share_prefix) == (64, False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_loaded_in_the_precision_asked_for(causal_model, dtype) -> None:
    assert load_scorer(causal_model, dtype=dtype).model.dtype is getattr(torch, dtype)


def test_a_cross_encoder_needs_a_contract_too(cross_encoder_folder) -> None:
    scorer = load_scorer(cross_encoder_folder, contract="cross-encoder/ms-marco-MiniLM-L6-v2")
    assert isinstance(scorer, CrossEncoderScorer)
    request = RerankRequest(query="red", candidates=REQUEST.candidates)
    assert all(0 < value < 1 for value in scorer.score(request).values)
    with pytest.raises(ModelLoadError, match=r"type 'bert', and no contract.*put a lanerank\.json"):
        load_scorer(cross_encoder_folder)


def drop_shard(folder) -> None:
    next(folder.glob("model-*.safetensors")).unlink()


def only_bin(folder) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def drop_weight(folder) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = folder / index["weight_map"]["lm_head.weight"]
    state = load_file(shard)
    del state["lm_head.weight"]
    save_file(state, shard, metadata={"format": "pt"})
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))


def damage_shard(folder) -> None:
    path = next(folder.glob("model-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-50])


def contract(**changes):
    def write_contract(folder) -> None:
        (folder / "lanerank.json").write_text(json.dumps({**CONTRACT, **changes}))

    return write_contract


def drop_chat_template(folder) -> None:
    for path in folder.glob("chat_template*"):
        path.unlink()
    (folder / "lanerank.json").write_text('{"family": "yes-no-judge"}')


def need_code(folder) -> None:
    edit_config(folder, model_type="special", auto_map={"AutoModelForCausalLM": "special.Model"})
    (folder / "special.py").write_text("raise RuntimeError('this code must not run')")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(drop_shard, "lacks model-0", id="no shard"),
        pytest.param(only_bin, r"pytorch_model\.bin, which can run code", id="pickle"),
        pytest.param(
            write("model.safetensors.index.json", b"[]"), "index.json is not usable", id="index"
        ),
        pytest.param(drop_weight, r"lm_head\.weight \(1 in all\)", id="missing tensor"),
        pytest.param(damage_shard, "cannot be loaded", id="short shard"),
        pytest.param(write("config.json", b"{"), "has no usable tokenizer|cannot be", id="config"),
        pytest.param(write("tokenizer.json", b"{}"), "no usable tokenizer", id="tokenizer"),
        pytest.param(
            write("lanerank.json", b"{}"),
            r"lanerank\.json cannot be used as a contract",
            id="empty",
        ),
        pytest.param(contract(promt=1), "`promt`: Extra inputs", id="typing mistake"),
        pytest.param(contract(special_tokens=["<think>"]), "'<think>' as one", id="special"),
        pytest.param(
            contract(answers={"positive": {"token": "yes", "id": 3}}),
            "token .* here, not 3",
            id="id",
        ),
        pytest.param(drop_chat_template, "has no chat template", id="no chat template"),
        pytest.param(need_code, "cannot be loaded|no usable tokenizer", id="remote code"),
    ],
)
def test_a_damaged_causal_model_is_refused_with_one_line(causal_folder, damage, message) -> None:
    damage(causal_folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_scorer(causal_folder)
    assert "\n" not in str(caught.value)


def test_a_listwise_model_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(
        ModelLoadError, match="'jinaai/jina-reranker-v3' is refused: it is listwise"
    ):
        load_scorer("jinaai/jina-reranker-v3")


def test_a_model_that_needs_code_is_refused_until_that_is_allowed() -> None:
    name = "Alibaba-NLP/gte-multilingual-reranker-base"
    with pytest.raises(ModelLoadError, match="pass `trust_remote_code=True`"):
        load_scorer(name)
    with pytest.raises(ModelLoadError, match="cannot fetch"):
        load_scorer(name, trust_remote_code=True)


def test_a_known_model_is_looked_up_by_its_exact_id() -> None:
    with pytest.raises(ModelLoadError, match="cannot fetch 'zeroentropy/zerank-2'"):
        load_scorer("zeroentropy/zerank-2")


def test_a_contract_that_is_not_known_names_the_nearest(causal_model) -> None:
    with pytest.raises(InputError, match="near it are 'zeroentropy/zerank-2'"):
        load_scorer(causal_model, contract="zeroentropy/zerank2")


def test_a_model_without_contract_says_how_to_write_one(causal_folder) -> None:
    (causal_folder / "lanerank.json").unlink()
    with pytest.raises(ModelLoadError, match=r"type 'qwen3', and no contract.*pass `contract=`"):
        load_scorer(causal_folder)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"attn_implementation": "sdpa"}, "attn_implementation"),
        ({"quantization": "8bit"}, "quantization"),
        ({"device_map": "auto"}, "device_map"),
        ({"compile_model": True}, "compile"),
    ],
)
def test_options_that_a_lane_encoder_cannot_use_are_refused(options, name) -> None:
    with pytest.raises(InputError, match=f"`{name}.*` is not for a lane encoder"):
        load_scorer(**options)


def test_an_unknown_quantization_is_refused(causal_model) -> None:
    with pytest.raises(
        InputError, match="`quantization` must be '8bit', '4bit' or None, got 'int8'"
    ):
        load_scorer(causal_model, quantization="int8")


def test_quantization_without_its_package_says_what_to_install(causal_model) -> None:
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(MissingExtraError, match="pip install bitsandbytes"):
        load_scorer(causal_model, quantization="4bit")


def test_a_batch_limit_reaches_every_kind_of_scorer(
    tiny_model_folder, causal_model, cross_encoder_folder
) -> None:
    for scorer in (
        load_scorer(tiny_model_folder, tokens_per_batch=99),
        load_scorer(causal_model, tokens_per_batch=99),
        load_scorer(cross_encoder_folder, contract="granite-reranker", tokens_per_batch=99),
    ):
        assert scorer.tokens_per_batch == 99


def test_no_folder_can_pass_for_the_model_in_the_package(folder, tmp_path, monkeypatch) -> None:
    folder.rename(tmp_path / "lanerank-mini")
    monkeypatch.chdir(tmp_path)
    for name in (None, "lanerank-mini"):
        assert load_scorer(name).model.config.vocab_size == 30522
    assert load_scorer("./lanerank-mini").model.config.vocab_size < 30522


# What was saved beside the model

CALIBRATOR = Calibrator(method="platt", slope=0.5, intercept=-1.0, pairs=100)
KINDS = {
    "tiny_model_folder": (LaneEncoderScorer, None),
    "causal_model": (CausalLMScorer, None),
    "cross_encoder_folder": (CrossEncoderScorer, "granite-reranker"),
}


@pytest.fixture(params=KINDS)
def calibrated_model(request, tmp_path):
    """A folder with a calibrator, the scorer that is in it, and the contract that it needs."""
    folder = shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model")
    CALIBRATOR.save(folder)
    return folder, *KINDS[request.param]


def plain(scorer):
    return scorer.score(RerankRequest(query="red fish", candidates=REQUEST.candidates)).values


def test_every_kind_of_model_is_calibrated_by_the_file_beside_it(calibrated_model) -> None:
    folder, kind, contract = calibrated_model
    scorer = load_scorer(folder, contract=contract, dtype="float32")
    assert isinstance(scorer, CalibratedScorer)
    assert isinstance(scorer.scorer, kind)
    assert (scorer.name, scorer.calibrator) == ("model (calibrated: platt)", CALIBRATOR)
    raw = load_scorer(folder, contract=contract, dtype="float32", calibrated=False)
    assert isinstance(raw, kind)
    assert raw.name == "model"
    assert raw.supports_instructions is scorer.supports_instructions
    assert plain(scorer) == pytest.approx(CALIBRATOR.apply(plain(raw)).tolist())
    assert plain(scorer) != pytest.approx(plain(raw))


def test_the_reranker_takes_the_model_with_or_without_its_calibrator(folder) -> None:
    CALIBRATOR.save(folder)
    texts = ["a red fish", "a coach", "the maritime team"]
    calibrated, raw, default = (
        Reranker.from_pretrained(folder, dtype="float32", **options).rank("red fish", texts)
        for options in ({"calibrated": True}, {"calibrated": False}, {})
    )
    assert calibrated == default
    assert calibrated.model == "model (calibrated: platt)"
    assert raw.model == "model"
    assert [each.index for each in calibrated] == [each.index for each in raw]
    assert [each.score for each in calibrated] == pytest.approx(
        CALIBRATOR.apply([each.score for each in raw]).tolist()
    )


def test_a_model_without_the_file_is_not_wrapped(tiny_model_folder) -> None:
    for name in (None, tiny_model_folder):
        assert isinstance(load_scorer(name), LaneEncoderScorer)


def link_to_nowhere(folder) -> None:
    (folder / "calibration.json").symlink_to(folder / "absent.json")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(write("calibration.json", b""), id="empty"),
        pytest.param(write("calibration.json", b'{"method": "platt", "slope": 1}'), id="half"),
        pytest.param(write("calibration.json", b'{"bits": 4}'), id="of another library"),
        pytest.param(lambda folder: (folder / "calibration.json").mkdir(), id="folder"),
        pytest.param(link_to_nowhere, id="link to nowhere"),
    ],
)
def test_a_calibration_that_cannot_be_used_is_not_passed_over_in_silence(folder, damage) -> None:
    damage(folder)
    with pytest.raises(ModelLoadError, match=r"calibration\.json cannot be used") as caught:
        load_scorer(folder)
    assert "\n" not in str(caught.value)
    assert "`calibrated=False`" in str(caught.value)
    assert isinstance(load_scorer(folder, calibrated=False), LaneEncoderScorer)


def test_the_file_is_fetched_with_the_model(calibrated_model, tmp_path, monkeypatch) -> None:
    folder, kind, contract = calibrated_model
    (folder / "notes.txt").write_text("not a part of the model")

    def hub(name, *, allow_patterns, **options):
        names = [path.name for path in folder.iterdir()]
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir(exist_ok=True)
        for each in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(folder / each, snapshot)
        return str(snapshot)

    monkeypatch.setattr(checkpoint, "snapshot_download", hub)
    scorer = load_scorer("owner/model", contract=contract)
    assert isinstance(scorer.scorer, kind)
    assert scorer.calibrator == CALIBRATOR
    assert scorer.name == "owner/model (calibrated: platt)"
    assert not (tmp_path / "snapshot" / "notes.txt").exists()
