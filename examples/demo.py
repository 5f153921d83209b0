"""Index the API documentation on this machine, ask it questions from both frameworks, and compare the search.

Run it by `make demo`. The first run encodes several thousand passages; later runs reuse them.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import textwrap
import time
from pathlib import Path

import chromadb
import numpy as np
from docstrings import Passage, read_passages
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel, RunnablePassthrough
from langchain_mrl import MatryoshkaEmbeddings
from langchain_mrl import MatryoshkaVectorStore as LangChainStore
from llama_index.core import VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index_mrl import MatryoshkaEmbedding
from llama_index_mrl import MatryoshkaVectorStore as LlamaIndexStore

from mrl_rag import MatryoshkaEncoder, TwoStageIndex, TwoStageRetriever
from mrl_rag.errors import IndexMismatch
from mrl_rag.evaluation import exact_scan, recall_at_k, timed
from mrl_rag.truncation import Float32Array

FOLDER = Path(".demo")
TO_LANGCHAIN = [
    "how do I pad an array with zeros?",
    "run a function in a thread pool",
    "parse command line arguments",
    "solve a system of linear equations",
]
TO_LLAMA_INDEX = [
    "list the files that match a pattern",
    "compress data before writing it to a file",
    "cluster points into groups",
    "when did this exception happen, with the full stack?",
]
HITS = 5
COMPARED = 200  # questions


def main() -> None:
    """Index, ask, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget the index of earlier runs")
    if parser.parse_args().fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)

    heading("1. Index")
    start = time.perf_counter()
    encoder = MatryoshkaEncoder()
    passages = read_passages()
    print(f"{len(passages)} functions, classes and methods; {encoder.model} on {encoder.device}.")
    try:
        index = TwoStageIndex(FOLDER / "two-stage", fingerprint=encoder.fingerprint)
    except IndexMismatch as error:
        print(f"The index of an earlier run doesn't fit and is built again: {error}")
        shutil.rmtree(FOLDER)
        index = TwoStageIndex(FOLDER / "two-stage", fingerprint=encoder.fingerprint)
    TwoStageRetriever(encoder, index).index_texts(
        [p.text for p in passages],
        [p.name for p in passages],
        [{"package": p.package} for p in passages],
        progress=True,
    )
    print(f"{len(index)} records, {how_searched(index)}. {time.perf_counter() - start:.0f} s.")

    heading("2. Ask through a LangChain chain")
    ask_langchain(encoder, index)
    heading("3. Ask through a LlamaIndex query engine, over the same index")
    ask_llama_index(encoder, index)
    heading("4. Compare the search")
    compare(encoder, index, passages)


def how_searched(index: TwoStageIndex) -> str:
    """Say in a few words how the index is searched."""
    if index.rotation != "fit":
        return f"so few that all are compared at {index.full_dim} dimensions"
    return f"shortlisted at {index.shortlist_dim} dimensions, ranked at {index.full_dim}"


def ask_langchain(encoder: MatryoshkaEncoder, index: TwoStageIndex) -> None:
    """Answer questions with an LCEL chain."""
    store = LangChainStore(MatryoshkaEmbeddings(encoder=encoder), index=index)
    prompt = ChatPromptTemplate.from_template("Answer from this documentation:\n{context}\n\nQuestion: {question}")
    # A real model goes here: ChatOpenAI(model=...), ChatAnthropic(model=...), ChatOllama(model=...)
    llm = FakeListChatModel(responses=["(a language model would answer here from the passages above)"])
    chain = RunnableParallel(
        found=RunnableLambda(lambda question: store.similarity_search_with_score(question, k=HITS)),
        question=RunnablePassthrough(),
    ).assign(
        answer=RunnableLambda(
            lambda x: {"context": "\n\n".join(d.page_content for d, _ in x["found"]), "question": x["question"]}
        )
        | prompt
        | llm
        | StrOutputParser()
    )
    for question in TO_LANGCHAIN:
        result = chain.invoke(question)
        print(f"\nQ: {question}")
        for document, score in result["found"]:
            show(score, document.id or "", document.page_content)
        print(f"   {result['answer']}")


def ask_llama_index(encoder: MatryoshkaEncoder, index: TwoStageIndex) -> None:
    """Answer questions with a query engine."""
    engine = VectorStoreIndex.from_vector_store(
        LlamaIndexStore(index=index), embed_model=MatryoshkaEmbedding(encoder=encoder)
    ).as_query_engine(llm=MockLLM(max_tokens=1), similarity_top_k=HITS)  # a real model goes here: OpenAI(model=...)
    for question in TO_LLAMA_INDEX:
        response = engine.query(question)
        print(f"\nQ: {question}")
        for source in response.source_nodes:
            show(source.score or 0.0, source.node_id, source.node.get_content())
        print("   (a language model would answer here from the passages above)")


def compare(encoder: MatryoshkaEncoder, index: TwoStageIndex, passages: list[Passage]) -> None:
    """Compare two-stage search with single-stage Chroma and an exact scan, on the same vectors and queries."""
    # Most questions are the sentence of a docstring that says what the thing does.
    chosen = np.random.default_rng(0).choice(
        len(passages), COMPARED - len(TO_LANGCHAIN + TO_LLAMA_INDEX), replace=False
    )
    questions = TO_LANGCHAIN + TO_LLAMA_INDEX + [passages[i].summary[:200] for i in sorted(chosen)]
    start = time.perf_counter()
    queries = encoder.encode_queries(questions)
    alone = [_seconds(lambda text=text: encoder.encode_queries([text])) for text in questions[:20]]
    print(
        f"{len(queries)} questions encoded in {time.perf_counter() - start:.1f} s; one alone takes "
        f"{statistics.median(alone) * 1e3:.1f} ms, on top of the searches below."
    )

    records = index.get()
    ids, texts = [record.id for record in records], [record.document for record in records]
    vectors = np.stack([record.vector for record in records])
    full = single_stage(FOLDER / "single-stage", ids, texts, [dict(record.metadata) for record in records], vectors)

    def two_stage(query: Float32Array) -> list[str]:
        return [hit.id for hit in index.search(query[None], k=10)[0]]

    def one_stage(query: Float32Array) -> list[str]:
        answer = full.query(query_embeddings=[query], n_results=10, include=["documents", "metadatas", "distances"])
        return answer["ids"][0]

    def scan(query: Float32Array) -> list[str]:
        return [ids[i] for i in exact_scan(vectors, query[None], 10)[0]]

    expected, scan_seconds = timed(scan, list(queries))
    rows = []
    for name, search, folder in (
        (f"mrl-rag, {how_searched(index)}", two_stage, FOLDER / "two-stage"),
        (f"single-stage Chroma, {index.full_dim}", one_stage, FOLDER / "single-stage"),
    ):
        search(queries[0])
        found, seconds = timed(search, list(queries))
        rows.append((name, recall_at_k(found, expected), seconds, _bytes(folder, "*.bin"), _bytes(folder, "*")))
    size = vectors.nbytes
    rows.append((f"exact full scan, {index.full_dim}, NumPy", 1.0, scan_seconds, size, size))

    print(f"\n| {len(ids)} records | recall@10 | ms per query | searched index, MB | all on disk, MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, share, seconds, searched, stored in rows:
        print(f"| {name} | {share:.1%} | {seconds * 1e3:.2f} | {searched / 1e6:.1f} | {stored / 1e6:.1f} |")
    print("\nThe exact scan holds vectors only, in memory; the others answer with documents and metadata, from disk.")


def single_stage(
    folder: Path, ids: list[str], texts: list[str | None], metadatas: list[dict[str, object]], vectors: Float32Array
) -> chromadb.Collection:
    """Return a collection of full vectors, as Chroma is used by itself."""
    client = chromadb.PersistentClient(folder)
    collection = client.get_or_create_collection(
        "docs", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )
    if collection.count() != len(ids):
        step = client.get_max_batch_size()
        for at in range(0, len(ids), step):
            part = slice(at, at + step)
            collection.upsert(ids[part], vectors[part], metadatas[part], texts[part])
    return collection


def heading(text: str) -> None:
    """Print a heading."""
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


def show(score: float, name: str, text: str) -> None:
    """Print one passage on one line."""
    summary = text.partition(": ")[2]
    print(f"   {score:.3f}  {name:38} {textwrap.shorten(summary, 70, placeholder=' ...')}")


def _seconds(call: object) -> float:
    start = time.perf_counter()
    call()  # type: ignore[operator]
    return time.perf_counter() - start


def _bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped. Run it again to continue: what is stored is not encoded again.")
        sys.exit(130)
