"""What an evaluation found and what a collection looks like: figures, and one HTML file with all of them.

`write_report` writes the file. `pareto`, `curve`, `classifier_curve`, `collection_map` and `first_two_numbers` return
matplotlib figures, one axes each.
"""

from mrl_rag.extras import require

for module in ("matplotlib", "jinja2"):
    require(module, extra="report")

from mrl_rag.report.figures import (  # noqa: E402
    classifier_curve,
    collection_map,
    curve,
    first_two_numbers,
    pareto,
)
from mrl_rag.report.page import render, write_report  # noqa: E402
from mrl_rag.report.records import dataset_records, index_records, sample  # noqa: E402

__all__ = [
    "classifier_curve",
    "collection_map",
    "curve",
    "dataset_records",
    "first_two_numbers",
    "index_records",
    "pareto",
    "render",
    "sample",
    "write_report",
]
