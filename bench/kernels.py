"""Times the cases below on every kernel set, beside the multiply-add peak of the same core in the same run.

    python -m bench.kernels [--isa NAME[,NAME]] [--only TEXT] [--rounds N] [--json PATH]

Each case is checked against float64, then timed warm: in every round each kernel set runs each case once, repeated to
at least SAMPLE_S, with a short run of its peak (bench/peak.c) before and after. Printed: median and quartiles over the
rounds. `share` is the median of GFLOP/s by the mean of the two peaks, so that a change of clock, or a neighbour on the
same core, weighs on both. GB/s counts operands and result once. Row operations are in nanoseconds per element. One
thread, pinned to one core, by its CPU time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.common import ROOT, environment, markdown, pin, spread
from fastbert._kernels import KernelSet, kernel_sets
from tests.cases import Case, Expected, GemmF32, LayerNormF32, SoftmaxF32, aligned, seeded
from tests.toolchain import compile_c, isa_rows

SAMPLE_S = 0.004  # of a case; a quarter of it for each peak
LAYERS = [(768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384), (128, 128), (512, 128)]  # n, k
ALL_CASES: list[Case] = [
    *(GemmF32(m, n, k) for m in (128, 32, 8, 1) for n, k in LAYERS),
    GemmF32(128, 3072, 768, "gelu", bias=True),
    GemmF32(128, 3072, 768, "gelu_tanh", bias=True),
    GemmF32(128, 768, 3072, bias=True, residual=True),
    GemmF32(128, 128, 64),  # scores and context of one attention head
    GemmF32(128, 64, 128),
    *(SoftmaxF32(128, n) for n in (16, 128, 512)),
    *(LayerNormF32(128, n) for n in (128, 384, 768)),
]


@dataclass
class Timed:
    """What is timed on one kernel set: run(repeat) does `work` units (operations or elements) each time."""

    run: Callable[[int], None]
    work: float
    repeat: int = 1
    samples: list[float] = field(default_factory=list)  # units per second, a value a round

    def sample(self) -> float:
        begin = time.thread_time()  # of this thread: what the core did for others does not count
        self.run(self.repeat)
        seconds = time.thread_time() - begin
        self.samples.append(self.work * self.repeat / seconds)
        return seconds

    def warm(self, seconds: float) -> None:
        """Finds how many runs last so long."""
        while (spent := self.sample()) < seconds:
            self.repeat = max(self.repeat + 1, int(self.repeat * min(1.1 * seconds / spent, 100)))
        self.samples.clear()


def peak(isa: str, folder: Path) -> Timed | None:
    """bench/peak.c with the flags of this kernel set; None if those have no multiply-add of vectors."""
    flags = next(row.flags for row in isa_rows() if row.name == isa)
    library = folder / f"peak_{isa}.so"
    options = ["-O3", "-ffp-contract=fast", "-shared", "-fPIC"]
    compiled = compile_c(*options, *flags, ROOT / "bench" / "peak.c", "-o", library)
    if "no vector multiply-add" in compiled.stderr:
        return None
    if compiled.returncode:
        raise SystemExit(f"bench/peak.c: the C compiler says: {compiled.stderr}")
    function = ctypes.CDLL(str(library)).peak
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    chains = (ctypes.c_float * 12)(*np.linspace(0, 1, 12))
    return Timed(lambda repeat: function(repeat, chains), function(1, chains), repeat=1000)


def prepare(case: Case, kernels: KernelSet) -> Timed:
    operands = case.operands(seeded(case, 1))
    out = aligned("out", np.zeros(case.out_shape(), np.float32))
    run = case.bind(kernels, operands, out)
    run(1)
    Expected(f"{kernels.isa} {case.op} {case}", case.truth(operands), case.bound(operands), bits=None).check(out)
    return Timed(run, case.flops() or out.size)


def measure(isas: list[str], cases: list[Case], rounds: int) -> list[dict[str, object]]:
    """A row for each kernel set and case; rates are per second: of floating-point operations or elements, and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        peaks = {isa: peak(isa, Path(folder)) for isa in isas}
    timed = {isa: [prepare(case, KernelSet(isa)) for case in cases] for isa in isas}
    for isa in tqdm(isas, "warming", leave=False):
        for what in timed[isa]:
            what.warm(SAMPLE_S)
        if peaks[isa]:
            peaks[isa].warm(SAMPLE_S / 4)
            peaks[isa].sample()
    for _ in tqdm(range(rounds), "rounds", leave=False):
        for isa in isas:
            for what in timed[isa]:
                what.sample()
                if peaks[isa]:
                    peaks[isa].sample()
    rows: list[dict[str, object]] = []
    for isa in isas:
        top = peaks[isa].samples if peaks[isa] else []  # top[i] before, top[i + 1] after sample i of the run
        if top:
            rows.append({"isa": isa, "op": "peak", "case": "", "unit": "flop", **spread(top)})
        for i, (case, what) in enumerate(zip(cases, timed[isa], strict=True)):
            row = {"isa": isa, "op": case.op, "case": str(case), **spread(what.samples)}
            row["unit"] = "flop" if case.flops() else "element"
            row["bytes"] = row["median"] / what.work * case.moved_bytes()
            if top and case.flops():
                beside = [mean(top[j : j + 2]) for j in range(i, len(top) - 1, len(cases))]
                row["share"] = median(x / y for x, y in zip(what.samples, beside, strict=True))
            rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    low, middle, high = row["low"], row["median"], row["high"]
    if row["unit"] == "flop":
        rate = f"{middle / 1e9:.1f} ({low / 1e9:.1f} - {high / 1e9:.1f}) GFLOP/s"
    else:
        rate = f"{1e9 / middle:.3f} ({1e9 / high:.3f} - {1e9 / low:.3f}) ns/element"
    share = f"{row['share']:.0%}" if "share" in row else ""
    traffic = f"{row['bytes'] / 1e9:.1f}" if "bytes" in row else ""
    return [row["isa"], row["op"], row["case"], rate, share, traffic]


def main() -> None:
    supported = [name for name, is_supported in kernel_sets() if is_supported]
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default=",".join(supported), help="kernel sets, separated by commas (default: all)")
    parser.add_argument("--only", default="", help="cases whose name contains this text, for example m128 or softmax")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each case (default 15)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    cases = [case for case in ALL_CASES if arguments.only in f"{case.op} {case}"]
    machine = environment()
    pin(1)
    gemms = {isa: KernelSet(isa).gemm_f32_name for isa in arguments.isa.split(",")}
    rows = measure(list(gemms), cases, arguments.rounds)
    print(f"{machine['cpu']}, one core, commit {machine['commit']}; {', '.join(gemms.values())}\n")
    header = ["kernel set", "op", "case", "median (quartiles)", "share of peak", "GB/s"]
    print(markdown(header, [cells(row) for row in rows]))
    if arguments.json:
        report = {"environment": machine, "gemm_f32": gemms, "rows": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
