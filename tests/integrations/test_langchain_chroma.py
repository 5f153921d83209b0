"""What langchain_chroma documents works with only the class changed, and its collections move over."""

import re
import textwrap
import uuid

import chromadb
import numpy as np
import pytest
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaVectorStore, TwoStageRetriever

from mrl_rag.errors import IndexMismatch, InvalidInput
from mrl_rag.testing import DeterministicEncoder

STORES = [Chroma, MatryoshkaVectorStore]
DOCUMENTED = [
    textwrap.dedent(block)
    for block in re.findall(r"```python\n(.*?)```", Chroma.__doc__, re.DOTALL)
    if not re.match(r"\s*(\*|\[Document)", block)  # what the block before it printed
]


def without_scores(text):
    """Scores differ on purpose, and Chroma's own metadata comes back in any order."""
    sorted_keys = re.sub(r"{.*?}", lambda found: str(sorted(found.group()[1:-1].split(", "))), text)
    return re.sub(r"SIM=-?[\d.]+", "SIM", sorted_keys)


def test_the_packages_own_docstring_prints_the_same(words, capsys):
    assert len(DOCUMENTED) >= 8
    printed = []
    for store_class in STORES:
        names = {"Chroma": store_class, "OpenAIEmbeddings": lambda: words}
        for block in DOCUMENTED:
            code = re.sub(r"from langchain_(chroma|openai) import \w+\n", "", block)
            if "await" in code:  # its asynchronous half is run below
                continue
            code = code.replace("retriever.invoke(", "print(retriever.invoke(").replace(
                'invoke("thud")', 'invoke("thud"))'
            )
            exec(code.replace('"foo",', f'"foo-{uuid.uuid4().hex}",'), names)
        printed.append(without_scores(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert "* thud" in printed[1]
    assert "[SIM] qux" in printed[1]
    assert "[Document(" in printed[1]


async def test_its_asynchronous_half_finds_the_same(words):
    found = []
    for store_class in STORES:
        vector_store = store_class(collection_name=f"foo-{uuid.uuid4().hex}", embedding_function=words)
        documents = [Document(page_content="foo", metadata={"baz": "bar"}), Document(page_content="thud")]
        await vector_store.aadd_documents(documents=documents, ids=["1", "2"])
        await vector_store.adelete(ids=["2"])
        results = await vector_store.asimilarity_search(query="thud", k=1)
        scored = await vector_store.asimilarity_search_with_score(query="foo", k=1)
        found.append((results, [document for document, _ in scored]))
    assert found[0] == found[1]


def test_the_tour_of_langchains_documentation(words, tmp_path):
    """https://docs.langchain.com/oss/python/integrations/vectorstores/chroma, step by step."""
    tweets = [
        ("I had chocolate chip pancakes and scrambled eggs for breakfast this morning.", "tweet"),
        ("The weather forecast for tomorrow is cloudy and overcast, with a high of 62 degrees.", "news"),
        ("Building an exciting new project with LangChain - come check it out!", "tweet"),
        ("Robbers broke into the city bank and stole $1 million in cash.", "news"),
        ("LangGraph is the best framework for building stateful, agentic applications!", "tweet"),
        ("I have a bad feeling I am going to get deleted :(", "tweet"),
    ]
    documents = [
        Document(page_content=text, metadata={"source": source}, id=i + 1) for i, (text, source) in enumerate(tweets)
    ]
    uuids = [f"uuid-{i}" for i in range(len(documents))]
    seen = []
    for store_class in STORES:
        vector_store = store_class(
            collection_name="example_collection",
            embedding_function=words,
            persist_directory=str(tmp_path / store_class.__name__),
        )
        steps = [vector_store.add_documents(documents=documents, ids=uuids)]
        vector_store.update_document(
            document_id=uuids[0],
            document=Document(
                page_content="I had pancakes and fried eggs for breakfast.", metadata={"source": "tweet"}, id=1
            ),
        )
        vector_store.update_documents(
            ids=uuids[:2],
            documents=[
                Document(page_content="I had pancakes and fried eggs.", metadata={"source": "tweet", "seen": True}),
                Document(page_content="The weather forecast is sunny and warm.", metadata={"source": "news"}),
            ],
        )
        vector_store.delete(ids=uuids[-1])
        steps.append(vector_store.similarity_search("a project with LangChain", k=2, filter={"source": "tweet"}))
        steps.append(
            [
                d
                for d, _ in vector_store.similarity_search_with_score(
                    "The weather forecast", k=1, filter={"source": "news"}
                )
            ]
        )
        vector = words.embed_query("I love pancakes and eggs!")
        steps.append(vector_store.similarity_search_by_vector(embedding=vector, k=1))
        retriever = vector_store.as_retriever(search_type="mmr", search_kwargs={"k": 1, "fetch_k": 5})
        steps.append(retriever.invoke("Robbers stole from the bank", filter={"source": "news"}))
        steps.append(sorted(vector_store.get()["ids"]))
        steps.append(vector_store.get(ids=uuids[0])["metadatas"])
        steps.append(vector_store.get(where={"source": "news"}, include=["documents"])["documents"])
        steps.append(vector_store.get(limit=2, offset=4)["ids"])
        steps.append(vector_store.get(where_document={"$contains": "bank"})["ids"])
        vector_store.reset_collection()
        steps.append(vector_store.get()["ids"])
        seen.append(steps)
    assert seen[0] == seen[1]


def test_updating_passes_over_what_is_not_there(words):
    store = MatryoshkaVectorStore.from_texts(["a"], words, ids=["a"])
    store.update_documents(["a", "nobody"], [Document(page_content="b"), Document(page_content="c")])
    assert store.get()["documents"] == ["b"]


@pytest.fixture
def old(words):
    texts = [f"page {i} of a book" for i in range(50)]
    return Chroma.from_texts(
        texts,
        words,
        [{"page": i} for i in range(50)],
        ids=[f"id-{i}" for i in range(50)],
        collection_name=f"old-{uuid.uuid4().hex}",
        client=chromadb.EphemeralClient(),
        collection_configuration={"hnsw": {"space": "cosine"}},
    )


class Counting(DeterministicEncoder):
    texts = 0

    def encode(self, texts, *args, **kwargs):
        self.texts += len(texts)
        return super().encode(texts, *args, **kwargs)


def test_a_store_moves_over_without_embedding_again(old, tmp_path):
    embeddings = MatryoshkaEmbeddings(encoder=Counting(64))
    new = MatryoshkaVectorStore.from_existing(
        old, embeddings, "moved", persist_directory=str(tmp_path), shortlist_dim=16
    )
    assert embeddings.encoder.texts == 0
    assert (new.index.full_dim, new.index.shortlist_dim, len(new.index)) == (64, 16, 50)
    question = "page 7 of a book"
    assert new.similarity_search(question, k=1) == old.similarity_search(question, k=1)
    np.testing.assert_allclose(
        new.get("id-7", include=["embeddings"])["embeddings"][0], embeddings.embed_documents([question])[0], atol=1e-3
    )
    new.index.close()
    again = MatryoshkaVectorStore(embeddings, "moved", persist_directory=str(tmp_path))
    assert again.similarity_search(question, k=1)[0].id == "id-7"
    assert len(old.get()["ids"]) == 50


def test_a_plain_collection_in_its_own_place(old, words, server):
    source = server.create_collection(f"plain-{uuid.uuid4().hex}", embedding_function=None)
    everything = old.get(include=["embeddings", "documents", "metadatas"])
    source.add(**{key: everything[key] for key in ("ids", "embeddings", "documents", "metadatas")})
    name = source.name
    with pytest.raises(IndexMismatch):
        MatryoshkaVectorStore(words, name, client=server)
    new = MatryoshkaVectorStore.from_existing(source, words, client=server, in_place=True)
    for store in (new, MatryoshkaVectorStore(words, name, client=server)):
        assert store.similarity_search("page 7 of a book", k=1)[0].metadata == {"page": 7}
    with pytest.raises(InvalidInput, match="in_place"):
        MatryoshkaVectorStore.from_existing(source, words, in_place=True)


def test_the_embeddings_of_the_old_store_serve_the_new_one(old, words):
    new = MatryoshkaVectorStore.from_existing(old)
    assert new.embeddings is words
    assert TwoStageRetriever(vectorstore=new, k=1).invoke("page 3")[0].id == "id-3"
