"""The row file tells whose a row is, whatever the reader believes."""

import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest

from mrl_rag.errors import ArchiveError
from mrl_rag.index.archive import LocalArchive
from mrl_rag.index.rows import RowFile, SlotTable

DIM = 24


@pytest.fixture(params=["float16", "int8", "binary"])
def precision(request):
    return request.param


@pytest.fixture
def archives(tmp_path, precision):
    """Two handles on one archive, as two processes have."""
    path = tmp_path / "archive-x.sqlite3"
    first = LocalArchive(path, DIM, precision, create=True)
    second = LocalArchive(path, DIM, precision, create=False)
    yield first, second
    first.close()
    second.close()


def vector(seed):
    row = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return row / np.linalg.norm(row)


def write(archive, **seeds):
    archive.write(list(seeds), np.stack([vector(seed) for seed in seeds.values()]), [None] * len(seeds))


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
    writer.delete(["a"])
    write(writer, d=4)
    check(reader, b=20, c=3, d=4)
    check(writer, b=20, c=3, d=4)


def test_a_row_that_waits_is_not_read_until_it_is_accepted(archives):
    writer, reader = archives
    write(writer, a=1, b=2)
    writer.hold(["a", "b"], np.stack([vector(10), vector(20)]), [None, None])
    check(reader, a=1, b=2)
    assert writer.held()[0] == ["a", "b"]
    writer.settle(["a", "b"], accepted=["b"])
    check(reader, a=1, b=20)
    assert writer.held()[0] == []


def test_space_is_used_again(archives, tmp_path):
    writer, _ = archives
    write(writer, a=1, b=2)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.rows"))
    for seed in range(50):
        writer.hold(["a"], vector(seed)[None], [None])
        writer.settle(["a"], accepted=["a"])
        writer.delete(["b"])
        write(writer, b=seed)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.rows")) <= 2 * size
    check(writer, a=49, b=49)


def test_what_a_killed_writer_did_not_tell_readers_the_next_one_tells(archives, monkeypatch):
    writer, reader = archives
    write(writer, a=1)
    check(reader, a=1)
    with monkeypatch.context() as patched:
        patched.setattr(RowFile, "forget", lambda file, slots: None)
        write(writer, a=2)
    writer.tidy()
    check(reader, a=2)


def test_a_flipped_bit_is_never_read(archives, tmp_path):
    writer, _ = archives
    write(writer, a=1, b=2)
    file = next(tmp_path.glob("*.rows"))
    whole = file.read_bytes()
    for bit in range(0, len(whole) * 4, 7):  # the first row's
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        file.write_bytes(broken)
        with pytest.raises(ArchiveError, match="'a'"):
            writer.read(["a"])
        assert writer.damaged(["a", "b"]) == {"a"}
        check(writer, b=2)


def test_a_damaged_entry_takes_nobodys_row(archives, tmp_path):
    writer, _ = archives
    write(writer, a=1, b=2, c=3)
    with closing(sqlite3.connect(next(tmp_path.glob("*.sqlite3")), isolation_level=None)) as connection:
        connection.execute("UPDATE places SET slot = 1 WHERE id = 'a'")
        connection.execute("INSERT INTO free VALUES (2)")
        connection.execute("UPDATE end SET slot = 1")
    writer.tidy()
    write(writer, a=10, d=4, e=5)
    check(writer, a=10, b=2, c=3, d=4, e=5)


def test_readers_never_see_a_mixture_while_rows_change_hands(archives):
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


def test_ids_with_the_same_hash_are_told_apart():
    class Same(str):
        def __hash__(self):
            return 7

    table = SlotTable([(Same("a"), 0), (Same("b"), 1)])
    table.learn([("c", 5)])
    # Either may be wrong, never an exception; the row's checksum says whose it is.
    assert set(table.slots([Same("a"), Same("b")]).tolist()) <= {0, 1}
    assert table.slots(["c", "nobody"]).tolist() == [5, -1]
    assert SlotTable([]).slots(["a"]).tolist() == [-1]
