"""What truncation costs on one's own data: quality, bytes and time of each way to search."""

from mrl_rag.evaluation.datasets import Dataset, read_beir
from mrl_rag.evaluation.measures import exact_scan, ndcg, recall_at_k, timed
from mrl_rag.evaluation.results import Evaluation, LostQuestion, Result
from mrl_rag.intervals import Estimate

__all__ = [
    "Dataset",
    "Estimate",
    "Evaluation",
    "LostQuestion",
    "Result",
    "exact_scan",
    "ndcg",
    "read_beir",
    "recall_at_k",
    "timed",
]
