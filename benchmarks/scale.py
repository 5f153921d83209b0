"""Encodes on a Ray cluster of this machine's cores, kills a worker, and takes 100,000 passages through to a search.

    python benchmarks/scale.py                        # all three parts
    python benchmarks/scale.py workers kill flat      # those named

The passages are random runs of the standard library's docstrings. `minilm` encodes them on Ray. The 100,000 are encoded
by a BERT of 2 layers and 128 numbers with random weights, so that the rest of the way is most of the work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
from encoder import minilm_folder, read_words
from index import machine

from mrl_rag import MatryoshkaEncoder, TwoStageIndex
from mrl_rag.encoder.batching import TokenSequence
from mrl_rag.index.shards import ShardFolder
from mrl_rag.progress import Advance
from mrl_rag.scale import encode_dataset, load
from mrl_rag.truncation import Float32Array

WORKERS_PASSAGES, FLAT_PASSAGES, SHARD = 4000, 100_000, 5000


class TimedEncoder(MatryoshkaEncoder):
    """Notes when each forward pass began and ended, in a file per process in the folder that `TIMES` names."""

    def _forward(self, sequences: Sequence[TokenSequence]) -> Float32Array:
        began = time.time()
        found = super()._forward(sequences)
        with open(Path(self._times, str(os.getpid())), "a") as file:
            file.write(f"{began} {time.time()}\n")
        return found

    def __init__(self, model: str, times: str, device: str = "cpu") -> None:
        self._times = times
        super().__init__(model, device=device)


def main() -> None:
    """Run the parts that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=["workers", "kill", "flat", []], default=["workers", "kill", "flat"]
    )
    parts = parser.parse_args().parts
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            {"workers": workers, "kill": kill, "flat": flat}[part](Path(folder, part))


def write_passages(folder: Path, count: int, longest: int) -> Path:
    """Write JSON lines."""
    folder.mkdir(exist_ok=True, parents=True)
    words, random = read_words(), np.random.default_rng(0)
    with open(folder / "corpus.jsonl", "w") as file:
        for number in range(count):
            start, length = random.integers(len(words) - longest), random.integers(5, longest)
            text = " ".join(words[start : start + length])
            file.write(json.dumps({"id": f"p{number}", "text": text, "metadata": {"words": int(length)}}) + "\n")
    return folder / "corpus.jsonl"


@contextmanager
def cluster(cores: int) -> Iterator[None]:
    """Start Ray on this machine; its workers get this process's priority."""
    import ray

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    ray.init(address="local", num_cpus=cores, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def workers(folder: Path) -> None:
    """Print what a second worker gains."""
    corpus = write_passages(folder, WORKERS_PASSAGES, 60)
    print(f"## {WORKERS_PASSAGES:,} passages of 5 to 60 words, `minilm`, one core per worker\n")
    print("| workers | passages/s | whole run, s | of which until the first forward pass | share of forward passes |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for count in (1, 2):
        times = folder / f"times-{count}"
        times.mkdir()
        encoder = TimedEncoder("minilm", str(times))
        with cluster(2):
            began = time.time()
            done = encode_dataset(
                corpus, folder / f"shards-{count}", encoder, engine="ray", shard_records=200, workers=count
            )
        spans = np.array([line.split() for file in times.iterdir() for line in file.read_text().splitlines()], float)
        first, last = spans[:, 0].min(), spans[:, 1].max()
        share = (spans[:, 1] - spans[:, 0]).sum() / (count * (last - first))
        rate = done.records / (last - first)
        print(f"| {count} | {rate:,.0f} | {done.seconds:.0f} | {first - began:.0f} | {share:.0%} |", flush=True)
    print()


def kill(folder: Path) -> None:
    """Kill a worker in the middle, and print what was lost."""
    count = 2000
    corpus, shards = write_passages(folder, count, 60), folder / "shards"
    killed: list[int] = []

    def kill_one() -> None:
        while len(list(shards.glob("shard-*"))) < 4:
            time.sleep(0.05)
        killed.append(actors()[0])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    with cluster(2):
        thread.start()
        encode_dataset(corpus, shards, "minilm", engine="ray", shard_records=100, workers=2)
        thread.join()
    found = ShardFolder(shards)
    ids = [id_ for batch in found.read_ahead(found.complete()) for id_ in batch.ids]
    print(f"## Two workers, one killed (SIGKILL) after 4 of 20 shards, {count:,} passages\n")
    print("| killed | ids | different ids | missing |")
    print("| ---: | ---: | ---: | ---: |")
    missing = {f"p{number}" for number in range(count)} - set(ids)
    print(f"| {len(killed)} | {len(ids):,} | {len(set(ids)):,} | {len(missing)} |\n", flush=True)


def actors() -> list[int]:
    """Return the processes of actors that make shards."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes().startswith(b"ray::MapWorker(MapBatches(_Worker)"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


class Memory:
    """Reads this process's anonymous memory as a bar is moved on."""

    def __init__(self) -> None:
        self.peaks: dict[int, float] = {}
        self._done, self._peak = 0.0, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @contextmanager
    def bar(self, *bar: object) -> Iterator[Advance]:
        """Stand in for `progress_bar`, the outermost of a call."""
        if self._thread.is_alive():
            yield lambda done, note="": None
            return

        def advance(done: float, note: str = "") -> None:
            before, self._done = self._done, self._done + done
            quarter = FLAT_PASSAGES // 4
            if self._done // quarter > before // quarter:
                self.peaks[int(self._done // quarter * quarter)], self._peak = self._peak, 0.0

        self._thread.start()
        yield advance
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            status = Path("/proc/self/status").read_text()
            self._peak = max(self._peak, int(status.partition("RssAnon:")[2].split()[0]) / 1024)


def flat(folder: Path) -> None:
    """Take passages through to a search, and print the memory on the way."""
    corpus = write_passages(folder, FLAT_PASSAGES, 30)
    model = make_small_model(folder / "model")
    print(f"## {FLAT_PASSAGES:,} passages of 5 to 30 words, a BERT of 2 layers and 128 numbers\n")
    print("| | passages/s | peak MB to 25,000 | to 50,000 | to 75,000 | to 100,000 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    shards = folder / "shards"
    with MatryoshkaEncoder(str(model), dtype="float32", device="cpu") as encoder:
        report("encode", "mrl_rag.scale.encoding", lambda: encode_dataset(corpus, shards, encoder, shard_records=SHARD))
        with TwoStageIndex(folder / "db") as index:
            report("load into a folder", "mrl_rag.index.index", lambda: load(shards, index))
            report("load again", "mrl_rag.index.index", lambda: load(shards, index))
            search(index, encoder, corpus)


def report(name: str, module: str, work: object) -> None:
    """Do something, and print its rate and its memory."""
    memory, began = Memory(), time.perf_counter()
    with patch(f"{module}.progress_bar", memory.bar):
        work()  # type: ignore[operator]
    rate = FLAT_PASSAGES / (time.perf_counter() - began)
    print(f"| {name} | {rate:,.0f} | {' | '.join(f'{peak:.0f}' for peak in memory.peaks.values())} |", flush=True)


def search(index: TwoStageIndex, encoder: MatryoshkaEncoder, corpus: Path) -> None:
    """Ask for passages by their own texts."""
    with open(corpus) as file:
        asked = [json.loads(line) for line, _ in zip(file, range(200), strict=False)]
    queries = encoder.encode_documents([fields["text"] for fields in asked])
    began = time.perf_counter()
    hits = [index.search(query, k=1)[0] for query in queries]  # type: ignore[index]
    each = (time.perf_counter() - began) / len(asked)
    right = np.mean([hit.document == fields["text"] for hit, fields in zip(hits, asked, strict=True)])  # type: ignore[union-attr]
    print(f"\n{index!r}: {right:.1%} of 200 passages found first by their own text, {1e3 * each:.1f} ms per search.")
    found = index.verify()
    whole = found.records - found.to_encode - len(found.misplaced)
    print(f"Recall of the true top 10: {index.recall:.3f}. {whole:,} of {found.records:,} records are whole.")
    print(
        f"Chroma's graph misses {len(found.unreachable)} of {found.tried:,} searched by their own vectors.\n",
        flush=True,
    )


def make_small_model(folder: Path) -> Path:
    """Make a BERT with MiniLM's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    shutil.copytree(minilm_folder(), folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    (folder / "config.json").unlink()
    BertModel(BertConfig(vocab_size=30522, initializer_range=0.5, **shape)).save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps(json.loads(pooling.read_text()) | {"word_embedding_dimension": 128}))
    return folder


if __name__ == "__main__":
    main()
