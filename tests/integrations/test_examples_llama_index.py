"""The LlamaIndex example runs as it is, offline, and takes a language model."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index_mrl import MatryoshkaEmbedding

EXAMPLE = Path(__file__).parents[2] / "examples" / "llamaindex_query_engine.py"


def test_it_runs_as_it_is(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLE), "how do I pad an array with zeros?"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    nearest, asked = ran.stdout.split("What a language model is asked:")
    assert "numpy.pad adds zeros" in nearest.splitlines()[2]
    assert "numpy.pad adds zeros" in asked


def test_it_takes_any_language_model(minilm):
    class Shouting(CustomLLM):
        @property
        def metadata(self):
            return LLMMetadata()

        def complete(self, prompt, formatted=False, **kwargs):
            return CompletionResponse(text="NUMPY.PAD" if "numpy.pad adds zeros" in prompt else "?")

        def stream_complete(self, prompt, formatted=False, **kwargs):
            raise NotImplementedError

    spec = spec_from_file_location("llamaindex_query_engine", EXAMPLE)
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    engine = example.make_engine(MatryoshkaEmbedding(encoder=minilm), Shouting())
    assert str(engine.query("how do I pad an array with zeros?")) == "NUMPY.PAD"
