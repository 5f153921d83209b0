import subprocess
import sys
from pathlib import Path

import chromadb
import numpy as np
import pytest

from mrl_rag import TwoStageIndex, TwoStageRetriever, __version__
from mrl_rag.cli import main


@pytest.fixture
def db(tmp_path):
    index = TwoStageIndex(tmp_path, full_dim=16, shortlist_dim=8, model="minilm", fingerprint="ab12")
    index.upsert([f"id-{i}" for i in range(20)], np.random.default_rng(0).normal(size=(20, 16)))
    index.close()
    return tmp_path


def test_the_command_is_installed():
    command = Path(sys.executable).parent / "mrl-rag"
    assert subprocess.run([command, "--version"], capture_output=True, text=True).stdout == f"mrl-rag {__version__}\n"


def test_a_sound_index(db, capsys):
    assert main(["verify", str(db)]) == 0
    assert capsys.readouterr().out == (
        "docs: model minilm (fingerprint ab12), 8 of 16 dimensions, rotation auto\n20 records: nothing is wrong\n"
    )


def test_verify_names_what_repair_mends(db, capsys):
    chromadb.PersistentClient(db).get_collection("docs").delete(ids=[f"id-{i}" for i in range(7)])
    assert main(["verify", str(db)]) == 1
    assert "orphaned: 7 (id-0, id-1, id-2, id-3, id-4 and 2 more)" in capsys.readouterr().out
    assert main(["repair", str(db)]) == 0
    assert main(["verify", str(db)]) == 0
    assert capsys.readouterr().out.count("13 records: nothing is wrong\n") == 2


@pytest.mark.usefixtures("default_dtype")
def test_repair_encodes_what_chroma_has_added_by_itself(tmp_path, capsys, minilm):
    with TwoStageRetriever(minilm, tmp_path) as retriever:
        retriever.index_texts(["numpy.pad adds zeros around an array"])
    chromadb.PersistentClient(tmp_path).get_collection("docs").add(["new"], np.ones((1, 96)), documents=["a thread"])
    assert main(["repair", str(tmp_path)]) == 1
    assert f"missing: 1 (new)\n1 without a sound full vector: run `mrl-rag repair --encode {tmp_path}`\n" in (
        capsys.readouterr().out
    )
    assert main(["repair", str(tmp_path), "--encode"]) == 0
    with TwoStageRetriever(minilm, tmp_path) as retriever:
        assert retriever.search("a thread", k=1)[0].score > 0.99


def test_reindex(db):
    assert main(["reindex", str(db), "--shortlist-dim", "4", "--rotation", "fit"]) == 0
    index = TwoStageIndex(db)
    assert (index.shortlist_dim, index.rotation) == (4, "fit")


def test_the_only_index_of_a_folder_needs_no_name_and_several_are_listed(tmp_path, capsys):
    for name in ("notes", "mails"):
        if name == "mails":
            assert main(["verify", str(tmp_path)]) == 0
        with TwoStageIndex(tmp_path, name) as index:
            index.upsert(["a"], np.ones((1, 16)))
    assert main(["verify", str(tmp_path)]) == 2
    assert "has several indexes. Name one of these by --collection: mails, notes." in capsys.readouterr().err
    assert main(["verify", str(tmp_path), "--collection", "mails"]) == 0
    assert "mails: model not known, 16 of 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "nowhere"], "is not a folder"),
        (["verify", "{db}", "--collection", "other"], "no index other. Name one of these by --collection: docs."),
        (["reindex", "{db}", "--shortlist-dim", "99"], "1 to 16"),
    ],
)
def test_what_cannot_be_done_is_said_on_one_line(db, capsys, arguments, said):
    assert main([argument.format(db=db) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not Path("nowhere").exists()
