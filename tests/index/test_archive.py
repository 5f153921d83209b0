"""An LMDB archive returns what was written, through any handle, or raises an error."""

import threading
import uuid

import lmdb
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrl_rag.errors import ArchiveError
from mrl_rag.index.archive import LmdbArchive

DIM = 24


@pytest.fixture(params=["float16", "int8", "binary"])
def precision(request):
    return request.param


@pytest.fixture
def archives(tmp_path, precision):
    """Two handles on one archive, as of two indexes."""
    path = tmp_path / "archive-x.lmdb"
    first = LmdbArchive(path, DIM, precision, create=True)
    second = LmdbArchive(path, DIM, precision, create=False)
    yield first, second
    first.close()
    second.close()


def vector(seed):
    row = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return row / np.linalg.norm(row)


def write(archive, staged=(), **seeds):
    archive.write(list(seeds), np.stack([vector(seed) for seed in seeds.values()]), [None] * len(seeds), staged)


def check(archive, **seeds):
    found, rows = archive.read(["nobody", *seeds])
    assert found == list(seeds)
    for row, seed in zip(rows, seeds.values(), strict=True):
        np.testing.assert_allclose(row, vector(seed), atol=5e-3)


def test_a_reader_sees_what_another_handle_writes_replaces_and_removes(archives):
    writer, reader = archives
    write(writer, a=1, b=2, c=3)
    check(reader, a=1, b=2, c=3)
    write(writer, b=20)
    check(reader, a=1, b=20, c=3)
    before = reader.version
    writer.delete(["a"])
    write(writer, d=4)
    check(reader, b=20, c=3, d=4)
    assert (len(reader), reader.version > before) == (3, True)


def test_a_staged_row_is_not_read_until_it_is_committed(archives):
    writer, reader = archives
    write(writer, a=1, b=2)
    write(writer, staged={"a", "b"}, a=10, b=20, c=3)
    check(reader, a=1, b=2, c=3)
    assert writer.staged()[0] == ["a", "b"]
    assert writer.unchanged(["a", "c"], np.stack([vector(1), vector(3)])) == {"c"}
    writer.commit_staged(["a", "b"], accepted={"b"})
    check(reader, a=1, b=20, c=3)
    assert writer.staged()[0] == []


def test_space_is_used_again(archives, tmp_path):
    writer, _ = archives
    write(writer, a=1, b=2)
    sizes = []
    for seed in range(200):
        write(writer, staged={"a"}, a=seed)
        writer.commit_staged(["a"], accepted={"a"})
        writer.delete(["b"])
        write(writer, b=seed)
        sizes.append((tmp_path / "archive-x.lmdb").stat().st_size)
    assert sizes[-1] <= 1.2 * sizes[100]
    check(writer, a=199, b=199)


def test_what_changed_since_is_known_of_the_last_transactions(archives):
    writer, reader = archives
    before = reader.version
    long = "x" * 600
    write(writer, **{"a": 1, "é\n": 2, long: 3})
    between = reader.version
    write(writer, staged={"a"}, a=10)
    writer.commit_staged(["a"], accepted={"a"})
    writer.delete([long, "nobody"])
    assert reader.changes(before) == (["a", "é\n", long, "nobody"], True)
    assert reader.changes(between) == (["a", long, "nobody"], True)
    assert reader.changes(reader.version) == ([], True)
    file = writer._file
    file.write(lambda txn: txn.put(between.to_bytes(8, "big"), b"damaged", db=writer._changes))
    assert reader.changes(before) == (["a", long, "nobody"], False)
    for seed in range(300):
        write(writer, b=seed)
    assert reader.changes(between) == (["b"], False)
    assert reader.changes(reader.version - 1) == (["b"], True)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.text(min_size=1, max_size=700), min_size=1, max_size=8, unique=True))
def test_ids_are_any_text_of_any_length(tmp_path, ids):
    ids = [id_ for id_ in ids if id_.isprintable()] + ["x" * 511, "x" * 512, "é" * 300, "\0"]
    archive = LmdbArchive(tmp_path / f"{uuid.uuid4()}.lmdb", DIM, "float16", create=True, durable=False)
    rows = np.stack([vector(seed) for seed in range(len(ids))])
    archive.write(ids, rows, [None] * len(ids))
    found, read = archive.read(ids)
    assert found == ids
    np.testing.assert_allclose(read, rows, atol=5e-3)
    assert sorted(id_ for page in archive.ids() for id_ in page) == sorted(ids)
    archive.delete(ids[:-1])
    assert [page for page in archive.ids()] == [["\0"]]
    archive.close()


@pytest.mark.parametrize("precision", ["float16"])
def test_a_flipped_bit_of_a_row_is_never_read(archives):
    archive, _ = archives
    write(archive, a=1, b=2)
    file = archive._file
    with file.reading() as txn:
        slot = txn.get(b"a", db=archive._places)[:8]
        row = txn.get(slot, db=archive._vectors)
    for bit in range(0, len(row) * 8, 3):
        broken = bytearray(row)
        broken[bit // 8] ^= 1 << bit % 8
        file.write(lambda txn, broken=broken: txn.put(slot, bytes(broken), db=archive._vectors))
        with pytest.raises(ArchiveError, match="'a'"):
            archive.read(["a"])
        assert archive.damaged(["a", "b"]) == {"a"}
        check(archive, b=2)


def test_a_row_under_another_id_is_damage(tmp_path):
    """A flipped bit in a slot number could cause it."""
    path = tmp_path / "archive-x.lmdb"
    archive = LmdbArchive(path, DIM, "float16", create=True)
    write(archive, a=1, b=2)
    archive.close()
    with lmdb.open(str(path), subdir=False, max_dbs=8) as env:
        places = env.open_db(b"places")
        with env.begin(write=True) as txn:
            txn.put(b"a", txn.get(b"b", db=places), db=places)
    archive = LmdbArchive(path, DIM, "float16", create=False)
    assert archive.damaged(["a", "b"]) == {"a"}
    with pytest.raises(ArchiveError, match="'a'"):
        archive.read(["a"])
    archive.close()


def test_readers_never_see_another_records_row_while_slots_are_reused(archives):
    writer, reader = archives
    names = [f"id-{number}" for number in range(20)]
    write(writer, **dict.fromkeys(names, 0))
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            found, rows = reader.read(names)
            wrong.extend(
                id_
                for id_, row in zip(found, rows, strict=True)
                if not any(np.allclose(row, vector(seed), atol=5e-3) for seed in range(5))
            )

    thread = threading.Thread(target=read)
    thread.start()
    for turn in range(60):
        chosen = names[turn % 7 :: 3]
        writer.delete(chosen[:2])
        write(writer, **dict.fromkeys(reversed(chosen), turn % 5))
    stop.set()
    thread.join()
    assert not wrong
    check(reader, **{id_: 59 % 5 for id_ in names[59 % 7 :: 3]})


def test_a_rotation_comes_back_whole_or_by_its_first_axes(archives):
    writer, reader = archives
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(DIM, DIM)))[0].astype(np.float32)
    writer.save_rotation("one", rotation)
    writer.save_rotation("other", -rotation)
    np.testing.assert_array_equal(reader.load_axes("one", DIM), rotation)
    np.testing.assert_array_equal(reader.load_axes("one", 5), rotation[:, :5])
    writer.drop_rotations(but=["one"])
    with pytest.raises(ArchiveError, match="missing"):
        reader.load_axes("other", 5)
