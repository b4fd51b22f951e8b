"""Int8 against float32 of fastbert itself: whole forward passes on every kernel set, one thread, one run.

    python -m bench.precision [--isa NAME ...] [--models NAME ...] [--rounds N] [--json FILE]

Random weights of the models' shapes. The cases are one text of 8, 32 and 128 tokens, and the ragged batch of
bench.workload. In every round each precision runs each case once, repeated to at least SAMPLE_S, by the thread's CPU
time. Printed for each kernel set: the median over rounds of the float32 time by the int8 time of the same round (above
1, int8 is faster), and below it the milliseconds of both.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.common import environment, pin
from bench.workload import CASES as ALL_CASES
from bench.workload import RAGGED, SHAPES, config
from fastbert import _core
from fastbert.benchmark import markdown, spread
from tests import models

SAMPLE_S = 0.01
CASES = ("1 x 8", "1 x 32", "1 x 128", RAGGED)
PRECISIONS = ("fp32", "int8")


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """Gives a function that returns milliseconds a run."""
    start = time.thread_time()
    run()
    repeat = 1 + int(SAMPLE_S / (time.thread_time() - start))

    def sample() -> float:
        start = time.thread_time()
        for _ in range(repeat):
            run()
        return 1e3 * (time.thread_time() - start) / repeat

    return sample


def measure(isa: str, name: str, rounds: int) -> dict[str, dict[str, Any]]:
    """case -> spread of fp32 and int8 milliseconds, and of their ratio."""
    model = models.random_model(**config(name), sentence=models.Sentence())
    cores = {p: _core.Model(model.config | {"precision": p}, model.tensors(), isa) for p in PRECISIONS}
    found = {}
    for case in CASES:
        batch = ALL_CASES[case]
        samplers = {
            p: timed(lambda core=core, batch=batch: core.forward(*batch, vectors=True, threads=1))
            for p, core in cores.items()
        }
        samples: dict[str, list[float]] = {p: [] for p in PRECISIONS}
        for i in range(rounds):
            for p in PRECISIONS if i % 2 else reversed(PRECISIONS):
                samples[p].append(samplers[p]())
        ratios = [a / b for a, b in zip(samples["fp32"], samples["int8"], strict=True)]
        found[case] = {p: spread(samples[p]) for p in PRECISIONS} | {"ratio": spread(ratios)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    supported = [name for name, ok in _core.isas() if ok]
    parser.add_argument("--isa", nargs="+", choices=supported, default=[isa for isa in supported if isa != "scalar"])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(), "cores": pin(1), "sets": {}}
    for isa in args.isa:
        record["sets"][isa] = {name: measure(isa, name, args.rounds) for name in tqdm(args.models, isa, leave=False)}
    where = record["environment"]
    print(f"\n{where['cpu']}, one thread, commit {where['commit']}\n")
    rows = [
        [isa, name]
        + [
            f"{x['ratio']['median']:.2f} ({x['fp32']['median']:.3g} : {x['int8']['median']:.3g} ms)"
            for x in cases.values()
        ]
        for isa, found in record["sets"].items()
        for name, cases in found.items()
    ]
    print(markdown(["kernel set", "model", *CASES], rows))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
