"""Drops the damaged shards of a store, so that the command which made it redoes just those.

A commit record goes first, and durably: from then on the shard is missing to everybody, and a crash in the
middle leaves a store that is incomplete, never one that is wrong.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from satdifuser.errors import StoreError
from satdifuser.store.files import remove_orphans, sync_folder, write_error
from satdifuser.store.lock import StoreLock
from satdifuser.store.metadata import ROOT, require_current
from satdifuser.store.reader import FeatureStore
from satdifuser.store.verify import Findings, inspect_store

COMMITS = "commits/c"


def repair(path: Path, deep: bool = False) -> Findings:
    """Drop every shard of a store that is damaged, with whatever interrupted writes left.

    Args:
        path: The store's folder.
        deep: Find also damage that leaves the files' sizes as they were.

    Returns:
        What was wrong before.

    Raises:
        StoreError: the store's metadata is damaged, so that it is not known what its shards should hold;
            or another process writes to it; or it cannot be written.
    """
    try:
        store = FeatureStore(path)
    except StoreError as error:
        raise StoreError(f"{error}; repair mends shards only, and changed nothing") from error
    try:
        require_current(path, store.attributes)
        with StoreLock(path):
            findings = inspect_store(store, deep)
            _drop(path, sorted(findings.damaged))
            remove_orphans(path)
    except OSError as error:
        raise write_error(path, error) from error
    return findings


def _drop(path: Path, shards: list[int]) -> None:
    for shard in shards:
        _remove(path / COMMITS / str(shard))
    if shards:
        sync_folder(path / COMMITS)
    real = path.resolve()
    for array in [file.parent for file in path.rglob(ROOT)]:
        for left in (array / "c" / str(shard) for shard in shards):
            if left.resolve().is_relative_to(real):  # never follow a link out of the store
                _remove(left)


def _remove(left: Path) -> None:
    """Delete what one array holds of a shard: a file, or a folder of them."""
    if left.is_dir():
        shutil.rmtree(left)
    else:
        left.unlink(missing_ok=True)
