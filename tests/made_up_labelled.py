"""A store of 12 training, 6 val and 6 test tiles with targets of any task, which its features tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from made_up import store_attributes
from numpy.typing import NDArray

from satdifuser.store.encoding import encode
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo
from satdifuser.store.writer import TileRow

Target = NDArray[Any]
SPLITS = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
CLASSES, SIZE, IGNORE = 3, 16, 255
LAYERS = [
    LayerInfo(name="up.fine", channels=3, stride=4, height=4, width=4),
    LayerInfo(name="up.coarse", channels=2, stride=8, height=2, width=2),
]


def labelled_store(
    path: Path,
    task: str,
    test_seed: int = 0,
    timesteps: Sequence[int] = (21,),
    blur: float = 0.0,
    retarget: Callable[[int, Target], Target] = lambda index, target: target,
) -> FeatureStore:
    """Write a store; `test_seed` changes everything about the test tiles and nothing else.

    The first channel of the fine layer is the class, of a tile or of each of its 4 x 4 cells, up to some
    noise (`blur`); at the timesteps after the first there is only noise, as in all other channels. A corner
    of each mask is not labelled. Of several classes per tile, the class and all below it are. Last of all
    `retarget` may change the target of each tile.
    """
    attributes = store_attributes(
        task=task,
        classes=[f"class {c}" for c in range(CLASSES)],
        ignore_value=IGNORE,
        tiles=len(SPLITS),
        tile_size=(SIZE, SIZE),
        tiles_per_shard=len(SPLITS),
        timesteps=list(timesteps),
        layers=LAYERS,
        encoding="float32",
        previews=True,
        colour_statistics=["mean", "std"],
        settings={"source": {"kind": "synthetic"}},
    )
    tiles = [
        labelled_tile(index, split, task, test_seed, len(timesteps), blur)
        for index, split in enumerate(SPLITS)
    ]
    tiles = [
        (replace(row, target=retarget(index, np.asarray(row.target))), maps)
        for index, (row, maps) in enumerate(tiles)
    ]
    groups = {f"stride_{layer.stride:02}": layer.name for layer in LAYERS}
    batch = {
        group: encode(np.stack([maps[name] for _, maps in tiles])[:, :, None], "float32")
        for group, name in groups.items()
    }
    open_or_create(path, attributes, overwrite=False).write_shard(0, [row for row, _ in tiles], [batch], {})
    return FeatureStore(path)


def labelled_tile(
    index: int, split: str, task: str, test_seed: int, timesteps: int, blur: float
) -> tuple[TileRow, dict[str, NDArray[np.float32]]]:
    random = np.random.default_rng([index, test_seed if split == "test" else 0])
    cells = random.integers(0, CLASSES, (4, 4))
    if task != "segmentation":
        cells[:] = cells[0, 0]
    maps = {
        layer.name: random.normal(size=(timesteps, layer.channels, layer.height, layer.width)).astype("f4")
        for layer in LAYERS
    }
    maps["up.fine"][0, 0] = cells + blur * random.normal(size=(4, 4))
    mask = cells.repeat(4, axis=0).repeat(4, axis=1).astype(np.uint8)
    mask[:2, :2] = IGNORE
    row = TileRow(
        f"t{index:02}",
        split,
        colour=random.random(2).astype(np.float32),
        target={
            "classification": np.array(cells[0, 0], np.int32),
            "multilabel": (np.arange(CLASSES) <= cells[0, 0]).astype(np.uint8),
            "segmentation": mask,
        }[task],
        preview=random.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8),
    )
    return row, maps
