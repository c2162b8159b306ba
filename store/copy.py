"""Makes a store out of others: a copy of a part, perhaps in another encoding, or the union of two.

Like an extraction, both are resumable: the same call goes on with the shards that are missing.
Legend: B tiles of a shard, T timesteps, L layers of a group, C channels, H and W feature pixels.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from satdifuser.errors import SettingsError, StoreError
from satdifuser.store.encoding import content_digest, decode_formula, encode
from satdifuser.store.layout import ROW_TEXT_FIELDS
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore, Indices, Selection
from satdifuser.store.schema import (
    Attributes,
    Hashes,
    auto_tiles_per_shard,
    canonical_hash,
    contents_hash,
    differing_fields,
    group_layers,
    kept_layers,
)
from satdifuser.store.settings import StoreSettings
from satdifuser.store.writer import Encoded, StoreWriter, TileRow

ALIKE = (
    *("task", "classes", "ignore_value", "tile_size", "partition", "partitions", "encoding", "previews"),
    *("latents", "valid", "cloud_cover", "colour_statistics", "feature_identity"),
)  # attributes in which two stores must agree to be joined


@dataclass(frozen=True)
class Part:
    """Which tiles, timesteps and layers of a store go into another one."""

    store: FeatureStore
    rows: Indices
    selection: Selection


def copy_store(
    store: FeatureStore,
    out: Path,
    splits: Sequence[str] = (),
    tiles: str = "*",
    timesteps: Sequence[int] | None = None,
    layers: str | Sequence[str] = "*",
    settings: StoreSettings | None = None,
    overwrite: bool = False,
) -> FeatureStore:
    """Copy a store or a part of it.

    Args:
        store: A complete store.
        out: The copy's folder.
        splits: Only tiles of these splits of the partition in use; none for all.
        tiles: Only tiles whose id matches this pattern.
        timesteps: Only these; None for all.
        layers: Only those that match one of these names or patterns.
        settings: Encoding, pool and shards of the copy; None for the encoding of the store.
        overwrite: Replace a store that is there.

    Raises:
        StoreError: the store is incomplete or damaged, no tile is left, or something else is at `out`.
        SettingsError: there is no such split, timestep or layer, or `out` is the store itself.
    """
    _check_apart(out, [store])
    part = Part(store, _chosen_rows(store, splits, tiles), store.selection(timesteps, layers))
    settings = settings or StoreSettings(encoding=store.attributes.encoding)
    attributes = _copied_attributes(part, settings)
    with open_or_create(out, attributes, overwrite) as writer:
        _fill(writer, [part], settings)
    return FeatureStore(out)


def merge_stores(
    first: FeatureStore, second: FeatureStore, out: Path, overwrite: bool = False
) -> FeatureStore:
    """Join two stores of the same features; tiles that both hold must be identical.

    Raises:
        StoreError: they differ in more than their tiles, or in a tile that both hold, or one is incomplete.
        SettingsError: `out` is one of them.
    """
    _check_apart(out, [first, second])
    _check_alike(first, second)
    rows = _chosen_rows(second)
    new = rows[~np.isin(second.table("tiles/tile_id")[rows], first.table("tiles/tile_id"))]
    _check_overlap(first, second)
    everything = first.selection()
    parts = [Part(first, _chosen_rows(first), everything), Part(second, new, everything)]
    settings = StoreSettings(encoding=first.attributes.encoding)
    attributes = _described(parts, first.attributes, settings)
    with open_or_create(out, attributes, overwrite) as writer:
        _fill(writer, parts, settings)
    return FeatureStore(out)


def _check_apart(out: Path, sources: Sequence[FeatureStore]) -> None:
    """Refuse to overwrite what is read."""
    for source in sources:
        if out.resolve() == source.folder.resolve():
            raise SettingsError(f"-o {out}: is the store that is read; choose another folder")


def _chosen_rows(store: FeatureStore, splits: Sequence[str] = (), tiles: str = "*") -> Indices:
    store.require_complete()
    rows = store.select_splits(splits) if splits else np.arange(store.attributes.tiles)
    names = store.table("tiles/tile_id")[rows]
    chosen: Indices = rows[[fnmatchcase(str(name), tiles) for name in names]]
    if not len(chosen):
        raise StoreError(
            f"{store.path}: no tile's id matches {tiles!r}; the first of {len(rows)} is {names[0]}"
        )
    return chosen


# --- what the new store declares


def _copied_attributes(part: Part, settings: StoreSettings) -> Attributes:
    a = part.store.attributes
    positions = [a.layers.index(layer) for layer in a.layers if _holds(part, layer.name)]
    kept = [a.layers[position] for position in positions]
    update: dict[str, Any] = {
        "layers": kept,
        "timesteps": [a.timesteps[step] for step in part.selection.steps],
    }
    if settings.encoding != a.encoding:
        if a.encoding == "reduced":
            raise StoreError(
                f"{part.store.path}: holds averaged windows (encoding reduced), from which no other encoding "
                "follows; copy it without --encoding, or extract again"
            )
        update |= {
            "layers": kept_layers(kept, settings),
            "encoding": settings.encoding,
            "decode": decode_formula(settings.encoding),
            "feature_identity": a.feature_identity | _recoded(a, settings),
        }
    return _described([part], a.model_copy(update=update), settings)


def _recoded(a: Attributes, settings: StoreSettings) -> dict[str, Any]:
    """What a change of encoding changes in the identity: from float32 it is as if extracted so."""
    pool = settings.model_dump(mode="json")["pool"] if settings.encoding == "reduced" else None
    changed: dict[str, Any] = {"encoding": settings.encoding, "pool": pool}
    return changed if a.encoding == "float32" else changed | {"encoded_from": a.encoding}


def _holds(part: Part, layer: str) -> bool:
    chosen = part.selection.layers
    return any(
        name == layer and position in chosen.get(group, ())
        for group, position, name in part.store.layer_positions()
    )


def _described(parts: Sequence[Part], like: Attributes, settings: StoreSettings) -> Attributes:
    """Attributes of a store of these parts, otherwise like some."""
    names = [str(n) for part in parts for n in part.store.table("tiles/tile_id")[part.rows]]
    planned = Hashes(
        feature=canonical_hash(like.feature_identity),
        contents=contents_hash(names, like.timesteps, like.layers),
        labels=canonical_hash([[part.store.hashes().labels for part in parts], names]),
    )
    per_shard = settings.tiles_per_shard
    if per_shard == "auto":
        per_shard = auto_tiles_per_shard(like.layers, len(like.timesteps), like.encoding, len(names))
    return like.model_copy(
        update={
            "store_id": uuid.uuid4().hex,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tiles": len(names),
            "tiles_per_shard": min(per_shard, len(names)),
            "left_out": sum(part.store.attributes.left_out for part in parts),
            "planned": planned,
            "copied_from": [_digest(part) for part in parts],
        }
    )


def _digest(part: Part) -> str:
    """The content_digest of the tiles of a part."""
    ids, digests = (part.store.table(f"tiles/{name}")[part.rows] for name in ("tile_id", "digest"))
    return content_digest(ids, digests)


def _check_alike(first: FeatureStore, second: FeatureStore) -> None:
    digests = [store.attributes.digest_algorithm for store in (second, first)]
    if digests[0] != digests[1]:
        raise StoreError(
            f"{second.path} cannot be joined with the store {first.path}: the digests of their images are "
            f"{digests[0]} and {digests[1]}, and copies keep them; extract one anew"
        )
    ours, theirs = (
        {name: getattr(s.attributes, name) for name in ALIKE} | {"held": _held(s)} for s in (second, first)
    )
    differences = differing_fields(ours, theirs, "the first has", "the second has")
    if differences:
        listing = "\n  ".join(differences)
        raise StoreError(
            f"{first.path} and {second.path} cannot be joined, since they differ:\n  {listing}\n"
            "bring both to the same with `satdifuser store copy`, or extract one anew"
        )


def _held(store: FeatureStore) -> dict[str, Any]:
    a = store.attributes
    return {"timesteps": a.timesteps, "layers": [layer.name for layer in a.layers]}


def _check_overlap(first: FeatureStore, second: FeatureStore) -> None:
    for name in ("digest", "target_digest"):
        ours, theirs = (
            dict(zip(store.table("tiles/tile_id"), store.table(f"tiles/{name}"), strict=True))
            for store in (first, second)
        )
        for tile in sorted(ours.keys() & theirs.keys()):
            if ours[tile] != theirs[tile]:
                what = "features" if name == "digest" else "labels"
                raise StoreError(
                    f"tile {tile}: its {what} in {first.path} and {second.path} differ; leave it out of one "
                    "with `satdifuser store copy --tiles`, or extract one anew"
                )


# --- filling it


def _fill(writer: StoreWriter, parts: Sequence[Part], settings: StoreSettings) -> None:
    origins = [(part, row) for part in parts for row in part.rows.tolist()]
    missing = writer.missing_shards()
    for shard in tqdm(missing, desc="copy", unit="shard", disable=None):
        here = origins[slice(*writer.attributes.shard_range(shard))]
        rows: list[TileRow] = []
        batches: list[Encoded] = []
        for part in parts:
            chosen = np.array([row for owner, row in here if owner is part], np.intp)
            if len(chosen):
                found = tile_rows(part.store, chosen)
                rows += found
                kept = chosen[[not row.skip_reason for row in found]]
                batches += [_features(part, kept, writer.attributes, settings)] * bool(len(kept))
        writer.write_shard(shard, rows, batches, {})


def _features(part: Part, rows: Indices, new: Attributes, settings: StoreSettings) -> Encoded:
    """Encoded features of some tiles as the new store keeps them."""
    store, steps = part.store, list(part.selection.steps)
    stored = store.stored(rows, part.selection)
    recode = new.encoding != store.attributes.encoding
    maps = store.decode(stored) if recode else {}
    names = {name: group for group, _, name in store.layer_positions()}
    encoded: Encoded = {}
    for group, positions in group_layers(new.layers).items():
        layer = new.layers[positions[0]]
        source = names[layer.name]
        pool = settings.pool_of(layer.stride)
        arrays = encode(maps[source], new.encoding, pool) if recode else stored[source]
        pooled = store.pooled_group(source, rows)[:, steps][:, :, list(part.selection.layers[source])]
        encoded[group] = {**arrays, "pooled": pooled}
    return encoded


def tile_rows(store: FeatureStore, rows: Indices) -> list[TileRow]:
    """Everything a store keeps of some tiles beside their features."""
    a = store.attributes
    texts = {name: store.gather(f"tiles/{name}", rows) for name in ROW_TEXT_FIELDS}
    digests = texts.pop("target_digest")
    numbers = {name: store.gather(f"tiles/{name}", rows) for name in ("bounds", "transform")}
    shares, padded = store.gather("tiles/valid_share", rows), store.gather("tiles/padded", rows)
    clouds = store.gather("tiles/cloud_cover", rows) if a.cloud_cover else np.full(len(rows), np.nan)
    splits = {name: store.splits(name)[rows] for name in store.partitions()}
    colour, targets = store.colour(rows), store.targets(rows)
    previews = store.previews(rows) if a.previews else None
    latents = store.latents(rows) if a.latents else None
    valid = store.valid(rows) if a.valid else None
    found = []
    for i in range(len(rows)):
        split = {name: str(codes[i]) for name, codes in splits.items()}
        fields: dict[str, Any] = {name: str(column[i]) for name, column in texts.items()}
        fields |= {name: tuple(column[i].tolist()) for name, column in numbers.items()}
        found.append(
            TileRow(
                **fields,
                split=split[a.partition],
                valid_share=float(shares[i]),
                padded=bool(padded[i]),
                cloud_cover=float(clouds[i]),
                colour=colour[i],
                target=targets[i] if targets is not None and digests[i] else None,
                preview=None if previews is None else previews[i],
                latents=None if latents is None else latents[i],
                valid=None if valid is None else valid[i],
                partitions=split,
            )
        )
    return found
