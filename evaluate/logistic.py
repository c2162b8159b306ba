"""Logistic regressions of all strengths at once, on features along their principal axes.

Each minimises what scikit-learn's `LogisticRegression` does, here as a mean: the mean loss plus half the
squared weights over (strength times N), with a free intercept. All descend together, so that their
products with the features are one; each step is first scaled by what curvature each axis has at present,
the mean of p (1 - p) times the axis's eigenvalue over N, plus the penalty. Single precision does nearly
all of the way, double precision has the last word.

Legend: N tiles or pixels, R axes, H heads, J strengths, M problems of h heads each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from satdifuser.evaluate.axes import Axes
from satdifuser.evaluate.lbfgs import Point, minimise

Link = Literal["softmax", "sigmoid"]
TOLERANCE = 2e-7  # Euclidean norm of the gradient
SINGLE_TOLERANCE = 5e-7  # what single precision reaches without fail
STEPS = 1000
LEAST_SPREAD = 1e-6  # of p (1 - p), where all is decided


@dataclass(frozen=True)
class Path:
    """Logistic regressions along a grid of strengths."""

    along: Tensor  # (J, H, R) weights along the axes
    intercept: Tensor  # (J, H)
    gradient_norms: Tensor  # (J,), of the worst head where each is a problem of its own


def fit_path(
    axes: Axes, targets: Tensor, strengths: Sequence[float], link: Link, tolerance: float = TOLERANCE
) -> Path:
    """Fit one logistic regression for each strength.

    Args:
        axes: The features.
        targets: (H, N) zeros and ones.
        strengths: scikit-learn's C.
        link: softmax, one choice among all heads, or sigmoid, where each head is a problem of its own.
        tolerance: Norm of the gradient at which a problem is solved.
    """
    count, heads, width = len(strengths), len(targets), len(axes.values) + 1
    each = heads if link == "softmax" else 1
    found = torch.zeros(count * heads // each, each * width, device=axes.device)
    for dtype, within_reach in ((torch.float32, SINGLE_TOLERANCE), (torch.float64, 0.0)):
        losses = _Losses(axes, targets, strengths, link, dtype)
        reached = minimise(losses, found.to(dtype), max(tolerance, within_reach), STEPS)
        found = reached.variables
    weights = found.view(count, heads, width)
    norms = reached.gradient_norms.view(count, heads // each)
    worst = norms.amax(dim=1) if heads else norms.sum(dim=1)  # zero where there is nothing to learn
    return Path(weights[..., :-1], weights[..., -1], worst)


class _Losses:
    """Values, gradients and curvatures of the M problems of `fit_path`, in one precision."""

    def __init__(
        self, axes: Axes, targets: Tensor, strengths: Sequence[float], link: Link, dtype: torch.dtype
    ) -> None:
        n, heads = len(axes.scores), len(targets)
        ones = axes.scores.new_ones(n, 1)  # the last axis is the intercept
        self.x = torch.cat([axes.scores, ones], dim=1).to(dtype)  # (N, R + 1)
        self.along = torch.cat([axes.values / n, axes.values.new_ones(1)]).to(dtype)  # mean squares
        penalty = self.along.new_tensor([1 / (strength * n) for strength in strengths])
        per_strength = 1 if link == "softmax" else heads
        self.penalty = penalty.repeat_interleave(per_strength)[:, None].repeat(1, len(self.along))
        self.penalty[:, -1] = 0
        self.link, self.targets = link, targets.to(dtype)
        self.each = heads if link == "softmax" else 1  # heads of a problem

    def __call__(self, variables: Tensor, which: Tensor) -> Point:
        """Evaluate some problems at (m, h (R + 1)) variables."""
        weights = variables.view(len(which), self.each, len(self.along))  # (m, h, R + 1)
        penalty = self.penalty[which][:, None]
        scores = (weights.flatten(0, 1) @ self.x.T).view(*weights.shape[:2], len(self.x))  # (m, h, N)
        losses, slopes, spread = self._loss(scores, which)
        pull = penalty * weights
        values = losses + (pull * weights).sum((1, 2)) / 2
        gradients = (slopes.flatten(0, 1) @ self.x).view_as(weights) / len(self.x) + pull
        curvature = spread.clamp(min=LEAST_SPREAD)[:, None, None] * self.along + penalty
        return Point(variables, values, gradients.flatten(1), curvature.expand_as(weights).flatten(1))

    def _loss(self, scores: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss (m,), its slopes by the scores (m, h, N), and the mean of p (1 - p) (m,)."""
        if self.link == "softmax":
            logs = scores.log_softmax(dim=1)
            losses, p = -(logs * self.targets).sum(1).mean(1), logs.exp()
            targets = self.targets
        else:
            targets = self.targets[which % len(self.targets)][:, None]
            losses = (F.softplus(scores) - scores * targets).mean((1, 2))
            p = scores.sigmoid()
        return losses, p - targets, (p * (1 - p)).mean((1, 2))
