"""What is run: six shapes of BERT with random weights, and batches of random token ids."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from tests import models
from tests.models import Batch

VOCAB_SIZE = 30522
SHAPES = {  # layers, hidden size, heads
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "minilm": (6, 384, 12),
    "small": (4, 512, 8),
    "medium": (8, 512, 8),
    "base": (12, 768, 12),
}
RAGGED = "ragged 64"


def config(name: str) -> dict[str, Any]:
    """The numbers of config.json of a shape."""
    layers, hidden, heads = SHAPES[name]
    return {
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }


def batch_of(*lengths: int) -> Batch:
    """Random ids; all of token type 0, the only one that llama.cpp knows."""
    return models.random_batch(lengths, VOCAB_SIZE, type_vocab_size=1)


def log_normal_lengths(texts: int = 64) -> list[int]:
    """Quantiles of a log-normal distribution: median 24 tokens, sigma 0.8, cut to 4 .. 128; shuffled."""
    quantiles = [statistics.NormalDist().inv_cdf((i + 0.5) / texts) for i in range(texts)]
    lengths = np.clip(np.rint(24 * np.exp(0.8 * np.array(quantiles))), 4, 128).astype(int)
    return lengths[np.argsort(np.random.PCG64(0).random_raw(texts))].tolist()


CASES: dict[str, Batch] = {  # texts x tokens
    **{f"1 x {n}": batch_of(n) for n in (8, 16, 32, 64, 128, 256, 512)},
    **{f"{texts} x {n}": batch_of(*[n] * texts) for texts, n in ((8, 32), (8, 128), (32, 32))},
    RAGGED: batch_of(*log_normal_lengths()),
}


def write_folder(name: str, folder: Path) -> None:
    """A Hugging Face folder of this shape, with a tokenizer and all that the converters of other engines look for."""
    unused = VOCAB_SIZE - len(models.VOCABULARY)
    models.write_model(
        folder,
        seed=1,
        tokenizer="json",
        vocabulary=[*models.VOCABULARY, *(f"[unused{i}]" for i in range(unused))],
        position_embedding_type="absolute",
        **config(name),
    )
