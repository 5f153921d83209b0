"""`MatryoshkaHead`: what it is, its file, and the fingerprint of an encoder that has it."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from mrl_rag.arguments import is_integer
from mrl_rag.errors import HeadMismatch, InvalidInput, InvalidVectors, ModelFilesError
from mrl_rag.truncation import Float32Array, as_rows, normalize

Kind: TypeAlias = Literal["vectors", "pairs"]
AnyHead: TypeAlias = "MatryoshkaHead | str | os.PathLike[str] | npt.ArrayLike"

FORMAT = "mrl-rag head 1"
_TENSOR = "matrix"


@dataclass(frozen=True, kw_only=True)
class HeadCard:
    """What a head was fitted on, and what it gains there.

    Attributes:
        kind: "vectors", fitted without labels; or "pairs", on queries and documents.
        full_dim: length of the vectors.
        dims: dimensions that it was fitted for, widest first.
        fitted_on: vectors or pairs that it was fitted on.
        held_out: vectors or pairs that were left out, to stop in time and for the scores.
        seed: of the held-out part, and of the order in which the rest was seen.
        measure: what the scores are.
        before: dimension -> score of the vectors as they were, on the held-out part.
        after: dimension -> score with the head, on the held-out part.
        data: what the vectors were made of, in words; "" where nobody said.
        model: name of the model that made them; "" where it isn't known.
        fingerprint: of the encoder that made them; "" where it isn't known.
    """

    kind: Kind
    full_dim: int
    dims: tuple[int, ...]
    fitted_on: int
    held_out: int
    seed: int
    measure: str
    before: Mapping[int, float]
    after: Mapping[int, float]
    data: str = ""
    model: str = ""
    fingerprint: str = ""

    def as_json(self) -> str:
        """Return the card as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> HeadCard:
        """Read a card from JSON.

        Raises:
            ValueError: it is no card: a part is missing, unknown, or of another type.
        """
        given = json.loads(text)
        if not isinstance(given, dict) or set(given) != {field.name for field in fields(cls)}:
            raise ValueError("its card has other parts")
        texts = [given[name] for name in ("measure", "data", "model", "fingerprint")]
        counts = [given[name] for name in ("full_dim", "fitted_on", "held_out", "seed")]
        if not all(isinstance(text, str) for text in texts) or given["kind"] not in get_args(Kind):
            raise ValueError("its card has parts of other types")
        if not all(is_integer(count, 0) for count in [*counts, *given["dims"]]):
            raise ValueError("its card has counts that are no integers")
        scores = {name: {int(dim): float(score) for dim, score in given[name].items()} for name in ("before", "after")}
        return cls(**{**given, "dims": tuple(given["dims"]), **scores})


class MatryoshkaHead:
    """A learned linear map after a model, which makes its vectors lose less when they are cut.

        head = MatryoshkaHead.fit(vectors)                       # without labels
        head = MatryoshkaHead.fit(queries, documents)            # row i of one belongs to row i of the other
        head.save("head.safetensors")
        encoder = MatryoshkaEncoder("minilm", head="head.safetensors")
        index.apply_head(head)                                   # an index, from its archive; nothing is encoded

    It is fitted once, and may serve many collections. An index's rotation is fitted on that index alone and changes
    only what the shortlist keeps; a head changes the full vectors.

    Args:
        matrix: float array [full_dim, full_dim], applied as `vectors @ matrix`.
        card: what it was fitted on; None where that isn't known.

    Attributes:
        matrix: float32 [full_dim, full_dim], read-only.
        card: what it was fitted on; None where that isn't known.

    Raises:
        InvalidVectors: `matrix` is not square, empty, or holds NaN or infinity.
        InvalidInput: the card is of a head of another size.
    """

    def __init__(self, matrix: npt.ArrayLike, card: HeadCard | None = None) -> None:
        rows = as_rows(matrix, "head").copy()
        if not rows.size or rows.shape[0] != rows.shape[1]:
            raise InvalidVectors(f"head has shape {rows.shape}; it must be (full_dim, full_dim).")
        if card is not None and card.full_dim != len(rows):
            raise InvalidInput(f"head has shape {rows.shape}, and its card says full_dim={card.full_dim}.")
        rows.flags.writeable = False
        self.matrix: Float32Array = rows
        self.card = card

    def __repr__(self) -> str:
        if self.card is None:
            return f"MatryoshkaHead({self.full_dim} numbers)"
        of = f" of {self.card.model!r}" if self.card.model else ""
        return f"MatryoshkaHead({self.full_dim} numbers, fitted on {self.card.fitted_on} {self.card.kind}{of})"

    @property
    def full_dim(self) -> int:
        """Length of the vectors that it takes and gives."""
        return len(self.matrix)

    @classmethod
    def fit(
        cls,
        vectors: npt.ArrayLike,
        documents: npt.ArrayLike | None = None,
        *,
        dims: Sequence[int] | None = None,
        seed: int = 0,
        data: str = "",
        model: str = "",
        fingerprint: str = "",
        progress: bool = False,
    ) -> Self:
        """Fit a head, in a minute or two on a CPU; Ctrl-C interrupts it.

        Where other programs keep the cores busy, `OMP_NUM_THREADS=1` makes it several times as fast.

        Without `documents`, the head is an orthogonal map: cosines at full dimension stay as they are, and at lower
        ones the similarities within a batch are brought near to those at full dimension (the Kullback-Leibler
        divergence of their softmax, so that neighbours count most), at all `dims` together. It starts from an
        uncentred PCA.

        With `documents`, each query is brought nearer to its document than to those of other queries in the batch, and
        than to near documents that aren't its own (InfoNCE at all `dims` together, as in the paper on Matryoshka
        representations, arXiv 2205.13147). From the PCA it first becomes the best orthogonal map, then any linear map
        as long as the held-out part gets better: where there are few pairs, that is the orthogonal one.

        A tenth, at least 50 (or a quarter) and at most 2000, is held out. The fit ends when the held-out part gets no
        better, and takes the best.

        Args:
            vectors: float array [n, full_dim], n >= 100, as an encoder gives them; or the queries of `documents`.
            documents: float array [n, full_dim]; row i belongs to row i of `vectors`. A query or document may occur
                in several rows.
            dims: dimensions to fit for, each 1 to full_dim. None for powers of two from a sixteenth of full_dim, and
                with `documents` full_dim as well.
            seed: of the held-out part and of the order in which the rest is seen. The same vectors and seed give the
                same head, on one machine with as many threads.
            data: what the vectors are made of, in words, for the card.
            model: name of the model that made them, for the card.
            fingerprint: of the encoder that made them. `MatryoshkaEncoder` and `TwoStageIndex` then take the head
                for that encoder's vectors alone.
            progress: show a bar when standard error is a terminal.

        Raises:
            InvalidVectors: the shapes differ or are too small, or there is NaN or infinity.
            InvalidDimension: one of `dims` is out of range.
            InvalidInput: another argument is out of range.
        """
        from mrl_rag.heads.fitting import fit

        matrix, card = fit(vectors, documents, dims, seed, progress)
        return cls(matrix, HeadCard(**card, data=data, model=model, fingerprint=fingerprint))

    def apply(self, vectors: npt.ArrayLike) -> Float32Array:
        """Return `vectors @ matrix` at unit length.

        Args:
            vectors: float array [n, full_dim].

        Returns:
            float32 array [n, full_dim] of unit rows; a zero row stays zero.

        Raises:
            InvalidVectors: another length, or NaN or infinity.
        """
        rows = as_rows(vectors)
        if len(rows) and rows.shape[1] != self.full_dim:
            raise InvalidVectors(f"vectors have {rows.shape[1]} numbers; this head takes {self.full_dim}.")
        return normalize(rows.reshape(len(rows), self.full_dim) @ self.matrix)

    def check_encoder(self, model: str | None, fingerprint: str | None) -> None:
        """Refuse vectors of another encoder than the head was fitted on, where both fingerprints are known.

        Raises:
            HeadMismatch: the fingerprints differ.
        """
        card = self.card
        if card is not None and card.fingerprint and fingerprint and card.fingerprint != fingerprint:
            raise HeadMismatch(
                f"the head was fitted on vectors of {card.model!r} (fingerprint {card.fingerprint}); these are of "
                f"{model or ''!r} (fingerprint {fingerprint}). Fit one on its vectors, or give the encoder the files, "
                "prompts and maximum length of the other. MatryoshkaHead(head.matrix) is taken for any vectors."
            )

    def fingerprint_with(self, fingerprint: str) -> str:
        """Return the fingerprint of an encoder that has this head, from that of the encoder without one."""
        matrix = hashlib.sha256(np.ascontiguousarray(self.matrix, dtype="<f4").tobytes()).hexdigest()
        return hashlib.sha256(f"{fingerprint}:{matrix}".encode()).hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the head and its card to a safetensors file. It appears, or replaces another, once it is complete.

        Args:
            path: the file.

        Raises:
            InvalidInput: it can't be written.
        """
        from safetensors.numpy import save

        metadata = {"format": FORMAT} | ({} if self.card is None else {"card": self.card.as_json()})
        target = Path(path)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            part.write_bytes(save({_TENSOR: self.matrix}, metadata))
            part.replace(target)
        except OSError as error:
            raise InvalidInput(f"the head can't be written to {os.fspath(path)!r}: {error}.") from error
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote. Nothing in it is run.

        Raises:
            ModelFilesError: the file is missing or damaged, is no head, or its card doesn't fit its matrix.
        """
        try:
            matrix, metadata = _read(Path(path))
            card = HeadCard.from_json(metadata["card"]) if "card" in metadata else None
            return cls(matrix, card)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelFilesError(
                f"{os.fspath(path)!r} is no head that can be read: {error}. Pass a file that MatryoshkaHead.save wrote."
            ) from error

    @classmethod
    def of(cls, head: AnyHead) -> MatryoshkaHead:
        """Return a head as it is, of a file, or of a float array [full_dim, full_dim]."""
        if isinstance(head, MatryoshkaHead):
            return head
        return cls.load(head) if isinstance(head, str | os.PathLike) else cls(head)


def _read(path: Path) -> tuple[Float32Array, dict[str, Any]]:
    """Return the matrix and the metadata of a file, having checked what it says of itself."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if metadata.get("format") != FORMAT or names != [_TENSOR]:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}, with tensors {names}")
            part = file.get_slice(_TENSOR)
            if part.get_dtype() != "F32":
                raise ValueError(f"its matrix is {part.get_dtype()}, not F32")
            return file.get_tensor(_TENSOR), metadata
    except SafetensorError as error:
        raise ValueError(str(error)) from error
