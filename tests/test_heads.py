"""Task heads: transformers (golden files) == reference.py, the engine == reference.py, pipelines == the task classes.

Tolerance: as in test_bert.py, weights moved by 2^-20 show what float32 may cost in a logit: no more than LOGIT here, as
test_200_inputs checks. A probability moves by at most half of what its logits do: SCORE.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastbert import (
    CrossEncoder,
    MaskedLM,
    NextSentence,
    QuestionAnswerer,
    SequenceClassifier,
    TokenClassifier,
    _core,
)
from fastbert.heads import TaskModel
from fastbert.tokenizer import TokenBatch
from tests import make_golden_heads as golden
from tests import models, reference
from tests.make_golden import GOLDEN
from tests.models import Batch, Model
from tests.reference import Outputs
from tests.toolchain import ROOT

CLASSES: dict[str, type[TaskModel]] = {
    "BertForSequenceClassification": SequenceClassifier,
    "BertForTokenClassification": TokenClassifier,
    "BertForQuestionAnswering": QuestionAnswerer,
    "BertForMaskedLM": MaskedLM,
    "BertForNextSentencePrediction": NextSentence,
}
each_head = pytest.mark.parametrize("head", CLASSES)
LOGIT = 2.0**-14
SCORE = LOGIT / 2


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the random model with a head."""

    @cache
    def folder(head: str) -> Path:
        path = tmp_path_factory.mktemp(head)
        if head == "CrossEncoder":
            golden.write(path, "BertForSequenceClassification", id2label={"0": "LABEL_0"})
        else:
            golden.write(path, head)
        return path

    return folder


@cache
def load(folder: Path, head: str, **options: Any) -> Any:
    return {**CLASSES, "CrossEncoder": CrossEncoder}[head](folder, **options)


@cache
def recorded(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def agree(result: Any, expected: Any, place: str = "result") -> None:
    """The same structure, words and numbers of characters; scores within SCORE."""
    if isinstance(expected, dict):
        assert result.keys() == expected.keys(), place
        for key, value in expected.items():
            agree(result[key], value, f"{place}[{key!r}]")
    elif isinstance(expected, list):
        assert isinstance(result, list) and len(result) == len(expected), f"{place}: {result} != {expected}"
        for i, value in enumerate(expected):
            agree(result[i], value, f"{place}[{i}]")
    elif isinstance(expected, float | np.floating):
        assert isinstance(result, float) and abs(result - expected) <= SCORE, f"{place}: {result} != {expected}"
    else:
        assert type(result) is type(expected) and result == expected, f"{place}: {result!r} != {expected!r}"


def bits(x: Any) -> bytes:
    return np.ascontiguousarray(x).tobytes()


# ---- logits ----


def in_memory(head: str) -> Model:
    case = golden.case(head)
    case.pop("prefix")
    return models.random_model(**case)


@each_head
def test_reference_is_transformers(head: str) -> None:
    file, model = np.load(GOLDEN / "heads.npz"), in_memory(head)
    batch = Batch(file["ids"], file["offsets"], file["type_ids"])
    logits = reference.logits(model.config, model.weights, reference.forward(model.config, model.weights, *batch))
    assert logits.shape == file[head].shape
    assert np.abs(logits - file[head]).max() <= 1e-13 * np.abs(file[head]).max()


def ragged(loaded: TaskModel, firsts: list[str], seconds: list[str] | None) -> Batch:
    batch = loaded.tokenizer.encode_batch(firsts, seconds)
    return Batch(batch.ids, batch.offsets, batch.type_ids)


def moved(model: Model) -> Model:
    """The weights off by a relative 2^-20 each: see test_bert.py."""
    rng = np.random.Generator(np.random.PCG64(0))
    return model._replace(
        weights={name: w * (1 + 2.0**-20 * rng.uniform(-1, 1, w.shape)) for name, w in model.weights.items()}
    )


def exact_logits(model: Model, batch: Batch) -> NDArray[np.float64]:
    outputs: Outputs = reference.forward(model.config, model.weights, *batch)
    return reference.logits(model.config, model.weights, outputs)


def inputs(head: str, seed: int = 5) -> tuple[list[str], list[str] | None]:
    """200 texts or pairs for a head; some are cut."""
    if head == "BertForMaskedLM":
        return golden.masked_texts(200, seed), None
    if head == "BertForQuestionAnswering":
        questions, contexts = zip(*golden.questions(200, seed), strict=True)
        return [*questions], [*contexts]
    texts = golden.texts(200, seed)
    return texts, texts[1:] + texts[:1] if head == "BertForNextSentencePrediction" else None


CASES = {
    **{head: (head, *inputs(head)) for head in CLASSES},
    "pairs": ("BertForSequenceClassification", golden.texts(200, 6), golden.texts(200, 7)),
}


def logits_of(loaded: Any, firsts: list[str], seconds: list[str] | None) -> NDArray[np.float32]:
    """All rows, one below the other."""
    if isinstance(loaded, QuestionAnswerer):
        return np.concatenate([loaded.logits(*pair) for pair in zip(firsts, seconds or [], strict=True)])
    rows = loaded.logits(firsts) if seconds is None else loaded.logits(firsts, seconds)
    return np.concatenate(rows) if isinstance(rows, list) else rows


@pytest.mark.parametrize("name", CASES)
def test_200_inputs(name: str, folders: Callable[[str], Path]) -> None:
    """From text to logits; the specification runs on the same ids."""
    head, firsts, seconds = CASES[name]
    loaded, model = load(folders(head), head), in_memory(head)
    batch = ragged(loaded, firsts, seconds)
    assert len(batch.offsets) == 201 and np.diff(batch.offsets).max() == golden.MAX_TOKENS
    exact = exact_logits(model, batch)
    limit = 2 * np.abs(exact_logits(moved(model), batch) - exact).max()
    assert limit <= LOGIT
    if head == "BertForMaskedLM":
        exact = exact[batch.ids == models.VOCABULARY.index("[MASK]")]
    result = logits_of(loaded, firsts, seconds)
    assert result.dtype == np.float32 and result.shape == exact.shape
    assert np.abs(result - exact).max() <= limit


# ---- the pipelines, as recorded ----


def test_classes(folders: Callable[[str], Path]) -> None:
    classifier, file = (
        load(folders("BertForSequenceClassification"), "BertForSequenceClassification"),
        recorded("heads.json"),
    )
    texts = file["texts"]
    agree(classifier(texts, top_k=None), file["classes"])
    agree(classifier(texts[:-1], texts[1:], top_k=None), file["pair_classes"])
    agree(classifier(texts), [best[0] for best in file["classes"]])
    agree(classifier(texts[0], top_k=2), file["classes"][0][:2])


@pytest.mark.parametrize("strategy", golden.STRATEGIES)
def test_tokens(strategy: str, folders: Callable[[str], Path]) -> None:
    tagger, file = load(folders("BertForTokenClassification"), "BertForTokenClassification"), recorded("heads.json")
    results = tagger(file["texts"], aggregation_strategy=strategy)
    agree(results, file["tokens"][strategy])
    for text, result in zip(file["texts"], results, strict=True):
        assert all(0 <= entity["start"] < entity["end"] <= len(text) for entity in result)


def test_windows_of_tokens(folders: Callable[[str], Path]) -> None:
    tagger, file = load(folders("BertForTokenClassification"), "BertForTokenClassification"), recorded("heads.json")
    agree(tagger(file["texts"], aggregation_strategy="first", stride=10), file["windows"])
    assert any(len(a) > len(b) for a, b in zip(file["windows"], file["tokens"]["first"], strict=True)), "none is long"


def test_fillings(folders: Callable[[str], Path]) -> None:
    model, file = load(folders("BertForMaskedLM"), "BertForMaskedLM"), recorded("heads.json")
    agree(model.fill(file["masked"]), file["fillings"])
    single = next(i for i, text in enumerate(file["masked"]) if text.count("[MASK]") == 1)
    agree(model.fill(file["masked"][single], top_k=2), file["fillings"][single][:2])


def test_cross_encoder(folders: Callable[[str], Path]) -> None:
    encoder, file = load(folders("CrossEncoder"), "CrossEncoder"), recorded("heads.json")
    scores = encoder.predict(list(pairwise(file["texts"])))
    assert scores.dtype == np.float32
    agree(scores.tolist(), file["scores"])
    agree(encoder.rank(file["texts"][0], file["texts"][1:], return_documents=True), file["ranks"])


ANSWERS: dict[str, dict[str, Any]] = {
    "best": {},
    "three": {"top_k": 3},
    "impossible": {"top_k": 3, "handle_impossible_answer": True},
    "tokens": {"top_k": 2, "align_to_words": False, "doc_stride": 5, "max_answer_len": 3, "max_seq_len": 40},
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers(name: str, folders: Callable[[str], Path]) -> None:
    answerer, file = load(folders("BertForQuestionAnswering"), "BertForQuestionAnswering"), recorded("answers.json")
    questions, contexts = zip(*file["pairs"], strict=True)
    results = answerer(questions, contexts, **ANSWERS[name])
    for result, expected, context in zip(results, file[name], contexts, strict=True):
        agree(result, expected)
        for answer in [result] if name == "best" else result:
            assert context[answer["start"] : answer["end"]] == answer["answer"]


# ---- the judge itself, where it is installed ----


@pytest.fixture
def judged(folders: Callable[[str], Path]) -> Callable[[str, str], tuple[Any, Any]]:
    """A task class, and transformers' pipeline in float64, on the same folder."""
    pytest.importorskip("torch", reason="torch is not installed: the golden files stand for it")
    pytest.importorskip("transformers", reason="transformers is not installed: the golden files stand for it")

    def make(head: str, task: str) -> tuple[Any, Any]:
        folder = folders(head)
        return load(folder, head), golden.pipeline(task, *golden.load(folder, head))

    return make


def test_judge_logits(folders: Callable[[str], Path], judged: Any) -> None:
    """All heads, 200 inputs each, from text: transformers' tokenizer and model against ours."""
    for head, firsts, seconds in CASES.values():
        loaded, (model, tokenizer) = load(folders(head), head), golden.load(folders(head), head)
        result, done = logits_of(loaded, firsts, seconds), 0
        for i, text in enumerate(firsts):
            pair = None if seconds is None else [seconds[i]]  # in a list: a bare "" would count as no second text
            inputs = tokenizer([text], pair, truncation=True, return_tensors="pt")
            exact = golden.run(model, inputs)
            if head == "BertForMaskedLM":
                exact = exact[inputs["input_ids"][0].numpy() == tokenizer.mask_token_id]
            exact = np.atleast_2d(exact)
            assert np.abs(result[done : done + len(exact)] - exact).max() <= LOGIT, (head, text, pair)
            done += len(exact)
        assert done == len(result)


def test_judge_classes(judged: Any) -> None:
    classifier, pipeline = judged("BertForSequenceClassification", "text-classification")
    texts = golden.texts(200, 11)
    agree(classifier(texts, top_k=None), pipeline(texts, top_k=None, truncation=True))
    for function in ("sigmoid", "softmax", "none"):
        expected = pipeline(texts[:20], top_k=None, function_to_apply=function, truncation=True)
        agree(classifier(texts[:20], top_k=None, function_to_apply=function), expected)


@pytest.mark.parametrize("strategy", golden.STRATEGIES)
def test_judge_tokens(strategy: str, judged: Any) -> None:
    tagger, pipeline = judged("BertForTokenClassification", "token-classification")
    texts = golden.texts(200, 12)
    options: dict[str, Any] = {"aggregation_strategy": strategy}
    agree(tagger(texts, **options), plain(pipeline(texts, **options)))
    if strategy != "none":
        options |= {"stride": 7, "ignore_labels": ["MISC"]}
        agree(tagger(texts[:50], **options), plain(pipeline(texts[:50], **options)))


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def test_judge_fillings(judged: Any) -> None:
    model, pipeline = judged("BertForMaskedLM", "fill-mask")
    texts = golden.masked_texts(200, 13)
    agree(model.fill(texts), pipeline(texts, tokenizer_kwargs={"truncation": True}))
    targets = ["water", "oil", "[UNK]"]
    expected = pipeline(texts[:20], targets=targets, top_k=2, tokenizer_kwargs={"truncation": True})
    agree(model.fill(texts[:20], targets=targets, top_k=2), expected)


def test_judge_cross_encoder(folders: Callable[[str], Path]) -> None:
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    judge = package.CrossEncoder(str(folders("CrossEncoder")), device="cpu").double()
    encoder = load(folders("CrossEncoder"), "CrossEncoder")
    pairs = list(zip(golden.texts(200, 14), golden.texts(200, 15), strict=True))
    agree(encoder.predict(pairs, prompt="find: ").tolist(), judge.predict(pairs, prompt="find: ").tolist())
    agree(float(encoder.predict(pairs[0])), float(judge.predict(pairs[0])))
    agree(encoder.rank("oil", [b for _, b in pairs], top_k=9), judge.rank("oil", [b for _, b in pairs], top_k=9))


RELATIVES = [
    (kind, task)
    for kind in ("DistilBert", "Roberta", "XLMRoberta", "Camembert")
    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
]


@pytest.mark.parametrize("kind, task", RELATIVES)
def test_judge_relatives(kind: str, task: str, tmp_path: Path) -> None:
    """Random weights, saved by transformers; the heads of BERT's relatives on the same ids."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    labels = 2 if task == "QuestionAnswering" else 5
    sizes = {
        "vocab_size": len(models.VOCABULARY),
        "num_labels": labels,
        "pad_token_id": 1,
        "max_position_embeddings": 66,
    }
    shape = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 96}
    distil = {"dim": 48, "n_heads": 3, "n_layers": 2, "hidden_dim": 96}
    roberta = shape | {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
    config = getattr(transformers, f"{kind}Config")(**sizes, **(distil if kind == "DistilBert" else roberta))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}For{task}")(config).eval()
    for weight in model.parameters():  # biases are 0 and weights small at first
        weight.data.normal_(0, weight.shape[-1] ** -0.5 if weight.ndim == 2 else 0.5)
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(models.VOCABULARY), encoding="utf-8")
    loaded = CLASSES[f"BertFor{task}"](tmp_path)
    batch = models.random_batch((2, 7, 30, 60), len(models.VOCABULARY), 1, seed=3)
    batch = batch._replace(ids=np.maximum(batch.ids, 2))  # id 1 pads, and padding has no position of its own
    result = loaded._logits(loaded._encode(TokenBatch(batch.ids, batch.type_ids, batch.offsets, np.zeros(4, np.bool_))))
    model, rows = model.double(), []
    for a, b in pairwise(batch.offsets):
        ids = torch.from_numpy(batch.ids[None, a:b].astype(np.int64))
        rows.append(golden.run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    exact = np.concatenate([np.atleast_2d(row) for row in rows])
    assert result.shape == exact.shape and np.ptp(exact) > 0.1
    assert np.abs(result - exact).max() <= 1e-5 * np.abs(exact).max()


# ---- same text, same bits; int8 ----


def outcome(loaded: Any, firsts: list[str], seconds: list[str] | None, **options: Any) -> list[bytes]:
    """The bits of each input's logits."""
    if isinstance(loaded, QuestionAnswerer):
        return [repr(answer).encode() for answer in loaded(firsts, seconds, top_k=2, **options)]
    rows = loaded.logits(firsts, **options) if seconds is None else loaded.logits(firsts, seconds, **options)
    return [bits(row) for row in rows]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@each_head
def test_same_text_same_bits(head: str, precision: str, folders: Callable[[str], Path], monkeypatch: Any) -> None:
    """In any batch, order, number of threads, and on every kernel set."""
    firsts, seconds = (x and x[:40] for x in CASES[head][1:])
    expected = outcome(load(folders(head), head, precision=precision), firsts, seconds)
    assert len(set(expected)) > 30
    order = random.Random(1).sample(range(40), 40)
    for isa, supported in _core.isas():
        if not supported:
            continue
        monkeypatch.setenv("FASTBERT_ISA", isa)
        loaded = CLASSES[head](folders(head), precision=precision, threads=2)
        mixed = outcome(loaded, [firsts[i] for i in order], seconds and [seconds[i] for i in order], batch_size=3)
        assert mixed == [expected[i] for i in order], isa
        alone = outcome(loaded, firsts[:1], seconds and seconds[:1])
        assert alone == expected[:1], isa


@each_head
def test_int8_encoder_under_a_float32_head(head: str, folders: Callable[[str], Path]) -> None:
    """The head on what an int8 encoder gives: the specification's head on the engine's own hidden states."""
    _, firsts, seconds = CASES[head]
    firsts, seconds = firsts[:20], seconds and seconds[:20]
    loaded, model = load(folders(head), head, precision="int8"), in_memory(head)
    batch = ragged(loaded, firsts, seconds)
    hidden, pooled, _ = loaded._model.forward(*batch, hidden=True, pooler=True)
    outputs = Outputs(hidden.astype(np.float64), pooled.astype(np.float64), None)
    exact = reference.logits(model.config, model.weights, outputs)
    if head == "BertForMaskedLM":
        exact = exact[batch.ids == models.VOCABULARY.index("[MASK]")]
    result = logits_of(loaded, firsts, seconds)
    assert np.abs(result - exact).max() <= LOGIT
    fp32 = logits_of(load(folders(head), head), firsts, seconds)
    assert 1e-4 < np.abs(result - fp32).max() < 0.5


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 128, 5), (17, 33, 40), (1000, 768, 3)])
def test_linear(shape: tuple[int, int, int]) -> None:
    """A layer with activation and LayerNorm against float64: no split of the work changes a bit."""
    out, columns, rows = shape
    rng = np.random.default_rng(0)
    weight, bias, gamma, beta, x = (
        rng.standard_normal(size).astype(np.float32) for size in ((out, columns), out, out, out, (rows, columns))
    )
    weight /= np.float32(np.sqrt(columns))

    def tensor(array: NDArray[np.float32]) -> tuple[Any, str, tuple[int, ...]]:
        return array, "F32", array.shape

    exact = reference.gelu(x.astype(np.float64) @ weight.T.astype(np.float64) + bias)
    plain_layer = _core.Linear(tensor(weight), tensor(bias), act="gelu")
    limit = (columns + 2) * 2.0**-24 * (np.abs(x) @ np.abs(weight.T) + np.abs(bias)).max() * 1.13 + 2.0**-20
    assert np.abs(plain_layer(x) - exact).max() <= limit
    normed = _core.Linear(tensor(weight), tensor(bias), (tensor(gamma), tensor(beta)), act="gelu", layer_norm_eps=1e-5)
    result = normed(x, threads=1)
    exact = reference.layer_norm(plain_layer(x).astype(np.float64), gamma, beta, 1e-5)
    assert np.abs(result - exact).max() <= 1e-4
    assert bits(normed(x, threads=2)) == bits(result)
    assert [bits(normed(x[i : i + 1])) for i in range(rows)] == [bits(row) for row in result]
    assert normed(x[:0]).shape == (0, out)


def test_half_precision_weights() -> None:
    rng = np.random.default_rng(0)
    half = rng.standard_normal((3, 8)).astype(np.float16)
    x = rng.standard_normal((2, 8)).astype(np.float32)
    single = half.astype(np.float32)
    a, b = (_core.Linear((w, dtype, w.shape))(x) for w, dtype in ((half, "F16"), (single, "F32")))
    assert bits(a) == bits(b)


# ---- real weights ----


def embeddings_that_give(x: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Embedding tables and their LayerNorm under which token i, at any position, comes out of the embeddings as x[i].

    With u = 1 / gamma the rows of (x - beta) u must have mean 0, which fixes u and a constant c = beta . u by linear
    equations; scaled to a variance below 1, they are LN(e) of e = s (x - beta) u, s^2 = eps / (1 - variance).
    """
    n, hidden = x.shape
    equations = np.hstack([x, -np.ones((n, 1))])
    start = np.append(np.ones(hidden), x.sum(axis=1).mean())
    *u, c = start - np.linalg.lstsq(equations, equations @ start, rcond=None)[0]
    beta = c / (hidden * np.array(u))
    centred = (x - beta) * u
    scale = np.sqrt(0.5 / centred.var(axis=1).max())
    variance = scale**2 * centred.var(axis=1, keepdims=True)
    return {
        "bert.embeddings.word_embeddings.weight": scale * centred * np.sqrt(1e-12 / (1 - variance)),
        "bert.embeddings.position_embeddings.weight": np.zeros((512, hidden)),
        "bert.embeddings.token_type_embeddings.weight": np.zeros((2, hidden)),
        "bert.embeddings.LayerNorm.weight": 1 / (scale * np.array(u)),
        "bert.embeddings.LayerNorm.bias": beta,
    }


@pytest.mark.parametrize("task, labels", [("sst2", 2), ("emotion", 6)])
def test_real_bert_tiny(task: str, labels: int, tmp_path: Path) -> None:
    """Fine-tuned layers, pooler and classifier, whose embedding tables are not published, on their real inputs."""
    folder = ROOT.parent / "shared" / "data" / "bert-tiny"
    if not folder.exists():
        pytest.skip(f"{folder.relative_to(ROOT.parent)} is not beside the checkout")
    inputs = np.load(folder / f"{task}-inputs.npz")
    names = sorted(name.removeprefix("x_") for name in inputs.files if name.startswith("x_"))
    rows = [inputs[f"x_{name}"] for name in names]
    words = [*models.VOCABULARY[:5], *(f"w{i}" for i in range(sum(map(len, rows))))]
    tables = embeddings_that_give(np.concatenate(rows).astype(np.float64))
    word = "bert.embeddings.word_embeddings.weight"
    tables[word] = np.pad(tables[word], ((5, 0), (0, 0)))
    weights = dict(np.load(folder / f"{task}-weights.npz")) | tables
    models.write_safetensors(
        tmp_path / "model.safetensors", {name: ("F32", w.astype(np.float32)) for name, w in weights.items()}
    )
    config = models.bert_config(
        vocab_size=len(words),
        hidden_size=128,
        id2label={str(i): f"LABEL_{i}" for i in range(labels)},
        architectures=["BertForSequenceClassification"],
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    offsets = np.cumsum([0, *map(len, rows)])
    ids = np.arange(5, 5 + offsets[-1], dtype=np.int32)
    exact = np.array([inputs[f"logits_{name}"] for name in names])
    batch = TokenBatch(ids, np.zeros_like(ids), offsets, np.zeros(len(names), np.bool_))
    fp32, int8 = (SequenceClassifier(tmp_path, precision=precision) for precision in ("fp32", "int8"))
    assert np.abs(fp32._logits(fp32._encode(batch)) - exact).max() <= 1e-5  # logits up to 7: 20 units in the last place
    np.testing.assert_array_equal(int8._logits(int8._encode(batch)).argmax(axis=1), exact.argmax(axis=1))


# ---- the classes themselves ----


def test_problem_types(tmp_path: Path) -> None:
    """What makes scores of logits follows config.json, as in the pipeline."""
    texts = ["the cat", "a dog"]
    for i, (labels, problem, function) in enumerate(
        [
            (1, None, "sigmoid"),
            (1, "regression", "none"),
            (3, None, "softmax"),
            (3, "multi_label_classification", "sigmoid"),
            (3, "single_label_classification", "softmax"),
        ]
    ):
        names = {str(j): f"L{j}" for j in range(labels)}
        golden.write(tmp_path / str(i), "BertForSequenceClassification", id2label=names, problem_type=problem)
        classifier = SequenceClassifier(tmp_path / str(i))
        assert classifier.function_to_apply == function
        logits = classifier.logits(texts)
        apply = {
            "none": lambda x: x,
            "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
            "softmax": lambda x: np.exp(x) / np.exp(x).sum(axis=1, keepdims=True),
        }
        np.testing.assert_allclose(classifier.predict(texts), apply[function](logits.astype(np.float64)), atol=1e-6)
        assert classifier(texts[0])["label"] == f"L{logits[0].argmax()}"


def test_next_sentence(folders: Callable[[str], Path]) -> None:
    model = load(folders("BertForNextSentencePrediction"), "BertForNextSentencePrediction")
    texts = golden.texts(5, 3)
    follows, logits = model.predict(texts, texts[::-1]), model.logits(texts, texts[::-1]).astype(np.float64)
    np.testing.assert_allclose(follows, 1 / (1 + np.exp(logits[:, 1] - logits[:, 0])), atol=1e-6)
    assert model.predict(texts[0], texts[4]) == follows[0]


@pytest.mark.parametrize("format", ["safetensors", "pytorch", "tensorflow"])
def test_pretraining_checkpoint_has_two_heads(format: str, tmp_path: Path) -> None:
    """As the miniatures are published: masked words and next sentences from one file of any format, old names too."""
    options = {"prefix": "bert.", "heads": True, "max_position_embeddings": 64, "architectures": ["BertForPreTraining"]}
    models.write_model(tmp_path / "plain", **options)
    models.write_model(tmp_path / format, format=format, gamma_beta=format != "pytorch", **options)
    texts = ["the [MASK] was", "a dog"]
    plain, other = (MaskedLM(tmp_path / name).logits(texts[0]) for name in ("plain", format))
    assert bits(plain) == bits(other) and np.ptp(plain) > 1
    plain, other = (NextSentence(tmp_path / name).logits(*texts) for name in ("plain", format))
    assert bits(plain) == bits(other)


def test_decoder_of_its_own(tmp_path: Path) -> None:
    """A checkpoint that carries the decoder's weight: that one counts."""
    model = golden.write(tmp_path, "BertForMaskedLM")
    text = "the [MASK] was"
    tied = MaskedLM(tmp_path).logits(text)
    stored = models.read_safetensors(tmp_path / "model.safetensors")
    own = -model.weights["embeddings.word_embeddings.weight"]
    tensors = {name: ("I64" if x.dtype == np.int64 else "F32", x) for name, x in stored.items()}
    models.write_safetensors(tmp_path / "model.safetensors", tensors | {"cls.predictions.decoder.weight": ("F32", own)})
    bias = model.weights["cls.predictions.bias"]
    np.testing.assert_allclose(MaskedLM(tmp_path).logits(text) - bias, bias - tied, atol=1e-5)


def test_cross_encoder_files(tmp_path: Path) -> None:
    """The activation and prompts of all generations of files; several labels."""
    golden.write(tmp_path, "BertForSequenceClassification", id2label={"0": "a"})
    pair, config = ("the cat", "a dog"), json.loads((tmp_path / "config.json").read_text())
    logit = CrossEncoder(tmp_path).logits([pair[0]], [pair[1]])[0, 0]
    identity, sigmoid = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"
    assert CrossEncoder(tmp_path).predict(pair) == pytest.approx(1 / (1 + np.exp(-logit)))
    for extra in (
        {"sentence_transformers": {"activation_fn": identity}},
        {"sbert_ce_default_activation_function": identity},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | extra))
        assert CrossEncoder(tmp_path).predict(pair) == logit
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    saved = {"activation_fn": sigmoid, "prompts": {"query": "find: "}, "default_prompt_name": "query"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(saved))
    encoder = CrossEncoder(tmp_path)
    assert encoder.predict(pair) == encoder.predict(("find: the cat", "a dog"), prompt="")
    assert (
        encoder.predict(pair, activation_fn=lambda x: 2 * x) == 2 * encoder.logits(["find: the cat"], ["a dog"])[0, 0]
    )
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": "evil.code"}))
    with pytest.raises(
        ValueError, match=r"activation_fn: expected one of Identity, Sigmoid of torch.nn, got 'evil.code'"
    ):
        CrossEncoder(tmp_path)


def test_several_labels(folders: Callable[[str], Path]) -> None:
    encoder = CrossEncoder(folders("BertForSequenceClassification"))
    scores = encoder.predict([("a", "b"), ("c", "d")])
    assert bits(scores) == bits(encoder.logits(["a", "c"], ["b", "d"]))
    np.testing.assert_allclose(encoder.predict([("a", "b")], apply_softmax=True).sum(), 1, atol=1e-6)
    assert [bits(row) for row in encoder.predict([("a", "b")], convert_to_numpy=False)] == [bits(scores[0])]
    with pytest.raises(ValueError, match="rank: expected a model with one label, got 3"):
        encoder.rank("a", ["b"])


@pytest.mark.parametrize("head", [*CLASSES, "CrossEncoder"])
def test_pickle_and_info(head: str, folders: Callable[[str], Path]) -> None:
    loaded = load(folders(head), head)
    copied = pickle.loads(pickle.dumps(loaded))
    assert copied.info() == loaded.info() and type(copied) is type(loaded)
    json.dumps(loaded.info())
    assert repr(loaded).startswith(f"{type(loaded).__name__}(")


def test_empty_and_single(folders: Callable[[str], Path]) -> None:
    """An empty list gives an empty result; an empty text is [CLS] [SEP]; one text gives one result."""
    classifier, tagger, answerer, model, follower = (load(folders(head), head) for head in CLASSES)
    assert classifier([]) == tagger([]) == answerer([], []) == model.fill([]) == []
    assert classifier.logits([]).shape == (0, 3) and follower.predict([], []).shape == (0,)
    assert load(folders("CrossEncoder"), "CrossEncoder").predict([]).shape == (0,)
    assert load(folders("CrossEncoder"), "CrossEncoder").rank("a", []) == []
    assert classifier("")["label"] in golden.LABELS["BertForSequenceClassification"]
    assert tagger("") == [] and tagger([""]) == [[]] and tagger("", aggregation_strategy="max", stride=3) == []
    assert classifier("a") == classifier(["a"])[0] and classifier("a", "b") == classifier(["a"], ["b"])[0]


# ---- what is wrong is said ----


def break_config(folder: Path, head: str, **changes: Any) -> None:
    golden.write(folder, head)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "head, changes, message",
    [
        (
            "BertForSequenceClassification",
            {"id2label": {"0": "a"}},
            r"classifier\.weight: expected \[1, 48\], got \[3, 48\]",
        ),
        (
            "BertForSequenceClassification",
            {"id2label": {"1": "a"}},
            r"id2label: expected an object of strings with the keys",
        ),
        ("BertForSequenceClassification", {"id2label": {"0": 5}}, "id2label: expected an object of strings"),
        ("BertForSequenceClassification", {"id2label": []}, "id2label: expected an object of strings"),
        ("BertForSequenceClassification", {"id2label": None, "num_labels": "3"}, "num_labels: expected a whole number"),
        ("BertForSequenceClassification", {"problem_type": "x"}, "problem_type: expected one of regression"),
        ("BertForSequenceClassification", {"architectures": 3}, "architectures: expected a list of strings, got 3"),
        (
            "BertForSequenceClassification",
            {"architectures": ["BertForTokenClassification"]},
            "architectures: expected a name that ends in ForSequenceClassification for SequenceClassifier, got Bert",
        ),
        (
            "BertForQuestionAnswering",
            {"architectures": ["BertModel"]},
            "architectures: expected a name that ends in ForQuestionAnswering",
        ),
    ],
)
def test_wrong_config(head: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    break_config(tmp_path, head, **changes)
    with pytest.raises(ValueError, match=message):
        CLASSES[head](tmp_path)


@pytest.mark.parametrize(
    "head, missing",
    [
        ("BertForSequenceClassification", "classifier.bias"),
        ("BertForSequenceClassification", "pooler.dense.weight"),
        ("BertForTokenClassification", "classifier.weight"),
        ("BertForQuestionAnswering", "qa_outputs.weight"),
        ("BertForMaskedLM", "cls.predictions.transform.LayerNorm.bias"),
        ("BertForMaskedLM", "cls.predictions.decoder.bias"),
        ("BertForNextSentencePrediction", "cls.seq_relationship.bias"),
    ],
)
def test_missing_tensor(head: str, missing: str, tmp_path: Path) -> None:
    golden.write(tmp_path, head)
    path = tmp_path / "model.safetensors"
    gone = {"cls.predictions.decoder.bias": "cls.predictions.bias", "pooler.dense.weight": "bert.pooler"}
    stored = {
        name: ("I64" if x.dtype == np.int64 else "F32", x)
        for name, x in models.read_safetensors(path).items()
        if not name.startswith(gone.get(missing, missing))
    }
    models.write_safetensors(path, stored)
    with pytest.raises(ValueError, match=rf"{missing.replace('.', '[.]')}: expected \[.*\].*, got no such tensor"):
        CLASSES[head](tmp_path)


def test_untied_without_a_decoder(tmp_path: Path) -> None:
    break_config(tmp_path, "BertForMaskedLM", tie_word_embeddings=False)
    with pytest.raises(
        ValueError, match=r"cls\.predictions\.decoder\.weight: expected \[260, 48\], got no such tensor"
    ):
        MaskedLM(tmp_path)


CALLS: list[tuple[str, Callable[[Any], Any], type[Exception], str]] = [
    ("BertForSequenceClassification", lambda c: c(["a", None]), TypeError, r"inputs\[1\]: expected str, got NoneType"),
    ("BertForSequenceClassification", lambda c: c(5), TypeError, "inputs: expected str or a sequence of str, got int"),
    ("BertForSequenceClassification", lambda c: c(["a"], ["b", "c"]), ValueError, "text_pairs: expected as many texts"),
    ("BertForSequenceClassification", lambda c: c(["a"], [3]), TypeError, r"text_pairs\[0\]: expected str, got int"),
    ("BertForSequenceClassification", lambda c: c("a", ["b"]), TypeError, "text_pairs: expected str as inputs"),
    ("BertForSequenceClassification", lambda c: c("a", top_k=0), ValueError, "top_k: expected at least 1, got 0"),
    ("BertForSequenceClassification", lambda c: c("a", batch_size=0), ValueError, "batch_size: expected at least 1"),
    (
        "BertForSequenceClassification",
        lambda c: c("a", function_to_apply="x"),
        ValueError,
        "function_to_apply: expected",
    ),
    ("BertForSequenceClassification", lambda c: c("a", on_long="x"), ValueError, "on_long: expected one of truncate"),
    (
        "BertForSequenceClassification",
        lambda c: c(["a", "a " * 99], ["b", "b"], on_long="error"),
        ValueError,
        r"inputs\[1\]: expected at most 64 tokens \(max_seq_length\), got 103",
    ),
    ("BertForTokenClassification", lambda c: c(["a", 1]), TypeError, r"inputs\[1\]: expected str, got int"),
    (
        "BertForTokenClassification",
        lambda c: c("a", aggregation_strategy="mean"),
        ValueError,
        "aggregation_strategy: expected one of none, simple, first, average, max, got 'mean'",
    ),
    ("BertForTokenClassification", lambda c: c("a", stride=3), ValueError, "stride: expected an aggregation_strategy"),
    (
        "BertForTokenClassification",
        lambda c: c("a", aggregation_strategy="max", stride=62),
        ValueError,
        "stride: tokens: expected a whole number from 0 to 61, got 62",
    ),
    (
        "BertForTokenClassification",
        lambda c: c("a", ignore_labels="O"),
        TypeError,
        "ignore_labels: expected an iterable",
    ),
    (
        "BertForTokenClassification",
        lambda c: c(["a", "a " * 99], on_long="error"),
        ValueError,
        r"inputs\[1\]: expected at most 64 tokens \(max_seq_length\), got 101",
    ),
    ("BertForQuestionAnswering", lambda c: c("a", ["b"]), TypeError, "context: expected str as question"),
    (
        "BertForQuestionAnswering",
        lambda c: c(["a"], ["b", "c"]),
        ValueError,
        "context: expected as many texts as question",
    ),
    ("BertForQuestionAnswering", lambda c: c(["a", None], ["b", "c"]), TypeError, r"question\[1\]: expected str"),
    ("BertForQuestionAnswering", lambda c: c("a", ""), ValueError, "context: expected a text, got an empty one"),
    ("BertForQuestionAnswering", lambda c: c(["a", ""], ["b", "c"]), ValueError, r"question\[1\]: expected a text"),
    ("BertForQuestionAnswering", lambda c: c("a " * 70, "b"), ValueError, "question: expected a text that leaves room"),
    ("BertForQuestionAnswering", lambda c: c("a", "b", doc_stride=60), ValueError, "stride: tokens: expected"),
    ("BertForQuestionAnswering", lambda c: c("a", "b", max_seq_len=65), ValueError, "max_seq_length: tokens: expected"),
    (
        "BertForQuestionAnswering",
        lambda c: c("a", "b", max_answer_len=0),
        ValueError,
        "max_answer_len: expected at least 1",
    ),
    (
        "BertForMaskedLM",
        lambda c: c.fill(["[MASK]", "a"]),
        ValueError,
        r"inputs\[1\]: expected \[MASK\] within 64 tokens",
    ),
    ("BertForMaskedLM", lambda c: c.fill("a " * 99 + "[MASK]"), ValueError, r"inputs\[0\]: expected \[MASK\] within"),
    ("BertForMaskedLM", lambda c: c.fill("[MASK]", top_k=-1), ValueError, "top_k: expected at least 1, got -1"),
    (
        "BertForMaskedLM",
        lambda c: c.fill("[MASK]", targets=["cat", "x-y"]),
        ValueError,
        "targets: expected tokens .*'x-y'",
    ),
    ("BertForMaskedLM", lambda c: c.fill("[MASK]", targets=[]), ValueError, "targets: expected tokens .* got none"),
    (
        "BertForNextSentencePrediction",
        lambda c: c.predict(["a"], "b"),
        TypeError,
        "text_pairs: expected a sequence of str",
    ),
    (
        "CrossEncoder",
        lambda c: c.predict("ab"),
        TypeError,
        "inputs: expected a pair of str or a sequence of pairs, got str",
    ),
    ("CrossEncoder", lambda c: c.predict([("a", "b"), ("c",)]), ValueError, r"inputs\[1\]: expected 2 texts, got 1"),
    ("CrossEncoder", lambda c: c.predict([("a", None)]), TypeError, r"inputs\[0\]\[1\]: expected str, got NoneType"),
    (
        "CrossEncoder",
        lambda c: c.predict([("a", "b"), "cd"]),
        TypeError,
        r"inputs\[1\]: expected a pair of str, got str",
    ),
    ("CrossEncoder", lambda c: c.predict(("a", "b"), prompt_name="x"), ValueError, "prompt_name: expected one of none"),
    ("CrossEncoder", lambda c: c.rank(None, ["a"]), TypeError, "query: expected str, got NoneType"),
    ("CrossEncoder", lambda c: c.rank("a", "b"), TypeError, "documents: expected a sequence of str, got str"),
    ("CrossEncoder", lambda c: c.rank("a", ["b", 1]), TypeError, r"documents\[1\]: expected str, got int"),
]


@pytest.mark.parametrize("head, call, error, message", CALLS)
def test_wrong_arguments(
    head: str, call: Callable[[Any], Any], error: type[Exception], message: str, folders: Callable[[str], Path]
) -> None:
    with pytest.raises(error, match=message):
        call(load(folders(head), head))


def test_long_texts_can_warn(folders: Callable[[str], Path]) -> None:
    classifier = load(folders("BertForSequenceClassification"), "BertForSequenceClassification")
    with pytest.warns(UserWarning, match=r"inputs\[1\]: expected at most 64 tokens .* it is cut") as caught:
        classifier(["a", "a " * 99, "a " * 100], on_long="warn")
    assert len(caught) == 1 and caught[0].filename == __file__


def test_no_default_model() -> None:
    with pytest.raises(TypeError, match="model: expected a folder or a hub id, got None"):
        SequenceClassifier(None)  # type: ignore[arg-type]
