"""Predictions of a fitted probe: of tiles from pooled features, of masks from feature maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from satdifuser.evaluate.probes import LinearProbes, Probes
from satdifuser.evaluate.samples import Input, input_positions, pooled_features, read_tiles
from satdifuser.fuse.run_network import Prediction
from satdifuser.store.encoding import Floats
from satdifuser.store.reader import FeatureStore, Indices


def predict_with(
    store: FeatureStore,
    probe: Probes,
    inputs: Sequence[Input],
    rows: Indices,
    pooled: Mapping[Input, Floats] | None = None,
) -> Iterator[Prediction]:
    """Predict some tiles or their masks.

    Args:
        store: A store with the inputs.
        probe: Of one strength.
        inputs: What it was fitted on, side by side in this order.
        rows: Which tiles.
        pooled: Their pooled features, if they were read before; only for labels of tiles.
    """
    if isinstance(probe, LinearProbes) and store.attributes.task == "segmentation":
        yield from predict_masks(store, probe, inputs, rows)
        return
    features = pooled_features(store, rows) if pooled is None else pooled
    joined = np.concatenate([features[key] for key in inputs], axis=1)
    yield probe.probabilities(joined)[0], np.asarray(store.targets(rows), np.int64)


def predict_masks(
    store: FeatureStore, probe: LinearProbes, inputs: Sequence[Input], rows: Indices
) -> Iterator[Prediction]:
    """Predict masks of some tiles.

    Each layer is weighed up at its own resolution and its scores are enlarged, which for a linear probe is
    the same as enlarging its features.
    """
    widths = {layer.name: layer.channels for layer in store.attributes.layers}
    borders = np.cumsum([widths[layer] for _, layer in inputs])[:-1]
    weight, bias = probe.weight[0].astype(np.float32), probe.bias[0].astype(np.float32)
    weights = dict(zip(inputs, np.split(weight, borders), strict=True))
    for maps, masks in read_tiles(store, rows):
        scores = torch.from_numpy(bias)[None, :, None, None]
        for group, values in maps.items():
            part = _group_scores(store, group, values, weights)
            if part is not None:
                size = (masks.shape[1], masks.shape[2])
                scores = scores + F.interpolate(part, size, mode="bilinear")
        yield scores.softmax(1).numpy(), masks.astype(np.int64)


def _group_scores(
    store: FeatureStore, group: str, values: Floats, weights: dict[Input, Floats]
) -> Tensor | None:
    """What the layers of one group add to the scores (B, K, H, W); None where none is weighed up."""
    parts = [
        torch.einsum(
            "bchw,ck->bkhw", torch.from_numpy(values[:, step, place]), torch.from_numpy(weights[key])
        )
        for key, (step, place) in input_positions(store, group).items()
        if key in weights
    ]
    return torch.stack(parts).sum(0) if parts else None
