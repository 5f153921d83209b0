"""A LlamaIndex query engine that searches in two stages, reranks, and fills a language model's context to a budget.

    python examples/llamaindex_query_engine.py "how do I pad an array with zeros?"

It runs offline: the language model is a stand-in that repeats its prompt.
"""

from __future__ import annotations

import sys

from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.llms import LLM, MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index_mrl import MatryoshkaEmbedding, MatryoshkaVectorStore, TokenBudget, TwoStageRetriever

PASSAGES = {
    "numpy.pad": "numpy.pad adds zeros or other values around an array.",
    "concurrent.futures": "concurrent.futures.ThreadPoolExecutor runs functions in a pool of threads.",
    "json": "json.loads turns a JSON text into Python objects, and json.dumps turns them back.",
    "pathlib": "pathlib.Path.glob lists the files of a folder that match a pattern.",
}


def make_engine(embed_model: MatryoshkaEmbedding, llm: LLM) -> RetrieverQueryEngine:
    """Index the passages in memory, and return an engine that answers from them."""
    # persist_dir="./db" keeps the index in a folder.
    store = MatryoshkaVectorStore(embed_model=embed_model)
    VectorStoreIndex.from_documents(
        [Document(doc_id=name, text=text, metadata={"source": name}) for name, text in PASSAGES.items()],
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=embed_model,
    )
    return RetrieverQueryEngine.from_args(
        TwoStageRetriever(store, embed_model, similarity_top_k=2),
        llm=llm,
        node_postprocessors=[TokenBudget(max_tokens=4000, reserve=1000)],
    )


def main() -> None:
    """Index the passages, and ask a question."""
    question = " ".join(sys.argv[1:]) or "how do I run tasks in parallel?"
    # The stand-in repeats its prompt. For a real answer: llm = OpenAI(model="gpt-4o-mini")
    llm = MockLLM()
    response = make_engine(MatryoshkaEmbedding(), llm).query(question)

    print(f"{question}\nThe nearest passages:")
    for found in response.source_nodes:
        print(f"  {found.score:.2f}  {found.text}")
    print(f"\nWhat a language model is asked:\n\n{response}")


if __name__ == "__main__":
    main()
