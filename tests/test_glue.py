"""GLUE: the layouts of the files, the meaning of outputs, the metrics, and `fastbert eval`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert import SequenceClassifier, cli, glue
from tests import make_golden_heads as golden

# The header of a task's file as GLUE has it (None: no header), and a row with {0}, {1} for texts and {label}.
LAYOUTS: dict[str, tuple[str | None, str]] = {
    "cola": (None, "gj04\t{label}\t*\t{0}"),
    "sst2": ("sentence\tlabel", "{0}\t{label}"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t1355540\t1355592\t{0}\t{1}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain-captions\tMSRvid\t2012test\t0000\tnone\tnone\t{0}\t{1}\t{label}",
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{0}\t{1}\t{label}"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
        "0\t1\t1e\tfiction\t(x)\t(y)\t(X)\t(Y)\t{0}\t{1}\tneutral\tneutral\tneutral\tneutral\tneutral\t{label}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{0}\t{1}\t{label}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{0}\t{1}\t{label}"),
    "wnli": ("index\tsentence1\tsentence2\tlabel", "0\t{0}\t{1}\t{label}"),
    "ax": (
        "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain\tPremise\tHypothesis\tLabel",
        "\t\tNegation\t\tNews\t{0}\t{1}\t{label}",
    ),
}
NUMBERED = ("cola", "sst2", "mrpc", "qqp", "wnli")  # files that hold 0 and 1
each_task = pytest.mark.parametrize("task", glue.TASKS)


def labels_of(task: str, n: int) -> list[str]:
    rng = np.random.default_rng(0)
    if task == "stsb":
        return [f"{score:.3f}" for score in rng.uniform(0, 5, n)]
    labels = glue.TASKS[task].labels
    return [labels[i] for i in rng.integers(len(labels), size=n)]


def write(path: Path, task: str, labels: list[str]) -> tuple[list[str], list[str]]:
    """A file of a task; returns its texts."""
    header, row = LAYOUTS[task]
    firsts, seconds = golden.texts(len(labels), 1), golden.texts(len(labels), 2)
    firsts[0] = 'a "quoted part'  # a quote begins nothing in these files
    known = glue.TASKS[task].labels
    written = [str(known.index(label)) if task in NUMBERED else label for label in labels]
    lines = [row.format(a, b, label=label) for a, b, label in zip(firsts, seconds, written, strict=True)]
    path.write_bytes(("\n".join([*([header] if header else []), *lines]) + "\n").encode())
    return firsts, seconds


def model(folder: Path, *labels: str) -> Path:
    golden.write(folder, "BertForSequenceClassification", id2label={str(i): name for i, name in enumerate(labels)})
    return folder


def test_ten_tasks() -> None:
    assert glue.TASKS.keys() == LAYOUTS.keys() and len(LAYOUTS) == 10
    with pytest.raises(ValueError, match=r"task: expected one of cola, sst2, mrpc, stsb, qqp, mnli, .*, got 'imdb'"):
        glue.get_task("imdb")


@each_task
def test_file(task: str, tmp_path: Path) -> None:
    labels = labels_of(task, 20)
    firsts, seconds = write(tmp_path / "dev.tsv", task, labels)
    examples = glue.read(tmp_path / "dev.tsv", task)
    assert examples == (firsts, seconds if len(glue.TASKS[task].texts) == 2 else None, labels)


@each_task
def test_evaluation(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fastbert eval` gives the metrics of the classifier's own logits, in both precisions."""
    labels = labels_of(task, 40)
    firsts, seconds = write(tmp_path / "dev.tsv", task, labels)
    spec = glue.TASKS[task]
    names = spec.labels[::-1] or ("score",)  # another order than usual: the names say what is meant
    folder = model(tmp_path / "model", *names)
    assert cli.main(["eval", str(folder), str(tmp_path / "dev.tsv"), "--task", task, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["task", "examples", "fp32", "int8"] and report["examples"] == 40
    for precision in ("fp32", "int8"):
        logits = SequenceClassifier(folder, precision=precision).logits(
            firsts, seconds if len(spec.texts) == 2 else None
        )
        if task == "stsb":
            truth, predicted = np.array(labels, np.float64), logits[:, 0].astype(np.float64)
        else:
            truth = np.array([names.index(label) for label in labels], np.float64)
            predicted = logits.argmax(axis=1).astype(np.float64)
            if "f1" in spec.metrics:
                truth, predicted = 1 - truth, 1 - predicted  # the second of spec.labels is what F1 is of
        assert report[precision] == {name: pytest.approx(glue.METRICS[name](truth, predicted)) for name in spec.metrics}


def test_meaning_of_outputs(tmp_path: Path) -> None:
    def meaning(task: str, *names: str, labels: list[str] | None = None) -> list[str]:
        folder = model(tmp_path / "-".join(names), *names)
        return glue.output_labels(SequenceClassifier(folder), task, labels)

    assert meaning("mnli", "LABEL_0", "LABEL_1", "LABEL_2") == ["entailment", "neutral", "contradiction"]
    assert meaning("mnli", "CONTRADICTION", "Entailment", "neutral") == ["contradiction", "entailment", "neutral"]
    assert meaning("sst2", "1", "0") == ["positive", "negative"]
    assert meaning("rte", "x", "y", labels=["not_entailment", "entailment"]) == ["not_entailment", "entailment"]
    assert meaning("stsb", "whatever") == ["whatever"]
    with pytest.raises(ValueError, match="expected 3 outputs for the task mnli, got 2"):
        meaning("mnli", "x", "y")
    with pytest.raises(
        ValueError, match="expected the labels negative, positive of the task sst2 in some order, got x, y"
    ):
        meaning("sst2", "x", "y")
    with pytest.raises(ValueError, match="got positive, positive"):
        meaning("sst2", "x", "y", labels=["positive", "positive"])


@pytest.mark.parametrize(
    "task, content, message",
    [
        ("sst2", b"text\tlabel\na\t1\n", "line 1: expected a column sentence"),
        ("sst2", b"", "line 1: expected a column sentence"),
        ("sst2", b"sentence\tlabel\n", "expected examples, got none"),
        ("sst2", b"sentence\tlabel\na\t1\nb\n", "line 3: expected at least 2 columns, got 1"),
        ("sst2", b"sentence\tlabel\na\t2\n", "line 2: expected a label out of negative, positive, got '2'"),
        ("sst2", b"sentence\tlabel\n\xff\t1\n", "expected UTF-8"),
        ("cola", b"gj04\t1\t\n", "line 1: expected at least 4 columns, got 3"),
        (
            "rte",
            b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tneutral\n",
            "line 2: expected a label out of entailment",
        ),
        ("stsb", b"sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: expected a number, got 'nan'"),
    ],
)
def test_wrong_file(task: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        glue.read(path, task)
    assert str(caught.value).startswith(f"{path}: ")


# ---- metrics ----

CASES: list[tuple[str, list[float], list[float], float]] = [
    ("accuracy", [0, 1, 1, 2], [0, 1, 2, 2], 0.75),
    ("f1", [1, 1, 0, 0, 1], [1, 0, 1, 0, 1], 2 * 2 / (2 * 2 + 1 + 1)),
    ("f1", [0, 0], [0, 0], 0.0),
    ("matthews", [1, 1, 0, 0, 1], [1, 0, 1, 0, 1], (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)),
    ("matthews", [0, 1], [1, 0], -1.0),
    ("matthews", [0, 1, 2, 2], [0, 1, 2, 2], 1.0),
    ("matthews", [0, 1, 2], [1, 1, 1], 0.0),
    ("pearson", [1, 2, 3], [2, 4, 6], 1.0),
    ("pearson", [1, 2, 4], [1, 1, 1], 0.0),
    ("spearman", [1, 2, 3, 4], [1, 10, 100, 1000], 1.0),
    ("spearman", [1, 2, 3, 4], [1, 2, 2, 0], -0.316227766016838),  # ranks 2, 3.5, 3.5, 1
]


@pytest.mark.parametrize("name, truth, predicted, value", CASES)
def test_metric(name: str, truth: list[float], predicted: list[float], value: float) -> None:
    assert glue.METRICS[name](np.array(truth, np.float64), np.array(predicted, np.float64)) == pytest.approx(value)


def test_metrics_are_those_of_others() -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(0)
    judges: dict[str, Any] = {
        "accuracy": sklearn.accuracy_score,
        "f1": sklearn.f1_score,
        "matthews": sklearn.matthews_corrcoef,
        "pearson": lambda a, b: scipy.pearsonr(a, b).statistic,
        "spearman": lambda a, b: scipy.spearmanr(a, b).statistic,
    }
    assert judges.keys() == glue.METRICS.keys()
    for name, judge in judges.items():
        for _ in range(50):
            high = 3 if name in ("matthews", "accuracy") else 2 if name == "f1" else 9
            truth, predicted = rng.integers(high, size=(2, 30)).astype(np.float64)
            assert glue.METRICS[name](truth, predicted) == pytest.approx(judge(truth, predicted)), name
