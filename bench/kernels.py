"""Times the cases below on every kernel set, beside the peak of the same core in the same run.

    python -m bench.kernels [--isa NAME[,NAME]] [--only TEXT] [--rounds N] [--json PATH]

Operands lie as in a model; int8 activations are quantised from normal ones. Each case is checked against float64, then
timed: in every round each kernel set runs each case, once to fetch the operands, then repeated to at least SAMPLE_S,
with a short run of its peak (bench/peak.c) before and after: fused multiply-adds for gemm_f32, VNNI or AMX dot products
of bytes for gemm_s8 on the sets that have them, a sixth of AMX products of bfloat16 for gemm_split. Printed: median and
quartiles over the rounds. `share` is the median of the rate by the mean of the two peaks, so that a change of clock, or
a neighbour on the same core, weighs on both; `by gemm_f32` the median over the rounds of the rate by that of gemm_f32
of the same shape and kernel set. GB/s counts operands and result once. Row operations are in nanoseconds per element.
One thread, pinned to one core, by its CPU time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bench.common import ROOT, environment, pin
from fastbert._kernels import KernelSet, kernel_sets
from fastbert.benchmark import markdown, spread
from tests.cases import (
    Case,
    Expected,
    GemmF32,
    GemmS8,
    GemmSplit,
    LayerNormF32,
    MixF32,
    QuantizeU8,
    SoftmaxF32,
    SoftmaxU8,
    aligned,
    seeded,
)
from tests.toolchain import compile_c, isa_rows

SAMPLE_S = 0.004  # of a case; a quarter of it for each peak
LAYERS = [(768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384), (128, 128), (512, 128)]  # n, k
UNITS = {"gemm_f32": "GFLOP/s", "gemm_split": "GFLOP/s", "gemm_s8": "GOP/s"}  # of the other ops: ns/element
ALL_CASES: list[Case] = [
    *(op(m, n, k) for m in (128, 32, 8, 1) for n, k in LAYERS for op in (GemmF32, GemmS8, GemmSplit)),
    *(op(128, 3072, 768, act, bias=True) for act in ("gelu", "gelu_tanh") for op in (GemmF32, GemmS8)),
    *(op(128, 768, 3072, bias=True, residual=True) for op in (GemmF32, GemmS8)),
    GemmS8(128, 512, 768),
    *(op(128, n, k) for n, k in ((128, 64), (64, 128)) for op in (GemmF32, GemmS8)),  # an attention head
    *(op(128, n) for n in (16, 128, 512) for op in (SoftmaxF32, SoftmaxU8)),
    *(LayerNormF32(128, n) for n in (128, 384, 768)),
    *(op(128, n) for n in (128, 384, 768, 1536, 3072) for op in (MixF32, QuantizeU8)),
]


@dataclass
class Timed:
    """What is timed on one kernel set: run(repeat) does `work` units (operations or elements) each time."""

    run: Callable[[int], None]
    work: float
    repeat: int = 1
    peak: Timed | None = None
    samples: list[float] = field(default_factory=list)  # units per second, a value a round
    shares: list[float] = field(default_factory=list)  # of the peak, a value a round

    def sample(self) -> float:
        self.run(1)  # its operands into the caches
        begin = time.thread_time()  # of this thread: what the core did for others does not count
        self.run(self.repeat)
        seconds = time.thread_time() - begin
        self.samples.append(self.work * self.repeat / seconds)
        return seconds

    def sample_beside_peak(self) -> None:
        if self.peak is None:
            self.sample()
            return
        self.peak.sample()
        self.sample()
        self.peak.sample()
        self.shares.append(self.samples[-1] / mean(self.peak.samples[-2:]))

    def warm(self, seconds: float) -> None:
        """Finds how many runs last so long."""
        while (spent := self.sample()) < seconds:
            self.repeat = max(self.repeat + 1, int(self.repeat * min(1.1 * seconds / spent, 100)))
        self.samples.clear()


def peak_library(isa: str, folder: Path) -> ctypes.CDLL:
    """bench/peak.c, compiled with the flags of this kernel set."""
    flags = next(row.flags for row in isa_rows() if row.name == isa)
    library = folder / f"peak_{isa}.so"
    options = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC"]
    compiled = compile_c(*options, *flags, ROOT / "bench" / "peak.c", "-o", library)
    if compiled.returncode:
        raise SystemExit(f"bench/peak.c: the C compiler says: {compiled.stderr}")
    return ctypes.CDLL(str(library))


def peaks(isa: str, folder: Path) -> dict[str, Timed]:
    """The functions of bench/peak.c that the flags of this kernel set allow, by the op that each is the peak of."""
    loaded = peak_library(isa, folder)
    starts = {
        "gemm_f32": (loaded.peak_f32, ctypes.c_float),
        "gemm_s8": (loaded.peak_s8, ctypes.c_int),
        "gemm_split": (loaded.peak_split, ctypes.c_int),
    }
    found = {}
    for op, (function, number) in starts.items():
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_long, ctypes.POINTER(number)]
        run = partial(lambda chains, function, repeat: function(repeat, chains), (number * 12)(*range(12)), function)
        if work := run(1):
            found[op] = Timed(run, work, repeat=1000)
            found[op].warm(SAMPLE_S / 4)
    return found


def in_lines(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """A copy as a model has it: on a 64-byte line, its rows one longer than they need, lest they all fall into one set
    of the L1 cache."""
    if values.ndim == 1:
        return aligned(name, values)
    rows, n = values.shape
    line = 64 // values.itemsize
    copy = aligned(name, np.zeros((rows, -(-n // line) * line + line), values.dtype))[:, :n]
    copy[...] = values
    return copy


def prepare(case: Case, kernels: KernelSet, peak: Timed | None) -> Timed:
    rng = seeded(case, 1)
    operands = case.operands(rng)
    if isinstance(case, GemmS8):  # what one kernel set takes depends on how many activations are large
        rows = QuantizeU8(case.m, case.k)
        quantised = rows.bits({"x": rng.standard_normal((case.m, case.k), np.float32)})
        a, zero, scale_a = np.split(quantised, [-2, -1], axis=1)
        operands |= {"a": a.astype(np.uint8), "zero": zero[:, 0].astype(np.int32), "scale_a": scale_a[:, 0]}
    operands = {name: in_lines(name, values) for name, values in operands.items()}
    out = in_lines("out", np.zeros(case.out_shape(), np.float32))
    run = case.bind(kernels, operands, out)
    run(1)
    Expected(f"{kernels.isa} {case.op} {case}", case.truth(operands), case.bound(operands), bits=None).check(out)
    return Timed(run, case.flops() or operands["x"].size, peak=peak)


def measure(isas: list[str], cases: list[Case], rounds: int) -> list[dict[str, object]]:
    """A row for each peak, kernel set and case; rates are per second: of operations or elements, and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        top = {isa: peaks(isa, Path(folder)) for isa in isas}
    timed = {
        isa: {
            case: prepare(case, KernelSet(isa), top[isa].get(case.op))
            for case in cases
            if case.op != "gemm_split" or KernelSet(isa).gemm_split_name
        }
        for isa in isas
    }
    for isa in tqdm(isas, "warming", leave=False):
        for what in timed[isa].values():
            what.warm(SAMPLE_S)
    for _ in tqdm(range(rounds), "rounds", leave=False):
        for isa in isas:
            for what in timed[isa].values():
                what.sample_beside_peak()
    rows: list[dict[str, object]] = []
    for isa in isas:
        for op, peak in top[isa].items():
            rows.append({"isa": isa, "op": op, "case": "peak", **spread(peak.samples)})
        for case, what in timed[isa].items():
            row = {"isa": isa, "op": case.op, "case": str(case), **spread(what.samples)}
            row["bytes"] = row["median"] / what.work * case.moved_bytes()
            if what.shares:
                row["share"] = median(what.shares)
            f32_case = isinstance(case, GemmS8 | GemmSplit) and GemmF32(
                case.m, case.n, case.k, case.act, case.bias, case.residual
            )
            if f32_case in timed[isa]:
                f32 = timed[isa][f32_case].samples
                row["by_f32"] = median(x / y for x, y in zip(what.samples, f32, strict=True))
            rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    low, middle, high = row["low"], row["median"], row["high"]
    if row["op"] in UNITS:
        rate = f"{middle / 1e9:.1f} ({low / 1e9:.1f} - {high / 1e9:.1f}) {UNITS[row['op']]}"
    else:
        rate = f"{1e9 / middle:.3f} ({1e9 / high:.3f} - {1e9 / low:.3f}) ns/element"
    share = f"{row['share']:.0%}" if "share" in row else ""
    ratio = f"{row['by_f32']:.2f}" if "by_f32" in row else ""
    traffic = f"{row['bytes'] / 1e9:.1f}" if "bytes" in row else ""
    return [row["isa"], row["op"], row["case"], rate, share, ratio, traffic]


def main() -> None:
    supported = [name for name, is_supported in kernel_sets() if is_supported]
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default=",".join(supported), help="kernel sets, separated by commas (default: all)")
    parser.add_argument("--only", default="", help="cases whose name contains this text, for example m128 or softmax")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each case (default 15)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    cases = [case for case in ALL_CASES if arguments.only in f"{case.op} {case}"]
    pin(1)
    machine = environment()
    isas = arguments.isa.split(",")
    gemms = {
        isa: [name for name in (k.gemm_f32_name, k.gemm_s8_name, k.gemm_split_name) if name]
        for isa, k in ((isa, KernelSet(isa)) for isa in isas)
    }
    rows = measure(isas, cases, arguments.rounds)
    names = dict.fromkeys(name for both in gemms.values() for name in both)
    print(f"{machine['cpu']}, one core, commit {machine['commit']}; {', '.join(names)}\n")
    header = ["kernel set", "op", "case", "median (quartiles)", "share of peak", "by gemm_f32", "GB/s"]
    print(markdown(header, [cells(row) for row in rows]))
    if arguments.json:
        report = {"environment": machine, "gemms": gemms, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
