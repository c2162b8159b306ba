"""Checks a store against its own records: fast by names and sizes, deep by every checksum and digest.

Metadata needs no place here: opening the store has checked it.
"""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from satdifuser.store.encoding import tile_digests
from satdifuser.store.files import PARTIAL_SUFFIX, file_digest
from satdifuser.store.reader import FeatureStore


def verify(store: FeatureStore, deep: bool = False) -> list[str]:
    """List what is wrong with a store; an empty list means it is whole.

    Args:
        store: The store.
        deep: Also hash every file, decode every array and recompute every tile's digest.

    Raises:
        StoreError: a commit record is damaged.
    """
    problems = [f"shard {shard}: not committed" for shard in store.missing_shards()]
    orphans = sorted(store.path.rglob(f"*{PARTIAL_SUFFIX}"))
    problems += [f"{path.relative_to(store.path)}: left by an interrupted write" for path in orphans]
    committed = [shard for shard, record in enumerate(store.commits) if record]
    for shard in tqdm(committed, desc="verify", unit="shard", disable=None):
        found = store.file_problems.get(shard, [])
        if deep and not found:
            found = _altered_files(store, shard) or _wrong_digests(store, shard)
        problems += [f"shard {shard}: {problem}" for problem in found]
    return problems


def _altered_files(store: FeatureStore, shard: int) -> list[str]:
    return [
        f"{key} was altered after it was committed (SHA-256 differs)"
        for key, (_, digest) in sorted(store.commits[shard]["files"].items())
        if file_digest(store.path / key) != digest
    ]


def _wrong_digests(store: FeatureStore, shard: int) -> list[str]:
    rows = np.arange(*store.attributes.shard_range(shard))
    names, reasons, recorded = (
        store.gather(f"tiles/{name}", rows).tolist() for name in ("tile_id", "skip_reason", "digest")
    )
    arrays = store.stored(rows)
    for group in arrays:
        arrays[group]["pooled"] = store.pooled_group(group, rows)
    found = tile_digests(arrays)
    return [
        f"tile {name}: features differ from the digest recorded for them"
        for name, reason, was, now in zip(names, reasons, recorded, found, strict=True)
        if was != ("" if reason else now)
    ]
