"""A feature store of three tiles in two shards, written without any backbone, and ways to look into it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from made_up import store_attributes
from numpy.typing import NDArray

from satdifuser.errors import StoreError
from satdifuser.store.encoding import encode
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import open_store
from satdifuser.store.schema import Attributes, LayerInfo
from satdifuser.store.verify import verify
from satdifuser.store.writer import StoreWriter, TileRow

TILES, PER_SHARD, STEPS = 3, 2, [1, 101]
LAYER = LayerInfo(name="up.0.attn1", channels=2, stride=2, height=2, width=2)
VALUES = "features/stride_02/values/c"


def new_attributes(**changes: Any) -> Attributes:
    fields: dict[str, Any] = {
        "task": "classification",
        "classes": ["sea", "Küste"],
        "tiles": TILES,
        "tile_size": (4, 4),
        "tiles_per_shard": PER_SHARD,
        "timesteps": STEPS,
        "layers": [LAYER],
        "encoding": "int8",
        "previews": True,
        "colour_statistics": ["mean"],
        "settings": {"fit": {"weight_decay": 1e-05}},
    }
    return store_attributes(**fields | changes)


def tile_row(tile: int) -> TileRow:
    preview = np.full((4, 4, 3), tile, np.uint8)
    return TileRow(f"t{tile}", "train", colour=np.array([tile], np.float32), preview=preview, target=label(1))


def label(value: int) -> NDArray[np.int32]:
    return np.array(value, np.int32)


def write(writer: StoreWriter, shard: int) -> None:
    tiles = range(*writer.attributes.shard_range(shard))
    maps = [np.random.default_rng(t).normal(size=(1, len(STEPS), 1, 2, 2, 2)).astype("f4") for t in tiles]
    batches = [{"stride_02": encode(one, "int8")} for one in maps]
    writer.write_shard(shard, [tile_row(tile) for tile in tiles], batches, {})


def build(path: Path, shards: tuple[int, ...] = (0, 1), **changes: Any) -> Path:
    writer = open_or_create(path, new_attributes(**changes), overwrite=False)
    for shard in shards:
        write(writer, shard)
    return path


def contents(path: Path) -> str:
    """One digest over all that a reader can ask for."""
    store, rows = open_store(path), np.arange(TILES)
    targets = store.targets(rows)
    assert targets is not None
    arrays = [store.pooled().values, store.colour(rows), store.previews(rows), *store.maps(rows).values()]
    told = store.tiles.to_csv() + repr(store.content_digest()) + store.attributes.model_dump_json()
    return hashlib.sha256(told.encode() + b"".join(a.tobytes() for a in [*arrays, targets])).hexdigest()


def contents_or_refusal(path: Path) -> str:
    try:
        return contents(path)
    except StoreError as error:
        return f"refused: {error}"


def problems(path: Path, deep: bool = False) -> list[str]:
    """What `satdifuser store verify` tells, refusals included."""
    try:
        return verify(open_store(path), deep)
    except StoreError as error:
        return [str(error)]


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def flip(path: Path, byte: int, bit: int = 0) -> None:
    changed = bytearray(path.read_bytes())
    changed[byte] ^= 1 << bit
    path.write_bytes(changed)
