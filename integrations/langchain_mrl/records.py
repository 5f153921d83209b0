"""Texts and documents as they are added to a store: paired with their ids and metadata, checked, in batches."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

from langchain_core.documents import Document
from langchain_core.utils.iter import batch_iterate

from mrl_rag import TwoStageIndex
from mrl_rag.arguments import check_integer
from mrl_rag.errors import InvalidIds, InvalidTexts

# Texts embedded and committed together: an interruption loses at most these.
_BATCH = 512

# id, text, metadata
Row = tuple[str | None, str, Mapping[str, Any] | None]


class Batch(NamedTuple):
    """Records to embed and store together.

    Attributes:
        names: the id of each text that was given, in order; one id may stand there several times.
        ids: different ids.
        texts: one per id.
        metadatas: one per id.
    """

    names: list[str]
    ids: list[str]
    texts: list[str]
    metadatas: list[Mapping[str, Any] | None]


def rows_of_texts(
    texts: Iterable[str], metadatas: Iterable[Mapping[str, Any] | None] | None, ids: Iterable[str | None] | None
) -> Iterator[Row]:
    """Return an iterator over (id, text, metadata) that reads nothing ahead.

    Raises:
        InvalidTexts: `texts` or `ids` is a bare string.
        InvalidIds: the lengths differ. Those of generators are compared at their end, by a ValueError.
    """
    for name, strings in (("texts", texts), ("ids", ids)):
        if isinstance(strings, str):
            raise InvalidTexts(f"{name} is a single string ({strings[:40]!r}); pass a list of strings.")
    if isinstance(texts, Sized) and isinstance(metadatas, Sequence):
        metadatas = [*metadatas, *[None] * (len(texts) - len(metadatas))]
    # LangChain's callers pass [] where they have none.
    columns = {"texts": texts, "metadatas": metadatas or None, "ids": ids or None}
    given: dict[str, Iterable[Any]] = {name: column for name, column in columns.items() if column is not None}
    lengths = {name: len(column) for name, column in given.items() if isinstance(column, Sized)}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise InvalidIds(f"there are {counted}; give one of each per record.")

    def rows() -> Iterator[Row]:
        for values in zip(*given.values(), strict=True):
            row = dict(zip(given, values, strict=True))
            yield row.get("ids"), row["texts"], row.get("metadatas")

    return rows()


def rows_of_documents(documents: Iterable[Document], ids: Iterable[str | None] | None) -> Iterator[Row]:
    """Yield (id, text, metadata) of documents; an id in `ids` goes before the document's own."""
    for id_, document, _ in rows_of_texts(documents, None, ids):  # type: ignore[arg-type]
        yield id_ or document.id, document.page_content, document.metadata  # type: ignore[attr-defined]


def checked_batches(index: TwoStageIndex, rows: Iterable[Row], size: int | None) -> Iterator[Batch]:
    """Yield batches whose records `index` can store, so that nothing is embedded in vain.

    Args:
        index: which checks texts, ids and metadata.
        rows: (id, text, metadata); a new id is made where there is none.
        size: rows per batch; None for 512.

    Raises:
        InvalidInput: `size` is not a positive integer, or a record can't be stored. The message gives its position
            among all rows.
    """
    first = 0
    for batch in batch_iterate(_BATCH if size is None else check_integer("batch_size", size, 1), rows):
        names = [id_ or str(uuid.uuid4()) for id_, _, _ in batch]
        index.check(names, [text for _, text, _ in batch], [metadata for *_, metadata in batch], first)
        first += len(batch)
        # Of equal ids the last one counts, as if each had been stored in turn.
        kept = {name: (text, metadata) for name, (_, text, metadata) in zip(names, batch, strict=True)}
        yield Batch(names, list(kept), [text for text, _ in kept.values()], [metadata for _, metadata in kept.values()])
