"""The nine tasks of GLUE and its diagnostic set AX: their files, labels and official metrics.

Wang et al., GLUE, arXiv:1804.07461. Files are those of the official download: tab-separated, without quoting.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbert.classification import SequenceClassifier

Numbers = NDArray[np.float64]


class Task(NamedTuple):
    """Columns by name in the header, or by number in a file without one."""

    texts: tuple[str | int, ...]
    """One or two."""
    label: str | int
    labels: tuple[str, ...]
    """In the order of the data set "glue", in which files and models number them; () for regression."""
    metrics: tuple[str, ...]


_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_STRINGS = ("#1 String", "#2 String")
_QUESTIONS = ("question1", "question2")

TASKS = {
    "cola": Task((3,), 1, ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": Task(("sentence",), "label", ("negative", "positive"), ("accuracy",)),
    "mrpc": Task(_STRINGS, "Quality", ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "stsb": Task(_PAIR, "score", (), ("pearson", "spearman")),
    "qqp": Task(_QUESTIONS, "is_duplicate", ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": Task(_PAIR, "gold_label", _MNLI, ("accuracy",)),
    "qnli": Task(("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
    "rte": Task(_PAIR, "label", _ENTAILMENT, ("accuracy",)),
    "wnli": Task(_PAIR, "label", ("not_entailment", "entailment"), ("accuracy",)),
    "ax": Task(("Premise", "Hypothesis"), "Label", _MNLI, ("matthews",)),
}


class Examples(NamedTuple):
    """The content of a file."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[str]  # for regression numbers as written


def get_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def read(path: str | Path, task: str) -> Examples:
    """Read a .tsv file of a task. Raises OSError, and ValueError with file, line and what was expected."""
    spec = get_task(task)
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from None
    columns: Sequence[str | int] = (*spec.texts, spec.label)
    places = [column for column in columns if isinstance(column, int)]
    start = 0
    if not places:
        header = lines[0].split("\t")
        for column in columns:
            if column not in header:
                raise ValueError(f"{path}: line 1: expected a column {column} (task {task}), got {lines[0][:200]!r}")
        places, start = [header.index(str(column)) for column in columns], 1
    rows = []
    for number, line in enumerate(lines[start:], start + 1):
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) <= max(places):
            raise ValueError(f"{path}: line {number}: expected at least {max(places) + 1} columns, got {len(cells)}")
        *texts, label = (cells[place] for place in places)
        rows.append((texts, _label(f"{path}: line {number}", spec, label)))
    if not rows:
        raise ValueError(f"{path}: expected examples, got none")
    firsts = [texts[0] for texts, _ in rows]
    pairs = [texts[1] for texts, _ in rows] if len(spec.texts) == 2 else None
    return Examples(firsts, pairs, [label for _, label in rows])


def _label(place: str, task: Task, label: str) -> str:
    if task.labels:
        name = _label_name(task, label)
        if name not in task.labels:
            raise ValueError(f"{place}: expected a label out of {', '.join(task.labels)}, got {label!r}")
        return name
    try:
        number = float(label)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise ValueError(f"{place}: expected a number, got {label!r}")
    return label


def _label_name(task: Task, label: str) -> str:
    """The name of a label that may stand as its number."""
    number = int(label) if label.isdecimal() else len(task.labels)
    return task.labels[number] if number < len(task.labels) else label


def output_labels(classifier: SequenceClassifier, task: str, labels: Sequence[str] | None = None) -> list[str]:
    """The task's label that each output of a model means.

    labels, where given; else id2label of config.json, in any case of letters; where that only numbers the outputs
    (LABEL_0, LABEL_1, ...), the usual order of the task.
    """
    spec, names = get_task(task), list(classifier.id2label.values())
    if labels is None:
        numbered = [f"LABEL_{i}" for i in range(len(names))]
        labels = spec.labels if names == numbered else [_label_name(spec, name.lower()) for name in names]
    expected = len(spec.labels) or 1
    if len(names) != expected:
        raise ValueError(f"{classifier.model}: expected {expected} outputs for the task {task}, got {len(names)}")
    if spec.labels and sorted(labels) != sorted(spec.labels):
        raise ValueError(
            f"{classifier.model}: expected the labels {', '.join(spec.labels)} of the task {task} in some order, "
            f"got {', '.join(labels)}"
        )
    return list(labels)


def evaluate(
    classifier: SequenceClassifier, examples: Examples, task: str, labels: Sequence[str] | None = None, **options: Any
) -> dict[str, float]:
    """The official metrics of a task, each from -1 or 0 to 1; labels as in output_labels, options as in `logits`."""
    spec, meaning = get_task(task), output_labels(classifier, task, labels)
    logits = classifier.logits(examples.texts, examples.pairs, **options)
    if spec.labels:
        predicted = np.array([spec.labels.index(meaning[i]) for i in logits.argmax(axis=1)], np.float64)
        truth = np.array([spec.labels.index(label) for label in examples.labels], np.float64)
    else:
        predicted = logits[:, 0].astype(np.float64)
        truth = np.array(examples.labels, np.float64)
    return {name: METRICS[name](truth, predicted) for name in spec.metrics}


# ---- metrics ----


def accuracy(truth: Numbers, predicted: Numbers) -> float:
    return float((truth == predicted).mean())


def f1(truth: Numbers, predicted: Numbers) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where there is none of it on either side."""
    both = truth.sum() + predicted.sum()
    return float(2 * (truth * predicted).sum() / both) if both else 0.0


def matthews(truth: Numbers, predicted: Numbers) -> float:
    """Correlation of two classifications: phi, and for more than two classes R_K; 0 where one of them is constant.

    Gorodkin, Comput. Biol. Chem. 28, 2004.
    """
    classes = np.union1d(truth, predicted)
    a, b = (x[:, None] == classes for x in (truth, predicted))

    def covariance(x: NDArray[np.bool_], y: NDArray[np.bool_]) -> float:
        return float((x & y).sum() * len(x) - (x.sum(axis=0) * y.sum(axis=0)).sum())

    size = covariance(a, a) * covariance(b, b)
    return covariance(a, b) / float(np.sqrt(size)) if size else 0.0


def pearson(truth: Numbers, predicted: Numbers) -> float:
    """0 where one of them is constant."""
    a, b = truth - truth.mean(), predicted - predicted.mean()
    size = float((a @ a) * (b @ b))
    return float(a @ b) / np.sqrt(size) if size else 0.0


def spearman(truth: Numbers, predicted: Numbers) -> float:
    """Pearson's correlation of ranks; equal values share the mean of theirs."""
    return pearson(_ranks(truth), _ranks(predicted))


def _ranks(x: Numbers) -> Numbers:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
