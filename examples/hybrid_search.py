"""Hybrid search: BM25 finds exact words, vectors find meaning, and LangChain's `EnsembleRetriever` merges the two."""

from typing import Any

import bm25s
from docstrings import read_passages  # examples/docstrings.py, beside this file
from langchain_classic.retrievers import EnsembleRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore, TwoStageRetriever

QUESTIONS = ["How do I take a nap for two seconds?", "How many days does February have?"]


class BM25Retriever(BaseRetriever):
    """Finds documents by their words, with bm25s."""

    documents: list[Document]
    k: int
    index: Any = None

    def model_post_init(self, context: Any) -> None:
        """Count the documents' words."""
        self.index = bm25s.BM25(corpus=self.documents)
        texts = [document.page_content for document in self.documents]
        self.index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        tokens = bm25s.tokenize(query, stopwords="en", show_progress=False)
        found, scores = self.index.retrieve(tokens, k=min(self.k, len(self.documents)), show_progress=False)
        return [document for document, score in zip(found[0], scores[0], strict=True) if score > 0]


def make_retrievers(documents: list[Document], k: int) -> dict[str, BaseRetriever]:
    """Return retrievers by words, by vectors, and by both, over the same documents."""
    store = MatryoshkaVectorStore.from_documents(documents, MatryoshkaEmbeddings())
    words = BM25Retriever(documents=documents, k=k)
    vectors = TwoStageRetriever(vectorstore=store, k=k)
    # By reciprocal rank fusion.
    return {"BM25": words, "vectors": vectors, "both": EnsembleRetriever(retrievers=[words, vectors])}


def main() -> None:
    """Ask a question that words miss, and one that only both together answer first."""
    modules = {"time", "threading", "calendar", "datetime", "email", "signal", "sched", "asyncio"}
    documents = [Document(id=p.name, page_content=p.text) for p in read_passages(modules)]
    retrievers = make_retrievers(documents, k=10)
    for question in QUESTIONS:
        print(question)
        for name, retriever in retrievers.items():
            print(f"  {name:8} {', '.join(document.id or '' for document in retriever.invoke(question)[:4])}")


if __name__ == "__main__":
    main()
