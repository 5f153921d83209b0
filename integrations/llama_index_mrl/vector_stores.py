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
from mrl_rag.compat.chroma import settings_of
from mrl_rag.errors import InvalidIds, InvalidInput

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

# Candidates for MMR, a multiple of the nodes asked for, and its balance; the defaults of LlamaIndex's own stores.
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

    Similarities are cosines at full dimension. Nodes come back as they were added, but for their embedding. Metadata
    values that Chroma can't hold (None, dicts, empty or mixed lists) come back, too; filters see the key as missing.
    Every filter operator and condition is there, as `llama_index_mrl.filters` says: comparisons of numbers, `==`,
    `!=`, `in`, `nin`, `contains`, `any` and `all` are Chroma's work; for the others the metadata of all candidates is
    read. Records written by LangChain or by plain `TwoStageIndex` come back as text nodes, and nodes whose text or
    metadata these have changed come back changed.

    `to_dict` and pickle carry where the index is, not what it holds; one in memory can't be pickled. `copy.deepcopy`
    shares the index.

    It stands in for `ChromaVectorStore`, with these differences. Similarities are not exp(-distance). A node whose id
    is there already is replaced. `client` is the chromadb client; `index.collection()` is the collection. `get_nodes`
    gives nodes in the order asked, or of their ids. `collection_name` comes first, and may be the collection itself.
    Unknown arguments are refused.

    Args:
        collection_name: of the Chroma collection.
        persist_dir: a folder; None for memory, or where a client, collection or host is given.
        client: a chromadb client to use instead of `persist_dir`.
        full_dim: length of the vectors; None for the stored one, or that of the first vectors.
        shortlist_dim: length that Chroma searches; None for the stored one, or `TwoStageIndex`'s default.
        embed_model: what makes the vectors. The collection remembers it and refuses another one's; None checks nothing.
        model_name: name of that model; None takes it from `embed_model`. `to_dict` carries it.
        fingerprint: of that model's encoder; None takes it from a `MatryoshkaEmbedding`. `to_dict` carries it.
        host: of a Chroma server.
        port: of the server.
        ssl: whether the server wants https.
        headers: sent to the server, as for authorisation; `to_dict` leaves them out.
        chroma_collection: gives client and name. It is a two-stage index's, or an empty one, which is taken over.
        collection_kwargs: None, or the metric of every two-stage index, as "metadata" or "configuration".
        index: a `TwoStageIndex` to use instead of all of the above.
        **fields: `flat_metadata`, and `BasePydanticVectorStore`'s own.

    Raises:
        InvalidInput: `collection_kwargs` asks for another metric or setting.
        PlainCollection: the collection was filled single-stage: `TwoStageIndex.from_chroma` makes a two-stage index of
            it without encoding.
        IndexMismatch: the collection was filled with another model or dimension. Embeddings of other libraries are told
            apart by their model's name; one model may be used through several classes.
        TwoStageIndexError: as `TwoStageIndex` does.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    stores_text: bool = True
    flat_metadata: bool = Field(default=False, description="Refuse nodes with lists or dicts in their metadata.")
    collection_name: str = Field(default="llama_index", description="Name of the Chroma collection.")
    persist_dir: str | None = Field(default=None, description="A folder; None for memory or a server.")
    full_dim: int | None = Field(default=None, description="Length of the vectors.")
    shortlist_dim: int | None = Field(default=None, description="Length that Chroma searches.")
    fingerprint: str | None = Field(default=None, description="Fingerprint of the encoder.")
    model_name: str | None = Field(default=None, description="Name of the model whose vectors are stored.")
    host: str | None = Field(default=None, description="Host of the Chroma server.")
    port: int | None = Field(default=None, description="Port of the Chroma server.")
    ssl: bool = Field(default=False, description="Whether the Chroma server wants https.")
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
            # ChromaVectorStore takes the collection first.
            chroma_collection, collection_name = collection_name, collection_name.name
        if chroma_collection is not None:
            collection_name, place = chroma_collection.name, (chroma_collection.tenant, chroma_collection.database)
            settings = settings_of(chroma_collection)
            if settings is None:
                raise InvalidInput("this collection doesn't tell where it is; pass client= and collection_name=.")
            client = chromadb.Client(settings, *place)
        elif host is not None:
            client = chromadb.HttpClient(host, int(port or 8000), ssl, dict(headers or {}))
        if embed_model is not None:
            fingerprint, model_name = fingerprint or fingerprint_of(embed_model), model_name or name_of(embed_model)
            full_dim = full_dim or (embed_model.length if isinstance(embed_model, MatryoshkaEmbedding) else None)
        made = index is None
        if index is None:
            index = TwoStageIndex(persist_dir, collection_name, full_dim, shortlist_dim, client=client)
        try:
            bind_model(index, model_name, fingerprint, "model_name")
            fields |= {"full_dim": full_dim, "shortlist_dim": shortlist_dim, "fingerprint": fingerprint}
            fields |= {"model_name": model_name, "collection_name": index.name, "headers": headers, **_place(index)}
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
        """Let go of files and connections. A client that was passed in stays open."""
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @classmethod
    def from_collection(cls, collection: Collection) -> MatryoshkaVectorStore:
        """Make a store of a Chroma collection; as `chroma_collection`."""
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
            collection_name: of the Chroma collection.
            host: of a Chroma server.
            port: of the server.
            ssl: whether the server wants https.
            headers: sent to the server.
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
        """Copy the fields, and share the index."""
        return super().__deepcopy__((memo or {}) | {id(self._index): self._index})

    def __reduce__(self) -> tuple[Callable[..., MatryoshkaVectorStore], tuple[Any, ...]]:
        """Carry where the index is.

        Raises:
            InvalidInput: it is in memory, or in another database than Chroma's default.
        """
        if self.persist_dir is None and self.host is None:
            raise InvalidInput(
                "this index is in memory, or in a database of its own, and can't be pickled; give it a persist_dir, or "
                "use a server's default database."
            )
        return _restored, (type(self), {name: getattr(self, name) for name in type(self).model_fields})

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes that carry their embedding; a node whose id is there already is replaced.

        Args:
            nodes: n nodes; of those with one id the last is stored.
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
        """Remove nodes by id, by filter, or by both; unknown ids are passed over.

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
        """Return nodes by id, in the order asked and each once, by filter, or by both; all of them without either."""
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
        """Search, in mode DEFAULT or MMR; `as_retriever(vector_store_kwargs={...})` gives what isn't in the query.

        Args:
            query: LlamaIndex's query; `query_embedding` is a full vector. `doc_ids` and `node_ids` restrict it, but
                for no node ids, or those of image and index nodes alone: LlamaIndex's `VectorStoreIndex` passes those
                it has added with every query, and means all nodes. Where there is neither a vector nor a text, the
                first `similarity_top_k` nodes that meet the conditions come in the order of their ids, without
                similarities: so `VectorIndexAutoRetriever` asks for filters alone.
            plan: dimensions and shortlist sizes; None for the index's default.
            where: condition on metadata, in Chroma's language, besides the query's filters.
            where_document: condition on the text, in Chroma's language.
            mmr_threshold: 1 for the nearest only, 0 for the most different; None for the query's own, or 0.5.
            mmr_prefetch_factor: how many of the nearest MMR chooses from, a multiple of the nodes asked for; 4.
            mmr_prefetch_k: the same as a number.
            **kwargs: not used; the base class asks for it.

        Returns:
            Nodes, their cosines and ids: nearest first, or in the order in which MMR chose them.

        Raises:
            InvalidInput: a mode this store doesn't have, a filter with a value of the wrong kind, or a text without an
                embedding.
            InvalidPlan: `similarity_top_k` is less than 1.
        """
        if query.mode not in (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR):
            mode = getattr(query.mode, "value", query.mode)
            raise InvalidInput(f"mode={mode!r}: this store has 'default' and 'mmr'.")
        if query.doc_ids is not None:
            within = {DOCUMENT_KEY: {"$in": list(query.doc_ids)}}
            where = {"$and": [within, where]} if where else within
        if query.doc_ids == []:
            return _result([])
        ids, where = self._narrowed(self._restriction(query.node_ids), query.filters, where)
        k = query.similarity_top_k
        if query.query_embedding is None or not len(query.query_embedding):
            if query.query_str:
                raise InvalidInput(
                    f"the query {query.query_str[:40]!r} has no embedding; search this store through an index or "
                    "retriever, or call get_nodes."
                )
            nodes = [_node(record) for record in self._index.get(ids, where, where_document, limit=k)]
            return VectorStoreQueryResult(nodes=nodes, ids=[node.node_id for node in nodes])
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

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As `query`, without blocking the event loop."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    def _metadata(self, node: BaseNode) -> dict[str, Any]:
        """Return what Chroma stores beside the text: the node itself as JSON, and of its metadata what Chroma holds."""
        try:
            metadata = node_to_metadata_dict(node, remove_text=True, flat_metadata=self.flat_metadata)
        except ValueError as error:
            raise InvalidInput(f"node {node.node_id!r}, flat_metadata={self.flat_metadata}: {error}.") from error
        return {key: value for key, value in metadata.items() if _storable(value)}

    def _restriction(self, node_ids: list[str] | None) -> list[str] | None:
        if not node_ids:
            return None
        bookkeeping = self._index.metadatas({TYPE_KEY: {"$in": [ImageNode.class_name(), IndexNode.class_name()]}})
        return None if set(node_ids) <= set(bookkeeping) else node_ids

    def _narrowed(
        self, node_ids: Sequence[str] | None, filters: MetadataFilters | None, where: Where | None
    ) -> tuple[list[str] | None, Where | None]:
        """Return the same restrictions as ids and a condition in Chroma's language."""
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


def _result(hits: Sequence[Hit]) -> VectorStoreQueryResult:
    return VectorStoreQueryResult(
        nodes=[_node(hit) for hit in hits],
        similarities=[hit.score for hit in hits],
        ids=[hit.id for hit in hits],
    )


def _node(found: Hit | Record) -> BaseNode:
    if not found.metadata.keys() >= NODE_KEYS:
        return TextNode(id_=found.id, text=found.document or "", metadata=found.metadata)
    # A multimodal node without text has none to be set.
    node = metadata_dict_to_node(found.metadata, text=found.document or None)
    # Another framework, or plain Chroma, may have changed the record since; it changes what Chroma holds.
    own = {key: value for key, value in node.metadata.items() if key in NODE_KEYS or not _storable(value)}
    now = {key: value for key, value in found.metadata.items() if key not in NODE_KEYS} | own
    node.metadata = {key: now[key] for key in (*node.metadata, *now) if key in now}
    return node


def _as_added(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a record's metadata with what Chroma couldn't hold of its node's, an empty list for one."""
    if not metadata.keys() >= NODE_KEYS:
        return metadata
    own = metadata_dict_to_node(metadata).metadata
    return {key: value for key, value in own.items() if not _storable(value)} | metadata


def _storable(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and len({type(part) for part in value}) == 1 and not isinstance(value[0], list | dict | None)
    return isinstance(value, str | int | float)


def _check_collection(settings: Mapping[str, Any]) -> None:
    """Take what asks for the metric that a two-stage index has anyway."""
    cosine = {"metadata": {"hnsw:space": "cosine"}, "configuration": {"hnsw": {"space": "cosine"}}}
    for name, given in settings.items():
        if given and given != cosine.get(name):
            raise InvalidInput(
                f"collection_kwargs has {name}={given!r}; the metric of a two-stage index is cosine, and its "
                "collection's metadata is its own. Leave it out; `store.index.reindex(hnsw={...})` changes the graph."
            )


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
