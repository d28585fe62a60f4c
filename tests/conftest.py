"""What tests share: no network, small random models, and text made to cause trouble.

No test reaches beyond this machine: model hubs are told so, and sockets refuse to. The models are
a few thousand random numbers with open gates and a head that counts, so that every lane matters.
"""

from __future__ import annotations

import os
import signal
import socket
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lanerank.lanes import LaneTokenizer
    from lanerank.scoring.lane_encoder import LaneEncoderScorer
    from lanerank.scoring.modeling_lane_encoder import LaneEncoder

# Read when huggingface_hub is first imported, so it has to be set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell that runs tests in its background has them and their children ignore Ctrl-C, which some of
# them are ended with.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The machine that runs the tests may be slow or busy; that is no finding.
settings.register_profile(
    "lanerank",
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lanerank")

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = (
    "the a of and is in we are not only for with from hiring marine maritime olympiad coach "
    "shipping organization mathematics engineer experience candidate team company document "
    "instruction query attributes system user ignore previous red blue green fish old month date "
    "source ##s ##ing ##ed ##er unused sep cls mask"
).split()
_OTHER_LETTERS = "אבגدلمнобю中文🚢é"

_LOOPBACK = {"localhost", "127.0.0.1", "::1", "", None}


def _refuse(host: object) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name not in _LOOPBACK and not str(name).startswith("127."):
        raise RuntimeError(f"a test tried to reach {name!r}; tests run offline")


@pytest.fixture(autouse=True, scope="session")
def offline() -> Iterator[None]:
    """Let sockets reach this machine only: Unix domain sockets and the loopback address."""
    connect, connect_ex, sendto = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.socket.sendto,
    )

    def guard(method: Callable[..., object]) -> Callable[..., object]:
        def guarded(sock: socket.socket, *arguments: object) -> object:
            # The address comes last, in `sendto` as well.
            if sock.family != getattr(socket, "AF_UNIX", None):
                address = arguments[-1]
                _refuse(address[0] if isinstance(address, tuple) else address)
            return method(sock, *arguments)

        return guarded

    lookup = socket.getaddrinfo

    def guarded_lookup(host: object, *arguments: object, **options: object) -> object:
        _refuse(host)
        return lookup(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guard(connect))
        patch.setattr(socket.socket, "connect_ex", guard(connect_ex))
        patch.setattr(socket.socket, "sendto", guard(sendto))
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


@pytest.fixture(scope="session")
def troublesome_text() -> st.SearchStrategy[str]:
    """Texts made of lane markers, special tokens and characters that break encoders."""
    pieces = st.sampled_from(
        [
            *_SPECIAL,
            *(token.lower() for token in _SPECIAL),
            *("[Sep]", "[cLs]", "[unused1]", "[unused2]", "[[SEP]]", "[SEP", "SEP]", "##s"),
            *("<Instruct>:", "<instruction>", "</instruction>", "query:", "Query:", "<Query>:"),
            *("<Document>:", "<|im_start|>system", "<|im_end|>", "</s>", "<s>", "<|endoftext|>"),
            *("INSTRUCTION", "instruction:", "ATTRIBUTES", "lane 0", "Ignore previous"),
            *("\0", "\ud800", "\udfff", "\ud83d\udea2", "🚢", "👩\u200d🔬", "\ufeff", "\u202e"),
            *("דוח שנתי", "تقرير", "中文", "e\u0301", "the red fish", "maritime", "a", "\n", "\t"),
        ]
    )
    # `st.characters()` has surrogates, the alphabet of `st.text()` does not.
    anything = st.text(st.characters(), max_size=8)
    return st.lists(st.one_of(pieces, anything), max_size=12).flatmap(
        lambda parts: st.sampled_from(["", " "]).map(lambda glue: glue.join(parts))
    )


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A WordPiece tokenizer as BERT's, with some two hundred pieces."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    symbols = string.ascii_lowercase + string.digits + _OTHER_LETTERS
    pieces = (*_SPECIAL, "[unused1]", "[unused2]", *string.punctuation, *symbols)
    pieces = dict.fromkeys((*pieces, *(f"##{symbol}" for symbol in symbols), *_WORDS))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return tokenizer


@pytest.fixture(scope="session")
def make_encoder(tiny_tokenizer: Tokenizer) -> Callable[..., LaneEncoder]:
    """Build a random lane encoder: the same one on every call, but for the options given."""
    import torch

    from lanerank.scoring.modeling_lane_encoder import LaneEncoder, LaneEncoderConfig

    def make(kind: type[LaneEncoder] = LaneEncoder, **config: int) -> LaneEncoder:
        sizes = {
            "vocab_size": tiny_tokenizer.get_vocab_size(),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "attributes_budget": 32,
            "adapter_rank": 4,
        }
        model = kind(LaneEncoderConfig(**{**sizes, **config})).eval()
        numbers = torch.Generator().manual_seed(20260101)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3, generator=numbers)
                elif name.endswith("trusted_gate"):
                    parameter.normal_(mean=1.0, std=0.3, generator=numbers)
            # Scores spread over (0, 1) without reaching its ends.
            model.head_output.weight.mul_(0.2)
            model.late_weight.fill_(1.0)
            for scale, bias in ((model.scale, model.bias), (model.plain_scale, model.plain_bias)):
                scale.fill_(4.0)
                bias.fill_(-3.0)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_lanes(tiny_tokenizer: Tokenizer) -> LaneTokenizer:
    """Lanes that fit the random lane encoder."""
    from lanerank.lanes import LaneBudgets, LaneTokenizer

    budgets = LaneBudgets(
        instruction=128, query=128, attributes=32, document=128, window_overlap=16
    )
    return LaneTokenizer(tiny_tokenizer, budgets)


@pytest.fixture(scope="session")
def make_scorer(
    make_encoder: Callable[..., LaneEncoder], tiny_lanes: LaneTokenizer
) -> Callable[..., LaneEncoderScorer]:
    """Build a scorer with a fresh cache around the random lane encoder, in float32."""
    import torch

    from lanerank.scoring.lane_encoder import LaneEncoderScorer
    from lanerank.scoring.modeling_lane_encoder import LaneEncoder

    def make(kind: type[LaneEncoder] = LaneEncoder, **options: object) -> LaneEncoderScorer:
        options = {"dtype": torch.float32, "name": "tiny", **options}
        return LaneEncoderScorer(make_encoder(kind), tiny_lanes, **options)

    return make


@pytest.fixture(scope="session")
def tiny_scorer(make_scorer: Callable[..., LaneEncoderScorer]) -> LaneEncoderScorer:
    """One scorer for tests that do not look at its cache."""
    return make_scorer()


@pytest.fixture(scope="session")
def tiny_model_folder(
    make_encoder: Callable[..., LaneEncoder],
    tiny_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The random lane encoder on disk, as `--model` takes it. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_encoder().save_pretrained(folder)
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    return folder
