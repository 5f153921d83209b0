"""`MatryoshkaVectorStore`: a two-stage index as LangChain's `VectorStore`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import run_in_executor
from langchain_core.vectorstores import VectorStore

from langchain_mrl.compat import collection_of
from langchain_mrl.connection import Place, check_metric
from langchain_mrl.embeddings import MatryoshkaEmbeddings, fingerprint, model_name
from langchain_mrl.filters import Filter, chroma_where
from langchain_mrl.records import Row, checked_batches, rows_of_documents, rows_of_texts
from mrl_rag import Hit, Plan, Record, TwoStageIndex
from mrl_rag.binding import bind_model
from mrl_rag.errors import InvalidIds, InvalidInput, PlainCollection
from mrl_rag.progress import progress_bar

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection
    from chromadb.config import Settings
    from numpy.typing import NDArray

# langchain_chroma's default.
_NAME = "langchain"


class MatryoshkaVectorStore(VectorStore):
    """Chroma searched at a low dimension, the shortlist reranked at full dimension.

        store = MatryoshkaVectorStore(MatryoshkaEmbeddings(), persist_directory="./db")
        store = MatryoshkaVectorStore.from_texts(["a text"], MatryoshkaEmbeddings())
        store = MatryoshkaVectorStore(OpenAIEmbeddings(model="text-embedding-3-large"), shortlist_dim=256)
        store = MatryoshkaVectorStore.from_existing(chroma)                    # a `langchain_chroma.Chroma`
        store.similarity_search("a question", k=4, filter={"page": 1})
        store.as_retriever(search_kwargs={"k": 4})

    The methods and arguments are those of `langchain_chroma.Chroma`, with these differences.

    - Scores are cosines at full dimension, from -1 to 1; higher is nearer. `langchain_chroma` returns distances. A
      relevance score is the cosine, or 0 where that is negative, so `score_threshold=0.5` asks for a cosine of at least
      0.5.
    - Vectors are returned at unit length, rounded to the precision of the index's archive (float16 by default).
    - Adding a record under an id that exists replaces it, text and metadata. Of equal ids in one call the last one
      counts.
    - The order of the constructor's arguments is `embedding`, `collection_name`, `persist_directory`, `client`,
      `shortlist_dim`; all others are given by name. `MatryoshkaVectorStore("name", embeddings)` works as well.
      `from_texts` and `from_documents` take `ids` fourth and third, then names only.
    - `get` returns records in the order of the ids given.
    - After `delete_collection` the store is empty, and adding to it makes a new collection.
    - Read from `_collection`, but don't write to it: such records have no full vector, and searches can't rerank them.
    - Two stores in memory are separate. Unknown arguments are refused.
    - There is no `add_images`, `encode_image`, `similarity_search_by_image`,
      `similarity_search_by_image_with_relevance_score`, `fork` or `hybrid_search`.

    A filter is a dict, in Chroma's language or simpler: several keys, and several operators of one key, must all be
    met.

        {"page": 1, "source": "a.pdf"}    {"page": {"$gte": 1, "$lt": 9}}    {"$or": [{"page": 1}, {"source": "b.pdf"}]}
        {"tags": {"$contains": "draft"}}  # the list "tags" has this member

    Metadata values are strings, numbers, booleans, or non-empty lists of one of these types, with up to 5,460 list
    members per record. Keys don't begin with "$", "#" or "chroma:". A value of None is left out. Anything else is
    refused before its batch is embedded; `langchain_community.vectorstores.utils.filter_complex_metadata` removes it.

    `copy.copy` and `copy.deepcopy` return the same store. A pickled store opens its folder or server again, so it must
    have been made with `persist_directory`, `host` or `chroma_cloud_api_key`.

    Args:
        embedding: any LangChain `Embeddings`; None for a store that is searched by vector only.
        collection_name: name of the Chroma collection.
        persist_directory: a folder. None for memory, unless another place is given below.
        client: a chromadb client to use instead of a folder; it is not closed with the store.
        shortlist_dim: length of the vectors that are searched first; None for `TwoStageIndex`'s default.
        embedding_function: another name for `embedding`, as in `langchain_chroma`.
        host: host of a Chroma server.
        port: port of that server; None for 8000.
        ssl: use https with that server.
        headers: HTTP headers to send to that server.
        chroma_cloud_api_key: key of Chroma Cloud, which needs `tenant` and `database`, too.
        tenant: None for Chroma's default.
        database: None for Chroma's default.
        client_settings: chromadb's `Settings`.
        collection_metadata: None or {"hnsw:space": "cosine"}, the only metric there is.
        collection_configuration: None or {"hnsw": {"space": "cosine"}}, likewise.
        relevance_score_fn: turns a cosine distance (1 - cosine) into a relevance score; None for the cosine, at least
            0.
        create_collection_if_not_exists: False raises where there is no such collection.
        index: a `TwoStageIndex` to use instead of all arguments that say where it is.
        model: name of the embeddings' model; None takes it from the embeddings. The collection remembers it, and
            refuses embeddings of another model. Pass the stored name where one model has two names.

    Raises:
        InvalidInput: `embedding` is not an `Embeddings`, two arguments exclude each other, or there is no such
            collection.
        PlainCollection: the collection was filled by plain Chroma; `from_existing` makes a two-stage one of it.
        IndexMismatch: another model, or another dimension, filled the collection.
        TwoStageIndexError: as `TwoStageIndex` does.
    """

    def __init__(
        self,
        embedding: Embeddings | str | None = None,
        collection_name: str | Embeddings | None = _NAME,
        persist_directory: str | None = None,
        client: ClientAPI | None = None,
        shortlist_dim: int | None = None,
        *,
        embedding_function: Embeddings | None = None,
        host: str | None = None,
        port: int | None = None,
        ssl: bool = False,
        headers: dict[str, str] | None = None,
        chroma_cloud_api_key: str | None = None,
        tenant: str | None = None,
        database: str | None = None,
        client_settings: Settings | None = None,
        collection_metadata: dict[str, Any] | None = None,
        collection_configuration: dict[str, Any] | None = None,
        relevance_score_fn: Callable[[float], float] | None = None,
        create_collection_if_not_exists: bool | None = True,
        index: TwoStageIndex | None = None,
        model: str | None = None,
    ) -> None:
        self._embedding, name = _embedding_and_name(embedding, collection_name, embedding_function)
        self._relevance_score_fn = relevance_score_fn
        check_metric(collection_metadata, collection_configuration)
        # A client that this store made, and so has to close.
        self._client: ClientAPI | None = None
        # The constructor's arguments, for a pickle; None where they don't say where the records are.
        self._settings: dict[str, Any] | None = None
        known = model or model_name(self._embedding), fingerprint(self._embedding), "model"
        if index is not None:
            bind_model(index, *known)
            self.index = index
            return
        cloud = chroma_cloud_api_key, tenant, database
        place = Place(client, persist_directory, host, port, ssl, headers, *cloud, client_settings)
        if arguments := place.arguments():
            own = {"embedding": self._embedding, "collection_name": name, "relevance_score_fn": relevance_score_fn}
            self._settings = arguments | own | {"model": model}
        self.index = self._opened(place, name, shortlist_dim)
        try:
            bind_model(self.index, *known)
            self.index.collection(create=bool(create_collection_if_not_exists))
        except BaseException:
            self.close()
            raise

    def _opened(self, place: Place, name: str, shortlist_dim: int | None) -> TwoStageIndex:
        client = place.connect()
        if place.client is None:
            self._client = client
        length = self._embedding.length if isinstance(self._embedding, MatryoshkaEmbeddings) else None
        folder = place.persist_directory if client is None else None
        with _plain_collection_explained(name):
            return TwoStageIndex(folder, name, length, shortlist_dim, client=client)

    def __repr__(self) -> str:
        name = model_name(self._embedding) or ""
        embedding = f"{type(self._embedding).__name__}({name})" if self._embedding else "no embeddings"
        return f"MatryoshkaVectorStore({self.index!r}, {embedding})"

    def close(self) -> None:
        """Close the index, and the client unless that was passed in."""
        self.index.close()
        if self._client is not None:
            self._client.close()  # type: ignore[attr-defined]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __copy__(self) -> MatryoshkaVectorStore:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> MatryoshkaVectorStore:
        return self.__copy__()

    def __getstate__(self) -> dict[str, Any]:
        if self._settings is None:
            raise InvalidInput(
                "a store in memory, or one made with client= or index=, can't be pickled; pass persist_directory=."
            )
        return self._settings | {"shortlist_dim": self.index.shortlist_dim}

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]

    @property
    def _collection(self) -> Collection:
        """The Chroma collection, under the name that code written for `langchain_chroma` uses. Read from it only."""
        return self.index.collection()

    @property
    def embeddings(self) -> Embeddings | None:
        """The embeddings it was made with."""
        return self._embedding

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        embedding: Embeddings | None = None,
        metadatas: Iterable[dict[Any, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> MatryoshkaVectorStore:
        """Make a store and add texts to it; see `add_texts`.

        Args:
            texts: n strings.
            embedding: any LangChain `Embeddings`.
            metadatas: n dicts, or None in place of one.
            ids: n ids; None, or None in place of one, makes a new id.
            batch_size: texts embedded and committed together; None for 512.
            show_progress: show a bar when standard error is a terminal.
            **kwargs: the constructor's other arguments.
        """
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids, batch_size=batch_size, show_progress=show_progress)
        return store

    @classmethod
    async def afrom_texts(
        cls,
        texts: Iterable[str],
        embedding: Embeddings | None = None,
        metadatas: Iterable[dict[Any, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> MatryoshkaVectorStore:
        """Make a store and add texts to it without blocking the event loop; see `from_texts`."""
        store = await run_in_executor(None, cls, embedding, **kwargs)
        await store.aadd_texts(texts, metadatas, ids=ids, batch_size=batch_size, show_progress=show_progress)
        return store

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document],
        embedding: Embeddings | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> MatryoshkaVectorStore:
        """Make a store and add documents to it; see `from_texts`."""
        store = cls(embedding, **kwargs)
        store.add_documents(documents, ids=ids, batch_size=batch_size, show_progress=show_progress)
        return store

    @classmethod
    async def afrom_documents(
        cls,
        documents: Iterable[Document],
        embedding: Embeddings | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> MatryoshkaVectorStore:
        """Make a store and add documents to it without blocking the event loop; see `from_texts`."""
        store = await run_in_executor(None, cls, embedding, **kwargs)
        await store.aadd_documents(documents, ids=ids, batch_size=batch_size, show_progress=show_progress)
        return store

    @classmethod
    def from_existing(
        cls,
        existing: VectorStore | Collection,
        embedding: Embeddings | None = None,
        collection_name: str | None = None,
        persist_directory: str | None = None,
        client: ClientAPI | None = None,
        shortlist_dim: int | None = None,
        *,
        in_place: bool = False,
        show_progress: bool = False,
    ) -> MatryoshkaVectorStore:
        """Make a store of a Chroma collection that holds full vectors. Nothing is embedded again.

            MatryoshkaVectorStore.from_existing(chroma, persist_directory="./two_stage")   # a `langchain_chroma.Chroma`
            MatryoshkaVectorStore.from_existing(chroma, in_place=True)                     # in its folder, by its name
            MatryoshkaVectorStore.from_existing(collection, embeddings, client=client)     # a chromadb collection

        The old collection keeps its records; with `in_place` it gets another name. After an interruption, call again:
        copying continues where it stopped.

        Args:
            existing: a `langchain_chroma.Chroma`, or a chromadb collection.
            embedding: the embeddings that filled the collection; None takes those of `existing`.
            collection_name: name of the new collection. None for the old name, with "-two-stage" added where both are
                in one place.
            persist_directory: folder of the new store; None for memory, unless `client` is given.
            client: a chromadb client for the new store.
            shortlist_dim: length of the vectors that are searched first; None for `TwoStageIndex`'s default.
            in_place: put the new collection where the old one is and under its name; the old one's name gets
                "-single-stage" added.
            show_progress: show a bar when standard error is a terminal.

        Raises:
            InvalidInput: `in_place` with another place, or with `collection_name`.
            PlainCollection: there is already a plain Chroma collection of the new name.
            IndexMismatch: the collection is a two-stage index already.
        """
        embedding = embedding if embedding is not None else getattr(existing, "embeddings", None)
        collection = collection_of(existing)
        with _plain_collection_explained(collection_name or collection.name):
            index = TwoStageIndex.from_chroma(
                collection,
                persist_directory,
                collection_name,
                client=client,
                in_place=in_place,
                shortlist_dim=shortlist_dim,
                fingerprint=fingerprint(embedding),
                model=model_name(embedding),
                progress=show_progress,
            )
        return cls(embedding, index=index)

    def add_texts(  # type: ignore[override]
        self,
        texts: Iterable[str],
        metadatas: Iterable[dict[Any, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> list[str]:
        """Embed and store texts; a record whose id exists already is replaced, text and metadata.

        Texts are read, embedded and committed one batch at a time. A generator of any length needs the memory of one
        batch, and an interruption or an error loses at most the current batch.

        Args:
            texts: n strings.
            metadatas: n dicts, or None in place of one; of a shorter list, the last texts have no metadata.
            ids: n ids; None, or None in place of one, makes a new id. Of texts with equal ids the last is stored.
            batch_size: texts embedded and committed together; None for 512.
            show_progress: show a bar when standard error is a terminal.

        Returns:
            The n ids.

        Raises:
            InvalidTexts: `texts` is a bare string, or one of them is not a string.
            InvalidIds: an id is not a string, the number of ids is not that of the texts, or there are more metadatas.
            InvalidInput: Chroma can't store a metadata.
            ValueError: generators of texts, metadatas and ids are not of one length.
        """
        return self._add(rows_of_texts(texts, metadatas, ids), batch_size, show_progress, _length(texts))

    async def aadd_texts(  # type: ignore[override]
        self,
        texts: Iterable[str],
        metadatas: Iterable[dict[Any, Any] | None] | None = None,
        ids: Iterable[str | None] | None = None,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> list[str]:
        """Embed and store texts without blocking the event loop; see `add_texts`."""
        return await self._aadd(rows_of_texts(texts, metadatas, ids), batch_size, show_progress, _length(texts))

    def add_documents(  # type: ignore[override]
        self,
        documents: Iterable[Document],
        *,
        ids: Iterable[str | None] | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> list[str]:
        """Embed and store documents; see `add_texts`.

        Args:
            documents: n documents.
            ids: n ids, used instead of the documents' own; None takes those, and makes an id for a document without
                one.
            batch_size: documents embedded and committed together; None for 512.
            show_progress: show a bar when standard error is a terminal.

        Returns:
            The n ids.
        """
        return self._add(rows_of_documents(documents, ids), batch_size, show_progress, _length(documents))

    async def aadd_documents(  # type: ignore[override]
        self,
        documents: Iterable[Document],
        *,
        ids: Iterable[str | None] | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> list[str]:
        """Embed and store documents without blocking the event loop; see `add_documents`."""
        return await self._aadd(rows_of_documents(documents, ids), batch_size, show_progress, _length(documents))

    def update_document(self, document_id: str, document: Document) -> None:
        """Update one document; see `update_documents`."""
        self.update_documents([document_id], [document])

    def update_documents(self, ids: list[str], documents: list[Document]) -> None:
        """Replace the texts of stored documents, and those metadata keys that the new documents have.

        Args:
            ids: n ids; unknown ones are ignored, and for an id that is given twice both updates are made, in order.
            documents: n documents.

        Raises:
            InvalidIds: there are more or fewer ids than documents.
        """
        if len(ids) != len(documents):
            raise InvalidIds(f"there are {len(ids)} ids and {len(documents)} documents; give one of each.")
        metadata_of = {record.id: record.metadata for record in self.index.get(ids, vectors=False)}
        text_of: dict[str, str] = {}
        for id_, document in zip(ids, documents, strict=True):
            if id_ in metadata_of:
                metadata_of[id_] |= document.metadata
                text_of[id_] = document.page_content
        self.add_texts(text_of.values(), [metadata_of[id_] for id_ in text_of], ids=list(text_of))

    def delete(  # type: ignore[override]
        self,
        ids: str | list[str] | None = None,
        *,
        filter: Filter | None = None,
        where: Filter | None = None,
        where_document: Filter | None = None,
    ) -> bool:
        """Remove records; unknown ids are ignored.

        Args:
            ids: one or more; None for every record that meets the conditions.
            filter: condition on metadata; with `ids`, a record must have one of them and meet it.
            where: the same as `filter`, which is Chroma's name for it.
            where_document: condition on the text.

        Returns:
            True.

        Raises:
            InvalidIds: there are no ids and no conditions. `reset_collection` removes everything.
            InvalidInput: `filter` and `where` are both given.
        """
        if filter and where:
            raise InvalidInput(f"filter={filter!r} and where={where!r} mean the same; pass one of them.")
        condition = chroma_where(filter or where)
        if ids is None and not condition and not where_document:
            raise InvalidIds("delete() needs ids=, filter= or where_document=. reset_collection() removes everything.")
        self.index.delete([ids] if isinstance(ids, str) else ids, condition, where_document)
        return True

    def delete_collection(self) -> None:
        """Remove the collection and its full vectors. Adding to the store makes a new one."""
        self.index.drop()

    def reset_collection(self) -> None:
        """Start over with an empty collection."""
        self.index.drop()
        self.index.collection(create=True)

    def reencode(
        self,
        embedding: Embeddings,
        *,
        model: str | None = None,
        shortlist_dim: int | None = None,
        show_progress: bool = False,
        drop_old: bool = False,
    ) -> str | None:
        """Change the embeddings without downtime: embed every document again, and switch in one step.

        The old collection answers searches meanwhile. After an interruption, call again with the same embeddings; what
        was embedded is not embedded again. Don't add through this store before it has returned. See
        `TwoStageIndex.reencode`.

        Args:
            embedding: the new embeddings, any of LangChain's, which the store has afterwards.
            model: name of their model; None takes it from them.
            shortlist_dim: length of the vectors that are searched first; None for `TwoStageIndex`'s default.
            show_progress: show a bar when standard error is a terminal.
            drop_old: remove the old collection after the switch; otherwise `store.index.drop_old()` does.

        Returns:
            The name under which the old collection is kept; None where there is none.

        Raises:
            InvalidInput: `embedding` is not an `Embeddings`.
            InvalidTexts: records have no text; nothing was done.
            MrlRagError: as `TwoStageIndex.reencode` does.
        """
        embedding, _ = _embedding_and_name(embedding, _NAME, None)  # type: ignore[assignment]
        if embedding is None:
            raise InvalidInput("embedding is None; pass the new embeddings.")
        kept = self.index.reencode(
            embedding.embed_documents,
            model or model_name(embedding),
            fingerprint(embedding),
            shortlist_dim=shortlist_dim,
            progress=show_progress,
            drop_old=drop_old,
        )
        self._embedding = embedding
        if self._settings is not None:
            self._settings |= {"embedding": embedding, "model": model}
        return kept

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return documents in the order asked, each once, unknown ids left out."""
        return [_document(record) for record in self.index.get(ids, vectors=False)]

    def get(
        self,
        ids: str | list[str] | None = None,
        where: Filter | None = None,
        limit: int | None = None,
        offset: int | None = None,
        where_document: Filter | None = None,
        include: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Return what is stored, as Chroma's collections do.

        Args:
            ids: one or more, which give the order; None for every record that meets the conditions, in Chroma's order.
            where: condition on metadata.
            limit: how many at most; None for all.
            offset: how many to skip.
            where_document: condition on the text, in Chroma's language.
            include: any of "documents", "metadatas", "embeddings"; None for the first two.

        Returns:
            A dict of "ids", "documents", "metadatas" and "embeddings" (full vectors); None for what was not asked for.

        Raises:
            InvalidInput: Chroma doesn't take a condition, `limit` or `offset` is negative, or `include` has another
                value.
        """
        wanted = ("documents", "metadatas") if include is None else include
        if isinstance(wanted, str) or not set(wanted) <= {"documents", "metadatas", "embeddings"}:
            raise InvalidInput(
                f'include is {include!r}; it must be a list of "documents", "metadatas" and "embeddings".'
            )
        chosen, where = [ids] if isinstance(ids, str) else ids, chroma_where(where)
        records = self.index.get(chosen, where, where_document, limit, offset or 0, vectors="embeddings" in wanted)
        return {
            "ids": [record.id for record in records],
            "documents": [record.document for record in records] if "documents" in wanted else None,
            "metadatas": [record.metadata for record in records] if "metadatas" in wanted else None,
            "embeddings": [record.vector for record in records] if "embeddings" in wanted else None,
        }

    def search_hits(
        self,
        queries: Sequence[str],
        k: int = 4,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **search: Any,
    ) -> list[list[Hit]]:
        """Return the hits of many questions, which are embedded and searched together.

        Args:
            queries: n questions.
            k: how many hits per question at most.
            filter: condition on metadata.
            where_document: condition on the text, in Chroma's language.
            **search: `plan`, a `Plan`; `score_threshold`, the lowest cosine; `explain`, to give each hit its rank and
                score at each stage.

        Returns:
            n lists of `mrl_rag.Hit`, best first.
        """
        return self._search(self._embed_queries(queries), k, filter, where_document, **search)

    async def asearch_hits(
        self,
        queries: Sequence[str],
        k: int = 4,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **search: Any,
    ) -> list[list[Hit]]:
        """Return the hits of many questions without blocking the event loop; see `search_hits`.

        On a server the requests are awaited; see `TwoStageIndex.asearch`.
        """
        vectors = await self._aembed_queries(queries)
        return await self._asearch(vectors, k, filter, where_document, **search)

    def similarity_search(self, query: str, k: int = 4, filter: Filter | None = None, **kwargs: Any) -> list[Document]:
        """Return the k nearest documents to a question.

        Args:
            query: the question.
            k: how many at most; 4, as in LangChain.
            filter: condition on metadata, as described in the class.
            **kwargs: `where_document`, a condition on the text; `plan`, a `Plan`; `score_threshold`, the lowest cosine.
        """
        return [_document(hit) for hit in self.search_hits([query], k, filter, **kwargs)[0]]

    async def asimilarity_search(
        self, query: str, k: int = 4, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """Return the k nearest documents without blocking the event loop; see `similarity_search`."""
        return [_document(hit) for hit in (await self.asearch_hits([query], k, filter, **kwargs))[0]]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """Return the k nearest documents to a question, each with its cosine at full dimension."""
        return _scored(self.search_hits([query], k, filter, where_document, **kwargs)[0])

    async def asimilarity_search_with_score(
        self, query: str, *args: Any, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """Return documents and cosines without blocking the event loop; see `similarity_search_with_score`."""
        return _scored((await self.asearch_hits([query], *args, **kwargs))[0])

    def similarity_search_with_vectors(
        self,
        query: str,
        k: int = 4,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, NDArray[Any]]]:
        """Return the k nearest documents to a question, each with its vector, float32 [full_dim]."""
        hits = self.search_hits([query], k, filter, where_document, **kwargs)[0]
        records = self.index.get([hit.id for hit in hits])
        return [(_document(record), record.vector) for record in records if record.vector is not None]

    def similarity_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return the k nearest documents to a full vector."""
        return [_document(hit) for hit in self._search([embedding], k, filter, where_document, **kwargs)[0]]

    async def asimilarity_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return the k nearest documents to a full vector without blocking the event loop."""
        return [_document(hit) for hit in (await self._asearch([embedding], k, filter, where_document, **kwargs))[0]]

    def similarity_search_by_vector_with_relevance_scores(
        self,
        embedding: list[float],
        k: int = 4,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """Return the k nearest documents to a full vector, each with its relevance, 0 to 1; higher is nearer."""
        relevance = self._select_relevance_score_fn()
        hits = self._search([embedding], k, filter, where_document, **kwargs)[0]
        return [(document, relevance(cosine)) for document, cosine in _scored(hits)]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return k documents that are near a question and unlike each other, in the order in which they were chosen.

        Args:
            query: the question.
            k: how many at most.
            fetch_k: how many of the nearest to choose from.
            lambda_mult: 1 for the nearest only, 0 for the most different.
            filter: condition on metadata, as described in the class.
            where_document: condition on the text, in Chroma's language.
            **kwargs: `plan`, a `Plan`.
        """
        vector = self._embed_queries([query])[0]
        return self.max_marginal_relevance_search_by_vector(
            vector, k, fetch_k, lambda_mult, filter, where_document, **kwargs
        )

    async def amax_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return diverse documents without blocking the event loop; see `max_marginal_relevance_search`."""
        vector = (await self._aembed_queries([query]))[0]
        search = self.max_marginal_relevance_search_by_vector
        return await run_in_executor(None, search, vector, k, fetch_k, lambda_mult, filter, where_document, **kwargs)

    def max_marginal_relevance_search_by_vector(  # type: ignore[override]
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Filter | None = None,
        where_document: Filter | None = None,
        plan: Plan | None = None,
    ) -> list[Document]:
        """Return k documents that are near a full vector and unlike each other; see `max_marginal_relevance_search`."""
        where = chroma_where(filter)
        hits = self.index.search_mmr([embedding], k, fetch_k, lambda_mult, plan, where, where_document)[0]
        return [_document(hit) for hit in hits]

    def _search(
        self,
        vectors: list[list[float]],
        k: int,
        filter: Filter | None,
        where_document: Filter | None = None,
        plan: Plan | None = None,
        score_threshold: float | None = None,
        explain: bool = False,
    ) -> list[list[Hit]]:
        where = chroma_where(filter)
        return self.index.search(
            vectors, k, plan, where, where_document, score_threshold=score_threshold, explain=explain
        )

    async def _asearch(
        self,
        vectors: list[list[float]],
        k: int,
        filter: Filter | None,
        where_document: Filter | None = None,
        plan: Plan | None = None,
        score_threshold: float | None = None,
        explain: bool = False,
    ) -> list[list[Hit]]:
        where = chroma_where(filter)
        return await self.index.asearch(
            vectors, k, plan, where, where_document, score_threshold=score_threshold, explain=explain
        )

    def _embed_queries(self, queries: Sequence[str]) -> list[list[float]]:
        embeddings = self._embeddings
        if isinstance(embeddings, MatryoshkaEmbeddings):
            return embeddings.embed_queries(list(queries))
        return [embeddings.embed_query(query) for query in queries]

    async def _aembed_queries(self, queries: Sequence[str]) -> list[list[float]]:
        embeddings = self._embeddings
        if isinstance(embeddings, MatryoshkaEmbeddings):
            return await embeddings.aembed_queries(list(queries))
        return [await embeddings.aembed_query(query) for query in queries]

    def _add(self, rows: Iterator[Row], size: int | None, show_progress: bool, total: int | None) -> list[str]:
        names: list[str] = []
        with progress_bar(total, "index", "text", show_progress) as advance:
            for batch in checked_batches(self.index, rows, size):
                vectors = self._embeddings.embed_documents(batch.texts)
                self.index.upsert(batch.ids, vectors, batch.texts, batch.metadatas)
                names += batch.names
                advance(len(batch.names))
        return names

    async def _aadd(self, rows: Iterator[Row], size: int | None, show_progress: bool, total: int | None) -> list[str]:
        names: list[str] = []
        with progress_bar(total, "index", "text", show_progress) as advance:
            for batch in checked_batches(self.index, rows, size):
                vectors = await self._embeddings.aembed_documents(batch.texts)
                await run_in_executor(None, self.index.upsert, batch.ids, vectors, batch.texts, batch.metadatas)
                names += batch.names
                advance(len(batch.names))
        return names

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        given = self._relevance_score_fn
        if given is not None:
            return lambda cosine: given(1.0 - cosine)
        return lambda cosine: min(max(cosine, 0.0), 1.0)

    @property
    def _embeddings(self) -> Embeddings:
        if self._embedding is None:
            raise InvalidInput("this store has no embeddings; pass embedding= to search or add by text.")
        return self._embedding


def _embedding_and_name(
    embedding: Embeddings | str | None, name: str | Embeddings | None, embedding_function: Embeddings | None
) -> tuple[Embeddings | None, str]:
    """Return embeddings and name in whichever order they were given; `langchain_chroma` has the name first."""
    if isinstance(embedding, str) and (name == _NAME or not isinstance(name, str)):
        embedding, name = None if isinstance(name, str) else name, embedding
    if embedding is not None and embedding_function is not None:
        raise InvalidInput("embedding and embedding_function are both given; they mean the same, so pass one.")
    chosen = embedding if embedding is not None else embedding_function
    if isinstance(chosen, str) or not (chosen is None or hasattr(chosen, "embed_query")):
        raise InvalidInput(
            f"embedding is {chosen!r}; it must be a LangChain Embeddings. The collection's name is collection_name=."
        )
    if not isinstance(name, str):
        raise InvalidInput(f"collection_name is {name!r}; it must be a string.")
    return chosen, name


@contextmanager
def _plain_collection_explained(name: str) -> Iterator[None]:
    """Tell a user of LangChain what to do about a plain collection, in terms of this class."""
    try:
        yield
    except PlainCollection as error:
        raise PlainCollection(
            f"collection {name!r} was filled by plain Chroma, single-stage. MatryoshkaVectorStore.from_existing("
            "Chroma(...), in_place=True) makes a two-stage one of it and embeds nothing again; or use another "
            "collection_name."
        ) from error


def _document(found: Hit | Record) -> Document:
    return Document(id=found.id, page_content=found.document or "", metadata=found.metadata)


def _scored(hits: Sequence[Hit]) -> list[tuple[Document, float]]:
    return [(_document(hit), hit.score) for hit in hits]


def _length(items: Iterable[Any]) -> int | None:
    return len(items) if isinstance(items, Sized) else None
