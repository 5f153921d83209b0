"""Each example runs as it is, offline and without a key, and says something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))

from docstrings import read_passages, summarize, title  # noqa: E402

SAYS = {
    "langchain_rag": ["shutil.copytree", "Question: How do I copy a whole folder?"],
    "langchain_agent_tool": ["model calls search_python_docs", "tool says: shutil.disk_usage", "ai says: It is"],
    "migrate_from_chroma": ["records were copied", "Chroma     shutil.copytree", "two-stage  shutil.copytree"],
    "openai_embeddings": ["OPENAI_API_KEY is not set", "256 numbers", "json.loads"],
}


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs_and_says_what_it_found(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}
    ran = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    for line in SAYS[name]:
        assert line in ran.stdout
    assert not list(tmp_path.iterdir())


def test_a_passage_is_a_name_with_its_words_and_what_it_does():
    assert (
        title("concurrent.futures.ThreadPoolExecutor") == "concurrent.futures.ThreadPoolExecutor (thread pool executor)"
    )
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
