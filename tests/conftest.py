"""Options and the report of what was covered: the seed in the header, the kernel sets at the end."""

from __future__ import annotations

from collections import Counter
from zlib import crc32

import pytest
from hypothesis import settings

from fastbert._kernels import KernelSet, kernel_sets

# For slow builds: pytest --hypothesis-profile=small
settings.register_profile("small", max_examples=10, deadline=None)

covered: Counter[str] = Counter()  # kernel set -> kernel tests that passed on it


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbert")
    group.addoption("--seed", type=int, default=1, help="seed of the random operands of the kernel tests (default 1)")
    group.addoption("--require-isa", metavar="NAME[,NAME]", help="fail unless kernel tests passed on these kernel sets")
    group.addoption("--sample", metavar="P/N", help="of the cases of the kernel tests run part P of N (for emulators)")
    group.addoption("--exhaustive", action="store_true", help="activations on all 2^32 float32: minutes for each")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "memory: measures the memory of the process, which a sanitizer distorts")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """--sample: parametrised kernel tests by lot, the same for every run."""
    if sample := config.getoption("--sample"):
        part, parts = map(int, sample.split("/"))
        cases = [item for item in items if item.path.stem == "test_kernels" and "[" in item.name]
        left_out = {item for item in cases if crc32(item.name.encode()) % parts != part % parts}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def pytest_report_header(config: pytest.Config) -> str:
    sets = ", ".join(name if supported else f"{name} (not on this CPU)" for name, supported in kernel_sets())
    return f"fastbert: seed {config.getoption('--seed')}; kernel sets: {sets}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--seed")


@pytest.fixture(params=[name for name, _ in kernel_sets()])
def kernels(request: pytest.FixtureRequest) -> KernelSet:
    """Each kernel set of this build in turn; skips those that this CPU, or its OS, does not run."""
    name = request.param
    if not dict(kernel_sets())[name]:
        pytest.skip(f"this CPU, or its OS, does not run {name}")
    request.node.user_properties.append(("isa", name))
    return KernelSet(name)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        covered.update(value for key, value in report.user_properties if key == "isa")


def missing(config: pytest.Config) -> list[str]:
    required = config.getoption("--require-isa")
    return [name for name in required.split(",") if not covered[name]] if required else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if missing(session.config) and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = ", ".join(f"{name} ({n} tests)" for name, n in covered.items()) or "none"
    terminalreporter.write_line(f"kernel sets covered: {counts}")
    if missing(config):
        terminalreporter.write_line(f"--require-isa: not covered: {', '.join(missing(config))}", red=True)
