"""A feature store for its readers: tile table, targets, pooled features and batches of feature maps.

Legend: B tiles of a batch, N tiles, T timesteps, L layers of one group, C channels, H and W feature pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import SettingsError, StoreError, suggest
from satdifuser.store.encoding import FORMS, Floats, content_digest, decode
from satdifuser.store.georeference import Georeference
from satdifuser.store.layout import SPLITS, TEXT_FIELDS, target_array
from satdifuser.store.location import Location, location
from satdifuser.store.metadata import is_store
from satdifuser.store.reading_threads import read_in_parts
from satdifuser.store.schema import Hashes, group_layers, labels_hash
from satdifuser.store.sharded_array import Buffer, Buffers, Indices, OpenFiles, Request, ShardedArray, Stored
from satdifuser.store.shards import ShardedStore

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = ["Batch", "Buffers", "FeatureStore", "Indices", "Selection", "Stored", "is_store", "open_store"]


@dataclass(frozen=True)
class Batch:
    """Some tiles with everything a training step needs.

    ``features`` maps a group name (``stride_08``) to (B, T, L, C, H, W) float32, finest stride first;
    ``targets`` is (B,) int32 labels, (B, classes) uint8 zeros and ones, (B, H, W) uint8 masks, or None.
    """

    features: dict[str, Floats]
    targets: NDArray[np.generic] | None
    tile_ids: list[str]
    indices: Indices  # rows in the store


@dataclass(frozen=True)
class Selection:
    """Timesteps and layers by position: `layers` maps the group names wanted to positions in the group."""

    steps: tuple[int, ...]
    layers: Mapping[str, tuple[int, ...]]


def open_store(path: str | Path) -> FeatureStore:
    """Open a feature store for reading.

    Args:
        path: Its folder or .zip file, or its address: ``s3://…``, ``gs://…``, ``https://…``.

    Raises:
        StoreError: there is no store, or one of a newer format, or its metadata is damaged.
    """
    return FeatureStore(location(str(path)))


def end_cut_off(new: Path, path: Path) -> None:
    """Let a complete store take its place if an earlier command was cut off between deletion and renaming."""
    if not path.exists() and is_store(new) and not FeatureStore(new).missing_shards():
        new.rename(path)


class FeatureStore(ShardedStore):
    """A feature store on disk.

    Opening reads metadata only; features are read when asked for. Whatever is asked of rows of a shard that
    is missing or damaged raises StoreError.
    """

    def __init__(self, path: Location) -> None:
        super().__init__(path)
        self.groups = group_layers(self.attributes.layers)

    def __repr__(self) -> str:
        a = self.attributes
        state = "" if not self.missing_shards() else f"\n  INCOMPLETE: {self.missing_text()}"
        return (
            f"<FeatureStore {self.path}>\n"
            f"  tiles      {a.tiles} of {a.tile_size[0]} x {a.tile_size[1]} px ({self.splits_text()})\n"
            f"  targets    {a.task or 'none'}{f', {len(a.classes)} classes' if a.classes else ''}\n"
            f"  timesteps  {a.timesteps}\n"
            f"  layers     {len(a.layers)} at strides {sorted({x.stride for x in a.layers})}\n"
            f"  encoding   {a.encoding}, {self.size_bytes() / 1e6:.1f} MB on disk\n"
            f"  backbone   {a.backbone.get('model')}{state}"
        )

    # --- identity

    def hashes(self) -> Hashes:
        """The three hashes; `labels` reads the targets' digests and partitions when first asked for."""
        return self._hashes

    @cached_property
    def _hashes(self) -> Hashes:
        planned = self.attributes.planned
        order = np.argsort(self._text("tile_id"))
        targets = self._text("target_digest")[order].tolist()
        partitions = {n: self.table(f"tiles/partitions/{n}")[order].tolist() for n in self.partitions()}
        labels = labels_hash(self.attributes.classes, targets, partitions)
        return Hashes(feature=planned.feature, contents=planned.contents, labels=labels)

    def content_digest(self) -> str | None:
        """SHA-256 over all tiles' digests in tile_id order; None while shards are missing."""
        if self.missing_shards():
            return None
        return content_digest(self._text("tile_id"), self._text("digest"))

    # --- tables

    @cached_property
    def tiles(self) -> pd.DataFrame:
        """One row per extracted tile: id, split, label (or class names), path, place, date, valid share.

        The split is that of the partition in use. The index is the tile's row in the store's arrays.
        """
        import pandas as pd

        table = pd.DataFrame({name: self._text(name) for name in TEXT_FIELDS})
        table.insert(1, "split", self.splits())
        if self.attributes.task == "classification":
            table.insert(2, "label", self.table("targets/label"))
        if self.attributes.task == "multilabel":
            classes = np.array(self.attributes.classes)
            table.insert(2, "labels", [";".join(classes[row == 1]) for row in self.table("targets/labels")])
        bounds = self.table("tiles/bounds")
        for column, name in enumerate(("left", "bottom", "right", "top")):
            table[name] = bounds[:, column]
        table["valid_share"] = self.table("tiles/valid_share")
        table["padded"] = self.table("tiles/padded")
        extracted = np.repeat([bool(record) for record in self.commits], self.attributes.tiles_per_shard)
        return table[extracted[: len(table)]]

    def partitions(self) -> list[str]:
        """Names of the partitions held."""
        return list(self.attributes.partitions)

    def choose_partition(self, name: str = "auto") -> str:
        """The partition of that name; for ``auto`` the one that the store's source was asked for.

        Raises:
            SettingsError: the store does not hold it.
        """
        held = self.partitions()
        if name == "auto":
            return self.attributes.partition
        if name not in held:
            raise SettingsError(
                f"fit.partition: {self.path} holds no partition {name!r}; it holds {', '.join(held)}"
                f"{suggest(name, held)}"
            )
        return name

    def splits(self, partition: str = "auto") -> NDArray[np.str_]:
        """Each tile's split in a partition, (N,)."""
        codes: NDArray[np.uint8] = self.table(f"tiles/partitions/{self.choose_partition(partition)}")
        return np.array(SPLITS)[codes]

    def split_counts(self, partition: str = "auto") -> dict[str, int]:
        """Tiles per split of a partition; apart from them, those skipped and those not yet extracted."""
        usable = self.tiles[self.tiles.skip_reason == ""]
        splits = self.splits(partition)[usable.index].tolist()
        named = {name: splits.count(name) for name in SPLITS}
        named["skipped"] = len(self.tiles) - len(usable)
        named["not yet extracted"] = self.attributes.tiles - len(self.tiles)
        return {name: count for name, count in named.items() if count}

    def splits_text(self, partition: str = "auto") -> str:
        """The same in words: "12 train, 4 val"."""
        return ", ".join(f"{count} {name}" for name, count in self.split_counts(partition).items())

    def select(self, split: str | None = None, partition: str = "auto") -> Indices:
        """Rows of the tiles that have features, of one split of a partition or of all.

        Raises:
            SettingsError: there is no split or partition of that name.
            StoreError: shards are missing, or the split holds no tile.
        """
        self.require_complete()
        if split is not None and split not in SPLITS:
            raise SettingsError(
                f"split {split!r}: expected one of {', '.join(SPLITS)}{suggest(split, SPLITS)}"
            )
        chosen = self.tiles.skip_reason == ""
        if split is not None:
            chosen &= self.splits(partition) == split
        rows = np.flatnonzero(chosen)
        if not len(rows):
            raise StoreError(
                f"{self.path}: no tile in split {split!r}; the store holds {self.splits_text(partition)}; "
                "name one that is held, or extract again from a source whose splits differ"
            )
        return rows

    def select_splits(self, splits: Sequence[str]) -> Indices:
        """The same of several splits of the partition in use, each row once."""
        return np.unique(np.concatenate([self.select(split) for split in splits]))

    def places(self, rows: Indices) -> list[Georeference | None]:
        """Where some rows lie on the ground; None for tiles without a place."""
        crs, transforms = self.gather("tiles/crs", rows), self.gather("tiles/transform", rows)
        pairs = zip(crs.tolist(), transforms.tolist(), strict=True)
        return [Georeference(own, tuple(transform)) if own else None for own, transform in pairs]

    def targets(self, rows: Indices) -> NDArray[np.generic] | None:
        """Labels (B,) int32, labels (B, classes) uint8 or masks (B, H, W) uint8 of some rows, or None."""
        name = target_array(self.attributes.task)
        return None if name is None else self.gather(name, rows)

    def colour(self, rows: Indices) -> Floats:
        """Colour statistics (B, statistic) float32 of some rows."""
        statistics: Floats = self.gather("tiles/colour", rows)
        return statistics

    def previews(self, rows: Indices) -> NDArray[np.uint8]:
        """Previews (B, H, W, 3) uint8 of some rows.

        Raises:
            StoreError: the store was written without previews.
        """
        if not self.attributes.previews:
            raise StoreError(f"{self.path}: holds no previews; extract with store.previews: true")
        pictures: NDArray[np.uint8] = self.gather("previews/rgb", rows)
        return pictures

    def latents(self, rows: Indices) -> Floats:
        """Clean latents (B, C, h, w) float32 of some rows, as the U-Net's input was made of them.

        Raises:
            StoreError: the store was written without latents.
        """
        if not self.attributes.latents:
            raise StoreError(f"{self.path}: holds no latents; extract with store.latents: true")
        latents: Floats = self.gather("latents", rows)
        return latents

    def valid(self, rows: Indices) -> NDArray[np.bool_]:
        """Which pixels of some rows hold data (B, H, W); all of them in a store that does not say."""
        height, width = self.attributes.tile_size
        if not self.attributes.valid:
            return np.ones((len(rows), height, width), np.bool_)
        return np.unpackbits(self.gather("valid", rows), axis=-1, count=width).astype(np.bool_)

    # --- features

    def pooled(self, timestep: int | None = None, layer: str = "*", split: str | None = None) -> xr.DataArray:
        """Pooled features: exact spatial means of the unencoded maps.

        Args:
            timestep: One held timestep; None concatenates all.
            layer: A layer name or pattern; the maps of all that match are concatenated.
            split: Only the tiles of this split.

        Returns:
            (tile, channel) float32, with coordinates tile_id, and timestep, layer of each channel.
        """
        import xarray as xr

        rows = self.select(split)
        steps = self.selection(None if timestep is None else [timestep]).steps
        parts, layers, times = [], [], []
        for group, position, name in self.layer_positions(layer):
            block = self.pooled_group(group, rows)[:, :, position]
            for step in steps:
                parts.append(block[:, step])
                layers += [name] * block.shape[-1]
                times += [self.attributes.timesteps[step]] * block.shape[-1]
        coordinates = {
            "tile_id": ("tile", self._text("tile_id")[rows].astype(object)),
            "layer": ("channel", layers),
            "timestep": ("channel", times),
        }
        return xr.DataArray(np.concatenate(parts, axis=1), dims=("tile", "channel"), coords=coordinates)

    def pooled_group(self, group: str, rows: Indices) -> Floats:
        """Pooled features (B, T, L, C) float32 of one group and some rows."""
        pooled: Floats = self.gather(f"features/{group}/pooled", rows)
        return pooled

    def layer_positions(self, patterns: str | Sequence[str] = "*") -> list[tuple[str, int, str]]:
        """Layers that match a pattern or one of several: (group, index within the group, name), in order.

        Raises:
            SettingsError: a pattern matches none.
        """
        where = {p: (group, i) for group, held in self.groups.items() for i, p in enumerate(held)}
        names = [layer.name for layer in self.attributes.layers]
        chosen = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            matching = {p for p, name in enumerate(names) if fnmatchcase(name, pattern)}
            if not matching:
                raise SettingsError(
                    f"layer {pattern!r} is not in {self.path}{suggest(pattern, names)}; it holds "
                    f"{len(names)}, such as {names[0]}: `satdifuser store info {self.path}` lists them"
                )
            chosen |= matching
        return [(*where[p], names[p]) for p in sorted(chosen)]

    def _timestep_position(self, timestep: int) -> int:
        held = self.attributes.timesteps
        if timestep not in held:
            raise SettingsError(f"timestep {timestep} is not in {self.path}; it holds {held}")
        return held.index(timestep)

    def maps(self, rows: Indices) -> dict[str, Floats]:
        """Decoded feature maps of some rows: group name to (B, T, L, C, H, W) float32."""
        self.require_complete()
        return self.decode(self.stored(rows))

    def decode(self, stored: Stored) -> dict[str, Floats]:
        """Decode what `stored` returns."""
        layers = self.attributes.layers
        return {
            group: decode(arrays, layers[self.groups[group][0]].width) for group, arrays in stored.items()
        }

    def buffers(self, tiles: int, selection: Selection | None = None) -> Buffers:
        """Memory that `stored` fills again and again.

        Args:
            tiles: Of a request, at most.
            selection: Which timesteps and layers; None for all.
        """
        chosen = selection or self._everything
        held = {
            group: {
                name: Buffer(array, tiles, chosen.steps, layers)
                for name, array in self._arrays[group].items()
            }
            for group, layers in chosen.layers.items()
        }
        return Buffers(held, self.stored_bytes_per_tile(chosen))

    def stored(
        self, rows: Indices, selection: Selection | None = None, into: Buffers | None = None
    ) -> Stored:
        """Feature arrays of some rows, as they are kept.

        Args:
            rows: Rows of tiles, in the order wanted.
            selection: Which timesteps and layers; None for all.
            into: Filled instead of new memory; what they were made for is the selection.

        Returns:
            Group name to array name (values; scale, offset) to (B, T, L, …). Layers need not touch in memory.
        """
        if not self._is_whole:
            self.require_shards((rows // self.attributes.tiles_per_shard).tolist())
        buffers = into or self.buffers(len(rows), selection)

        def read(part: slice) -> None:
            requests = [Request(buffer, rows[part], part.start) for buffer in buffers.all]
            for request in requests:
                request.begin()
            for request in requests:
                request.finish()

        read_in_parts(read, len(rows), buffers.bytes_per_tile)
        return buffers.first(len(rows))

    def selection(
        self, timesteps: Sequence[int] | None = None, layers: str | Sequence[str] = "*"
    ) -> Selection:
        """Some timesteps and layers of this store, by position.

        Args:
            timesteps: Held timesteps; None for all.
            layers: A layer name or pattern, or several.

        Raises:
            SettingsError: a timestep is not held, or named twice, or no layer matches.
        """
        held = self.attributes.timesteps if timesteps is None else timesteps
        if len(set(held)) < len(held):
            raise SettingsError(f"timesteps: name each once, got {', '.join(map(str, held))}")
        steps = [self._timestep_position(timestep) for timestep in held]
        positions: dict[str, list[int]] = {}
        for group, position, _ in self.layer_positions(layers):
            positions.setdefault(group, []).append(position)
        return Selection(tuple(steps), {g: tuple(positions[g]) for g in self.groups if g in positions})

    @cached_property
    def _is_whole(self) -> bool:
        """Whether no shard is missing or lacks a file, so that nothing need be asked for each request."""
        return not self.file_problems and not self.missing_shards()

    @cached_property
    def _everything(self) -> Selection:
        return self.selection()

    @cached_property
    def _arrays(self) -> dict[str, dict[str, ShardedArray]]:
        """Group name to array name to the array."""
        form, files = FORMS[self.attributes.encoding], OpenFiles()
        found: dict[str, dict[str, ShardedArray]] = {}
        for group in self.groups:
            found[group] = {}
            for name in ("values", *form.per_channel):
                key = f"features/{group}/{name}"
                compressed = form.compressed and name == "values"
                found[group][name] = ShardedArray(self, key, self._array(key), compressed, files)
        return found

    def stored_bytes_per_tile(self, selection: Selection | None = None) -> int:
        """Bytes that `stored` returns for one tile."""
        chosen = selection or self._everything
        per_step: int = sum(
            array.bytes_per_layer * len(layers)
            for group, layers in chosen.layers.items()
            for array in self._arrays[group].values()
        )
        return per_step * len(chosen.steps)

    def array_names(self) -> list[str]:
        """Names of the arrays that each group holds."""
        return ["values", *FORMS[self.attributes.encoding].per_channel, "pooled"]

    def batches(
        self,
        split: str | None = None,
        batch_size: int = 32,
        seed: int | None = None,
        timesteps: Sequence[int] | None = None,
        layers: str = "*",
        memory_gb: float = 0.0,
    ) -> Iterator[Batch]:
        """Iterate once over the tiles of a split; the next batch is read while this one is used.

        Args:
            split: train, val, test, none; None for all.
            batch_size: Tiles per batch; the last may be smaller.
            seed: Shuffles with this seed; None keeps the store's order.
            timesteps: Only these; None for all.
            layers: Only the layers that match this name or pattern. Nothing else is read.
            memory_gb: Read all at once where that takes no more GB than this; the batches are the same.

        Yields:
            Decoded maps (B, T, L, C, H, W) float32 by group, targets, tile ids and rows.

        Raises:
            SettingsError: batch_size is under 1, or there is no such split, timestep or layer.
            StoreError: shards are missing or damaged, or the split holds no tile.
        """
        from satdifuser.store.batches import BatchReader

        if batch_size < 1:
            raise SettingsError(f"batch_size: got {batch_size}, expected 1 or more")
        rows, names = self.select(split), self._text("tile_id")
        order = np.arange(len(rows)) if seed is None else np.random.default_rng(seed).permutation(len(rows))
        parts = [order[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        reader = BatchReader(self, rows, self.selection(timesteps, layers), memory_gb * 1e9)
        for part, stored in zip(parts, reader.batches(parts), strict=True):
            chosen = rows[part]
            ids = [str(name) for name in names[chosen]]
            yield Batch(self.decode(stored), self.targets(chosen), ids, chosen)

    def to_xarray(self) -> xr.DataTree:
        """The whole store as a lazy, dask-backed xarray DataTree; all of a remote store is fetched first."""
        import xarray as xr

        self.require_complete()
        n = self.attributes.tiles_per_shard
        if self._mirror:
            for key in self.recorded_files():
                self.locate(key)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Object at README.md")  # the store's card
            return xr.open_datatree(self.folder, engine="zarr", consolidated=False, chunks={"tile": n})

    def _text(self, name: str) -> Any:
        return self.table(f"tiles/{name}")
