"""Forward passes of the 24 miniatures and MiniLM: lengths, batches, a ragged batch; both precisions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench.workload import CASES, RAGGED, config
from fastbert import _core
from tests import models

SHAPES = {f"L{shape['num_hidden_layers']}_H{shape['hidden_size']}": shape for shape in models.MINIATURES} | {
    "minilm": config("minilm")
}
RUN = ("1 x 8", "1 x 32", "1 x 128", "1 x 512", "8 x 32", RAGGED)


@pytest.fixture(
    scope="module", params=[(name, precision) for name in SHAPES for precision in ("fp32", "int8")], ids="-".join
)
def core(request: pytest.FixtureRequest) -> Iterator[_core.Model]:
    name, precision = request.param
    model = models.random_model(seed=1, **SHAPES[name])
    yield _core.Model(model.config | {"precision": precision}, model.tensors())


@pytest.mark.parametrize("case", RUN)
def test_forward(core: _core.Model, case: str, benchmark: Any) -> None:
    batch = CASES[case]
    benchmark.group = case
    benchmark(core.forward, *batch, hidden=True)
    benchmark.extra_info["tokens/s"] = len(batch.ids) / benchmark.stats.stats.median
    benchmark.extra_info["isa"] = core.isa
