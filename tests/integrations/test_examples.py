"""Each example runs as it is, offline and without a key, and says something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "langchain_rag": ["shutil.copytree", "Question: How do I copy a whole folder?"],
    "langchain_agent_tool": ["model calls search_python_docs", "tool says: shutil.disk_usage", "ai says: It is"],
    "migrate_from_chroma": ["records were copied", "Chroma     copytree", "two-stage  copytree"],
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
