"""`satdifuser label`: a complete store gets labels and splits, and its features stay as they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, refuse, succeed
from made_up_scene import SIDE, box, point, scene_row, scene_store, write_scene, write_vectors

import satdifuser
from satdifuser.errors import StoreError
from satdifuser.labels import relabel
from satdifuser.store import files
from satdifuser.store.copy import copy_store, merge_stores
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.verify import verify
from satdifuser.store.writer import StoreWriter

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(str(scene_store(tmp_path_factory.mktemp("template") / "s.zarr").path))


@pytest.fixture
def store(template: Path, tmp_path: Path) -> FeatureStore:
    """16 tiles of 8 px, 4 x 4, without labels."""
    shutil.copytree(template, tmp_path / "s.zarr")
    return FeatureStore(tmp_path / "s.zarr")


@pytest.fixture
def fields(tmp_path: Path) -> Path:
    """The upper half of the scene is water but for its last 8 columns, a parcel below is forest."""
    shapes = [box(0, 0, 16, 24), box(18, 2, 4, 4)]
    return write_vectors(tmp_path / "fields.gpkg", shapes, ["water", "forest"], "EPSG:4326")


def label(store: FeatureStore, labels: Path, *settings: str) -> tuple[FeatureStore, str]:
    """Label a store; what it is then, and what was told."""
    words = [word for setting in settings for word in ("--set", f"label.{setting}")]
    result = call("label", store.path, labels, *words)
    assert result.exit_code == 0, result.output
    return open_store(store.path), result.stderr


def files_under(path: Path, part: str) -> dict[str, int]:
    found = [f for f in (path / part).rglob("*") if f.is_file() and f.name != "zarr.json"]
    assert found
    return {str(f.relative_to(path)): f.stat().st_ino for f in found}


def test_labels_come_after_the_extraction(store: FeatureStore, fields: Path) -> None:
    before, digest = files_under(Path(str(store.path)), "features"), store.content_digest()
    labelled, told = label(store, fields)
    a = labelled.attributes
    assert (a.task, a.classes, a.partitions) == ("segmentation", ["forest", "water"], ["default"])
    masks = labelled.targets(np.arange(16))
    assert masks is not None
    assert (masks[:3] == 1).all()
    assert (masks[3] == 255).all()
    assert np.argwhere(masks[8] == 0).tolist() == [[r, c] for r in range(2, 6) for c in range(2, 6)]
    assert "2 of 2 features lie on tiles" in told
    assert "7 of 16 tiles are labelled; labelled pixels: forest 16, water 384" in told
    splits = labelled.splits()
    assert (splits[[0, 1, 2, 4, 5, 6, 8]] != "none").all()
    assert (splits == "none").sum() == 9
    assert labelled.content_digest() == digest
    assert files_under(Path(str(store.path)), "features") == before  # the very files, by their inodes
    assert verify(labelled, deep=True) == []
    assert a.labelled["file"] == str(fields)
    assert not [p for p in fields.parent.iterdir() if p.name.startswith(".")]


def test_the_card_tells_the_new_labels_unless_people_edited_it(store: FeatureStore, fields: Path) -> None:
    card = store.folder / "README.md"
    label(store, fields)
    text = card.read_text()
    assert text.startswith("# s.zarr: diffusion features")
    assert "targets: segmentation: forest, water" in text
    assert ".labelling" not in text
    moved = FeatureStore(store.folder.rename(store.folder.with_name("moved.zarr")))
    label(moved, write_vectors(fields.with_name("b.gpkg"), [box(0, 0, 9, 9)], ["rice"], "EPSG:4326"))
    text = moved.folder.joinpath("README.md").read_text()
    assert text.startswith("# moved.zarr: diffusion features")
    assert "targets: segmentation: rice (of b.gpkg)" in text
    for edited in (b"ours", "für uns\r\n".encode("latin-1"), b"long" * 2**20):
        moved.folder.joinpath("README.md").write_bytes(edited)
        label(moved, fields)
        assert moved.folder.joinpath("README.md").read_bytes() == edited


def test_a_labelled_copy_that_lost_all_shards_keeps_its_labels(
    store: FeatureStore, fields: Path, tmp_path: Path
) -> None:
    words = ("store", "copy", store.path, "-o", tmp_path / "c.zarr")
    succeed(*words)
    labelled, _ = label(FeatureStore(tmp_path / "c.zarr"), fields)
    assert labelled.attributes.made_by == "`satdifuser extract`"
    for shard in range(labelled.attributes.shards):
        (labelled.folder / f"commits/c/{shard}").unlink()
    told = refuse(*words)
    assert "this store was made with other settings" in told
    assert open_store(labelled.path).attributes.labelled["file"] == str(fields)


def test_a_store_without_a_backbone_is_fitted_after_labelling(store: FeatureStore, fields: Path) -> None:
    label(store, fields)
    words = ("--set", "fit.epochs=1", "--set", "fit.fusion=[global]", "--set", "evaluate.baselines=false")
    told = succeed("fit", store.path, *words, "-o", fields.parent / "runs", "--set", "fit.batch_size=2")
    assert "global" in told


def test_pixels_without_data_stay_unlabelled(
    tmp_path: Path, fields: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = np.ones((SIDE, SIDE), bool)
    valid[:, :3] = False
    monkeypatch.setattr("made_up_scene.scene_row", lambda r, c: scene_row(r, c, valid=valid))
    labelled, _ = label(scene_store(tmp_path / "s.zarr"), fields)
    masks = labelled.targets(np.arange(16))
    assert masks is not None
    assert (masks[0][:, :3] == 255).all()
    assert (masks[0][:, 3:] == 1).all()


def test_skipped_tiles_and_those_without_a_place_stay_unlabelled(
    tmp_path: Path, fields: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(r: int, c: int) -> Any:
        return scene_row(
            r, c, **{(0, 0): {"crs": ""}, (0, 8): {"valid": np.zeros((8, 8), bool)}}.get((r, c), {})
        )

    monkeypatch.setattr("made_up_scene.scene_row", row)
    labelled, told = label(scene_store(tmp_path / "s.zarr"), fields)
    assert "5 of 16 tiles are labelled" in told
    assert labelled.splits()[:2].tolist() == ["none", "none"]


def test_tiles_get_classes_by_majority_or_by_what_they_contain(store: FeatureStore, tmp_path: Path) -> None:
    shapes = [box(0, 0, 8, 5), box(0, 5, 8, 3), box(0, 8, 2, 8), box(8, 0, 2, 2), box(12, 4, 2, 2)]
    path = write_vectors(tmp_path / "a.geojson", shapes, ["a", "b", "b", "a", "b"], "EPSG:4326")
    shares = "split={train: 1, val: 0, test: 0}"
    labelled, _ = label(store, path, "per_tile=majority", shares)
    assert (labelled.attributes.task, labelled.targets(np.arange(5)).tolist()) == (  # type: ignore[union-attr]
        "classification",
        [0, -1, -1, -1, -1],
    )
    labelled, _ = label(store, path, "per_tile=containing", shares)
    assert labelled.targets(np.arange(5)).tolist() == [0, 1, -1, -1, -1]  # type: ignore[union-attr]
    points = write_vectors(tmp_path / "p.gpkg", [point(0, 0), point(1, 1), point(20, 20)], [7, 7, 8])
    labelled, told = label(store, points, "per_tile=containing", shares)
    assert labelled.attributes.classes == ["7", "8"]
    assert labelled.targets(np.array([0, 10])).tolist() == [0, 1]  # type: ignore[union-attr]
    assert "2 of 16 tiles are labelled" in told
    told = refuse("label", store.path, points, "--set", "label.per_tile=majority")
    assert "no class has in one what label.per_tile: majority asks for; set it to containing" in told


def test_a_raster_labels_too(store: FeatureStore, tmp_path: Path) -> None:
    ids = np.full((1, 32, 32), 9, np.uint8)
    ids[0, :16] = 1
    path = write_scene(tmp_path / "l.tif", ids, nodata=9)
    told = refuse("label", store.path, path)
    assert "l.tif: a label raster needs a class list; name a JSON file with" in told
    (tmp_path / "c.json").write_text('{"classes": [{"id": 0, "name": "sea"}, {"id": 1, "name": "land"}]}')
    labelled, told = label(store, path, f"classes={tmp_path / 'c.json'}")
    masks = labelled.targets(np.arange(16))
    assert masks is not None
    assert ((masks[:8] == 1).all(), (masks[8:] == 255).all()) == (True, True)
    assert "8 of 16 tiles are labelled; labelled pixels: sea 0, land 512" in told


def test_splits_of_the_ground_become_partitions(tmp_path: Path) -> None:
    store = scene_store(tmp_path / "s.zarr", 8, 8, tiles_per_shard=64)
    path = write_vectors(tmp_path / "a.gpkg", [box(0, 0, 64, 64)], ["x"])
    labelled, told = label(store, path, "split={kind: spatial_blocks, size_m: 160, buffer_m: 50}")
    assert (labelled.attributes.partition, labelled.partitions()) == ("spatial_blocks", ["spatial_blocks"])
    assert "partition spatial_blocks: " in told
    assert "tiles are in no split" in told
    labelled, _ = label(store, path, "split={kind: spatial_folds, size_m: 160, folds: 3}")
    assert labelled.partitions() == ["fold_0", "fold_1", "fold_2"]
    assert labelled.attributes.partition == "fold_0"
    tested = sum((labelled.splits(f"fold_{i}") == "test").astype(int) for i in range(3))
    assert (tested == 1).all()
    kept, _ = label(store, path, "split=keep")
    assert kept.partitions() == ["fold_0", "fold_1", "fold_2"]


def test_a_random_split_of_overlapping_tiles_is_warned_of(tmp_path: Path) -> None:
    store = scene_store(tmp_path / "s.zarr", 6, 6, step=4, tiles_per_shard=36)
    path = write_vectors(tmp_path / "a.gpkg", [box(0, 0, 64, 64)], ["x"])
    _, told = label(store, path)
    assert "warning: " in told
    assert "train tiles overlap a tile of val or test" in told
    _, told = label(store, path, "split={kind: spatial_blocks, size_m: 80}")
    assert "warning" not in told


def test_from_python(store: FeatureStore, fields: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labelled = satdifuser.label(store, fields, split={"train": 0.5, "val": 0.5, "test": 0})
    assert labelled.attributes.classes == ["forest", "water"]
    assert "7 of 16 tiles are labelled" in capsys.readouterr().err
    assert set(labelled.splits()) == {"train", "val", "none"}


def test_relabelling_changes_the_labels_hash_only(store: FeatureStore, fields: Path) -> None:
    first, _ = label(store, fields)
    hashes = first.hashes()
    second, _ = label(store, fields, "touch=all", "overlaps=last")
    again = second.hashes()
    assert (again.feature, again.contents) == (hashes.feature, hashes.contents)
    assert again.labels != hashes.labels
    third, _ = label(store, fields)
    assert third.hashes() == hashes


def test_a_labelled_store_is_copied_and_joined(store: FeatureStore, fields: Path, tmp_path: Path) -> None:
    labelled, _ = label(store, fields)
    north = copy_store(labelled, tmp_path / "n.zarr", tiles="s/[08]_*")
    south = copy_store(labelled, tmp_path / "z.zarr", tiles="s/[12]?_*")
    joined = merge_stores(north, south, tmp_path / "j.zarr")
    assert joined.hashes().labels == labelled.hashes().labels
    assert joined.attributes.labelled == labelled.attributes.labelled
    np.testing.assert_array_equal(joined.targets(np.arange(16)), labelled.targets(np.arange(16)))


# --- what goes wrong


def test_labels_that_miss_are_refused_and_nothing_changes(store: FeatureStore, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "far.gpkg", [box(5000, 5000, 9, 9)], ["x"], "EPSG:4326")
    before = store.attributes
    told = refuse("label", store.path, path)
    assert "far.gpkg: labels nothing here: in its own EPSG:4326 it lies at (9.6" in told
    assert "what it should label in EPSG:32632 at (500000, 4999680, 500320, 5000000)" in told
    assert open_store(store.path).attributes == before


def test_a_split_that_stays_empty_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    path = write_vectors(tmp_path / "a.gpkg", [box(0, 0, 2, 2)], ["x"])
    told = refuse("label", store.path, path)
    assert "label.split: no tile in val, test, for only 1 tiles are labelled; label more" in told
    before = store.splits().tolist()
    labelled, _ = label(store, path, "split=keep")
    assert labelled.splits().tolist() == before


def test_settings_are_checked(store: FeatureStore, fields: Path) -> None:
    told = refuse("label", store.path, fields, "--set", "label.touch=some", "--set", "label.colunm=x")
    assert "label.touch = 'some': expected 'centre' or 'all'" in told
    assert "label.colunm = 'x': unknown setting; did you mean column" in told
    assert (
        refuse("label", store.path, fields, "--set", "label.split={kind: block, size_m: 3}").count("expected")
        == 1
    )
    told = refuse("label", "s3://bucket/x.zarr", fields)
    assert "s3://bucket/x.zarr: only a store in a local folder can be labelled" in told


def test_an_incomplete_store_is_refused(store: FeatureStore, tmp_path: Path, fields: Path) -> None:
    (tmp_path / "s.zarr/commits/c/1").unlink()
    told = refuse("label", store.path, fields)
    assert "1 of 3 shards are missing" in told


def test_a_store_without_places_is_refused(
    tmp_path: Path, fields: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("made_up_scene.scene_row", lambda r, c: scene_row(r, c, crs=""))
    told = refuse("label", scene_store(tmp_path / "s.zarr").path, fields)
    assert "the tiles have no place on the ground; their labels can only come with the images" in told


def test_an_interruption_leaves_the_old_store(
    store: FeatureStore, fields: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt, calls = StoreWriter.adopt_shard, []

    def interrupt(*rest: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        adopt(*rest)

    monkeypatch.setattr(StoreWriter, "adopt_shard", interrupt)
    before = store.attributes
    assert call("label", store.path, fields).exit_code == 130
    assert open_store(store.path).attributes == before
    assert not list(fields.parent.glob(".*labelling"))
    labelled, _ = label(store, fields)
    assert labelled.attributes.task == "segmentation"


def test_an_interruption_between_two_renames_is_ended(
    store: FeatureStore, fields: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old store is gone, the new one has not its name yet: then the new one must stay."""

    def cut_off(new: Path, path: Path) -> None:
        files.discard(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(relabel, "take_place", cut_off)
    digest = store.content_digest()
    assert call("label", store.path, fields).exit_code == 130
    with pytest.raises(StoreError, match="no such store"):
        open_store(store.path)
    monkeypatch.undo()
    labelled, _ = label(store, fields)
    assert labelled.content_digest() == digest


def test_without_hard_links_files_are_copied(
    store: FeatureStore, fields: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_links(*rest: Any, **more: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse_links)
    before = files_under(Path(str(store.path)), "features")
    labelled, _ = label(store, fields)
    after = files_under(Path(str(store.path)), "features")
    assert after.keys() == before.keys()
    assert after != before
    assert verify(labelled, deep=True) == []


def test_a_copy_by_the_file_system_shares_nothing_that_changes(
    store: FeatureStore, fields: Path, tmp_path: Path
) -> None:
    """Two stores that share files by hard links: mending or relabelling one leaves the other whole."""
    shutil.copytree(Path(str(store.path)), tmp_path / "other.zarr", copy_function=os.link)
    label(store, fields)
    other = open_store(tmp_path / "other.zarr")
    assert verify(other, deep=True) == []
    assert other.attributes.task is None
