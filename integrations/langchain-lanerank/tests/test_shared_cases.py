"""The cases that every adapter of lanerank handles alike, through both components."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any

import pytest
from lanerank import Reranker, use_instruction
from lanerank.testing import ADAPTER_CASES, AdapterCase, OverlapScorer
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda

from langchain_lanerank import LanerankRerank, LanerankRetriever


def documents_of(case: AdapterCase) -> list[Document]:
    return [
        Document(document.text, id=str(i), metadata=dict(document.metadata))
        for i, document in enumerate(case.documents)
    ]


def compressor_for(case: AdapterCase, **options: object) -> LanerankRerank:
    return LanerankRerank(
        model=Reranker(OverlapScorer()),
        sources=case.sources,
        require_instruction=case.require,
        report_instruction=True,
        top_n=None,
        **options,
    )


def retriever_for(case: AdapterCase) -> LanerankRetriever:
    # Its own settings rather than those of its reranker, which the compressor tries.
    return LanerankRetriever(
        base_retriever=RunnableLambda(lambda _: documents_of(case)),
        reranker=compressor_for(case),
        instruction=case.default,
        top_n=case.top_n,
    )


def compress(case: AdapterCase) -> list[Document]:
    compressor = compressor_for(case, instruction=case.default)
    compressor.top_n = case.top_n
    return compressor.compress_documents(documents_of(case), case.query, instruction=case.per_call)


async def acompress(case: AdapterCase) -> list[Document]:
    compressor = compressor_for(case, instruction=case.default)
    compressor.top_n = case.top_n
    return await compressor.acompress_documents(
        documents_of(case), case.query, instruction=case.per_call
    )


def retrieve(case: AdapterCase) -> list[Document]:
    return retriever_for(case).invoke(case.query, instruction=case.per_call)


async def aretrieve(case: AdapterCase) -> list[Document]:
    return await retriever_for(case).ainvoke(case.query, instruction=case.per_call)


def surroundings(case: AdapterCase) -> tuple[Any, Any]:
    return (
        nullcontext() if case.scope is None else use_instruction(case.scope),
        pytest.raises(case.error) if case.error else nullcontext(),
    )


def check(case: AdapterCase, found: list[Document]) -> None:
    assert [document.id for document in found] == [str(i) for i in case.order]
    assert {document.metadata["rerank_instruction_source"] for document in found} <= {case.source}


@pytest.mark.parametrize("call", [compress, retrieve])
@pytest.mark.parametrize("case", ADAPTER_CASES, ids=str)
def test_shared_case(case: AdapterCase, call: Callable[[AdapterCase], list[Document]]):
    scope, failure = surroundings(case)
    with scope, failure:
        check(case, call(case))


@pytest.mark.parametrize("call", [acompress, aretrieve])
@pytest.mark.parametrize("case", ADAPTER_CASES, ids=str)
async def test_shared_case_asynchronously(
    case: AdapterCase, call: Callable[[AdapterCase], Awaitable[list[Document]]]
):
    scope, failure = surroundings(case)
    with scope, failure:
        check(case, await call(case))
