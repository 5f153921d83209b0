"""A head on an index: every vector goes through it, nothing is encoded, and nothing is lost on the way."""

import numpy as np
import pytest

from mrl_rag import HeadCard, MatryoshkaHead, TwoStageIndex
from mrl_rag.errors import ArchiveError, DimensionMismatch, HeadMismatch, InvalidInput

VECTORS = np.random.default_rng(0).normal(size=(120, 32)).astype(np.float32)
TURN = np.random.default_rng(1).normal(size=(32, 32))
CARD = HeadCard(
    kind="vectors",
    full_dim=32,
    dims=(8,),
    fitted_on=90,
    held_out=10,
    seed=0,
    measure="",
    before={8: 0.1},
    after={8: 0.2},
    model="topics",
    fingerprint="ab12",
)


def test_every_kind_of_index_takes_one_head(open_index):
    vectors = VECTORS.copy()
    index = open_index()
    index.upsert([str(row) for row in range(120)], vectors)
    head = MatryoshkaHead(TURN)
    index.apply_head(head, drop_old=True)
    got = np.stack([record.vector for record in index.get([str(row) for row in range(120)])])
    np.testing.assert_allclose(got, head.apply(vectors), atol=2e-3)
    with pytest.raises(HeadMismatch, match="has a head already"):
        open_index().apply_head(TURN)
    assert index.fingerprint is None


def test_an_interrupted_call_goes_on_with_what_the_index_has_by_then(tmp_path, monkeypatch):
    monkeypatch.setattr("mrl_rag.index.reencode._BATCH", 20)
    vectors, ids = VECTORS.copy(), [str(row) for row in range(120)]
    index = TwoStageIndex(tmp_path, fingerprint="ab12")
    index.upsert(ids, vectors)
    head = MatryoshkaHead(TURN)
    calls = []
    apply = head.apply

    def stopped(rows):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(rows))
        return apply(rows)

    monkeypatch.setattr(head, "apply", stopped)
    with pytest.raises(KeyboardInterrupt):
        index.apply_head(head)
    assert index.fingerprint == "ab12"
    assert len(index.info().unfinished) == 1
    vectors[5] = vectors[70]
    index.upsert(["5"], vectors[5:6])
    monkeypatch.setattr(head, "apply", apply)
    index.apply_head(head)
    got = np.stack([record.vector for record in index.get(ids)])
    np.testing.assert_allclose(got, head.apply(vectors), atol=2e-3)
    assert index.fingerprint == head.fingerprint_with("ab12")
    index.close()


def test_what_cannot_be_applied_is_refused_and_nothing_changes(tmp_path):
    head = MatryoshkaHead(TURN, CARD)
    index = TwoStageIndex(tmp_path, model="other", fingerprint="cd34")
    with pytest.raises(InvalidInput, match="nothing is stored"):
        index.apply_head(head)
    index.upsert(["a"], VECTORS[:1])
    with pytest.raises(HeadMismatch, match=r"'topics' \(fingerprint ab12\).*'other' \(fingerprint cd34\)"):
        index.apply_head(head)
    with pytest.raises(DimensionMismatch, match="16 numbers"):
        index.apply_head(np.eye(16))
    assert (index.fingerprint, index.head, index.kept()) == ("cd34", None, [])
    index.close()


def test_a_reencoded_index_has_no_head(tmp_path):
    index = TwoStageIndex(tmp_path, fingerprint="ab12")
    index.upsert(["a"], VECTORS[:1], ["a text"])
    index.apply_head(np.eye(32))
    index.reencode(lambda texts: VECTORS[: len(texts)], fingerprint="cd34")
    assert index.head is None
    assert index.fingerprint == "cd34"
    index.close()


def test_a_missing_vector_is_named_and_the_index_stays(tmp_path, archive_of):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a", "b"], VECTORS[:2])
    index.close()
    archive_of(tmp_path).lose("b")
    with TwoStageIndex(tmp_path) as index:
        with pytest.raises(ArchiveError, match=r"'b'.*repair\(encode="):
            index.apply_head(TURN)
        assert index.get(["a"])[0].vector @ VECTORS[0] > 0.99


def test_a_lost_head_is_said_and_searches_go_on(tmp_path, archive_of):
    index = TwoStageIndex(tmp_path)
    index.upsert(["a", "b"], VECTORS[:2])
    index.apply_head(TURN, drop_old=True)
    index.close()
    archive_of(tmp_path).lose_rotations()
    with TwoStageIndex(tmp_path) as index:
        with pytest.raises(ArchiveError, match="pass the encoder"):
            _ = index.head
        assert index.search(VECTORS[0] @ TURN, k=1)[0].id == "a"
