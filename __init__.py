"""Diffusion features of satellite images: extract once, then fit and evaluate from a shared store.

    import satdifuser

    store = satdifuser.extract({"kind": "folder", "root": "eurosat"}, "embedded", "eurosat.zarr")
    store = satdifuser.open_store("eurosat.zarr")   # any time later, on any machine
    store.tiles                                     # pandas table of the tiles
    store.pooled(timestep=61, layer="up_blocks.1.*attn1")   # xarray (tile, channel)
    satdifuser.label(store, "fields.gpkg", column="crop")   # polygons or points, now or later
    table = satdifuser.probe(store)                 # which layer, which noise level: a pandas table
    run = satdifuser.fit(store, fusion="global")
    run.metrics

Importing is quick: torch, diffusers and zarr load when they are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import satdifuser.extract as _extract_room

if TYPE_CHECKING:
    import pandas as pd

    from satdifuser.fuse.run_folder import Run
    from satdifuser.store.reader import FeatureStore

__version__ = version("satdifuser")
__all__ = ["extract", "fit", "label", "open_run", "open_store", "probe"]


def open_store(path: str | Path) -> FeatureStore:
    """Open a feature store for reading.

    Args:
        path: Its folder.

    Returns:
        The store; printing it shows what it holds.

    Raises:
        StoreError: there is no store, or one of a newer format, or its metadata is damaged.

    Example::

        store = satdifuser.open_store("eurosat.zarr")
        store.tiles                                   # pandas table, one row per tile
        store.pooled(timestep=61, split="train")      # xarray (tile, channel), float32
        for batch in store.batches(split="train", batch_size=32, seed=0):
            batch.features["stride_08"]               # numpy (B, T, L, C, H, W), float32
            batch.targets, batch.tile_ids             # labels (B,) or (B, classes), or masks (B, H, W); B ids
    """
    from satdifuser.store.reader import open_store

    return open_store(path)


def open_run(path: str | Path) -> Run:
    """Open a fitted run.

    Args:
        path: Its folder.

    Returns:
        The run: its ``path``; ``info``, what was fitted and how training went; ``metrics``.

    Raises:
        RunError: it holds no finished run.

    Example::

        run = satdifuser.open_run("runs/global-seed0")
        run.metrics["test"]["accuracy"], run.metrics["test"]["interval"]["accuracy"]
    """
    from satdifuser.fuse.run_folder import open_run

    return open_run(Path(path))


def extract(
    source: dict[str, Any],
    backbone: str | Path | dict[str, Any],
    out: str | Path,
    *,
    overwrite: bool = False,
    extract: dict[str, Any] | None = None,
    store: dict[str, Any] | None = None,
) -> FeatureStore:
    """Write the features of a source's tiles to a store, or go on where an earlier call stopped.

    Args:
        source: The `source` section of a pipeline file, e.g. ``{"kind": "folder", "root": "eurosat"}``.
        backbone: ``embedded``, a diffusers folder or hub id, or a whole `backbone` section.
        out: The store's folder.
        overwrite: Replace a store that is there.
        extract: The `extract` section, e.g. ``{"timesteps": [1, 101], "noising": "inversion"}``.
        store: The `store` section, e.g. ``{"encoding": "float16"}``.

    Returns:
        The complete store.

    Raises:
        SettingsError: naming every wrong setting at once.
        SatDiFuserError: bad input; whatever was committed stays.

    Example::

        source = {"kind": "folder", "root": "eurosat"}    # one folder of images per class
        store = satdifuser.extract(source, "embedded", "eurosat.zarr", extract={"timesteps": [21, 61]})
    """
    from satdifuser.extract.run import extract as run_extraction
    from satdifuser.pipeline import validate_settings

    sections = {
        "source": source,
        "backbone": {"model": str(backbone)} if isinstance(backbone, str | Path) else backbone,
        "extract": extract or {},
        "store": store or {},
    }
    settings = validate_settings(sections, "satdifuser.extract")
    return run_extraction(settings.job(), Path(out), overwrite)


def label(store: FeatureStore | str | Path, labels: str | Path, **settings: Any) -> FeatureStore:
    """Give a store's tiles the labels of a file of polygons, points or pixels; features stay as they are.

    Args:
        store: A store or its folder.
        labels: A GeoPackage, GeoJSON or Shapefile, or a raster of class ids.
        settings: Fields of the `label` section, e.g. ``column="crop", touch="all"``.

    Returns:
        The labelled store, in the old one's place.

    Raises:
        SettingsError: naming every wrong setting at once; file, column or class list are missing.
        LabelError: the labels cannot be placed, miss all tiles, or are of unknown classes.
        StoreError: the store is incomplete or damaged.

    Example::

        split = {"kind": "spatial_blocks", "size_m": 2000, "buffer_m": 200}
        store = satdifuser.label("scene.zarr", "fields.gpkg", column="crop", split=split)
    """
    from satdifuser.labels.relabel import label_store
    from satdifuser.pipeline import validate_settings
    from satdifuser.store.reader import FeatureStore

    pipeline = validate_settings({"label": settings}, "satdifuser.label")
    place = store.path if isinstance(store, FeatureStore) else Path(store)
    labelled, notes = label_store(place, Path(labels), pipeline.label)
    for note in notes:
        print(note, file=sys.stderr)
    return labelled


def fit(
    store: FeatureStore | str | Path,
    fusion: str = "global",
    seed: int = 0,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    evaluate: dict[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Train one fusion on a store and measure it on val, or go on where an earlier call stopped.

    Args:
        store: A store or its folder.
        fusion: global, localized, moe, concatenation or single (of one timestep and kind of layer).
        seed: Of initial weights, batch order and dropout.
        out: The run's folder; None for ``runs/FUSION-seedSEED`` beside the store.
        overwrite: Train anew whatever is at `out`.
        evaluate: The `evaluate` section, e.g. ``{}`` or ``{"bootstrap": 100}``, to measure the run on test
            too; None leaves the test split unread.
        settings: Fields of the `fit` section, e.g. ``epochs=10, lr=0.003``.

    Returns:
        The run; ``run.metrics`` holds its figures with intervals.

    Raises:
        SettingsError: naming every wrong setting at once.
        StoreError: shards are missing, or a split is empty.
        RunError: another run is at `out`.

    Example::

        run = satdifuser.fit(store, fusion="moe", epochs=20)
        run.metrics["val"]["accuracy"]
    """
    from satdifuser.errors import SettingsError
    from satdifuser.evaluate.evaluation import ensure_evaluated, ensure_measured_on_val, new_outcome
    from satdifuser.fuse.fit import fit as train
    from satdifuser.fuse.grid import expand
    from satdifuser.pipeline import validate_settings
    from satdifuser.store.reader import FeatureStore

    if "seeds" in settings:
        raise SettingsError("satdifuser.fit: got seeds, but one call makes one run: pass seed, e.g. seed=1")
    sections = {"fit": {"fusion": [fusion], "seeds": [seed], **settings}, "evaluate": evaluate or {}}
    pipeline = validate_settings(sections, "satdifuser.fit")
    opened = store if isinstance(store, FeatureStore) else open_store(store)
    candidates = expand(pipeline.fit, opened)
    if len(candidates) > 1:
        named = ", ".join(one.name for one in candidates)
        raise SettingsError(f"satdifuser.fit: one call makes one run, but this asks for several: {named}")
    beside = opened.path.parent if isinstance(opened.path, Path) else Path()
    folder = Path(out) if out else beside / "runs" / candidates[0].name
    one = candidates[0]
    run = train(opened, one.settings, one.fusion, one.seed, folder, new_outcome, overwrite)
    ensure_measured_on_val(run, opened, pipeline.evaluate)
    if evaluate is not None:
        ensure_evaluated(run, opened, pipeline.evaluate)
    return run


def probe(
    store: FeatureStore | str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    test: bool = True,
    workers: int = 0,
    scheduler: str = "",
    evaluate: dict[str, Any] | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Sweep linear probes over a store's timesteps and layers, or go on where an earlier call stopped.

    Args:
        store: A store or its folder.
        out: Folder of the probe; None for ``probe`` beside the store.
        overwrite: Replace another probe that is there.
        test: Read the test split for what was chosen on val; False leaves it unread.
        workers: So many Dask processes on this machine …
        scheduler: … or those of a scheduler; neither: threads of this process.
        evaluate: The `evaluate` section, for bootstrap and level.
        settings: Fields of the `probe` section, e.g. ``labels="1%,10%,100%", probes=["logistic"]``.

    Returns:
        One row for each metric of each probe; ``split`` says of which, ``chosen`` whether val chose it.

    Raises:
        SettingsError: naming every wrong setting at once.
        StoreError: shards or targets are missing, a split is empty, or there is nothing to tell apart.
        RunError: the folder holds another probe.

    Example::

        table = satdifuser.probe(store, labels="1%,10%,100%")
        single = table.query("inputs == 'single' and split == 'val' and labels == '100%'")
        single.pivot_table("value", "layer", "timestep", "max")      # the heat map
        table.query("chosen and split == 'test' and metric == 'accuracy'")
    """
    from satdifuser.evaluate.probe_sweep import probe_store
    from satdifuser.pipeline import validate_settings
    from satdifuser.store.cluster import Cluster
    from satdifuser.store.reader import FeatureStore

    pipeline = validate_settings({"probe": settings, "evaluate": evaluate or {}}, "satdifuser.probe")
    opened = store if isinstance(store, FeatureStore) else open_store(store)
    beside = opened.path.parent if isinstance(opened.path, Path) else Path()
    cluster = Cluster(workers, scheduler, threads=1) if workers or scheduler else None
    folder = Path(out) if out else beside / "probe"
    command = f"satdifuser probe {opened.path} -o {folder}"
    return probe_store(opened, pipeline.probe, pipeline.evaluate, folder, command, overwrite, test, cluster)


def _callable_room(room: ModuleType, verb: Callable[..., Any]) -> ModuleType:
    """Let a room be called as the verb of its name.

    Importing anything from a room binds its name in this package, over a function of that name.
    """
    behaviour = {"__call__": staticmethod(verb), "__signature__": signature(verb)}
    room.__class__ = type("CallableModule", (ModuleType,), behaviour)
    room.__doc__ = verb.__doc__
    return room


extract = _callable_room(_extract_room, extract)  # type: ignore[assignment]
