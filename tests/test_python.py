"""The Python interface as a notebook uses it, on a few generated tiles and the embedded backbone."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import satdifuser
from satdifuser.errors import RunError, SatDiFuserError, SettingsError, StoreError
from satdifuser.fuse.run_folder import Run
from satdifuser.pipeline import load_pipeline
from satdifuser.store.reader import Batch, FeatureStore

SOURCE = {"kind": "synthetic", "tiles": 20, "tile_size": 32}
BACKBONE = {"model": "embedded", "device": "cpu"}
LAYER = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
EXTRACT = {"timesteps": [21, 61], "layers": ["up_blocks.1.*attn1"], "batch_size": 4, "threads": 1}
FIT: dict[str, Any] = {"epochs": 1, "projection": 16, "norm_groups": 4, "device": "cpu"}
QUICK = {"bootstrap": 10}
VERBS = ["extract", "fit", "label", "open_run", "open_store", "probe"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return satdifuser.extract(SOURCE, BACKBONE, tmp_path_factory.mktemp("python") / "s.zarr", extract=EXTRACT)


@pytest.fixture(scope="module")
def run(store: FeatureStore) -> Run:
    return satdifuser.fit(store, fusion="global", evaluate=QUICK, **FIT)


def test_extract_is_called_twice_and_its_room_is_imported_from_between(
    store: FeatureStore, tmp_path: Path
) -> None:
    """The function and the room share a name; importing from the room once hid the function."""
    from satdifuser.extract.settings import SyntheticSettings
    from satdifuser.extract.sources import list_tiles, open_source

    records = list_tiles(open_source(SyntheticSettings(tiles=20, tile_size=32)))
    again = satdifuser.extract(SOURCE, BACKBONE, tmp_path / "again.zarr", extract=EXTRACT)
    assert again.content_digest() == store.content_digest()
    assert sorted(again.tiles.tile_id) == sorted(record.tile_id for record in records)
    held = satdifuser.extract(SOURCE, BACKBONE, str(store.path), extract=EXTRACT)
    assert held.attributes.store_id == store.attributes.store_id


def test_sections_reach_the_store(tmp_path: Path) -> None:
    store = satdifuser.extract(
        {
            "tiles": 8,
            "tile_size": 32,
            "task": "segmentation",
            "split": {"train": 0.5, "val": 0.25, "test": 0.25},
        },
        BACKBONE,
        tmp_path / "s.zarr",
        extract=EXTRACT | {"timesteps": [61]},
        store={"encoding": "float16"},
    )
    assert (store.attributes.task, store.attributes.encoding) == ("segmentation", "float16")
    assert store.attributes.timesteps == [61]
    replaced = satdifuser.extract(
        SOURCE, BACKBONE, store.path, overwrite=True, extract=EXTRACT, store={"previews": False}
    )
    assert replaced.attributes.tiles == 20
    assert not replaced.attributes.previews


def test_a_store_shows_what_it_holds(store: FeatureStore) -> None:
    opened = satdifuser.open_store(str(store.path))
    shown = repr(opened)
    for fact in (
        "20 of 32 x 32 px",
        "12 train, 4 val, 4 test",
        "classification, ",
        "[21, 61]",
        "int8",
        "embedded",
    ):
        assert fact in shown
    assert isinstance(opened.tiles, pd.DataFrame)
    assert len(opened.tiles) == 20
    assert {"tile_id", "split", "label", "left", "top"} <= set(opened.tiles.columns)


def test_pooled_features_are_labelled_xarray(store: FeatureStore) -> None:
    one = store.pooled(timestep=61, layer="up_blocks.1.attentions.0.*attn1", split="train")
    channels = next(layer.channels for layer in store.attributes.layers if layer.name == LAYER)
    assert one.dims == ("tile", "channel")
    assert one.shape == (12, channels)
    assert one.dtype == np.float32
    assert set(one.layer.values) == {LAYER}
    assert set(one.timestep.values) == {61}
    assert set(one.tile_id.values) == set(store.tiles.tile_id[store.tiles.split == "train"])
    everything = sum(layer.channels for layer in store.attributes.layers) * 2
    assert store.pooled().shape == (20, everything)


def test_the_store_is_a_lazy_datatree(store: FeatureStore) -> None:
    tree = store.to_xarray()
    assert isinstance(tree, xr.DataTree)
    values = tree["features/stride_08/values"]
    assert values.chunks is not None
    assert values.dims == ("tile", "timestep", "layer", "channel", "y", "x")
    layers, channels = len(store.attributes.layers), store.attributes.layers[0].channels
    assert values.shape == (20, 2, layers, channels, 4, 4)


def test_batches_cover_a_split_in_a_seeded_order(store: FeatureStore) -> None:
    def ids(seed: int | None) -> list[str]:
        return [name for b in store.batches(split="train", batch_size=5, seed=seed) for name in b.tile_ids]

    assert ids(0) == ids(0) != ids(1)
    assert sorted(ids(0)) == sorted(ids(None)) == sorted(store.tiles.tile_id[store.tiles.split == "train"])
    batch = next(store.batches(split="train", batch_size=5, seed=0))
    (features,) = batch.features.values()
    assert features.shape[:3] == (5, 2, len(store.attributes.layers))
    assert features.dtype == np.float32
    assert batch.targets is not None
    labels = store.tiles.set_index("tile_id").label
    assert batch.targets.tolist() == labels[batch.tile_ids].tolist()


def test_fit_gives_a_run_with_metrics(store: FeatureStore, run: Run) -> None:
    assert run.path == store.path.parent / "runs/global-seed0"
    assert 0 <= run.metrics["test"]["accuracy"] <= 1
    assert run.metrics["evaluate"]["bootstrap"] == 10
    opened = satdifuser.open_run(str(run.path))
    assert (opened.info, opened.metrics) == (run.info, run.metrics)
    again = satdifuser.fit(str(store.path), "global", evaluate=QUICK, **FIT)
    assert again.metrics == run.metrics
    quiet = satdifuser.fit(store, seed=1, **FIT)
    assert quiet.path.name == "global-seed1"
    assert "test" not in quiet.metrics
    assert quiet.metrics["test_reads"] == 0
    assert "interval" in quiet.metrics["val"]


def test_the_settings_of_a_run_are_a_pipeline_file(store: FeatureStore, run: Run) -> None:
    pipeline = load_pipeline(run.path / "settings.yaml")
    assert pipeline.source.model_dump(mode="json") == store.attributes.settings["source"]
    assert (pipeline.extract.batch_size, pipeline.backbone.device) == (4, "cpu")
    assert (pipeline.fit.epochs, pipeline.evaluate.bootstrap) == (1, 10)


def test_a_store_names_what_presets_and_autos_became(store: FeatureStore) -> None:
    settings = store.attributes.settings
    assert settings["source"]["tile_size"] == list(store.attributes.tile_size)
    assert settings["extract"]["timesteps"] == [21, 61]
    assert settings["store"]["tiles_per_shard"] == store.attributes.tiles_per_shard
    stages = {section: dict(settings[section]) for section in ("source", "backbone", "extract", "store")}
    del stages["extract"]["read_threads"], stages["extract"]["read_processes"]  # of the machine
    assert "auto" not in str(stages)


def test_damaged_metrics_are_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(RunError, match=r"metrics\.json: is damaged: .*; delete it, which starts its count "):
        _ = dataclasses.replace(run, path=tmp_path).metrics


def test_fit_measures_again_when_asked_otherwise(store: FeatureStore, tmp_path: Path) -> None:
    first = satdifuser.fit(store, out=tmp_path / "run", evaluate=QUICK, **FIT).metrics
    second = satdifuser.fit(store, out=tmp_path / "run", evaluate={"bootstrap": 11}, **FIT).metrics
    assert (second["evaluate"]["bootstrap"], second["test_reads"]) == (11, 2)
    assert second["val"]["accuracy"] == first["val"]["accuracy"]
    weights = (tmp_path / "run/model.safetensors").stat().st_mtime_ns
    satdifuser.fit(store, out=tmp_path / "run", overwrite=True, evaluate={"bootstrap": 11}, **FIT)
    assert (tmp_path / "run/model.safetensors").stat().st_mtime_ns > weights


WRONG: list[tuple[Callable[[FeatureStore, Path], Any], type[SatDiFuserError], str]] = [
    (lambda s, p: satdifuser.open_store(p / "x.zarr"), StoreError, r"x\.zarr: no such store"),
    (lambda s, p: satdifuser.open_store(p), StoreError, "not a feature store"),
    (lambda s, p: satdifuser.open_run(p / "x"), RunError, "x: no such run folder"),
    (lambda s, p: satdifuser.open_run(p), RunError, "not a run .*; make one with `satdifuser fit`"),
    (
        lambda s, p: satdifuser.extract({"kind": "foldr"}, "embedded", p / "o"),
        SettingsError,
        r"satdifuser\.extract: 1 setting is wrong\n  source\.kind = 'foldr': .*; did you mean 'folder'",
    ),
    (
        lambda s, p: satdifuser.extract(SOURCE, "embedded", p / "o", extract={"step": 3, "seed": -1}),
        SettingsError,
        r"(?s)2 settings are wrong.*extract\.seed = -1: expected .*extract\.step = 3: unknown .* steps",
    ),
    (
        lambda s, p: satdifuser.extract({"kind": "folder", "root": p / "x"}, "embedded", p / "o"),
        SettingsError,
        r"source\.root: .*x is missing or of another kind; expected a folder",
    ),
    (
        lambda s, p: satdifuser.extract(SOURCE, p / "x", p / "o"),
        SettingsError,
        r"backbone\.model: no folder .*x; expected 'embedded', a diffusers folder or a hub id",
    ),
    (
        lambda s, p: satdifuser.extract(SOURCE, BACKBONE, s.path, extract=EXTRACT | {"timesteps": [21]}),
        StoreError,
        r"made with other settings:\n  timesteps: \[21, 61\], asked for \[21\]",
    ),
    (lambda s, p: satdifuser.fit(p / "x.zarr"), StoreError, r"x\.zarr: no such store"),
    (
        lambda s, p: satdifuser.fit(s, "globl"),
        SettingsError,
        r"fit\.fusion.* = 'globl': expected .*'global', ",
    ),
    (lambda s, p: satdifuser.fit(s, epoch=3), SettingsError, r"fit\.epoch = 3: unknown .* epochs"),
    (lambda s, p: satdifuser.fit(s, seeds=[0, 1]), SettingsError, r"got seeds, .* pass seed, e\.g\. seed=1"),
    (
        lambda s, p: satdifuser.fit(s, "single", epochs=1),
        SettingsError,
        "one call makes one run, but this asks for several: single-t21-attn1-seed0, single-t61-attn1-seed0",
    ),
    (
        lambda s, p: satdifuser.fit(s, lr=[0.1, 0.2]),
        SettingsError,
        r"asks for several: global-lr0\.1-seed0, global-lr0\.2-seed0",
    ),
    (lambda s, p: satdifuser.fit(s, timesteps=[22]), SettingsError, r"timestep 22 is not in .*it holds"),
    (lambda s, p: satdifuser.fit(s, layers=["up*.attn"]), SettingsError, r"layer 'up\*\.attn' is not in"),
    (lambda s, p: satdifuser.fit(s, evaluate={"splt": 1}), SettingsError, r"evaluate\.splt = 1: unknown"),
    (lambda s, p: satdifuser.fit(s, task="segmentation"), SettingsError, r"fit\.task: got segmentation"),
    (lambda s, p: s.pooled(timestep=5), SettingsError, r"timestep 5 is not in .*; it holds \[21, 61\]"),
    (lambda s, p: s.pooled(layer="attn"), SettingsError, r"layer 'attn' is not in "),
    (lambda s, p: list(s.batches(batch_size=0)), SettingsError, "batch_size: got 0, expected 1 or more"),
    (
        lambda s, p: satdifuser.extract(
            SOURCE, BACKBONE, p / "o", extract={"noising": "inversion", "steps": 2000}
        ),
        SettingsError,
        r"extract\.steps: got 2000, expected at most 1000, the noise levels of the scheduler",
    ),
    (lambda s, p: list(s.batches(split="tst")), SettingsError, "split 'tst': expected one of none, "),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_input_is_explained(
    store: FeatureStore,
    tmp_path: Path,
    call: Callable[[FeatureStore, Path], Any],
    kind: type[SatDiFuserError],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        call(store, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_of_other_settings_is_refused(store: FeatureStore, run: Run) -> None:
    with pytest.raises(
        RunError, match=r"holds a run of other settings:\n  settings\.epochs: run has 1, asked"
    ):
        satdifuser.fit(store, **{**FIT, "epochs": 2})


def help_text(thing: Any) -> str:
    return pydoc.render_doc(thing, renderer=pydoc.plaintext)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_teaches(verb: str) -> None:
    text = help_text(getattr(satdifuser, verb))
    for part in ("Args:", "Returns:", "Raises:", "Example::", f"satdifuser.{verb}("):
        assert part in text
    for argument in inspect.signature(getattr(satdifuser, verb)).parameters:
        assert re.search(rf"^ +\**{argument}: \S", text, re.MULTILINE), argument


def test_help_of_the_package_shows_the_way() -> None:
    assert set(VERBS) == set(satdifuser.__all__)
    text = help_text(satdifuser)
    for verb in VERBS:
        assert f"satdifuser.{verb}(" in text


@pytest.mark.parametrize("kind", [FeatureStore, Batch, Run])
def test_everything_that_verbs_return_has_help(kind: type) -> None:
    public = [(name, getattr(kind, name)) for name in dir(kind) if not name.startswith("_")]
    assert [name for name, thing in public if not inspect.getdoc(thing)] == []


def test_extract_is_called_as_a_function() -> None:
    parameters = inspect.signature(satdifuser.extract).parameters
    assert list(parameters)[:3] == ["source", "backbone", "out"]
    assert callable(satdifuser.extract)


def test_importing_is_quick_and_loads_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import satdifuser, sys; "
        "print({'torch', 'diffusers', 'zarr', 'xarray', 'numpy', 'pandas', 'pydantic'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert printed == "set()\n"
