"""The released code's formulas against small loops over its definitions, and their faults in the open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from sklearn import metrics as sk

from satdifuser.evaluate.evaluation import Outcome
from satdifuser.evaluate.metrics import confusion_matrix, multilabel_metrics, segmentation_metrics
from satdifuser.evaluate.reference_metrics import (
    FORMULAS,
    format_reference,
    reference_classification,
    reference_multilabel,
    reference_segmentation,
    with_faults,
)

IGNORE = 255
DOCS = Path(__file__).parents[1] / "docs/fidelity.md"


def one_hot(labels: NDArray[Any], classes: int) -> NDArray[np.float32]:
    return np.eye(classes, dtype=np.float32)[labels]


def counts(truth: NDArray[Any], guess: NDArray[Any], c: int) -> tuple[int, int, int]:
    """Right, wrongly claimed and missed places of a class."""
    pairs = list(zip(truth.ravel().tolist(), guess.ravel().tolist(), strict=True))
    tp = sum(t == g == c for t, g in pairs)
    return tp, sum(g == c for _, g in pairs) - tp, sum(t == c for t, _ in pairs) - tp


@st.composite
def labels(draw: st.DrawFn, ignored: bool = False) -> tuple[NDArray[Any], NDArray[Any], int]:
    """True and predicted labels of up to 5 classes, of which some are absent."""
    places, classes = draw(st.integers(1, 20)), draw(st.integers(2, 5))
    truth = st.sampled_from([*range(classes), IGNORE] if ignored else range(classes))
    guess = arrays(np.int64, places, elements=st.integers(0, classes - 1))
    return draw(arrays(np.int64, places, elements=truth)), draw(guess), classes


@given(labels())
@settings(max_examples=60, deadline=None)
def test_classification(case: tuple[NDArray[Any], NDArray[Any], int]) -> None:
    truth, guess, classes = case
    precision = recall = 0.0
    for c in range(classes):
        tp, fp, fn = counts(truth, guess, c)
        precision += tp / (tp + fp + 1e-10) / classes
        recall += tp / (tp + fn + 1e-10) / classes
    found = reference_classification(truth, one_hot(guess, classes))
    assert found == pytest.approx(
        {
            "Accuracy": sk.accuracy_score(truth, guess),
            "Precision": precision,
            "Recall": recall,
            "F1": 2 * precision * recall / (precision + recall + 1e-10),
        }
    )
    per_class = sk.f1_score(truth, guess, labels=range(classes), average=None, zero_division=0)
    assert found["F1"] >= np.mean(per_class) - 1e-9


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_multilabel(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 8)), data.draw(st.integers(2, 4)))
    target = data.draw(arrays(np.int64, shape, elements=st.integers(0, 1)))
    shares = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
    probabilities = data.draw(arrays(np.float32, shape, elements=shares))
    theirs = sk.precision_recall_fscore_support(
        target, (probabilities > 0.5).astype(int), average="micro", zero_division=0
    )
    found = reference_multilabel(target, probabilities)
    assert list(found.values()) == pytest.approx(theirs[:3])
    assert list(found) == ["Precision", "Recall", "F1"]


def test_a_class_at_one_half_is_predicted_by_us_alone() -> None:
    target, probabilities = np.array([[1, 0]]), np.array([[0.5, 0.1]])
    assert reference_multilabel(target, probabilities)["F1"] == 0
    assert multilabel_metrics(target, probabilities)["f1_micro"] == 1


@given(labels(ignored=True))
@settings(max_examples=60, deadline=None)
def test_segmentation(case: tuple[NDArray[Any], NDArray[Any], int]) -> None:
    target, predicted, classes = case
    truth, guess = target[target != IGNORE], predicted[target != IGNORE]
    rows = []
    for c in range(classes):
        tp, fp, fn = counts(truth, guess, c)
        swapped_precision, swapped_recall = 100 * tp / (tp + fn + 1e-6), 100 * tp / (tp + fp + 1e-6)
        f1 = 2 * swapped_precision * swapped_recall / (swapped_precision + swapped_recall + 1e-6)
        rows.append([100 * tp / (tp + fp + fn + 1e-6), f1, swapped_precision, swapped_recall])
    right = 100 * (truth == guess).sum() / (truth.size + 1e-6)
    found = reference_segmentation(confusion_matrix(target, predicted, classes, IGNORE))
    assert list(found) == ["mIoU", "mF1", "mPrecision", "mRecall", "mAcc"]
    assert [100 * value for value in found.values()] == pytest.approx([*np.mean(rows, axis=0), right])


def test_precision_and_recall_of_masks_are_swapped() -> None:
    """Class 1 is claimed everywhere, and there in half the pixels: precision 1 / 2, recall 1."""
    truth, guess = np.array([0, 0, 1, 1]), np.array([1, 1, 1, 1])
    found = reference_segmentation(confusion_matrix(truth, guess, 2))
    theirs = sk.precision_recall_fscore_support(truth, guess, average="macro", zero_division=0)
    assert (found["mRecall"], found["mPrecision"]) == pytest.approx(theirs[:2], abs=1e-6)
    assert theirs[0] != theirs[1]


def test_absent_classes_count_as_zero_for_them_and_not_for_us() -> None:
    confusion = confusion_matrix(np.array([0, 1]), np.array([0, 1]), 4)
    assert segmentation_metrics(confusion)["miou"] == 1
    assert reference_segmentation(confusion)["mIoU"] == pytest.approx(0.5)


@pytest.mark.parametrize("task", FORMULAS)
def test_an_outcome_gives_the_metrics_of_its_task_with_their_faults(task: str) -> None:
    outcome = Outcome(task, 3, IGNORE)
    guess = np.full((2, 3, 4, 4), 1 / 3, np.float32) if task == "segmentation" else np.full((2, 3), 1 / 3)
    shapes = {"classification": (2,), "multilabel": (2, 3), "segmentation": (2, 4, 4)}
    outcome.add(guess.astype(np.float32), np.ones(shapes[task], np.int64))
    found = outcome.reference()
    assert json.loads(json.dumps(found)) == found
    faults = found.pop("faults")
    assert list(found) == list(FORMULAS[task])
    assert faults == {name: formula.fault for name, formula in FORMULAS[task].items() if formula.fault}


def test_printed_lines_name_the_faults() -> None:
    lines = format_reference("test", with_faults("classification", {"Accuracy": 0.5, "Recall": 0.25}))
    assert lines == [
        "  test  reference Accuracy   0.500",
        "  test  reference Recall     0.250  classes absent from the split count as 0",
    ]
    assert format_reference("val", {}) == []


def test_the_documentation_holds_every_formula_and_fault() -> None:
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in DOCS.read_text().splitlines()]
    for formulas in FORMULAS.values():
        for name, formula in formulas.items():
            assert [f"`{name}`", formula.text, formula.fault or "–"] in rows
