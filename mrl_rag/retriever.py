"""Texts in, hits out: an encoder and an index together."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np

from mrl_rag.binding import model_of
from mrl_rag.encoder import Encoder, MatryoshkaEncoder
from mrl_rag.errors import DimensionMismatch, IndexMismatch, InvalidIds, InvalidInput, MrlRagError
from mrl_rag.index import Hit, Plan, Report, TwoStageIndex
from mrl_rag.index.checks import Metadata, Where, check_ids, check_metadatas, explain_other_names
from mrl_rag.index.gate import SharedGate
from mrl_rag.index.reencode import Documents
from mrl_rag.progress import progress_bar
from mrl_rag.tasks import check_texts
from mrl_rag.truncation import Float32Array

# Texts encoded and committed together: an interruption loses no more than these, and the bar moves as often.
_BATCH = 512


class TwoStageRetriever:
    """An encoder and an index that answer questions about texts.

        with TwoStageRetriever(MatryoshkaEncoder(), "./db") as retriever:
            retriever.index_texts(["a text", "another"], metadatas=[{"page": 1}, {"page": 2}])
            for hit in retriever.search("a question", k=5):
                hit.score, hit.document, hit.metadata
        retriever = TwoStageRetriever(None, "./db")          # with the model that filled the index

    The index remembers the encoder's name and fingerprint, and refuses any other. If another process changes the model
    (`reencode`), a retriever that was made without an encoder makes the new one; any other raises an `IndexMismatch`.

    Args:
        encoder: any encoder of this package. None makes the one that filled the index: a `MatryoshkaEncoder` with the
            default settings of that model.
        index: a `TwoStageIndex`, or the folder of one, which is made when it isn't there; None for one in memory.
        collection: name of the collection in that folder; None for "docs".

    Raises:
        InvalidInput: an argument is of another type, `collection` is given with a `TwoStageIndex`, or `encoder` is None
            and the folder has no such index.
        IndexMismatch: another encoder filled the index; or `encoder` is None, and the one that filled it is not known
            or can't be made from its name.
        DimensionMismatch: the index holds longer vectors than the encoder makes.
        TwoStageIndexError: as `TwoStageIndex` does.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        index: TwoStageIndex | str | os.PathLike[str] | None = None,
        collection: str | None = None,
    ) -> None:
        if not isinstance(encoder, Encoder | None):
            raise InvalidInput(
                f"encoder is {encoder!r}; it must be an Encoder, such as MatryoshkaEncoder(), or None for the one that "
                "filled the index. The index is the second argument."
            )
        if not isinstance(index, TwoStageIndex | str | os.PathLike | None):
            raise InvalidInput(f"index is {index!r}; it must be a TwoStageIndex, a folder, or None for one in memory.")
        if isinstance(index, TwoStageIndex) and collection is not None:
            raise InvalidInput(f"collection={collection!r} goes with a folder; {index!r} has a collection already.")
        if encoder is None and isinstance(index, str | os.PathLike):
            _check_stored(index, collection or "docs")
        with ExitStack() as opened:
            if not isinstance(index, TwoStageIndex):
                index = opened.enter_context(TwoStageIndex(index, collection or "docs"))
            # The encoder that this object made, and closes.
            self._made: Encoder | None = None
            opened.callback(self._replace_made, None)
            if encoder is None:
                encoder = self._made = _encoder_that_filled(index)
            index.bind(model_of(encoder), encoder.fingerprint)
            if index.full_dim is not None and index.full_dim > encoder.full_dim:
                raise DimensionMismatch(
                    f"index {index.name!r} has full_dim={index.full_dim}, and {model_of(encoder)!r} makes vectors of "
                    f"{encoder.full_dim} numbers. Leave full_dim out, or use another encoder."
                )
            self._opened = opened.pop_all()
        self.encoder: Encoder = encoder
        self.index: TwoStageIndex = index
        # Shared by threads that write, so that none stores a vector of the old encoder after a change of the model.
        self._gate = SharedGate()
        self._following = threading.Lock()

    def index_texts(
        self,
        texts: Sequence[str],
        ids: Sequence[str] | None = None,
        metadatas: Sequence[Metadata | None] | None = None,
        progress: bool = False,
    ) -> list[str]:
        """Encode and store texts, in batches of 512. Only texts that aren't stored already are encoded.

        Args:
            texts: n strings.
            ids: n ids; None makes each id from its text, so that equal texts are one record.
            metadatas: n mappings, None for a text without; or None for none at all.
            progress: show a bar when standard error is a terminal.

        Returns:
            The n ids.

        Raises:
            InvalidTexts: `texts` is a bare string, or one of them is not a string.
            InvalidIds: ids are empty, repeated, or not as many as the texts or metadatas.
            MrlRagError: as `TwoStageIndex.upsert` does.
        """
        texts = check_texts(texts)
        names = [_id_of(text) for text in texts] if ids is None else check_ids(ids)
        notes = [None] * len(texts) if metadatas is None else list(metadatas)
        if not len(texts) == len(names) == len(notes):
            raise InvalidIds(
                f"there are {len(texts)} texts, {len(names)} ids and {len(notes)} metadatas; give one of each per text."
            )
        check_metadatas(notes)
        # Of equal ids the last one counts, as if each had been stored in turn.
        rows = list({name: row for row, name in enumerate(names)}.values())
        with progress_bar(len(rows), "index", "text", progress) as advance:
            for start in range(0, len(rows), _BATCH):
                batch = rows[start : start + _BATCH]
                self.index_batch(
                    [texts[row] for row in batch], [names[row] for row in batch], [notes[row] for row in batch]
                )
                advance(len(batch))
        return names

    def index_batch(self, texts: Sequence[str], ids: Sequence[str], metadatas: Sequence[Metadata | None]) -> int:
        """Store texts in one batch, as `index_texts` does in many.

        Args:
            texts: n strings.
            ids: n different ids.
            metadatas: n mappings, None for a text without.

        Returns:
            How many texts were encoded.

        Raises:
            MrlRagError: as `index_texts` does.
        """
        encoder = self.encoder
        try:
            return self._store(texts, ids, metadatas)
        except IndexMismatch:
            if not self._follow(encoder):
                raise
            return self._store(texts, ids, metadatas)

    def _store(self, texts: Sequence[str], ids: Sequence[str], metadatas: Sequence[Metadata | None]) -> int:
        with self._gate.shared():
            changed = self.index.changed(ids, texts, metadatas)
            if not changed:
                return 0
            text_of = {ids[row]: texts[row] for row in changed}
            # Where only the metadata changed, the vector stays.
            vector_of = self.index.vectors_of(list(text_of), list(text_of.values()))
            new = {id_: text for id_, text in text_of.items() if id_ not in vector_of}
            if new:
                vector_of |= dict(zip(new, self._encode_documents(list(new.values())), strict=True))
            vectors = np.stack([vector_of[id_] for id_ in text_of])
            self.index.upsert(list(text_of), vectors, list(text_of.values()), [metadatas[row] for row in changed])
            return len(new)

    @explain_other_names
    def search(
        self,
        question: str,
        k: int = 10,
        plan: Plan | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
        *,
        explain: bool = False,
    ) -> list[Hit]:
        """Return the k nearest texts to a question, 10 where k isn't given; see `TwoStageIndex.search`."""
        return self.search_many([question], k, plan, where, where_document, explain=explain)[0]

    @explain_other_names
    def search_many(
        self,
        questions: Sequence[str],
        k: int = 10,
        plan: Plan | None = None,
        where: Where | None = None,
        where_document: Where | None = None,
        *,
        explain: bool = False,
    ) -> list[list[Hit]]:
        """Return the k nearest texts per question, all encoded and searched together; see `TwoStageIndex.search`."""
        texts = check_texts(questions)
        while True:
            encoder = self.encoder
            try:
                vectors = encoder.encode_queries(texts, self._dim)
                answers = self.index.search(vectors, k, plan, where, where_document, explain=explain)
            except MrlRagError as error:
                # Another thread may have changed the model meanwhile, or another process.
                if encoder is self.encoder and not (isinstance(error, IndexMismatch) and self._follow(encoder)):
                    raise
            else:
                if encoder is self.encoder:
                    return answers

    def _follow(self, before: Encoder) -> bool:
        """Make the encoder that fills the index now, where this object made the one before; return whether it did."""
        with self._following:
            if self.encoder is before:
                if self._made is None:
                    return False
                self.index.rebind(None, None)
                try:
                    encoder = _encoder_that_filled(self.index)
                except MrlRagError:
                    self.index.rebind(model_of(before), before.fingerprint)
                    raise
                self.index.bind(model_of(encoder), encoder.fingerprint)
                self.encoder = encoder
                self._replace_made(encoder)
            return True

    def _replace_made(self, encoder: Encoder | None) -> None:
        if self._made is not None:
            self._made.close()
        self._made = encoder

    def repair(self) -> Report:
        """Mend the index, and encode records without a sound full vector again; see `TwoStageIndex.repair`."""
        return self.index.repair(self._encode_documents)

    def reencode(
        self, encoder: Encoder, *, shortlist_dim: int | None = None, progress: bool = False, drop_old: bool = False
    ) -> str | None:
        """Change the model without downtime; see `TwoStageIndex.reencode`. Afterwards `encoder` answers the questions.

        Args:
            encoder: the new encoder, which stays open when this object is closed.
            shortlist_dim: as for a new `TwoStageIndex`.
            progress: show a bar when standard error is a terminal.
            drop_old: remove the old collection after the switch.

        Returns:
            The name under which the old collection is kept; None where there is none.

        Raises:
            InvalidInput: `encoder` is not an `Encoder`.
            MrlRagError: as `TwoStageIndex.reencode` does.
        """
        if not isinstance(encoder, Encoder):
            raise InvalidInput(
                f"encoder is {encoder!r}; it must be an Encoder, such as MatryoshkaEncoder('nomic-v1.5')."
            )

        def switched() -> None:
            self.encoder = encoder

        kept = self.index._reencode(
            Documents(lambda texts: encoder.encode_documents(texts, encoder.full_dim), None),
            model_of(encoder),
            encoder.fingerprint,
            shortlist_dim,
            progress,
            drop_old,
            self._gate.exclusive(),
            switched,
        )
        self._replace_made(None)
        return kept

    @property
    def _dim(self) -> int:
        # Not the encoder's own `dim`: the index cuts for itself.
        return self.index.full_dim or self.encoder.full_dim

    def _encode_documents(self, texts: list[str]) -> Float32Array:
        return self.encoder.encode_documents(texts, self._dim)

    def close(self) -> None:
        """Close the index and the encoder where this object opened them; those that were passed in stay open."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TwoStageRetriever({self.encoder!r}, {self.index!r})"


def _check_stored(folder: str | os.PathLike[str], collection: str) -> None:
    names = TwoStageIndex.names(Path(folder).expanduser())
    if collection not in names:
        there = (
            f"it has {', '.join(map(repr, names))}. Pass one of these as collection="
            if names
            else "nothing is stored there"
        )
        raise InvalidInput(
            f"encoder is None, and {os.fspath(folder)!r} has no index {collection!r} to take the model from: {there}. "
            "Or pass an encoder, to fill a new index."
        )


def _encoder_that_filled(index: TwoStageIndex) -> MatryoshkaEncoder:
    if not index.model or not index.fingerprint:
        raise IndexMismatch(
            f"encoder is None, and index {index.name!r} doesn't know which model filled it. Pass the encoder."
        )
    try:
        encoder = MatryoshkaEncoder(index.model, head=index.head)
    except MrlRagError as error:
        raise IndexMismatch(
            f"encoder is None, and {index.model!r}, which filled index {index.name!r}, can't be made from its name: "
            f"{error} Pass the encoder."
        ) from error
    return encoder


def _id_of(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
