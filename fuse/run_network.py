"""The network of a run: built for a store, described in run.json, rebuilt from it, asked for predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from satdifuser.errors import SettingsError
from satdifuser.fuse.data import MapLoader
from satdifuser.fuse.fusion import FeatureMaps
from satdifuser.fuse.inputs import Inputs, Statistics, named_inputs, whole_inputs
from satdifuser.fuse.network import OURS, Network, Variant, build_network, choose_head, choose_widths
from satdifuser.fuse.processes import processes
from satdifuser.fuse.run_folder import Run, load_weights
from satdifuser.fuse.settings import OF_A_SWEEP, FitSettings, FusionName
from satdifuser.store.device import choose_device, device_name
from satdifuser.store.place import typical_pixel_size
from satdifuser.store.reader import FeatureStore

Prediction = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Probabilities (B, classes) or (B, classes, H, W), and targets (B,), (B, classes) or (B, H, W)."""


def new_network(
    store: FeatureStore, inputs: Inputs, settings: FitSettings, fusion: FusionName, variant: Variant = OURS
) -> Network:
    """Build the network for what it sees of a store, and its classes."""
    a = store.attributes
    if a.task is None:
        raise SettingsError(f"{store.path}: holds no targets to fit to")
    return build_network(
        fusion, inputs.channels, len(inputs.timesteps), len(a.classes), a.task, settings, variant
    )


def describe_run(
    store: FeatureStore,
    inputs: Inputs,
    settings: FitSettings,
    fusion: FusionName,
    seed: int | None,
    network: Network,
    state: Mapping[str, Tensor],
) -> dict[str, Any]:
    """A run.json as far as it does not tell of the training.

    ``resolved`` says what became of the settings that may be ``auto``.

    Args:
        store: What the run is for.
        inputs: What the network sees of it.
        settings: Of the training.
        fusion: Which fusion module.
        seed: Of the training; None where it is not known.
        network: The network.
        state: Its weights that are kept.
    """
    a = store.attributes
    projection, norm_groups = choose_widths(inputs.channels, settings)
    head = choose_head(a.task, settings) if a.task else None
    partition = store.choose_partition(settings.partition)
    device = choose_device(settings.device, "fit.device")
    return {
        "format_version": 1,
        "kind": "fusion",
        "task": a.task,
        "fusion": fusion,
        "head": head,
        "seed": seed,
        "partition": partition,
        "classes": a.classes,
        "ignore_value": a.ignore_value,
        "timesteps": inputs.timesteps,
        "layers": [layer.model_dump() for layer in inputs.layers],
        "feature_identity": a.feature_identity,
        "pixel_size_m": typical_pixel_size(store),
        "store": {"path": str(store.path), "hashes": store.hashes().model_dump()},
        "fit": settings.model_dump(mode="json"),
        "resolved": {
            "task": a.task,
            "partition": partition,
            "head": head,
            "projection": projection,
            "norm_groups": norm_groups,
            "device": str(device),
            "device_name": device_name(device),
            "processes": processes(),
        },
        "parameters": sum(p.numel() for p in network.parameters()),
        "weights": mixing_weights(inputs, state) if fusion == "global" else None,
    }


def mixing_weights(inputs: Inputs, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Learned weights of the global fusion, (T, L) with layers from fine to coarse."""
    layers = [layer.name for held in inputs.by_stride.values() for layer in held]
    weights = state["fusion.mixing_weights"].softmax(0).view(-1, len(layers))
    return {"timesteps": inputs.timesteps, "layers": layers, "values": weights.tolist()}


def run_inputs(run: Run, store: FeatureStore) -> Inputs:
    """What a run's network sees of a store."""
    return named_inputs(store, run.info["timesteps"], [layer["name"] for layer in run.info["layers"]])


def settings_of(run: Run) -> FitSettings:
    """The settings that a network was fitted with."""
    return FitSettings.model_validate({k: v for k, v in run.info["fit"].items() if k not in OF_A_SWEEP})


def load_network(run: Run) -> tuple[Network, Statistics | None, FitSettings]:
    """Rebuild a run's network with its weights, in evaluation mode; no store is needed."""
    info = run.info
    settings = settings_of(run).model_copy(update={"head": info["head"]})  # what auto was when it was fitted
    variant = Variant(**info.get("variant", {}))  # of a run that was imported
    channels = whole_inputs(info["timesteps"], run.layers).channels
    steps, classes = len(info["timesteps"]), len(info["classes"])
    network = build_network(info["fusion"], channels, steps, classes, info["task"], settings, variant)
    state, statistics = load_weights(run)
    network.load_state_dict(state)
    # not the device of the fit: a run made on a GPU is used on machines without one
    return network.to(choose_device("auto", "fit.device")).eval(), statistics, settings


def predict(
    network: Network, loader: MapLoader, settings: FitSettings, statistics: Statistics | None
) -> Iterator[Prediction]:
    """Yield the probabilities and targets of all of a loader's tiles, in their order."""
    network.eval()
    order = np.arange(len(loader.rows))
    for maps, targets in loader.labelled_batches(order, settings.batch_size, statistics):
        yield predict_batch(network, maps, targets)


@torch.no_grad()
def predict_batch(network: Network, maps: FeatureMaps, targets: Tensor) -> Prediction:
    """The probabilities of some tiles, beside their targets."""
    logits, _ = network(maps, mask_size(targets))
    probabilities = logits.sigmoid() if targets.shape == logits.shape else logits.softmax(1)
    return probabilities.cpu().numpy(), targets.numpy()


def mask_size(targets: Tensor) -> tuple[int, int] | None:
    """Height and width of masks (B, H, W); None for labels."""
    return None if targets.ndim < 3 else (targets.shape[-2], targets.shape[-1])
