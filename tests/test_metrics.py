"""Metrics against scikit-learn, on random cases with absent classes, ties and ignored places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from sklearn import metrics as sk

from satdifuser.errors import RunError
from satdifuser.evaluate.metrics import (
    classification_metrics,
    confusion_matrix,
    multilabel_metrics,
    multilabel_table,
    per_class_table,
    segmentation_metrics,
    segmentation_scores,
)

IGNORE = 255
# few distinct probabilities, so that ties are common
PROBABILITIES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])


@st.composite
def single_label(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any]]:
    tiles, classes = draw(st.integers(1, 12)), draw(st.integers(2, 5))
    target = draw(arrays(np.int64, tiles, elements=st.integers(0, classes - 1)))
    return target, draw(arrays(np.float32, (tiles, classes), elements=PROBABILITIES))


@st.composite
def masks(draw: st.DrawFn) -> tuple[NDArray[Any], NDArray[Any], int]:
    shape, classes = (draw(st.integers(1, 5)), draw(st.integers(1, 5))), draw(st.integers(2, 4))
    target = draw(arrays(np.uint8, shape, elements=st.sampled_from([*range(classes), IGNORE])))
    return target, draw(arrays(np.uint8, shape, elements=st.integers(0, classes - 1))), classes


@given(single_label())
@settings(max_examples=60, deadline=None)
def test_classification_equals_sklearn(case: tuple[NDArray[Any], NDArray[Any]]) -> None:
    target, probabilities = case
    predicted, present = probabilities.argmax(axis=1), np.unique(target)
    classes = np.arange(probabilities.shape[1])
    ours = classification_metrics(target, probabilities)
    f1 = sk.f1_score(target, predicted, labels=present, average="macro", zero_division=0)
    truth = (target[:, None] == classes)[:, present]
    theirs = {
        "accuracy": sk.accuracy_score(target, predicted),
        "f1_macro": f1,
        "f1_micro": sk.f1_score(target, predicted, labels=classes, average="micro"),
        "average_precision": sk.average_precision_score(truth, probabilities[:, present], average="macro"),
    }
    assert ours == pytest.approx(theirs)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_multilabel_equals_sklearn(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 10)), data.draw(st.integers(2, 4)))
    target = data.draw(arrays(np.int8, shape, elements=st.integers(0, 1)))
    target[0, 0] = 1  # sklearn has no value for a truth without any class
    probabilities = data.draw(arrays(np.float32, shape, elements=PROBABILITIES))
    predicted, present = (probabilities >= 0.5).astype(int), np.flatnonzero(target.any(axis=0))
    f1 = sk.f1_score(target, predicted, average=None, zero_division=0)
    ap = sk.average_precision_score(target[:, present], probabilities[:, present], average="macro")
    theirs = {
        "accuracy": sk.accuracy_score(target, predicted),
        "f1_macro": np.asarray(f1)[present].mean(),
        "f1_micro": sk.f1_score(target, predicted, average="micro", zero_division=0),
        "average_precision": ap,
    }
    assert multilabel_metrics(target, probabilities) == pytest.approx(theirs)
    table = multilabel_table(target, predicted, [f"class {c}" for c in range(shape[1])])
    each = sk.precision_recall_fscore_support(target, predicted, zero_division=np.nan)
    for name, values in zip(["precision", "recall", "f1", "support"], each, strict=True):
        np.testing.assert_allclose(table[name], np.asarray(values, float))


@given(masks())
@settings(max_examples=80, deadline=None)
def test_segmentation_equals_sklearn(case: tuple[NDArray[Any], NDArray[Any], int]) -> None:
    target, predicted, classes = case
    confusion = confusion_matrix(target, predicted, classes, ignore_value=IGNORE)
    ours = segmentation_metrics(confusion)
    truth, guess = target[target != IGNORE], predicted[target != IGNORE]
    if truth.size == 0:
        assert np.isnan(list(ours.values())).all()
        return
    present = np.unique(truth)
    assert (confusion == sk.confusion_matrix(truth, guess, labels=range(classes))).all()
    assert ours == pytest.approx(
        {
            "miou": sk.jaccard_score(truth, guess, labels=present, average="macro", zero_division=0),
            "pixel_accuracy": sk.accuracy_score(truth, guess),
            "f1_macro": sk.f1_score(truth, guess, labels=present, average="macro", zero_division=0),
        }
    )


@given(masks())
@settings(max_examples=40, deadline=None)
def test_per_class_table_equals_sklearn(case: tuple[NDArray[Any], NDArray[Any], int]) -> None:
    target, predicted, classes = case
    confusion = confusion_matrix(target, predicted, classes, ignore_value=IGNORE)
    table = per_class_table(confusion, [f"class {c}" for c in range(classes)])
    truth, guess = target[target != IGNORE], predicted[target != IGNORE]
    assume(truth.size > 0)  # sklearn refuses empty arrays
    theirs = sk.precision_recall_fscore_support(truth, guess, labels=range(classes), zero_division=np.nan)
    for name, values in zip(["precision", "recall", "f1", "support"], theirs, strict=True):
        np.testing.assert_allclose(table[name], values, err_msg=name)
    iou = sk.jaccard_score(truth, guess, labels=range(classes), average=None, zero_division=0)
    np.testing.assert_allclose(table["iou"].fillna(0), iou)


def test_mean_iou_by_hand() -> None:
    """Class 2 is only predicted: it has no term, but it costs class 0 the pixel it took."""
    target = np.array([[0, 0, 0, 1], [1, 1, IGNORE, IGNORE]])
    predicted = np.array([[0, 0, 2, 1], [1, 0, 2, 0]])
    confusion = confusion_matrix(target, predicted, 4, ignore_value=IGNORE)
    assert confusion.tolist() == [[2, 0, 1, 0], [1, 2, 0, 0], [0] * 4, [0] * 4]
    assert segmentation_metrics(confusion)["miou"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    iou = per_class_table(confusion, ["a", "b", "c", "d"])["iou"].tolist()
    assert iou == pytest.approx([2 / 4, 2 / 3, 0, np.nan], nan_ok=True)


def test_summed_confusions_score_the_pooled_pixels() -> None:
    confusions = np.random.default_rng(0).integers(0, 50, (5, 3, 3))
    counts = np.array([[1, 1, 1, 1, 1], [0, 2, 0, 0, 3]])
    scores = segmentation_scores(confusions, counts)
    for row, expected in enumerate([confusions.sum(0), 2 * confusions[1] + 3 * confusions[4]]):
        assert {k: v[row] for k, v in scores.items()} == pytest.approx(segmentation_metrics(expected))


def test_small_integers_do_not_overflow() -> None:
    """64 classes in uint8: 63 * 64 + 63 is far beyond 255."""
    labels = np.arange(64, dtype=np.uint8)
    assert (confusion_matrix(labels, labels, 64) == np.eye(64)).all()


def test_errors_name_what_is_wrong() -> None:
    labels, probabilities = np.array([0, 1, 7]), np.full((3, 2), 0.5)
    with pytest.raises(RunError, match=r"the truth holds the label 7, but 2 classes have the labels 0 to 1"):
        confusion_matrix(labels, np.zeros(3, int), 2)
    with pytest.raises(
        RunError, match=r"the prediction holds the label 7.*declare the label as ignore value"
    ):
        confusion_matrix(np.zeros(3, int), labels, 2)
    with pytest.raises(RunError, match=r"truth has shape \(3,\), prediction \(2,\): they must be equal"):
        confusion_matrix(labels, labels[:2], 8)
    with pytest.raises(RunError, match=r"probabilities have shape \(3, 2\), expected \(2, classes\)"):
        classification_metrics(labels[:2], probabilities)
    with pytest.raises(RunError, match="there must be one or more"):
        classification_metrics(labels[:0], probabilities[:0])
    with pytest.raises(RunError, match=r"truth has shape \(3, 1\), probabilities \(3, 2\)"):
        multilabel_metrics(np.zeros((3, 1), int), probabilities)
    probabilities[1, 0] = np.nan
    with pytest.raises(RunError, match="probabilities of tile number 1 are not finite"):
        classification_metrics(np.array([0, 1, 1]), probabilities)
