"""Texts in, hits out: an encoder and an index together."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from mrl_rag.errors import InvalidIds
from mrl_rag.index import Hit, Plan, TwoStageIndex
from mrl_rag.index.checks import Metadata, Where, check_ids, check_metadatas
from mrl_rag.progress import progress_bar
from mrl_rag.tasks import check_texts
from mrl_rag.truncation import Float32Array

# Texts encoded and committed together: an interruption loses no more than these, and the bar moves as often.
_BATCH = 512


class TextEncoder(Protocol):
    """What a retriever asks of an encoder; `MatryoshkaEncoder` is one."""

    @property
    def fingerprint(self) -> str:
        """A short hash of all that changes a vector."""

    def encode_queries(self, texts: Sequence[str]) -> Float32Array:
        """Return float32 [n, full_dim] for questions."""

    def encode_documents(self, texts: Sequence[str]) -> Float32Array:
        """Return float32 [n, full_dim] for passages."""


class TwoStageRetriever:
    """An encoder and an index that answer questions about texts.

        encoder = MatryoshkaEncoder()
        retriever = TwoStageRetriever(encoder, TwoStageIndex("./db", fingerprint=encoder.fingerprint))
        retriever.index_texts(["a text", "another"], metadatas=[{"page": 1}, {"page": 2}])
        for hit in retriever.search("a question", k=5):
            hit.score, hit.document, hit.metadata

    Args:
        encoder: a `MatryoshkaEncoder`, or anything of its shape.
        index: where the vectors go. Open it with `fingerprint=encoder.fingerprint` to have vectors of another
            encoder refused.
    """

    def __init__(self, encoder: TextEncoder, index: TwoStageIndex) -> None:
        self.encoder = encoder
        self.index = index

    def index_texts(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        metadatas: Sequence[Metadata | None] | None = None,
        progress: bool = False,
    ) -> list[str]:
        """Encode and store texts. Those that are stored already, unchanged, cost no encoding.

        Texts are committed in batches of 512: after an interruption, call again and it goes on from there.

        Args:
            texts: n strings.
            ids: n ids; None makes each id from its text, so that the same text is one record.
            metadatas: n mappings, None for a text without; or None for none at all.
            progress: show a bar when standard error is a terminal.

        Returns:
            The n ids.

        Raises:
            InvalidTexts: `texts` is a bare string, or one of them is not a string.
            InvalidIds: ids are empty, repeated, or not as many as the texts or metadatas.
            TwoStageIndexError: as `TwoStageIndex.upsert` does.
        """
        texts = check_texts(texts)
        names = [_id_of(text) for text in texts] if ids is None else check_ids(ids)
        notes = [None] * len(texts) if metadatas is None else list(metadatas)
        if not len(texts) == len(names) == len(notes):
            raise InvalidIds(
                f"there are {len(texts)} texts, {len(names)} ids and {len(notes)} metadatas; give one of each a text."
            )
        check_metadatas(notes)
        # The last of equal ids, as if each had been stored in turn.
        rows = list({name: row for row, name in enumerate(names)}.values())
        with progress_bar(len(rows), "index", "text", progress) as advance:
            for start in range(0, len(rows), _BATCH):
                batch = rows[start : start + _BATCH]
                changed = self.index.changed(
                    [names[row] for row in batch], [texts[row] for row in batch], [notes[row] for row in batch]
                )
                advance(len(batch) - len(changed))
                if changed:
                    part = [batch[position] for position in changed]
                    documents = [texts[row] for row in part]
                    self.index.upsert(
                        [names[row] for row in part],
                        self.encoder.encode_documents(documents),
                        documents,
                        [notes[row] for row in part],
                    )
                    advance(len(part))
        return names

    def search(
        self,
        question: str,
        k: int = 10,
        plan: Plan | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
    ) -> list[Hit]:
        """Return the k nearest texts to a question; see `TwoStageIndex.search`."""
        return self.search_many([question], k, plan, where, where_document)[0]

    def search_many(
        self,
        questions: Sequence[str],
        k: int = 10,
        plan: Plan | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
    ) -> list[list[Hit]]:
        """Return the k nearest texts to each question, encoded and searched together."""
        vectors = self.encoder.encode_queries(check_texts(questions))
        return self.index.search(vectors, k, plan, where, where_document)


def _id_of(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
