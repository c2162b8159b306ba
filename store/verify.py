"""Checks a store against its own records: fast by names and sizes, deep by every checksum and digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from satdifuser.store.encoding import tile_digests
from satdifuser.store.files import PARTIAL_SUFFIX
from satdifuser.store.reader import FeatureStore


def verify(store: FeatureStore, deep: bool = False, progress: Callable[[], None] = lambda: None) -> list[str]:
    """List everything that is wrong with a store; an empty list means it is whole.

    Args:
        store: The store.
        deep: Also hash every file, decode every array and recompute every tile's digest.
        progress: Called after each shard.
    """
    problems = [f"shard {shard}: not committed" for shard in store.missing_shards()]
    problems += [f"{path.relative_to(store.path)}: left by an interrupted write" for path in _orphans(store)]
    problems += store.file_problems
    for shard, record in enumerate(store.commits):
        if record and deep:
            problems += _check_files(store, shard, record) + _check_digests(store, shard)
        progress()
    return problems


def _orphans(store: FeatureStore) -> list[Path]:
    return sorted(store.path.rglob(f"*{PARTIAL_SUFFIX}"))


def _check_files(store: FeatureStore, shard: int, record: dict[str, Any]) -> list[str]:
    return [
        f"shard {shard}: {key} was altered after it was committed (SHA-256 differs)"
        for key, (size, digest) in sorted(record["files"].items())
        if _has_size(store.path / key, size) and _file_digest(store.path / key) != digest
    ]


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_digests(store: FeatureStore, shard: int) -> list[str]:
    rows = np.arange(*store.attributes.shard_range(shard))
    try:
        tiles = store.tiles.iloc[rows]
        arrays = store.stored(rows, pooled=True)
    except (RuntimeError, ValueError, OSError) as error:
        return [f"shard {shard}: cannot be decoded: {error}"]
    found = tile_digests(arrays)
    return [
        f"shard {shard}: tile {tile.tile_id}: features differ from the digest recorded for them"
        for tile, digest in zip(tiles.itertuples(), found, strict=True)
        if tile.digest != ("" if tile.skip_reason else digest)
    ]
