"""Fits heads by torch; see `MatryoshkaHead.fit`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, normalize
from torch.nn.utils.parametrizations import orthogonal

from mrl_rag import rotation
from mrl_rag.arguments import check_integer
from mrl_rag.errors import InvalidVectors
from mrl_rag.progress import Advance, progress_bar
from mrl_rag.truncation import Float32Array, as_rows, check_dim, truncate, unit_rows

# Fewer vectors or pairs say too little about those to come.
MIN_ROWS, _MIN_QUERIES = 100, 20
_HELD_OUT_SHARE, _MIN_HELD_OUT, _MAX_HELD_OUT = 0.1, 50, 2000
# Tried on docstrings of installed packages, covid-faq, npl and cranfield (`benchmarks/heads.md`): temperatures of 0.02
# and 0.1 and a rate of 0.003 were no better, nor were 1000 steps without labels.
_BATCH = 512
_LEARNING_RATE = 1e-3
_TEMPERATURE = 0.05
_MAX_STEPS = 400
# The held-out part is looked at every so many steps; so many looks without a gain end the fit.
_STEPS_BETWEEN_LOOKS = 20
_PATIENCE = 5
# Near documents per query, to choose negatives from, and the largest set of documents to find them in.
_NEGATIVES, _POOL = 10, 20_000
# A document nearer to the query than this share of the cosine of its own one may well be another answer: NV-Retriever,
# arXiv 2407.15831, section 4.
_MAX_NEGATIVE = 0.95
_K = 10

Rows = npt.NDArray[np.int64]


class Pairs(NamedTuple):
    """Queries and documents, each once, and which belong together.

    Attributes:
        queries: float32 unit rows [q, full_dim].
        documents: float32 unit rows [d, full_dim].
        pairs: int64 [p, 2], rows of a query and of its document.
    """

    queries: torch.Tensor
    documents: torch.Tensor
    pairs: torch.Tensor


def fit(
    vectors: npt.ArrayLike,
    documents: npt.ArrayLike | None,
    dims: Sequence[int] | None,
    seed: int,
    progress: bool,
) -> tuple[Float32Array, dict[str, Any]]:
    """Return the matrix, float32 [full_dim, full_dim], and what its card says; see `MatryoshkaHead.fit`."""
    seed = check_integer("seed", seed, 0, 2**63 - 1)
    rows = _unit(vectors, "vectors")
    answers = None if documents is None else _unit(documents, "documents")
    if answers is not None and answers.shape != rows.shape:
        raise InvalidVectors(f"vectors have shape {rows.shape} and documents {answers.shape}; they must be equal.")
    wanted = _dims(dims, rows.shape[1], answers is not None)
    # The caller may be under torch.no_grad or torch.inference_mode.
    with torch.inference_mode(False), torch.enable_grad(), progress_bar(None, "fit head", "step", progress) as advance:
        if answers is None:
            matrix, facts = _fit_vectors(rows, wanted, seed, advance)
        else:
            matrix, facts = _fit_pairs(rows, answers, wanted, seed, advance)
    return matrix, {"full_dim": len(matrix), "dims": wanted, "seed": seed, **facts}


def similarity_error(vectors: Float32Array, matrix: Float32Array, dims: Sequence[int]) -> float:
    """Return how far similarities at lower dimensions are from those at full dimension, 0 for not at all.

    Args:
        vectors: float32 [n, full_dim].
        matrix: the head, float32 [full_dim, full_dim].
        dims: the lower dimensions.

    Returns:
        The mean Kullback-Leibler divergence over rows and dimensions, in nats: of the softmax of a row's cosines with
        the others of its batch (512, temperature 0.05) at a lower dimension, from that at full dimension.
    """
    rows = torch.from_numpy(unit_rows(vectors))
    with torch.no_grad():
        return float(_mean_error(rows, torch.from_numpy(np.array(matrix)), dims))


def _unit(vectors: npt.ArrayLike, name: str) -> Float32Array:
    rows = as_rows(vectors, name)
    if len(rows) < MIN_ROWS or rows.shape[1] < 2:
        raise InvalidVectors(
            f"{name} has shape {rows.shape}; a head needs at least {MIN_ROWS} rows of 2 numbers. Encode more texts."
        )
    return unit_rows(rows)


def _dims(dims: Sequence[int] | None, full_dim: int, with_pairs: bool) -> tuple[int, ...]:
    if dims is not None:
        return tuple(sorted({check_dim(dim, full_dim) for dim in dims} or {full_dim}, reverse=True))
    powers = [2**power for power in range(full_dim.bit_length()) if full_dim <= 16 * 2**power < 16 * full_dim]
    return tuple(sorted({*powers, *([full_dim] if with_pairs else [])}, reverse=True))


def _split(count: int, seed: int) -> tuple[Rows, Rows]:
    """Return the rows to fit on, and those to hold out."""
    order = np.random.default_rng(seed).permutation(count)
    held_out = min(_MAX_HELD_OUT, max(int(count * _HELD_OUT_SHARE), min(_MIN_HELD_OUT, count // 4)))
    return order[held_out:], order[:held_out]


class _Map(nn.Module):
    """A linear map `vectors @ matrix`; where `turns`, it stays orthogonal."""

    matrix: torch.Tensor

    def __init__(self, start: torch.Tensor, turns: bool) -> None:
        super().__init__()
        self.matrix = nn.Parameter(start.clone())
        if turns:
            orthogonal(self, "matrix", orthogonal_map="cayley")


def _optimise(
    start: torch.Tensor,
    turns: bool,
    batches: Callable[[torch.Generator], Sequence[torch.Tensor]],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    held_out_loss: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
    advance: Advance,
) -> torch.Tensor:
    """Return the map with the least held-out loss.

    Args:
        start: float32 [full_dim, full_dim].
        turns: whether the map stays orthogonal.
        batches: makes the batches of an epoch.
        loss: of a map and a batch.
        held_out_loss: of a map.
        seed: of the order of batches.
        advance: moves the progress bar.
    """
    generator = torch.Generator().manual_seed(seed)
    learned = _Map(start, turns)
    optimizer = torch.optim.Adam(learned.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _MAX_STEPS)
    with torch.no_grad():
        best, least = start.clone(), float(held_out_loss(start))
    steps, worse = 0, 0
    while steps < _MAX_STEPS and worse < _PATIENCE:
        for batch in batches(generator):
            optimizer.zero_grad()
            torch.autograd.backward(loss(learned.matrix, batch))
            optimizer.step()
            schedule.step()
            steps += 1
            if steps % _STEPS_BETWEEN_LOOKS == 0:
                with torch.no_grad():
                    matrix = learned.matrix.clone()
                    found = float(held_out_loss(matrix))
                advance(_STEPS_BETWEEN_LOOKS, f"held-out loss {found:.4f}")
                worse = 0 if found < least else worse + 1
                if found < least:
                    best, least = matrix, found
                if worse == _PATIENCE or steps >= _MAX_STEPS:
                    break
    return best


def _shuffled(count: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Return the batches of an epoch, without a small one at the end."""
    order = torch.randperm(count, generator=generator)
    return [batch for batch in torch.split(order, _BATCH) if len(batch) == min(_BATCH, count)]


def _cut(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    # As `truncate` does, with gradients.
    return normalize(vectors[:, :dim], dim=1)


# Without labels


def _fit_vectors(
    rows: Float32Array, dims: tuple[int, ...], seed: int, advance: Advance
) -> tuple[Float32Array, dict[str, Any]]:
    rest, out = _split(len(rows), seed)
    seen, unseen = torch.from_numpy(rows[rest]), torch.from_numpy(rows[out])
    matrix = _optimise(
        torch.from_numpy(rotation.fit(rows[rest])),
        True,
        lambda generator: _shuffled(len(seen), generator),
        lambda matrix, batch: _error(seen[batch], matrix, dims),
        lambda matrix: _mean_error(unseen, matrix, dims),
        seed,
        advance,
    ).numpy()
    facts = {"kind": "vectors", "fitted_on": len(rest), "held_out": len(out)}
    scores = [{dim: _agreement(rows[out], head, dim) for dim in dims} for head in (None, matrix)]
    measure = f"share of the top {_K} at full dimension that is found, among {len(out)} held-out vectors"
    return matrix, {**facts, "measure": measure, "before": scores[0], "after": scores[1]}


def _mean_error(rows: torch.Tensor, matrix: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    parts = torch.split(rows, _BATCH)
    return torch.stack([_error(part, matrix, dims) * len(part) for part in parts]).sum() / len(rows)


def _error(rows: torch.Tensor, matrix: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Return the error of `similarity_error` in one batch, float32 [n, full_dim]."""
    itself = torch.eye(len(rows), dtype=torch.bool)
    wanted = _log_shares(rows, itself)
    mapped = rows @ matrix
    errors = [
        kl_div(_log_shares(_cut(mapped, dim), itself), wanted, reduction="sum", log_target=True) / len(rows)
        for dim in dims
    ]
    return torch.stack(errors).mean()


def _log_shares(unit: torch.Tensor, itself: torch.Tensor) -> torch.Tensor:
    # Not minus infinity: the divergence would be NaN there.
    return (unit @ unit.T / _TEMPERATURE).masked_fill(itself, -1e4).log_softmax(1)


def _agreement(rows: Float32Array, matrix: Float32Array | None, dim: int) -> float:
    k = min(_K, len(rows) - 1)
    if k < 1:
        return 1.0
    short = truncate(rows if matrix is None else rows @ matrix, dim)
    top = []
    for vectors in (rows, short):
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -np.inf)
        top.append(np.argsort(-scores, axis=1, kind="stable")[:, :k])
    return float(np.mean([len(set(one) & set(other)) / k for one, other in zip(*top, strict=True)]))


# With pairs


def _fit_pairs(
    queries: Float32Array, documents: Float32Array, dims: tuple[int, ...], seed: int, advance: Advance
) -> tuple[Float32Array, dict[str, Any]]:
    asked, of_query = _once(queries)
    answers, of_document = _once(documents)
    if len(asked) < _MIN_QUERIES:
        raise InvalidVectors(f"there are {len(asked)} different queries; a head needs at least {_MIN_QUERIES}.")
    # Held out are queries: all pairs of each.
    out = np.isin(of_query, _split(len(asked), seed)[1])
    known = torch.from_numpy(np.stack([of_query, of_document], axis=1))
    everything = Pairs(torch.from_numpy(asked), torch.from_numpy(answers), known)
    seen, unseen = everything._replace(pairs=known[~out]), everything._replace(pairs=known[out])
    mined = _mine(seen, seed)
    fixed = torch.split(unseen.pairs, _BATCH)
    matrix = torch.from_numpy(rotation.fit(np.concatenate([queries[~out], documents[~out]])))
    # Orthogonal first, which overfits less; then any map, as long as the held-out part gets better.
    for turns in (True, False):
        matrix = _optimise(
            matrix,
            turns,
            lambda generator: _with_negatives(seen.pairs, mined, generator),
            lambda matrix, batch: _contrast(everything, matrix, batch, dims),
            lambda matrix: torch.stack([_contrast(everything, matrix, part, dims) for part in fixed]).mean(),
            seed,
            advance,
        )
    learned = matrix.numpy()
    facts = {"kind": "pairs", "fitted_on": int((~out).sum()), "held_out": int(out.sum())}
    scores = [{dim: _reciprocal_rank(unseen, head, dim) for dim in dims} for head in (None, learned)]
    measure = f"MRR@{_K} of held-out pairs, among {min(len(answers), _POOL)} documents"
    return learned, {**facts, "measure": measure, "before": scores[0], "after": scores[1]}


def _once(rows: Float32Array) -> tuple[Float32Array, Rows]:
    """Return the different rows, and which of them each row is."""
    place_of: dict[bytes, int] = {}
    places = np.array([place_of.setdefault(row.tobytes(), len(place_of)) for row in rows], dtype=np.int64)
    return rows[np.unique(places, return_index=True)[1]], places


def _belong(pairs: Pairs, queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Say which of n queries and m documents belong together, by their rows: bool [n, m]."""
    keys = torch.sort(pairs.pairs[:, 0] * len(pairs.documents) + pairs.pairs[:, 1]).values
    asked = queries[:, None] * len(pairs.documents) + documents
    return keys[torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)] == asked


def _mine(pairs: Pairs, seed: int) -> torch.Tensor:
    """Return near documents of other queries per row of `pairs.pairs`: int64 [p, 10]; some may be any documents."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.unique(pairs.pairs[:, 1])
    pool = pool[torch.randperm(len(pool), generator=generator)[:_POOL]]
    candidates = pairs.documents[pool]
    found = []
    for part in torch.split(pairs.pairs, _BATCH):
        asked = pairs.queries[part[:, 0]]
        scores = asked @ candidates.T
        own = (asked * pairs.documents[part[:, 1]]).sum(1, keepdim=True)
        scores[(scores > _MAX_NEGATIVE * own) | _belong(pairs, part[:, 0], pool)] = -torch.inf
        near = scores.topk(min(_NEGATIVES, len(pool)))
        anyone = torch.randint(len(pool), near.indices.shape, generator=generator)
        found.append(pool[torch.where(near.values.isfinite(), near.indices, anyone)])
    return torch.cat(found)


def _with_negatives(pairs: torch.Tensor, mined: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """Return the batches of an epoch: rows of a query, its document and a near one, int64 [n, 3]."""
    chosen = torch.randint(mined.shape[1], (len(mined), 1), generator=generator)
    triples = torch.cat([pairs, mined.gather(1, chosen)], dim=1)
    return [triples[batch] for batch in _shuffled(len(pairs), generator)]


def _contrast(everything: Pairs, matrix: torch.Tensor, batch: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Return the InfoNCE loss of a batch, int64 [n, 2 or 3]: rows of queries, of documents, of near ones."""
    others = batch[:, 1:].T.reshape(-1)  # [n or 2n]: the queries' own documents come first
    own = torch.arange(len(batch))
    answers = _belong(everything, batch[:, 0], others)
    answers[own, own] = False
    asked, found = everything.queries[batch[:, 0]] @ matrix, everything.documents[others] @ matrix
    losses = [
        cross_entropy((_cut(asked, dim) @ _cut(found, dim).T / _TEMPERATURE).masked_fill(answers, -torch.inf), own)
        for dim in dims
    ]
    return torch.stack(losses).mean()


def _reciprocal_rank(pairs: Pairs, matrix: Float32Array | None, dim: int) -> float:
    asked, own = pairs.queries[pairs.pairs[:, 0]].numpy(), pairs.pairs[:, 1].numpy()
    documents = pairs.documents.numpy()
    if matrix is not None:
        asked, documents = asked @ matrix, documents @ matrix
    asked, answers, pool = (truncate(rows, dim) for rows in (asked, documents[own], documents[:_POOL]))
    scores = np.einsum("nd,nd->n", asked, answers)
    # Rounding must not put a document behind itself.
    ranks = np.concatenate([(part @ pool.T > score[:, None] + 1e-6).sum(1) for part, score in _parts(asked, scores)])
    return float(np.mean(np.where(ranks < _K, 1 / (1 + ranks), 0)))


def _parts(rows: Float32Array, scores: Float32Array) -> list[tuple[Float32Array, Float32Array]]:
    return [(rows[at : at + _BATCH], scores[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
