"""The feature store: round trips, reading by other tools, resuming and refusals."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from made_up import store_attributes
from numpy.typing import NDArray

from satdifuser.errors import SettingsError, StoreError
from satdifuser.store import files
from satdifuser.store.encoding import FORMS, decode, encode
from satdifuser.store.metadata import seal
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.schema import (
    Attributes,
    Hashes,
    LayerInfo,
    group_layers,
    kept_layers,
)
from satdifuser.store.settings import StoreSettings
from satdifuser.store.summary import describe_store, format_store
from satdifuser.store.verify import verify
from satdifuser.store.writer import StoreWriter, TileRow

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")  # but one test checks that it is asked for

LAYERS = [
    LayerInfo(name=f"up.{i}.attn1", channels=c, stride=s, height=16 // s, width=16 // s)
    for i, (c, s) in enumerate([(4, 8), (4, 8), (2, 4), (3, 4)])
]
TILES, SKIPPED, STEPS = 5, 3, [1, 101]
KEPT = np.array([0, 1, 2, 4])
IDENTITY: dict[str, Any] = {"backbone": {"model": "a"}, "steps": 50}


def attributes(**changes: Any) -> Attributes:
    fields: dict[str, Any] = {
        "task": "classification",
        "classes": ["sea", "land"],
        "tiles": TILES,
        "tile_size": (16, 16),
        "tiles_per_shard": 2,  # the last shard holds one tile
        "timesteps": STEPS,
        "layers": LAYERS,
        "encoding": "int8",
        "previews": True,
        "colour_statistics": ["mean"],
        "feature_identity": IDENTITY,
        "settings": {},
    }
    return store_attributes(**fields | changes)


def tile_maps(tile: int) -> dict[str, NDArray[np.float32]]:
    """Group name to (1, T, L, C, H, W), the same for a tile wherever it lies."""
    random = np.random.default_rng(tile)
    return {
        name: random.normal(
            size=(1, len(STEPS), len(held), LAYERS[held[0]].channels, *[LAYERS[held[0]].height] * 2)
        ).astype(np.float32)
        for name, held in group_layers(LAYERS).items()
    }


def tile_row(tile: int, task: str | None) -> TileRow:
    target = {
        "classification": np.array(tile % 2, np.int32),
        "multilabel": None if tile == 0 else np.array([tile % 2, 1], np.uint8),
        "segmentation": np.full((16, 16), tile, np.uint8),
        None: None,
    }[task]
    return TileRow(
        f"t{tile}",
        "train" if tile < 3 else "val",
        skip_reason="all nan" if tile == SKIPPED else "",
        colour=np.array([tile], np.float32),
        target=target,
        preview=np.full((16, 16, 3), tile + 1, np.uint8),
        bounds=(tile, 0, tile + 1, 1),
        partitions={"few": "train" if tile in (0, SKIPPED) else "none"},
    )


def encode_group(maps: NDArray[np.float32], a: Attributes) -> dict[str, NDArray[np.generic]]:
    return encode(maps, a.encoding, pool=2 if a.encoding == "reduced" else 1)


def fill(writer: StoreWriter, shards: list[int] | None = None) -> None:
    a = writer.attributes
    for shard in writer.missing_shards() if shards is None else shards:
        tiles = range(*a.shard_range(shard))
        batches = [
            {group: encode_group(maps, a) for group, maps in tile_maps(tile).items()}
            for tile in tiles
            if tile != SKIPPED
        ]
        assert writer.write_shard(shard, [tile_row(t, a.task) for t in tiles], batches, {"note": "n"}) > 0


def build(path: Path, shards: list[int] | None = None, **changes: Any) -> FeatureStore:
    fill(open_or_create(path, attributes(**changes), overwrite=False), shards)
    return open_store(path)


@pytest.fixture(scope="module", params=FORMS)
def any_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    layers = kept_layers(LAYERS, StoreSettings(encoding=request.param))
    return build(tmp_path_factory.mktemp("any") / "s.zarr", encoding=request.param, layers=layers)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return build(tmp_path_factory.mktemp("whole") / "s.zarr")


@pytest.fixture
def copy(whole: FeatureStore, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole.path, tmp_path / "copy.zarr"))


@pytest.fixture
def partial(tmp_path: Path) -> FeatureStore:
    return build(tmp_path / "partial.zarr", shards=[0])


def edit_attributes(path: Path, **changes: Any) -> None:
    file = path / "zarr.json"
    metadata = json.loads(file.read_bytes())
    metadata["attributes"]["satdifuser"].update(changes)
    file.write_text(json.dumps(metadata))
    seal(path)


# --- round trip


def test_what_was_written_is_read(any_store: FeatureStore) -> None:
    rows = KEPT[::-1]
    for name, maps in any_store.maps(rows).items():
        expected = [encode_group(tile_maps(int(t))[name], any_store.attributes) for t in rows]
        for found, one in zip(maps, expected, strict=True):
            np.testing.assert_array_equal(found, decode(one, found.shape[-1])[0])
    assert any_store.split_counts() == {"train": 3, "val": 1, "skipped": 1}
    assert any_store.colour(rows)[:, 0].tolist() == [4, 2, 1, 0]
    assert any_store.previews(rows)[:, 0, 0, 0].tolist() == [5, 3, 2, 1]
    targets = any_store.targets(rows)
    assert targets is not None
    assert targets.tolist() == [0, 0, 1, 0]
    assert any_store.tiles.tile_id.tolist() == [f"t{i}" for i in range(TILES)]
    assert any_store.tiles.left.tolist() == list(range(TILES))
    assert verify(any_store, deep=True) == []
    stored = any_store.stored(np.array([0])).values()
    held = sum(array.nbytes for arrays in stored for array in arrays.values())
    assert held == any_store.stored_bytes_per_tile()


def test_masks_and_stores_without_targets(tmp_path: Path) -> None:
    masks = build(tmp_path / "m.zarr", task="segmentation").targets(np.array([2, 0]))
    assert masks is not None
    assert (masks.shape, masks[:, 3, 3].tolist()) == ((2, 16, 16), [2, 0])
    bare = build(tmp_path / "b.zarr", task=None, classes=[], previews=False)
    assert bare.targets(KEPT) is None
    assert verify(bare, deep=True) == []
    with pytest.raises(StoreError, match=r"holds no previews; extract with store.previews: true"):
        bare.previews(KEPT)


def test_several_classes_per_tile(tmp_path: Path) -> None:
    store = build(tmp_path / "s.zarr", task="multilabel")
    targets = store.targets(np.array([2, 0, 1]))
    assert targets is not None
    assert (targets.dtype, targets.tolist()) == (np.uint8, [[0, 1], [255, 255], [1, 1]])
    assert store.tiles.labels.tolist() == ["", "sea;land", "land", "sea;land", "land"]
    assert store.to_xarray()["targets/labels"].dims == ("tile", "class")
    assert verify(store, deep=True) == []


def test_every_partition_is_kept_and_the_one_in_use_is_the_default(tmp_path: Path) -> None:
    several = {"partition": "few", "partitions": ["default", "few"]}
    store = build(tmp_path / "s.zarr", **several)
    assert (store.choose_partition(), store.partitions()) == ("few", ["default", "few"])
    assert (store.select("train").tolist(), store.select("train", "default").tolist()) == ([0], [0, 1, 2])
    assert store.tiles.split.tolist() == ["train", "none", "none", "train", "none"]
    assert store.split_counts() == {"none": 3, "train": 1, "skipped": 1}
    assert store.splits_text("default") == "3 train, 1 val, 1 skipped"
    assert "(1 train, 3 none" not in repr(store)
    facts = describe_store(store)
    assert (facts["partition"], facts["splits"]) == ("few", facts["partitions"]["few"])
    with pytest.raises(SettingsError, match="no partition 'fewer'; it holds default, few; did you mean few"):
        store.splits("fewer")
    one = build(tmp_path / "one.zarr")
    assert (one.choose_partition(), one.partitions()) == ("default", ["default"])
    assert one.hashes().labels != store.hashes().labels


def test_pooled_features_are_exact_means_with_their_layer_and_timestep(whole: FeatureStore) -> None:
    table = whole.pooled(101, "up.[13]*", split="train")
    assert table.shape == (3, 4 + 3)
    assert table.layer.values.tolist() == ["up.1.attn1"] * 4 + ["up.3.attn1"] * 3
    assert set(table.timestep.values.tolist()) == {101}
    expected = tile_maps(2)["stride_08"][0, 1, 1].astype(np.float64).mean((-2, -1))
    np.testing.assert_array_equal(table.values[2, :4], expected.astype(np.float32))
    assert whole.pooled().shape == (4, 2 * 13)


def test_a_skipped_tile_is_not_selected_and_holds_nan(any_store: FeatureStore) -> None:
    assert any_store.select().tolist() == KEPT.tolist()
    assert any_store.select("val").tolist() == [4]
    assert any_store.tiles.digest[SKIPPED] == ""
    for group in any_store.groups:
        assert np.isnan(any_store.pooled_group(group, np.array([SKIPPED]))).all()
        assert np.isnan(any_store.maps(np.array([SKIPPED]))[group]).all()


def test_the_digest_of_contents_does_not_depend_on_shards(whole: FeatureStore, tmp_path: Path) -> None:
    digests = {build(tmp_path / f"{n}.zarr", tiles_per_shard=n).content_digest() for n in (1, 5)}
    assert digests == {whole.content_digest()}
    assert build(tmp_path / "f.zarr", encoding="float16").content_digest() not in digests


def test_batches_shuffle_by_seed_and_cover_each_tile_once(whole: FeatureStore) -> None:
    plain, first, again, other = (
        [name for batch in whole.batches(None, 3, seed) for name in batch.tile_ids]
        for seed in (None, 1, 1, 2)
    )
    assert plain == ["t0", "t1", "t2", "t4"]
    assert first == again
    assert sorted(first) == sorted(other) == plain
    assert len({tuple(plain), tuple(first), tuple(other)}) > 1
    batch = next(whole.batches("train", 2, seed=1))
    assert list(batch.features) == list(whole.groups)
    assert batch.features["stride_08"].shape == (2, 2, 2, 4, 2, 2)
    for name, maps in batch.features.items():
        np.testing.assert_array_equal(maps, whole.maps(batch.indices)[name])
    assert batch.targets is not None
    assert batch.tile_ids == [f"t{i}" for i in batch.indices]
    assert batch.targets.tolist() == [int(i) % 2 for i in batch.indices]


def test_unknown_names_are_refused(whole: FeatureStore) -> None:
    with pytest.raises(
        SettingsError, match="split 'trian': expected one of none, train, val, test; did you mean train"
    ):
        next(whole.batches("trian"))
    with pytest.raises(StoreError, match="no tile in split 'test'; the store holds 3 train, 1 val, 1 "):
        whole.select("test")
    with pytest.raises(SettingsError, match=r"layer 'up.1.atn1' is not in .*; did you mean up.1.attn1"):
        whole.pooled(1, "up.1.atn1")
    with pytest.raises(SettingsError, match=r"timestep 2 is not in .*; it holds \[1, 101\]"):
        whole.pooled(2)


def test_the_summary_tells_all(whole: FeatureStore, partial: FeatureStore) -> None:
    facts = json.loads(json.dumps(describe_store(whole)))
    assert (facts["complete"], facts["skipped"]) == (True, {"t3": "all nan"})
    assert facts["content_digest"] == whole.content_digest()
    assert facts["bytes"] == whole.size_bytes() > 0
    text = format_store(whole)
    assert "skipped    t3: all nan" in text
    assert "up.3.attn1" in text
    assert "INCOMPLETE" not in text
    assert describe_store(partial)["missing_shards"] == [1, 2]
    assert describe_store(partial)["splits"] == {"train": 2, "not yet extracted": 3}
    assert "5 of 16 x 16 px (2 train, 3 not yet extracted)" in format_store(partial)
    assert "INCOMPLETE: 2 of 3 shards are missing (3 tiles; shards 1, 2)" in format_store(partial)
    assert "none: shards are missing" in format_store(partial)


def test_tiles_that_are_not_yet_extracted_are_not_listed(tmp_path: Path) -> None:
    store = build(tmp_path / "s.zarr", shards=[1, 2])
    assert store.tiles.tile_id.to_dict() == {2: "t2", 3: "t3", 4: "t4"}  # by their rows in the arrays
    assert store.split_counts() == {"train": 1, "val": 1, "skipped": 1, "not yet extracted": 2}


def test_labels_hash_follows_labels_only(whole: FeatureStore, tmp_path: Path) -> None:
    same = build(tmp_path / "a.zarr", tiles_per_shard=1).hashes()
    other = build(tmp_path / "b.zarr", classes=["sea", "ice"]).hashes()
    assert same == whole.hashes()
    assert (other.feature, other.labels == same.labels) == (same.feature, False)


# --- other readers


def formula(group: Any) -> NDArray[np.float32]:
    """What the `decode` attribute says, with whatever array type the reader gives."""
    values = np.asarray(group["values"][...])
    if values.dtype == np.uint8:
        values = np.stack([values % 16, values // 16], axis=-1).reshape(*values.shape[:-1], -1)
    scale, offset = (
        np.asarray(group[name][...])[..., None, None] if name in group else np.float32(other)
        for name, other in (("scale", 1), ("offset", 0))
    )
    return values.astype(np.float32) * scale + offset


def test_plain_zarr_and_xarray_decode_by_the_formula(any_store: FeatureStore) -> None:
    maps = any_store.maps(np.arange(TILES))
    root = zarr.open_group(any_store.path, mode="r")
    with xr.open_datatree(any_store.path, engine="zarr", consolidated=False) as tree:
        for name in any_store.groups:
            np.testing.assert_array_equal(formula(root[f"features/{name}"]), maps[name])
            np.testing.assert_array_equal(formula(tree[f"features/{name}"]), maps[name])
            assert tree[f"features/{name}"].attrs["timesteps"] == STEPS
        x = "x_pair" if any_store.attributes.encoding == "int4" else "x"
        dims = ("tile", "timestep", "layer", "channel", "y", x)
        assert tree["features/stride_08/values"].dims == dims
        assert tree["tiles/tile_id"].values.tolist() == [f"t{i}" for i in range(TILES)]
    lazy = any_store.to_xarray()
    assert lazy["features/stride_08/values"].chunks[0] == (2, 2, 1)


def test_tensorstore_decodes_by_the_formula(any_store: FeatureStore) -> None:
    tensorstore = pytest.importorskip("tensorstore", reason="needs tensorstore")
    maps = any_store.maps(np.arange(TILES))
    for name in any_store.groups:
        group = {}
        for array in any_store.array_names():
            path = any_store.folder / f"features/{name}/{array}"
            spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
            group[array] = tensorstore.open(spec, open=True).result().read().result()
        np.testing.assert_array_equal(formula(group), maps[name])


def test_the_store_imports_no_torch() -> None:
    names = ["encoding", "files", "layout", "metadata", "reader", "schema", "settings", "shard_file"]
    names += ["sharded_array", "shards", "summary", "verify", "writer", "card", "copy", "export", "location"]
    names += ["lock", "remote", "repair"]
    code = "import sys\n" + "".join(f"import satdifuser.store.{n}\n" for n in names)
    command = [sys.executable, "-c", code + "print('torch' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


# --- resuming and refusals


def test_a_store_with_missing_shards_gives_no_features(partial: FeatureStore) -> None:
    text = r"2 of 3 shards are missing \(3 tiles; shards 1, 2\); run the same `satdifuser extract` command"
    for attempt in (
        partial.require_complete,
        partial.select,
        lambda: next(partial.batches()),
        partial.pooled,
        lambda: partial.maps(np.array([0])),
    ):
        with pytest.raises(StoreError, match=text):
            attempt()
    assert partial.content_digest() is None
    assert verify(partial, deep=True) == ["shard 1: not committed", "shard 2: not committed"]


def test_reopening_goes_on_and_removes_what_was_left(partial: FeatureStore, whole: FeatureStore) -> None:
    left = [partial.path / "tiles/path/c/1.0a.partial", partial.path / "tiles/x.__lock"]
    aside = partial.path.with_name(f".{partial.path.name}.0a.creating")
    aside.mkdir()
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert "tiles/path/c/1.0a.partial: left by an interrupted write" in verify(partial)
    writer = open_or_create(partial.path, attributes(tiles_per_shard=5), overwrite=False)
    assert not any(path.exists() for path in [*left, aside])
    assert (writer.missing_shards(), writer.attributes.tiles_per_shard) == ([1, 2], 2)
    fill(writer)
    found = open_store(partial.path)
    assert found.content_digest() == whole.content_digest()
    assert verify(found, deep=True) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"feature_identity": IDENTITY | {"steps": 20}}, "steps: store has 50, asked for 20"),
        ({"feature_identity": {"backbone": {"model": "b"}, "steps": 50}}, "backbone.model: store has 'a'"),
        ({"timesteps": [1]}, r"timesteps: \[1, 101\], asked for \[1\]"),
        ({"layers": LAYERS[:1]}, "layers: 4 layers, asked for 1 layers"),
        ({"tiles": 4}, "tiles: 5, asked for 4"),
        ({}, "the tiles' ids, splits or labels differ"),
    ],
)
def test_other_settings_are_refused_by_name(whole: FeatureStore, changes: dict[str, Any], text: str) -> None:
    planned = Hashes(feature="f", contents="c", labels="other")
    with pytest.raises(StoreError, match=rf"(?s)made with other settings:\n  {text}.*--overwrite"):
        open_or_create(whole.path, attributes(planned=planned, **changes), overwrite=False)


def test_overwrite_keeps_a_store_that_is_named_as_a_zip_file(copy: Path, tmp_path: Path) -> None:
    place = copy.rename(tmp_path / "s.zip")
    for overwrite in (True, False):
        with pytest.raises(SettingsError, match="a store is written to a folder"):
            open_or_create(place, attributes(), overwrite)
    assert open_store(place).missing_shards() == []


def test_overwrite_replaces_a_store_but_nothing_else(copy: Path, tmp_path: Path) -> None:
    assert open_or_create(copy, attributes(timesteps=[1]), overwrite=True).missing_shards() == [0, 1, 2]
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_bytes(b"a")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="exists and is not a feature store; choose another output path"):
            open_or_create(other, attributes(), overwrite)
    assert (other / "a.jpg").exists()


def test_what_is_no_store_is_refused(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(StoreError, match=r"gone\.zarr: no such store"):
        open_store(tmp_path / "gone.zarr")
    plain = tmp_path / "plain.zarr"
    zarr.create_group(plain)
    for path, text in [
        (tmp_path, r"\(no zarr.json\); if it was one, copy it anew"),
        (plain, r"\(no 'satdifuser' attributes in its zarr.json\); if it was one, copy it anew"),
    ]:
        with pytest.raises(StoreError, match=f"not a feature store {text}"):
            open_store(path)
    with pytest.raises(StoreError, match=r"zarr\.json: is a file and no feature store; expected the folder"):
        open_store(copy / "zarr.json")
    edit_attributes(copy, tiles=-1)
    with pytest.raises(StoreError, match="its attributes are damaged: tiles: Input should be greater than 0"):
        open_store(copy)
    edit_attributes(copy, format_version=2)
    with pytest.raises(StoreError, match=r"format version 2 is newer than this software reads \(1\); update"):
        open_store(copy)


@pytest.mark.parametrize("writes", [0, 3, "commit"])
@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.ENOSPC, "shard 1: the disk is full; committed shards are kept: free some space"),
        (errno.EACCES, "shard 1: cannot write: .*Permission denied"),
    ],
)
def test_a_failed_write_leaves_committed_shards_whole(
    partial: FeatureStore,
    whole: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
    writes: int | str,
    code: int,
    text: str,
) -> None:
    write, number = files.write_durably, itertools.count()  # which several threads may ask

    def fail(path: Path, *parts: Any, **settings: Any) -> str:
        if next(number) == writes or (writes == "commit" and "commits" in path.parts):
            raise OSError(code, "Permission denied")
        return write(path, *parts, **settings)

    writer = open_or_create(partial.path, attributes(), overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_durably", fail)
        with pytest.raises(StoreError, match=text):
            fill(writer, [1])
    assert list(Path(partial.path).rglob("*.partial")) == []
    store = open_store(partial.path)
    assert store.missing_shards() == [1, 2]
    assert verify(store, deep=True) == ["shard 1: not committed", "shard 2: not committed"]
    fill(open_or_create(partial.path, attributes(), overwrite=False))
    assert open_store(partial.path).content_digest() == whole.content_digest()


def test_when_a_write_has_failed_no_other_one_is_under_way(
    partial: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file fails at once, the others are slow; the error is that of the first."""
    write, number, under_way = files.write_durably, itertools.count(), set[Path]()

    def fail(path: Path, *parts: Any, **settings: Any) -> str:
        if next(number) == 1:
            raise OSError(errno.ENOSPC, "full")
        under_way.add(path)
        time.sleep(0.05)
        written = write(path, *parts, **settings)
        under_way.remove(path)
        return written

    writer = open_or_create(partial.path, attributes(), overwrite=False)
    monkeypatch.setattr(files, "write_durably", fail)
    with pytest.raises(StoreError, match="shard 1: the disk is full"):
        fill(writer, [1])
    assert under_way == set()


def test_data_is_synced_before_the_record_that_vouches_for_it(
    partial: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    named = Path("/proc/self/fd")
    if not named.is_dir():
        pytest.skip(f"{named} is not here: the synced files cannot be named")
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((named / str(descriptor)).readlink()))
    fill(open_or_create(partial.path, attributes(), overwrite=False), [1])
    # each file is synced under its partial name, <name>.<32 hex digits>.partial
    keys = [str(path.relative_to(partial.path)).rsplit(".", 2)[0] for path in synced]
    record = keys.index("commits/c/1")
    data = set(open_store(partial.path).commits[1]["files"])
    assert data
    folders = {str(folder) for key in data for folder in Path(key).parents if folder.name}
    assert data | folders <= set(keys[:record])
    assert "commits/c" in keys[record:]


def test_a_store_that_cannot_be_created_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "write_durably", fail)
    with pytest.raises(StoreError, match=r"s\.zarr: the disk is full"):
        open_or_create(tmp_path / "s.zarr", attributes(), overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 1])
def test_a_flipped_bit_is_refused_on_read(any_store: FeatureStore, tmp_path: Path, place: float) -> None:
    path = Path(shutil.copytree(any_store.path, tmp_path / "c.zarr"))
    values = path / "features/stride_08/values/c/0/1/0/0/0/0"
    changed = bytearray(values.read_bytes())
    changed[int(place * (len(changed) - 1))] ^= 1
    values.write_bytes(changed)
    with pytest.raises(
        StoreError,
        match=r"features/stride_08/values, tile [01]: cannot be read .*checksum",
    ):
        next(open_store(path).batches("train"))
