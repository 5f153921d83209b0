"""`MatryoshkaVectorStore`: a two-stage index as LlamaIndex's vector store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.schema import BaseNode, ImageNode, IndexNode, MetadataMode, TextNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from llama_index_mrl.compat import DOCUMENT_KEY, NODE_KEYS, TYPE_KEY
from llama_index_mrl.embeddings import MatryoshkaEmbedding, fingerprint_of, name_of
from llama_index_mrl.filters import Where, condition
from mrl_rag import Hit, Plan, Record, TwoStageIndex
from mrl_rag.binding import bind_model
from mrl_rag.compat.chroma import reaching, settings_of
from mrl_rag.errors import InvalidIds, InvalidInput

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

# Defaults of LlamaIndex's own stores: candidates for MMR, as a multiple of `similarity_top_k`, and its threshold.
_MMR_PREFETCH = 4.0
_MMR_THRESHOLD = 0.5


class MatryoshkaVectorStore(BasePydanticVectorStore):
    """Chroma searched at a low dimension, the shortlist reranked at full dimension.

        store = MatryoshkaVectorStore(persist_dir="./db", embed_model=embed_model)
        store = MatryoshkaVectorStore("docs", host="localhost", port=8000)                 # beside `chroma run`
        store = MatryoshkaVectorStore(chroma_collection=client.create_collection("docs"))  # as ChromaVectorStore
        index = VectorStoreIndex.from_documents(
            documents, storage_context=StorageContext.from_defaults(vector_store=store), embed_model=embed_model)
        index = VectorStoreIndex.from_vector_store(store, embed_model=embed_model)         # filled already
        index.as_query_engine(llm=llm).query("a question")

    Similarities are cosines at full dimension. Nodes are returned as they were added, without their embedding. Metadata
    values that Chroma can't store (None, dicts, empty or mixed lists) are returned as well, but filters treat their
    keys as missing. All filter operators and conditions work; `llama_index_mrl.filters` describes them. Chroma
    evaluates `==`, `!=`, `in`, `nin`, `contains`, `any`, `all` and comparisons of numbers; for the others the metadata
    of all candidates is read. Records that LangChain or `TwoStageIndex` wrote are returned as text nodes, and changes
    that these made to the text or metadata of a node are kept.

    `to_dict` and pickles contain where the index is, not its records; an index in memory can't be pickled.
    `copy.deepcopy` shares the index.

    It replaces `ChromaVectorStore`, with these differences. Similarities are cosines, not exp(-distance). Adding a node
    whose id exists replaces it. `client` is the chromadb client; `index.collection()` is the collection. `get_nodes`
    returns nodes in the order of the ids given. `collection_name` is the first argument, and may be a collection.
    `delete_nodes` without arguments raises. Unknown arguments are refused.

    Args:
        collection_name: name of the Chroma collection, or the collection itself.
        persist_dir: a folder; None for memory, unless a client, collection or host is given.
        client: a chromadb client to use instead of `persist_dir`.
        full_dim: length of the vectors; None for that of the stored vectors, or of the first ones that are added.
        shortlist_dim: length of the vectors that are searched first; None for `TwoStageIndex`'s default.
        embed_model: the embedding model whose vectors are stored. The collection remembers it, and refuses another one.
            None checks nothing.
        model_name: name of that model; None takes it from `embed_model`. Pass the stored name where one model has two.
        fingerprint: fingerprint of the encoder; None takes it from `embed_model` if that is a `MatryoshkaEmbedding`.
        host: host of a Chroma server.
        port: port of that server; None for 8000.
        ssl: use https with that server.
        headers: HTTP headers to send to that server; `to_dict` leaves them out.
        chroma_collection: a collection to use, with its client. It must be empty, or that of a two-stage index.
        collection_kwargs: None, {"metadata": {"hnsw:space": "cosine"}} or {"configuration": {"hnsw": {"space":
            "cosine"}}}: cosine is the only metric.
        index: a `TwoStageIndex` to use instead of all arguments that say where it is.
        **fields: `flat_metadata`, and `BasePydanticVectorStore`'s own.

    Raises:
        InvalidInput: `collection_kwargs` asks for another metric or setting.
        PlainCollection: the collection was filled by plain Chroma; `TwoStageIndex.from_chroma` makes a two-stage index
            of it without encoding.
        IndexMismatch: another model, or another dimension, filled the collection.
        TwoStageIndexError: as `TwoStageIndex` does.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    stores_text: bool = True
    flat_metadata: bool = Field(default=False, description="Refuse nodes with lists or dicts in their metadata.")
    collection_name: str = Field(default="llama_index", description="Name of the Chroma collection.")
    persist_dir: str | None = Field(default=None, description="A folder; None for memory or a server.")
    full_dim: int | None = Field(default=None, description="Length of the vectors.")
    shortlist_dim: int | None = Field(default=None, description="Length of the vectors searched first.")
    fingerprint: str | None = Field(default=None, description="Fingerprint of the encoder.")
    model_name: str | None = Field(default=None, description="Name of the model whose vectors are stored.")
    host: str | None = Field(default=None, description="Host of the Chroma server.")
    port: int | None = Field(default=None, description="Port of the Chroma server.")
    ssl: bool = Field(default=False, description="Use https with the Chroma server.")
    headers: dict[str, str] | None = Field(default=None, exclude=True, repr=False, description="Sent to the server.")

    _index: TwoStageIndex = PrivateAttr()

    def __init__(
        self,
        collection_name: str | Collection = "llama_index",
        persist_dir: str | None = None,
        client: ClientAPI | None = None,
        full_dim: int | None = None,
        shortlist_dim: int | None = None,
        fingerprint: str | None = None,
        *,
        embed_model: BaseEmbedding | None = None,
        model_name: str | None = None,
        host: str | None = None,
        port: int | str | None = None,
        ssl: bool = False,
        headers: dict[str, str] | None = None,
        chroma_collection: Collection | None = None,
        collection_kwargs: Mapping[str, Any] | None = None,
        index: TwoStageIndex | None = None,
        **fields: Any,
    ) -> None:
        import chromadb

        _check_collection(collection_kwargs or {})
        if not isinstance(collection_name, str):
            # As in ChromaVectorStore, whose first argument is the collection.
            chroma_collection, collection_name = collection_name, collection_name.name
        if chroma_collection is not None:
            client, collection_name = _client_of(chroma_collection), chroma_collection.name
        elif host is not None:
            with reaching(f"{host}:{port or 8000}"):
                client = chromadb.HttpClient(host, int(port or 8000), ssl, dict(headers or {}))
        if not isinstance(embed_model, BaseEmbedding | None):
            raise InvalidInput(f"embed_model is {embed_model!r}; it must be a BaseEmbedding of LlamaIndex.")
        if embed_model is not None:
            fingerprint, model_name = fingerprint or fingerprint_of(embed_model), model_name or name_of(embed_model)
            full_dim = full_dim or (embed_model.length if isinstance(embed_model, MatryoshkaEmbedding) else None)
        made = index is None
        if index is None:
            index = TwoStageIndex(persist_dir, collection_name, full_dim, shortlist_dim, client=client)
        fields |= {"full_dim": full_dim, "shortlist_dim": shortlist_dim, "fingerprint": fingerprint}
        fields |= {"model_name": model_name, "collection_name": index.name, "headers": headers, **_place(index)}
        try:
            bind_model(index, model_name, fingerprint, "model_name")
            super().__init__(**fields)
        except BaseException:
            if made:
                index.close()
            raise
        self._index = index

    def __repr__(self) -> str:
        model = f", model_name={self.model_name!r}" if self.model_name else ""
        return f"MatryoshkaVectorStore({self._index!r}{model})"

    def close(self) -> None:
        """Close the index's files. A client that was passed in stays open."""
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @classmethod
    def from_collection(cls, collection: Collection) -> MatryoshkaVectorStore:
        """Make a store of a Chroma collection; the same as `chroma_collection=`."""
        return cls(chroma_collection=collection)

    @classmethod
    def from_params(
        cls,
        collection_name: str,
        host: str | None = None,
        port: int | str | None = None,
        ssl: bool = False,
        headers: dict[str, str] | None = None,
        persist_dir: str | None = None,
        **kwargs: Any,
    ) -> MatryoshkaVectorStore:
        """Make a store in a folder or beside a server.

        Args:
            collection_name: name of the Chroma collection.
            host: host of a Chroma server.
            port: port of that server; None for 8000.
            ssl: use https with that server.
            headers: HTTP headers to send to that server.
            persist_dir: a folder, instead of the server.
            **kwargs: the constructor's other arguments, `collection_kwargs` among them.

        Raises:
            InvalidInput: neither a folder nor a server is given.
        """
        if persist_dir is None and host is None:
            raise InvalidInput("persist_dir and host are both None; give a folder or a server.")
        if persist_dir is not None:
            return cls(collection_name, persist_dir, **kwargs)
        return cls(collection_name, host=host, port=port, ssl=ssl, headers=headers, **kwargs)

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex stores for this class."""
        return "MatryoshkaVectorStore"

    @property
    def client(self) -> Any:
        """The chromadb client."""
        return self._index.client

    @property
    def index(self) -> TwoStageIndex:
        """The two-stage index that does the work."""
        return self._index

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> MatryoshkaVectorStore:
        """Copy the fields and share the index."""
        return super().__deepcopy__((memo or {}) | {id(self._index): self._index})

    def __reduce__(self) -> tuple[Callable[..., MatryoshkaVectorStore], tuple[Any, ...]]:
        """Pickle where the index is.

        Raises:
            InvalidInput: it is in memory, or in another database than Chroma's default.
        """
        if self.persist_dir is None and self.host is None:
            raise InvalidInput(
                "a store in memory, or in another database than Chroma's default, can't be pickled; pass persist_dir=, "
                "or host=."
            )
        return _restored, (type(self), {name: getattr(self, name) for name in type(self).model_fields})

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes that have embeddings; a node whose id exists already is replaced.

        Args:
            nodes: n nodes; of nodes with equal ids the last is stored.
            **kwargs: not used; the base class asks for it.

        Returns:
            The n ids.
        """
        nodes = list(nodes)
        chosen = {node.node_id: node for node in nodes}
        if chosen:
            self._index.upsert(
                list(chosen),
                [node.get_embedding() for node in chosen.values()],
                [node.get_content(metadata_mode=MetadataMode.NONE) for node in chosen.values()],
                [self._metadata(node) for node in chosen.values()],
            )
        return [node.node_id for node in nodes]

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """As `add`, without blocking the event loop."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Remove every node of a document."""
        self._index.delete(where={DOCUMENT_KEY: ref_doc_id})

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """As `delete`, without blocking the event loop."""
        await asyncio.to_thread(self.delete, ref_doc_id)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Remove nodes by id, by filter, or by both; unknown ids are ignored.

        Raises:
            InvalidIds: there are no ids and no filters. `clear` removes every node.
        """
        ids, where = self._narrowed(node_ids, filters, None)
        if ids is None and where is None:
            raise InvalidIds("delete_nodes() needs node_ids= or filters=. clear() removes every node.")
        self._index.delete(ids, where)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """As `delete_nodes`, without blocking the event loop."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Return nodes by id, by filter, or by both; all nodes without either. With ids, in their order, each once."""
        ids, where = self._narrowed(node_ids, filters, None)
        return [_node(record) for record in self._index.get(ids, where, vectors=False)]

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """As `get_nodes`, without blocking the event loop."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    def clear(self) -> None:
        """Remove every node."""
        self._index.clear()

    async def aclear(self) -> None:
        """As `clear`, without blocking the event loop."""
        await asyncio.to_thread(self.clear)

    def reencode(
        self,
        embed_model: BaseEmbedding,
        *,
        model_name: str | None = None,
        shortlist_dim: int | None = None,
        show_progress: bool = False,
        drop_old: bool = False,
    ) -> str | None:
        """Change the embedding model without downtime: embed every node again, and switch in one step.

        Each node is embedded as LlamaIndex does it: its text with the metadata that it shows to embedding models. The
        old collection answers queries meanwhile. After an interruption, call again with the same model; what was
        embedded is not embedded again. Add no nodes before it has returned, and give indexes and query engines over
        this store the new model. See `TwoStageIndex.reencode`.

        Args:
            embed_model: the new embedding model, any of LlamaIndex's.
            model_name: its name; None takes it from the model.
            shortlist_dim: length of the vectors that are searched first; None for `TwoStageIndex`'s default.
            show_progress: show a bar when standard error is a terminal.
            drop_old: remove the old collection after the switch; otherwise `store.index.drop_old()` does.

        Returns:
            The name under which the old collection is kept; None where there is none.

        Raises:
            InvalidInput: `embed_model` is not a `BaseEmbedding`.
            InvalidTexts: records have no text; nothing was done.
            MrlRagError: as `TwoStageIndex.reencode` does.
        """
        if not isinstance(embed_model, BaseEmbedding):
            raise InvalidInput(f"embed_model is {embed_model!r}; it must be a BaseEmbedding of LlamaIndex.")
        name, mark = model_name or name_of(embed_model), fingerprint_of(embed_model)
        kept = self._index.reencode(
            embed_model.get_text_embedding_batch,
            name,
            mark,
            shortlist_dim=shortlist_dim,
            text_of=_embedded_text,
            progress=show_progress,
            drop_old=drop_old,
        )
        self.model_name, self.fingerprint = name, mark
        self.full_dim, self.shortlist_dim = None, shortlist_dim
        return kept

    def query(
        self,
        query: VectorStoreQuery,
        plan: Plan | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
        mmr_threshold: float | None = None,
        mmr_prefetch_factor: float | None = None,
        mmr_prefetch_k: int | None = None,
        **kwargs: Any,
    ) -> VectorStoreQueryResult:
        """Search in mode DEFAULT or MMR. Pass the other arguments by `as_retriever(vector_store_kwargs={...})`.

        Args:
            query: LlamaIndex's query; `query_embedding` is a full vector. `doc_ids` and `node_ids` restrict the search,
                except where `node_ids` is empty or names only image and index nodes: `VectorStoreIndex` passes those
                with every query and means all nodes. Without a vector and a text, the first `similarity_top_k` nodes
                that meet the conditions are returned, without similarities, as `VectorIndexAutoRetriever` needs it.
            plan: dimensions and shortlist sizes; None for the index's default.
            where: condition on metadata, in Chroma's language, added to the query's filters.
            where_document: condition on the text, in Chroma's language.
            mmr_threshold: 1 for the nearest only, 0 for the most different; None for the query's own, or 0.5.
            mmr_prefetch_factor: how many nodes MMR chooses from, as a multiple of `similarity_top_k`; None for 4.
            mmr_prefetch_k: the same as an absolute number; pass one of both.
            **kwargs: not used; the base class asks for it.

        Returns:
            Nodes with their cosines and ids, nearest first, or in the order in which MMR chose them.

        Raises:
            InvalidInput: this store doesn't have the mode, a filter's value has the wrong type, or the query has a text
                but no embedding.
            InvalidPlan: `similarity_top_k` is less than 1.
        """
        if query.mode not in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR):
            mode = getattr(query.mode, "value", query.mode)
            raise InvalidInput(f"mode is {mode!r}; this store has the modes 'default' and 'mmr'.")
        if query.doc_ids == []:
            return _result([])
        where = _within_documents(query, where)
        ids, where = self._narrowed(self._restriction(query.node_ids), query.filters, where)
        k = query.similarity_top_k
        if query.query_embedding is None or not len(query.query_embedding):
            return self._first(query, ids, where, where_document)
        vectors = [query.query_embedding]
        if query.mode == VectorStoreQueryMode.DEFAULT:
            return _result(self._index.search(vectors, k, plan, where, where_document, ids=ids)[0])
        if mmr_prefetch_factor is not None and mmr_prefetch_k is not None:
            raise InvalidInput("mmr_prefetch_factor and mmr_prefetch_k are both given; pass one of them.")
        fetch_k = mmr_prefetch_k or int(k * (mmr_prefetch_factor or _MMR_PREFETCH))
        thresholds = (mmr_threshold, query.mmr_threshold, _MMR_THRESHOLD)
        threshold = next(given for given in thresholds if given is not None)
        hits = self._index.search_mmr(vectors, k, max(fetch_k, 1), threshold, plan, where, where_document, ids=ids)
        return _result(hits[0])

    def _first(
        self, query: VectorStoreQuery, ids: list[str] | None, where: Where | None, where_document: Where | None
    ) -> VectorStoreQueryResult:
        """Return the first nodes that meet the conditions of a query without a vector."""
        if query.query_str:
            raise InvalidInput(
                f"the query {query.query_str[:40]!r} has no embedding; search this store through an index or "
                "retriever, or call get_nodes."
            )
        records = self._index.get(ids, where, where_document, limit=query.similarity_top_k)
        nodes = [_node(record) for record in records]
        return VectorStoreQueryResult(nodes=nodes, ids=[node.node_id for node in nodes])

    async def aquery(
        self,
        query: VectorStoreQuery,
        plan: Plan | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
        **kwargs: Any,
    ) -> VectorStoreQueryResult:
        """As `query`, without blocking the event loop.

        On a server the requests of mode DEFAULT are awaited; see `TwoStageIndex.asearch`. A thread carries out mode
        MMR, and queries with `node_ids`, without a vector, or with a filter that Chroma doesn't evaluate.
        """
        wanted, vector = condition(query.filters), query.query_embedding
        searches = query.mode == VectorStoreQueryMode.DEFAULT and query.doc_ids != [] and not query.node_ids
        if not searches or vector is None or not len(vector) or not (wanted is None or wanted.exact):
            return await asyncio.to_thread(self.query, query, plan, where, where_document, **kwargs)
        _, where = self._narrowed(None, query.filters, _within_documents(query, where))
        k = query.similarity_top_k
        return _result((await self._index.asearch([vector], k, plan, where, where_document))[0])

    def _metadata(self, node: BaseNode) -> dict[str, Any]:
        """Return the metadata to store: the node as JSON, and those of its own values that Chroma can store."""
        try:
            metadata = node_to_metadata_dict(node, remove_text=True, flat_metadata=self.flat_metadata)
        except ValueError as error:
            raise InvalidInput(f"node {node.node_id!r}, flat_metadata={self.flat_metadata}: {error}.") from error
        return {key: value for key, value in metadata.items() if _storable(value)}

    def _restriction(self, node_ids: list[str] | None) -> list[str] | None:
        if not node_ids:
            return None
        of_other_kinds = self._index.metadatas({TYPE_KEY: {"$in": [ImageNode.class_name(), IndexNode.class_name()]}})
        return None if set(node_ids) <= set(of_other_kinds) else node_ids

    def _narrowed(
        self, node_ids: Sequence[str] | None, filters: MetadataFilters | None, where: Where | None
    ) -> tuple[list[str] | None, Where | None]:
        """Return the same restrictions as ids and a `where` in Chroma's language."""
        ids = None if node_ids is None else list(node_ids)
        wanted = condition(filters)
        if wanted is None:
            return ids, where
        both = [part for part in (where, wanted.where) if part]
        where = {"$and": both} if len(both) > 1 else both[0] if both else None
        if wanted.exact:
            return ids, where
        met = [id_ for id_, metadata in self._index.metadatas(where).items() if wanted.meets(_as_added(metadata))]
        return (met if ids is None else [id_ for id_ in ids if id_ in set(met)]), None


def _within_documents(query: VectorStoreQuery, where: Where | None) -> Where | None:
    """Return a condition together with the query's `doc_ids`."""
    if query.doc_ids is None:
        return where
    within = {DOCUMENT_KEY: {"$in": list(query.doc_ids)}}
    return {"$and": [within, where]} if where else within


def _result(hits: Sequence[Hit]) -> VectorStoreQueryResult:
    return VectorStoreQueryResult(
        nodes=[_node(hit) for hit in hits],
        similarities=[hit.score for hit in hits],
        ids=[hit.id for hit in hits],
    )


def _node(found: Hit | Record) -> BaseNode:
    if not found.metadata.keys() >= NODE_KEYS:
        return TextNode(id_=found.id, text=found.document or "", metadata=found.metadata)
    # None, not "": a multimodal node without text can't be given one.
    node = metadata_dict_to_node(found.metadata, text=found.document or None)
    # Another framework may have changed the record's metadata since; what Chroma can't store is only in the node.
    own = {key: value for key, value in node.metadata.items() if key in NODE_KEYS or not _storable(value)}
    now = {key: value for key, value in found.metadata.items() if key not in NODE_KEYS} | own
    node.metadata = {key: now[key] for key in (*node.metadata, *now) if key in now}
    return node


def _embedded_text(record: Record) -> str:
    """Return the text that LlamaIndex embeds for a node; that of a record of another framework alone."""
    if not record.metadata.keys() >= NODE_KEYS:
        return record.document or ""
    return _node(record).get_content(metadata_mode=MetadataMode.EMBED)


def _as_added(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a record's metadata together with its node's values that Chroma couldn't store, such as empty lists."""
    if not metadata.keys() >= NODE_KEYS:
        return metadata
    own = metadata_dict_to_node(metadata).metadata
    return {key: value for key, value in own.items() if not _storable(value)} | metadata


def _storable(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and len({type(part) for part in value}) == 1 and not isinstance(value[0], list | dict | None)
    return isinstance(value, str | int | float)


def _check_collection(settings: Mapping[str, Any]) -> None:
    """Accept settings that ask for cosine, which a two-stage index has anyway; refuse all others."""
    cosine = {"metadata": {"hnsw:space": "cosine"}, "configuration": {"hnsw": {"space": "cosine"}}}
    for name, given in settings.items():
        if given and given != cosine.get(name):
            raise InvalidInput(
                f"collection_kwargs has {name}={given!r}; the metric of a two-stage index is cosine, and its "
                "collection's metadata is its own. Leave it out; `store.index.reindex(hnsw={...})` changes the graph."
            )


def _client_of(collection: Collection) -> ClientAPI:
    import chromadb

    settings = settings_of(collection)
    if settings is None:
        raise InvalidInput("this collection doesn't tell where it is; pass client= and collection_name=.")
    return chromadb.Client(settings, collection.tenant, collection.database)


def _place(index: TwoStageIndex) -> dict[str, Any]:
    """Return the fields that say where an index is: none for memory, or another database than Chroma's default."""
    from chromadb.config import DEFAULT_DATABASE, DEFAULT_TENANT

    settings = index.client.get_settings()
    if (index.client.tenant, index.client.database) != (DEFAULT_TENANT, DEFAULT_DATABASE):
        return {}
    if index.path is not None:
        return {"persist_dir": str(index.path)}
    if settings.chroma_server_host is None:
        return {}
    return {
        "host": settings.chroma_server_host,
        "port": settings.chroma_server_http_port,
        "ssl": bool(settings.chroma_server_ssl_enabled),
    }


def _restored(cls: type[MatryoshkaVectorStore], fields: dict[str, Any]) -> MatryoshkaVectorStore:
    return cls(**fields)
