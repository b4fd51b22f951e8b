"""Runs the fuzzing targets (see targets.py)."""

import argparse
import hashlib
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.fuzz.targets import Target, Targets

# Values at the borders of fields, and bytes with a meaning in one of the formats.
BORDERS = [
    n.to_bytes(size, order)
    for size in (1, 2, 4, 8)
    for n in (0, 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1, (1 << 8 * size) - 1)
    for order in ("little", "big")
]
WORDS = [
    b"PK\1\2",
    b"PK\3\4",
    b"PK\5\6",
    b"PK\6\7",
    b"\x80\x02",
    b"}",
    b"(",
    b"u",
    b"s",
    b"t",
    b"Q",
    b"R",
    b"h\0",
    b"q\0",
]
WORDS += [b"[", b"]", b"{", b'"', b":", b",", b"-", b"9" * 20, b"null", b"true", b"\\ud800", b"\xff", b"\n", b"1e999"]


def mutate(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """A few changes: bits, borders, words, pieces cut out, doubled, or from another seed."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(out) + 1))
        piece = int(2 ** rng.uniform(0, 6))
        kind = rng.integers(7)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            value = BORDERS[rng.integers(len(BORDERS))]
            out[at : at + len(value)] = value
        elif kind == 2:
            out[at:at] = WORDS[rng.integers(len(WORDS))]
        elif kind == 3:
            del out[at : at + piece]
        elif kind == 4:
            out[at:at] = out[at : at + piece] * int(rng.integers(1, 4))
        elif kind == 5:
            start = int(rng.integers(len(other) + 1))
            out[at : at + piece] = other[start : start + piece]
        else:
            del out[at:]
    return bytes(out)


def run_one(target: Target, data: bytes) -> None:
    try:
        target.run(data)
    except (ValueError, OSError):
        pass


def run_mutations(target: Target, seed: int, keep: Path, *, seconds: float = math.inf, count: float = math.inf) -> int:
    """The number of inputs tried, until either limit. Inputs whose error is new become seeds."""
    rng = np.random.default_rng(seed)
    corpus, known, tried = list(target.seeds), set(), 0
    end = time.monotonic() + seconds
    while tried < count and time.monotonic() < end:
        data = mutate(rng, corpus[rng.integers(len(corpus))], corpus[rng.integers(len(corpus))])
        tried += 1
        start = time.process_time()
        try:
            target.run(data)
            kind = "accepted"
        except (ValueError, OSError) as error:
            kind = "".join(c for c in str(error) if not c.isdigit())[-60:]
        except BaseException:
            keep.mkdir(parents=True, exist_ok=True)
            path = keep / hashlib.sha256(data).hexdigest()[:16]
            path.write_bytes(data)
            print(f"failed on {path}", file=sys.stderr)
            raise
        if time.process_time() - start > 5:
            raise TimeoutError(f"an input of {len(data)} bytes took more than 5 s")
        if len(data) < 1 << 16 and kind not in known and len(corpus) < 500:
            known.add(kind)
            corpus.append(data)
    return tried


def run_atheris(name: str, folder: Path, seconds: float, seed: int, keep: Path) -> None:
    import atheris

    for module in [module for module in sys.modules if module.startswith(("fastbert", "tests.fuzz.targets"))]:
        del sys.modules[module]  # to be imported again, with counters
    with atheris.instrument_imports(include=["fastbert"]):
        from tests.fuzz.targets import Targets
    target = Targets(folder).all[name]
    corpus = keep / f"corpus-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(target.seeds):
        (corpus / f"seed{i}").write_bytes(data)
    options = [
        f"-max_total_time={int(seconds)}",
        f"-seed={seed}",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-max_len=16384",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={keep}/", str(corpus)], lambda data: run_one(target, data))
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="default: all")
    parser.add_argument("--seconds", type=float, default=5, help="for each target (default: 5)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="for inputs that failed")
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; needs --target")
    parser.add_argument("--input", type=Path, help="run one input")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastbert-fuzz-") as folder:
        if args.atheris:
            run_atheris(args.target, Path(folder), args.seconds, args.seed, args.keep)
            return
        targets = Targets(Path(folder)).all
        for name in [args.target] if args.target else targets:
            if args.input:
                targets[name].run(args.input.read_bytes())
                continue
            tried = run_mutations(targets[name], args.seed, args.keep, seconds=args.seconds)
            print(f"{name}: {tried} inputs", flush=True)


if __name__ == "__main__":
    main()
