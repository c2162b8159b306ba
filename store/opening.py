"""Creates stores and opens them for writing: by one process alone, or by several with shards of their own."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import zarr

from satdifuser.errors import LockedError, SettingsError, StoreError
from satdifuser.store.files import (
    DurableStore,
    aside_name,
    discard,
    make_folder,
    remove_aside,
    sync_folder,
    write_error,
)
from satdifuser.store.layout import create_arrays
from satdifuser.store.location import is_zip
from satdifuser.store.lock import POLL_SECONDS, StoreLock
from satdifuser.store.metadata import is_store, seal
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import ATTRIBUTE_KEY, Attributes, differing_fields
from satdifuser.store.writer import StoreWriter

CREATION_SECONDS = 60.0  # that another process may take to create a store
MOMENT_SECONDS = 2.0  # for which others lock a store that they wanted to create, and find created


def create_store(path: Path, attributes: Attributes) -> None:
    """Create an empty store: all metadata or nothing, whenever the process dies.

    Raises:
        StoreError: it cannot be written.
    """
    partial = aside_name(path)
    try:
        files = DurableStore(partial)
        root = zarr.create_group(files, zarr_format=3)
        create_arrays(root, attributes)
        root.attrs[ATTRIBUTE_KEY] = attributes.model_dump(mode="json")
        seal(partial)
        files.sync_folders()
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_or_create(path: Path, attributes: Attributes, overwrite: bool) -> StoreWriter:
    """Open the store at `path` to go on with it, or create it; nobody else writes to it meanwhile.

    Raises:
        SettingsError: the path is named as a .zip file.
        StoreError: something else is at `path`, or a store made with other settings, or another process
            is writing to it, or it cannot be written.
    """
    try:
        make_folder(path.parent)
        with ExitStack() as on_failure:
            lock = on_failure.enter_context(StoreLock(path))
            _prepare(path, attributes, overwrite)
            writer = StoreWriter(path, lock)
            on_failure.pop_all()
            return writer
    except OSError as error:
        raise write_error(path, error) from error


def _prepare(path: Path, attributes: Attributes, overwrite: bool) -> None:
    """See to it that a store with these attributes is at `path`."""
    real = path.resolve()  # a link to a store stays one
    refuse_zip(real)
    remove_aside(real)
    _refuse_others(path)
    if path.exists() and not overwrite:
        store = FeatureStore(path)
        if any(store.commits) or store.attributes.labelled:  # labels are not to be had from the source
            return _check_same(path, store.attributes, attributes)
    if path.exists():  # to be overwritten, or nothing was committed in it
        discard(real)
    return create_store(real, attributes)


def _refuse_others(path: Path) -> None:
    """Raise StoreError where something that is no store is at `path`."""
    if path.exists() and not is_store(path):
        raise StoreError(f"{path}: exists and is not a feature store; choose another output path")


def refuse_zip(path: Path) -> None:
    """Raise SettingsError where a store's path is named as a .zip file, before anything is replaced."""
    if is_zip(path):
        raise SettingsError(f"{path}: a store is written to a folder; zip it when it is complete")


def _check_same(path: Path, existing: Attributes, attributes: Attributes) -> None:
    fields = differing_fields(_source(attributes), _source(existing))
    if existing.digest_algorithm != attributes.digest_algorithm:
        fields.append(
            f"digest_algorithm: {existing.digest_algorithm}, asked for {attributes.digest_algorithm}"
        )
    if existing.planned == attributes.planned and not fields:
        if existing.copied_from == attributes.copied_from:
            return
        fields = ["the values it was copied from"]
    fields += differing_fields(attributes.feature_identity, existing.feature_identity)
    for name in ("timesteps", "layers", "tiles"):
        if getattr(existing, name) != getattr(attributes, name):
            fields.append(f"{name}: {_brief(existing, name)}, asked for {_brief(attributes, name)}")
    listing = ["the tiles' ids, splits or labels differ"] if not fields else []
    if any(line.startswith("source.partition:") for line in fields):
        listing.append(
            "(fit.partition chooses among the partitions that this store holds: no need to extract again)"
        )
    raise StoreError(
        f"{path}: this store was made with other settings:\n  "
        + "\n  ".join(fields + listing)
        + "\nwrite to another path, or replace the store with --overwrite; a complete store can also grow: "
        "`satdifuser extract` with --add-timesteps, --add-layers, --add-tiles or --relabel"
    )


def _source(attributes: Attributes) -> dict[str, Any]:
    """Where the tiles came from, since equal tile ids may stand for other images."""
    settings = attributes.settings.get("source", {})
    return {"source": {key: value for key, value in settings.items() if key != "on_error"}}


def _brief(attributes: Attributes, name: str) -> str:
    value = getattr(attributes, name)
    return f"{len(value)} layers" if name == "layers" else str(value)


def create_unless_there(path: Path, attributes: Attributes) -> None:
    """Create a store that several processes fill, each its own shards; the first one to come does it.

    The lock is taken only where there is no store: others may be filling it for hours.

    Raises:
        SettingsError: the path is named as a .zip file.
        StoreError: something else is at `path`, or it cannot be written.
    """
    refuse_zip(path)
    end = time.monotonic() + CREATION_SECONDS
    while not is_store(path):
        try:
            make_folder(path.parent)
            with StoreLock(path):
                _refuse_others(path)
                if not path.exists():
                    create_store(path.resolve(), attributes)
        except LockedError:  # by one that creates it, or has done so by now
            if time.monotonic() > end:
                raise
            time.sleep(POLL_SECONDS)
        except OSError as error:
            raise write_error(path, error) from error


def open_part(path: Path, attributes: Attributes) -> StoreWriter:
    """Open a store that other processes fill too, each its own shards.

    Raises:
        StoreError: the store was made with other settings, or a process that shares it with nobody has it.
    """
    lock = StoreLock(path, shared=True, patience=MOMENT_SECONDS)
    try:
        _check_same(path, FeatureStore(path).attributes, attributes)
        return StoreWriter(path, lock, alone=False)
    except BaseException:
        lock.release()
        raise
