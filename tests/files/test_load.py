"""What `load` makes of each kind of file, and of what isn't one."""

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrl_rag import MatryoshkaEncoder
from mrl_rag.errors import InvalidInput
from mrl_rag.files import load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def problems():
    return []


@pytest.fixture
def read(encoder, problems):
    """The chunks of files, and the files that can't be read by name."""

    def read(*paths, **settings):
        chunks = list(load(paths, encoder, on_problem=problems.append, **settings))
        return chunks, {Path(problem.path).name: problem.reason for problem in problems}

    return read


MARKDOWN = """# Guide

Before all else.

## Install

On Linux, call make.

```sh
# not a heading
```

### From source

Clone it.

## Use

Call search.
"""


def test_markdown_knows_title_headings_and_lines(folder, read):
    (folder / "guide.md").write_text(MARKDOWN)
    chunks, _ = read(folder, chunk_tokens=12)
    found = {chunk.text.splitlines()[-1]: (chunk.headings, chunk.line) for chunk in chunks}
    assert found["Clone it."][0] == "Guide > Install > From source"
    assert found["Call search."] == ("Guide > Use", 17)
    assert {chunk.title for chunk in chunks} == {"Guide"}
    lines = MARKDOWN.splitlines()
    for chunk in chunks:
        assert lines[chunk.line - 1].startswith(chunk.text.splitlines()[0])
    assert [chunk.number for chunk in chunks] == list(range(1, len(chunks) + 1))


def test_a_heading_stays_with_what_stands_under_it(folder, minilm):
    section = "A hull is the body of a ship, and it keeps the water out of it. " * 10
    (folder / "a.md").write_text(f"# Boats\n\n## Hulls\n\n{section}\n\n## Sails\n\n{section}\n\n## End\n")
    chunks = list(load([folder], minilm, chunk_tokens=128))
    assert chunks[0].text.startswith("# Boats\n\n## Hulls\n\nA hull is")
    assert any(chunk.text.startswith("## Sails\n\nA hull is") for chunk in chunks)
    assert max(minilm.count_tokens([chunk.text for chunk in chunks])) <= 128


def test_code_is_split_between_functions(folder, read):
    functions = [f"def function_{i}(a, b):\n    c = a + b\n    return c * {i}\n" for i in range(6)]
    (folder / "code.py").write_text("\n\n".join(functions))
    chunks, _ = read(folder / "code.py", chunk_tokens=60)
    assert len(chunks) > 1
    assert all(chunk.text.startswith("def function_") for chunk in chunks)
    assert [chunk.line for chunk in chunks] == [
        1 + "\n\n".join(functions)[: "\n\n".join(functions).index(chunk.text)].count("\n") for chunk in chunks
    ]


def test_long_code_that_no_grammar_reads_is_split_in_seconds(folder, read):
    # Conditions within a list, as in generated tables.
    rows = "".join(f"\t0x{i:04X}U, 0x{i + 1:04X}U, 0x{i + 2:04X}U, 0x{i + 3:04X}U,\n" for i in range(0, 4096, 4))
    table = f"const int table[] = {{\n#if LITTLE\n{rows}#else\n{rows}#endif\n}};\n"
    (folder / "a.h").write_text(table)
    chunks, _ = read(folder, chunk_tokens=200)
    assert "".join("".join(chunk.text.split()) for chunk in chunks) == "".join(table.split())
    lines = table.splitlines()
    assert all(chunk.text.splitlines()[0] in lines[chunk.line - 1] for chunk in chunks)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("a.c", "int f() { return 1; }"),
        ("a.cpp", "int f() { return 1; }"),
        ("a.cs", "class A { int F() { return 1; } }"),
        ("a.go", "package a\nfunc f() int { return 1 }"),
        ("a.java", "class A { int f() { return 1; } }"),
        ("a.js", "function f() { return 1 }"),
        ("a.php", "<?php function f() { return 1; }"),
        ("a.rb", "def f\n  1\nend"),
        ("a.rs", "fn f() -> i32 { 1 }"),
        ("a.sh", "f() { echo 1; }"),
        ("a.ts", "function f(): number { return 1 }"),
        ("a.tsx", "const a = <b>1</b>"),
    ],
)
def test_code_of_each_language_is_read(folder, read, name, code):
    (folder / name).write_text(code)
    chunks, unreadable = read(folder)
    assert ([chunk.text for chunk in chunks], unreadable) == ([code], {})


def test_a_pdf_knows_its_pages(folder, read, pdf):
    (folder / "a.pdf").write_bytes(pdf("The first page.", "", "The third page.", title="On pages"))
    chunks, _ = read(folder)
    assert [(chunk.text, chunk.page, chunk.line, chunk.title) for chunk in chunks] == [
        ("The first page.", 1, None, "On pages"),
        ("The third page.", 3, None, "On pages"),
    ]
    assert chunks[1].metadata == {"path": str(folder / "a.pdf"), "title": "On pages", "page": 3, "chunk": 2}


def test_html_and_word_documents_become_markdown(folder, read, docx):
    (folder / "a.html").write_text(
        "<html><head><title>Über uns</title><script>var x</script></head><body><h2>Team</h2><p>Wir.</p></body></html>",
        encoding="utf-8",
    )
    docx(folder / "b.docx", "Report", "All is well.")
    chunks, _ = read(folder)
    assert [(chunk.text, chunk.title, chunk.headings, chunk.line) for chunk in chunks] == [
        ("## Team\n\nWir.", "Über uns", "Team", None),
        ("# Report\n\nAll is well.", "Report", "Report", None),
    ]


def test_a_row_of_a_table_is_a_chunk(folder, read):
    (folder / "a.csv").write_text('city;people\n"Old\nTown";12\nBath;94000\n')
    (folder / "b.tsv").write_text("city\tpeople\nBath\t94000\n")
    chunks, _ = read(folder)
    assert [(chunk.text, chunk.line) for chunk in chunks] == [
        ("city: Old\nTown\npeople: 12", 2),
        ("city: Bath\npeople: 94000", 4),
        ("city: Bath\npeople: 94000", 2),
    ]


def test_json_lines_with_a_text_keep_the_other_fields(folder, read):
    rows = [{"_id": "7", "title": "Bath", "text": "A city.", "year": 60, "tags": ["a"], "big": 10**30}, {"city": "Ur"}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chunks, _ = read(folder)
    assert chunks[0].text == "Bath\nA city."
    assert chunks[0].title == "Bath"
    assert chunks[0].metadata == {
        "_id": "7", "year": 60, "path": str(folder / "a.jsonl"), "title": "Bath", "line": 1, "chunk": 1,
    }  # fmt: skip
    assert (chunks[1].text, chunks[1].line, chunks[1].title) == ("city: Ur", 2, "a.jsonl")


TEXT = "Señora Núñez está en El Niño; Straße, garçon, œuvre, “quoted”."


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_text_in_any_encoding(folder, read, encoding):
    (folder / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read(folder)[0][0].text == TEXT


def test_latin_1_with_the_line_ends_of_windows(folder, read):
    (folder / "a.txt").write_bytes("Größe\r\n\r\n\r\nañejo".encode("latin-1"))
    chunks, _ = read(folder, chunk_tokens=8)
    assert "".join(chunk.text for chunk in chunks).replace("\n", "") == "Größeañejo"


def test_one_line_of_megabytes_is_split_in_seconds(folder, read):
    (folder / "a.md").write_text("# All in one line " + "with so many words, " * 100_000)
    chunks, _ = read(folder)
    assert sum(len(chunk.text) for chunk in chunks) > 1_900_000
    assert {chunk.line for chunk in chunks} == {1}


def test_what_cannot_be_read_is_named_and_the_rest_is_read(folder, read, pdf):
    (folder / "a.txt").write_text("readable")
    (folder / "binary").write_bytes(bytes(range(256)) * 9)
    (folder / "broken.docx").write_bytes(b"PK\x03\x04 not a zip")
    (folder / "broken.pdf").write_bytes(pdf("a page")[:100])
    (folder / "encrypted.pdf").write_bytes(pdf("a page", encrypted=True))
    (folder / "rows.jsonl").write_text('{"a": 1}\n{"a":')
    (folder / "scan.pdf").write_bytes(pdf("", ""))
    (folder / "link").symlink_to(folder / "gone")
    with (folder / "large.txt").open("wb") as file:
        file.truncate(2**30)
    chunks, unreadable = read(folder, folder / "nowhere")
    assert [chunk.text for chunk in chunks] == ["readable"]
    reasons = {
        "binary": "it is binary",
        "broken.docx": "can't be converted",
        "broken.pdf": "it is no PDF, or damaged",
        "encrypted.pdf": "it is encrypted",
        "large.txt": "it has 1,024 MB, more than 100 MB; split it",
        "link": "it is a link to nothing",
        "nowhere": "there is no such file or folder",
        "rows.jsonl": "line 2 is not JSON",
        "scan.pdf": "pictures, without text",
    }
    assert unreadable.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in unreadable[name]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is forbidden here")
def test_a_folder_without_permission_is_named(folder, read):
    (folder / "secret").mkdir(mode=0)
    assert read(folder)[1] == {"secret": "permission denied"}


def test_circles_of_links_end_and_a_file_is_read_once(folder, read):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("once")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "again.txt").symlink_to(folder / "sub" / "a.txt")
    (folder / "x").symlink_to(folder / "y")
    (folder / "y").symlink_to(folder / "x")
    chunks, unreadable = read(folder, folder / "sub")
    assert [chunk.text for chunk in chunks] == ["once"]
    assert unreadable.keys() == {"x", "y"}


def test_a_socket_is_not_opened(folder, read, monkeypatch):
    monkeypatch.chdir(folder)  # a socket's path may have 108 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        assert read(folder) == ([], {})


@pytest.mark.parametrize("name", ["a\nb.txt", "🦜 and more.txt", "'quoted'.txt", "%s{0}.txt", "-rf.txt"])
def test_a_file_of_any_name(folder, read, name):
    (folder / name).write_text("text")
    assert [(chunk.path, chunk.title) for chunk in read(folder)[0]] == [(str(folder / name), name)]


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_name_that_is_not_unicode_is_named(folder, read):
    try:
        (folder / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    except OSError:
        pytest.skip("this file system refuses such names")
    chunks, unreadable = read(folder)
    assert (chunks, list(unreadable.values())) == ([], ["its name is not valid Unicode; rename it"])


def test_patterns_choose_what_is_read_from_folders(folder, read):
    for name in ("a.md", "b.txt", "api/c.md", "drafts/d.md", ".git/e.md", "node_modules/f.md", "api/.hidden.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)

    def names(**settings):
        return [chunk.text for chunk in read(folder, **settings)[0]]

    assert names() == ["a.md", "api/c.md", "b.txt", "drafts/d.md"]
    assert names(glob=["*.md"], exclude=["drafts"]) == ["a.md", "api/c.md"]
    assert names(glob=["api/*"]) == ["api/c.md"]
    assert names(exclude=["api/*", "*.txt", "drafts/"]) == ["a.md"]
    assert [chunk.text for chunk in read(folder / ".git" / "e.md", glob=["*.txt"])[0]] == [".git/e.md"]


def test_without_a_callback_a_warning_names_what_cannot_be_read(folder, encoder):
    with pytest.warns(UserWarning, match=r"gone\.txt' is left out: there is no such file"):
        assert list(load([folder / "gone.txt"], encoder)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paths": "docs"}, "pass a list"),
        ({"paths": Path("docs")}, "pass a list"),
        ({"paths": []}, "paths is empty"),
        ({"paths": ["docs"], "chunk_tokens": 3}, "chunk_tokens is 3; it must be an integer from 8"),
        ({"paths": ["docs"], "chunk_tokens": "all"}, "chunk_tokens is 'all'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(encoder, arguments, message):
    with pytest.raises(InvalidInput, match=message):
        load(encoder=encoder, **arguments)


class TestMeasuredByTheEncoder:
    def test_no_chunk_is_cut_prompt_and_special_tokens_counted(self, make_tiny_bert):
        prompts = {"document": "passage: "}
        encoder = MatryoshkaEncoder(make_tiny_bert(prompts=prompts, max_length=64), dtype="float32", device="cpu")
        chunks = list(load([ROOT / "README.md", ROOT / "mrl_rag/errors.py", ROOT / "docs/search.md"], encoder))
        counts = encoder.count_tokens([chunk.text for chunk in chunks])
        assert max(counts) <= 64
        assert sum(counts) / len(counts) > 32  # they are not needlessly short
        encoder.encode_documents([chunk.text for chunk in chunks])
        assert encoder.last_truncation.texts == 0

    def test_chunks_hold_all_of_the_text(self, minilm):
        chunks = load([ROOT / "README.md"], minilm, chunk_tokens=40)
        found = "".join("".join(chunk.text.split()) for chunk in chunks)
        assert found == "".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def test_a_chunk_is_at_most_what_the_encoder_reads(self, minilm):
        with pytest.raises(InvalidInput, match="from 10 to 256"):
            load(["docs"], minilm, chunk_tokens=257)

    @settings(max_examples=25, deadline=None)
    @given(text=st.text(st.sampled_from("ab é東🦜.\n\t#`|-*_0"), max_size=2000))
    def test_any_text_is_split_into_chunks_that_are_read_whole(self, minilm, tmp_path_factory, text):
        folder = tmp_path_factory.mktemp("any")
        for suffix in ("txt", "md"):
            (folder / f"a.{suffix}").write_text(text, encoding="utf-8", newline="")
        chunks = list(load([folder], minilm, chunk_tokens=16))
        assert max(minilm.count_tokens([chunk.text for chunk in chunks]), default=0) <= 16
        for suffix in ("txt", "md"):
            found = "".join("".join(c.text.split()) for c in chunks if c.path.endswith(suffix))
            assert found == "".join(text.split())
