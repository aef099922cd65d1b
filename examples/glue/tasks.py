"""GLUE's nine tasks: files, columns by name, labels, metrics and submissions.

Columns differ between GLUE's own TSV files and the `datasets` package, so both are
named. Labels are in the order of `datasets`, which the hub's models share.

References:
    Wang et al., GLUE, arXiv:1804.07461; gluebenchmark.com for files and submissions.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

Metric = Callable[[np.ndarray, np.ndarray], float]


def _matthews(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(sklearn_metrics.matthews_corrcoef(labels, predicted))


def _accuracy(labels: np.ndarray, predicted: np.ndarray) -> float:
    return float(sklearn_metrics.accuracy_score(labels, predicted))


def _f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    f1: Any = sklearn_metrics.f1_score  # its stubs take zero_division for a str
    return float(f1(labels, predicted, zero_division=0))


def _pearson(labels: np.ndarray, predicted: np.ndarray) -> float:
    return _correlation(stats.pearsonr, labels, predicted)


def _spearman(labels: np.ndarray, predicted: np.ndarray) -> float:
    return _correlation(stats.spearmanr, labels, predicted)


def _correlation(
    function: Callable, labels: np.ndarray, predicted: np.ndarray
) -> float:
    """A constant correlates with nothing: 0, as Matthews' coefficient has it."""
    if np.ptp(labels) == 0 or np.ptp(predicted) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant ones, too
        value = float(function(labels, predicted).statistic)
    return value if np.isfinite(value) else 0.0


class Split(NamedTuple):
    """One set of rows under the names that each of its sources gives it."""

    tsv: str
    """File of GLUE's, without its ending."""
    datasets: str
    """Split of the `datasets` package."""
    submission: str = ""
    """File of predictions, without its ending."""
    suffix: str = ""
    """Put behind the names of its metrics."""


class Task(NamedTuple):
    """A task; `labels` is empty where a number is asked for."""

    name: str
    """GLUE's name, and that of its folder."""
    config: str
    """Its name in the `datasets` package."""
    sentences: tuple[str, ...]
    """Columns with text in the TSV files."""
    label: str
    """Column with the label in the TSV files."""
    labels: tuple[str, ...]
    """Names of the classes."""
    metrics: dict[str, Metric]
    datasets_sentences: tuple[str, ...] = ()
    """The columns with text in `datasets`, where they are named otherwise."""
    in_words: bool = False
    """Whether files and submissions hold the names of the labels, not numbers."""
    header: tuple[str, ...] = ()
    """Columns of the files with labels, where those have no header."""
    broken_rows: bool = False
    """Whether GLUE's own files have rows that are cut short; they are passed over."""

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def valid(self) -> tuple[Split, ...]:
        return self._splits("dev", "validation")

    @property
    def test(self) -> tuple[Split, ...]:
        return self._splits("test", "test")

    @property
    def train(self) -> Split:
        return Split("train", "train")

    def _splits(self, tsv: str, datasets: str) -> tuple[Split, ...]:
        if self.name != "MNLI":
            return (Split(tsv, datasets, self.name),)
        names = (("matched", "m", ""), ("mismatched", "mm", "_mismatched"))
        return tuple(
            Split(f"{tsv}_{name}", f"{datasets}_{name}", f"MNLI-{short}", suffix)
            for name, short, suffix in names
        )


_ENTAILS = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")
_ACCURACY = {"accuracy": _accuracy}
_ACCURACY_F1 = {"accuracy": _accuracy, "f1": _f1}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "CoLA",
            "cola",
            ("sentence",),
            "label",
            ("unacceptable", "acceptable"),
            {"matthews_correlation": _matthews},
            header=("source", "label", "mark", "sentence"),
        ),
        Task(
            "SST-2", "sst2", ("sentence",), "label", ("negative", "positive"), _ACCURACY
        ),
        Task(
            "MRPC",
            "mrpc",
            ("#1 String", "#2 String"),
            "Quality",
            ("not_equivalent", "equivalent"),
            _ACCURACY_F1,
            datasets_sentences=_PAIR,
        ),
        Task(
            "QQP",
            "qqp",
            ("question1", "question2"),
            "is_duplicate",
            ("not_duplicate", "duplicate"),
            _ACCURACY_F1,
            broken_rows=True,
        ),
        Task(
            "STS-B",
            "stsb",
            _PAIR,
            "score",
            (),
            {"pearson": _pearson, "spearman": _spearman},
        ),
        Task(
            "MNLI",
            "mnli",
            _PAIR,
            "gold_label",
            ("entailment", "neutral", "contradiction"),
            _ACCURACY,
            datasets_sentences=("premise", "hypothesis"),
            in_words=True,
        ),
        Task(
            "QNLI",
            "qnli",
            ("question", "sentence"),
            "label",
            _ENTAILS,
            _ACCURACY,
            in_words=True,
        ),
        Task("RTE", "rte", _PAIR, "label", _ENTAILS, _ACCURACY, in_words=True),
        Task(
            "WNLI", "wnli", _PAIR, "label", ("not_entailment", "entailment"), _ACCURACY
        ),
    )
}


def predictions(task: Task, outputs_bc: np.ndarray) -> np.ndarray:
    """Class numbers, or scores kept within STS-B's 0 to 5; NaN counts as 0."""
    outputs_bc = np.nan_to_num(outputs_bc)
    if task.is_regression:
        return np.clip(outputs_bc[:, 0], 0.0, 5.0)
    return np.argmax(outputs_bc, axis=1)


def score(task: Task, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """GLUE's metrics by name."""
    return {name: metric(labels, predicted) for name, metric in task.metrics.items()}


def majority(task: Task, labels: np.ndarray) -> dict[str, float]:
    """What the most frequent class, or the mean score, gets."""
    if task.is_regression:
        constant = np.full(labels.shape, np.mean(labels))
    else:
        constant = np.full(labels.shape, np.bincount(labels.astype(int)).argmax())
    return score(task, labels, constant)


def submission(task: Task, predicted: np.ndarray) -> str:
    """The text of a file for GLUE's server: index and prediction, tab-separated."""
    if task.is_regression:
        told = [f"{value:.3f}" for value in predicted]
    else:
        told = [
            task.labels[int(value)] if task.in_words else str(int(value))
            for value in predicted
        ]
    lines = [f"{index}\t{value}" for index, value in enumerate(told)]
    return "\n".join(["index\tprediction", *lines]) + "\n"
