"""Finds tiles whose files changed after their features were stored, in the way of git's index.

The store keeps the size and time of change of each tile's files. Where these are the same nothing is read;
where they differ the tile is read again and its digests decide, for a copied file holds the same image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from satdifuser.errors import StoreError
from satdifuser.extract.sources.tile import TileRecord
from satdifuser.store.reader import FeatureStore
from satdifuser.store.writer import TileRow

SHOWN_SHARDS = 10


def file_state(record: TileRecord) -> str:
    """Size in bytes and time of change in ns of a tile's image and mask: ``SIZE:TIME SIZE:TIME``.

    A file that is not there is ``missing``; a tile without files has "".
    """
    return " ".join(_state(Path(path)) for path in (record.path, record.mask_path) if path)


def _state(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "missing"
    return f"{found.st_size}:{found.st_mtime_ns}"


def refuse_changed(
    store: FeatureStore, records: Sequence[TileRecord], read: Callable[[TileRecord], TileRow]
) -> None:
    """Refuse to go on with a store if an image or mask behind its features is another one now.

    Args:
        store: The store, complete or not.
        records: All its tiles, in its order.
        read: Reads a tile anew; one that cannot be read yields a row with a ``skip_reason``.

    Raises:
        StoreError: naming the first such tile, its file, and the shards to do again.
    """
    per_shard = store.attributes.tiles_per_shard
    states = store.table("tiles/file_state")
    suspects = [
        row
        for row, record in enumerate(records)
        if store.commits[row // per_shard] and file_state(record) != states[row]
    ]
    if not suspects:
        return
    images, targets = store.table("tiles/image_digest"), store.table("tiles/target_digest")
    changed: list[tuple[int, str]] = []  # (row, what)
    for row in tqdm(suspects, desc="check files that changed", unit="tile", leave=False, disable=None):
        now = read(records[row])
        if now.skip_reason and images[row]:
            changed.append((row, f"image or mask (unusable now: {now.skip_reason})"))
        elif now.image_digest != images[row]:
            changed.append((row, f"image {records[row].path}"))
        elif now.target_digest != targets[row] and not store.attributes.labelled:
            changed.append((row, f"mask {records[row].mask_path or records[row].path}"))
    if changed:
        row, what = changed[0]
        others = f" (and {len(changed) - 1} more tiles)" if len(changed) > 1 else ""
        raise StoreError(
            f"{store.path}: tile {records[row].tile_id}: its {what} changed after it was extracted{others}; "
            + _remedy(store.folder, sorted({row // per_shard for row, _ in changed}))
        )


def _remedy(path: Path, shards: Sequence[int]) -> str:
    named = ", ".join(f"{path}/commits/c/{shard}" for shard in shards[:SHOWN_SHARDS])
    more = f" and {len(shards) - SHOWN_SHARDS} more" if len(shards) > SHOWN_SHARDS else ""
    return (
        f"delete {named}{more} and run the same `satdifuser extract` command again to redo "
        f"{'this shard' if len(shards) == 1 else 'these shards'}, or replace the store with --overwrite"
    )
