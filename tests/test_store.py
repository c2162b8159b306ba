"""The feature store: encodings, round trips, resuming, refusals, damage, and reading by other tools."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from satdifuser.errors import SettingsError, StoreError
from satdifuser.store import files
from satdifuser.store.encoding import decode, encode, largest_value, tile_digests
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.schema import (
    Attributes,
    Hashes,
    LayerInfo,
    auto_tiles_per_shard,
    bytes_per_tile,
    canonical_hash,
    contents_hash,
    differing_fields,
    group_layers,
)
from satdifuser.store.settings import Encoding
from satdifuser.store.summary import describe_store, format_store
from satdifuser.store.verify import verify
from satdifuser.store.writer import StoreWriter, TileRow, open_or_create

ENCODINGS: list[Encoding] = ["float32", "float16", "int8"]
LAYERS = [
    LayerInfo(name=f"up.{i}.attn1", channels=c, stride=s, height=16 // s, width=16 // s)
    for i, (c, s) in enumerate([(4, 8), (4, 8), (2, 4), (3, 4)])
]
TILES, SKIPPED, STEPS = 5, 3, [1, 101]
KEPT = np.array([0, 1, 2, 4])
IDENTITY: dict[str, Any] = {"backbone": {"model": "a"}, "steps": 50}


def attributes(**changes: Any) -> Attributes:
    fields: dict[str, Any] = {
        "store_id": "x",
        "created": "now",
        "software": {"satdifuser": "0"},
        "task": "classification",
        "classes": ["sea", "land"],
        "ignore_value": 255,
        "tiles": TILES,
        "left_out": 0,
        "tile_size": (16, 16),
        "tiles_per_shard": 2,  # the last shard holds one tile
        "timesteps": STEPS,
        "layers": LAYERS,
        "encoding": "int8",
        "previews": True,
        "colour_statistics": ["mean"],
        "backbone": {"model": "a"},
        "feature_identity": IDENTITY,
        "planned": Hashes(feature="f", contents="c", labels="l"),
        "settings": {},
    }
    return Attributes.model_validate(fields | changes)


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
    )


def fill(writer: StoreWriter, shards: list[int] | None = None) -> None:
    a = writer.attributes
    for shard in writer.missing_shards() if shards is None else shards:
        tiles = range(*a.shard_range(shard))
        batches = [
            {group: encode(maps, a.encoding) for group, maps in tile_maps(tile).items()}
            for tile in tiles
            if tile != SKIPPED
        ]
        assert writer.write_shard(shard, [tile_row(t, a.task) for t in tiles], batches, {"note": "n"}) > 0


def build(path: Path, shards: list[int] | None = None, **changes: Any) -> FeatureStore:
    fill(open_or_create(path, attributes(**changes), overwrite=False), shards)
    return open_store(path)


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Syncing takes most of the time here; one test below checks that it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", params=ENCODINGS)
def any_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return build(tmp_path_factory.mktemp("any") / "s.zarr", encoding=request.param)


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


def flip(path: Path, place: float = 0.5) -> bytes:
    """Flip one bit in a file; return what it held."""
    held = path.read_bytes()
    changed = bytearray(held)
    changed[int(place * (len(held) - 1))] ^= 1
    path.write_bytes(changed)
    return held


def edit_attributes(path: Path, **changes: Any) -> None:
    file = path / "zarr.json"
    metadata = json.loads(file.read_bytes())
    metadata["attributes"]["satdifuser"].update(changes)
    file.write_text(json.dumps(metadata))


# --- encoding

MAPS = arrays(
    np.float32,
    array_shapes(min_dims=3, max_dims=4, max_side=4),
    elements=st.floats(-60000, 60000, width=32),
)


@given(MAPS, st.sampled_from(ENCODINGS))
@settings(max_examples=100, deadline=None)
def test_decoded_values_stay_within_the_bound_of_their_encoding(
    maps: NDArray[np.float32], encoding: Encoding
) -> None:
    arrays_ = encode(maps, encoding)
    scale: Any = arrays_.get("scale")
    found = decode(arrays_["values"], scale)
    error = np.abs(found.astype(np.float64) - maps)
    assert found.dtype == np.float32
    assert arrays_["values"].dtype == encoding
    if encoding == "int8":
        np.testing.assert_array_equal(scale, np.abs(maps).max((-2, -1)) / np.float32(127))
        assert (error <= 0.5001 * scale[..., None, None] + 1e-42).all()
    elif encoding == "float16":
        assert (error <= np.abs(maps) * 2.0**-11 + 2.0**-25).all()
    else:
        assert not error.any()
    assert set(arrays_) == {"values", "pooled"} | ({"scale"} if encoding == "int8" else set())
    np.testing.assert_array_equal(
        arrays_["pooled"], maps.astype(np.float64).mean((-2, -1)).astype(np.float32)
    )


def test_int8_uses_its_whole_range_and_keeps_constant_zero() -> None:
    maps = np.array([[[-254.0, 1.1]], [[0, 0]]], np.float32)
    arrays_ = encode(maps, "int8")
    assert arrays_["values"].tolist() == [[[-127, 1]], [[0, 0]]]
    assert arrays_["scale"].tolist() == [2, 0]


def test_largest_value_is_the_last_that_stays_finite() -> None:
    assert [largest_value(e) for e in ENCODINGS] == [np.finfo("f4").max, 65504, np.finfo("f4").max]


def test_tile_digests_see_values_and_ignore_the_order_of_names() -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.ones((2, 2), np.int8)
    first = tile_digests({"g": {"v": a, "s": b}})
    assert first == tile_digests({"g": {"s": b, "v": a}})
    a[1, 0] += 1
    second = tile_digests({"g": {"v": a, "s": b}})
    assert (first[0] == second[0], first[1] == second[1]) == (True, False)


# --- schema


def test_layers_group_by_stride_and_width_finest_first() -> None:
    assert group_layers(LAYERS) == {"stride_04": [2], "stride_04_c3": [3], "stride_08": [0, 1]}
    wide = [LayerInfo(name=str(c), channels=c, stride=16, height=1, width=1) for c in (640, 320, 640)]
    assert group_layers(wide) == {"stride_16": [0, 2], "stride_16_c320": [1]}


def test_sizes_and_shards() -> None:
    per_step = 2 * 4 * 4 + (2 + 3) * 16
    assert bytes_per_tile(LAYERS, 2, "float16") == 2 * (per_step * 2 + 13 * 4)
    assert bytes_per_tile(LAYERS, 2, "int8") == 2 * (per_step + 13 * 8)
    assert auto_tiles_per_shard(LAYERS, 2, "int8", 5) == 5
    assert auto_tiles_per_shard(LAYERS, 2, "int8", 1000) == 64
    huge = [LayerInfo(name="h", channels=10**4, stride=1, height=10**3, width=10**3)]
    assert auto_tiles_per_shard(huge, 1, "float32", 9) == 1
    assert [attributes().shard_range(s) for s in range(attributes().shards)] == [(0, 2), (2, 4), (4, 5)]


def test_hashes_and_differences() -> None:
    assert canonical_hash({"a": 1, "b": 2}) == canonical_hash({"b": 2, "a": 1})
    assert contents_hash(["a"], [1], LAYERS) != contents_hash(["a"], [2], LAYERS)
    assert differing_fields({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        "a.b: store has 3, asked for 1",
        "c: store has 'nothing', asked for 2",
        "d: store has 4, asked for 'nothing'",
    ]


# --- round trip


def test_what_was_written_is_read(any_store: FeatureStore) -> None:
    rows = KEPT[::-1]
    for name, maps in any_store.maps(rows).items():
        expected = [encode(tile_maps(int(t))[name], any_store.attributes.encoding) for t in rows]
        for found, one in zip(maps, expected, strict=True):
            scale: Any = one.get("scale")
            np.testing.assert_array_equal(found, decode(one["values"], scale)[0])
    assert any_store.split_counts() == {"train": 3, "val": 1, "skipped": 1}
    assert any_store.colour(rows)[:, 0].tolist() == [4, 2, 1, 0]
    assert any_store.previews(rows)[:, 0, 0, 0].tolist() == [5, 3, 2, 1]
    targets = any_store.targets(rows)
    assert targets is not None
    assert targets.tolist() == [0, 0, 1, 0]
    assert any_store.tiles.tile_id.tolist() == [f"t{i}" for i in range(TILES)]
    assert any_store.tiles.left.tolist() == list(range(TILES))
    assert verify(any_store, deep=True) == []
    stored = any_store.stored(np.array([0]), pooled=True).values()
    assert sum(a.nbytes for g in stored for a in g.values()) == any_store.stored_bytes_per_tile()


def test_masks_and_stores_without_targets(tmp_path: Path) -> None:
    masks = build(tmp_path / "m.zarr", task="segmentation").targets(np.array([2, 0]))
    assert masks is not None
    assert (masks.shape, masks[:, 3, 3].tolist()) == ((2, 16, 16), [2, 0])
    bare = build(tmp_path / "b.zarr", task=None, classes=[], previews=False)
    assert bare.targets(KEPT) is None
    assert verify(bare, deep=True) == []
    with pytest.raises(StoreError, match=r"holds no previews; extract with store.previews: true"):
        bare.previews(KEPT)


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
    with pytest.raises(SettingsError, match="split: got 'trian', expected one of none, train, val, test"):
        next(whole.batches("trian"))
    with pytest.raises(StoreError, match=r"no tile in split 'test'; the store holds {'train': 3, 'val': 1"):
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
    assert "INCOMPLETE: 2 of 3 shards are missing (3 tiles; shards 1, 2)" in format_store(partial)
    assert "none: shards are missing" in format_store(partial)


def test_labels_hash_follows_labels_only(whole: FeatureStore, tmp_path: Path) -> None:
    same = build(tmp_path / "a.zarr", tiles_per_shard=1).hashes()
    other = build(tmp_path / "b.zarr", classes=["sea", "ice"]).hashes()
    assert same == whole.hashes()
    assert (other.feature, other.labels == same.labels) == (same.feature, False)


# --- other readers


def formula(group: Any) -> NDArray[np.float32]:
    """What the `decode` attribute says, with whatever array type the reader gives."""
    scale = np.asarray(group["scale"][...])[..., None, None] if "scale" in group else np.float32(1)
    return np.asarray(group["values"][...]).astype(np.float32) * scale


def test_plain_zarr_and_xarray_decode_by_the_formula(any_store: FeatureStore) -> None:
    maps = any_store.maps(np.arange(TILES))
    root = zarr.open_group(any_store.path, mode="r")
    with xr.open_datatree(any_store.path, engine="zarr", consolidated=False) as tree:
        for name in any_store.groups:
            np.testing.assert_array_equal(formula(root[f"features/{name}"]), maps[name])
            np.testing.assert_array_equal(formula(tree[f"features/{name}"]), maps[name])
            assert tree[f"features/{name}"].attrs["timesteps"] == STEPS
        assert tree["features/stride_08/values"].dims == (
            "tile", "timestep", "layer", "channel", "y", "x",
        )  # fmt: skip
        assert tree["tiles/tile_id"].values.tolist() == [f"t{i}" for i in range(TILES)]
    lazy = any_store.to_xarray()
    assert lazy["features/stride_08/values"].chunks[0] == (2, 2, 1)


def test_the_store_imports_no_torch() -> None:
    names = ["encoding", "files", "layout", "reader", "schema", "settings", "summary", "verify", "writer"]
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
    for path in (tmp_path, plain, copy / "zarr.json"):
        with pytest.raises(StoreError, match=r"not a feature store .no 'satdifuser' attributes"):
            open_store(path)
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
    write, done = files.write_durably, []

    def fail(path: Path, data: bytes) -> None:
        done.append(path)
        if len(done) - 1 == writes or (writes == "commit" and "commits" in path.parts):
            raise OSError(code, "Permission denied")
        write(path, data)

    writer = open_or_create(partial.path, attributes(), overwrite=False)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_durably", fail)
        with pytest.raises(StoreError, match=text):
            fill(writer, [1])
    store = open_store(partial.path)
    assert store.missing_shards() == [1, 2]
    # writes that ran beside the failed one may still be under way, in files of their own
    problems = [line for line in verify(store, deep=True) if "left by an interrupted write" not in line]
    assert problems == ["shard 1: not committed", "shard 2: not committed"]
    fill(open_or_create(partial.path, attributes(), overwrite=False))
    assert open_store(partial.path).content_digest() == whole.content_digest()


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
    assert data | {str(Path(key).parent) for key in data} <= set(keys[:record])
    assert "commits/c" in keys[record:]


def test_a_store_that_cannot_be_created_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "write_durably", fail)
    with pytest.raises(StoreError, match=r"s\.zarr: the disk is full"):
        open_or_create(tmp_path / "s.zarr", attributes(), overwrite=False)
    assert list(tmp_path.iterdir()) == []


# --- damage


def test_a_flipped_bit_in_any_committed_file_is_found(copy: Path) -> None:
    for shard, record in enumerate(open_store(copy).commits):
        for key in record["files"]:
            held = flip(copy / key)
            assert verify(open_store(copy)) == []  # same size
            problems = verify(open_store(copy), deep=True)
            assert f"shard {shard}: {key} was altered after it was committed (SHA-256 differs)" in problems
            (copy / key).write_bytes(held)
    assert verify(open_store(copy), deep=True) == []


def test_missing_and_truncated_files_are_found_by_name(copy: Path) -> None:
    (copy / "features/stride_08/pooled/c/0/0/0/0").unlink()
    values = copy / "features/stride_04/values/c/2/1/0/0/0/0"
    size = values.stat().st_size
    values.write_bytes(values.read_bytes()[:-1])
    ticks: list[int] = []
    assert verify(open_store(copy), progress=lambda: ticks.append(1)) == [
        "shard 0: features/stride_08/pooled/c/0/0/0/0 is missing",
        f"shard 2: features/stride_04/values/c/2/1/0/0/0/0 has {size - 1} bytes, committed were {size}",
    ]
    assert len(ticks) == 3


@pytest.mark.parametrize("place", [0, 0.3, 0.6, 1])
def test_a_flipped_bit_raises_on_read(any_store: FeatureStore, tmp_path: Path, place: float) -> None:
    path = Path(shutil.copytree(any_store.path, tmp_path / "c.zarr"))
    flip(path / "features/stride_08/values/c/0/1/0/0/0/0", place)
    with pytest.raises(ValueError, match="checksum"):
        next(open_store(path).batches("train"))
    assert any("shard 0: cannot be decoded: " in line for line in verify(open_store(path), deep=True))


def test_a_flipped_bit_in_a_small_array_raises_on_read(copy: Path) -> None:
    flip(copy / "features/stride_08/pooled/c/0/0/0/0", 0.9)
    with pytest.raises(RuntimeError, match="Zstd"):
        open_store(copy).pooled()


def test_values_changed_through_zarr_are_found_by_tile(copy: Path) -> None:
    zarr.open_group(copy, mode="r+")["features/stride_08/pooled"][4] = 0.0  # type: ignore[index]
    assert (
        "shard 2: tile t4: features differ from the digest recorded for them"
        in verify(open_store(copy), deep=True)
    )  # fmt: skip


def test_a_damaged_commit_record_is_told(copy: Path) -> None:
    for place in (0, 0.5, 1):
        held = flip(copy / "commits/c/1", place)
        with pytest.raises(StoreError, match="a commit record is damaged"):
            verify(open_store(copy))
        (copy / "commits/c/1").write_bytes(held)


def test_a_committed_file_that_is_gone_is_refused_not_read_as_zeros(copy: Path) -> None:
    key = next(key for key in FeatureStore(copy).commits[0]["files"] if "/values/" in key)
    (copy / key).unlink()
    with pytest.raises(StoreError, match=r"shard 0: features/.* is missing .*--overwrite"):
        FeatureStore(copy).maps(np.array([0]))
