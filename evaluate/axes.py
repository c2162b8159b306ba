"""Standardised features along their principal axes, where every strength of a linear probe is cheap.

The products of N tiles' D features are decomposed once: those of features with each other where D <= N,
else those of tiles with each other, so that the concatenation of all layers costs no more than one.

Legend: N tiles or pixels, D features, R axes, M columns of weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from satdifuser.store.encoding import Floats

SMALLEST_AXIS = 1e-13  # of the largest eigenvalue; what is below is rounding
COLUMNS_AT_ONCE = 2048  # features in double precision in memory


class Axes:
    """Standardised features along their principal axes.

    ``scores`` are the features along the axes, (N, R) float64; ``values`` (R,) the eigenvalues of their
    products, largest last.

    Args:
        features: (N, D), to be standardised by their own mean and spread.
        device: Where to compute.
    """

    def __init__(self, features: Floats, device: torch.device) -> None:
        self.features, self.device = features, device
        self.mean, self.spread = mean_and_spread(features)
        n, d = features.shape
        self._by_feature = d <= n
        values, vectors = torch.linalg.eigh(self._products())
        held = values > SMALLEST_AXIS * values[-1].clamp(min=1e-300)
        self.values, self._vectors = values[held], vectors[:, held]
        if self._by_feature:
            self.scores = self._block(slice(None)) @ self._vectors
        else:
            self.scores = self._vectors * self.values.sqrt()

    def _block(self, columns: slice) -> Tensor:
        """Some standardised features, (N, …) float64."""
        block = (self.features[:, columns] - self.mean[columns]) / self.spread[columns]
        return torch.from_numpy(block).to(self.device)

    def _products(self) -> Tensor:
        """(D, D) products of features, or (N, N) of tiles, whichever is smaller."""
        n, d = self.features.shape
        if self._by_feature:
            x = self._block(slice(None))
            return x.T @ x
        products = torch.zeros(n, n, dtype=torch.float64, device=self.device)
        for columns in column_blocks(d):
            block = self._block(columns)
            products.addmm_(block, block.T)
        return products

    def turn_back(self, along: Tensor) -> NDArray[np.float64]:
        """Weights along the axes (R, M) as weights (D, M) of the features before standardising."""
        if self._by_feature:
            weights = self._vectors @ along
        else:
            by_tile = self._vectors @ (along / self.values.sqrt()[:, None])  # (N, M)
            weights = torch.cat([self._block(c).T @ by_tile for c in column_blocks(len(self.mean))])
        turned: NDArray[np.float64] = weights.cpu().numpy() / self.spread[:, None]
        return turned


def mean_and_spread(features: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (D,) of features (N, D); 1 for a feature that never varies."""
    mean, spread = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    return mean, np.where(spread > 0, spread, 1)


def column_blocks(width: int) -> Iterator[slice]:
    """Slices of a matrix's columns, some thousand each."""
    return (slice(start, start + COLUMNS_AT_ONCE) for start in range(0, width, COLUMNS_AT_ONCE))
