"""Vectors to hits: Chroma at the shortlist dimension, an archive of full vectors, and the rerank."""

from mrl_rag.index.halves import Hit, Record
from mrl_rag.index.index import TwoStageIndex
from mrl_rag.index.plan import Plan
from mrl_rag.index.rerank import Stage, rank
from mrl_rag.index.verification import Report

__all__ = ["Hit", "Plan", "Record", "Report", "Stage", "TwoStageIndex", "rank"]
