"""Rerank LlamaIndex nodes with instructions that no retrieved text can reach."""

from llama_index.postprocessor.lanerank.base import InstructedQueryBundle, LanerankRerank

__all__ = ["InstructedQueryBundle", "LanerankRerank"]
