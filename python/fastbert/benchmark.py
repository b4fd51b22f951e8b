"""Latency and throughput of a model on this machine: what `fastbert bench` runs.

Random token ids go in and last_hidden_state comes out, so that tokenisation is not timed. Runners take turns, round by
round, so that a change of clock or a busy neighbour weighs on all; figures are medians with quartiles. A row of PEERS
is another engine that may be compared, loaded from the same folder and only if it is installed.
"""

import importlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbert.encoder import Encoder, Floats

Ids = NDArray[np.int64]
Run = Callable[[Ids], Floats]  # token ids [texts, tokens] -> last_hidden_state [texts, tokens, hidden]

SAMPLE_S = 0.01  # a sample is as many runs as take so long
ROUNDS = 3, 50  # at least and at most
# Cosine of rows, less the mean row, under which a runner did not compute the same model; other tokens give about 0.
LEAST_COSINE = 0.5


class Figure(NamedTuple):
    """One runner on one case."""

    runner: str
    texts: int
    tokens: int
    """Of each text."""
    ms: dict[str, float]
    """Of a batch: median, low and high quartile, rounds."""
    ratio: dict[str, float]
    """Its time by that of the first runner in the same round, likewise: above 1, the first runner is faster."""
    cosine: float
    """Of its rows to those of the first runner, mean."""

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.texts * self.tokens / self.ms["median"]


# ---- what runs ----


def fastbert_runner(encoder: Encoder) -> Run:
    """`Encoder.forward_ragged`, with the encoder's own threads."""

    def run(ids: Ids) -> Floats:
        texts, tokens = ids.shape
        rows = encoder.forward_ragged(ids.reshape(-1), np.arange(0, ids.size + 1, tokens))
        return rows.reshape(texts, tokens, -1)

    return run


def _pytorch(folder: Path, threads: int) -> Run:
    torch, transformers = _import("pytorch", "torch"), _import("pytorch", "transformers")
    torch.set_num_threads(threads)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def run(ids: Ids) -> Floats:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()

    return run


def _sentence_transformers(folder: Path, threads: int) -> Run:
    package = _import("sentence-transformers", "sentence_transformers")
    torch = _import("sentence-transformers", "torch")
    torch.set_num_threads(threads)
    model = package.SentenceTransformer(str(folder), device="cpu", local_files_only=True).eval()

    def run(ids: Ids) -> Floats:
        with torch.inference_mode():
            tensor = torch.from_numpy(ids)
            return model({"input_ids": tensor, "attention_mask": torch.ones_like(tensor)})["token_embeddings"].numpy()

    return run


def _onnxruntime(folder: Path, threads: int) -> Run:
    package = _import("onnxruntime", "onnxruntime")
    places = ("onnx/model.onnx", "model.onnx")
    path = next((folder / place for place in places if (folder / place).is_file()), None)
    if path is None:
        raise ValueError(f"onnxruntime: expected {' or '.join(places)} in {folder}, found neither")
    options = package.SessionOptions()
    options.intra_op_num_threads = threads
    session = package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fill = {"attention_mask": np.ones, "token_type_ids": np.zeros}
    names = [node.name for node in session.get_inputs()]
    if unknown := set(names) - {"input_ids", *fill}:
        raise ValueError(f"{path}: expected inputs input_ids, attention_mask and token_type_ids, got {unknown}")

    def run(ids: Ids) -> Floats:
        return session.run(None, {n: ids if n == "input_ids" else fill[n](ids.shape, np.int64) for n in names})[0]

    return run


def _import(engine: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{engine}: expected the package {module} to be installed: {error}") from None


PEERS: dict[str, Callable[[Path, int], Run]] = {
    "pytorch": _pytorch,
    "sentence-transformers": _sentence_transformers,
    "onnxruntime": _onnxruntime,
}


# ---- measuring ----


def measure(
    runners: Mapping[str, Run], cases: Sequence[tuple[int, int]], vocab_size: int, seconds: float
) -> Iterator[list[Figure]]:
    """For each case (texts, tokens), a Figure per runner; the first runner is what the others are compared with.

    `seconds` is for all rounds of a case together. Raises ValueError where a runner gives other rows than the first.
    """
    for texts, tokens in cases:
        ids = np.random.default_rng(0).integers(vocab_size, size=(texts, tokens))
        cosines, repeats, cost = {}, {}, 0.0
        expected = None
        calls = {name: partial(run, ids) for name, run in runners.items()}
        for name, call in calls.items():
            rows = np.asarray(call(), np.float32)
            expected = rows if expected is None else expected
            cosines[name] = _nearness(name, rows, expected)
            settle()
            once = min(seconds_of(call) for _ in range(2))
            repeats[name] = 1 + int(SAMPLE_S / once)
            cost += once * repeats[name]
        samples: dict[str, list[float]] = {name: [] for name in runners}
        for _ in range(int(np.clip(seconds / cost, *ROUNDS))):
            for name, call in calls.items():
                settle()
                call()  # brings the weights back into the cache
                samples[name].append(1e3 * seconds_of(call, repeats[name]))
        first = samples[next(iter(runners))]
        yield [
            Figure(
                name,
                texts,
                tokens,
                spread(samples[name]),
                spread([other / own for other, own in zip(samples[name], first, strict=True)]),
                cosines[name],
            )
            for name in runners
        ]


def seconds_of(run: Callable[[], Any], repeat: int = 1) -> float:
    """Of one run, the mean over `repeat`."""
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - start) / repeat


def settle() -> None:
    """Waits until no thread of this process is spinning after the engine that ran last, for a second at most."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.0005:
            return


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles as the spread."""
    low, median, high = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high, "rounds": len(samples)}


def _nearness(name: str, rows: Floats, expected: Floats) -> float:
    if rows.shape != expected.shape:
        raise ValueError(f"{name}: expected last_hidden_state {list(expected.shape)}, got {list(rows.shape)}")
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (rows, expected))
    if len(a) > 1 and not _cosine(a - a.mean(axis=0), b - b.mean(axis=0)) >= LEAST_COSINE:
        raise ValueError(f"{name}: computes something else from this folder: its rows are not those of fastbert")
    return _cosine(a, b)


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(((a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean())


# ---- words ----


def cpu_model() -> str:
    """The CPU's own name, else the architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def core_count() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
