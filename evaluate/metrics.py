"""Metrics of classification, multilabel classification and segmentation, from numpy arrays alone.

One rule holds for every mean over classes (`f1_macro`, `average_precision`, `miou`): it runs over the
classes that occur in the truth being scored, as scikit-learn's ``average="macro"`` does when ``labels``
lists those classes. A class that is only predicted has no term of its own; what it took wrongly already
lowers the classes it was taken from. Where nothing is labelled the value is NaN.

Shape letters: N tiles, C classes, B draws of the tiles, each scored as a test set of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import RunError

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]


def confusion_matrix(
    target: Ints, predicted: Ints, classes: int, ignore_value: int | None = None
) -> NDArray[np.int64]:
    """Count how often each true class was given each predicted class.

    Args:
        target: True labels, integers of any shape.
        predicted: Predicted labels, of the same shape.
        classes: Number of classes C; labels are 0 to C - 1.
        ignore_value: True label of places that do not count, whatever was predicted there.

    Returns:
        (C, C) counts; rows are the truth, columns the prediction.

    Raises:
        RunError: The shapes differ, or a label lies outside the classes.
    """
    if target.shape != predicted.shape:
        raise RunError(f"truth has shape {target.shape}, prediction {predicted.shape}: they must be equal")
    counted = np.ones(target.shape, bool) if ignore_value is None else target != ignore_value
    true_class = check_labels(target[counted], classes, "truth")
    predicted_class = check_labels(predicted[counted], classes, "prediction")
    cells = np.bincount(true_class * classes + predicted_class, minlength=classes * classes)
    return cells.reshape(classes, classes)


def classification_metrics(target: Ints, probabilities: NDArray[np.floating[Any]]) -> dict[str, float]:
    """Score one class per tile.

    Args:
        target: (N,) true labels, integers.
        probabilities: (N, C) predicted probabilities; the largest is the prediction.

    Returns:
        `accuracy`, `f1_macro`, `f1_micro` and `average_precision` (one class against the rest, mean over
        the classes present), each 0 to 1.

    Raises:
        RunError: Shapes, labels or probabilities are unusable.
    """
    once = np.ones((1, len(target)), np.int64)
    scores = classification_scores(target, probabilities, once)
    return {name: float(value[0]) for name, value in scores.items()}


def classification_scores(
    target: Ints, probabilities: NDArray[np.floating[Any]], counts: NDArray[np.int64]
) -> dict[str, Floats]:
    """Score one class per tile, once for every draw of the tiles.

    Args:
        target: (N,) true labels, integers.
        probabilities: (N, C) predicted probabilities.
        counts: (B, N) how often each tile counts in each draw.

    Returns:
        The metrics of `classification_metrics`, each (B,).

    Raises:
        RunError: Shapes, labels or probabilities are unusable.
    """
    check_probabilities(probabilities, len(target))
    classes = probabilities.shape[1]
    cell = check_labels(target, classes, "truth") * classes + probabilities.argmax(axis=1)
    cells = [np.bincount(cell, weights=draw, minlength=classes * classes) for draw in counts]
    confusion = np.stack(cells).reshape(-1, classes, classes)
    scores = confusion_scores(confusion)
    return {
        "accuracy": scores["pixel_accuracy"],
        "f1_macro": scores["f1_macro"],
        "f1_micro": scores["pixel_accuracy"],  # the same number where every tile has exactly one class
        "average_precision": average_precision(target[:, None] == np.arange(classes), probabilities, counts),
    }


def multilabel_metrics(target: Ints, probabilities: NDArray[np.floating[Any]]) -> dict[str, float]:
    """Score any number of classes per tile; a class is predicted at a probability of 0.5 or more.

    Args:
        target: (N, C) zeros and ones, integers.
        probabilities: (N, C) predicted probabilities.

    Returns:
        `accuracy` (share of tiles with every class right), `f1_macro`, `f1_micro`, `average_precision`,
        each 0 to 1.

    Raises:
        RunError: Shapes, labels or probabilities are unusable.
    """
    scores = multilabel_scores(target, probabilities, np.ones((1, len(target)), np.int64))
    return {name: float(value[0]) for name, value in scores.items()}


def multilabel_scores(
    target: Ints, probabilities: NDArray[np.floating[Any]], counts: NDArray[np.int64]
) -> dict[str, Floats]:
    """Score any number of classes per tile, once for every draw of the tiles.

    Args:
        target: (N, C) zeros and ones, integers.
        probabilities: (N, C) predicted probabilities.
        counts: (B, N) how often each tile counts in each draw.

    Returns:
        The metrics of `multilabel_metrics`, each (B,).

    Raises:
        RunError: Shapes, labels or probabilities are unusable.
    """
    check_probabilities(probabilities, len(target))
    if target.shape != probabilities.shape:
        raise RunError(f"truth has shape {target.shape}, probabilities {probabilities.shape}: must be equal")
    truth, predicted = check_labels(target, 2, "truth") == 1, at_least_half(probabilities)
    times = counts.astype(np.float64)  # multiplies far faster than int64, and as exactly
    found, support, claimed = (times @ part for part in (truth & predicted, truth, predicted))
    return {
        "accuracy": ratio(times @ (truth == predicted).all(axis=1), times.sum(axis=1)),
        "f1_macro": mean_over_present(ratio(2 * found, support + claimed), support),
        "f1_micro": ratio(2 * found.sum(axis=1), support.sum(axis=1) + claimed.sum(axis=1)),
        "average_precision": average_precision(truth, probabilities, counts),
    }


def at_least_half(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """The classes that a multilabel model claims."""
    return probabilities >= 0.5


def segmentation_metrics(confusion: NDArray[Any]) -> dict[str, float]:
    """Score a labelled area from its confusion matrix: one tile's, or the sum over many tiles.

    Args:
        confusion: (C, C) pixel counts; rows are the truth.

    Returns:
        `miou`, `pixel_accuracy` and `f1_macro`, each 0 to 1; NaN where no pixel is labelled.
    """
    return {name: float(value) for name, value in confusion_scores(confusion).items()}


def segmentation_scores(confusions: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[str, Floats]:
    """Score a labelled area once for every draw of its tiles.

    Args:
        confusions: (N, C, C) pixel counts of every tile.
        counts: (B, N) how often each tile counts in each draw.

    Returns:
        The metrics of `segmentation_metrics`, each (B,).
    """
    tiles, classes, _ = confusions.shape
    # float64 holds these counts exactly and multiplies far faster than int64
    cells = counts.astype(np.float64) @ confusions.reshape(tiles, -1).astype(np.float64)
    return confusion_scores(cells.reshape(-1, classes, classes))


def per_class_table(confusion: NDArray[Any], class_names: list[str]) -> pd.DataFrame:
    """Tabulate the scores of every class.

    Args:
        confusion: (C, C) counts; rows are the truth.
        class_names: Names of the C classes.

    Returns:
        One row per class: class, support (count in the truth), precision, recall, f1, iou; NaN where a
        score has nothing to divide by.
    """
    import pandas as pd

    support = confusion.sum(axis=1).astype(np.int64)
    return pd.DataFrame({"class": class_names, "support": support, **class_scores(confusion)})


def multilabel_table(target: Ints, predicted: Ints, class_names: list[str]) -> pd.DataFrame:
    """Tabulate the scores of every class where a tile may have several.

    Args:
        target: (N, C) zeros and ones.
        predicted: (N, C) zeros and ones.
        class_names: Names of the C classes.

    Returns:
        One row per class: class, support (count in the truth), precision, recall, f1; NaN where a score has
        nothing to divide by.
    """
    import pandas as pd

    support = target.sum(axis=0)
    scores = retrieval((target * predicted).sum(axis=0), support, predicted.sum(axis=0))
    return pd.DataFrame({"class": class_names, "support": support, **scores})


def confusion_scores(confusion: NDArray[Any]) -> dict[str, Floats]:
    """`miou`, `pixel_accuracy` and `f1_macro` of (..., C, C) confusion matrices, each (...)."""
    support = confusion.sum(axis=-1)
    scores = class_scores(confusion)
    right = np.trace(confusion, axis1=-2, axis2=-1)
    return {
        "miou": mean_over_present(scores["iou"], support),
        "pixel_accuracy": ratio(right, support.sum(axis=-1)),
        "f1_macro": mean_over_present(scores["f1"], support),
    }


def class_scores(confusion: NDArray[Any]) -> dict[str, Floats]:
    """Precision, recall, F1 and IoU of every class of (..., C, C) confusion matrices, each (..., C)."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    support, claimed = confusion.sum(axis=-1), confusion.sum(axis=-2)
    return {**retrieval(right, support, claimed), "iou": ratio(right, support + claimed - right)}


def retrieval(right: NDArray[Any], support: NDArray[Any], claimed: NDArray[Any]) -> dict[str, Floats]:
    """Precision, recall and F1 from counts of what was found, of what is there and of what was claimed."""
    return {
        "precision": ratio(right, claimed),
        "recall": ratio(right, support),
        "f1": ratio(2 * right, support + claimed),
    }


def average_precision(positive: NDArray[np.bool_], score: NDArray[Any], counts: NDArray[np.int64]) -> Floats:
    """Mean over the classes present of the area under the precision-recall steps.

    Args:
        positive: (N, C) whether the tile has the class.
        score: (N, C) how strongly the class is predicted.
        counts: (B, N) how often each tile counts in each draw.

    Returns:
        (B,) values, 0 to 1.
    """
    columns = [class_precision(positive[:, c], score[:, c], counts) for c in range(score.shape[1])]
    return mean_over_present(np.stack(columns, axis=1), counts @ positive)


def class_precision(positive: NDArray[np.bool_], score: NDArray[Any], counts: NDArray[np.int64]) -> Floats:
    """Average precision of one class: `positive` and `score` are (N,), `counts` (B, N), the result (B,)."""
    order = np.argsort(-score, kind="stable")
    last_of_tie = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    seen = np.cumsum(counts[:, order], axis=1)[:, last_of_tie]
    found = np.cumsum(counts[:, order] * positive[order], axis=1)[:, last_of_tie]
    gained = np.diff(found, axis=1, prepend=0)
    precision = found / np.maximum(seen, 1)  # a draw may hold no tile of the highest scores
    return ratio((gained * precision).sum(axis=1), found[:, -1])


def mean_over_present(values: Floats, support: NDArray[Any]) -> Floats:
    """Mean over the last axis of the entries with support; NaN where there are none."""
    present = support > 0
    return ratio(np.where(present, values, 0).sum(axis=-1), present.sum(axis=-1))


def ratio(numerator: Any, denominator: Any) -> Floats:
    """Divide, with NaN for 0 / 0."""
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    result: Floats = np.full(shape, np.nan)
    np.divide(numerator, denominator, out=result, where=np.asarray(denominator) != 0)
    return result


def check_labels(labels: Ints, classes: int, what: str) -> NDArray[np.int64]:
    """Refuse labels outside 0 to classes - 1."""
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        wrong = labels[(labels < 0) | (labels >= classes)].ravel()[0]
        raise RunError(
            f"the {what} holds the label {wrong}, but {classes} classes have the labels 0 to {classes - 1}; "
            "correct the class list, or declare the label as ignore value"
        )
    return labels.astype(np.int64)


def check_probabilities(probabilities: NDArray[Any], tiles: int) -> None:
    """Refuse probabilities that are not (N, C) for these tiles, of no tile at all, or not finite."""
    if probabilities.ndim != 2 or len(probabilities) != tiles or probabilities.size == 0:
        raise RunError(
            f"probabilities have shape {probabilities.shape}, expected ({tiles}, classes) for the {tiles} "
            "tiles of the truth, of which there must be one or more"
        )
    finite = np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise RunError(f"the probabilities of tile number {row} are not finite: fit again with a lower lr")
