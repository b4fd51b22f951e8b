"""The least time of a forward pass: what the instructions and the memory of this machine allow, by bench/peak.c.

Operations are those of linear layers and attention, at the peak rate of the model's precision. Bytes are the weights of
the layers, once a batch, read from wherever so many bytes stay (cache or memory). The limit is what takes longer of the
two.
"""

import ctypes
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from bench.kernels import SAMPLE_S, Timed, peak_library, peaks
from bench.workload import CASES, config
from tests.toolchain import compiler

SAMPLES = 7
PEAK_OF = {"fp32": "gemm_f32", "int8": "gemm_s8"}
WEIGHT_BYTES = {"fp32": 4, "int8": 1}


def weights(model: str) -> int:
    """Weights of the linear layers: query, key, value, output, and two of four times the width."""
    shape = config(model)
    return shape["num_hidden_layers"] * 12 * shape["hidden_size"] ** 2


def reader(isa: str, folder: Path) -> Callable[[int], Timed]:
    """Gives what reads a buffer of so many bytes again and again."""
    peak_read = peak_library(isa, folder).peak_read
    peak_read.restype = ctypes.c_double
    peak_read.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.POINTER(ctypes.c_int)]
    lanes = (ctypes.c_int * 16)()

    def of_size(n_bytes: int) -> Timed:
        buffer = np.ones(n_bytes, np.uint8)
        return Timed(lambda repeat: peak_read(repeat, buffer.ctypes.data, n_bytes, lanes), n_bytes)

    return of_size


class Roofline(NamedTuple):
    """Rates of all threads together."""

    operations: dict[str, float]  # per second, by precision
    read_bytes: dict[str, float]  # per second, by "model precision"

    @classmethod
    def measure(cls, isa: str, models: list[str], threads: int) -> "Roofline | None":
        """None without a C compiler, or where no peak is known for this kernel set."""
        if compiler() is None:
            return None

        def rate(peak: Timed) -> float:
            peak.warm(SAMPLE_S)
            for _ in range(SAMPLES):
                peak.sample()
            return threads * median(peak.samples)

        with tempfile.TemporaryDirectory() as folder:
            timed = peaks(isa, Path(folder))
            operations = {p: rate(timed[op]) for p, op in PEAK_OF.items() if op in timed}
            read = reader(isa, Path(folder))
            sizes = {f"{model} {p}": weights(model) * WEIGHT_BYTES[p] for model in models for p in operations}
            return (
                cls(operations, {name: rate(read(n_bytes)) for name, n_bytes in sizes.items()}) if operations else None
            )

    def seconds(self, model: str, case: str, precision: str) -> float:
        shape, batch = config(model), CASES[case]
        linear = 2 * weights(model) * len(batch.ids)
        pairs = sum((b - a) ** 2 for a, b in pairwise(batch.offsets.tolist()))
        attention = 4 * shape["num_hidden_layers"] * shape["hidden_size"] * pairs
        reading = weights(model) * WEIGHT_BYTES[precision] / self.read_bytes[f"{model} {precision}"]
        return max((linear + attention) / self.operations[precision], reading)
