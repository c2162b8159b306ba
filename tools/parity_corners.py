"""Both gradients at a ReLU's corner.

Where an input of a ReLU is zero but for rounding, the order of sums, hence the processor and the number of
threads, decides on which side of the corner it falls, and with it which of two gradients comes out. Either is
right, and a record holds one of them: two inputs of `B_seg_gw_trainmode` move a gradient by up to 1.5e-3 so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WITHIN = 1e-5  # of the inputs' standard deviation: rounding was seen to move an input by half of that
MOST = 4  # corners that are tried on both sides, those nearest to 0
RELUS = (torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu_)
Place = tuple[int, int]
"""Number of a ReLU in the order of calls, position in its flattened input."""
Result = TypeVar("Result")


class Corners(TorchFunctionMode):
    """Notes inputs of ReLUs that are zero but for rounding, and puts some of them on a chosen side.

    Args:
        sides: 1 or -1 by place.
    """

    def __init__(self, sides: dict[Place, float]) -> None:
        super().__init__()
        self.near: dict[Place, float] = {}  # distance from 0, in standard deviations
        self._sides, self._calls = sides, itertools.count()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take the place of a function of torch."""
        if func in RELUS:
            args = (self._shifted(args[0], next(self._calls)), *args[1:])
        return func(*args, **(kwargs or {}))

    def _shifted(self, x: Tensor, call: int) -> Tensor:
        values = x.detach().flatten()
        distance, limit = values.abs() / values.std(), WITHIN * values.std()
        near = (distance < WITHIN).nonzero().flatten().tolist()
        self.near |= {(call, i): float(distance[i]) for i in near}
        shift = torch.zeros_like(values)
        for (number, i), side in self._sides.items():
            if number == call:
                shift[i] = side * limit - values[i]
        return x + shift.view_as(x) if shift.any() else x


def on_each_side(run: Callable[[], Result]) -> Iterator[Result]:
    """Run something as it is, then with each choice of sides for the corners that were met.

    Args:
        run: Computes anew each time, in the same order.
    """
    with Corners({}) as met:
        result = run()
    yield result
    places = sorted(met.near, key=met.near.__getitem__)[:MOST]
    for sides in itertools.product((1.0, -1.0), repeat=len(places)) if places else ():
        with Corners(dict(zip(places, sides, strict=True))):
            result = run()
        yield result
