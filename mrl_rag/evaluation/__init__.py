"""What truncation costs on one's own data: quality, bytes and time of each way to search."""

from mrl_rag.evaluation.datasets import Dataset, read_beir, read_dataset, read_pairs
from mrl_rag.evaluation.evaluate import encode_dataset, evaluate, evaluate_index
from mrl_rag.evaluation.measures import exact_scan, judge, ndcg, recall_at_k, timed
from mrl_rag.evaluation.results import Evaluation, LostQuestion, Result
from mrl_rag.evaluation.sweep import EncodedDataset, default_dims, measure_ways, sweep
from mrl_rag.evaluation.ways import Way
from mrl_rag.intervals import Estimate

__all__ = [
    "Dataset",
    "EncodedDataset",
    "Estimate",
    "Evaluation",
    "LostQuestion",
    "Result",
    "Way",
    "default_dims",
    "encode_dataset",
    "evaluate",
    "evaluate_index",
    "exact_scan",
    "judge",
    "measure_ways",
    "ndcg",
    "read_beir",
    "read_dataset",
    "read_pairs",
    "recall_at_k",
    "sweep",
    "timed",
]
