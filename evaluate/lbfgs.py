"""Minimises many smooth convex functions at once by L-BFGS (Nocedal and Wright, Numerical Optimization, 7.2).

Every function moves in step with the others, so that one matrix product serves them all, and leaves when
its gradient is small enough.

Legend: J functions, P variables of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY = 10  # steps that the curvature is estimated from
HALVINGS = 15  # of a step that does not descend, before a function is given up
SUFFICIENT = 1e-4  # share of the descent that the slope promises
ROUNDING = 10  # last digits of a value, by which it may seem to rise at the minimum


@dataclass
class Point:
    """Where some functions stand: variables (J, P), values (J,), gradients (J, P).

    `curvature` (J, P) is a guess of the diagonal of their second derivatives, to scale the first step of each
    direction by.
    """

    variables: Tensor
    values: Tensor
    gradients: Tensor
    curvature: Tensor

    def of(self, rows: Tensor) -> Point:
        """The same of some functions."""
        return Point(self.variables[rows], self.values[rows], self.gradients[rows], self.curvature[rows])


Function = Callable[[Tensor, Tensor], Point]
"""(variables (J', P), which (J',)) -> where these of the functions stand."""


@dataclass(frozen=True)
class Minimum:
    """What was found: variables (J, P), norms of the gradients (J,), and steps taken."""

    variables: Tensor
    gradient_norms: Tensor
    steps: int


def minimise(function: Function, start: Tensor, tolerance: float, steps: int) -> Minimum:
    """Minimise J functions, each until the Euclidean norm of its gradient is small enough.

    Args:
        function: Evaluates some of the functions.
        start: (J, P), where to begin.
        tolerance: The norm of the gradient that is small enough.
        steps: At most.

    Returns:
        The minima, and what came nearest where none was reached.
    """
    found, norms = start.clone(), start.new_full((len(start),), torch.inf)
    which, history = torch.arange(len(start), device=start.device), History()
    point, descends = function(start, which), torch.ones_like(which, dtype=torch.bool)
    for step in range(steps + 1):
        norms[which] = point.gradients.norm(dim=1)
        found[which] = point.variables
        moving = ((norms[which] > tolerance) & descends).nonzero()[:, 0]
        if not len(moving) or step == steps:
            break
        if len(moving) < len(which):
            which, point = which[moving], point.of(moving)
            history.keep(moving)
        reached, descends = _descend(function, which, point, history.direction(point))
        history.add(reached.variables - point.variables, reached.gradients - point.gradients)
        point = reached
    return Minimum(found, norms, step)


def _descend(function: Function, which: Tensor, point: Point, direction: Tensor) -> tuple[Point, Tensor]:
    """Go along a direction (J', P), half as far wherever that does not descend; say where it does (J',)."""
    slope = torch.linalg.vecdot(point.gradients, direction)
    slack = ROUNDING * torch.finfo(slope.dtype).eps * point.values.abs()
    length = torch.ones_like(slope)
    for _ in range(HALVINGS):
        reached = function(point.variables + length[:, None] * direction, which)
        descends = reached.values <= point.values + SUFFICIENT * length * slope + slack
        if descends.all():
            break
        length = torch.where(descends, length, length / 2)
    return reached, descends


class History:
    """The last steps of some functions, and what they changed of the gradient."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, step: Tensor, change: Tensor) -> None:
        """Remember a step (J', P) and the change of the gradient (J', P)."""
        product = torch.linalg.vecdot(step, change)
        # a function that did not move tells nothing: weight zero
        weight = torch.where(product > 0, 1 / product, torch.zeros_like(product))
        self.pairs = [*self.pairs[1 - MEMORY :], (step, change, weight)]

    def keep(self, rows: Tensor) -> None:
        """Forget all functions but some."""
        self.pairs = [(step[rows], change[rows], weight[rows]) for step, change, weight in self.pairs]

    def direction(self, point: Point) -> Tensor:
        """The two-loop recursion: an approximate Newton step (J', P)."""
        q, shares = point.gradients.clone(), []
        for step, change, weight in reversed(self.pairs):
            share = weight * torch.linalg.vecdot(step, q)
            q.addcmul_(share[:, None], change, value=-1)
            shares.append(share)
        q = q / point.curvature * self._scale(point)[:, None]
        for (step, change, weight), share in zip(self.pairs, reversed(shares), strict=True):
            q.addcmul_((share - weight * torch.linalg.vecdot(change, q))[:, None], step)
        return -q

    def _scale(self, point: Point) -> Tensor:
        """How much less curved the functions were along their last step than `curvature` says, (J',)."""
        if not self.pairs:
            return torch.ones_like(point.values)
        _, change, weight = self.pairs[-1]
        product = weight * torch.linalg.vecdot(change, change / point.curvature)
        return torch.where(product > 0, 1 / product, torch.ones_like(product))
