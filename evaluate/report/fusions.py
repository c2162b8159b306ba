"""Figures of what a fusion relies on: learned weights, gates over a tile, use of experts.

Letters: B tiles, S scales, L layers of a scale, T timesteps, K = T · L gates of a scale (index t · L + l),
E experts, H and W pixels of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from satdifuser.evaluate.evaluation import check_features
from satdifuser.evaluate.report.colours import exact_picture, glow_over, photo
from satdifuser.evaluate.report.figure import Figure, Grid
from satdifuser.evaluate.report.heat_map import heat_map, short_name
from satdifuser.evaluate.report.runs import command_of
from satdifuser.evaluate.report.stores import preview, sample_rows
from satdifuser.fuse.data import MapLoader
from satdifuser.fuse.run_folder import Run
from satdifuser.fuse.run_network import load_network, run_inputs
from satdifuser.store.reader import FeatureStore, Indices

SAMPLED_TILES, SHOWN_TILES, SHOWN_GATES, TILES_AT_ONCE = 32, 3, 3, 8
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scale:
    """The layers of one stride, as a fusion counts them."""

    stride: int
    layers: list[str]


def scales_of(run: Run) -> list[Scale]:
    """The scales of a run, finest first."""
    strides = sorted({layer["stride"] for layer in run.info["layers"]})
    return [Scale(s, [x["name"] for x in run.info["layers"] if x["stride"] == s]) for s in strides]


def weights_figure(run: Run) -> Figure:
    """Learned weights of the global fusion, layers down and timesteps across."""
    weights = run.info["weights"]
    values = np.array(weights["values"], np.float64).T  # (T, L) -> (L, T)
    timesteps = [str(timestep) for timestep in weights["timesteps"]]
    tidy = [
        {"layer": layer, "timestep": timestep, "weight": values[row, column]}
        for row, layer in enumerate(weights["layers"])
        for column, timestep in enumerate(weights["timesteps"])
    ]
    return Figure(
        "Weights of the global fusion",
        heat_map(values, weights["layers"], timesteps, "layer ↓ timestep →", "{:.3f}".format),
        f"Weights that {run.info['name']} learned for each layer (rows, fine to coarse) and timestep "
        f"(columns). They sum to 1, equal ones would be {1 / values.size:.3f}; deeper means that the model "
        "relies on it more.",
        command_of(run),
        pd.DataFrame(tidy),
        str(run.path / "run.json"),
    )


def weight_scores(run: Run) -> dict[tuple[int, str], float]:
    """Learned weight of each timestep and layer of a global fusion."""
    weights = run.info["weights"]
    return {
        (timestep, layer): weights["values"][row][column]
        for row, timestep in enumerate(weights["timesteps"])
        for column, layer in enumerate(weights["layers"])
    }


def inner_weights(run: Run, store: FeatureStore, rows: Indices) -> list[Floats]:
    """What a run's fusion weights by, for some tiles.

    Returns:
        Per scale, finest first: gates (B, K, H, W) of a localized, shares (B, T, E) of a moe fusion.

    Raises:
        RunError: the store does not hold the run's features, or its weights are damaged.
    """
    check_features(run, store)
    network, statistics, settings = load_network(run)
    loader = MapLoader(store, rows, settings, next(network.parameters()).device, run_inputs(run, store))
    with torch.no_grad():
        parts = [
            network.fusion(maps)[1]
            for maps, _, _ in loader.batches(np.arange(len(rows)), TILES_AT_ONCE, statistics)
        ]
    return [torch.cat(scale).cpu().numpy() for scale in zip(*parts, strict=True)]


def gate_figures(run: Run, store: FeatureStore, command: str) -> list[Figure]:
    """Gates of a localized fusion: their means, and those that differ most over some tiles.

    Args:
        run: A localized fusion.
        store: With its features.
        command: That made the page.
    """
    rows = sample_rows(store, run.partition, SAMPLED_TILES)
    gates = inner_weights(run, store, rows)
    return [mean_gates(run, gates, command), gates_over_tiles(run, store, rows, gates, command)]


def mean_gates(run: Run, gates: Sequence[Floats], command: str) -> Figure:
    """Mean gate of each layer and timestep, as multiples of an equal share."""
    timesteps, parts, tidy = run.info["timesteps"], [], []
    for scale, values in zip(scales_of(run), gates, strict=True):
        means = values.mean(axis=(0, 2, 3), dtype=np.float64)  # (K,)
        times = (means * len(means)).reshape(len(timesteps), -1).T  # (L, T)
        parts.append(times)
        tidy += [
            {"stride": scale.stride, "layer": layer, "timestep": t, "gate": times[i, k] / len(means),
             "times_equal_share": times[i, k]}
            for i, layer in enumerate(scale.layers)
            for k, t in enumerate(timesteps)
        ]  # fmt: skip
    layers = [layer for scale in scales_of(run) for layer in scale.layers]
    columns = [str(timestep) for timestep in timesteps]
    return Figure(
        "Mean gates of the localized fusion",
        heat_map(np.concatenate(parts), layers, columns, "layer ↓ timestep →", "{:.2f}".format),
        f"At every pixel {run.info['name']} shares 1 out among the layers and timesteps of a scale. Mean "
        f"over {len(gates[0])} tiles of val, as multiples of an equal share: 1 is as much as any other, 2 is "
        "twice as much.",
        command,
        pd.DataFrame(tidy),
        str(run.path),
    )


def gates_over_tiles(
    run: Run, store: FeatureStore, rows: Indices, gates: Sequence[Floats], command: str
) -> Figure:
    """The gates that differ most from place to place, laid over some tiles."""
    shown = np.linspace(0, len(rows) - 1, min(SHOWN_TILES, len(rows))).round().astype(int)
    columns, maps, tidy = ["tile"], [], []
    for scale, values in zip(scales_of(run), gates, strict=True):
        spread = values.std(axis=(2, 3)).mean(axis=0)  # (K,)
        for k in np.argsort(-spread, kind="stable")[:SHOWN_GATES]:
            step, layer = divmod(int(k), len(scale.layers))
            largest = float(values[shown, k].max())
            place = {"stride": scale.stride, "timestep": run.info["timesteps"][step]}
            place["layer"] = scale.layers[layer]
            columns.append(f"t {place['timestep']}, {short_name(place['layer'])}, up to {largest:.2f}")
            maps.append(values[shown, k] / (largest or 1.0))
            tidy.append({**place, "spread": float(spread[k]), "largest": largest})
    names = store.tiles.tile_id
    body = []
    for i, row in enumerate(rows[shown]):
        tile, name = preview(store, row), str(names[row])
        overlays = [
            exact_picture(glow_over(tile, m[i]), f"{column}, over tile {name}")
            for column, m in zip(columns[1:], maps, strict=True)
        ]
        body.append((name, [photo(tile, f"Tile {name}"), *overlays]))
    return Figure(
        "Gates of the localized fusion over tiles",
        Grid(columns, body),
        f"Of each scale the {SHOWN_GATES} gates that differ most from place to place. Orange is where the "
        "gate takes its largest share (the number above), grey where it takes none. Tiles of val.",
        command,
        pd.DataFrame(tidy),
        f"{run.path}, {store.path}",
    )


def expert_figures(run: Run, store: FeatureStore, command: str) -> list[Figure]:
    """How much each expert of a mixture is used, by scale and timestep."""
    rows = sample_rows(store, run.partition, SAMPLED_TILES)
    shares = inner_weights(run, store, rows)
    names, values, tidy = [], [], []
    for scale, per_tile in zip(scales_of(run), shares, strict=True):
        for step, timestep in enumerate(run.info["timesteps"]):
            names.append(f"{scale.stride} px, t {timestep}")
            values.append(per_tile[:, step].mean(axis=0))
            tidy += [
                {"stride": scale.stride, "timestep": timestep, "expert": e + 1, "mean_share": float(share),
                 "used_by": float((per_tile[:, step, e] > 0).mean())}
                for e, share in enumerate(values[-1])
            ]  # fmt: skip
    experts = [str(e + 1) for e in range(shares[0].shape[2])]
    figure = Figure(
        "Experts of the mixture",
        heat_map(np.array(values), names, experts, "scale, timestep ↓ expert →", "{:.2f}".format, low=0.0),
        f"Mean share of each expert of {run.info['name']} over {len(rows)} tiles of val. A row sums to 1. "
        "Each scale has experts of its own: the same number at another scale is another expert. One expert "
        "taking all, or one never used, means that fewer experts would do.",
        command,
        pd.DataFrame(tidy),
        str(run.path),
    )
    return [figure]
