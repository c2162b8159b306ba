"""Creates the arrays of a new store: names, shapes, chunks and codecs in one place.

Every array names its dimensions (for xarray) and carries a checksum. All arrays but the commits are cut
along the tile axis at shard borders, so that one writer owns whole files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

from satdifuser.store.encoding import FORMS, table_codecs, value_codecs
from satdifuser.store.schema import Attributes, group_layers, stored_width

TINY_MAP_BYTES = 16 * 1024
ROW_TEXT_FIELDS = (
    "tile_id",
    "path",
    "crs",
    "date",
    "skip_reason",
    "file_state",
    "image_digest",
    "target_digest",
)
TEXT_FIELDS = (*ROW_TEXT_FIELDS, "digest")
SPLITS = ("none", "train", "val", "test")  # index = stored code
LABEL_ARRAYS = ("targets", "tiles/partitions", "tiles/target_digest")  # what another labelling changes
UNLABELLED = {"classification": -1, "multilabel": 255}  # value of every label of a tile without one


def target_array(task: str | None) -> str | None:
    """Name of the array that holds a task's targets; None where there are none."""
    names = {"classification": "label", "multilabel": "labels", "segmentation": "mask"}
    return None if task is None else f"targets/{names[task]}"


def packed_width(width: int) -> int:
    """Bytes of a row of ``width`` pixels of which each is one bit."""
    return -(-width // 8)


def create_arrays(root: zarr.Group, attributes: Attributes) -> None:
    """Create all arrays of a store, empty."""
    _create_tiles(root, attributes)
    _create_targets(root, attributes)
    _create_features(root, attributes)
    if attributes.previews:
        shape = (*attributes.tile_size, 3)
        _table(root, "previews/rgb", attributes, shape, "uint8", 0, ("y", "x", "rgb"))
    if attributes.latents:
        dimensions = ("latent_channel", "latent_y", "latent_x")  # those of the features have other lengths
        _table(root, "latents", attributes, attributes.latents, "float32", np.nan, dimensions)
    if attributes.valid:
        height, width = attributes.tile_size
        _table(
            root, "valid", attributes, (height, packed_width(width)), "uint8", 0, ("valid_y", "valid_x_octet")
        )
    root.create_array(
        "commits",
        shape=(attributes.shards,),
        chunks=(1,),
        dtype=str,
        fill_value="",
        compressors=table_codecs(),
        dimension_names=("shard",),
    )


def _create_tiles(root: zarr.Group, attributes: Attributes) -> None:
    for name in TEXT_FIELDS:
        _table(root, f"tiles/{name}", attributes, (), str, "", ())
    _table(root, "tiles/bounds", attributes, (4,), "float64", np.nan, ("bound",))
    _table(root, "tiles/transform", attributes, (6,), "float64", np.nan, ("coefficient",))
    _table(root, "tiles/valid_share", attributes, (), "float32", np.nan, ())
    _table(root, "tiles/padded", attributes, (), "bool", False, ())
    if attributes.cloud_cover:
        _table(root, "tiles/cloud_cover", attributes, (), "float32", np.nan, ())
    statistics = (len(attributes.colour_statistics),)
    _table(root, "tiles/colour", attributes, statistics, "float32", np.nan, ("statistic",))
    for name in attributes.partitions:
        split = _table(root, f"tiles/partitions/{name}", attributes, (), "uint8", 0, ())
        split.attrs["flag_values"] = list(range(len(SPLITS)))
        split.attrs["flag_meanings"] = " ".join(SPLITS)


def _create_targets(root: zarr.Group, attributes: Attributes) -> None:
    if attributes.task == "classification":
        _table(root, "targets/label", attributes, (), "int32", UNLABELLED["classification"], ())
    elif attributes.task == "multilabel":
        classes, fill = (len(attributes.classes),), UNLABELLED["multilabel"]
        _table(root, "targets/labels", attributes, classes, "uint8", fill, ("class",))
    elif attributes.task == "segmentation":
        fill = attributes.ignore_value
        mask = _table(root, "targets/mask", attributes, attributes.tile_size, "uint8", fill, ("y", "x"))
        mask.attrs["ignore_value"] = fill


def _create_features(root: zarr.Group, attributes: Attributes) -> None:
    for name, positions in group_layers(attributes.layers).items():
        first = attributes.layers[positions[0]]
        group = root.create_group(f"features/{name}")
        group.attrs["layers"] = [attributes.layers[p].name for p in positions]
        group.attrs["timesteps"] = attributes.timesteps
        group.attrs["decode"] = attributes.decode
        form = FORMS[attributes.encoding]
        maps = (first.channels, first.height, stored_width(first, attributes.encoding))
        tiny = int(np.prod(maps)) * np.dtype(form.dtype).itemsize < TINY_MAP_BYTES
        x = "x_pair" if form.packed else "x"
        held = len(positions)
        _feature(group, "values", attributes, held, held if tiny else 1, maps, form.dtype, ("y", x))
        for constant in form.per_channel:
            _feature(group, constant, attributes, held, held, (first.channels,), "float32", ())
        per_channel = (len(attributes.timesteps), held, first.channels)
        _table(group, "pooled", attributes, per_channel, "float32", np.nan, ("timestep", "layer", "channel"))


def _feature(
    group: zarr.Group,
    name: str,
    attributes: Attributes,
    layers: int,
    layers_per_chunk: int,
    shape: tuple[int, ...],
    dtype: str,
    dimensions: tuple[str, ...],
) -> None:
    """Create an array (tile, timestep, layer, channel, …) whose chunks are of one tile and timestep."""
    group.create_array(
        name,
        shape=(attributes.tiles, len(attributes.timesteps), layers, *shape),
        shards=(attributes.tiles_per_shard, 1, layers, *shape),
        chunks=(1, 1, layers_per_chunk, *shape),
        dtype=dtype,
        fill_value=np.nan if np.dtype(dtype).kind == "f" else 0,
        compressors=value_codecs(attributes.encoding if name == "values" else "float32"),
        dimension_names=("tile", "timestep", "layer", "channel", *dimensions),
    )


def _table(
    parent: zarr.Group,
    name: str,
    attributes: Attributes,
    shape: tuple[int, ...],
    dtype: Any,
    fill_value: Any,
    dimensions: tuple[str, ...],
) -> zarr.Array[Any]:
    """Create a small array (tile, *shape) with one chunk per shard."""
    return parent.create_array(
        name,
        shape=(attributes.tiles, *shape),
        chunks=(attributes.tiles_per_shard, *shape),
        dtype=dtype,
        fill_value=fill_value,
        compressors=table_codecs(),
        dimension_names=("tile", *dimensions),
    )
