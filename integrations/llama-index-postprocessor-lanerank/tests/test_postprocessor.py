"""What goes into the postprocessor, what comes out, and what it reports."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Never

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation.dispatcher import instrument_tags
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor import SimilarityPostprocessor
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import (
    Document,
    ImageNode,
    IndexNode,
    MetadataMode,
    Node,
    NodeWithScore,
    QueryBundle,
    TextNode,
)
from llama_index.postprocessor.lanerank import InstructedQueryBundle, LanerankRerank

from lanerank import (
    InputError,
    Instruction,
    InstructionContext,
    InstructionError,
    InstructionMissingError,
    Reranker,
    ScorerError,
    use_instruction,
)
from lanerank.context import Source
from lanerank.contracts import RerankRequest, Scores
from lanerank.testing import ADAPTER_CASES, AdapterCase, OverlapScorer, ScriptedScorer


def sync(reranker: LanerankRerank, nodes: list[NodeWithScore], *query: Any) -> Any:
    return reranker.postprocess_nodes(nodes, *query)


def native(reranker: LanerankRerank, nodes: list[NodeWithScore], *query: Any) -> Any:
    return asyncio.run(reranker.apostprocess_nodes(nodes, *query))


both = pytest.mark.parametrize("call", [sync, native])


def scored(*texts: str, **fields: Any) -> list[NodeWithScore]:
    return [NodeWithScore(node=TextNode(text=text, **fields), score=0.5) for text in texts]


def texts(nodes: list[NodeWithScore]) -> list[str]:
    return [item.text for item in nodes]


# --- what every adapter has in common ---------------------------------------------------------


@both
@pytest.mark.parametrize("case", ADAPTER_CASES, ids=str)
def test_adapter_case(case: AdapterCase, call, trace) -> None:
    reranker = LanerankRerank(
        model=Reranker(OverlapScorer()),
        instruction=case.default,
        sources=case.sources,
        require_instruction=case.require,
        top_n=case.top_n,
    )
    nodes = [
        NodeWithScore(node=TextNode(id_=str(i), text=doc.text, metadata=dict(doc.metadata)))
        for i, doc in enumerate(case.documents)
    ]
    query = QueryBundle(case.query)
    if case.per_call is not None:
        query = InstructedQueryBundle(case.query, instruction=case.per_call)
    with use_instruction(case.scope):
        if case.error is not None:
            with pytest.raises(case.error):
                call(reranker, nodes, query)
            return
        ranked = call(reranker, nodes, query)
    assert [int(item.node_id) for item in ranked] == list(case.order)
    [end] = trace.of(ReRankEndEvent)
    source = Source.BUNDLE if case.source is Source.ARGUMENT else case.source
    assert end.tags["lanerank"]["instruction_source"] == (source and str(source))


def test_it_is_a_node_postprocessor() -> None:
    assert issubclass(LanerankRerank, BaseNodePostprocessor)
    assert LanerankRerank.class_name() == "LanerankRerank"


# --- where the instruction comes from ---------------------------------------------------------

OFFERS = {
    Source.BUNDLE: "from the bundle",
    Source.USE_INSTRUCTION: "from the scope",
    Source.INSTRUMENT_TAGS: "from the tags",
    Source.INSTRUCTION_FROM: "from the function",
    Source.FIELD: "from the field",
}


@both
@pytest.mark.parametrize("first", range(len(OFFERS)))
def test_the_first_source_that_has_an_instruction_wins(first: int, call, scorer, nodes) -> None:
    has = {source: text for i, (source, text) in enumerate(OFFERS.items()) if i >= first}
    reranker = LanerankRerank(
        model=scorer,
        instruction=has.get(Source.FIELD),
        instruction_from=lambda context: has.get(Source.INSTRUCTION_FROM),
        sources=tuple(OFFERS),
    )
    query = InstructedQueryBundle("fish", instruction=has.get(Source.BUNDLE))
    tags = {"rerank_instruction": has.get(Source.INSTRUMENT_TAGS)}
    with use_instruction(has.get(Source.USE_INSTRUCTION)), instrument_tags(tags):
        call(reranker, nodes, query)
    assert scorer.instructions == [list(OFFERS.values())[first]]


@pytest.mark.parametrize("only", list(OFFERS))
def test_sources_restrict_and_their_order_does_not_matter(only: Source, scorer, nodes) -> None:
    reranker = LanerankRerank(
        model=scorer,
        instruction="from the field",
        instruction_from=lambda context: "from the function",
        sources=[only],
    )
    query = InstructedQueryBundle("fish", instruction="from the bundle")
    with (
        use_instruction("from the scope"),
        instrument_tags({"rerank_instruction": "from the tags"}),
    ):
        reranker.postprocess_nodes(nodes, query)
        reranker.sources = [*reversed(OFFERS)]
        reranker.postprocess_nodes(nodes, query)
    assert scorer.instructions == [OFFERS[only], "from the bundle"]


def test_tags_are_not_read_unless_asked_for(scorer, nodes) -> None:
    seen: list[InstructionContext] = []
    reranker = LanerankRerank(model=scorer, instruction_from=seen.append)
    with instrument_tags({"rerank_instruction": "blue", "department": "crewing"}):
        reranker.postprocess_nodes(nodes, query_str="fish")
    assert scorer.instructions == [""]
    assert seen == [InstructionContext(query="fish")]


def test_a_template_is_filled_from_the_tags(scorer, nodes) -> None:
    reranker = LanerankRerank(
        model=scorer,
        instruction_from="The user works in {department}.",
        sources=("instrument_tags", "instruction_from"),
    )
    with instrument_tags({"department": "crewing"}):
        reranker.postprocess_nodes(nodes, query_str="fish")
    assert scorer.instructions == ["The user works in crewing."]
    with pytest.raises(InstructionError, match="'department', absent"):
        reranker.postprocess_nodes(nodes, query_str="fish")


def test_a_callable_sees_the_query_and_the_tags(scorer, nodes) -> None:
    seen: list[InstructionContext] = []
    reranker = LanerankRerank(
        model=scorer,
        instruction_from=seen.append,
        sources=("instrument_tags", "instruction_from"),
    )
    with instrument_tags({"role": "nurse"}):
        reranker.postprocess_nodes(nodes, query_str="fish")
    assert seen == [InstructionContext(query="fish", metadata={"role": "nurse"})]


def test_the_tag_has_a_name_of_choice(scorer, nodes) -> None:
    reranker = LanerankRerank(model=scorer, instruction_key="rule", sources=("instrument_tags",))
    with instrument_tags({"rule": "blue", "rerank_instruction": "red"}):
        reranker.postprocess_nodes(nodes, query_str="fish")
    assert scorer.instructions == ["blue"]


@pytest.mark.parametrize("value", [5, ["blue"], {"text": "blue"}, lambda: "blue"])
def test_a_tag_of_another_type_is_refused_and_never_called(value, scorer, nodes) -> None:
    reranker = LanerankRerank(model=scorer, sources=("instrument_tags",))
    with (
        instrument_tags({"rerank_instruction": value}),
        pytest.raises(InputError, match="`instrument_tags` must be a str"),
    ):
        reranker.postprocess_nodes(nodes, query_str="fish")


def test_required_holds_without_nodes_too(scorer) -> None:
    reranker = LanerankRerank(model=scorer, require_instruction=True)
    with pytest.raises(InstructionMissingError):
        reranker.postprocess_nodes([], query_str="fish")


# --- what the model is given ------------------------------------------------------------------


def only_request(scorer) -> RerankRequest:
    [request] = scorer.requests
    return request


def test_lanes_are_filled_from_query_instruction_attributes_and_text(scorer) -> None:
    reranker = LanerankRerank(
        model=scorer, instruction="blue", attributes=["date", "site"], long_documents="max_window"
    )
    nodes = scored("a fish", metadata={"site": "sea", "author": "x", "date": "2026-01-01"})
    reranker.postprocess_nodes(nodes, query_str="fish")
    request = only_request(scorer)
    [candidate] = request.candidates
    assert (request.query, request.instruction) == ("fish", "blue")
    assert candidate.attributes == "date: 2026-01-01; site: sea"
    assert candidate.text == "a fish"
    assert request.long_documents == "max_window"


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        (MetadataMode.NONE, "a fish"),
        (MetadataMode.EMBED, "author: x\nfor_embed: e\n\na fish"),
        (MetadataMode.LLM, "author: x\nfor_llm: l\n\na fish"),
        (MetadataMode.ALL, "author: x\nfor_embed: e\nfor_llm: l\n\na fish"),
    ],
)
@pytest.mark.parametrize("kind", [TextNode, Document])
def test_attributes_are_left_out_of_the_text(mode, text, kind, scorer) -> None:
    node = kind(
        text="a fish",
        metadata={"date": "2026-01-01", "author": "x", "for_embed": "e", "for_llm": "l"},
        excluded_embed_metadata_keys=["for_llm"],
        excluded_llm_metadata_keys=["for_embed"],
    )
    reranker = LanerankRerank(model=scorer, attributes=["date"], metadata_mode=mode)
    reranker.postprocess_nodes([NodeWithScore(node=node)], query_str="fish")
    [candidate] = only_request(scorer).candidates
    assert (candidate.text, candidate.attributes) == (text, "date: 2026-01-01")


def test_nodes_of_every_kind_are_read(scorer) -> None:
    nodes = [
        TextNode(text="text"),
        Document(text="document"),
        IndexNode(text="index", index_id="i"),
        ImageNode(text="image"),
        ImageNode(image_path="fish.png"),
        Node(),
    ]
    ranked = LanerankRerank(model=scorer, top_n=None).postprocess_nodes(
        [NodeWithScore(node=node) for node in nodes], query_str="fish"
    )
    read = [candidate.text for candidate in only_request(scorer).candidates]
    assert read == ["text", "document", "index", "image", "", ""]
    assert [item.node for item in ranked] == nodes


def test_an_instruction_with_parts_arrives_and_dates_get_their_age(scorer) -> None:
    instruction = Instruction(recency="Prefer new documents.", today="2026-03-01")
    query = InstructedQueryBundle("fish", instruction=instruction)
    reranker = LanerankRerank(model=scorer, attributes=["date"])
    reranker.postprocess_nodes(scored("a fish", metadata={"date": "2025-12-01"}), query)
    assert only_request(scorer).instruction == "Prefer new documents. Today is 2026-03-01."
    assert only_request(scorer).candidates[0].attributes == "date: 2025-12-01 (3 months old)"


# --- what comes out ---------------------------------------------------------------------------


@both
def test_results_are_new_and_inputs_stay_as_they_were(call, scorer, nodes) -> None:
    before, scores = copy.deepcopy(nodes), [item.score for item in nodes]
    reranker = LanerankRerank(model=scorer, instruction="blue", keep_retrieval_score=True)
    ranked = call(reranker, nodes, QueryBundle("fish"))
    assert texts(ranked) == ["blue fish", "red fish"]
    assert nodes == before
    assert [item.score for item in nodes] == scores
    assert not {id(item) for item in ranked} & {id(item) for item in nodes}
    assert [item.node_id for item in ranked] == ["blue", "red"]


def test_fields_of_the_applications_own_kind_of_result_are_kept(scorer, nodes) -> None:
    class Found(NodeWithScore):
        shelf: str

    found = [Found(node=item.node, score=item.score, shelf="top") for item in nodes]
    [best] = LanerankRerank(model=scorer, top_n=1).postprocess_nodes(found, query_str="blue")
    assert isinstance(best, Found)
    assert (best.text, best.shelf) == ("blue fish", "top")


class Numbers:
    """Gives the scores it is told to, in the order of the candidates."""

    name, supports_instructions = "numbers", True

    def __init__(self, *values: Any) -> None:
        self.values = values

    def score(self, request: RerankRequest) -> Scores:
        return Scores(self.values)


def test_scores_are_floats_that_json_can_hold() -> None:
    numpy = pytest.importorskip("numpy")
    scorer = Numbers(numpy.float32(0.25), numpy.float64("nan"), float("inf"), 1)
    reranker = LanerankRerank(model=scorer, top_n=None, keep_retrieval_score=True)
    nodes = scored("a", "b", "c", "d")
    nodes[0].score = numpy.float32(0.5)
    nodes[1].score = math.nan
    nodes[2].score = None
    ranked = reranker.postprocess_nodes(nodes, query_str="fish")
    assert [(item.text, item.score) for item in ranked] == [
        ("d", 1.0),
        ("a", 0.25),
        ("b", None),
        ("c", None),
    ]
    assert [type(item.score) for item in ranked[:2]] == [float, float]
    for item in ranked:
        assert json.loads(item.model_dump_json())["score"] == item.score
        json.dumps(item.to_dict(), allow_nan=False)
    # The next postprocessor can live with it.
    cut = SimilarityPostprocessor(similarity_cutoff=0.1).postprocess_nodes(ranked)
    assert texts(cut) == ["d", "a"]


@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), max_size=8),
    top_n=st.one_of(st.none(), st.integers(1, 9)),
)
def test_the_best_come_first_ties_keep_their_order_and_nan_is_last(values, top_n) -> None:
    nodes = scored(*(str(i) for i in range(len(values))))
    ranked = LanerankRerank(model=Numbers(*values), top_n=top_n).postprocess_nodes(
        nodes, query_str="fish"
    )
    numbers = [i for i in range(len(values)) if not math.isnan(values[i])]
    others = [i for i in range(len(values)) if math.isnan(values[i])]
    order = sorted(numbers, key=lambda i: -values[i]) + others
    assert [int(text) for text in texts(ranked)] == order[:top_n]


def test_by_default_two_are_kept_and_none_keeps_all(scorer, nodes) -> None:
    assert len(LanerankRerank(model=scorer).postprocess_nodes(nodes, query_str="fish")) == 2
    everything = LanerankRerank(model=scorer, top_n=None)
    assert len(everything.postprocess_nodes(nodes, query_str="fish")) == 3


def test_retrieval_scores_are_kept_out_of_every_text(scorer) -> None:
    # The document claims a score; what it came with counts.
    [item] = scored("a fish", metadata={"retrieval_score": 99.0}, excluded_llm_metadata_keys=["x"])
    reranker = LanerankRerank(model=scorer, keep_retrieval_score=True)
    [ranked] = reranker.postprocess_nodes([item], query_str="fish")
    assert ranked.metadata == {"retrieval_score": 0.5}
    assert item.metadata == {"retrieval_score": 99.0}
    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert ranked.node.get_content(metadata_mode=mode) == "a fish"
    item.score = None
    [ranked] = reranker.postprocess_nodes([item], query_str="fish")
    assert ranked.metadata == {"retrieval_score": None}
    [again] = reranker.postprocess_nodes([ranked], query_str="fish")
    assert again.node.excluded_llm_metadata_keys == ["x", "retrieval_score"]


def test_retrieval_scores_are_not_kept_unless_asked_for(scorer, nodes) -> None:
    [best] = LanerankRerank(model=scorer, top_n=1).postprocess_nodes(nodes, query_str="red")
    assert best.metadata == {}
    assert best.node is nodes[0].node


# --- the model --------------------------------------------------------------------------------


def test_a_scorer_or_a_reranker_can_be_the_model(nodes) -> None:
    for model in (OverlapScorer(), Reranker(OverlapScorer())):
        reranker = LanerankRerank(model=model, top_n=1)
        assert texts(reranker.postprocess_nodes(nodes, query_str="blue")) == ["blue fish"]
        assert reranker.model_name == "overlap"


def test_options_of_a_reranker_hold(nodes) -> None:
    plain = OverlapScorer(supports_instructions=False)
    with pytest.raises(InstructionError, match="no channel"):
        LanerankRerank(model=plain, instruction="blue").postprocess_nodes(nodes, query_str="fish")
    prepending = LanerankRerank(
        model=Reranker(plain, on_unsupported="prepend"), instruction="blue", top_n=1
    )
    assert texts(prepending.postprocess_nodes(nodes, query_str="fish")) == ["blue fish"]


def test_a_scorer_that_breaks_its_contract_is_an_error(nodes) -> None:
    with pytest.raises(ScorerError):
        LanerankRerank(model=Numbers(1.0)).postprocess_nodes(nodes, query_str="fish")


# --- what it reports --------------------------------------------------------------------------


@both
def test_start_and_end_are_reported(call, trace, nodes) -> None:
    reranker = LanerankRerank(model=OverlapScorer(), instruction="blue")
    query = QueryBundle("fish")
    ranked = call(reranker, nodes, query)
    [start], [end] = trace.of(ReRankStartEvent), trace.of(ReRankEndEvent)
    assert (start.query, start.nodes, start.top_n) == (query, nodes, 2)
    assert start.model_name == "overlap"
    assert end.nodes == ranked
    assert end.tags["lanerank"] == {
        "instruction_source": "field",
        "instruction_fingerprint": Instruction("blue").fingerprint,
        "instruction_applied": "lane",
        "degraded": None,
        "truncated": [],
        "non_finite": [],
    }
    json.dumps(end.tags)
    method = "_postprocess_nodes" if call is sync else "_apostprocess_nodes"
    [span] = [s for s in trace.entered if "LanerankRerank" in s["id"]]
    assert span["id"].startswith(f"LanerankRerank.{method}-")
    assert span["id"] in trace.exited
    assert {start.span_id, end.span_id} == {span["id"]}


@both
def test_tags_of_the_application_stay_on_the_events(call, trace, nodes) -> None:
    with instrument_tags({"user": "ada"}):
        call(LanerankRerank(model=OverlapScorer()), nodes, QueryBundle("fish"))
    [end] = trace.of(ReRankEndEvent)
    assert end.tags["user"] == "ada"
    assert end.tags["lanerank"]["instruction_source"] is None


def test_nodes_that_were_cut_or_have_no_score_are_named(trace) -> None:
    class Cutting(Numbers):
        def score(self, request: RerankRequest) -> Scores:
            return Scores(self.values, (True, False))

    nodes = [NodeWithScore(node=TextNode(id_=name)) for name in "ab"]
    LanerankRerank(model=Cutting(0.5, math.nan)).postprocess_nodes(nodes, query_str="fish")
    [end] = trace.of(ReRankEndEvent)
    assert end.tags["lanerank"]["truncated"] == ["a"]
    assert end.tags["lanerank"]["non_finite"] == ["b"]


@both
def test_empty_input_gives_no_result_and_both_events(call, scorer, trace) -> None:
    reranker = LanerankRerank(model=scorer, top_n=None, instruction="blue")
    assert call(reranker, [], QueryBundle("fish")) == []
    [start], [end] = trace.of(ReRankStartEvent), trace.of(ReRankEndEvent)
    assert (start.top_n, start.nodes, end.nodes) == (0, [], [])
    assert scorer.requests == []


@both
def test_errors_end_what_they_started(call, trace, nodes) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    reranker = LanerankRerank(
        model=ScriptedScorer({}), callback_manager=CallbackManager([debug]), top_n=None
    )
    with pytest.raises(InputError, match="no score"):
        call(reranker, nodes, QueryBundle("fish"))
    [start], [end] = trace.of(ReRankStartEvent), trace.of(ReRankEndEvent)
    assert (start.top_n, end.nodes) == (3, [])
    [dropped] = [id_ for id_ in trace.dropped if "LanerankRerank" in id_]
    assert dropped == start.span_id
    [[_, ended]] = debug.get_event_pairs(CBEventType.RERANKING)
    assert isinstance(ended.payload[EventPayload.EXCEPTION], InputError)


@both
def test_a_missing_query_is_an_input_error(call, trace, nodes) -> None:
    with pytest.raises(InputError, match="missing query bundle"):
        call(LanerankRerank(model=OverlapScorer()), nodes)
    assert [len(trace.of(kind)) for kind in (ReRankStartEvent, ReRankEndEvent)] == [1, 1]


@both
def test_callbacks_get_what_other_rerankers_give_them(call, nodes) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    reranker = LanerankRerank(model=OverlapScorer(), callback_manager=CallbackManager([debug]))
    ranked = call(reranker, nodes, QueryBundle("fish"))
    call(reranker, [], QueryBundle("fish"))
    [[start, end]] = debug.get_event_pairs(CBEventType.RERANKING)
    assert start.payload == {
        EventPayload.NODES: nodes,
        EventPayload.MODEL_NAME: "overlap",
        EventPayload.QUERY_STR: "fish",
        EventPayload.TOP_K: 2,
    }
    assert end.payload == {EventPayload.NODES: ranked}


def test_an_engine_puts_its_own_callback_manager_in(make_app) -> None:
    app = make_app()
    engine = app.engine()
    assert app.reranker.callback_manager is engine.callback_manager


# --- the event loop ---------------------------------------------------------------------------


class Gate:
    """A scorer that waits until it is let go."""

    name, supports_instructions = "gate", True

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.thread: int | None = None

    def score(self, request: RerankRequest) -> Scores:
        self.thread = threading.get_ident()
        self.entered.set()
        assert self.open.wait(30)
        return Scores((0.5,) * len(request.candidates))


def test_the_event_loop_goes_on_while_the_model_scores(nodes) -> None:
    gate = Gate()

    async def main() -> int:
        task = asyncio.create_task(
            LanerankRerank(model=gate).apostprocess_nodes(nodes, query_str="fish")
        )
        # Were the loop blocked, this line would wait for the gate that a later line opens.
        assert await asyncio.to_thread(gate.entered.wait, 30)
        assert not task.done()
        gate.open.set()
        return len(await task)

    assert asyncio.run(main()) == 2
    assert gate.thread != threading.get_ident()


def test_a_cancelled_call_ends_its_events(nodes, trace) -> None:
    gate = Gate()

    async def main() -> None:
        task = asyncio.create_task(
            LanerankRerank(model=gate).apostprocess_nodes(nodes, query_str="fish")
        )
        assert await asyncio.to_thread(gate.entered.wait, 30)
        task.cancel()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(trace.of(ReRankStartEvent)) == len(trace.of(ReRankEndEvent)) == 1


class Awaited:
    """A scorer to be awaited: waits until it is let go, and keeps what became of it."""

    name, supports_instructions = "awaited", True

    def __init__(self) -> None:
        self.entered, self.open = asyncio.Event(), asyncio.Event()
        self.threads: list[threading.Thread] = []
        self.cancelled = False

    def score(self, request: RerankRequest) -> Scores:
        raise AssertionError("it was not awaited")

    async def ascore(self, request: RerankRequest) -> Scores:
        self.threads.append(threading.current_thread())
        self.entered.set()
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return OverlapScorer().score(request)


class NoThreads(ThreadPoolExecutor):
    """For an event loop that must do without worker threads."""

    def submit(self, *args: object, **kwargs: object) -> Never:
        raise AssertionError("a thread was used")


def without_threads(reranker: LanerankRerank, nodes: list[NodeWithScore], query: QueryBundle):
    async def main() -> list[NodeWithScore]:
        asyncio.get_running_loop().set_default_executor(NoThreads())
        return await reranker.apostprocess_nodes(nodes, query)

    return asyncio.run(main())


def test_a_scorer_that_can_be_awaited_takes_no_thread(nodes) -> None:
    scorer = Awaited()
    scorer.open.set()
    query = InstructedQueryBundle("fish", instruction="green")
    for model in (scorer, Reranker(scorer)):
        ranked = without_threads(LanerankRerank(model=model), nodes, query)
        assert texts(ranked) == ["green fish", "red fish"]
        with use_instruction("blue"):
            ranked = without_threads(LanerankRerank(model=model), nodes, QueryBundle("fish"))
        assert texts(ranked) == ["blue fish", "red fish"]
    assert scorer.threads == [threading.current_thread()] * 4


def test_other_scorers_and_loading_do_take_one(nodes, tmp_path) -> None:
    for model in (OverlapScorer(), tmp_path / "nothing"):
        with pytest.raises(AssertionError, match="a thread was used"):
            without_threads(LanerankRerank(model=model), nodes, QueryBundle("fish"))


def test_cancelling_a_call_cancels_the_scorer_and_ends_the_events(nodes, trace) -> None:
    scorer = Awaited()

    async def main() -> None:
        task = asyncio.create_task(
            LanerankRerank(model=scorer).apostprocess_nodes(nodes, query_str="fish")
        )
        await asyncio.wait_for(scorer.entered.wait(), 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert scorer.cancelled
    assert len(trace.of(ReRankStartEvent)) == len(trace.of(ReRankEndEvent)) == 1


def test_the_instruction_is_resolved_on_the_callers_side_of_the_thread_hop(scorer, nodes) -> None:
    threads: list[int] = []

    def derive(context: InstructionContext) -> str:
        threads.append(threading.get_ident())
        return "blue"

    native(LanerankRerank(model=scorer, instruction_from=derive), nodes, QueryBundle("fish"))
    assert threads == [threading.get_ident()]


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_n": 0}, "`top_n`.*greater than or equal to 1, got 0"),
        ({"top_n": True}, "`top_n`.*integer, got True"),
        ({"top_n": "3"}, "`top_n`"),
        ({"model": 5}, "`model` must be a name or folder, .*int: 5"),
        ({"instruction": ["blue"]}, "`instruction` must be a str"),
        ({"instruction_key": 5}, "`instruction_key`"),
        ({"instruction_from": 5}, "`instruction_from`.*got 5"),
        ({"instruction_from": "{user.name}"}, "`instruction_from` has the placeholder"),
        ({"instruction_from": "{department}"}, "`instruction_from` has .* 'instrument_tags'"),
        ({"sources": ["argument"]}, "`sources` must be some of bundle, .*'argument'"),
        ({"sources": "document"}, "`sources`.*'document'"),
        ({"sources": 5}, "`sources`.*got 5"),
        ({"attributes": "date"}, "`attributes`.*'date'"),
        ({"metadata_mode": "some"}, "`metadata_mode`.*'some'"),
        ({"long_documents": "cut"}, "`long_documents`.*'cut'"),
    ],
)
def test_options_that_are_not_usable_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LanerankRerank(**options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="instrution"):
        LanerankRerank(instrution="blue")


def test_options_are_checked_on_assignment_too(scorer) -> None:
    reranker = LanerankRerank(model=scorer)
    with pytest.raises(ValueError, match="top_n"):
        reranker.top_n = 0
    assert reranker.top_n == 2


def test_a_template_without_placeholders_needs_no_tags(scorer, nodes) -> None:
    reranker = LanerankRerank(model=scorer, instruction_from="blue")
    reranker.postprocess_nodes(nodes, query_str="fish")
    assert scorer.instructions == ["blue"]


@pytest.mark.parametrize(
    ("nodes", "query", "message"),
    [
        (scored("a"), "fish", "`query_bundle` must be a QueryBundle, got str: 'fish'; .*query_str"),
        (scored("a"), QueryBundle("  "), "`query` must be"),
        ([TextNode(text="a")], QueryBundle("fish"), r"`nodes\[0\]` .* TextNode; wrap"),
        ("a", QueryBundle("fish"), "`nodes` must be a list of NodeWithScore, got str"),
        (None, QueryBundle("fish"), "`nodes` must be a list"),
    ],
)
@both
def test_arguments_that_are_not_usable_are_refused(call, nodes, query, message) -> None:
    with pytest.raises(InputError, match=message):
        call(LanerankRerank(model=OverlapScorer()), nodes, query)


# --- the query bundle -------------------------------------------------------------------------


def test_a_bundle_is_a_query_bundle() -> None:
    bundle = InstructedQueryBundle("fish", instruction="blue", custom_embedding_strs=["a"])
    assert isinstance(bundle, QueryBundle)
    assert str(bundle) == bundle.query_str == "fish"
    assert bundle.embedding_strs == ["a"]
    assert InstructedQueryBundle("fish").instruction is None


def test_an_instruction_by_position_is_refused_rather_than_taken_for_an_image() -> None:
    with pytest.raises(TypeError, match="positional"):
        InstructedQueryBundle("fish", "blue")


def test_a_bundle_refuses_a_wrong_instruction() -> None:
    with pytest.raises(InputError, match="`instruction` must be"):
        InstructedQueryBundle("fish", instruction=["blue"])


@pytest.mark.parametrize(
    "instruction",
    [None, "blue", Instruction("blue", today="2026-01-01") + Instruction(glossary={"a": "b"})],
)
def test_a_bundle_survives_json(instruction) -> None:
    bundle = InstructedQueryBundle("fish", instruction=instruction)
    back = InstructedQueryBundle.from_json(bundle.to_json())
    assert back == bundle
    assert type(back.instruction) is type(instruction)
