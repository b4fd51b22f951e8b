"""The Python surface: same text, same bits; every argument; every bad input; threads, memory, signals, fork, pickle."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count, islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbert
from fastbert import EncodeInfo, Encoder, _core
from tests.models import VOCABULARY, Sentence, write_model

WORDS = [word for word in VOCABULARY if word.isalpha()]
ISAS = [
    pytest.param(isa, marks=pytest.mark.skipif(not supported, reason=f"this CPU, or its OS, does not run {isa}"))
    for isa, supported in _core.isas()
]
DIM = 2 * 64  # two pooling modes of 64 features
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that normalises, with prompts."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, sentence=Sentence(("cls", "mean"), normalize=True, max_seq_length=MAX_TOKENS))
    prompts = {"query": "find: ", "passage": "read: ", "long": "the of and a to in "}
    config = {"prompts": prompts, "similarity_fn_name": "dot"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare BERT folder, without pooler: mean pooling, no normalisation."""
    folder = tmp_path_factory.mktemp("plain")
    write_model(folder, pooler=False, tokenizer="json")
    return folder


@cache
def load(folder: Path, isa: str | None = None, threads: int | None = None) -> Encoder:
    with pytest.MonkeyPatch.context() as patch:
        if isa is not None:
            patch.setenv("FASTBERT_ISA", isa)
        return Encoder(folder, threads=threads)


@pytest.fixture
def encoder(folder: Path) -> Encoder:
    return load(folder)


@pytest.fixture
def plain(plain_folder: Path) -> Encoder:
    return load(plain_folder)


def sentences(n: int, seed: int = 0, most: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, most))) for _ in range(n)]


def bits(x: Any) -> bytes:
    return np.ascontiguousarray(x).tobytes()


# ---- same text, same bits ----


@cache
def alone(folder: Path, text: str) -> bytes:
    """The vector of a text on its own, one thread, the scalar kernels."""
    return bits(load(folder, "scalar", 1).encode(text))


words = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)
texts = st.lists(words | st.text(max_size=30), min_size=1, max_size=30)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=min(30, settings.default.max_examples))
@given(texts=texts, batch_size=st.integers(1, 5))
def test_same_text_same_bits(folder: Path, isa: str, threads: int, texts: list[str], batch_size: int) -> None:
    vectors = load(folder, isa, threads).encode(texts, batch_size=batch_size)
    assert [bits(vector) for vector in vectors] == [alone(folder, text) for text in texts]


def test_different_texts_have_different_bits(folder: Path) -> None:
    """So that the test above can fail."""
    distinct = {" ".join(text.split()[: MAX_TOKENS - 2]) for text in sentences(100)}
    assert len({alone(folder, text) for text in distinct}) == len(distinct)


@pytest.mark.parametrize("isa", ISAS)
def test_hidden_states_same_bits(folder: Path, isa: str) -> None:
    one, two, scalar = load(folder, isa, 1), load(folder, isa, 2), load(folder, "scalar", 1)
    batch = one.tokenizer.encode_batch(sentences(30))
    expected = bits(scalar.forward_ragged(batch.ids, batch.offsets, batch.type_ids))
    assert bits(one.forward_ragged(batch.ids, batch.offsets, batch.type_ids)) == expected
    assert bits(two.forward_ragged(batch.ids, batch.offsets, batch.type_ids)) == expected
    rows = [scalar.forward_ragged(batch.ids[a:b], [0, b - a]) for a, b in pairwise(batch.offsets)]
    assert bits(np.concatenate(rows)) == expected


def test_eight_threads_give_the_bits_of_one(encoder: Encoder) -> None:
    texts = sentences(64)
    expected = {text: bits(vector) for text, vector in zip(texts, encoder.encode(texts), strict=True)}

    def work(seed: int) -> bool:
        mine = random.Random(seed).sample(texts, 40)
        return all(
            [bits(v) for v in encoder.encode(mine, batch_size=1 + seed)] == [expected[text] for text in mine]
            for _ in range(10)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


# ---- encode ----


def test_one_text_and_many(encoder: Encoder) -> None:
    texts = sentences(100)
    vectors = encoder.encode(texts)
    assert vectors.shape == (100, DIM) and vectors.dtype == np.float32 and vectors.flags.c_contiguous
    one = encoder.encode(texts[3])
    assert one.shape == (DIM,) and bits(one) == bits(vectors[3])
    for same in (tuple(texts), np.array(texts), np.array(texts, dtype=object)):
        assert bits(encoder.encode(same)) == bits(vectors)
    rows = encoder.encode(texts, convert_to_numpy=False)
    assert isinstance(rows, list) and bits(np.stack(rows)) == bits(vectors)
    assert encoder.get_embedding_dimension() == encoder.get_sentence_embedding_dimension() == DIM


def test_series(encoder: Encoder) -> None:
    """A sequence that, as a pandas Series, is indexed by labels and iterates over values."""

    class Series:
        ndim = 1

        def __init__(self, labels: str, values: list[Any]) -> None:
            self.values = dict(zip(labels, values, strict=True))

        def __len__(self) -> int:
            return len(self.values)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.values.values())

        def __getitem__(self, label: str) -> Any:
            return self.values[label]

    texts = sentences(5)
    assert bits(encoder.encode(Series("edcba", texts))) == bits(encoder.encode(texts))
    with pytest.raises(TypeError, match=r"inputs\[1\]: expected str, got float"):
        encoder.encode(Series("ab", ["a", float("nan")]))


def test_no_texts(encoder: Encoder) -> None:
    vectors, info = encoder.encode([], return_info=True)
    assert vectors.shape == (0, DIM) and vectors.dtype == np.float32
    assert info.token_counts.shape == info.truncated.shape == (0,)
    assert encoder.encode([], truncate_dim=5).shape == (0, 5)
    assert encoder.encode([], output_value="token_embeddings") == []
    assert encoder.similarity(vectors, vectors).shape == (0, 0)


def test_empty_text_is_cls_sep(encoder: Encoder) -> None:
    tokens = encoder.encode("", output_value="token_embeddings")
    ids = [VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]")]
    assert bits(tokens) == bits(encoder.forward_ragged(ids, [0, 2]))


STRANGE = {
    "emoji": "\N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4} \N{REGIONAL INDICATOR SYMBOL LETTER A}",
    "control": "a\x00b\x07c\x1b[0m\r\n\x7f\u200b\ufeff",
    "lone surrogate": "a \ud800 b \udfff",
    "long word": "x" * 100_000,
    "megabyte": "the cat and the dog. " * 50_000,
    "megabyte of spaces": " " * 1_000_000 + "cat",
    "combining": "e" + "\u0301" * 1000,
    "scripts": "\u4f60\u597d \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u041f\u0440\u0438",
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_text(encoder: Encoder, name: str) -> None:
    vectors = encoder.encode(["cat", STRANGE[name], ""])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert bits(encoder.encode(STRANGE[name])) == bits(vectors[1])


def test_token_embeddings(encoder: Encoder) -> None:
    texts = sentences(30)
    tokens = encoder.encode(texts, output_value="token_embeddings", batch_size=1)
    batch = encoder.tokenizer.encode_batch(texts)
    assert [t.shape for t in tokens] == [(n, 64) for n in np.diff(batch.offsets)]
    assert bits(np.concatenate(tokens)) == bits(encoder.forward_ragged(batch.ids, batch.offsets))
    assert bits(encoder.encode(texts[0], output_value="token_embeddings")) == bits(tokens[0])


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)


@pytest.mark.parametrize("dim", [None, 1, 17, 64])
@pytest.mark.parametrize("flag", [None, True, False])
def test_normalisation_and_truncation(encoder: Encoder, plain: Encoder, flag: bool | None, dim: int | None) -> None:
    """Against the definition, within 4 roundings of float32 of numbers up to 1 in size."""
    texts = sentences(20)
    for model, normalizes in ((encoder, True), (plain, False)):
        full = model.encode(texts).astype(np.float64)
        assert np.allclose(np.linalg.norm(full, axis=1), 1, atol=1e-6) == normalizes
        expected = full[:, :dim]
        if flag or (flag is None and normalizes):
            expected = unit(expected)
        result = model.encode(texts, normalize_embeddings=flag, truncate_dim=dim)
        assert result.dtype == np.float32 and result.shape == expected.shape
        assert np.abs(result - expected).max() <= 4 * 2**-24 * max(1, np.abs(expected).max())
        assert bits(result[7]) == bits(model.encode(texts[7], normalize_embeddings=flag, truncate_dim=dim))


def test_on_long(encoder: Encoder) -> None:
    texts = ["cat", "dog " * 45, "cat " * 46, "dog " * 47, "cat dog " * 2000]
    message = r"inputs\[3\]: expected at most 48 tokens \(max_seq_length\), got 49"
    with pytest.warns(UserWarning, match=message) as caught:
        warned = encoder.encode(texts, on_long="warn", batch_size=1)
    assert len(caught) == 1
    vectors, info = encoder.encode(texts, return_info=True)
    assert bits(warned) == bits(vectors)
    assert info.token_counts.tolist() == [3, 47, 48, 49, 4002]
    assert info.truncated.tolist() == [False, False, False, True, True]
    assert bits(vectors[3]) == bits(encoder.encode("dog " * 46))
    with pytest.raises(ValueError, match=message):
        encoder.encode(texts, on_long="error", batch_size=1)
    assert encoder.encode(texts[:3], on_long="error").shape == (3, DIM)
    _, one = encoder.encode(texts[4], return_info=True)
    assert one == EncodeInfo(4002, True)


def test_batch_size_does_not_change_info(encoder: Encoder) -> None:
    texts = sentences(50)
    _, expected = encoder.encode(texts, return_info=True)
    for batch_size in (1, 3, 1000):
        _, info = encoder.encode(texts, return_info=True, batch_size=batch_size)
        assert np.array_equal(info, expected)


def test_prompts(encoder: Encoder, plain: Encoder) -> None:
    assert encoder.prompts == {"query": "find: ", "document": "", "passage": "read: ", "long": "the of and a to in "}
    cat = encoder.encode("cat")
    assert bits(encoder.encode("cat", prompt="find: ")) == bits(encoder.encode("find: cat")) != bits(cat)
    assert bits(encoder.encode("cat", "query")) == bits(encoder.encode("find: cat"))
    assert bits(encoder.encode("cat", "query", "read: ")) == bits(encoder.encode("read: cat"))
    assert bits(encoder.encode_query("cat")) == bits(encoder.encode("find: cat"))
    assert bits(encoder.encode_query(["cat"], batch_size=1)[0]) == bits(encoder.encode("find: cat"))
    assert bits(encoder.encode_query("cat", "passage")) == bits(encoder.encode("read: cat"))
    assert bits(encoder.encode_query("cat", prompt="")) == bits(cat)
    assert bits(encoder.encode_document("cat")) == bits(encoder.encode("read: cat"))  # "document" is empty
    for same in (plain.encode_query("cat"), plain.encode_document("cat"), plain.encode("cat", prompt_name="query")):
        assert bits(same) == bits(plain.encode("cat"))
    with pytest.raises(ValueError, match="prompt_name: expected one of query, document, passage, long, got 'nope'"):
        encoder.encode("cat", prompt_name="nope")
    _, info = encoder.encode("cat", prompt_name="long", return_info=True)
    assert info.token_counts == 9


def test_default_prompt(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path, sentence=Sentence())
    config = {"prompts": {"clustering": "make: "}, "default_prompt_name": "clustering"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(config))
    encoder = Encoder(tmp_path)
    without = encoder.encode("cat", prompt="")
    assert bits(encoder.encode("cat")) == bits(encoder.encode("make: cat", prompt="")) != bits(without)
    assert bits(encoder.encode_query("cat")) == bits(encoder.encode_document("cat")) == bits(without)


def test_prompt_outside_pooling_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, sentence=Sentence())
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"include_prompt": False}))
    encoder = Encoder(tmp_path)
    assert encoder.encode("cat").shape == (64,)
    with pytest.raises(ValueError, match="include_prompt"):
        encoder.encode("cat", prompt="find: ")


def test_progress_bar(encoder: Encoder, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    encoder.encode(["cat"] * 30, batch_size=1)
    assert capfd.readouterr().err == ""
    encoder.encode(["cat"] * 30, batch_size=1, show_progress_bar=True)
    assert "30/30" in capfd.readouterr().err
    with caplog.at_level(logging.INFO, logger="fastbert"):
        encoder.encode(["cat"] * 30)
        assert "30/30" in capfd.readouterr().err
        encoder.encode(["cat"] * 30, show_progress_bar=False)
        assert capfd.readouterr().err == ""


def test_next_texts_are_tokenized_while_the_engine_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `encode`, which has them all; `iter_encode` reads a text no sooner than it must."""
    monkeypatch.setattr(_core, "usable_threads", lambda threads: 2)  # also where this process may use one CPU
    encoder = Encoder(folder)
    model, encode_batch = encoder._model, encoder.tokenizer.encode_batch
    events: list[str] = []

    def forward(*arrays: Any, **options: Any) -> Any:
        events.append("run")
        outputs = model.forward(*arrays, **options)
        events.append("done")
        return outputs

    monkeypatch.setattr(encoder, "_model", SimpleNamespace(forward=forward, vector_dim=model.vector_dim))
    monkeypatch.setattr(encoder.tokenizer, "encode_batch", lambda part: events.append("read") or encode_batch(part))
    texts = sentences(20)  # of 8 at a time
    encoder.encode(texts, batch_size=1)
    assert events == "read run read done run read done run done".split()
    events.clear()
    assert len(list(encoder.iter_encode(texts, batch_size=8))) == 20
    assert events == "read run done".split() * 3


def test_iter_encode(encoder: Encoder) -> None:
    texts = sentences(50)
    expected = encoder.encode(texts, truncate_dim=9)
    read = []
    vectors = encoder.iter_encode((read.append(text) or text for text in texts), batch_size=4, truncate_dim=9)
    assert read == []
    first = next(vectors)
    assert len(read) == 4
    assert bits(np.stack([first, *vectors])) == bits(expected)
    assert list(encoder.iter_encode([])) == []
    endless = encoder.iter_encode(("cat" for _ in count()), batch_size=3)
    assert {bits(v) for v in islice(endless, 10)} == {bits(encoder.encode("cat"))}
    tokens = encoder.iter_encode(texts, output_value="token_embeddings")
    assert [len(t) for t in tokens] == [len(t) for t in encoder.encode(texts, output_value="token_embeddings")]


def test_iter_encode_names_the_index(encoder: Encoder) -> None:
    vectors = encoder.iter_encode(["cat", "dog", "cat", None], batch_size=3)
    assert len(list(islice(vectors, 3))) == 3
    with pytest.raises(TypeError, match=r"inputs\[3\]: expected str, got NoneType"):
        next(vectors)
    with pytest.raises(ValueError, match=r"inputs\[4\]: expected at most 48 tokens"):
        list(encoder.iter_encode(["cat"] * 4 + ["dog " * 60], batch_size=3, on_long="error"))
    for wrong in ("cat", b"cat"):
        with pytest.raises(TypeError, match="inputs: expected an iterable of str"):
            encoder.iter_encode(wrong)
    with pytest.raises(ValueError, match="batch_size"):
        encoder.iter_encode(["cat"], batch_size=0)


@pytest.mark.parametrize(
    "inputs, message",
    [
        (["a", None], r"inputs\[1\]: expected str, got NoneType"),
        (["a", "b", 3], r"inputs\[2\]: expected str, got int"),
        (["a", float("nan")], r"inputs\[1\]: expected str, got float"),
        ([b"a"], r"inputs\[0\]: expected str, got bytes"),
        ([["a", "b"]], r"inputs\[0\]: expected str, got list"),
        (None, "inputs: .*got NoneType"),
        (3, "inputs: .*got int"),
        (b"a", "inputs: .*got bytes"),
        ({"a": "b"}, "inputs: .*got dict"),
        ({"a"}, "inputs: .*got set"),
        (iter("ab"), "inputs: .*got str_iterator|inputs: .*iterator"),
        (np.array([["a"]]), "inputs: .*got ndarray"),
    ],
)
def test_wrong_inputs(encoder: Encoder, inputs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        encoder.encode(inputs)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"batch_size": -5}, ValueError, "batch_size: expected at least 1, got -5"),
        ({"batch_size": 2.0}, TypeError, "batch_size: expected a whole number, got float"),
        ({"truncate_dim": 0}, ValueError, "truncate_dim: expected 1 to 128, got 0"),
        ({"truncate_dim": 129}, ValueError, "truncate_dim: expected 1 to 128, got 129"),
        ({"truncate_dim": "8"}, TypeError, "truncate_dim: expected a whole number, got str"),
        ({"output_value": "tokens"}, ValueError, "output_value: expected one of sentence_embedding, token_embeddings"),
        ({"output_value": None}, ValueError, "output_value: expected one of sentence_embedding, token_embeddings"),
        ({"precision": "int8"}, ValueError, "precision: expected one of float32, got 'int8'"),
        ({"on_long": "chunk"}, ValueError, "on_long: expected one of truncate, warn, error, got 'chunk'"),
        ({"output_value": "token_embeddings", "truncate_dim": 3}, ValueError, "truncate_dim"),
        ({"output_value": "token_embeddings", "normalize_embeddings": True}, ValueError, "normalize_embeddings"),
        ({"prompt": 3}, TypeError, "prompt: expected str, got int"),
        ({"convert_to_tensor": True}, TypeError, "convert_to_tensor"),
        ({"device": "cuda"}, TypeError, "device"),
    ],
)
def test_wrong_arguments(encoder: Encoder, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    for call in (encoder.encode, encoder.encode_query, encoder.encode_document):
        with pytest.raises(error, match=message):
            call(["cat"], **arguments)


# ---- construction ----


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"precision": "int4"}, ValueError, "precision: expected one of fp32, int8, got 'int4'"),
        ({"threads": 0}, ValueError, "threads: expected at least 1, got 0"),
        ({"threads": "2"}, TypeError, "threads: expected a whole number, got str"),
        ({"max_seq_length": 0}, ValueError, "max_seq_length: .*512, got 0"),
        ({"max_seq_length": 513}, ValueError, "max_seq_length: .*512, got 513"),
        ({"device": "cpu"}, TypeError, "device"),
    ],
)
def test_wrong_options(folder: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Encoder(folder, **arguments)


def test_forced_kernel_set_must_exist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_ISA", "sse9")
    for call in (fastbert.kernels, lambda: Encoder(folder)):
        with pytest.raises(ValueError, match=r"FASTBERT_ISA: expected one of .*scalar.*got \"sse9\""):
            call()


@pytest.mark.parametrize("isa", ISAS)
def test_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv("FASTBERT_ISA", isa)
    kernels = fastbert.kernels()
    assert [(k.name, k.supported) for k in kernels] == _core.isas()
    assert [k.name for k in kernels if k.chosen] == [isa] == [Encoder(folder).info()["isa"]]


def test_max_seq_length(folder: Path) -> None:
    text = "cat " * 100
    assert load(folder).max_seq_length == load(folder).get_max_seq_length() == MAX_TOKENS
    encoder = Encoder(folder, max_seq_length=20)
    assert len(encoder.encode(text, output_value="token_embeddings")) == encoder.max_seq_length == 20
    encoder.max_seq_length = 90
    assert len(encoder.encode(text, output_value="token_embeddings")) == encoder.max_seq_length == 90
    with pytest.raises(ValueError, match=r"max_seq_length: .*512, got 1000"):
        encoder.max_seq_length = 1000


def test_description(folder: Path, encoder: Encoder, plain: Encoder) -> None:
    info = json.loads(json.dumps(encoder.info()))
    expected = {"hidden_size": 64, "num_hidden_layers": 2, "pooling": ["cls", "mean"], "normalize": True, "dense": []}
    expected |= {"embedding_dimension": DIM, "max_seq_length": MAX_TOKENS, "precision": "fp32", "has_pooler": True}
    assert expected.items() <= info.items()
    assert not plain.info()["has_pooler"] and plain.info()["pooling"] == ["mean"]
    assert repr(encoder) == f"Encoder({str(folder)!r}, layers=2, hidden_size=64, precision='fp32', isa={info['isa']!r})"
    assert load(folder, threads=1).info()["threads"] == 1
    plan = encoder.memory_plan(1000)
    assert plan["weights_bytes"] == info["weights_bytes"] > 4 * len(VOCABULARY) * 64
    assert plan["hidden_bytes"] == encoder.forward_ragged([5] * 1000, range(0, 1001, 100)).nbytes
    assert plan["scratch_bytes"] == info["scratch_bytes"] > 0
    with pytest.raises(ValueError, match="max_batch_tokens: expected at least 1, got 0"):
        encoder.memory_plan(0)


def test_pickle_and_copy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    encoder = Encoder(folder.name, threads=1, max_seq_length=30, token="secret")
    encoder.prompts["mine"] = "of "
    encoder.similarity_fn_name = "manhattan"
    data = pickle.dumps(encoder)
    assert len(data) < 1000 and b"secret" not in data
    monkeypatch.chdir("/")
    for same in (pickle.loads(data), copy.deepcopy(encoder)):
        assert (same.threads, same.max_seq_length, same.similarity_fn_name) == (1, 30, "manhattan")
        assert same.prompts == encoder.prompts
        assert bits(same.encode(["cat", "dog " * 50], prompt_name="mine")) == bits(
            encoder.encode(["cat", "dog " * 50], prompt_name="mine")
        )


def test_from_pretrained(folder: Path, encoder: Encoder) -> None:
    class Mine(Encoder):
        pass

    mine = Mine.from_pretrained(folder, threads=1)
    assert type(mine) is Mine and mine.threads == 1
    assert bits(mine.encode("cat")) == bits(encoder.encode("cat"))


def test_threads_default(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fastbert.get_num_threads()
    try:
        fastbert.set_num_threads(3)
        assert fastbert.get_num_threads() == 3
    finally:
        fastbert.set_num_threads(0)
    assert fastbert.get_num_threads() == before >= 1
    with pytest.raises(ValueError, match="threads: expected 0 or more, got -1"):
        fastbert.set_num_threads(-1)


def test_threads_beyond_the_cpus(folder: Path, encoder: Encoder) -> None:
    """A team is no larger than the CPUs that its caller may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    many = load(folder, threads=200)
    assert 1 <= many.info()["threads"] <= cpus
    assert bits(many.encode(sentences(40))) == bits(encoder.encode(sentences(40)))
    try:
        fastbert.set_num_threads(200)
        assert fastbert.get_num_threads() == 200
        assert load(folder).info()["threads"] == many.info()["threads"]
    finally:
        fastbert.set_num_threads(0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no thread to CPUs")
def test_threads_follow_the_affinity_mask(folder: Path) -> None:
    """Of the calling thread, after the count of the machine's cores too."""
    encoder, cpu = load(folder, threads=200), min(os.sched_getaffinity(0))

    def bound() -> int:
        os.sched_setaffinity(0, {cpu})
        return encoder.info()["threads"]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(bound).result() == 1


def test_names() -> None:
    assert all(hasattr(fastbert, name) for name in fastbert.__all__)
    assert fastbert.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no_such_name"):
        fastbert.no_such_name  # noqa: B018


def test_import_is_light() -> None:
    """What takes long to import waits until it is needed."""
    heavy = ("tokenizers", "huggingface_hub", "tqdm", "importlib.metadata", "argparse")
    code = "import sys, numpy; before = {*sys.modules}; import fastbert; print(*sys.modules.keys() - before)"
    assert not {*heavy} & {*run_python(code).split()}


# ---- similarity ----

DEFINITIONS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cosine": lambda a, b: a @ b / np.sqrt((a @ a) * (b @ b)),
    "dot": lambda a, b: a @ b,
    "euclidean": lambda a, b: -np.sqrt(((a - b) ** 2).sum()),
    "manhattan": lambda a, b: -np.abs(a - b).sum(),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_similarity(plain: Encoder, name: str) -> None:
    """Within (dim + 4) roundings of float32 of the sum of the magnitudes that are added."""
    encoder = copy.copy(plain)
    encoder.similarity_fn_name = name
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, 64)), rng.standard_normal((7, 64))
    a[0] = b[0]
    expected = np.array([[DEFINITIONS[name](x, y) for y in b] for x in a])
    size = np.array([[(np.abs(x) + np.abs(y)).sum() ** (1 + (name == "dot")) for y in b] for x in a])
    scores = encoder.similarity(a, b)
    assert scores.dtype == np.float32 and scores.shape == (5, 7)
    assert (np.abs(scores - expected) <= (64 + 4) * 2**-24 * size).all()
    pairs = encoder.similarity_pairwise(a, b[:5])
    assert pairs.dtype == np.float32 and pairs.shape == (5,)
    assert (np.abs(pairs - np.diag(expected)) <= (64 + 4) * 2**-24 * np.diag(size)).all()
    assert encoder.similarity(a[1], b).shape == (1, 7)
    assert encoder.similarity(list(a.astype(np.float32)), b).shape == (5, 7)


def test_similarity_follows_the_model(encoder: Encoder) -> None:
    vectors = encoder.encode(sentences(4))
    assert encoder.similarity_fn_name == "dot"
    assert bits(encoder.similarity(vectors, vectors)) == bits(vectors @ vectors.T)
    with pytest.raises(ValueError, match=r"embeddings2: expected shape \[rows, 128\] as embeddings1, got \[4, 5\]"):
        encoder.similarity(vectors, vectors[:, :5])
    with pytest.raises(ValueError, match="embeddings2: expected 4 rows, got 3"):
        encoder.similarity_pairwise(vectors, vectors[:3])
    other = copy.copy(encoder)
    other.similarity_fn_name = "jaccard"
    with pytest.raises(ValueError, match="similarity_fn_name: expected one of cosine, dot, euclidean, manhattan"):
        other.similarity(vectors, vectors)


# ---- forward ----


def padded(lengths: list[int], seq: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids, types = rng.integers(0, len(VOCABULARY), (len(lengths), seq)), rng.integers(0, 2, (len(lengths), seq))
    return ids, (np.arange(seq) < np.array(lengths)[:, None]).astype(np.int64), types


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, ">i4"])
def test_forward_is_forward_ragged(encoder: Encoder, dtype: Any) -> None:
    ids, mask, types = (x.astype(dtype) for x in padded([7, 1, 12, 3], 12))
    output = encoder.forward(ids, mask, types)
    assert output.last_hidden_state.shape == (4, 12, 64) and output.last_hidden_state.dtype == np.float32
    assert output.pooler_output.shape == (4, 64) and output.pooler_output.dtype == np.float32
    real = mask.astype(bool)
    assert not output.last_hidden_state[~real].any()
    offsets = np.cumsum([0, 7, 1, 12, 3])
    assert bits(output.last_hidden_state[real]) == bits(encoder.forward_ragged(ids[real], offsets, types[real]))
    for same_mask in (real, mask.tolist()):
        assert bits(encoder.forward(ids.tolist(), same_mask, types)[0]) == bits(output.last_hidden_state)


def test_forward_defaults(encoder: Encoder, plain: Encoder) -> None:
    ids, mask, types = padded([6, 6], 6)
    output = encoder.forward(ids)
    assert (
        bits(output[0]) == bits(encoder.forward(ids, mask, 0 * types)[0]) != bits(encoder.forward(ids, mask, types)[0])
    )
    assert bits(encoder.forward_ragged(ids.ravel(), [0, 6, 12])) == bits(output.last_hidden_state)
    assert plain.forward(ids).pooler_output is None
    nothing = encoder.forward(np.zeros((0, 6), int))
    assert nothing.last_hidden_state.shape == (0, 6, 64) and nothing.pooler_output.shape == (0, 64)
    assert encoder.forward_ragged([], [0]).shape == (0, 64)


def test_forward_leaves_its_arguments_alone(encoder: Encoder) -> None:
    arrays = padded([6, 2], 6)
    copies = [x.copy() for x in arrays]
    for x in arrays:
        x.flags.writeable = False
    encoder.forward(*arrays)
    assert all(np.array_equal(x, y) for x, y in zip(arrays, copies, strict=True))


def at(array: np.ndarray, place: Any, value: int) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


IDS, MASK, TYPES = padded([4, 2, 3], 4)
VOCAB = len(VOCABULARY)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((IDS.astype(np.float32),), TypeError, "input_ids: expected integers, got float32"),
        (([["a"]],), TypeError, "input_ids: expected integers, got <U1"),
        ((IDS.astype(object),), TypeError, "input_ids: expected integers, got object"),
        ((IDS[0],), ValueError, r"input_ids: expected shape \[batch, seq\], got \[4\]"),
        (([[1, 2], [3]],), ValueError, r"input_ids: expected shape \[batch, seq\], got rows of different lengths"),
        ((at(IDS, (1, 2), VOCAB),), ValueError, rf"input_ids\[1, 2\]: expected 0 to {VOCAB - 1}, got {VOCAB}"),
        ((at(IDS, (2, 0), -1),), ValueError, rf"input_ids\[2, 0\]: expected 0 to {VOCAB - 1}, got -1"),
        ((at(IDS, (0, 3), 2**32 + 1),), ValueError, r"input_ids\[0, 3\]: .*got 4294967297"),
        ((at(IDS.astype(np.uint64), (0, 3), 2**64 - 1),), ValueError, r"input_ids\[0, 3\]: .*got 18446744073709551615"),
        ((IDS, MASK[:2]), ValueError, r"attention_mask: expected shape \[3, 4\], got \[2, 4\]"),
        ((IDS, MASK.astype(np.float64)), TypeError, "attention_mask: expected integers, got float64"),
        ((IDS, 2 * MASK), ValueError, r"attention_mask\[0, 0\]: expected 0 to 1, got 2"),
        ((IDS, at(MASK, (1, 3), 1)), ValueError, r"attention_mask\[1\]: expected ones, then zeros"),
        ((IDS, MASK[:, ::-1]), ValueError, r"attention_mask\[1\]: expected ones, then zeros"),
        ((IDS, at(MASK, 1, 0)), ValueError, "sequence 1: expected 1 to 512 tokens, got 0"),
        ((np.zeros((2, 0), int),), ValueError, "sequence 0: expected 1 to 512 tokens, got 0"),
        ((np.zeros((2, 513), int),), ValueError, "sequence 0: expected 1 to 512 tokens, got 513"),
        ((IDS, MASK, TYPES[:, :3]), ValueError, r"token_type_ids: expected shape \[3, 4\], got \[3, 3\]"),
        ((IDS, MASK, at(TYPES, (2, 1), 2)), ValueError, r"token_type_ids\[2, 1\]: expected 0 to 1, got 2"),
    ],
)
def test_forward_wrong_arguments(encoder: Encoder, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encoder.forward(*arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1.0], [0, 1]), TypeError, "ids: expected integers, got float64"),
        (([[1]], [0, 1]), ValueError, r"ids: expected shape \[tokens\], got \[1, 1\]"),
        (([1, VOCAB], [0, 2]), ValueError, rf"ids\[1\]: expected 0 to {VOCAB - 1}, got {VOCAB}"),
        ((np.int32([1, VOCAB]), [0, 2]), ValueError, rf"ids\[1\]: expected 0 to {VOCAB - 1}, got {VOCAB}"),
        ((np.int32([-1, 1]), [0, 2]), ValueError, rf"ids\[0\]: expected 0 to {VOCAB - 1}, got -1"),
        (([1, 2], [0.0, 2.0]), TypeError, "offsets: expected integers, got float64"),
        (([1, 2], []), ValueError, "offsets: expected batch"),
        (([1, 2], [0, 1]), ValueError, r"offsets: expected batch \+ 1 values from 0 to 2"),
        (([1, 2], [1, 2]), ValueError, r"offsets: expected batch \+ 1 values from 0 to 2"),
        (([1, 2], [0, 3]), ValueError, r"offsets\[1\]: expected 0 to 2, got 3"),
        (([1, 2], [0, -1, 2]), ValueError, r"offsets\[1\]: expected 0 to 2, got -1"),
        (([1, 2], [0, 2, 1, 2]), ValueError, r"offsets\[2\]: expected 2 to 2, got 1"),
        (([1, 2], [0, 1, 1, 2]), ValueError, "sequence 1: expected 1 to 512 tokens, got 0"),
        (([1] * 513, [0, 513]), ValueError, "sequence 0: expected 1 to 512 tokens, got 513"),
        (([1, 2], [0, 2], [0]), ValueError, r"type_ids: expected shape \[2\], got \[1\]"),
        (([1, 2], [0, 2], [0, 2]), ValueError, r"type_ids\[1\]: expected 0 to 1, got 2"),
        (([1, 2], [0, 2], np.int32([2, 0])), ValueError, r"type_ids\[0\]: expected 0 to 1, got 2"),
    ],
)
def test_forward_ragged_wrong_arguments(encoder: Encoder, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encoder.forward_ragged(*arguments)


# ---- the process: memory, signals, fork ----


def run_python(code: str, *arguments: object) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout


MEMORY = """
import random, sys
from fastbert import Encoder

def rss():  # bytes
    return int(open("/proc/self/statm").read().split()[1]) * 4096

encoder = Encoder(sys.argv[1])
rng = random.Random(0)
texts = [" ".join(rng.choices("the cat and dog can see water now".split(), k=k)) for k in range(50)]
encoder.encode(texts[-1:] * 8)
peaks = []
for fifth in range(5):
    peak = 0
    for call in range(2000):
        encoder.encode(rng.choices(texts, k=rng.randint(1, 8)), batch_size=rng.randint(1, 4))
        if call % 50 == 0:
            peak = max(peak, rss())
    peaks.append(peak)
print(*peaks)
"""


@pytest.mark.memory
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_flat(tmp_path: Path) -> None:
    """10,000 batches of random lengths: after the first 2000, less than 1 MB more (128 bytes a call would be seen)."""
    write_model(tmp_path, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
    first, *later = map(int, run_python(MEMORY, tmp_path).split())
    assert max(later) - first < 1 << 20, f"resident bytes: {first}, then {later}"


INTERRUPT = """
import signal, sys
import numpy as np
from fastbert import Encoder

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
encoder = Encoder(sys.argv[1], threads=int(sys.argv[2]))
text = "the cat and the dog " * 20
before = encoder.encode([text, "cat"])
if sys.argv[3] == "encode":
    run = lambda: encoder.encode([text] * 1_000_000)
else:  # one pass of seconds inside the engine
    batch = encoder.tokenizer.encode_batch([text] * 100)
    ids, offsets = np.tile(batch.ids, 400), np.arange(40_001) * batch.offsets[1]
    run = lambda: encoder._model.forward(ids, offsets, vectors=True, threads=encoder.threads)
print("ready", flush=True)
try:
    run()
    print("finished", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print((encoder.encode([text, "cat"]) == before).all(), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", ["encode", "forward"])
def test_interrupt(tmp_path: Path, threads: int, call: str) -> None:
    """Ctrl-C ends a long call within a second, and leaves a process that works."""
    write_model(tmp_path)
    command = [sys.executable, "-c", INTERRUPT, str(tmp_path), str(threads), call]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.5)
            start = time.monotonic()
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "interrupted\n"
            assert time.monotonic() - start < 1
            # not communicate(), which would miss what readline() has read ahead
            assert (child.stdout.read(), child.stderr.read(), child.wait(60)) == ("True\n", "", 0)
        finally:
            child.kill()


def test_idle_threads_sleep(folder: Path) -> None:
    """Within half a second after a call with two threads less than a tenth of it is spent, by all threads together."""
    load(folder, threads=2).encode(sentences(200))
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.05


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork(folder: Path) -> None:
    """A child made after the threads of the pool have run encodes, with threads of its own, to the same bits."""
    encoder = load(folder, threads=2)
    texts = sentences(200)
    expected = bits(encoder.encode(texts))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, b"same" if bits(encoder.encode(texts)) == expected else b"other")
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], 60)
        assert ready, "the child hangs"
        assert os.read(reader, 16) == b"same"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
    assert bits(encoder.encode(texts)) == expected
