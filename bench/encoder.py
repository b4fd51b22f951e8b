"""Whole forward passes, fastbert against other engines: same weights, same token ids, same threads, one run.

    pip install . torch transformers onnxruntime onnx onnxscript
    python -m bench.encoder [--models tiny minilm base] [--threads 1] [--rounds 15] [--json FILE]

One ragged batch of 64 texts: their lengths are the 64-quantiles of a log-normal distribution (median 24 tokens, sigma
0.8, cut to 4 .. 128), shuffled. Token ids are given, so that tokenisation is not timed; the output is
last_hidden_state. An engine that has to pad may choose how: its variants are tried first, the fastest one competes.
Outputs are compared before anything is timed. Then the engines take turns, round by round, pinned to as many cores as
there are threads. Figures are medians of milliseconds per batch, with quartiles; a ratio is the median over rounds of
the other engine's time by fastbert's of the same round: above 1, fastbert is faster.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bench.common import environment, markdown, pin, spread
from fastbert import _core
from tests import models
from tests.models import Batch, Model

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2},
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
}
VOCAB_SIZE = 30522
TEXTS = 64
TRIALS = 3  # runs of each variant before the fastest is chosen


class Variant(NamedTuple):
    """One way in which an engine can run the batch."""

    name: str
    run: Callable[[], Any]  # what is timed
    rows: Callable[[Any], NDArray[np.float32]]  # what run returned, as ragged rows [tokens, hidden]


def log_normal_batch(texts: int = TEXTS) -> Batch:
    quantiles = [statistics.NormalDist().inv_cdf((i + 0.5) / texts) for i in range(texts)]
    lengths = np.clip(np.rint(24 * np.exp(0.8 * np.array(quantiles))), 4, 128).astype(int)
    order = np.argsort(np.random.PCG64(0).random_raw(texts))
    return models.random_batch(lengths[order], VOCAB_SIZE)


# ---- fastbert ----


def fastbert(shape: dict[str, Any], model: Model, batch: Batch, threads: int, cache: Path) -> list[Variant]:
    core = _core.Model(model.config, model.tensors())

    def run() -> NDArray[np.float32]:
        return core.forward(*batch, hidden=True, threads=threads)[0]

    return [Variant(f"{core.isa}, ragged", run, lambda rows: rows)]


# ---- ONNX Runtime: exported once, fused by its own optimizer, padded in several ways ----


INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
MASK_INPUT = {"EmbedLayerNormalization": 7, "Attention": 3, "MultiHeadAttention": 4}  # operator -> position, the last


def export_onnx(shape: dict[str, Any], model: Model, path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(**models.bert_config(**shape), attn_implementation="eager")  # the form that ORT's fusions know
    bert = BertModel(config, add_pooling_layer=False).eval()
    weights = {name: torch.from_numpy(w) for name, w in model.weights.items() if not name.startswith("pooler.")}
    bert.load_state_dict(weights)

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, input_ids: Any, token_type_ids: Any, attention_mask: Any) -> Any:
            return self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state

    torch.onnx.export(
        LastHiddenState(),
        (torch.ones((2, 8), dtype=torch.int64),) * len(INPUTS),
        str(path),
        input_names=INPUTS,
        output_names=["last_hidden_state"],
        dynamic_axes={name: {0: "batch", 1: "seq"} for name in [*INPUTS, "last_hidden_state"]},
        dynamo=False,  # the form that ORT's fusions know
    )


def fuse_onnx(path: Path, fused: Path, config: dict[str, Any], attention: str, masked: bool) -> None:
    """ORT's transformer optimizer, with the attention operator named; a graph that is not fully fused is an error.
    Without the mask the operators take shorter ways, for batches that need no padding."""
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.use_multi_head_attention = attention == "MultiHeadAttention"
    sizes = {"num_heads": config["num_attention_heads"], "hidden_size": config["hidden_size"]}
    optimized = optimize_model(str(path), "bert", optimization_options=options, opt_level=0, **sizes)
    layers = config["num_hidden_layers"]
    expected = {
        "EmbedLayerNormalization": 1,
        attention: layers,
        "BiasGelu": layers,
        "SkipLayerNormalization": 2 * layers,
    }
    counts = optimized.get_fused_operator_statistics()
    if found := {name: counts[name] for name, n in expected.items() if counts[name] != n}:
        raise RuntimeError(f"ONNX Runtime's optimizer: expected {expected}, got {found}")
    if not masked:
        for node in optimized.nodes():
            if node.op_type in MASK_INPUT:
                del node.input[MASK_INPUT[node.op_type] :]
    optimized.save_model_to_file(str(fused))


def groups_of(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return np.split(order, range(size, len(order), size))


def onnxruntime(shape: dict[str, Any], model: Model, batch: Batch, threads: int, cache: Path) -> list[Variant]:
    import onnxruntime as ort

    lengths = np.diff(batch.offsets)
    order = np.argsort(lengths, kind="stable")
    padded = {f"sorted, {size} a batch": groups_of(order, size) for size in (4, 8, 16)} | {"one padded batch": [order]}
    equal = {
        "batches of equal lengths": np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1),
        "one by one": groups_of(order, 1),
    }
    graphs = [
        (attention, masked, ways)
        for attention in ("Attention", "MultiHeadAttention")
        for masked, ways in ((True, padded), (False, equal))
    ]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    exported = cache / f"L{shape['num_hidden_layers']}_H{shape['hidden_size']}.onnx"
    if not exported.exists():
        export_onnx(shape, model, exported)
    variants = []
    for attention, masked, ways in graphs:
        fused = exported.with_stem(f"{exported.stem}_{attention}{'' if masked else '_unmasked'}")
        if not fused.exists():
            fuse_onnx(exported, fused, model.config, attention, masked)
        session = ort.InferenceSession(str(fused), options, providers=["CPUExecutionProvider"])
        for way, groups in ways.items():
            feeds = [padded_inputs(batch, group) for group in groups]

            def run(session: Any = session, feeds: list[Any] = feeds) -> list[NDArray[np.float32]]:
                return [session.run(None, inputs)[0] for inputs in feeds]

            def rows(outputs: list[NDArray[np.float32]], groups: Any = groups) -> NDArray[np.float32]:
                by_text = {
                    i: x[: lengths[i]]
                    for group, out in zip(groups, outputs, strict=True)
                    for i, x in zip(group, out, strict=True)
                }
                return np.concatenate([by_text[i] for i in range(len(lengths))])

            variants.append(Variant(f"{attention}, {way}", run, rows))
    return variants


def padded_inputs(batch: Batch, group: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """The texts of a group, padded to its longest."""
    spans = [(batch.offsets[i], batch.offsets[i + 1]) for i in group]
    inputs = {name: np.zeros((len(spans), max(b - a for a, b in spans)), np.int64) for name in INPUTS}
    for row, (a, b) in enumerate(spans):
        inputs["input_ids"][row, : b - a] = batch.ids[a:b]
        inputs["token_type_ids"][row, : b - a] = batch.type_ids[a:b]
        inputs["attention_mask"][row, : b - a] = 1
    return inputs


Engine = Callable[[dict[str, Any], Model, Batch, int, Path], list[Variant]]
ENGINES: dict[str, tuple[Engine, tuple[str, ...]]] = {  # and the packages whose versions count
    "fastbert": (fastbert, ()),
    "onnxruntime": (onnxruntime, ("onnxruntime", "torch", "transformers")),
}


# ---- measuring ----


def milliseconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def measure(
    shape: dict[str, Any], engines: list[str], threads: int, rounds: int, cache: Path, label: str
) -> dict[str, Any]:
    shape = shape | {"vocab_size": VOCAB_SIZE, "intermediate_size": 4 * shape["hidden_size"]}
    model, batch = models.random_model(seed=1, **shape), log_normal_batch()
    chosen: dict[str, Variant] = {}
    trials: dict[str, dict[str, float]] = {}
    expected = None
    for engine in tqdm(engines, desc=f"{label}: load, check, try", leave=False):
        variants = ENGINES[engine][0](shape, model, batch, threads, cache)
        for variant in variants:
            rows = variant.rows(variant.run())
            expected = rows if expected is None else expected
            # Float32 noise of these models is some 1e-6 (bench/accuracy.py); a mistake, even in one text, is far above.
            if not np.abs(rows - expected).max() < 1e-4:
                raise RuntimeError(f"{label}, {engine}, {variant.name}: another result than {engines[0]}")
        fastest = np.min([[milliseconds(variant.run) for variant in variants] for _ in range(TRIALS)], axis=0)
        trials[engine] = {variant.name: ms for variant, ms in zip(variants, fastest.tolist(), strict=True)}
        chosen[engine] = min(variants, key=lambda v: trials[engine][v.name])

    samples: dict[str, list[float]] = {engine: [] for engine in engines}
    for i in tqdm(range(rounds), desc=f"{label}: rounds", leave=False):
        for engine in engines if i % 2 else reversed(engines):
            samples[engine].append(milliseconds(chosen[engine].run))
    return {
        "tokens": int(batch.offsets[-1]),
        "lengths": [int(b - a) for a, b in pairwise(batch.offsets)],
        "engines": {
            engine: {
                "variant": chosen[engine].name,
                "ms": spread(samples[engine]),
                "ratio": spread([other / own for other, own in zip(samples[engine], samples[engines[0]], strict=True)]),
                "samples_ms": samples[engine],
                "trials_ms": trials[engine],
            }
            for engine in engines
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--against", nargs="*", choices=[e for e in ENGINES if e != "fastbert"], default=["onnxruntime"]
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cache", type=Path, help="folder to keep exported models in; a temporary one by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and the machine here")
    args = parser.parse_args()
    engines = ["fastbert", *args.against]
    packages = [package for engine in engines for package in ENGINES[engine][1]]
    record: dict[str, Any] = {
        "environment": environment(*packages),
        "threads": args.threads,
        "cores": pin(args.threads),
    }
    record["models"] = {}
    with tempfile.TemporaryDirectory() as temp:
        cache = args.cache or Path(temp)
        cache.mkdir(parents=True, exist_ok=True)
        for name in args.models:
            record["models"][name] = measure(MODELS[name], engines, args.threads, args.rounds, cache, name)
    rows = []
    for name, found in record["models"].items():
        for engine, result in found["engines"].items():
            cells = [
                f"{x['median']:.{d}f} ({x['low']:.{d}f} .. {x['high']:.{d}f})"
                for x, d in ((result["ms"], 1), (result["ratio"], 2))
            ]
            rows.append(
                [name, engine, result["variant"], *cells, f"{1e3 * found['tokens'] / result['ms']['median']:.0f}"]
            )
    where = record["environment"]
    print(f"\n{where['cpu']}, {where['isa']}, {args.threads} thread(s), commit {where['commit']}\n")
    print(markdown(["model", "engine", "variant", "ms per batch", "ratio to fastbert", "tokens/s"], rows))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
