"""Plain cross-encoders score as transformers does, and take no instruction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lanerank import Reranker
from lanerank.checkpoint import load_scorer
from lanerank.contracts import Candidate, RerankRequest, Scorer
from lanerank.errors import InputError, InstructionNotSupportedError, ModelLoadError
from lanerank.scoring.cross_encoder import CrossEncoderScorer
from lanerank.scoring.prompts import PairTokenizer
from lanerank.template import Mapping01, PromptTemplate

CLOSE = 1e-5
PLAIN = PromptTemplate(family="plain", kind="cross_encoder", max_tokens=128)
TEXTS = [
    "a red fish",
    "",
    "the team is hiring a coach for the olympiad " * 6,
    "blue 🦜 fish",
    "the",
]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 1,
    "pad_token_id": 0,
}
FRAMES = {
    "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "xlm-roberta": ("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]"),
    "modernbert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"),
}


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer) -> dict[str, Tokenizer]:
    framed = {}
    special = [(token, tiny_tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    for kind, (single, pair) in FRAMES.items():
        framed[kind] = Tokenizer.from_str(tiny_tokenizer.to_str())
        framed[kind].post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=special
        )
    return framed


def build(kind: str, tokenizer: Tokenizer, **changes):
    config = AutoConfig.for_model(
        kind, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=160, **SIZES | changes
    )
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def make(tokenizers):
    def make(kind: str = "bert", template: PromptTemplate = PLAIN, **options) -> CrossEncoderScorer:
        model = build(kind, tokenizers[kind])
        return CrossEncoderScorer(model, tokenizers[kind], template, **options)

    return make


@pytest.fixture(scope="module")
def scorer(make) -> CrossEncoderScorer:
    return make()


def request(texts=TEXTS, *, query="red fish", **fields) -> RerankRequest:
    candidates = tuple(Candidate(text=text) for text in texts)
    return RerankRequest(query=query, candidates=candidates, **fields)


@pytest.mark.parametrize("kind", FRAMES)
def test_scores_equal_those_of_transformers(kind, make, tokenizers) -> None:
    scorer = make(kind)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizers[kind].to_str()), pad_token="[PAD]"
    )
    pairs = wrapped(
        ["red fish"] * len(TEXTS),
        TEXTS,
        padding=True,
        truncation="only_second",
        max_length=128,
        return_tensors="pt",
        return_token_type_ids=kind == "bert",
    )
    with torch.no_grad():
        expected = scorer.model(**pairs).logits[:, 0].sigmoid().tolist()
    scores = scorer.score(request())
    assert scores.values == pytest.approx(expected, abs=CLOSE)
    assert max(expected) - min(expected) > 0.01
    assert isinstance(scorer, Scorer)


@settings(max_examples=10)
@given(others=st.lists(st.sampled_from(TEXTS), max_size=6), limit=st.sampled_from([1, 64, 4096]))
def test_a_score_does_not_depend_on_the_batch(others, limit, scorer) -> None:
    [alone] = scorer.score(request([TEXTS[2]])).values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scorer, "tokens_per_batch", limit)
        scores = scorer.score(request([*others, TEXTS[2], *others]))
    assert scores.values[len(others)] == pytest.approx(alone, abs=CLOSE)


@given(data=st.data())
def test_no_document_can_hold_a_special_token(data, tokenizers, troublesome_text) -> None:
    for tokenizer in tokenizers.values():
        pairs = PairTokenizer(tokenizer, 64)
        query = pairs.query("red fish")
        frame = pairs.windows(0, Candidate(text=""), "truncate", query)[0][0].ids
        candidate = Candidate(text=data.draw(troublesome_text), attributes="date: old")
        mode = data.draw(st.sampled_from(["truncate", "max_window"]))
        for window in pairs.windows(0, candidate, mode, query)[0]:
            markers = [token for token in window.ids if token in pairs.reserved_ids]
            assert markers == [token for token in frame if token in pairs.reserved_ids]
            assert len(window) <= 64
            assert len(window.types) == len(window)


def test_the_unknown_token_stays_since_the_model_was_trained_on_it(tokenizers) -> None:
    pairs = PairTokenizer(tokenizers["bert"], 64)
    [window], _ = pairs.windows(0, Candidate(text="🦜"), "truncate", pairs.query("red"))
    assert tokenizers["bert"].token_to_id("[UNK]") in window.ids


def test_only_the_document_is_cut(scorer) -> None:
    query = scorer.pairs.query("red fish " * 20)
    [window], cut = scorer.pairs.windows(0, Candidate(text=TEXTS[2] * 9), "truncate", query)
    assert cut
    assert len(window) == 128
    assert window.ids[1 : 1 + len(query)] == query


def test_windows_cover_a_long_document(scorer) -> None:
    query = scorer.pairs.query("red fish")
    candidate = Candidate(text="the team is hiring " * 200, attributes="source: coach")
    windows, cut = scorer.pairs.windows(0, candidate, "max_window", query)
    assert not cut
    assert len(windows) > 5
    assert all(len(window) <= 128 for window in windows)
    scores = scorer.score(request([candidate.text], long_documents="max_window"))
    assert 0 < scores.values[0] < 1
    assert scores.truncated == (False,)


def test_windows_say_so_where_attributes_are_cut(scorer) -> None:
    query = scorer.pairs.query("red fish")
    candidate = Candidate(text="the team is hiring " * 200, attributes="source: coach " * 60)
    assert scorer.pairs.windows(0, candidate, "max_window", query)[1]


def test_a_query_that_leaves_no_room_is_refused(scorer) -> None:
    with pytest.raises(InputError, match=r"`query` has 200 tokens and leaves no room"):
        scorer.score(request(query="red fish " * 100))


def test_positions_that_start_late_are_not_exceeded(make) -> None:
    # XLM-RoBERTa counts positions from one after its padding id, so 160 of them hold 159 tokens.
    scorer = make("xlm-roberta", PLAIN.model_copy(update={"max_tokens": 8192}))
    assert scorer.pairs.max_tokens == 159
    assert scorer.score(request([TEXTS[2] * 20])).truncated == (True,)


def test_an_instruction_is_refused_and_can_be_prepended(scorer) -> None:
    assert scorer.supports_instructions is False
    with pytest.raises(InstructionNotSupportedError, match="'plain' has no place"):
        scorer.score(request(instruction="prefer red"))
    with pytest.raises(InstructionNotSupportedError, match="choose `on_unsupported="):
        Reranker(scorer).rank("fish", TEXTS, instruction="prefer red")
    ranking = Reranker(scorer, on_unsupported="prepend").rank("fish", TEXTS, instruction="red")
    assert ranking.instruction_applied == "prepended"


def test_the_mapping_of_the_contract_counts(make) -> None:
    shifted = PLAIN.model_copy(update={"mapping": Mapping01(shift=1.0, scale=2.0)})
    plain, mapped = make().score(request()).values, make(template=shifted).score(request()).values
    raw = torch.tensor(plain, dtype=torch.float64).logit()
    assert mapped == pytest.approx(((raw - 1) / 2).sigmoid().tolist(), abs=CLOSE)


def test_a_classifier_of_something_else_is_refused(tokenizers) -> None:
    model = build("bert", tokenizers["bert"], num_labels=3)
    with pytest.raises(ModelLoadError, match="this model has 3 labels"):
        CrossEncoderScorer(model, tokenizers["bert"], PLAIN)


def test_a_tokenizer_that_frames_no_pairs_is_refused(tiny_tokenizer) -> None:
    with pytest.raises(ModelLoadError, match="nothing between the two texts"):
        CrossEncoderScorer(build("bert", tiny_tokenizer), tiny_tokenizer, PLAIN)


def test_progress_is_told(make) -> None:
    told = []
    make(tokens_per_batch=1).score(request(progress=lambda *counts: told.append(counts)))
    assert told == [(done, len(TEXTS)) for done in range(1, len(TEXTS) + 1)]


def test_a_model_of_modules_scores_as_sentence_transformers_does(tokenizers, tmp_path) -> None:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
    from transformers import AutoModel

    encoder = tmp_path / "encoder"
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizers["modernbert"].to_str()),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    wrapped.save_pretrained(encoder)
    AutoModel.from_config(build("modernbert", tokenizers["modernbert"]).config).save_pretrained(
        encoder
    )
    torch.manual_seed(5)
    theirs = CrossEncoder(
        modules=[
            Transformer(str(encoder), transformer_task="feature-extraction"),
            Pooling(32, pooling_mode="cls"),
            Dense(32, 32, bias=False, activation_function=torch.nn.GELU()),
            LayerNorm(32),
            Dense(32, 1, activation_function=torch.nn.Identity(), module_output_name="scores"),
        ],
        device="cpu",
    )
    theirs.save_pretrained(str(tmp_path / "model"))
    expected = theirs.predict(
        [("red fish", text) for text in TEXTS], activation_fn=torch.nn.Sigmoid()
    )
    ours = load_scorer(tmp_path / "model", contract="ettin-reranker", dtype="float32")
    assert ours.score(request()).values == pytest.approx(expected.tolist(), abs=1e-4)
