"""Every case of bench/kernels.py on every kernel set: rates and shares of the peak stand in extra_info of the JSON.

The peak is measured when the first case of a kernel set runs; bench.kernels measures it beside every sample, so that
its shares are the more exact ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.kernels import ALL_CASES, peaks, prepare
from fastbert._kernels import KernelSet, kernel_sets
from tests.cases import Case
from tests.toolchain import compiler

SAMPLES = 7


@pytest.fixture(scope="session")
def peak_rates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, float]]:
    """Kernel set -> operations per second by op."""

    @cache
    def rates(isa: str) -> dict[str, float]:
        if compiler() is None:
            return {}
        folder: Path = tmp_path_factory.mktemp(isa)
        found = {}
        for op, peak in peaks(isa, folder).items():
            for _ in range(SAMPLES):
                peak.sample()
            found[op] = median(peak.samples)
        return found

    return rates


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: f"{case.op}-{case}")
@pytest.mark.parametrize("isa", [name for name, supported in kernel_sets() if supported])
def test_kernel(isa: str, case: Case, peak_rates: Callable[[str], dict[str, float]], benchmark: Any) -> None:
    timed = prepare(case, KernelSet(isa), None)  # checks against float64
    benchmark.group = f"{case.op} {case}"
    benchmark(timed.run, 1)
    rate = timed.work / benchmark.stats.stats.median
    unit = "operations/s" if case.flops() else "elements/s"
    benchmark.extra_info[unit] = rate
    if (peak := peak_rates(isa).get(case.op)) is not None:
        benchmark.extra_info["share of peak"] = rate / peak
