"""docs/scale.md: its tables are what `benchmarks/plan.py` computes, and its sizes those of the formats."""

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from mrl_rag import TwoStageIndex

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"


@pytest.fixture(scope="module")
def plan():
    spec = importlib.util.spec_from_file_location("plan", ROOT / "benchmarks" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan"] = module  # `dataclass` looks its module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plan"]


def test_the_pages_tables_are_those_that_the_script_prints(plan):
    found = dict(re.findall(r"<!-- plan: (\w+) -->\n(.*?)\n?<!-- plan: end -->", PAGE.read_text(), re.DOTALL))
    assert found == plan.tables(plan.Assumptions())


def test_the_pages_formula_gives_what_was_measured(plan):
    # benchmarks/README.md: megabytes on disk and in memory
    assert plan.disk_bytes(768, 224) == pytest.approx(4753, rel=0.001)
    assert plan.disk_bytes(768, 128) == pytest.approx(4320, rel=0.02)
    assert plan.disk_bytes(3072, 128) == pytest.approx(11_775, rel=0.12)
    assert plan.memory_bytes(224) == 480
    assert plan.chroma_memory_bytes(768) == 3552


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_an_archive_takes_the_bytes_that_the_formula_says(plan, tmp_path, precision):
    count, dim = 2000, 384
    with TwoStageIndex(tmp_path, full_dim=dim, shortlist_dim=64, precision=precision) as index:
        index.upsert([str(i) for i in range(count)], np.random.default_rng(0).normal(size=(count, dim)))
        (archive,) = tmp_path.glob("archive-*.lmdb")
    expected = count * plan.archived_bytes(precision, dim)
    # Beside the rows it has the ids, and what it fills pages with.
    assert expected < archive.stat().st_size < 1.5 * expected


def test_twice_the_passages_take_twice_the_time_and_another_price_another_sum(plan):
    dear = plan.Assumptions(gpu_price=5.0)
    assert plan.gpu_passages_per_second(dear) == plan.gpu_passages_per_second(plan.Assumptions())
    row = next(row for row in plan.time_table(dear) if "one GPU" in row[0])
    assert row[3] == "5.11 h, $25.57"
