"""A store that grows by timesteps, layers or tiles against one that was extracted so at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import call, refuse, succeed
from made_up import diffusionsat, image_folder

from satdifuser.extract import grow_shards
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

STEPS, LAYERS = [21, 161], ["up_blocks.*.conv2"]
MORE_STEPS, MORE_LAYERS = [21, 61, 161, 301], ["up_blocks.*.conv2", "down_blocks.*.attn1"]
SPLITS = ["train", "val", "test"]
CLASSES = {"field": 6, "water": 5}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return diffusionsat(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make(backbone: Path, tmp_path: Path) -> Callable[..., FeatureStore]:
    """Extracts with some timesteps and layers, from the images in a folder."""
    image_folder(tmp_path / "images", CLASSES)

    def extract(
        name: str, steps: list[int] = STEPS, layers: list[str] = LAYERS, **store: Any
    ) -> FeatureStore:
        settings = {
            "source": {"kind": "folder", "root": str(tmp_path / "images")},
            "backbone": {"model": str(backbone), "device": "cpu"},
            "extract": {"timesteps": steps, "layers": layers, "batch_size": 2, "threads": 1},
            "store": {"tiles_per_shard": 4, "encoding": "float32", **store},
        }
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        succeed("extract", "-c", config, "-o", tmp_path / name)
        return open_store(tmp_path / name)

    return extract


def assert_same(grown: FeatureStore, fresh: FeatureStore) -> None:
    """Equal but for the last bits, which depend on how many timesteps share a pass."""
    ours, theirs = grown.attributes, fresh.attributes
    for name in ("tiles", "timesteps", "layers", "planned", "classes", "partitions", "tile_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert grown.hashes() == fresh.hashes()
    assert verify(grown, deep=True) == []
    rows = np.arange(ours.tiles)
    found, expected = grown.decode(grown.stored(rows)), fresh.decode(fresh.stored(rows))
    for group, maps in expected.items():
        np.testing.assert_allclose(found[group], maps, rtol=0, atol=1e-5 * np.nanmax(np.abs(maps)))
        np.testing.assert_allclose(
            grown.pooled_group(group, rows), fresh.pooled_group(group, rows), atol=1e-5
        )
    columns = [name for name in fresh.tiles.columns if name not in ("digest", "file_state")]
    assert grown.tiles[columns].equals(fresh.tiles[columns])


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.parametrize("steps", [STEPS, MORE_STEPS])
@pytest.mark.parametrize("layers", [LAYERS, MORE_LAYERS])
def test_timesteps_and_layers_are_added(
    make: Callable[..., FeatureStore], tmp_path: Path, latents: bool, steps: list[int], layers: list[str]
) -> None:
    before = make("a.zarr", latents=latents)
    (before.folder / "README.md").write_text("ours")
    if latents:
        shutil.rmtree(tmp_path / "images")
    words = ["--add-timesteps", ",".join(map(str, steps)), "--add-layers", ",".join(layers)]
    succeed("extract", "-o", before.path, *words)
    grown = open_store(before.path)
    assert grown.card() == "ours"
    if latents:
        image_folder(tmp_path / "images", CLASSES)
    assert_same(grown, make("fresh.zarr", steps, layers, latents=latents))
    everything = np.arange(before.attributes.tiles)
    kept = grown.stored(everything, grown.selection(STEPS, LAYERS))
    fresh = make("same.zarr", latents=latents)
    for group, arrays in fresh.stored(everything).items():
        np.testing.assert_array_equal(kept[group]["values"], arrays["values"])  # taken over as they were
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("encoding", ["int8", "int4", "reduced"])
def test_scales_come_along(make: Callable[..., FeatureStore], encoding: str) -> None:
    before = make("a.zarr", encoding=encoding)
    succeed("extract", "-o", before.path, "--add-timesteps", "61")
    fresh = make("fresh.zarr", [21, 61, 161], encoding=encoding)
    grown, rows = open_store(before.path), np.arange(11)
    assert grown.hashes() == fresh.hashes()
    for group, arrays in fresh.stored(rows).items():
        for name, expected in arrays.items():
            found = grown.stored(rows)[group][name].astype(float)
            step = 1 if name == "values" and encoding != "int4" else 17 if name == "values" else 1e-5
            assert np.abs(found - expected).max() <= step


def test_a_store_behind_a_link_grows_in_its_place(make: Callable[..., FeatureStore], tmp_path: Path) -> None:
    before, link = make("a.zarr"), tmp_path / "link.zarr"
    link.symlink_to(before.path)
    succeed("extract", "-o", link, "--add-timesteps", "61")
    assert link.is_symlink()
    assert open_store(before.path).attributes.timesteps == [21, 61, 161]
    assert "link.zarr" not in str(open_store(before.path).card())
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_tiles_are_added(make: Callable[..., FeatureStore], tmp_path: Path) -> None:
    before = make("a.zarr")
    image_folder(tmp_path / "images", {"field": 9, "water": 6})
    told = refuse("extract", "-c", tmp_path / "a.zarr.yaml", "-o", before.path)
    assert "--add-tiles" in told
    succeed("extract", "-o", before.path, "--add-tiles", "--add-timesteps", "61")
    grown = open_store(before.path)
    assert grown.attributes.tiles == 15
    assert_same(grown, make("fresh.zarr", [21, 61, 161]))


def test_a_growth_goes_on_where_it_was_cut_off(
    make: Callable[..., FeatureStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = make("a.zarr"), []
    digest, words = before.content_digest(), ("extract", "-o", before.path, "--add-timesteps", "61")
    launch = grow_shards.launch_latents

    def interrupt(*rest: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return launch(*rest, **named)

    monkeypatch.setattr(grow_shards, "launch_latents", interrupt)
    result = call(*words)
    assert (result.exit_code, open_store(before.path).content_digest()) == (130, digest)
    other = refuse("extract", "-o", before.path, "--add-timesteps", "301")
    assert "timesteps: [21, 61, 161], asked for [21, 161, 301]" in other
    succeed(*words)
    assert len(calls) == 3 + 4  # batches: two of the first shard once, the third anew, and the other three
    assert_same(open_store(before.path), make("fresh.zarr", [21, 61, 161]))


def test_a_growth_cut_off_between_two_renames_is_ended(
    make: Callable[..., FeatureStore], tmp_path: Path
) -> None:
    before = make("a.zarr", [21, 61, 161])
    digest = before.content_digest()
    before.path.rename(tmp_path / ".a.zarr.growing")
    succeed("extract", "-c", tmp_path / "a.zarr.yaml", "-o", tmp_path / "a.zarr", "--add-timesteps", "61")
    assert open_store(tmp_path / "a.zarr").content_digest() == digest


def test_images_that_changed_are_refused(make: Callable[..., FeatureStore], tmp_path: Path) -> None:
    before = make("a.zarr", latents=False)
    first = before.tiles.iloc[0]
    image_folder(tmp_path / "images", CLASSES, seed=1)
    told = refuse("extract", "-o", before.path, "--add-timesteps", "61")
    assert (
        f"tile {first.tile_id}: its image {first.path} is not the one that its features were made of" in told
    )
    shutil.rmtree(tmp_path / "images/water")
    told = refuse("extract", "-o", before.path, "--add-timesteps", "61")
    assert "(5 in all) is not in the source any more, which has 6 tiles" in told


def test_other_settings_and_classes_are_refused(make: Callable[..., FeatureStore], tmp_path: Path) -> None:
    before = make("a.zarr")
    told = refuse("extract", "-o", before.path, "--add-timesteps", "61", "--set", "extract.seed=3")
    assert (
        "a.zarr: cannot grow, for it was made with other settings:\n  seed: store has 0, asked for 3" in told
    )
    words = ("--add-tiles", "--set", "source.tile_size=24", "--set", "source.pad=true")
    told = refuse("extract", "-o", before.path, *words)
    assert "holds tiles of 16 x 16 px, but the source's are 24 x 24; set source.tile_size" in told
    assert "'x' matches none" in refuse("extract", "-o", before.path, "--add-layers", "x")
    assert "--add-timesteps: got '6x'" in refuse("extract", "-o", before.path, "--add-timesteps", "6x")
    assert "-o: missing; name the store that is to grow" in refuse("extract", "--add-tiles")


def test_a_disk_too_small_is_refused(
    make: Callable[..., FeatureStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make("a.zarr")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10**6))  # type: ignore[attr-defined]
    told = refuse("extract", "-o", before.path, "--add-timesteps", "61")
    assert "beside the old one, which is deleted only then; 1.0 MB are free" in told
    succeed("extract", "-o", before.path, "--add-timesteps", "61", "--ignore-free-space")


def test_labels_and_partitions_are_taken_anew(make: Callable[..., FeatureStore], tmp_path: Path) -> None:
    before = make("a.zarr")
    digest = before.content_digest()
    (tmp_path / "images/water").rename(tmp_path / "images/lake")
    told = refuse("extract", "-o", before.path, "--relabel")
    assert "is not in the source any more" in told  # a tile's id holds its folder
    (tmp_path / "images/lake").rename(tmp_path / "images/water")
    ids = before.tiles.tile_id
    lines = [f"{name}.png,{name.split('/')[0]},{SPLITS[i % 3]}" for i, name in enumerate(ids)]
    (tmp_path / "images/splits.csv").write_text("\n".join(["path,label,split", *lines, ""]))
    succeed("extract", "-o", before.path, "--relabel")
    grown = open_store(before.path)
    assert grown.content_digest() == digest
    assert grown.tiles.split.tolist() == [SPLITS[i % 3] for i in range(11)]
    assert_same(grown, make("fresh.zarr"))
