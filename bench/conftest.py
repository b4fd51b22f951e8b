"""For the suites of pytest-benchmark, test_*.py of this folder: as many cores as threads, warm runs, medians first.

One thread, or as many as FASTBERT_NUM_THREADS says.
"""

from __future__ import annotations

import os

import pytest

from bench.common import pin


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("bench/ needs the package pytest-benchmark: pip install '.[bench]'")
    for name, value in (("benchmark_warmup", True), ("benchmark_warmup_iterations", 1)):
        setattr(config.option, name, value)
    if config.option.benchmark_sort == "min":  # the default
        config.option.benchmark_sort = "name"
    config.option.benchmark_columns = ["median", "iqr", "rounds"]
    pin(int(os.environ.get("FASTBERT_NUM_THREADS", "1")))
