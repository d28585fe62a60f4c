"""Use what `make wheels` installed from wheels alone: the core and both plugins, offline.

Not a test module: it runs in an environment that has no test tools, and fails by an exception.
"""

from __future__ import annotations

import sys
from pathlib import Path

import langchain_lanerank
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor import lanerank as llama_index_lanerank

import lanerank

MARINE = "We're looking for engineering talent for a marine logistics company."
OLYMPIAD = "We are recruiting a coach for our national mathematics olympiad team."
QUERY = "candidates with IMO experience"
TEXTS = [
    "Coached the national team for the International Mathematical Olympiad; two gold medals.",
    "Candidate experience: Worked at the International Marine Organization",
]

for module in (lanerank, langchain_lanerank, llama_index_lanerank):
    place = Path(str(module.__file__)).resolve()
    if not place.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"{module.__name__} comes from {place}, not from its wheel")

reranker = lanerank.Reranker.from_pretrained()
compressor = langchain_lanerank.LanerankRerank(model=reranker)
postprocessor = llama_index_lanerank.LanerankRerank(model=reranker)
nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
for instruction, best in ((MARINE, 1), (OLYMPIAD, 0)):
    with lanerank.use_instruction(instruction):
        order = (
            reranker.rank(QUERY, TEXTS)[0].index,
            compressor.rerank(TEXTS, QUERY)[0]["index"],
            TEXTS.index(postprocessor.postprocess_nodes(nodes, query_str=QUERY)[0].text),
        )
    if order != (best, best, best):
        raise SystemExit(f"expected document {best} first under {instruction!r}, got {order}")
