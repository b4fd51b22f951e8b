"""The command line, run as a user runs it: python -m fastbert in a process of its own."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastbert
from fastbert import Encoder, _core
from tests.models import Sentence, write_model

TEXTS = ["the cat", "", "a dog, and a \N{SNOWMAN} in the water", 'to "be", or not']
COMMAND = [sys.executable, "-m", "fastbert"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, sentence=Sentence(max_seq_length=32), hidden_size=32, num_hidden_layers=1)
    config = {"prompts": {"query": "find: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder(folder)


def run(*arguments: Any, stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    arguments = [a if isinstance(a, bytes) else str(a) for a in arguments]
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, timeout=60, **options)


def output(*arguments: Any, **options: Any) -> bytes:
    result = run(*arguments, **options)
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout


def vectors(lines: bytes) -> np.ndarray:
    return np.array([json.loads(line)["embedding"] for line in lines.splitlines()], np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- encode ----


def test_texts_as_arguments(folder: Path, encoder: Encoder) -> None:
    lines = output("encode", "-m", folder, *TEXTS)
    assert [json.loads(line)["text"] for line in lines.splitlines()] == TEXTS
    assert "\N{SNOWMAN}".encode() in lines
    assert same_bits(vectors(lines), encoder.encode(TEXTS))


def test_standard_input(folder: Path, encoder: Encoder) -> None:
    """A text per line, with either line end, with and without the last one, perhaps after a byte order mark."""
    for text in ("\n".join(TEXTS), "\n".join(TEXTS) + "\n", "\ufeff" + "\r\n".join(TEXTS)):
        lines = output("encode", "-m", folder, "--batch-size", 3, stdin=text.encode())
        assert [json.loads(line)["text"] for line in lines.splitlines()] == TEXTS
        assert same_bits(vectors(lines), encoder.encode(TEXTS))
    assert output("encode", "-m", folder) == b""


def test_files(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("\n".join(TEXTS), encoding="utf-8")
    expected = encoder.encode(TEXTS)
    for name, form in (("v.jsonl", []), ("v", []), ("v.npy", ["--format", "jsonl"])):
        assert output("encode", "-m", folder, "-i", source, "-o", tmp_path / name, *form) == b""
        assert same_bits(vectors((tmp_path / name).read_bytes()), expected)
    for form, name in ((["-f", "npy"], "x"), ([], "v.npy")):
        output("encode", "-m", folder, "-i", source, "-o", tmp_path / name, *form)
        assert same_bits(np.load(tmp_path / name), expected)
    output("encode", "-m", folder, "-i", source, "-o", tmp_path / "v.csv")
    with open(tmp_path / "v.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["text", *map(str, range(32))]
    assert [row[0] for row in rows] == TEXTS
    assert same_bits(np.array([row[1:] for row in rows], dtype=np.float32), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"texts.txt", "v.jsonl", "v", "v.npy", "x", "v.csv"}


def test_npy_through_a_pipe(folder: Path, encoder: Encoder) -> None:
    data = output("encode", "-m", folder, "-f", "npy", "-i", "-", stdin="\n".join(TEXTS).encode())
    assert same_bits(np.load(io.BytesIO(data)), encoder.encode(TEXTS))
    empty = np.load(io.BytesIO(output("encode", "-m", folder, "-f", "npy", "--truncate-dim", 5)))
    assert empty.shape == (0, 5)


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev/stdout")
def test_output_that_is_no_file(folder: Path, encoder: Encoder) -> None:
    lines = output("encode", "-m", folder, "-o", "/dev/stdout", *TEXTS)
    assert same_bits(vectors(lines), encoder.encode(TEXTS))


def test_link_stays(folder: Path, encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("old")
    output("encode", "-m", folder, "-o", tmp_path / "link", *TEXTS)
    assert (tmp_path / "link").is_symlink()
    assert same_bits(vectors((tmp_path / "file").read_bytes()), encoder.encode(TEXTS))


@pytest.mark.parametrize(
    "arguments, options",
    [
        (["--prompt-name", "query"], {"prompt_name": "query"}),
        (["--prompt", "of "], {"prompt": "of "}),
        (["--truncate-dim", "7"], {"truncate_dim": 7}),
        (["--no-normalize", "--truncate-dim", "7"], {"truncate_dim": 7, "normalize_embeddings": False}),
        (["--normalize"], {"normalize_embeddings": True}),
        (["--threads", "1", "--batch-size", "1"], {}),
    ],
)
def test_options(folder: Path, encoder: Encoder, arguments: list[str], options: dict[str, Any]) -> None:
    lines = output("encode", "-m", folder, *arguments, *TEXTS)
    assert same_bits(vectors(lines), encoder.encode(TEXTS, **options))


def test_max_seq_length(folder: Path) -> None:
    lines = output("encode", "-m", folder, "--max-seq-length", 5, "the cat and dog", "the cat and a dog")
    assert same_bits(vectors(lines), Encoder(folder, max_seq_length=5).encode(["the cat and dog", "the cat and a dog"]))


def test_streaming(folder: Path) -> None:
    """Vectors come out while standard input is still open; Ctrl-C then ends it in order."""
    command = [*COMMAND, "encode", "-m", str(folder), "--batch-size", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as child:
        try:
            for text in (b"the cat", b"a dog"):
                child.stdin.write(text + b"\n")
                child.stdin.flush()
                assert json.loads(child.stdout.readline())["text"] == text.decode()
            child.send_signal(signal.SIGINT)
            assert child.wait(10) == 130
            assert child.stderr.read() == b""
        finally:
            child.kill()


def test_reader_leaves(folder: Path) -> None:
    command = [*COMMAND, "encode", "-m", str(folder), "-i", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as child:
        child.stdout.close()
        try:
            child.stdin.write(b"the cat\n" * 1000)
            child.stdin.close()
        except BrokenPipeError:
            pass
        assert child.wait(60) == 141
        assert child.stderr.read() == b""


@pytest.mark.parametrize("old", [None, b"old"])
def test_output_is_whole_or_not_there(folder: Path, tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "v.jsonl"
    if old is not None:
        path.write_bytes(old)
    lines = b"the cat\n" * 500 + b"\xff\n"
    result = run("encode", "-m", folder, "-o", path, "--batch-size", 10, stdin=lines)
    assert result.returncode == 2
    assert result.stderr == b"fastbert: error: standard input: line 501: expected UTF-8, got 0xff\n"
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["encode", "-m", "./no/such/folder", "cat"], "no/such/folder: expected a folder"),
        (["encode", "-m", "FOLDER", "--prompt-name", "nope", "cat"], "prompt_name: expected one of query, document"),
        (["encode", "-m", "FOLDER", "--truncate-dim", "33", "cat"], "truncate_dim: expected 1 to 32, got 33"),
        (["encode", "-m", "FOLDER", "--batch-size", "0", "cat"], "batch_size: expected at least 1, got 0"),
        (["encode", "-m", "FOLDER", "--threads", "0", "cat"], "threads: expected at least 1, got 0"),
        (["encode", "-m", "FOLDER", "--max-seq-length", "1000", "cat"], "max_seq_length"),
        (["encode", "-m", "FOLDER", "--on-long", "error", "cat", "cat " * 40], "inputs[1]: expected at most 32 tokens"),
        (["encode", "-m", "FOLDER", "-i", "-", "cat"], "expected texts as arguments or with --input, got both"),
        (["encode", "-m", "FOLDER", "-i", "no-such-file"], "no-such-file: No such file or directory"),
        (["encode", "-m", "FOLDER", "-o", "no-such-folder/v.npy", "cat"], "No such file or directory"),
        (["encode", "-m", "FOLDER", "-o", ".", "cat"], ".: Is a directory"),
        (["encode", "-m", "FOLDER", "cat", b"\xff"], "argument 2: expected UTF-8, got 0xff"),
        (["encode", "-m", "FOLDER", "--format", "xml", "cat"], "argument -f/--format: invalid choice: 'xml'"),
        (["encode", "-m", "FOLDER", "--prompt", "a", "--prompt-name", "b", "cat"], "not allowed with argument"),
        (["encode", "--nope"], "unrecognized arguments: --nope"),
        (["translate"], "invalid choice: 'translate'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_user_errors(folder: Path, tmp_path: Path, arguments: list[Any], message: str) -> None:
    result = run(*(folder if a == "FOLDER" else a for a in arguments), cwd=tmp_path)
    error = result.stderr.decode()
    assert (result.returncode, result.stdout) == (2, b"")
    assert error.startswith("fastbert") and message in error and error.endswith("\n") and error.count("\n") == 1


def test_kernel_set_that_is_not_there(folder: Path) -> None:
    for arguments in (["info"], ["encode", "-m", folder, "cat"]):
        result = run(*arguments, env=os.environ | {"FASTBERT_ISA": "sse9"})
        assert result.returncode == 2
        assert result.stderr.decode().startswith("fastbert: error: FASTBERT_ISA: expected one of ")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs terminals")
def test_terminal(folder: Path) -> None:
    """On a terminal nothing waits for lines nobody knows of, and no binary comes out."""
    controller, terminal = os.openpty()
    try:
        result = subprocess.run([*COMMAND, "encode", "-m", folder], stdin=terminal, capture_output=True, timeout=60)
        assert result.returncode == 2
        assert b"expected texts as arguments, with --input FILE or on standard input" in result.stderr
        command = [*COMMAND, "encode", "-m", folder, "-f", "npy", "cat"]
        result = subprocess.run(command, stdout=terminal, stderr=subprocess.PIPE, timeout=60)
        assert (result.returncode, b"got a terminal" in result.stderr) == (2, True)
    finally:
        os.close(controller)
        os.close(terminal)


# ---- classify, rerank ----


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    labels = {"0": "no", "1": "yes", "2": "perhaps"}
    write_model(folder, architectures=["BertForSequenceClassification"], id2label=labels, hidden_size=32)
    return folder


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_classify(classifier: Path) -> None:
    model = fastbert.SequenceClassifier(classifier)
    expected = [{"text": text} | result for text, result in zip(TEXTS, model(TEXTS), strict=True)]
    assert lines(output("classify", "-m", classifier, *TEXTS)) == expected
    stdin = "\n".join(TEXTS).encode()
    assert lines(output("classify", "-m", classifier, "--batch-size", 3, stdin=stdin)) == expected
    best = [{"text": text, "labels": row} for text, row in zip(TEXTS, model(TEXTS, top_k=2), strict=True)]
    assert lines(output("classify", "-m", classifier, "--top-k", 2, *TEXTS)) == best


def test_classify_pairs(classifier: Path) -> None:
    result = output("classify", "-m", classifier, "--pairs", stdin=b"the cat\ta dog\nwater\toil\n")
    expected = fastbert.SequenceClassifier(classifier)(["the cat", "water"], ["a dog", "oil"])
    assert [row["label"] for row in lines(result)] == [row["label"] for row in expected]
    assert [row["score"] for row in lines(result)] == [row["score"] for row in expected]
    wrong = run("classify", "-m", classifier, "--pairs", "-i", "-", stdin=b"the cat\ta dog\nwater\n")
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert b"text 2: expected two texts parted by a tab, got 1" in wrong.stderr


def test_rerank(tmp_path: Path) -> None:
    write_model(tmp_path, architectures=["BertForSequenceClassification"], id2label={"0": "x"}, hidden_size=32)
    ranked = lines(output("rerank", "-m", tmp_path, "-q", "oil", *TEXTS))
    assert ranked == fastbert.CrossEncoder(tmp_path).rank("oil", TEXTS, return_documents=True)
    assert lines(output("rerank", "-m", tmp_path, "-q", "oil", "--top-k", 1, *TEXTS)) == ranked[:1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["classify", "a"], b"required: -m/--model"),
        (["rerank", "-m", "x", "a"], b"required: -q/--query"),
        (["eval", "x", "y", "--task", "imdb"], b"task: expected one of cola, sst2, "),
        (["eval", "x", "nowhere.tsv", "--task", "sst2"], b"nowhere.tsv: No such file"),
        (["classify", "-m", "x", "--batch-size", "0", "a"], b"--batch-size: expected at least 1, got 0"),
    ],
)
def test_wrong_task_commands(arguments: list[str], message: bytes) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    assert message in result.stderr and b"Traceback" not in result.stderr


# ---- info ----


def test_version() -> None:
    assert output("--version").decode() == f"fastbert {fastbert.__version__}\n"


def test_info(folder: Path, encoder: Encoder) -> None:
    report = json.loads(output("info", "--json"))
    assert report["versions"]["fastbert-cpu"] == fastbert.__version__
    states = {k.name: "chosen" if k.chosen else "supported" if k.supported else None for k in fastbert.kernels()}
    assert {name: state for name, state in report["kernels"].items() if state != "not supported by this CPU"} == {
        name: state for name, state in states.items() if state
    }
    assert report["threads"] == _core.usable_threads()
    assert "model" not in report
    report = json.loads(output("info", "-m", folder, "--json"))
    assert report["model"] == json.loads(json.dumps(encoder.info()))


def test_info_for_people(folder: Path) -> None:
    words = output("info", "-m", folder).decode().split()
    for name, value in {"hidden_size": "32", "pooling": "mean", "max_seq_length": "32", "threads": None}.items():
        assert words[words.index(name) + 1] == value or value is None
    assert "MB" in words


# ---- bench ----

QUICK = ("--seconds", 0, "--threads", 1)


def test_bench(folder: Path, encoder: Encoder) -> None:
    report = json.loads(output("bench", folder, "--tokens", "1,5", "--texts", "2", *QUICK, "--json"))
    assert (report["model"], report["kernel set"], report["threads"]) == (str(folder), encoder.info()["isa"], 1)
    figures = report["figures"]
    assert [(f["texts"], f["tokens"], f["runner"]) for f in figures] == [
        (2, tokens, f"fastbert {precision}") for tokens in (1, 5) for precision in ("fp32", "int8")
    ]
    for f in figures:
        assert 0 < f["ms"]["low"] <= f["ms"]["median"] <= f["ms"]["high"]
        assert f["tokens_per_second"] == pytest.approx(1e3 * f["texts"] * f["tokens"] / f["ms"]["median"])
    assert [f["cosine"] == pytest.approx(1, abs=1e-9) for f in figures] == [True, False, True, False]
    assert all(f["cosine"] > 0.99 for f in figures)
    assert all(f["ratio"]["median"] == 1 for f in figures[::2])


def test_bench_for_people(folder: Path) -> None:
    lines = (
        output("bench", folder, "--tokens", "3", "--texts", "1,2", "--precision", "int8", *QUICK).decode().split("\n")
    )
    assert lines[0] == str(folder)
    assert "kernel set: " in lines[1] and "threads: 1" in lines[1]
    assert [line.split(" | ")[0] for line in lines[3:] if line] == [
        "| texts x tokens",
        "| --------------",
        "| 1 x 3         ",
        "| 2 x 3         ",
    ]


def test_bench_against_pytorch(folder: Path) -> None:
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    result = run("bench", folder, "--tokens", "6", "--against", "pytorch", *QUICK, "--json")  # torch may warn
    assert result.returncode == 0, result.stderr
    found = {f["runner"]: f["cosine"] for f in json.loads(result.stdout)["figures"]}
    assert found["pytorch"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--against", "abacus"],
            "--against: expected names out of pytorch, sentence-transformers, onnxruntime, got 'aba",
        ),
        (["--tokens", "8,513"], "--tokens: expected 1 to 512, got 513"),
        (["--texts", "0"], "--texts: expected at least 1, got 0"),
        (["--texts", "2,many"], "expected whole numbers with commas between them, got '2,many'"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
    ],
)
def test_bench_errors(folder: Path, arguments: list[str], message: str) -> None:
    result = run("bench", folder, *arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    assert message in result.stderr.decode() and result.stderr.count(b"\n") == 1


def test_bench_against_an_engine_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    """Neither a package that cannot be imported nor a folder without its file is a crash."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('broken')")
    result = run("bench", folder, "--against", "onnxruntime", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.decode() == (
        "fastbert: error: onnxruntime: expected the package onnxruntime to be installed: broken\n"
    )
    (tmp_path / "onnxruntime.py").write_text("")
    result = run("bench", folder, "--against", "onnxruntime", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 2
    assert f"expected onnx/model.onnx or model.onnx in {folder}, found neither" in result.stderr.decode()


def test_help() -> None:
    assert {b"encode", b"info", b"bench"} <= {*output("--help").split()}
    assert b"--truncate-dim" in output("encode", "--help")
