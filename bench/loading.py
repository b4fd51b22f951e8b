"""Time to load a BERT-Base from each format, against reading its file and copying its numbers once as float32.

    python -m bench.loading [FORMAT ...]        formats of tests/models.py: safetensors in each dtype, others in float32

Files are in the page cache. Seconds: medians, and the median of the ratios within rounds.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from fastbert import _core
from fastbert.benchmark import markdown
from fastbert.checkpoint import load_checkpoint
from tests.models import FORMATS, write_model

BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 30522, "tokenizer": None}
ROUNDS = 7


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def load(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    _core.Model(asdict(checkpoint.config), checkpoint.tensors)


def yardstick(file: Path, float32_bytes: int) -> None:
    content = np.fromfile(file, np.uint8)
    packed = np.empty(float32_bytes, np.uint8)
    for at in range(0, float32_bytes, len(content)):
        packed[at : at + len(content)] = content[: float32_bytes - at]


def main() -> None:
    cases = [(format, "F32") for format in FORMATS] + [("safetensors", "F16"), ("safetensors", "BF16")]
    rows = []
    for format, dtype in cases:
        if sys.argv[1:] and format not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = write_model(folder, format=format, dtype=dtype, prefix="bert.", **BASE)
            file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
            size = sum(w.nbytes for w in model.weights.values())
            runs = partial(load_checkpoint, folder), partial(load, folder), partial(yardstick, file, size)
            rounds = np.array([[timed(run) for run in runs] for _ in range(1 + ROUNDS)])[1:]
        times = [f"{t:.3f}" for t in np.median(rounds, axis=0)]
        rows.append([format, dtype, *times, f"{np.median(rounds[:, 1] / rounds[:, 2]):.2f}"])
    print(markdown(["format", "dtype", "open and check", "load", "read and copy", "ratio of the last two"], rows))


if __name__ == "__main__":
    main()
