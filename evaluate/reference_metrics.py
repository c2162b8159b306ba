"""The metrics of SatDiFuser's released code (Jia et al., arXiv 2503.07890), by its formulas and names.

They stand beside ours where `evaluate.metrics` is `reference`, so that a number of theirs is compared with
one that was made the same way. What is wrong with a formula is named in `FORMULAS`.

Not copied: of a batch without any labelled pixel theirs counts every pixel, those with the ignored label too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.evaluate.metrics import Floats, Ints, confusion_matrix

ABSENT = "classes absent from the split count as 0"
LABEL_EPSILON, PIXEL_EPSILON = 1e-10, 1e-6
F1_EPSILON = PIXEL_EPSILON / 100  # theirs adds it to percentages


@dataclass(frozen=True)
class Formula:
    """How the released code computes a metric, and what is wrong with that, if anything."""

    text: str
    fault: str = ""


FORMULAS: dict[str, dict[str, Formula]] = {
    "classification": {
        "Accuracy": Formula("right tiles / tiles"),
        "Precision": Formula("TP / (TP + FP) of each class, mean over all classes", ABSENT),
        "Recall": Formula("TP / (TP + FN) of each class, mean over all classes", ABSENT),
        "F1": Formula(
            "2 P R / (P + R) of the averaged Precision and Recall",
            "not macro F1, the mean of the classes' F1: never below it (Opitz and Burst, arXiv 1911.03347)",
        ),
    },
    "multilabel": {
        "Precision": Formula("TP / (TP + FP) over all tiles and classes; predicted above 0.5"),
        "Recall": Formula("TP / (TP + FN) over all tiles and classes"),
        "F1": Formula("2 TP / (2 TP + FP + FN) over all tiles and classes"),
    },
    "segmentation": {
        "mIoU": Formula("TP / (TP + FP + FN) of each class, mean over all classes", ABSENT),
        "mF1": Formula("2 P R / (P + R) of each class, mean over all classes", ABSENT),
        "mPrecision": Formula(
            "TP / (TP + FN) of each class, mean over all classes",
            f"is the recall: rows and columns are swapped; {ABSENT}",
        ),
        "mRecall": Formula(
            "TP / (TP + FP) of each class, mean over all classes",
            f"is the precision: rows and columns are swapped; {ABSENT}",
        ),
        "mAcc": Formula("right pixels / labelled pixels", "is the pixel accuracy, no mean over classes"),
    },
}
"""By task and metric, as shares of 1 (theirs prints those of masks in percent)."""


def reference_classification(target: Ints, probabilities: NDArray[np.floating[Any]]) -> dict[str, float]:
    """Score one class per tile as the released code does.

    Args:
        target: (N,) true labels, integers.
        probabilities: (N, C) predicted probabilities; the largest is the prediction.

    Returns:
        `Accuracy`, `Precision`, `Recall` and `F1`, each 0 to 1.
    """
    confusion = confusion_matrix(target, probabilities.argmax(axis=1), probabilities.shape[1])
    right = np.diagonal(confusion)
    precision = (right / (confusion.sum(axis=0) + LABEL_EPSILON)).mean()
    recall = (right / (confusion.sum(axis=1) + LABEL_EPSILON)).mean()
    return {
        "Accuracy": float(right.sum() / len(target)),
        "Precision": float(precision),
        "Recall": float(recall),
        "F1": float(harmonic_mean(precision, recall, LABEL_EPSILON)),
    }


def reference_multilabel(target: Ints, probabilities: NDArray[np.floating[Any]]) -> dict[str, float]:
    """Score any number of classes per tile as the released code does.

    Args:
        target: (N, C) zeros and ones.
        probabilities: (N, C) predicted probabilities.

    Returns:
        `Precision`, `Recall` and `F1`, each 0 to 1; 0 where there is nothing to divide by.
    """
    truth, predicted = target == 1, probabilities > 0.5
    found, support, claimed = (truth & predicted).sum(), truth.sum(), predicted.sum()
    return {
        "Precision": float(found / max(claimed, 1)),
        "Recall": float(found / max(support, 1)),
        "F1": float(2 * found / max(support + claimed, 1)),
    }


def reference_segmentation(confusion: NDArray[Any]) -> dict[str, float]:
    """Score a labelled area as the released code does.

    Args:
        confusion: (C, C) counts of the labelled pixels; rows are the truth.

    Returns:
        `mIoU`, `mF1`, `mPrecision`, `mRecall` and `mAcc`, each 0 to 1.
    """
    right, support, claimed = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    precision = right / (support + PIXEL_EPSILON)  # names as theirs
    recall = right / (claimed + PIXEL_EPSILON)
    return {
        "mIoU": float((right / (support + claimed - right + PIXEL_EPSILON)).mean()),
        "mF1": float(harmonic_mean(precision, recall, F1_EPSILON).mean()),
        "mPrecision": float(precision.mean()),
        "mRecall": float(recall.mean()),
        "mAcc": float(right.sum() / (confusion.sum() + PIXEL_EPSILON)),
    }


TILE_REFERENCES = {"classification": reference_classification, "multilabel": reference_multilabel}


def harmonic_mean(precision: Floats, recall: Floats, epsilon: float) -> Floats:
    """F1 of precision and recall."""
    return 2 * precision * recall / (precision + recall + epsilon)


def with_faults(task: str, values: dict[str, float]) -> dict[str, Any]:
    """What metrics.json holds of these metrics: their values, and the faults of those that have one."""
    faults = {name: FORMULAS[task][name].fault for name in values if FORMULAS[task][name].fault}
    return {**values, "faults": faults}


def format_reference(split: str, reference: Mapping[str, Any]) -> list[str]:
    """What `with_faults` made, for reading: one line per metric."""
    faults = reference.get("faults", {})
    values = {name: value for name, value in reference.items() if name != "faults"}
    return [
        f"  {split:5} {'reference ' + name:20} {value:.3f}  {faults.get(name, '')}".rstrip()
        for name, value in values.items()
    ]
