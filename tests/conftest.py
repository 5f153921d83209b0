import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import uuid
import warnings
from pathlib import Path

# Tests start many processes, each of which would compile the sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread per test process and what it starts: together they take all cores, and threads that share one wait for
    # each other. Before NumPy and torch read it.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import lmdb
import numpy as np
import pytest

from mrl_rag import MatryoshkaEncoder


@pytest.fixture(scope="session", autouse=True)
def _no_dtype_of_this_machines_choice():
    """What a machine chooses hides what another's choice would show."""

    def pick(device):
        pytest.fail("Name the encoder's dtype, or ask for the fixture `default_dtype`.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mrl_rag.encoder.encoder.pick_dtype", pick)
        yield


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def default_dtype(request):
    """The dtype of an encoder for which none is named: each that some machine would choose, on every machine."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mrl_rag.encoder.encoder.pick_dtype", lambda device: getattr(torch, request.param))
        yield request.param


@pytest.fixture(scope="session")
def minilm():
    return MatryoshkaEncoder("minilm", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def cosine_distance():
    def distance(a, b):
        a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        return 1 - (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))

    return distance


@pytest.fixture(scope="session")
def passages():
    """Real text of mixed length: the docstrings of a few standard modules."""
    import argparse
    import json
    import logging
    import shutil
    import threading

    texts = ["", "a", "Übergröße, naïve café · 東京"]
    for module in (argparse, json, logging, shutil, threading):
        texts += [t.__doc__ for t in vars(module).values() if isinstance(getattr(t, "__doc__", None), str)]
    return texts[:64]


@pytest.fixture(scope="session")
def make_tiny_bert(tmp_path_factory):
    """A BERT of real architecture and random weights, in the sentence-transformers layout."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    def make(pooling="mean", prompts=None, max_length=32, seed=0, modules=("Transformer", "Pooling", "Normalize")):
        folder = tmp_path_factory.mktemp("tiny_bert")
        letters = "abcdefghijklmnopqrstuvwxyz:_'."
        vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
        tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_max_length=64,
        ).save_pretrained(folder)
        torch.manual_seed(seed)
        BertModel(
            BertConfig(
                vocab_size=len(vocab),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
                initializer_range=0.5,  # at BERT's own 0.02 every text gets nearly the same vector
            )
        ).save_pretrained(folder)
        paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        layout = [
            {
                "idx": i,
                "name": str(i),
                "path": paths.get(m, f"{i}_{m}"),
                "type": f"sentence_transformers.models.{m}",
            }
            for i, m in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(layout))
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_length}))
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))
        (folder / "1_Pooling").mkdir()
        flags = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken", "max": "max_tokens"}
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps(
                {"word_embedding_dimension": 16}
                | {f"pooling_mode_{flag}": mode == pooling for mode, flag in flags.items()}
            )
        )
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_bert(make_tiny_bert):
    return make_tiny_bert()


@pytest.fixture(autouse=True)
def _texts_and_vectors_may_be_cut():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*longer than max_length")
        # Once per encoder, and the encoders of these tests are shared.
        warnings.filterwarnings("ignore", message="minilm was trained")
        yield


@pytest.fixture(scope="session")
def chroma_server(tmp_path_factory):
    """The port of a real `chroma run` on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "chroma"), "run", "--host", "127.0.0.1", "--port", str(port)]
    folder = tmp_path_factory.mktemp("server")
    with subprocess.Popen(
        [*command, "--path", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
        server.terminate()


@pytest.fixture(scope="session")
def forkserver():
    """A context whose processes are there in milliseconds: forks of one that has imported what takes seconds.

    That one uses nothing of it. Where there is no fork, each is a new process.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(
        ["chromadb.api.rust", "mrl_rag.encoder.workers", "mrl_rag.index.index", "mrl_rag.testing"]
    )
    return context


@pytest.fixture(scope="session")
def keep_highest_row():
    """Add a record that keeps the highest row number on a client, before collections are removed from it.

    Chroma leaves lists among their metadata to the records that get their row numbers next (chroma-core/chroma#7594).
    """

    def keep(client):
        collection = client.get_or_create_collection("keeps-the-highest-row-number", embedding_function=None)
        collection.add([uuid.uuid4().hex], np.ones((1, 2)))

    return keep


@pytest.fixture(scope="session")
def start_process(forkserver):
    """Start a process that runs code with the given names."""

    def start(code, **names):
        process = forkserver.Process(target=exec, args=(code, names), daemon=True)
        process.start()
        return process

    return start


class ArchiveFile:
    """An archive's file that nobody has open, to be damaged."""

    def __init__(self, folder):
        (self.path,) = Path(folder).glob("archive-*.lmdb")

    def _change(self, work):
        with lmdb.open(str(self.path), subdir=False, max_dbs=8) as env:
            names = {name: env.open_db(name.encode()) for name in ("places", "vectors", "rotations")}
            with env.begin(write=True) as txn:
                return work(txn, names)

    def lose(self, id_):
        self._change(lambda txn, names: txn.delete(id_.encode(), db=names["places"]))

    def lose_rotations(self):
        self._change(lambda txn, names: txn.drop(names["rotations"], delete=False))

    def damage(self, id_):
        """Flip a bit of the id's vector."""

        def work(txn, names):
            return txn.get(txn.get(id_.encode(), db=names["places"])[:8], db=names["vectors"])

        row = self._change(work)
        data = bytearray(self.path.read_bytes())
        places = [data.find(row)]
        while places[-1] >= 0:
            data[places[-1] + len(row) // 2] ^= 1
            places.append(data.find(row, places[-1] + 1))
        self.path.write_bytes(data)
        assert len(places) > 1


@pytest.fixture
def archive_of():
    """Return the archive's file of a folder."""
    return ArchiveFile


@pytest.fixture
def score_all_up_to(monkeypatch):
    """Let an index score every record only up to so many, so that small ones are searched in two stages.

    Stage one then looks at all of the shortlist's vectors; with `lists` at those of the inverted lists near the query,
    however few there are.
    """

    def limit(records, lists=False):
        monkeypatch.setattr("mrl_rag.index.search._EXACT_RECORDS", records)
        if lists:
            monkeypatch.setattr("mrl_rag.index.loaded.MIN_LISTED", 1)

    return limit


@pytest.fixture
def conditions_ask_the_graph(monkeypatch):
    """Let stage one ask Chroma's graph under a condition, however few records meet it."""
    monkeypatch.setattr("mrl_rag.index.search.MAX_EXACT_MATCHES", 0)
