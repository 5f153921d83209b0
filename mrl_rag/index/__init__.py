"""Vectors to hits: Chroma at the shortlist dimension, an archive of full vectors, and the rerank."""

from mrl_rag.index.index import Record, TwoStageIndex
from mrl_rag.index.info import IndexInfo
from mrl_rag.index.plan import Plan
from mrl_rag.index.search import Hit, Stage, rank
from mrl_rag.index.server import RetryPolicy
from mrl_rag.index.tuning import Tuning
from mrl_rag.index.verify import Report

__all__ = ["Hit", "IndexInfo", "Plan", "Record", "Report", "RetryPolicy", "Stage", "Tuning", "TwoStageIndex", "rank"]
