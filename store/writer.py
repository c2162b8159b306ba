"""Writes a store shard by shard: data first, each file made durable, the commit record last.

A shard counts only once its commit record exists, so a process may die at any moment and the next one
goes on with the shards that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from satdifuser.store.card import store_card
from satdifuser.store.device import cores
from satdifuser.store.encoding import FORMS, Floats, tile_digests
from satdifuser.store.files import (
    CARD,
    DurableStore,
    remove_orphans,
    write_durably,
    write_error,
)
from satdifuser.store.layout import LABEL_ARRAYS, ROW_TEXT_FIELDS, SPLITS, target_array
from satdifuser.store.lock import StoreLock
from satdifuser.store.metadata import require_current
from satdifuser.store.reader import FeatureStore
from satdifuser.store.shard_file import pack_shard
from satdifuser.store.table_file import pack_table

Item = TypeVar("Item")
Encoded = dict[str, dict[str, NDArray[np.generic]]]  # group to array name to (B, ...)
WRITE_THREADS = min(8, cores())  # of one shard's files, and of its tiles' digests
TILES_AT_ONCE = 4  # that one thread hashes
NAN4, NAN6 = (float("nan"),) * 4, (float("nan"),) * 6


@dataclass(frozen=True)
class TileRow:
    """All that a store keeps of one tile beside its features."""

    tile_id: str
    split: str
    path: str = ""
    crs: str = ""
    date: str = ""
    file_state: str = ""  # sizes and times of change of its files; "" where it has none
    image_digest: str = ""  # of the image as it was prepared; "" where it was skipped
    bounds: tuple[float, float, float, float] = NAN4
    transform: tuple[float, float, float, float, float, float] = NAN6
    valid_share: float = float("nan")
    padded: bool = False
    cloud_cover: float = float("nan")  # 0 to 1, NaN where unknown
    skip_reason: str = ""  # why the tile has no features; "" where it has
    colour: Floats | None = None  # (statistic,)
    target: NDArray[np.generic] | None = None  # () int32 label, (classes,) uint8 labels or (H, W) uint8 mask
    preview: NDArray[np.uint8] | None = None  # (H, W, 3)
    latents: Floats | None = None  # (C, h, w)
    valid: NDArray[np.bool_] | None = None  # (H, W) whether a pixel holds data
    partitions: Mapping[str, str] = field(default_factory=dict)  # split in each, if the store holds several

    @property
    def target_digest(self) -> str:
        """SHA-256 of the target's bytes; "" where there is none."""
        return "" if self.target is None else hashlib.sha256(self.target.tobytes()).hexdigest()


class StoreWriter:
    """Fills a store until it is closed, or a write has failed; two writers never share a shard.

    Args:
        path: The store.
        lock: What keeps others away; None in a worker, for which the process that sent it holds the lock.
        alone: Whether nobody else writes to the store, so that what interrupted writes left may go.
    """

    def __init__(self, path: Path, lock: StoreLock | None, alone: bool = True) -> None:
        self._lock, self._path = lock, path
        self._store = FeatureStore(path)
        require_current(path, self._store.attributes)
        if alone:
            remove_orphans(path)
        self.attributes = self._store.attributes
        self._files = DurableStore(path, algorithm=self.attributes.digest_algorithm)
        self._root = zarr.open_group(self._files, mode="r")
        self._arrays: dict[str, Any] = {}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not FeatureStore(self._path).missing_shards():
                self._write_card()
        finally:
            self.close()

    def _write_card(self) -> None:
        """Describe the complete store to people; a card that is there, perhaps edited, stays."""
        if not (self._path / CARD).exists():
            try:
                write_durably(self._path / CARD, store_card(FeatureStore(self._path)).encode())
            except OSError as error:
                raise write_error(self._path, error) from error

    def close(self) -> None:
        """Let others write to the store."""
        if self._lock:
            self._lock.release()

    def missing_shards(self) -> list[int]:
        """Shards without a commit record."""
        return self._store.missing_shards()

    def write_shard(
        self, shard: int, rows: Sequence[TileRow], batches: Sequence[Encoded], note: Mapping[str, Any]
    ) -> int:
        """Write one whole shard and commit it.

        Args:
            shard: Its index.
            rows: One per tile of the shard.
            batches: Encoded features which together cover the tiles that are not skipped, in order.
            note: Facts to keep in the commit record.

        Returns:
            Bytes written.

        Raises:
            StoreError: the disk is full or refuses the write; committed shards are untouched.
        """
        self._files.forget()
        try:
            self._write_data(shard, rows, batches)
            self._files.sync_folders()
            files = dict(self._files.written)
            self._commit(shard, {"shard": shard, "files": files, **note})
        except OSError as error:
            self.close()
            raise write_error(Path(self._files.root), error, shard) from error
        return sum(size for size, _ in files.values())

    def adopt_shard(self, shard: int, held: FeatureStore, rows: Sequence[TileRow]) -> None:
        """Commit a shard with the files of another store, but for its labels.

        Args:
            shard: Its index, the same in both.
            held: The other store, of the same tiles and features.
            rows: One per tile of the shard, of which the targets and partitions count.

        Raises:
            StoreError: the disk is full or refuses the write.
        """
        self._files.forget()
        record = held.commits[shard]
        try:
            for key, (size, digest) in record["files"].items():
                if not key.startswith(tuple(f"{name}/" for name in LABEL_ARRAYS)):
                    self._files.adopt(key, held.folder / key, size, digest)
            self._write_labels(shard, rows)
            self._files.sync_folders()
            self._commit(shard, record | {"files": dict(self._files.written)})
        except OSError as error:
            self.close()
            raise write_error(self._path, error, shard) from error

    def _write_data(self, shard: int, rows: Sequence[TileRow], batches: Sequence[Encoded]) -> None:
        present = [not row.skip_reason for row in rows]
        with ThreadPoolExecutor(WRITE_THREADS, "write") as pool:
            algorithm = self.attributes.digest_algorithm
            digests = [
                pool.submit(tile_digests, part, algorithm) for batch in batches for part in _few_tiles(batch)
            ]
            files = []
            for group in self._store.groups:
                for name in self._store.array_names():
                    array = self._array(f"features/{group}/{name}")
                    blank = np.full(array.shape[1:], array.fill_value, array.dtype)
                    tiles = _spread(
                        [tile for batch in batches for tile in batch[group][name]], present, blank
                    )
                    if array.shards is None:
                        self._write_table(f"features/{group}/{name}", shard, np.stack(tiles))
                        continue
                    for step in range(array.shape[1]):
                        files.append(pool.submit(self._write_file, array, shard, tiles, step))
            self._write_tiles(shard, rows)
            self._write_labels(shard, rows)
            for file in files:
                file.result()
        found = [digest for part in digests for digest in part.result()]
        self._write_table("tiles/digest", shard, _texts(_spread(found, present, "")))

    def _write_file(self, array: Any, shard: int, tiles: Sequence[NDArray[np.generic]], step: int) -> None:
        """Write one timestep of tiles (timestep, layer, …) of a sharded array."""
        per_tile = array.shape[2] // array.chunks[2]
        compressed = array.name.endswith("/values") and FORMS[self.attributes.encoding].compressed
        chunks = [
            chunk.view(np.uint8)
            for tile in tiles
            for chunk in np.ascontiguousarray(tile[step]).reshape(per_tile, -1)
        ]
        places = array.shards[0] * per_tile
        parts = pack_shard(chunks, places, array.dtype.itemsize if compressed else 0)
        key = "/".join(["c", str(shard), str(step), *"0" * (array.ndim - 2)])
        self._files.write(f"{array.path}/{key}", *parts)

    def _write_tiles(self, shard: int, rows: Sequence[TileRow]) -> None:
        for name in ROW_TEXT_FIELDS:
            if f"tiles/{name}" not in LABEL_ARRAYS:
                self._write_table(f"tiles/{name}", shard, _texts(getattr(row, name) for row in rows))
        clouds = ("cloud_cover",) if self.attributes.cloud_cover else ()
        for name in ("bounds", "transform", "valid_share", "padded", *clouds):
            self._write_table(f"tiles/{name}", shard, np.array([getattr(row, name) for row in rows]))
        missing = np.full(len(self.attributes.colour_statistics), np.nan, np.float32)
        colour = [missing if row.colour is None else row.colour for row in rows]
        self._write_table("tiles/colour", shard, np.stack(colour))
        if self.attributes.previews:
            empty = np.zeros((*self.attributes.tile_size, 3), np.uint8)
            previews = [empty if row.preview is None else row.preview for row in rows]
            self._write_table("previews/rgb", shard, np.stack(previews))
        if self.attributes.latents:
            none = np.full(self.attributes.latents, np.nan, np.float32)
            latents = [none if row.latents is None else row.latents for row in rows]
            self._write_table("latents", shard, np.stack(latents))
        if self.attributes.valid:
            nowhere = np.zeros(self.attributes.tile_size, np.bool_)
            valid = [nowhere if row.valid is None else row.valid for row in rows]
            self._write_table("valid", shard, np.packbits(np.stack(valid), axis=-1))

    def _write_labels(self, shard: int, rows: Sequence[TileRow]) -> None:
        self._write_table("tiles/target_digest", shard, _texts(row.target_digest for row in rows))
        for partition in self.attributes.partitions:
            codes = [SPLITS.index(row.partitions.get(partition, row.split)) for row in rows]
            self._write_table(f"tiles/partitions/{partition}", shard, np.array(codes, np.uint8))
        name = target_array(self.attributes.task)
        if name is not None:
            array = self._array(name)
            blank = np.full(array.shape[1:], array.fill_value, array.dtype)
            targets = [blank if row.target is None else row.target for row in rows]
            self._write_table(name, shard, np.stack(targets))

    def _write_table(self, name: str, place: int, rows: NDArray[Any]) -> None:
        """Write one chunk, by its place along the first axis, of an array that is not sharded."""
        array = self._array(name)
        places = array.chunks[0]
        expected = (min(places, array.shape[0] - place * places), *array.shape[1:])
        if rows.shape != expected:
            raise ValueError(f"{name}: got rows of shape {rows.shape}, expected {expected}")
        if not rows.size:  # an array of no columns has no files
            return
        key = "/".join(["c", str(place), *"0" * (array.ndim - 1)])
        parts = pack_table(rows.astype(array.dtype, copy=False), places, array.fill_value)
        self._files.write(f"{name}/{key}", *parts)

    def _commit(self, shard: int, record: Mapping[str, Any]) -> None:
        self._files.forget()
        self._write_table("commits", shard, _texts([json.dumps(record, sort_keys=True)]))
        self._files.sync_folders()

    def _array(self, name: str) -> Any:
        """An array's shape, chunks and dtype; opened once, without a reader's check, which takes 60 ms."""
        if name not in self._arrays:
            self._arrays[name] = self._root[name]
        return self._arrays[name]


def _spread(items: Sequence[Item], present: Sequence[bool], blank: Item) -> list[Item]:
    """One item for each place that is present, in order, and a blank for each that is not."""
    spread = [blank] * len(present)
    for place, item in zip(np.flatnonzero(present), items, strict=True):
        spread[place] = item
    return spread


def _few_tiles(batch: Encoded) -> Iterator[Encoded]:
    """A batch of encoded tiles in pieces of a few."""
    count = len(next(iter(next(iter(batch.values())).values())))
    for start in range(0, count, TILES_AT_ONCE):
        few = slice(start, start + TILES_AT_ONCE)
        yield {group: {name: a[few] for name, a in arrays.items()} for group, arrays in batch.items()}


def _texts(items: Any) -> NDArray[Any]:
    return np.array(list(items), dtype=np.dtypes.StringDType())
