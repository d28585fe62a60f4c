"""A model loads whole or not at all, and the message says which file is wrong."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lanerank.checkpoint import load_scorer
from lanerank.contracts import Candidate, RerankRequest, Scorer
from lanerank.errors import InputError, ModelLoadError

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


def test_weights_that_are_not_numbers_load_and_their_scores_are_reported(folder) -> None:
    edit_weights(folder, lambda state: state["bias"].fill_(float("nan")))
    values = load_scorer(folder).score(REQUEST).values
    assert all(math.isnan(value) for value in values)
