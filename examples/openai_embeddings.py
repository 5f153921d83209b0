"""Search OpenAI's embeddings in two stages: 256 of 3072 numbers first. Without OPENAI_API_KEY it uses a stand-in."""

import os

from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore

from mrl_rag import OpenAIEncoder
from mrl_rag.testing import DeterministicEncoder

TEXTS = [
    "numpy.pad adds zeros or other values around an array.",
    "concurrent.futures.ThreadPoolExecutor runs functions in a pool of threads.",
    "json.loads turns a JSON text into Python objects.",
]


def make_embeddings() -> MatryoshkaEmbeddings:
    """Return OpenAI's embeddings if there is a key, else a stand-in with vectors of the same length."""
    if os.environ.get("OPENAI_API_KEY"):
        return MatryoshkaEmbeddings(encoder=OpenAIEncoder("text-embedding-3-large"))
    print("OPENAI_API_KEY is not set. This run uses a stand-in, which finds texts by the words they share.\n")
    return MatryoshkaEmbeddings(encoder=DeterministicEncoder(3072))


def main() -> None:
    """Index three texts, and ask a question."""
    # LangChain's own class works as well: MatryoshkaVectorStore.from_texts(TEXTS, OpenAIEmbeddings(model=...), ...)
    store = MatryoshkaVectorStore.from_texts(TEXTS, make_embeddings(), shortlist_dim=256)
    print(f"The shortlist has {store.index.shortlist_dim} numbers per vector, the ranking {store.index.full_dim}.\n")
    question = "How do I get Python objects from JSON?"
    print(question)
    for document, cosine in store.similarity_search_with_score(question, k=2):
        print(f"  {cosine:.2f}  {document.page_content}")


if __name__ == "__main__":
    main()
