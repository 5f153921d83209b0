"""mteb's own tasks and evaluation, with an encoder of ours. Skipped without mteb, which brings pandas and polars."""

import warnings

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    mteb = pytest.importorskip("mteb")
    mocks = pytest.importorskip("mteb.mocks.mock_tasks")
    clustering = pytest.importorskip("mteb.mocks.mock_tasks.clustering")

from mrl_rag import truncate
from mrl_rag.errors import InvalidDimension, InvalidInput
from mrl_rag.evaluation import evaluate
from mrl_rag.evaluation.mteb import MtebModel, read_mteb

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dim", [None, 64])
def test_an_encoder_runs_a_retrieval_task_of_mteb_at_any_dimension(minilm, dim):
    model = MtebModel(minilm, dim)
    assert isinstance(model, mteb.EncoderProtocol)
    (result,) = mteb.evaluate(model, mocks.MockRetrievalTask(), cache=None, show_progress_bar=False).task_results
    scores = result.scores["test"][0]
    ours = evaluate(read_mteb(mocks.MockRetrievalTask()), minilm, dims=(64,), precisions=("float32",), sizes=())
    ways = [ours.reference, *ours.results]
    way = next(way for way in ways if (way.method, way.dim) == ("plain cut", dim or 384))
    assert scores["ndcg_at_10"] == pytest.approx(way.scores["nDCG@10"].mean, abs=1e-4)
    assert scores["recall_at_10"] == pytest.approx(way.scores["recall@10"].mean, abs=1e-4)


def test_other_tasks_run_too(minilm):
    model = MtebModel(minilm, 128)
    for task in (mocks.MockSTSTask(), mocks.MockClassificationTask(), mocks.MockRerankingTask()):
        (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
        assert np.isfinite(result.get_score())


def test_each_kind_of_text_gets_its_prompt(make_tiny_bert):
    from mrl_rag import MatryoshkaEncoder

    names = ("query", "document", "classification", "clustering")
    folder = make_tiny_bert(prompts={name: f"{name}: " for name in names})
    with MatryoshkaEncoder(str(folder), dtype="float32", device="cpu") as encoder:
        model, texts = MtebModel(encoder, 8), ["a text"]
        asked = {
            "query": (mocks.MockRetrievalTask, mteb.types.PromptType.query),
            "document": (mocks.MockRetrievalTask, mteb.types.PromptType.document),
            "classification": (mocks.MockSTSTask, None),
            "clustering": (clustering.MockClusteringTask, None),
        }
        for task, (kind, prompt_type) in asked.items():
            found = model.encode([{"text": texts}], task_metadata=kind().metadata, prompt_type=prompt_type)
            np.testing.assert_allclose(found, truncate(encoder.encode(texts, task), 8), atol=1e-6)


def test_results_are_kept_apart_by_model_and_dimension(minilm):
    meta = MtebModel(minilm, 64).mteb_model_meta
    assert (meta.name, meta.revision) == ("sentence-transformers/all-MiniLM-L6-v2", minilm.fingerprint)
    assert (meta.embed_dim, meta.experiment_kwargs) == (64, {"dim": 64})
    assert MtebModel(minilm).mteb_model_meta.experiment_kwargs is None


def test_what_cannot_be_read_as_a_dataset_is_refused(minilm):
    with pytest.raises(InvalidInput, match="must be a retrieval task"):
        read_mteb(mocks.MockSTSTask())
    with pytest.raises(InvalidInput, match=r"no split 'dev' of 'default'. It has default \(test"):
        read_mteb(mocks.MockRetrievalTask(), split="dev")
    with pytest.raises(InvalidInput, match="Run it by mteb itself"):
        read_mteb(mocks.MockInstructionRetrieval())
    with pytest.raises(InvalidDimension):
        MtebModel(minilm, 385)
