"""What every benchmark needs: the machine in words, one core, statistics, a table."""

import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastbert import _core

ROOT = Path(__file__).parent.parent


def cpu_model() -> str:
    """The CPU's own name, else the architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Features of the CPU under the kernel's names; empty where there is no /proc/cpuinfo."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()}


def commit() -> str:
    """The commit of the checkout, with "+changes" if files differ from it; "unknown" without git."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(*packages: str) -> dict[str, Any]:
    """What a figure depends on: machine, kernel set, commit, and the versions of other packages."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "isa": _core.select_isa(),
        "commit": commit(),
        "versions": {name: version(name) for name in ("fastbert-cpu", "numpy", *packages)},
    }


def pin(cores: int) -> list[int]:
    """Keep this process, and threads it starts from now on, on the last ``cores`` of its cores; returns them."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    chosen = sorted(os.sched_getaffinity(0))[-cores:]
    os.sched_setaffinity(0, chosen)
    return chosen


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles as the spread."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else 3 * [*samples]
    return {"median": median, "low": low, "high": high, "rounds": len(samples)}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])
