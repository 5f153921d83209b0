"""What langchain_chroma documents works with only the class changed, and its collections move over."""

import inspect
import re
import textwrap
import uuid

import chromadb
import numpy as np
import pytest
from langchain_chroma import Chroma
from langchain_classic.retrievers import SelfQueryRetriever
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from langchain_core.structured_query import Comparator, Comparison, Operation, Operator, StructuredQuery
from langchain_mrl import MatryoshkaEmbeddings, MatryoshkaTranslator, MatryoshkaVectorStore, TwoStageRetriever

from mrl_rag.errors import IndexMismatch, InvalidInput, PlainCollection
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


# Where a parameter stands elsewhere than in langchain_chroma, or goes by another name; the docstring says so.
ORDERED_ANEW = {"__init__", "from_texts", "from_documents"}


@pytest.mark.parametrize("name", ["__init__", *(name for name in dir(Chroma) if not name.startswith("_"))])
def test_its_signatures_are_the_others_but_for_what_the_docstring_says(name):
    theirs = getattr(Chroma, name)
    if not hasattr(MatryoshkaVectorStore, name):
        assert f"`{name}`" in MatryoshkaVectorStore.__doc__.partition("There is no")[2].partition(".")[0]
        return
    if not callable(theirs):
        return
    ours = inspect.signature(getattr(MatryoshkaVectorStore, name)).parameters
    theirs = {n: p for n, p in inspect.signature(theirs).parameters.items() if not n.endswith("args")}
    named = set(theirs) - set(ours)
    if name in ("from_texts", "from_documents"):
        assert named <= set(inspect.signature(MatryoshkaVectorStore).parameters)
    else:
        assert not named
    positional = [[n for n, p in one.items() if p.kind == p.POSITIONAL_OR_KEYWORD] for one in (theirs, ours)]
    if name in ORDERED_ANEW:
        assert "`from_texts` and `from_documents` take `ids` fourth" in MatryoshkaVectorStore.__doc__
        if name != "__init__":
            assert positional[1] == [n for n in positional[0] if n in (*positional[1], "self")]
    else:
        assert positional[1][: len(positional[0])] == positional[0]


@pytest.mark.parametrize("store_class", STORES)
def test_what_is_given_by_position_and_less_than_all(store_class, words, tmp_path):
    name = f"given-{uuid.uuid4().hex}"
    store = store_class(name, words, str(tmp_path / store_class.__name__))
    assert [c.name for c in chromadb.PersistentClient(tmp_path / store_class.__name__).list_collections()] == [name]
    assert (store._collection.name, store._collection.count()) == (name, 0)
    assert store.add_texts(["a cat", "a dog", "the sea"], [{"n": 1}], ["a", "b", "c"]) == ["a", "b", "c"]
    assert (store._collection.count(), store._collection.get("a")["metadatas"]) == (3, [{"n": 1}])
    assert {d.id: d.metadata for d in store.similarity_search("a cat")} == {"a": {"n": 1}, "b": {}, "c": {}}
    assert store.similarity_search_with_score("a cat", 2, None, {"$contains": "dog"})[0][0].id == "b"
    store.delete(["a", "b"], where_document={"$contains": "dog"})
    store.delete(where_document={"$contains": "sea"})
    assert store.get()["ids"] == ["a"]
    for nothing in ({}, {"where": {}}):
        with pytest.raises(ValueError, match=r"in delete|needs ids"):
            store.delete(**nothing)
    assert store.get()["ids"] == ["a"]
    store.reset_collection()
    assert (store._collection.count(), store.get()["ids"]) == (0, [])
    store.delete_collection()
    with pytest.raises(ValueError, match="collection"):
        store._collection  # noqa: B018
    with pytest.raises((ValueError, chromadb.errors.NotFoundError), match=name):
        store_class(name, words, str(tmp_path / store_class.__name__), create_collection_if_not_exists=False)
    assert store_class.from_texts(["a"], words, [{"n": 1}], ["i"], collection_name=f"{name}-2").get()["ids"] == ["i"]
    documents = [Document(page_content="a", metadata={"n": 1})]
    assert store_class.from_documents(documents, words, ["i"], collection_name=f"{name}-3").get()["ids"] == ["i"]


@pytest.mark.parametrize("store_class", STORES)
def test_a_relevance_function_is_given_the_cosine_distance(store_class, words):
    store = store_class.from_texts(
        ["a cat sleeps", "the sea"],
        words,
        collection_name=f"relevance-{uuid.uuid4().hex}",
        collection_metadata={"hnsw:space": "cosine"},
        relevance_score_fn=lambda distance: 1 - distance / 2,
    )
    cosine = np.dot(words.embed_query("a cat"), words.embed_documents(["a cat sleeps"])[0])
    document, score = store.similarity_search_with_relevance_scores("a cat", k=1)[0]
    assert (document.page_content, score) == ("a cat sleeps", pytest.approx((1 + cosine) / 2, abs=1e-3))
    retriever = store.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.9})
    assert len(retriever.invoke("a cat sleeps")) == 1


@pytest.mark.parametrize("store_class", STORES)
@pytest.mark.parametrize("metadata", [None, {"hnsw:space": "ip"}])
def test_an_empty_plain_collection_is_filled(store_class, metadata, words, tmp_path):
    client = chromadb.PersistentClient(tmp_path)
    mine = client.create_collection("mine", metadata=metadata, embedding_function=None)
    store = store_class("mine", words, client=client)
    store.add_texts(["a cat", "a dog"], ids=["a", "b"])
    assert (mine.count(), store.similarity_search("a dog", k=1)[0].id) == (2, "b")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_folder_of_the_other_stores_is_taken_over_where_it_is(words, tmp_path, in_place):
    folder = str(tmp_path / "db")
    old = Chroma.from_texts(["a cat", "a dog"], words, ids=["a", "b"], persist_directory=folder)
    with pytest.raises(
        PlainCollection, match=r"MatryoshkaVectorStore\.from_existing\(Chroma\(\.\.\.\), in_place=True\)"
    ):
        MatryoshkaVectorStore(words, persist_directory=folder)
    with pytest.raises(PlainCollection, match="another collection_name"):
        MatryoshkaVectorStore.from_existing(old, collection_name="langchain", persist_directory=folder)
    new = MatryoshkaVectorStore.from_existing(old, persist_directory=f"{folder}/", in_place=in_place)
    name = "langchain" if in_place else "langchain-two-stage"
    for store in (new, MatryoshkaVectorStore(words, name, persist_directory=folder)):
        assert store.similarity_search("a dog", k=1)[0].id == "b"
    store.add_texts(["the sea"], ids=["c"])
    assert sorted(new.get()["ids"]) == ["a", "b", "c"]
    assert old.similarity_search("a dog", k=1)[0].id == "b"


async def test_a_self_query_retriever_asks_it(words):
    store = MatryoshkaVectorStore.from_texts(
        ["a cat", "a dog", "a fox"], words, [{"year": 1990 + i, "genre": "ab"[i % 2]} for i in range(3)], list("abc")
    )

    def asked(wanted, limit=None):
        constructor = RunnableLambda(lambda _: StructuredQuery("a fox", wanted, limit))
        return SelfQueryRetriever(
            vectorstore=store, query_constructor=constructor, structured_query_translator=MatryoshkaTranslator()
        )

    year, genre = Comparison(Comparator.GT, "year", 1990), Comparison(Comparator.EQ, "genre", "a")
    later = Operation(Operator.AND, [year, genre])
    for wanted, found in (
        (None, "cba"),
        (year, "cb"),
        (later, "c"),
        (Operation(Operator.OR, [later, Comparison(Comparator.IN, "year", [1990])]), "ca"),
        (Comparison(Comparator.NIN, "genre", ["a"]), "b"),
    ):
        assert [d.id for d in asked(wanted).invoke("foxes")] == list(found)
    assert [d.id for d in await asked(year, limit=1).ainvoke("foxes")] == ["c"]
    with pytest.raises(ValueError, match="disallowed"):
        asked(Comparison(Comparator.LIKE, "genre", "a")).invoke("foxes")
    with pytest.raises(ValueError, match="disallowed"):
        asked(Operation(Operator.NOT, [year])).invoke("foxes")


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


def test_a_plain_collection_in_its_own_place(old, words, server, tmp_path):
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
        MatryoshkaVectorStore.from_existing(source, words, persist_directory=str(tmp_path), in_place=True)


def test_the_embeddings_of_the_old_store_serve_the_new_one(old, words):
    new = MatryoshkaVectorStore.from_existing(old)
    assert new.embeddings is words
    assert TwoStageRetriever(vectorstore=new, k=1).invoke("page 3")[0].id == "id-3"
