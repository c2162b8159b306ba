"""Checks a store against its own records: fast by names and sizes, deep by every checksum and digest.

Metadata needs no place here: opening the store has checked it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from satdifuser.errors import StoreError, UnreachableError
from satdifuser.store.encoding import tile_digests
from satdifuser.store.files import PARTIAL_SUFFIX
from satdifuser.store.location import is_remote
from satdifuser.store.reader import FeatureStore

WORKERS = 4  # shards checked at once
TILES_AT_ONCE = 8  # of one shard, so that memory stays small


@dataclass(frozen=True)
class Findings:
    """What a check of a store found."""

    missing: list[int]  # shards that are not committed
    damaged: dict[int, list[str]]  # what is wrong with a shard or its commit record, by shard
    orphans: list[str]  # files that an interrupted write left

    def problems(self) -> list[str]:
        """All of it, one line each."""
        lines = [f"shard {shard}: not committed" for shard in self.missing]
        lines += [f"{name}: left by an interrupted write" for name in self.orphans]
        damaged = sorted(self.damaged.items())
        return lines + [f"shard {shard}: {problem}" for shard, found in damaged for problem in found]


def verify(store: FeatureStore, deep: bool = False) -> list[str]:
    """List what is wrong with a store; an empty list means it is whole.

    Args:
        store: The store.
        deep: Also hash every file, decode every array and recompute every tile's digest.
    """
    return inspect_store(store, deep).problems()


def inspect_store(store: FeatureStore, deep: bool = False) -> Findings:
    """The same, by shard."""
    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(lambda shard: _read_commit(store, shard), range(store.attributes.shards)))
    damaged = {shard: [record] for shard, record in enumerate(found) if isinstance(record, str)}
    records = [{} if isinstance(record, str) else record for record in found]
    readable = FeatureStore(store.path)
    readable.commits = records  # a damaged record hides no other shard
    missing = [shard for shard in readable.missing_shards() if shard not in damaged]
    damaged |= dict(_check_shards(readable, deep))
    orphans = [] if is_remote(store.path) else sorted(store.folder.rglob(f"*{PARTIAL_SUFFIX}"))
    return Findings(missing, damaged, [str(path.relative_to(store.folder)) for path in orphans])


def _read_commit(store: FeatureStore, shard: int) -> dict[str, Any] | str:
    """A shard's commit record, or what is wrong with it."""
    try:
        return store.commit(shard)
    except UnreachableError:
        raise
    except StoreError as error:
        return f"commits/c/{shard} is damaged ({error.__cause__})"


def _check_shards(store: FeatureStore, deep: bool) -> Iterator[tuple[int, list[str]]]:
    """What is wrong with each committed shard; shards without problems left out."""
    committed = [shard for shard, record in enumerate(store.commits) if record]
    problems = store.check_files()  # looked up before there are several threads

    def check(shard: int) -> list[str]:
        return problems.get(shard) or (_wrong_bytes(store, shard) if deep else [])

    with ThreadPoolExecutor(WORKERS) as pool:
        found = pool.map(check, committed)
        bar = tqdm(found, total=len(committed), desc="verify", unit="shard", disable=None)
        yield from ((shard, lines) for shard, lines in zip(committed, bar, strict=True) if lines)


def _wrong_bytes(store: FeatureStore, shard: int) -> list[str]:
    try:
        return _altered_files(store, shard) or _wrong_digests(store, shard)
    except UnreachableError:
        raise
    except (OSError, StoreError) as error:
        return [f"cannot be read: {error}"]


def _altered_files(store: FeatureStore, shard: int) -> list[str]:
    return [
        f"{key} was altered after it was committed (its digest differs)"
        for key, (_, digest) in sorted(store.commits[shard]["files"].items())
        if store.digest_of(key) != digest
    ]


def _wrong_digests(store: FeatureStore, shard: int) -> list[str]:
    start, stop = store.attributes.shard_range(shard)
    problems = []
    for first in range(start, stop, TILES_AT_ONCE):
        rows = np.arange(first, min(first + TILES_AT_ONCE, stop))
        names, reasons, recorded = (
            store.gather(f"tiles/{name}", rows).tolist() for name in ("tile_id", "skip_reason", "digest")
        )
        arrays = store.stored(rows)
        for group in arrays:
            arrays[group]["pooled"] = store.pooled_group(group, rows)
        found = tile_digests(arrays, store.attributes.digest_algorithm)
        problems += [
            f"tile {name}: features differ from the digest recorded for them"
            for name, reason, was, now in zip(names, reasons, recorded, found, strict=True)
            if was != ("" if reason else now)
        ]
    return problems
