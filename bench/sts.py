"""The STS Benchmark as CSV, and how sentence vectors are judged by it."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Pairs(NamedTuple):
    texts: list[str]  # all first sentences, then all second ones
    scores: NDArray[np.float64]  # how alike a pair is, by people

    @classmethod
    def read(cls, path: Path, every: int = 1) -> "Pairs":
        """Rows of sentence, sentence, score; every Nth of them."""
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[::every]
        return cls([row[i] for i in (0, 1) for row in rows], np.array([float(row[2]) for row in rows]))

    def spearman(self, vectors: NDArray[Any]) -> float:
        """Rank correlation of the cosines of pairs with their scores."""
        return float(np.corrcoef(ranks(cosines(*np.split(vectors, 2))), ranks(self.scores))[0, 1])


def cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Row by row."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def ranks(x: NDArray[Any]) -> NDArray[np.float64]:
    """From 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
