"""Fills a grown store: what the old one holds is taken over as it is, the rest is computed.

Timesteps and layers come from the old store's latents where it has them, else from the images, which must
still be the same. Legend: B tiles of a shard, T timesteps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from satdifuser.errors import StoreError
from satdifuser.extract.background import Background
from satdifuser.extract.compute import Work, background_of, compute_shard, launch_latents, task_of
from satdifuser.extract.read_tile import read_row
from satdifuser.extract.reading import read_ahead
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.copy import tile_rows
from satdifuser.store.reader import FeatureStore, Indices
from satdifuser.store.schema import Attributes, group_layers
from satdifuser.store.writer import Encoded, StoreWriter, TileRow

Arrays = Mapping[str, NDArray[Any]]  # values, pooled, scale … of one layer: (B, T, …)


@dataclass(frozen=True)
class Growth:
    """A store, what it grows into, and what computes the rest."""

    old: FeatureStore
    new: Attributes
    source: Source | None  # where it is needed
    relabel: bool  # whether labels and partitions are taken anew from the source
    records: list[TileRecord]  # of all tiles, in the grown store's order
    rest: Work | None  # for the old tiles: the timesteps and layers that they lack
    whole: Work  # for new tiles


@dataclass(frozen=True)
class Piece:
    """Encoded features of some tiles, by layer."""

    timesteps: list[int]
    layers: Mapping[str, Arrays]


def fill(growth: Growth, writer: StoreWriter) -> None:
    """Write the missing shards of a grown store."""
    rows = {name: row for row, name in enumerate(growth.old.table("tiles/tile_id").tolist())}
    values = ValueRange(growth.whole.job.images)
    with background_of(growth.whole) as background:
        for shard in tqdm(writer.missing_shards(), desc="grow", unit="shard", disable=None):
            records = growth.records[slice(*growth.new.shard_range(shard))]
            tiles: dict[str, tuple[TileRow, Encoded | None]] = {}
            there = [record for record in records if record.tile_id in rows]
            if there:
                known = np.array([rows[record.tile_id] for record in there])
                tiles |= _old_tiles(growth, there, known, values, background)
            others = [record for record in records if record.tile_id not in rows]
            if others and growth.source:
                found, batches = _from_source(growth.whole, growth.source, others, values, background)
                tiles |= _by_tile(found, (tile for batch in batches for tile in _tiles_of(batch)))
            ordered = [tiles[record.tile_id] for record in records]
            features = [encoded for _, encoded in ordered if encoded is not None]
            writer.write_shard(shard, [row for row, _ in ordered], features, {})


def _by_tile(
    rows: Sequence[TileRow], features: Iterator[Encoded]
) -> dict[str, tuple[TileRow, Encoded | None]]:
    return {row.tile_id: (row, None if row.skip_reason else next(features)) for row in rows}


def _tiles_of(encoded: Encoded) -> Iterator[Encoded]:
    """Cut a batch into batches of one tile."""
    length = len(next(iter(encoded.values()))["values"])
    for i in range(length):
        yield {g: {name: array[i : i + 1] for name, array in a.items()} for g, a in encoded.items()}


def _old_tiles(
    growth: Growth, records: Sequence[TileRecord], known: Indices, values: ValueRange, background: Background
) -> dict[str, tuple[TileRow, Encoded | None]]:
    """Tiles that are there, with what they lack."""
    old = growth.old
    found = tile_rows(old, known)
    if growth.relabel and growth.source:
        found = [_relabelled(growth.whole, growth.source, *pair) for pair in zip(records, found, strict=True)]
    present = [i for i, row in enumerate(found) if not row.skip_reason]
    if not present:
        return _by_tile(found, iter(()))
    pieces = [_held(old, known[present])]
    if growth.rest:
        kept = [records[i] for i in present]
        if old.attributes.latents or not growth.source:
            batches = _from_latents(growth.rest, kept, old.latents(known[present]), background)
        else:
            rows = [found[i] for i in present]
            batches = _from_images(growth.rest, growth.source, kept, rows, values, background)
        pieces.append(_piece(growth.rest, batches))
    return _by_tile(found, _tiles_of(_joined(growth.new, pieces)))


def _held(old: FeatureStore, rows: Indices) -> Piece:
    """What the store holds of some tiles."""
    stored = old.stored(rows)
    layers = {}
    for group, position, name in old.layer_positions():
        arrays = stored[group] | {"pooled": old.pooled_group(group, rows)}
        layers[name] = {key: array[:, :, position] for key, array in arrays.items()}
    return Piece(old.attributes.timesteps, layers)


def _from_latents(
    work: Work, records: Sequence[TileRecord], latents: NDArray[np.float32], background: Background
) -> list[Encoded]:
    batches = []
    for start in range(0, len(records), work.batch_size):
        part = slice(start, start + work.batch_size)
        ids = [record.tile_id for record in records[part]]
        launch = partial(launch_latents, latents=latents[part], ids=ids)
        batches.append(background.hand(task_of(work, background, launch)))
        if work.lanes is None:
            background.wait()  # nothing splits a batch here that finds no memory beside another one
    return [batch.result().encoded for batch in batches]


def _from_source(
    work: Work, source: Source, records: Sequence[TileRecord], values: ValueRange, background: Background
) -> tuple[list[TileRow], list[Encoded]]:
    with closing(read_ahead(work.job, source, work.image_size, records)) as tiles:
        rows, batches, _ = compute_shard(
            work, tiles, len(records), values, background, background.check
        ).finish()
    return rows, batches


def _from_images(
    work: Work,
    source: Source,
    records: Sequence[TileRecord],
    held: Sequence[TileRow],
    values: ValueRange,
    background: Background,
) -> list[Encoded]:
    rows, batches = _from_source(work, source, records, values, background)
    for row, before in zip(rows, held, strict=True):
        _require_same_image(row, before)
    return batches


def _relabelled(work: Work, source: Source, record: TileRecord, held: TileRow) -> TileRow:
    row, _ = read_row(work.job.preparation(work.image_size), source, record)
    _require_same_image(row, held)
    return replace(row, latents=held.latents)


def _require_same_image(row: TileRow, held: TileRow) -> None:
    if row.image_digest != held.image_digest:
        raise StoreError(
            f"tile {row.tile_id}: its image {row.path} is not the one that its features were made of"
            f"{f' ({row.skip_reason})' if row.skip_reason else ''}; restore it, or extract a new store"
        )


def _piece(work: Work, batches: Sequence[Encoded]) -> Piece:
    layers = {}
    for group, positions in group_layers(work.extractor.layers).items():
        names = batches[0][group]
        arrays = {name: np.concatenate([batch[group][name] for batch in batches]) for name in names}
        for i, position in enumerate(positions):
            layer = work.extractor.layers[position].name
            layers[layer] = {name: array[:, :, i] for name, array in arrays.items()}
    return Piece(work.extractor.timesteps, layers)


def _joined(new: Attributes, pieces: Sequence[Piece]) -> Encoded:
    """Features with every timestep and layer from the first piece that holds it."""
    encoded: Encoded = {}
    for group, positions in group_layers(new.layers).items():
        layers = [new.layers[position].name for position in positions]
        names = next(piece.layers[layers[0]] for piece in pieces if layers[0] in piece.layers)
        encoded[group] = {
            name: np.stack([_at(pieces, layers, timestep, name) for timestep in new.timesteps], axis=1)
            for name in names
        }
    return encoded


def _at(pieces: Sequence[Piece], layers: Sequence[str], timestep: int, name: str) -> NDArray[Any]:
    """One array (B, layer, …) of some layers at a timestep."""
    found = []
    for layer in layers:
        piece = next(p for p in pieces if layer in p.layers and timestep in p.timesteps)
        found.append(piece.layers[layer][name][:, piece.timesteps.index(timestep)])
    return np.stack(found, axis=1)
