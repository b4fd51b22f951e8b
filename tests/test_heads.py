"""Task heads: transformers (golden files) == reference.py, the engine == reference.py, pipelines == the task classes.

Tolerance: as in test_bert.py, weights moved by 2^-20 show what float32 may cost in a logit: no more than LOGIT here, as
test_200_inputs checks. A probability moves by at most half of what its logits do: SCORE.
"""

from __future__ import annotations

import json
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
)
from fastbert.heads import TaskModel
from tests import make_golden_heads as golden
from tests import models, reference
from tests.make_golden import GOLDEN
from tests.models import Batch, Model
from tests.reference import Outputs

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
