"""Each example runs offline and without a key, and says something. The demo's passages answer its questions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))

from docstrings import read_passages, summarize, title  # noqa: E402

SAYS = {
    "hybrid_search": ["  both     asyncio.sleep", "  both     calendar.monthrange"],
    "langchain_rag": ["shutil.copytree", "Question: How do I copy a whole folder?"],
    "langchain_agent_tool": ["model calls search_python_docs", "tool says: shutil.disk_usage", "ai says: It is"],
    "migrate_from_chroma": ["records were copied", "Chroma     shutil.copytree", "two-stage  shutil.copytree"],
    "openai_embeddings": ["OPENAI_API_KEY is not set", "256 numbers", "json.loads"],
}
LLAMA_INDEX = "llamaindex_query_engine"
# All in one process, each as a main module of its own: what takes long is to import torch and LangChain. LlamaIndex,
# the last one, warns while it is imported.
RUN = """
import contextlib, io, json, runpy, sys, warnings
said, (*files, last) = {}, sys.argv[1:]
for file in (*files, last):
    sys.argv = [file]
    if file == last:
        warnings.simplefilter("ignore")
        sys.argv.append("how do I pad an array with zeros?")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(file, run_name="__main__")
    said[file] = printed.getvalue()
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each example prints, by its file."""
    folder = tmp_path_factory.mktemp("examples")
    environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    path = os.pathsep.join([str(EXAMPLES), environment.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, *(str(EXAMPLES / f"{name}.py") for name in (*SAYS, LLAMA_INDEX))],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env=environment | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr
    assert not list(folder.iterdir())
    return {Path(file).stem: printed for file, printed in json.loads(ran.stdout).items()}


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_and_says_what_it_found(name, said):
    for line in SAYS[name]:
        assert line in said[name]


def test_the_example_for_llama_index_runs_and_says_what_a_model_is_asked(said):
    nearest, asked = said[LLAMA_INDEX].split("What a language model is asked:")
    assert "numpy.pad adds zeros" in nearest.splitlines()[2]
    assert "numpy.pad adds zeros" in asked


def test_a_passage_is_a_name_with_its_words_and_what_it_does():
    thread_pool = "concurrent.futures.ThreadPoolExecutor"
    assert title(thread_pool) == f"{thread_pool} (thread pool executor)"
    assert title("http.server.HTTPServer.get_request") == "http.server.HTTPServer.get_request (get request)"
    assert title("json.loads") == "json.loads"
    assert summarize("zeros(shape,\n      dtype=None) -> array\n\nReturn zeros.\n\nMore.") == "Return zeros."
    (found,) = [passage for passage in read_passages({"shutil"}) if passage.name == "shutil.rmtree"]
    assert found.text == f"shutil.rmtree: {found.summary}"
    assert found.summary == "Recursively delete a directory tree."


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How do I turn a JSON text into Python objects?", "json.loads"),
        ("run a function in a thread pool", "concurrent.futures.ThreadPoolExecutor"),
    ],
)
def test_the_demos_passages_answer_its_questions(question, answer, minilm):
    passages = read_passages({"json", "concurrent", "threading"})
    scores = minilm.encode_documents([p.text for p in passages]) @ minilm.encode_queries([question])[0]
    assert answer in [passages[place].name for place in (-scores).argsort()[:5]]
