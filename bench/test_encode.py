"""From text to vector: `Encoder.encode`, and the tokenizer alone, on BERT-Tiny and MiniLM with a small vocabulary."""

from __future__ import annotations

from typing import Any

import pytest

from bench.workload import write_folder
from fastbert import Encoder

SHORT = "the cat and the dog find a way to the water"
TEXTS: dict[str, str | list[str]] = {
    "one text": SHORT,
    "64 texts": [f"{SHORT} {'of many people ' * (i % 8)}" for i in range(64)],
}
TEXTS["1024 texts"] = 16 * TEXTS["64 texts"]  # four steps of encode: with several threads one tokenizes, others run


@pytest.fixture(
    scope="module",
    params=[(name, precision) for name in ("tiny", "minilm") for precision in ("fp32", "int8")],
    ids="-".join,
)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    name, precision = request.param
    folder = tmp_path_factory.mktemp("model")
    write_folder(name, folder)
    return Encoder(folder, precision=precision)


@pytest.mark.parametrize("texts", TEXTS)
def test_encode(encoder: Encoder, texts: str, benchmark: Any) -> None:
    benchmark.group = texts
    benchmark(encoder.encode, TEXTS[texts])


@pytest.mark.parametrize("texts", TEXTS)
def test_tokenizer_alone(encoder: Encoder, texts: str, benchmark: Any) -> None:
    batch = [TEXTS[texts]] if isinstance(TEXTS[texts], str) else TEXTS[texts]
    benchmark.group = texts
    benchmark(encoder.tokenizer.encode_batch, batch)


def test_forward_ragged(encoder: Encoder, benchmark: Any) -> None:
    """16 tokens, from Python: arrays in, arrays out."""
    benchmark.group = "forward_ragged, 16 tokens"
    batch = encoder.tokenizer.encode_batch([SHORT * 2])
    benchmark(encoder.forward_ragged, batch.ids[:16], [0, 16])
