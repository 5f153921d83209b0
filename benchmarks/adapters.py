"""What the adapters add to the time of a search, and batches of questions against `langchain_chroma`.

    python benchmarks/adapters.py [DATASET] [--texts 1024] [--rounds 5]

DATASET is a folder in the BEIR layout. Without one, the texts are docstrings of the standard library, and the questions
are their first lines. Everything is on disk, with `minilm` vectors that are made once.

In the first table the questions' vectors are known already, so that only the layers differ: each question is given to
the index and to the retriever in turn, and the median of the differences is printed. In the second table the questions
are encoded, all in one call of `retriever.batch`. The retrievers take turns, and the median round is printed. "One by
one" is LangChain's own `batch`, which runs `invoke` in threads.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chromadb
import langchain_mrl
import llama_index_mrl
import torch
from encoder import minilm_folder, read_texts
from langchain_chroma import Chroma
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever
from langchain_huggingface import HuggingFaceEmbeddings
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import TextNode

from mrl_rag import MatryoshkaEncoder, TwoStageIndex
from mrl_rag.evaluation import read_beir, recall_at_k

K = 10
QUESTIONS = 100
# More rounds for the layers: the difference is a fraction of a millisecond.
LAYER_ROUNDS = 10
BATCH = 5000

Vectors = dict[str, list[float]]


class Known(Embeddings):
    """Known vectors, for LangChain."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.vectors[text] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self.vectors[text]


class OneByOne(langchain_mrl.TwoStageRetriever):
    """Our retriever with LangChain's own `batch`."""

    batch = BaseRetriever.batch


class KnownEmbedding(BaseEmbedding):
    """Known vectors, for LlamaIndex."""

    vectors: Vectors

    def _get_query_embedding(self, query: str) -> list[float]:
        return self.vectors[query]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self.vectors[text]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self.vectors[query]


def main() -> None:
    """Encode once, then measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", help="folder with corpus.jsonl, queries.jsonl, qrels.tsv")
    parser.add_argument("--texts", type=int, default=1024, help="docstrings, where there is no dataset")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    if arguments.dataset is None:
        source, texts = "docstrings", read_texts(arguments.texts)
        questions = [" ".join(text.split()[:12]) for text in texts]
    else:
        data = read_beir(arguments.dataset)
        source, texts, questions = arguments.dataset.name, list(data.corpus.values()), list(data.queries.values())
    texts = list(dict.fromkeys(texts))
    questions = list(dict.fromkeys(questions))[:QUESTIONS]

    encoder = MatryoshkaEncoder("minilm")
    vectors: Vectors = dict(zip(texts, encoder.encode(texts, progress=True).tolist(), strict=True))
    asked: Vectors = dict(zip(questions, encoder.encode_queries(questions).tolist(), strict=True))
    print(f"    python {shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])}\n")
    print(f"{source}: {len(texts)} texts, {len(questions)} questions; minilm, {encoder.full_dim} numbers.")
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, Chroma {chromadb.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        store = filled_langchain(Path(folder) / "langchain", texts, vectors)
        nodes = filled_llama_index(Path(folder) / "llama_index", texts, vectors)
        print(
            f"| retriever | ms, the index alone | ms, through the retriever | ms more, p50 of {LAYER_ROUNDS} rounds |"
        )
        print("| --- | ---: | ---: | ---: |")
        known = langchain_mrl.MatryoshkaVectorStore(Known(asked), index=store.index)
        langchain = langchain_mrl.TwoStageRetriever(vectorstore=known, k=K)
        layer("langchain_mrl.TwoStageRetriever.invoke", store.index, langchain.invoke, encoder, questions)
        llama_index = llama_index_mrl.TwoStageRetriever(nodes, KnownEmbedding(vectors=asked), similarity_top_k=K)
        layer("llama_index_mrl.TwoStageRetriever.retrieve", nodes.index, llama_index.retrieve, encoder, questions)

        single = filled_chroma(Path(folder) / "chroma", texts, vectors)
        ours = langchain_mrl.MatryoshkaVectorStore(
            langchain_mrl.MatryoshkaEmbeddings(encoder=encoder), index=store.index
        )
        batches(
            {
                "langchain_chroma, HuggingFaceEmbeddings": single.as_retriever(search_kwargs={"k": K}),
                "langchain_mrl, MatryoshkaEmbeddings": langchain_mrl.TwoStageRetriever(vectorstore=ours, k=K),
                "langchain_mrl, one by one": OneByOne(vectorstore=ours, k=K),
            },
            questions,
            arguments.rounds,
        )


def layer(
    name: str,
    index: TwoStageIndex,
    retrieve: Callable[[str], list[Any]],
    encoder: MatryoshkaEncoder,
    questions: list[str],
) -> None:
    """Measure one retriever against its index alone, and print its row."""
    vectors = encoder.encode_queries(questions)
    core, through = [], []
    for round_ in range(LAYER_ROUNDS + 1):
        for question, vector in zip(questions, vectors, strict=True):
            calls = [
                (core, lambda vector=vector: index.search(vector[None], K)),
                (through, lambda question=question: retrieve(question)),
            ]
            # In alternating order, so that neither always runs with warm caches.
            for seconds, call in calls[:: 1 if round_ % 2 else -1]:
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
    core, through = core[len(questions) :], through[len(questions) :]
    more = statistics.median(b - a for a, b in zip(core, through, strict=True))
    print(
        f"| {name} | {statistics.median(core) * 1e3:.2f} | {statistics.median(through) * 1e3:.2f} | {more * 1e3:.2f} |",
        flush=True,
    )


def batches(retrievers: dict[str, BaseRetriever], questions: list[str], rounds: int) -> None:
    """Measure all questions in one `batch`, and print a table."""
    seconds: dict[str, list[float]] = {name: [] for name in retrievers}
    found: dict[str, list[list[str]]] = {}
    for retriever in retrievers.values():
        retriever.batch(questions)
    for _ in range(rounds):
        for name, retriever in retrievers.items():
            start = time.perf_counter()
            answers = retriever.batch(questions)
            seconds[name].append(time.perf_counter() - start)
            found[name] = [[str(document.id) for document in answer] for answer in answers]
    base = next(iter(retrievers))
    print(f"\n| retriever | questions/s in a batch of {len(questions)} | ratio | agreement of the top {K} |")
    print("| --- | ---: | ---: | ---: |")
    for name in retrievers:
        p50 = statistics.median(seconds[name])
        print(
            f"| {name} | {len(questions) / p50:,.0f} | {statistics.median(seconds[base]) / p50:.2f} | "
            f"{recall_at_k(found[name], found[base]):.1%} |"
        )


def filled_langchain(folder: Path, texts: list[str], vectors: Vectors) -> langchain_mrl.MatryoshkaVectorStore:
    """Return our LangChain store, filled by `from_texts`."""
    return langchain_mrl.MatryoshkaVectorStore.from_texts(
        texts, Known(vectors), metadatas(texts), ids=ids(texts), persist_directory=str(folder)
    )


def filled_llama_index(folder: Path, texts: list[str], vectors: Vectors) -> llama_index_mrl.MatryoshkaVectorStore:
    """Return our LlamaIndex store, filled by `add`."""
    store = llama_index_mrl.MatryoshkaVectorStore(persist_dir=str(folder))
    rows = zip(ids(texts), texts, metadatas(texts), strict=True)
    store.add([TextNode(id_=id_, text=t, metadata=metadata, embedding=vectors[t]) for id_, t, metadata in rows])
    return store


def filled_chroma(folder: Path, texts: list[str], vectors: Vectors) -> Chroma:
    """Return `langchain_chroma`'s store of the same vectors, with HuggingFaceEmbeddings for the questions."""
    options: dict[str, Any] = {
        "persist_directory": str(folder),
        "collection_configuration": {"hnsw": {"space": "cosine"}},
    }
    filler = Chroma("docs", Known(vectors), **options)
    for start in range(0, len(texts), BATCH):
        part = slice(start, start + BATCH)
        filler.add_texts(texts[part], metadatas(texts)[part], ids(texts)[part])
    return Chroma("docs", HuggingFaceEmbeddings(model_name=minilm_folder()), **options)


def ids(texts: list[str]) -> list[str]:
    """Return one id per text."""
    return [str(row) for row in range(len(texts))]


def metadatas(texts: list[str]) -> list[dict[str, Any]]:
    """Return one dict per text, as users have them."""
    return [{"source": f"file-{row % 100}.md", "page": row % 40} for row in range(len(texts))]


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore", message=".*longer than max_length")
    main()
