"""Makes tests/golden/heads.npz, heads.json, answers.json: what transformers and sentence-transformers give in float64.

    pip install torch transformers sentence-transformers
    python -m tests.make_golden_heads                      # heads.npz, heads.json
    pip install "transformers<5"                           # in an environment of its own: the last with this pipeline
    python -m tests.make_golden_heads question-answering   # answers.json

heads.npz: a ragged batch and for each head the logits, every sequence run by itself, without padding. The .json files:
inputs, and the results of the pipelines and of CrossEncoder for them.
"""

import json
import random
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import models
from tests.make_golden import GOLDEN
from tests.models import Batch

MAX_TOKENS = 64
LABELS = {
    "BertForSequenceClassification": ("negative", "neutral", "positive"),
    "BertForTokenClassification": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"),
}
STRATEGIES = ("none", "simple", "first", "average", "max")
LENGTHS = (1, 2, 7, 19)
WORDS = [word for word in models.VOCABULARY if word.isalpha()]
ODD_WORDS = "naïve CAFÉ 日本語 🙂 unhelpfulness Oil.Water (and) it's tion long-lessness ﬁn".split()


def case(head: str, **more: Any) -> dict[str, Any]:
    """What models.write_model is called with."""
    config: dict[str, Any] = {"architectures": [head], "max_position_embeddings": MAX_TOKENS, "layer_norm_eps": 1e-6}
    if head in LABELS:
        config["id2label"] = {str(i): label for i, label in enumerate(LABELS[head])}
    prefix = "bert." if head in models.HEADS else ""
    return config | {"seed": 9, "prefix": prefix, "hidden_size": 48, "num_attention_heads": 3} | more


def write(folder: Path, head: str, **more: Any) -> models.Model:
    model = models.write_model(folder, **case(head, **more))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": MAX_TOKENS, "tokenizer_class": "BertTokenizer"})
    )
    return model


def texts(n: int, seed: int, most: int = 40) -> list[str]:
    """Words of the vocabulary and others, of 0 to `most`; one in five is longer than MAX_TOKENS tokens."""
    rng = random.Random(seed)

    def text() -> str:
        count = rng.randint(MAX_TOKENS, 3 * MAX_TOKENS) if rng.random() < 0.2 else rng.randint(0, most)
        words = [rng.choice(ODD_WORDS) if rng.random() < 0.15 else rng.choice(WORDS) for _ in range(count)]
        return " ".join(word.title() if rng.random() < 0.2 else word for word in words)

    return [text() for _ in range(n)]


def masked_texts(n: int, seed: int) -> list[str]:
    """Texts with one to three masks among the first words; one in five is longer than MAX_TOKENS tokens."""
    rng = random.Random(seed)
    result = []
    for _ in range(n):
        words = rng.choices(WORDS, k=2 * MAX_TOKENS if rng.random() < 0.2 else rng.randint(0, 30))
        for _ in range(rng.choice((1, 1, 2, 3))):
            words.insert(rng.randint(0, min(30, len(words))), "[MASK]")
        result.append(" ".join(words))
    return result


def questions(n: int, seed: int) -> list[tuple[str, str]]:
    """(question, context), neither empty; some contexts take several windows."""
    rng = random.Random(seed)
    contexts = [text or "the cat" for text in texts(n, seed)]
    return [(" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) + "?", context) for context in contexts]


# ---- the judge ----


def load(folder: Path, head: str) -> tuple[Any, Any]:
    """The model in float64 and its tokenizer."""
    import torch
    import transformers

    torch.set_num_threads(1)
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    model = getattr(transformers, head).from_pretrained(folder, **options).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def run(model: Any, inputs: dict[str, Any]) -> NDArray[np.float64]:
    """Logits of one sequence, without the batch axis; start and end logits side by side."""
    import torch

    with torch.inference_mode():
        out = model(**inputs)
    if "start_logits" in out:
        return torch.stack([out.start_logits[0], out.end_logits[0]], dim=-1).numpy()
    return out.logits[0].numpy()


def pipeline(task: str, model: Any, tokenizer: Any) -> Any:
    import transformers

    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")


# ---- the files ----


def head_logits(head: str, batch: Batch) -> NDArray[np.float64]:
    """[batch, classes] or [tokens, classes]."""
    import torch

    with tempfile.TemporaryDirectory() as temp:
        write(Path(temp), head)
        model, _ = load(Path(temp), head)
    rows = []
    for a, b in pairwise(batch.offsets):
        ids, types = (torch.from_numpy(x[None, a:b].astype(np.int64)) for x in (batch.ids, batch.type_ids))
        rows.append(run(model, {"input_ids": ids, "token_type_ids": types, "attention_mask": torch.ones_like(ids)}))
    return np.stack(rows) if rows[0].ndim == 1 else np.concatenate(rows)


def pipelines() -> dict[str, Any]:
    from sentence_transformers import CrossEncoder

    found: dict[str, Any] = {"texts": texts(6, 1), "masked": masked_texts(6, 2)}
    with tempfile.TemporaryDirectory() as temp:
        head = "BertForSequenceClassification"
        write(Path(temp), head)
        run_pipeline = pipeline("text-classification", *load(Path(temp), head))
        found["classes"] = run_pipeline(found["texts"], top_k=None, truncation=True)
        inputs = [{"text": a, "text_pair": b} for a, b in pairwise(found["texts"])]
        found["pair_classes"] = run_pipeline(inputs, top_k=None, truncation=True)
    with tempfile.TemporaryDirectory() as temp:
        head = "BertForTokenClassification"
        write(Path(temp), head)
        run_pipeline = pipeline("token-classification", *load(Path(temp), head))
        found["tokens"] = {
            strategy: run_pipeline(found["texts"], aggregation_strategy=strategy) for strategy in STRATEGIES
        }
        found["windows"] = run_pipeline(found["texts"], aggregation_strategy="first", stride=10)
    with tempfile.TemporaryDirectory() as temp:
        head = "BertForMaskedLM"
        write(Path(temp), head)
        found["fillings"] = pipeline("fill-mask", *load(Path(temp), head))(
            found["masked"], tokenizer_kwargs={"truncation": True}
        )
    with tempfile.TemporaryDirectory() as temp:
        write(Path(temp), "BertForSequenceClassification", id2label={"0": "LABEL_0"})
        encoder = CrossEncoder(temp, device="cpu").double()
        found["scores"] = encoder.predict(list(pairwise(found["texts"])))
        found["ranks"] = encoder.rank(found["texts"][0], found["texts"][1:], return_documents=True)
    return found


def answers() -> dict[str, Any]:
    pairs = questions(10, 3)
    with tempfile.TemporaryDirectory() as temp:
        head = "BertForQuestionAnswering"
        write(Path(temp), head)
        ask = pipeline("question-answering", *load(Path(temp), head))
        many = [{"question": question, "context": context} for question, context in pairs]
        found = {
            "best": ask(many),
            "three": ask(many, top_k=3),
            "impossible": ask(many, top_k=3, handle_impossible_answer=True),
            "tokens": ask(many, top_k=2, align_to_words=False, doc_stride=5, max_answer_len=3, max_seq_len=40),
        }
    return {"pairs": pairs} | found


def plain(value: Any) -> Any:
    """For JSON: Python's numbers, nine digits of them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    return float(f"{value:.9g}") if isinstance(value, float | np.floating) else value


def main() -> None:
    import torch
    import transformers

    judges = [f"{module.__name__} {module.__version__}" for module in (torch, transformers)]
    if sys.argv[1:] == ["question-answering"]:
        files = {"answers.json": answers()}
    else:
        batch = models.random_batch(LENGTHS, len(models.VOCABULARY), seed=9)
        logits = {head: head_logits(head, batch) for head in models.HEADS}
        np.savez_compressed(GOLDEN / "heads.npz", **batch._asdict(), **logits, judges=np.array(judges))
        files = {"heads.json": pipelines()}
    for name, found in files.items():
        text = json.dumps(plain({"judges": judges} | found), ensure_ascii=False)
        (GOLDEN / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
