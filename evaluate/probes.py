"""Probes of a whole grid of strengths, at about the cost of one fit: logistic, ridge, nearest neighbours.

Every matrix product is torch's, so that on one thread the same bits come out whoever asks.

Legend: N tiles or pixels, D features, R axes, K classes, H heads, J strengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from satdifuser.evaluate.axes import Axes, column_blocks, mean_and_spread
from satdifuser.evaluate.logistic import TOLERANCE, fit_path
from satdifuser.store.encoding import Floats

ProbeKind = Literal["logistic", "ridge", "neighbours"]
Link = Literal["softmax", "sigmoid", "sign"]
ROWS_AT_ONCE = 1024  # tiles or pixels whose neighbours are sought


@dataclass(frozen=True)
class LinearProbes:
    """Scores of classes that are linear in the features, as they are before standardising."""

    weight: NDArray[np.float64]  # (J, D, K)
    bias: NDArray[np.float64]  # (J, K); -inf for a class that is never predicted
    link: Link
    gradient_norms: NDArray[np.float64]  # (J,), where the fits stopped
    converged: NDArray[np.bool_]  # (J,)

    @property
    def parameters(self) -> int:
        """Numbers that each learned."""
        return int(np.isfinite(self.bias[0]).sum() * (self.weight.shape[1] + 1))

    def probabilities(self, features: Floats) -> NDArray[np.float32]:
        """(N, D) features to (J, N, K) probabilities; a ridge regression's scores, -1 to 1, become 0 to 1."""
        scores = self._scores(features)
        if self.link == "sign":
            return ((scores.clamp(-1, 1) + 1) / 2).float().numpy()
        return (scores.softmax(-1) if self.link == "softmax" else scores.sigmoid()).float().numpy()

    def _scores(self, features: Floats) -> Tensor:
        """(N, D) features to (J, N, K) float64."""
        strengths, _, classes = self.weight.shape
        weight = torch.from_numpy(self.weight).movedim(0, 1).flatten(1)  # (D, J K)
        total = torch.zeros(len(features), strengths * classes, dtype=torch.float64)
        for columns in column_blocks(features.shape[1]):
            total.addmm_(torch.from_numpy(features[:, columns]).double(), weight[columns])
        return total.view(-1, strengths, classes).movedim(1, 0) + torch.from_numpy(self.bias)[:, None]

    def only(self, j: int) -> LinearProbes:
        """The probe of one strength."""
        one = slice(j, j + 1)
        return LinearProbes(
            self.weight[one], self.bias[one], self.link, self.gradient_norms[one], self.converged[one]
        )


@dataclass(frozen=True)
class NeighbourProbes:
    """The share of each class among the nearest training tiles, for several numbers of these."""

    features: Floats  # (N, D), those to look among
    hot: NDArray[np.bool_]  # (N, K) the classes each has
    counts: tuple[int, ...]
    parameters: int = 0

    @property
    def gradient_norms(self) -> NDArray[np.float64]:
        """Zeros, since nothing is minimised."""
        return np.zeros(len(self.counts))

    @property
    def converged(self) -> NDArray[np.bool_]:
        """Nothing can fail."""
        return np.ones(len(self.counts), bool)

    def probabilities(self, features: Floats) -> NDArray[np.float32]:
        """(N, D) features to (J, N, K) probabilities; distances are those of standardised features."""
        hot = torch.from_numpy(self.hot).float()
        most = min(max(self.counts), len(hot))
        mean, spread = mean_and_spread(self.features)
        parts = []
        for start in range(0, len(features), ROWS_AT_ONCE):
            squares = self._squared_distances(features[start : start + ROWS_AT_ONCE], mean, spread)
            nearest = hot[squares.topk(most, largest=False).indices]  # (n, most, K), nearest first
            parts.append(torch.stack([nearest[:, :count].mean(1) for count in self.counts]))
        return torch.cat(parts, dim=1).numpy()

    def _squared_distances(
        self, features: Floats, mean: NDArray[np.float64], spread: NDArray[np.float64]
    ) -> Tensor:
        total = torch.zeros(len(features), len(self.features), dtype=torch.float64)
        for columns in column_blocks(len(mean)):
            ours, theirs = (
                torch.from_numpy((part[:, columns] - mean[columns]) / spread[columns])
                for part in (features, self.features)
            )
            total += ours.square().sum(1)[:, None] + theirs.square().sum(1) - 2 * (ours @ theirs.T)
        return total

    def only(self, j: int) -> NeighbourProbes:
        """The probe of one number of neighbours."""
        return replace(self, counts=self.counts[j : j + 1])


Probes = LinearProbes | NeighbourProbes


def fit_probes(
    kind: ProbeKind,
    features: Floats,
    labels: NDArray[np.int64],
    classes: int,
    strengths: Sequence[float],
    axes: Axes | None = None,
    tolerance: float = TOLERANCE,
) -> Probes:
    """Fit one probe for each strength.

    Args:
        kind: Which probe.
        features: (N, D).
        labels: (N,) classes, or (N, K) zeros and ones where a tile may have several.
        classes: Their number K.
        strengths: scikit-learn's C of a logistic regression, its alpha of a ridge regression, or the number
            of neighbours.
        axes: Those of the features, where several probes share them.
        tolerance: Norm of the gradient of the mean loss at which a logistic regression has converged.

    Returns:
        The probes, in the order of `strengths`.
    """
    several = labels.ndim == 2
    hot = labels == 1 if several else labels[:, None] == np.arange(classes)
    if kind == "neighbours":
        return NeighbourProbes(features, hot, tuple(int(count) for count in strengths))
    axes, heads = axes or Axes(features, torch.device("cpu")), _Heads(hot, several)
    if kind == "ridge":
        return _ridge(axes, heads, strengths)
    return _logistic(axes, heads, strengths, tolerance)


class _Heads:
    """Which classes are learned: those that some tiles have and, where tiles have several, others have not.

    Where a tile has one class and only two occur, one head tells the second from the first.
    """

    def __init__(self, hot: NDArray[np.bool_], several: bool) -> None:
        self.several, always = several, hot.all(axis=0) & several
        self.fixed = np.where(always, np.inf, -np.inf)  # bias of a class that is not learned
        self.classes = np.flatnonzero(hot.any(axis=0) & ~always)
        self.binary = not several and len(self.classes) == 2
        self.targets = hot[:, self.classes[1:] if self.binary else self.classes].T.astype(np.float64)

    def over_classes(
        self, axes: Axes, along: Tensor, intercept: Tensor, link: Link
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Weights (J, D, K) and biases (J, K) of all classes, from the heads' (J, H, R) and (J, H)."""
        strengths, heads, width = along.shape
        turned = axes.turn_back(along.reshape(strengths * heads, width).T)  # (D, J H)
        weight = np.moveaxis(turned.reshape(len(turned), strengths, heads), 0, 1)
        bias = intercept.cpu().numpy() - (torch.from_numpy(axes.mean) @ torch.from_numpy(weight)).numpy()
        if self.binary:  # a softmax of -s/2 and s/2 is the sigmoid of s
            half = 1.0 if link == "sign" else 0.5
            weight, bias = (np.concatenate([-part, part], axis=-1) * half for part in (weight, bias))
        full = np.zeros((*weight.shape[:2], len(self.fixed)))
        biases = np.tile(self.fixed, (strengths, 1))
        full[..., self.classes], biases[:, self.classes] = weight, bias
        return full, biases


def _ridge(axes: Axes, heads: _Heads, strengths: Sequence[float]) -> LinearProbes:
    """Ridge regressions to -1 and 1: one division each."""
    signs = 2 * torch.from_numpy(heads.targets).to(axes.device) - 1  # (H, N)
    intercept = signs.mean(1)
    products = (signs - intercept[:, None]) @ axes.scores  # (H, R)
    along = torch.stack([products / (axes.values + alpha) for alpha in strengths])
    intercepts = intercept.repeat(len(strengths), 1)
    weight, bias = heads.over_classes(axes, along, intercepts, "sign")
    return LinearProbes(weight, bias, "sign", np.zeros(len(bias)), np.ones(len(bias), bool))


def _logistic(axes: Axes, heads: _Heads, strengths: Sequence[float], tolerance: float) -> LinearProbes:
    link: Literal["softmax", "sigmoid"] = "sigmoid" if heads.several or heads.binary else "softmax"
    targets = torch.from_numpy(heads.targets).to(axes.device)
    path = fit_path(axes, targets, strengths, link, tolerance)
    weight, bias = heads.over_classes(axes, path.along, path.intercept, link)
    norms = path.gradient_norms.cpu().numpy().astype(np.float64)
    return LinearProbes(weight, bias, "sigmoid" if heads.several else "softmax", norms, norms <= tolerance)
