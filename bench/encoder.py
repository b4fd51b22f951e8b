"""Whole forward passes, fastbert against other engines: same weights, same token ids, same threads, one run.

    pip install ".[bench]"
    python -m bench.encoder [--quick] [--models tiny ...] [--cases "1 x 32" "ragged 64" ...] [--engines onnxruntime ...]
                            [--threads 1] [--seconds 6] [--isa avx2] [--split] [--cache FOLDER] [--json FILE]

Models and cases are those of bench/workload.py, engines those of bench/engines.py. Token ids are given, so that
tokenisation is not timed; the output is last_hidden_state. An engine that has to pad may choose how to cut the batch
(WAYS), and which of its forms to use: all are tried, the fastest one competes. Every result is compared with fastbert's
before it is timed. Then the engines take turns, round by round, pinned to as many cores as there are threads.

Figures are medians of milliseconds per batch; a ratio is the median over rounds of the other engine's time by
fastbert's of the same round: above 1, fastbert is faster. fastbert in int8 is compared with every engine in any
precision, in fp32 with engines in fp32. `share` is what fastbert reaches of the machine's limit (bench/roofline.py),
measured in the same run.

--isa avx2 caps fastbert's kernels, and the other engines where they have a switch for it; those that have none run as
they are, and do not count as best peer. --split loads fastbert's fp32 models with strict=False: they run on AMX then.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bench.common import environment, pin
from bench.engines import ENGINES, Rows, Session, Task, Unavailable, load, missing_packages, select
from bench.roofline import Roofline
from bench.sts import cosines
from bench.workload import CASES, RAGGED, SHAPES, batch_of, write_folder
from fastbert.benchmark import markdown, seconds_of, settle, spread
from tests.models import Batch

PRECISIONS = ("fp32", "bf16", "int8")  # in the order in which they may be compared: at or below ours
OURS = "fastbert"
QUICK = {"models": ["tiny", "minilm"], "cases": ["1 x 8", "1 x 32", "1 x 128", "8 x 128", RAGGED], "seconds": 3.0}
SAMPLE_S = 0.02  # a sample is as many runs as take so long
WARM_S = 0.5  # before a sample of runs shorter than this, one run brings the weights back into the cache
ROUNDS = 3, 25  # at least and at most
TRIAL_S = 0.1  # to find the fastest way
CHECK_S = 0.5  # from here on the run that is checked is the trial too
HOPELESS = 2.0  # times the best counted peer of the same precision: gets no further trials, and one round
# Cosine of rows, less the mean row, to fastbert's in float32, mean over the batch. A text in the wrong place or a wrong
# mask gives about 0, as rows of different tokens do; coarse scales give 0.89 at worst (PyTorch int8, real weights).
LEAST_COSINE = {"fp32": 0.999, "bf16": 0.9, "int8": 0.5}

# How a batch that an engine has to pad may be cut: indices of texts, in groups.
Groups = list[list[int]]


def by_length(size: int, lengths: Sequence[int]) -> Groups:
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + size] for i in range(0, len(order), size)]


WAYS: dict[str, Callable[[Sequence[int]], Groups]] = {
    "8 at a time": partial(by_length, 8),  # the first is what hopeless engines are judged by
    "whole": lambda lengths: [list(range(len(lengths)))],
    "4 at a time": partial(by_length, 4),
    "one by one": partial(by_length, 1),
}


class Variant(NamedTuple):
    """One way of one session to run a batch."""

    name: str
    run: Callable[[], None]  # what is timed
    rows: Callable[[], Rows]  # runs, and gives last_hidden_state [tokens, hidden] of the whole batch


def ways_of(session: Session, lengths: Sequence[int]) -> dict[str, Groups]:
    """The ways worth trying: no two alike, none with more padding than tokens."""
    found: dict[str, Groups] = {}
    for name, cut in [("whole", WAYS["whole"])] if session.ragged or session.one_shape else WAYS.items():
        groups = sorted(sorted(group) for group in cut(lengths))
        area = sum(len(group) * max(lengths[i] for i in group) for group in groups)
        if session.one_shape and len(set(lengths)) > 1:
            continue
        if groups not in found.values() and (session.ragged or area <= 2 * sum(lengths)):
            found[name] = groups
    return found


def variants(sessions: Iterable[Session], batch: Batch) -> Iterator[Variant]:
    lengths = np.diff(batch.offsets).tolist()
    for session in sessions:
        for way, groups in ways_of(session, lengths).items():
            parts = [select(batch, group) for group in groups]
            feeds = [session.feed(part) for part in parts]

            def run(session: Session = session, feeds: list[Any] = feeds) -> None:
                for fed in feeds:
                    session.call(fed)

            def rows(session: Session = session, feeds: Any = feeds, groups: Any = groups, parts: Any = parts) -> Rows:
                texts = {}
                for group, part, fed in zip(groups, parts, feeds, strict=True):  # the next call may overwrite a result
                    found = session.rows(session.call(fed), part)
                    texts |= dict(zip(group, np.split(found, part.offsets[1:-1]), strict=True))
                return np.concatenate([texts[i] for i in range(len(lengths))])

            yield Variant(f"{session.name}, {way}" if len(lengths) > 1 else session.name, run, rows)


def nearness(rows: Rows, expected: Rows) -> float:
    return float(cosines(rows - rows.mean(axis=0), expected - expected.mean(axis=0)).mean())


# ---- measuring ----


def timed(run: Callable[[], Rows]) -> tuple[Rows, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


class Contestant:
    """An engine in a precision, in its fastest variant for a case."""

    def __init__(self, sessions: Sequence[Session], batch: Batch) -> None:
        self.variants = variants(sessions, batch)
        self.trials: dict[str, float] = {}
        self.samples: list[float] = []  # milliseconds, a value a round
        self.run: Callable[[], Any] = lambda: None
        self.seconds = float("inf")

    def try_one(self, expected: Rows | None, least_cosine: float) -> Rows | None:
        """Checks and times the next variant; None if there is no more. Raises RuntimeError for a wrong result."""
        variant = next(self.variants, None)
        if variant is None:
            return None
        rows, first = timed(variant.rows)
        if expected is not None and not (near := nearness(rows, expected)) >= least_cosine:
            raise RuntimeError(f"{variant.name}: expected a cosine to fastbert of {least_cosine}, got {near:.4f}")
        if first < CHECK_S:
            first = seconds_of(variant.run)
        taken = min([first, *(seconds_of(variant.run) for _ in range(min(5, int(TRIAL_S / first))))])
        self.trials[variant.name] = 1e3 * taken
        if taken < self.seconds:
            self.seconds, self.run, self.name = taken, variant.run, variant.name
        return rows

    def sample(self) -> None:
        if self.seconds < WARM_S:
            self.run()
        self.samples.append(1e3 * seconds_of(self.run, 1 + int(SAMPLE_S / self.seconds)))


def measure(
    batch: Batch,
    loaded: dict[tuple[str, str], list[Session]],
    counted: Sequence[str],  # "engine precision"
    seconds: float,
    threads: int,
    label: str,
) -> dict[tuple[str, str], Contestant]:
    """Each engine's samples by (engine, precision)."""
    contestants: dict[tuple[str, str], Contestant] = {}
    best = dict.fromkeys(PRECISIONS, float("inf"))  # of the counted peers
    expected = None
    for (engine, precision), sessions in tqdm(loaded.items(), f"{label}: check, try", leave=False):
        contestant = Contestant(sessions, batch)
        if threads > 1:
            settle()
        try:
            while (rows := contestant.try_one(expected, LEAST_COSINE[precision])) is not None:
                expected = rows if expected is None else expected
                if contestant.seconds > HOPELESS * best[precision]:
                    break
        except RuntimeError as error:
            raise RuntimeError(f"{label}, {engine} {precision}: {error}") from error
        if f"{engine} {precision}" in counted:
            best[precision] = min(best[precision], contestant.seconds)
        contestants[engine, precision] = contestant

    cost = {key: max(SAMPLE_S, x.seconds) + (x.seconds if x.seconds < WARM_S else 0) for key, x in contestants.items()}
    slow = hopeless({key: x.seconds for key, x in contestants.items()}, counted)
    spare = seconds - sum(cost[key] for key in slow)
    rounds = int(np.clip(spare / sum(cost[key] for key in cost.keys() - slow), *ROUNDS))
    for i in tqdm(range(rounds), f"{label}: rounds", leave=False):
        turn = [key for key in contestants if i == 0 or key not in slow]
        for key in turn if i % 2 else reversed(turn):
            if threads > 1:
                settle()
            contestants[key].sample()
        if i == 0:  # a trial may have been disturbed
            slow &= hopeless({key: x.samples[0] for key, x in contestants.items()}, counted)
    return contestants


def hopeless(times: dict[tuple[str, str], float], counted: Sequence[str]) -> set[tuple[str, str]]:
    """Of times by (engine, precision), those of peers that are HOPELESS beside the best counted one's."""
    peers = {key: time for key, time in times.items() if not key[0].startswith(OURS)}
    best = {
        p: min((t for key, t in peers.items() if " ".join(key) in counted and key[1] == p), default=0.0)
        for _, p in peers
    }
    return {key for key, time in peers.items() if time > HOPELESS * best[key[1]]}


def results(contestants: dict[tuple[str, str], Contestant], tokens: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for (engine, precision), x in contestants.items():
        ratio = {}
        for ours in ("fp32", "int8"):
            if (OURS, ours) in contestants and PRECISIONS.index(precision) <= PRECISIONS.index(ours):
                pairs = zip(x.samples, contestants[OURS, ours].samples, strict=False)  # the slow have fewer rounds
                ratio[ours] = spread([other / own for other, own in pairs])
        found[f"{engine} {precision}"] = {
            "variant": x.name,
            "ms": spread(x.samples),
            "ratio": ratio,
            "tokens/s": 1e3 * tokens / statistics.median(x.samples),
            "samples_ms": [float(f"{ms:.5g}") for ms in x.samples],
            "trials_ms": {name: float(f"{ms:.5g}") for name, ms in x.trials.items()},
        }
    return found


# ---- what comes out of it ----


def best_peer(case: dict[str, Any], ours: str, counted: Iterable[str]) -> tuple[str, float] | None:
    """The engine with the smallest ratio to fastbert in precision `ours`; those of one round are no candidates."""
    ratios = {
        name: found["ratio"][ours]["median"]
        for name, found in case["engines"].items()
        if name in counted and ours in found["ratio"] and found["ms"]["rounds"] > 1
    }
    return min(ratios.items(), key=lambda item: item[1], default=None)


GROUPS: dict[str, Callable[[str, int], bool]] = {  # of cases, by name and tokens in all
    "all cases": lambda case, tokens: True,
    "64 tokens and more": lambda case, tokens: tokens >= 64,
    "below 64 tokens": lambda case, tokens: tokens < 64,
    "256 tokens and more": lambda case, tokens: tokens >= 256,
    RAGGED: lambda case, tokens: case == RAGGED,
}


def summary(record: dict[str, Any]) -> list[str]:
    """Geometric means of the best peer's time by fastbert's, and where fastbert is behind."""
    lines = []
    counted = record["counted"]
    for ours in ("fp32", "int8"):
        ratios = {}
        for model, cases in record["models"].items():
            for name, case in cases.items():
                if best := best_peer(case, ours, counted):
                    ratios[model, name, case["tokens"]] = best
        for group, belongs in GROUPS.items():
            inside = [best[1] for (_, name, tokens), best in ratios.items() if belongs(name, tokens)]
            if inside:
                mean = statistics.geometric_mean(inside)
                lines.append(f"{ours}, {group}: {mean:.2f} (geometric mean of {len(inside)}; least {min(inside):.2f})")
        behind = [
            f"{model} {name}: {ratio:.2f} ({engine})"
            for (model, name, _), (engine, ratio) in ratios.items()
            if ratio < 1
        ]
        if ratios:
            lines.append(
                f"{ours}, behind in {len(behind)} of {len(ratios)} cases" + "".join(f"\n    {x}" for x in behind)
            )
    return lines


def table(record: dict[str, Any]) -> str:
    """A row per model and case: fastbert's time and share, and the best peer of each precision with its ratio."""
    header = ["model", "case", "fp32 ms", "share", "best fp32 peer", "ratio", "int8 ms", "share", "best peer", "ratio"]
    rows = []
    for model, cases in record["models"].items():
        for name, case in cases.items():
            row = [model, name]
            for ours in ("fp32", "int8"):
                mine = case["engines"].get(f"{OURS} {ours}")
                best = best_peer(case, ours, record["counted"])
                if mine is None:
                    row += [""] * 4
                    continue
                row.append(f"{mine['ms']['median']:.3g}")
                row.append(f"{case['limit_ms'][ours] / mine['ms']['median']:.0%}" if ours in case["limit_ms"] else "")
                if best is None:
                    row += ["", ""]
                else:
                    peer = case["engines"][best[0]]
                    low, high = peer["ratio"][ours]["low"], peer["ratio"][ours]["high"]
                    row += [f"{best[0]} {peer['ms']['median']:.3g}", f"{best[1]:.2f} ({low:.2f} .. {high:.2f})"]
            rows.append(row)
    return markdown(header, rows)


def engine_table(record: dict[str, Any]) -> str:
    """Milliseconds of every engine."""
    columns = list(
        dict.fromkeys(name for cases in record["models"].values() for c in cases.values() for name in c["engines"])
    )
    rows = [
        [model, name, *(f"{case['engines'][c]['ms']['median']:.3g}" if c in case["engines"] else "" for c in columns)]
        for model, cases in record["models"].items()
        for name, case in cases.items()
    ]
    return markdown(["model", "case", *columns], rows)


def run(args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    engines = [OURS, *args.engines]
    record: dict[str, Any] = {
        "environment": environment(),
        "threads": args.threads,
        "cores": pin(args.threads),
        "isa cap": args.isa,
        "strict": not args.split,
        "counted": [
            f"{engine} {precision}"
            for engine in args.engines
            for precision in (ENGINES[engine].capped if args.isa else ENGINES[engine].precisions)
        ],
        "skipped": {},
        "models": {},
    }
    roofline = Roofline.measure(record["environment"]["isa"], args.models, args.threads)
    record["peaks"] = roofline and roofline._asdict()
    calibration = batch_of(*[32] * 32)
    for model in args.models:
        folder = cache / model
        if not (folder / "hf" / "model.safetensors").exists():
            write_folder(model, folder / "hf")
        task = Task(folder / "hf", folder, args.threads, calibration, strict=not args.split)
        loaded = {}
        for engine in tqdm(engines, f"{model}: load", leave=False):
            for precision in ENGINES[engine].precisions:
                try:
                    loaded[engine, precision] = load(engine, task, precision)
                except Unavailable as reason:
                    record["skipped"][f"{engine} {precision}"] = str(reason)
        record["models"][model] = {}
        for case in args.cases:
            contestants = measure(
                CASES[case], loaded, record["counted"], args.seconds, args.threads, f"{model}, {case}"
            )
            tokens = len(CASES[case].ids)
            limits = {p: 1e3 * roofline.seconds(model, case, p) for p in roofline.operations} if roofline else {}
            if args.split:
                limits.pop("fp32", None)
            record["models"][model][case] = {
                "tokens": tokens,
                "limit_ms": limits,
                "engines": results(contestants, tokens),
            }
        del loaded
    installed = {package for e in engines if not missing_packages(e) for package in ENGINES[e].packages}
    record["environment"] = environment(*sorted(installed - {"fastbert-cpu"}))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = [engine for engine in ENGINES if engine != OURS]
    parser.add_argument("--quick", action="store_true", help=f"less of everything: {QUICK}")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--engines", nargs="*", choices=peers, default=peers)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="for the rounds of a case (default 6)")
    parser.add_argument("--isa", choices=["avx2"], help="cap fastbert, and the others where they can be")
    parser.add_argument("--split", action="store_true", help="fp32 models of fastbert with strict=False")
    parser.add_argument("--cache", type=Path, help="folder to keep converted models in; a temporary one by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the machine here")
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args()
    if args.isa:  # read by the libraries when they are loaded, which they are not yet
        for engine in [OURS, *args.engines]:
            os.environ.update(ENGINES[engine].avx2)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temp:
        record = run(args, args.cache or Path(temp))
    record["seconds"] = round(time.monotonic() - began)
    where = record["environment"]
    print(
        f"\n{where['cpu']}, {where['isa']}, {args.threads} thread(s), commit {where['commit']}, {record['seconds']} s\n"
    )
    print(table(record), "\n")
    print(engine_table(record), "\n")
    for engine, reason in record["skipped"].items():
        print(f"skipped: {engine}: {reason}")
    if args.isa:
        print(f"capped to {args.isa} and counted: {', '.join(record['counted'])}")
    print(*summary(record), sep="\n")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
