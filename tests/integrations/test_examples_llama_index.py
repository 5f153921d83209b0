"""The LlamaIndex example takes a language model. `test_examples.py` runs it as it is."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata
from llama_index_mrl import MatryoshkaEmbedding

EXAMPLE = Path(__file__).parents[2] / "examples" / "llamaindex_query_engine.py"


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
