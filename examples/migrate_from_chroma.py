"""Turn a `langchain_chroma.Chroma` store into a two-stage one without embedding anything again. Runs offline."""

import tempfile
from pathlib import Path

from docstrings import read_passages  # examples/docstrings.py, beside this file
from langchain_chroma import Chroma
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore

QUESTION = "How do I copy a whole folder?"


def fill_chroma(folder: str, embeddings: MatryoshkaEmbeddings) -> Chroma:
    """Return an ordinary Chroma store of what the functions of Python's shutil module do."""
    passages = read_passages({"shutil"})
    return Chroma.from_texts(
        [p.text for p in passages],
        embeddings,
        ids=[p.name for p in passages],
        collection_name="python_docs",
        persist_directory=folder,
        collection_configuration={"hnsw": {"space": "cosine"}},
    )


def main() -> None:
    """Fill a Chroma store, migrate it, and ask both the same question."""
    embeddings = MatryoshkaEmbeddings()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        old = fill_chroma(str(Path(folder) / "chroma"), embeddings)

        new = MatryoshkaVectorStore.from_existing(old, persist_directory=str(Path(folder) / "two_stage"))

        print(f"{len(new.index)} records were copied, with their ids, texts, metadata and vectors.\n")
        print(f"{QUESTION}")
        for name, store in (("Chroma", old), ("two-stage", new)):
            found = [str(document.id) for document in store.similarity_search(QUESTION, k=3)]
            print(f"  {name:<10} {', '.join(found)}")
        print("\nFrom then on: MatryoshkaVectorStore(embeddings, 'python_docs', persist_directory=...)")
        new.index.close()


if __name__ == "__main__":
    main()
