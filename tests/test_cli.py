"""What `mrl-rag` promises in a shell."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import chromadb
import numpy as np
import pytest

from mrl_rag import MatryoshkaHead, TwoStageIndex, TwoStageRetriever, __version__
from mrl_rag.cli import main
from mrl_rag.cli.conditions import parse_where
from mrl_rag.errors import InvalidInput

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(r"^## `mrl-rag ([\w-]+)`$", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(autouse=True)
def _any_terminal(monkeypatch):
    """What the terminal of whoever runs the tests is like changes nothing."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def _float32(monkeypatch):
    import torch

    monkeypatch.setattr("mrl_rag.encoder.encoder.pick_dtype", lambda device: torch.float32)


@pytest.fixture
def db(tmp_path):
    """An index of 20 vectors, made without a model."""
    index = TwoStageIndex(tmp_path / "db", full_dim=16, shortlist_dim=8, model="minilm", fingerprint="ab12")
    index.upsert([f"id-{i}" for i in range(20)], np.random.default_rng(0).normal(size=(20, 16)))
    index.close()
    return tmp_path / "db"


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """The current folder: it has notes, and no index yet."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "boats.md").write_text("# Boats\n\n## Sails\n\nA jib is a triangular sail.\n")
    (tmp_path / "notes" / "trees.txt").write_text("An oak sheds its leaves in autumn.\n")
    (tmp_path / "notes" / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "notes"


@pytest.fixture(scope="module")
def model(make_tiny_bert):
    """The folder of a model that loads at once, and reads short files as a whole."""
    return str(make_tiny_bert(max_length=64))


@pytest.fixture
def filled(notes, model, _float32, capsys):
    """The index of the notes."""
    assert main(["index", "notes", "--model", model]) == 0
    capsys.readouterr()
    return Path("db")


def start(*arguments, stdout=subprocess.PIPE, **environment):
    """Start a real process, with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "mrl_rag", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
    )


# From files to answers


@pytest.mark.usefixtures("default_dtype", "notes")
def test_a_folder_of_files_gives_answers(capsys):
    assert main(["index", "notes"]) == 0
    assert capsys.readouterr().out == (
        "2 files, 0 of them unchanged: 2 passages, 2 encoded, 0 removed\nleft out, being no documents: 1 .png\n"
    )
    assert main(["search", "which sail has three corners?", "-k", "1"]) == 0
    score, rest = re.fullmatch(r"1\. (0\.\d\d)  (.*)", capsys.readouterr().out, re.DOTALL).groups()
    assert float(score) > 0.4
    assert rest == "notes/boats.md:1  Boats\n   # Boats\n   ## Sails\n   A jib is a triangular sail.\n"


def test_again_only_what_changed_is_encoded_and_what_is_gone_is_removed(filled, notes, capsys):
    (notes / "trees.txt").unlink()
    (notes / "birds.txt").write_text("A wren is small and loud.")
    assert main(["index", "notes"]) == 0
    assert capsys.readouterr().out.startswith("2 files, 1 of them unchanged: 2 passages, 1 encoded, 1 removed\n")
    assert main(["index", "notes", "--exclude", "birds*", "--keep-removed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 0


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(filled, notes, capsys):
    (notes / "new\nline.pdf").write_bytes(b"%PDF-1.7 broken")
    (notes / "birds.txt").write_text("A wren is small and loud.")
    assert main(["index", "notes"]) == 1
    out = capsys.readouterr().out
    assert "3 files, 2 of them unchanged: 3 passages, 1 encoded" in out
    assert f"1 could not be read:\n  {notes}/new\\nline.pdf: " in out


def test_a_place_is_a_line_a_page_or_an_id(tmp_path, monkeypatch, capsys, model, _float32):
    from mrl_rag import MatryoshkaEncoder

    monkeypatch.chdir(tmp_path)
    with TwoStageRetriever(MatryoshkaEncoder(model), "db") as retriever:
        retriever.index_texts(
            ["abc", "def", "ghi"],
            ["one", "two", "three"],
            [{"path": str(tmp_path / "a" / "b.md"), "line": 7}, {"path": "/elsewhere/c.pdf", "page": 3}, None],
        )
    assert main(["search", "abc"]) == 0
    places = {line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()}
    assert places == {"a/b.md:7", "/elsewhere/c.pdf, page 3", "three"}


def test_conditions_choose_records(filled, capsys):
    assert main(["search", "a", "--where", "path=notes/trees.txt", "--json"]) == 0
    assert [Path(json.loads(line)["metadata"]["path"]).name for line in capsys.readouterr().out.splitlines()] == [
        "trees.txt"
    ]
    assert main(["search", "a", "--where", "line>1", "--where", "title!=Boats"]) == 0
    assert capsys.readouterr().out == "nothing was found\n"


def test_explain_shows_the_stages(filled, capsys):
    assert main(["search", "a", "-k", "1", "--explain"]) == 0
    assert re.search(r"^   16 dimensions: rank 1 of 1, score 0\.\d{4}, \d+\.\d\d ms$", capsys.readouterr().out, re.M)


def test_without_a_question_each_line_is_one(filled, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("who?\n\nwhat?\n"))
    assert main(["search", "-k", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["who?", "what?"]


# What is shown


@pytest.fixture
def long_note(tmp_path, model, _float32):
    from mrl_rag import MatryoshkaEncoder

    text = "\n".join([*(f"filler line {i}" for i in range(30)), "Renewing visas takes weeks.", "\x1b[2Jcleared"])
    with TwoStageRetriever(MatryoshkaEncoder(model), tmp_path / "db") as retriever:
        retriever.index_texts([text], metadatas=[{"path": str(tmp_path / "a.log"), "line": 1}])
    return str(tmp_path / "db")


QUESTION = "how do I renew the visa?"


def test_the_lines_that_answer_are_shown_and_no_control_characters(long_note, capsys):
    assert main(["search", QUESTION, "--db", long_note]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "   ... filler line 28",
        "   filler line 29",
        "   Renewing visas takes weeks.",
        "   \ufffd[2Jcleared",
    ]


def test_a_terminal_gets_links_and_lit_words(long_note, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["search", QUESTION, "--db", long_note]) == 0
    out = capsys.readouterr().out
    assert f"{Path(long_note).parent.as_uri()}/a.log" in out
    assert re.findall(r"\x1b\[1;33m(\w+)\x1b\[0m", out) == ["Renewing", "visas"]


def test_under_no_color_there_is_plain_text(long_note, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["search", QUESTION, "--db", long_note]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_pipes_get_whole_paths_however_narrow_the_terminal(long_note, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert main(["search", QUESTION, "--db", long_note]) == 0
    assert f"{Path(long_note).parent / 'a.log'}:1\n" in capsys.readouterr().out


def test_letters_that_the_encoding_lacks_are_escaped(db):
    backup = db / "日本.jsonl"
    with start("export", backup, "--db", db, PYTHONIOENCODING="ascii") as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, rf"20 records in {db}/\u65e5\u672c.jsonl" + "\n", "")
    assert backup.is_file()


# Chores


def test_a_sound_index(db, capsys):
    assert main(["verify", str(db)]) == 0
    assert capsys.readouterr().out == (
        "docs: model minilm (fingerprint ab12), 8 of 16 dimensions, rotation auto\n20 records: nothing is wrong\n"
    )


def test_verify_names_what_repair_mends(db, capsys):
    chromadb.PersistentClient(db).get_collection("docs").delete(ids=[f"id-{i}" for i in range(7)])
    assert main(["verify", "--db", str(db)]) == 1
    assert "orphaned: 7 (id-0, id-1, id-2, id-3, id-4 and 2 more)" in capsys.readouterr().out
    assert main(["repair", "--db", str(db)]) == 0
    assert main(["verify", "--db", str(db)]) == 0
    assert capsys.readouterr().out.count("13 records: nothing is wrong\n") == 2


@pytest.mark.parametrize("command", [["evaluate", "--save"], ["report", "--output"], ["fit-head", "--output"]])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, command):
    with TwoStageIndex(tmp_path / "db") as index:
        index.upsert([f"id-{i}" for i in range(120)], np.random.default_rng(0).normal(size=(120, 16)))
    for file, said in ((tmp_path / "gone" / "file", "there is no folder"), (tmp_path, "is a directory")):
        assert main([command[0], str(tmp_path / "db"), command[1], str(file)]) == 2
        streams = capsys.readouterr()
        assert streams.out == ""
        assert said in " ".join(streams.err.split())
    assert os.listdir(tmp_path) == ["db"]


def test_a_head_fitted_on_an_index_is_put_on_it_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mrl_rag.heads.fitting._MAX_STEPS", 20)
    output = str(tmp_path / "head.safetensors")
    with TwoStageIndex(tmp_path / "db", model="minilm", fingerprint="ab12") as index:
        index.upsert([f"id-{i}" for i in range(120)], np.random.default_rng(0).normal(size=(120, 16)))
    assert main(["fit-head", str(tmp_path / "db"), "--output", output, "--apply"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("90 vectors of minilm, 30 held out\nshare of the top 10 at full dimension that is found")
    assert re.search(r"^ +8  0\.\d{3} -> 0\.\d{3}$", out, re.M)
    assert out.endswith(f"written to {output}\n")
    head = MatryoshkaHead.load(output)
    assert head.card.data == "120 records of index 'docs'"
    with TwoStageIndex(tmp_path / "db") as index:
        assert index.fingerprint == head.fingerprint_with("ab12")
    assert main(["fit-head", str(tmp_path / "db")]) == 2
    assert "has a head already" in capsys.readouterr().err


@pytest.mark.usefixtures("default_dtype")
def test_repair_encodes_what_chroma_has_added_by_itself(tmp_path, capsys, minilm):
    with TwoStageRetriever(minilm, tmp_path) as retriever:
        retriever.index_texts(["numpy.pad adds zeros around an array"])
    chromadb.PersistentClient(tmp_path).get_collection("docs").add(["new"], np.ones((1, 96)), documents=["a thread"])
    assert main(["repair", str(tmp_path)]) == 1
    advice = f"1 without a sound full vector: run `mrl-rag repair --encode --db {tmp_path}`\n"
    assert f"missing: 1 (new)\n{advice}" in capsys.readouterr().out
    assert main(["repair", str(tmp_path), "--encode"]) == 0
    with TwoStageRetriever(minilm, tmp_path) as retriever:
        assert retriever.search("a thread", k=1)[0].score > 0.99


def test_reindex(db):
    assert main(["reindex", str(db), "--shortlist-dim", "4", "--rotation", "fit"]) == 0
    with TwoStageIndex(db) as index:
        assert (index.shortlist_dim, index.rotation) == (4, "fit")


def test_a_backup_comes_back_in_another_folder(db, tmp_path, capsys):
    backup, restored = str(tmp_path / "backup.jsonl"), str(tmp_path / "restored")
    assert main(["export", backup, "--db", str(db)]) == 0
    assert main(["import", backup, "--db", restored]) == 0
    assert main(["info", restored]) == 0
    assert re.search(r"records +20\n +model +minilm \(fingerprint ab12\)", capsys.readouterr().out)


def test_a_new_model_takes_over_and_the_old_one_is_kept_until_it_is_dropped(filled, make_tiny_bert, capsys):
    new = str(make_tiny_bert(seed=1))
    assert main(["reencode", "--model", new]) == 0
    assert f"docs: model {new}, 2 records\nthe old one is kept as " in capsys.readouterr().out
    assert main(["search", "a", "-k", "1"]) == 0
    assert main(["info", "--json"]) == 0
    kept = json.loads(capsys.readouterr().out.partition("\n[")[2].join(["[", ""]))[0]["kept"]
    assert main(["reencode", "--drop-old", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == kept != []


def test_compact_gives_space_back(db, capsys):
    with TwoStageIndex(db) as index:
        index.upsert([f"n{i}" for i in range(3000)], np.random.default_rng(1).normal(size=(3000, 16)))
        index.delete([f"n{i}" for i in range(3000)])
    assert main(["compact", str(db), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] > 100_000


def test_clear_asks_and_without_anybody_to_answer_removes_nothing(db, capsys):
    assert main(["clear", str(db)]) == 2
    assert "pass --yes" in capsys.readouterr().err
    assert main(["clear", str(db), "--yes"]) == 0
    assert capsys.readouterr().out == "20 records removed\n"


def test_clear_takes_no_for_an_answer(db, capsys, monkeypatch):
    terminal = io.StringIO("n\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(["clear", str(db)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith(f"Remove 20 records of docs in {db}? [y/N]:")
    assert out.endswith("nothing was removed\n")
    with TwoStageIndex(db) as index:
        assert len(index) == 20


def test_the_models_fit_80_columns_and_say_what_is_here(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("minilm ")).split() == [
        *("minilm", "384", "en", "Apache-2.0", "yes")
    ]


def test_models_for_chinese_are_found_by_language(capsys):
    assert main(["models", "--language", "zh", "--json"]) == 0
    found = {row["name"]: row["languages"] for row in json.loads(capsys.readouterr().out)}
    assert found["acge_text_embedding"] == "zh"
    assert set(found.values()) == {"zh", "multilingual"}


# How commands end


def notes_records(folder):
    (folder / "records.jsonl").write_text('{"id": "a", "text": "a note"}\n')
    return folder / "records.jsonl"


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_all_that_a_command_prints(command, filled, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mrl_rag.heads.fitting._MAX_STEPS", 20)
    backup, pairs = str(tmp_path / "backup.jsonl"), tmp_path / "pairs.jsonl"
    words = [one + two for one in "abcdefghijk" for two in "lmnopqrstu"]
    pairs.write_text("".join(json.dumps([f"what is {word}", f"{word} is a thing"]) + "\n" for word in words))
    if command in ("import", "load"):
        assert main(["export", backup]) == 0
        capsys.readouterr()
    arguments = {
        "index": ["notes"],
        "search": ["a"],
        "export": [backup],
        "import": [backup],
        "load": [backup],
        "encode": [str(notes_records(tmp_path)), "--output", str(tmp_path / "shards"), "--model", model],
        "reencode": ["--drop-old"],
        "fit-head": ["--pairs", str(pairs), "--model", model, "--apply"],
        "clear": ["--yes"],
    }.get(command, [])
    assert main([command, *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for document in out.splitlines() if command == "search" else [out]:
        assert json.loads(document) is not None


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=lambda command: "".join(command))
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"Examples?:\s+mrl-rag {''.join(command)}", out)
    assert max(map(len, out.splitlines())) <= 80


def test_the_docs_show_the_help_as_it_is(capsys):
    assert main(["--help"]) == 0
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert f"```text\n$ mrl-rag --help\n{capsys.readouterr().out}```" in page
    assert set(re.findall(r"^  ([\w-]+)  +[A-Z]", page.partition("Commands:")[2].partition("Examples:")[0], re.M)) == {
        *COMMANDS
    }


def test_the_examples_in_the_docs_print_what_stands_under_them(tmp_path, monkeypatch, capsys, _float32):
    monkeypatch.chdir(tmp_path)
    Path("notes").mkdir()
    Path("notes/boats.md").write_text("# Boats\n\n## Sails\n\nA jib is a triangular sail, set in front of the mast.\n")
    Path("notes/trees.txt").write_text("An oak sheds its leaves in autumn. A spruce keeps its needles all year.\n")
    Path("notes/ferry.csv").write_text(
        "day,text\n1,The ferry to the island leaves at nine.\n2,In a storm the ferry stays in the harbour.\n"
    )
    # Scores, milliseconds and bytes depend on the machine.
    number = re.compile(r"\b\d+\.\d+\b")
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    examples = "".join(re.findall(r"```console\n(.*?)```", page, re.DOTALL)).split("$ mrl-rag ")[1:]
    assert len(examples) > 10
    for example in examples:
        command, _, shown = example.partition("\n")
        assert main(shlex.split(command)) == 0
        assert number.sub("N", capsys.readouterr().out) == number.sub("N", shown), command


def test_the_command_is_installed():
    command = Path(sys.executable).parent / "mrl-rag"
    assert subprocess.run([command, "--version"], capture_output=True, text=True).stdout == f"mrl-rag {__version__}\n"


def test_python_m_is_the_command_and_help_loads_neither_torch_nor_chroma():
    code = (
        "import runpy, sys\nsys.argv = ['mrl_rag', '--help']\n"
        "try:\n    runpy.run_module('mrl_rag', run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code, {'torch', 'chromadb', 'transformers'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.startswith("Usage: mrl-rag ")
    assert ran.stdout.endswith("0 set()\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has another Ctrl-C")
def test_ctrl_c_ends_with_130_and_without_a_traceback(filled):
    with start("search", "-k", "1") as process:
        process.stdin.write("who?\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith("1. ")
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert err == "mrl-rag: interrupted; what was stored stays. Run the same command again to go on.\n"


def test_a_reader_that_has_had_enough_is_no_trouble():
    reader, writer = os.pipe()
    os.close(reader)
    with start("models", stdout=writer) as process:
        err = process.stderr.read()
    os.close(writer)
    assert (process.returncode, err) == (0, "")


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
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert [index["name"] for index in json.loads(capsys.readouterr().out)] == ["mails", "notes"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "nowhere"], "no folder nowhere"),
        (["verify", "{db}", "--collection", "other"], "no index other. Name one of these by --collection: docs."),
        (["reindex", "{db}", "--shortlist-dim", "99"], "1 to 16"),
        (["reindex", "{db}", "--rotation", "sideways"], "'sideways' is not one of"),
        (["search", "a", "--db", "{db}", "--where", "page~3"], "write KEY=VALUE"),
        (["serch", "a"], "Did you mean 'search'?"),
        (["index"], "PATH"),
        (["reencode", "--db", "{db}"], "--model"),
        (["export", "docs.csv", "--db", "{db}"], ".parquet"),
    ],
)
def test_what_cannot_be_done_is_said_on_one_line(db, capsys, arguments, said):
    assert main([argument.format(db=db) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)
    assert not Path("nowhere").exists()


def test_a_warning_is_one_line_and_no_code(filled, capsys):
    chromadb.PersistentClient(filled).get_collection("docs").add(["new"], np.ones((1, 16)), documents=["new"])
    assert main(["search", "a", "--json"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"mrl-rag: 1 record.*\n", err)
    assert len(out.splitlines()) == 3


# Conditions


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ([], None),
        (["page=3"], {"page": {"$eq": 3}}),
        (["score >= 0.5"], {"score": {"$gte": 0.5}}),
        (["draft!=true"], {"draft": {"$ne": True}}),
        (["zip='01234'"], {"zip": {"$eq": "01234"}}),
        (["formula=a=b"], {"formula": {"$eq": "a=b"}}),
        (["number=nan"], {"number": {"$eq": "nan"}}),
        (["page>1", "page<=9"], {"$and": [{"page": {"$gt": 1}}, {"page": {"$lte": 9}}]}),
    ],
)
def test_a_condition_means_what_it_says(written, meant):
    assert parse_where(written) == meant


@pytest.mark.parametrize("written", ["page", "=3", "page~3", "title>Boats"])
def test_another_condition_is_refused(written):
    with pytest.raises(InvalidInput, match="--where is"):
        parse_where([written])


def test_a_file_that_is_not_there_makes_no_folder(tmp_path, capsys):
    assert main(["import", str(tmp_path / "nothing.parquet"), "--db", str(tmp_path / "db")]) == 2
    assert "nothing.parquet does not exist" in capsys.readouterr().err
    assert not (tmp_path / "db").exists()
