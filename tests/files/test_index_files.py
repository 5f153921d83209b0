"""What `index_files` does with a folder that changes."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mrl_rag import MatryoshkaEncoder, TwoStageRetriever
from mrl_rag.errors import InvalidInput
from mrl_rag.files import index_files
from mrl_rag.testing import DeterministicEncoder

GERMAN = (
    "Die Bibliothek sammelt seit vielen Jahren Bücher über die Geschichte der Stadt, ihrer Häuser und ihrer Bewohner. "
    "Wer sie lesen möchte, geht am Vormittag in den Lesesaal im ersten Stock und fragt dort nach den Verzeichnissen."
)


@pytest.fixture
def encoded(monkeypatch):
    """The texts that were encoded."""
    texts = []
    encode = DeterministicEncoder._encode

    def noting(self, batch, task, dim, advance):
        texts.extend(batch)
        return encode(self, batch, task, dim, advance)

    monkeypatch.setattr(DeterministicEncoder, "_encode", noting)
    return texts


@pytest.fixture
def notes(folder):
    for name, text in {"a": "Apples grow on trees.", "b": "Boats float on water.", "c": "Clouds drift in air."}.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def documents(retriever):
    return {record.document for record in retriever.index.get()}


def test_files_are_found_with_their_place(notes, retriever):
    report = index_files([notes], retriever)
    assert (report.files, report.chunks, report.encoded, report.ok) == (3, 3, 3, True)
    hit = retriever.search("boats on water", k=1)[0]
    assert (hit.document, hit.metadata["path"], hit.metadata["line"]) == (
        "Boats float on water.",
        str(notes / "b.txt"),
        1,
    )


def test_again_only_what_changed_is_encoded(notes, retriever, encoded):
    index_files([notes], retriever)
    encoded.clear()
    assert index_files([notes], retriever).unchanged == 3
    assert encoded == []
    (notes / "b.txt").write_text("Boats sink in water.")
    report = index_files([notes], retriever)
    assert encoded == ["Boats sink in water."]
    assert (report.unchanged, report.encoded, report.removed, report.chunks) == (2, 1, 1, 3)
    assert documents(retriever) == {"Apples grow on trees.", "Boats sink in water.", "Clouds drift in air."}


def test_a_passage_that_moves_keeps_its_vector_and_gets_its_new_place(folder, retriever, encoded):
    file = folder / "a.md"
    file.write_text("# One\n\nFirst.\n\n# Two\n\nSecond.\n")
    index_files([file], retriever, chunk_tokens=8)
    encoded.clear()
    file.write_text("# Zero\n\nBefore.\n\n# One\n\nFirst.\n\n# Two\n\nSecond.\n")
    index_files([file], retriever, chunk_tokens=8)
    assert encoded == ["# Zero\n\nBefore."]
    places = {r.document: (r.metadata["line"], r.metadata["chunk"]) for r in retriever.index.get()}
    assert places == {"# Zero\n\nBefore.": (1, 1), "# One\n\nFirst.": (5, 2), "# Two\n\nSecond.": (9, 3)}


def test_the_same_passage_twice_is_two_records(folder, retriever):
    (folder / "a.csv").write_text("name\nsame\nsame\n")
    (folder / "b.csv").write_text("name\nsame\n")
    assert index_files([folder], retriever).chunks == 3
    assert len(retriever.index) == 3


def test_what_is_gone_from_a_folder_is_removed(notes, folder, retriever, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Elsewhere.")
    retriever.index_texts(["Not of a file."])
    index_files([notes, other], retriever)
    (notes / "a.txt").unlink()
    assert index_files([notes], retriever, keep_removed=True).removed == 0
    assert "Apples grow on trees." in documents(retriever)
    assert index_files([notes], retriever).removed == 1
    assert documents(retriever) == {"Boats float on water.", "Clouds drift in air.", "Elsewhere.", "Not of a file."}


def test_what_is_excluded_is_removed_and_what_does_not_match_stays(notes, retriever):
    index_files([notes], retriever)
    index_files([notes], retriever, glob=["c*"], exclude=["b.txt"])
    assert documents(retriever) == {"Apples grow on trees.", "Clouds drift in air."}


def test_records_of_others_with_a_path_are_left_alone(notes, retriever):
    retriever.index_texts(["Mine."], metadatas=[{"path": str(notes / "gone.txt"), "chunks": 1}])
    index_files([notes], retriever)
    (notes / "a.txt").write_text("Apricots.")
    retriever.index_texts(["Mine, too."], metadatas=[{"path": str(notes / "a.txt")}])
    index_files([notes], retriever)
    (notes / "a.txt").unlink()
    index_files([notes], retriever)
    assert documents(retriever) == {"Boats float on water.", "Clouds drift in air.", "Mine.", "Mine, too."}


def test_a_folder_that_is_gone_removes_nothing(notes, retriever):
    index_files([notes], retriever)
    notes.rename(notes.with_name("moved"))
    report = index_files([notes], retriever)
    assert [problem.reason for problem in report.unreadable] == ["there is no such file or folder"]
    assert len(retriever.index) == 3


def test_a_file_that_becomes_unreadable_or_empty(notes, retriever):
    index_files([notes], retriever)
    (notes / "a.txt").write_bytes(b"")
    (notes / "b.txt").write_bytes(bytes(range(256)))
    (notes / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(200)))
    report = index_files([notes], retriever)
    assert (report.files, report.ok, report.removed) == (2, True, 1)
    assert {Path(problem.path).name for problem in report.ignored} == {"b.txt", "picture.png"}
    assert documents(retriever) == {"Boats float on water.", "Clouds drift in air."}
    assert not index_files([notes / "picture.png"], retriever).ok


def test_another_chunk_length_splits_anew_and_leaves_nothing_old(folder, retriever):
    (folder / "a.txt").write_text(" ".join(f"word{i}" for i in range(100)))
    index_files([folder], retriever, chunk_tokens=100)
    many = index_files([folder], retriever, chunk_tokens=10)
    assert len(retriever.index) == many.chunks > 10
    assert index_files([folder], retriever, chunk_tokens=100).chunks == len(retriever.index)


def test_many_files_are_stored_in_batches(folder, retriever):
    for number in range(1300):
        (folder / f"{number}.txt").write_text(f"number {number}")
    assert index_files([folder], retriever).encoded == 1300
    assert len(retriever.index) == 1300


def test_no_paths_are_refused(retriever):
    with pytest.raises(InvalidInput, match="pass a list"):
        index_files("notes", retriever)


KILLED = """
import os, sys
from mrl_rag import TwoStageIndex, TwoStageRetriever
from mrl_rag.files import index_files
from mrl_rag.testing import DeterministicEncoder

class Dying(DeterministicEncoder):
    calls = 0

    def _encode(self, texts, *arguments):
        self.calls += 1
        if self.calls == 2:
            os._exit(1)
        return super()._encode(texts, *arguments)

index_files([sys.argv[1]], TwoStageRetriever(Dying(32), sys.argv[2]))
"""


def test_a_killed_run_goes_on_where_it_was(folder, tmp_path, encoded):
    for number in range(1000):
        (folder / f"{number:04}.txt").write_text(f"number {number}")
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "db")]
    assert subprocess.run(command, capture_output=True).returncode == 1
    with TwoStageRetriever(DeterministicEncoder(32), tmp_path / "db") as retriever:
        assert len(retriever.index) == 512
        report = index_files([folder], retriever)
        assert (report.unchanged, len(encoded), len(retriever.index)) == (512, 488, 1000)
        assert retriever.index.verify().ok


def test_an_english_model_warns_once_of_other_languages(folder, minilm):
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"{GERMAN} Das ist Absatz {number}.", encoding="utf-8")
    with TwoStageRetriever(minilm) as retriever, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index_files([folder], retriever)
    assert len(caught) == 1
    assert "minilm was trained on English, and 30 of 30 passages" in str(caught[0].message)
    assert "'bge-m3'" in str(caught[0].message)


def test_another_script_is_warned_of_once(folder, minilm):
    for number in range(30):
        text = f"图书馆多年来一直收集有关这座城市、房屋和居民历史的书籍。第{number}段。" * 3
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    encoder = MatryoshkaEncoder("minilm", dtype="float32", device="cpu")
    with TwoStageRetriever(encoder) as retriever, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index_files([folder], retriever)
    assert len(caught) == 1
    assert "these texts are mostly in another script" in str(caught[0].message)


def test_english_and_code_give_no_warning(minilm):
    root = Path(__file__).parents[2]
    with TwoStageRetriever(minilm) as retriever, warnings.catch_warnings():
        warnings.simplefilter("error")
        index_files([root / "docs/search.md", root / "mrl_rag/tasks.py"], retriever)


def test_another_model_is_not_judged(folder, retriever):
    (folder / "a.txt").write_text(GERMAN, encoding="utf-8")
    index_files([folder], retriever)  # warnings are errors here
