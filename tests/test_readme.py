"""The Python in README and docs runs, and prints what stands under it. README's first block is the quickstart."""

import multiprocessing
import re
import shlex
from pathlib import Path

import pytest

from mrl_rag.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block and, where it is shown, its output.
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
BLOCKS = [
    pytest.param(*block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]
# All blocks in one process, each with names of its own: what takes long is to import torch and the frameworks.
RUN = """
import contextlib, io, os, traceback, warnings
warnings.simplefilter("ignore")
os.chdir(folder)
result = []
for code in blocks:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, {"__name__": "__main__"})
        except Exception:
            traceback.print_exc(file=printed)
    result.append(printed.getvalue())
connection.send(result)
"""


@pytest.fixture(scope="module")
def printed(start_process, tmp_path_factory):
    """What each block prints, by its text."""
    blocks = [block.values[0] for block in BLOCKS]
    ours, theirs = multiprocessing.Pipe()
    process = start_process(RUN, blocks=blocks, folder=tmp_path_factory.mktemp("readme"), connection=theirs)
    theirs.close()
    assert ours.poll(300)
    result = ours.recv()
    process.join()
    return dict(zip(blocks, result, strict=True))


def test_the_first_block_is_the_quickstart():
    assert BLOCKS[0].values[0] == (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(("block", "shown"), BLOCKS)
def test_every_block_runs_and_prints_what_stands_under_it(block, shown, printed):
    assert shown, "no output is shown under this block"
    score = re.compile(r"\b0\.\d\d\b")
    assert score.sub("SCORE", printed[block]) == score.sub("SCORE", shown)
    # bfloat16, on machines that are fast at it, rounds cosines.
    assert [float(s) for s in score.findall(printed[block])] == pytest.approx(
        [float(s) for s in score.findall(shown)], abs=0.02
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_map_in_contributing_names_every_room_and_file():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mrl_rag").glob("[!_]*.py")}
    rooms |= {f"{path.parent.relative_to(ROOT).as_posix()}/" for path in ROOT.glob("*/*/__init__.py")}
    assert set(re.findall(r"^\| `((?:mrl_rag|integrations)/\S+)` \|", text, re.MULTILINE)) == rooms
    for room in ("encoder", "index"):
        table = text.partition(f"In `{room}/`:")[2].partition("\n\n")[2].partition("\n\n")[0]
        named = {name for line in table.splitlines() for name in re.findall(r"`(\w+\.py)`", line.split("|")[1])}
        assert named == {path.name for path in (ROOT / "mrl_rag" / room).glob("[!_]*.py")}


def test_the_commands_of_readme_find_what_stands_under_them(tmp_path, monkeypatch, capsys):
    """Scores, lines and counts change with the docs; the passages that are found should not."""
    import torch

    monkeypatch.setattr("mrl_rag.encoder.encoder.pick_dtype", lambda device: torch.float32)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands, shown = re.search(r"((?:    mrl-rag .*\n)+)\n```text\n(\d+ files.*?)```", text, re.DOTALL).groups()
    for command in commands.splitlines():
        assert main([*shlex.split(command.partition("    #")[0])[1:], "--db", str(tmp_path)]) == 0

    def places(output):
        return re.findall(r"^\d+\. [\d.]+  ([\w/.]+):\d+  (.*)$", output, re.MULTILINE)

    assert len(places(shown)) == 2
    assert places(capsys.readouterr().out) == places(shown)
