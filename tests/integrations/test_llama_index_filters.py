"""Metadata filters mean what they mean in LlamaIndex's own SimpleVectorStore."""

import itertools

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.core.vector_stores.utils import build_metadata_filter_fn
from llama_index_mrl import MatryoshkaVectorStore
from llama_index_mrl.filters import condition

KEYS = ["x", "y"]
# No word is a part of another: there `contains` means whole members.
WORDS = ["red", "blue", "Green", ""]
NUMBERS = [0, 1, 2, 1.5, 2.0, -3]
METADATA = st.dictionaries(
    st.sampled_from(KEYS),
    st.sampled_from([*WORDS, *NUMBERS, None, True, ["red", "blue"], ["red"], [1, 2], [1.5, 2.0], []]),
)


def leaf(key, operator, value=None):
    return MetadataFilter(key=key, operator=operator, value=value)


LEAVES = st.one_of(
    st.builds(leaf, st.sampled_from(KEYS), st.sampled_from(["==", "!="]), st.sampled_from([*WORDS, *NUMBERS])),
    st.builds(
        leaf, st.sampled_from(KEYS), st.sampled_from([">", ">=", "<", "<="]), st.sampled_from([*WORDS, *NUMBERS])
    ),
    st.builds(
        leaf,
        st.sampled_from(KEYS),
        st.sampled_from(["in", "nin", "any", "all"]),
        st.one_of(st.lists(st.sampled_from(WORDS[:3])), st.lists(st.sampled_from([0, 1, 2])), st.just([1.5, 2.0])),
    ),
    st.builds(leaf, st.sampled_from(KEYS), st.just("contains"), st.sampled_from(["red", "blue", 1, 2, 2.0])),
    st.builds(
        leaf,
        st.sampled_from(KEYS),
        st.sampled_from(["text_match", "text_match_insensitive"]),
        st.sampled_from(["re", "green", "e"]),
    ),
    st.builds(leaf, st.sampled_from(KEYS), st.just("is_empty")),
)
CONDITIONS = st.sampled_from(["and", "or", "not", None])
FILTERS = st.recursive(
    LEAVES,
    lambda parts: st.builds(MetadataFilters, filters=st.lists(parts, min_size=1, max_size=3), condition=CONDITIONS),
    max_leaves=6,
)


def by_llama_index(filter_, metadata):
    """SimpleVectorStore's own function leaf by leaf: it refuses nested filters."""
    if isinstance(filter_, MetadataFilters):
        met = [by_llama_index(part, metadata) for part in filter_.filters]
        return {"and": all(met), "or": any(met), "not": not any(met)}[filter_.condition or "and"]
    stored = metadata.get(filter_.key)
    if filter_.operator in ("contains", "any", "all") and not isinstance(stored, list) and stored is not None:
        metadata = {filter_.key: [stored]}
    try:
        return build_metadata_filter_fn(lambda _: metadata, MetadataFilters(filters=[filter_]))("")
    except TypeError:
        return False


@pytest.fixture(scope="module")
def everything():
    """A store with each combination of the values above."""
    values = [None, *WORDS, *NUMBERS, True, ["red", "blue"], [1, 2], [1.5, 2.0], []]
    metadatas = [
        {key: value for key, value in zip(KEYS, pair, strict=True) if value != "missing"}
        for pair in itertools.product(["missing", *values], ["missing", "red", 1, ["red"]])
    ]
    store = MatryoshkaVectorStore()
    nodes = [
        TextNode(id_=str(i), text=f"text {i}", embedding=[1.0, i, 0.5], metadata=metadata)
        for i, metadata in enumerate(metadatas)
    ]
    store.add(nodes)
    return store, nodes


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(filters=FILTERS)
@example(filters=leaf("x", "all", []))
@example(filters=MetadataFilters(filters=[leaf("x", "any", [])], condition="not"))
def test_any_filter_finds_what_simple_vector_store_would(everything, filters):
    store, nodes = everything
    filters = filters if isinstance(filters, MetadataFilters) else MetadataFilters(filters=[filters])
    expected = {node.node_id for node in nodes if by_llama_index(filters, node.metadata)}
    query = VectorStoreQuery(query_embedding=[1.0, 3.0, 0.5], similarity_top_k=len(nodes), filters=filters)
    assert set(store.query(query).ids) == expected


@settings(max_examples=150, deadline=None)
@given(metadata=METADATA, filters=FILTERS)
def test_what_python_says_is_what_llama_index_says(metadata, filters):
    filters = filters if isinstance(filters, MetadataFilters) else MetadataFilters(filters=[filters])
    assert condition(filters).meets(metadata) == by_llama_index(filters, metadata)


@pytest.mark.parametrize("joined", ["and", "or", "not"])
@pytest.mark.parametrize(
    "filters",
    [
        [("x", "==", "red")],
        [("x", "!=", "red"), ("y", "==", 1)],
        [("x", "nin", ["red", "blue"]), ("y", "is_empty", None)],
        [("x", ">=", 1), ("y", "in", ["red"])],
    ],
)
def test_flat_filters_agree_with_the_store_itself(everything, filters, joined):
    store, nodes = everything
    nodes = [node for node in nodes if not isinstance(node.metadata.get("x"), str | list) or filters[0][1] != ">="]
    simple = SimpleVectorStore()
    simple.add(nodes)
    wanted = MetadataFilters(filters=[leaf(*f) for f in filters], condition=joined)
    query = VectorStoreQuery(query_embedding=[1.0, 3.0, 0.5], similarity_top_k=1000, filters=wanted)
    expected = set(simple.query(query).ids)
    assert set(store.query(query).ids) & {node.node_id for node in nodes} == expected
    assert len(expected) > 0


def test_what_filters_find_can_be_read_and_removed():
    store = MatryoshkaVectorStore()
    store.add(
        [
            TextNode(id_=i, embedding=[1.0, 0.0], metadata={"tag": t})
            for i, t in zip("abc", ["x", None, "XY"], strict=True)
        ]
    )
    filters = MetadataFilters(filters=[leaf("tag", "text_match_insensitive", "x")])
    assert [node.node_id for node in store.get_nodes(["c", "b", "a"], filters)] == ["c", "a"]
    store.delete_nodes(["a", "b"], filters)
    assert [node.node_id for node in store.get_nodes()] == ["b", "c"]
    store.delete_nodes(filters=MetadataFilters(filters=[leaf("tag", "is_empty")]))
    assert [node.node_id for node in store.get_nodes()] == ["c"]
    store.delete_nodes(filters=MetadataFilters(filters=[leaf("tag", "in", [])]))
    assert len(store.get_nodes()) == 1


def test_k_nodes_come_back_while_k_meet_the_filter():
    store = MatryoshkaVectorStore()
    store.add(
        [
            TextNode(
                id_=f"{i:04}",
                embedding=[1.0, i / 1000, 0.1],
                metadata={"name": f"{'rare' if i % 50 == 49 else 'name'} {i}"},
            )
            for i in range(3000)
        ]
    )
    filters = MetadataFilters(filters=[leaf("name", "text_match", "rare")])
    query = VectorStoreQuery(query_embedding=[1.0, 0.0, 0.1], similarity_top_k=30, filters=filters)
    assert store.query(query).ids == [f"{i:04}" for i in range(49, 1550, 50)][:30]


def test_dates_as_iso_strings_are_ordered():
    store = MatryoshkaVectorStore()
    days = ["2024-01-31", "2024-02-01", "2025-01-01"]
    store.add([TextNode(id_=day, embedding=[1.0, 0.0], metadata={"day": day}) for day in days])
    filters = MetadataFilters(filters=[leaf("day", ">=", "2024-02-01"), leaf("day", "<", "2025-01-01")])
    assert [node.node_id for node in store.get_nodes(filters=filters)] == ["2024-02-01"]
