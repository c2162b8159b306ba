"""Copies of a store or of a part of it, in the same or another encoding, and joined stores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import pytest
from click.testing import CliRunner
from made_up import SKIPPED, random_store

from satdifuser.cli import cli
from satdifuser.errors import SettingsError, StoreError
from satdifuser.store.copy import copy_store, merge_stores
from satdifuser.store.encoding import FORMS
from satdifuser.store.layout import TEXT_FIELDS
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.schema import LayerInfo, kept_layers
from satdifuser.store.settings import Encoding, StoreSettings
from satdifuser.store.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

TILES = 7
LAYERS = [
    LayerInfo(
        name=f"up.{i}.{kind}", channels=channels, stride=stride, height=16 // stride, width=16 // stride
    )
    for i, (channels, stride) in enumerate([(4, 8), (2, 4), (3, 4)])
    for kind in ("attn1", "conv2")
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return random_store(tmp_path_factory.mktemp("whole") / "s.zarr", LAYERS, TILES)


NUMBERS = ("bounds", "transform", "valid_share", "padded")


def same_tiles(store: FeatureStore, rows: Sequence[int], other: FeatureStore, features: bool = True) -> None:
    """All that two stores keep of some tiles is equal; the digest only where the features are, too."""
    for name in (*TEXT_FIELDS[: None if features else -1], *NUMBERS):
        ours, theirs = store.table(f"tiles/{name}")[rows], other.table(f"tiles/{name}")
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    np.testing.assert_array_equal(store.splits()[rows], other.splits())
    for name in ("targets/label", "tiles/colour", "previews/rgb"):
        np.testing.assert_array_equal(store.table(name)[rows], other.table(name))


def test_a_whole_copy_is_the_same_store_in_other_shards(store: FeatureStore, tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path / "c.zarr")
    assert (copy.attributes.shards, store.attributes.shards) == (1, 3)
    assert copy.content_digest() == store.content_digest()
    assert copy.hashes() == store.hashes()
    assert copy.attributes.store_id != store.attributes.store_id
    same_tiles(store, range(TILES), copy)
    assert verify(copy, deep=True) == []


def test_a_part_holds_its_tiles_timesteps_and_layers_only(store: FeatureStore, tmp_path: Path) -> None:
    copy = copy_store(
        store, tmp_path / "c.zarr", ["test", "train"], "t[!4]", [101, 1], ["up.0*", "up.2.conv2"]
    )
    rows = [0, 3, 5]  # t1 was skipped and has no split to be chosen by, t2 and t6 are val
    same_tiles(store, rows, copy, features=False)
    assert copy.attributes.timesteps == [101, 1]
    assert [layer.name for layer in copy.attributes.layers] == ["up.0.attn1", "up.0.conv2", "up.2.conv2"]
    whole, part = store.maps(np.array(rows)), copy.maps(np.arange(3))
    np.testing.assert_array_equal(part["stride_08"], whole["stride_08"][:, [2, 0]])
    np.testing.assert_array_equal(part["stride_04"], whole["stride_04_c3"][:, [2, 0]][:, :, 1:])
    for timestep in (1, 101):
        np.testing.assert_array_equal(
            copy.pooled(timestep, "up.2*"), store.pooled(timestep, "up.2.conv2")[[0, 2, 4]]
        )
    assert copy.hashes().feature == store.hashes().feature
    assert verify(copy, deep=True) == []


def test_skipped_tiles_stay_skipped(store: FeatureStore, tmp_path: Path) -> None:
    copy = copy_store(store, tmp_path / "c.zarr", tiles="t[01]")
    assert copy.tiles.skip_reason.tolist() == ["", "all nan"]
    assert copy.select().tolist() == [0]
    same_tiles(store, [0, SKIPPED], copy)


@pytest.mark.parametrize("encoding", [name for name in FORMS if name != "reduced"])
def test_another_encoding_of_float32_is_what_extraction_would_have_written(
    store: FeatureStore, tmp_path: Path, encoding: Encoding
) -> None:
    copy = copy_store(store, tmp_path / "c.zarr", settings=StoreSettings(encoding=encoding))
    direct = random_store(tmp_path / "d.zarr", LAYERS, TILES, encoding)
    assert copy.content_digest() == direct.content_digest()
    assert copy.attributes.decode == direct.attributes.decode
    assert copy.attributes.feature_identity.get("encoded_from") is None


def test_reduced_copies_average_windows_and_cannot_be_undone(store: FeatureStore, tmp_path: Path) -> None:
    settings = StoreSettings(encoding="reduced", pool={4: 2})
    copy = copy_store(store, tmp_path / "c.zarr", settings=settings)
    assert copy.attributes.layers == kept_layers(LAYERS, settings)
    found, whole = copy.maps(np.array([0]))["stride_04"], store.maps(np.array([0]))["stride_04"]
    windows = whole.reshape(*whole.shape[:-2], 2, 2, 2, 2).mean((-3, -1))
    np.testing.assert_allclose(found, windows, atol=np.abs(windows).max() / 127)
    np.testing.assert_array_equal(copy.pooled(), store.pooled())
    with pytest.raises(StoreError, match=r"c.zarr: holds averaged windows .* copy it without --encoding, or"):
        copy_store(copy, tmp_path / "e.zarr", settings=StoreSettings(encoding="int8"))
    assert copy_store(copy, tmp_path / "e.zarr").content_digest() == copy.content_digest()


def test_a_lossy_encoding_is_remembered(store: FeatureStore, tmp_path: Path) -> None:
    once = copy_store(store, tmp_path / "a.zarr", settings=StoreSettings(encoding="int8"))
    twice = copy_store(once, tmp_path / "b.zarr", settings=StoreSettings(encoding="int4"))
    straight = copy_store(store, tmp_path / "c.zarr", settings=StoreSettings(encoding="int4"))
    assert twice.attributes.feature_identity["encoded_from"] == "int8"
    assert twice.hashes().feature != straight.hashes().feature
    with pytest.raises(StoreError, match=r"differ:\n  feature_identity.encoded_from: the first has 'int8'"):
        merge_stores(twice, straight, tmp_path / "d.zarr")


def test_an_interrupted_copy_goes_on(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = StoreSettings(encoding="float32", tiles_per_shard=2)
    whole = copy_store(store, tmp_path / "whole.zarr", settings=small)
    assert whole.attributes.shards == 4
    path = tmp_path / "c.zarr"
    shutil.copytree(whole.path, path)
    (path / "commits/c/2").unlink()
    with pytest.raises(StoreError, match="1 of 4 shards are missing"):
        open_store(path).require_complete()
    again = copy_store(store, path, settings=small)
    assert again.attributes.store_id == whole.attributes.store_id
    assert again.content_digest() == whole.content_digest()
    assert verify(again, deep=True) == []
    with pytest.raises(StoreError, match="this store was made with other settings"):
        copy_store(store, path, ["train"], settings=small)


def test_joining_gives_each_tile_once(store: FeatureStore, tmp_path: Path) -> None:
    first = copy_store(store, tmp_path / "a.zarr", tiles="t[0-3]")
    second = copy_store(store, tmp_path / "b.zarr", tiles="t[2-6]")
    joined = merge_stores(first, second, tmp_path / "c.zarr")
    assert joined.content_digest() == store.content_digest()
    same_tiles(store, range(TILES), joined)
    assert verify(joined, deep=True) == []
    again = merge_stores(first, second, tmp_path / "c.zarr")
    assert again.attributes.store_id == joined.attributes.store_id
    twice = merge_stores(first, first, tmp_path / "d.zarr")
    assert twice.content_digest() == first.content_digest()


def test_tiles_that_differ_are_not_joined(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, row = made_up.random_features, made_up.random_row
    with monkeypatch.context() as patch:
        patch.setattr(made_up, "random_features", lambda number, *rest: features(number + 1, *rest))
        other = random_store(tmp_path / "f.zarr", LAYERS, 2, first=5)
    with pytest.raises(
        StoreError, match=r"tile t5: its features in .*s.zarr and .*f.zarr differ; leave it out"
    ):
        merge_stores(store, other, tmp_path / "c.zarr")
    with monkeypatch.context() as patch:
        target = np.array(1, np.int32)
        patch.setattr(made_up, "random_row", lambda number: replace(row(number), target=target))
        other = random_store(tmp_path / "l.zarr", LAYERS, 2, first=5)
    with pytest.raises(StoreError, match=r"tile t6: its labels in .*s.zarr and .*l.zarr differ"):
        merge_stores(store, other, tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()


def test_stores_of_other_features_are_not_joined(store: FeatureStore, tmp_path: Path) -> None:
    part = copy_store(store, tmp_path / "a.zarr", timesteps=[21])
    with pytest.raises(
        StoreError, match=r"a\.zarr cannot be joined, .*differ:\n  held.timesteps: the first has"
    ):
        merge_stores(store, part, tmp_path / "c.zarr")
    assert not (tmp_path / "c.zarr").exists()


def test_unknown_choices_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "c.zarr"
    with pytest.raises(StoreError, match=r"no tile's id matches 'x\*'; the first of 7 is t0"):
        copy_store(store, out, tiles="x*")
    with pytest.raises(SettingsError, match="split 'tran': expected"):
        copy_store(store, out, ["tran"])
    with pytest.raises(SettingsError, match=r"layer 'up\.9' is not in"):
        copy_store(store, out, layers=["up.1*", "up.9"])
    assert not out.exists()


def test_the_commands_copy_and_join(store: FeatureStore, tmp_path: Path) -> None:
    def run(*arguments: Any) -> str:
        result = CliRunner().invoke(cli, ["store", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    a, b, c = (tmp_path / f"{name}.zarr" for name in "abc")
    assert "timesteps  [21]" in run("copy", store.path, "-o", a, "--splits", "train,val", "--timesteps", "21")
    run("copy", store.path, "-o", b, "--splits", "test", "--timesteps", "21", "--encoding", "float32")
    assert "tiles      6 of" in run("merge", a, b, "-o", c)
    assert json.loads(run("verify", "--deep", "--json", c))["ok"]
    result = CliRunner().invoke(cli, ["store", "copy", str(store.path), "-o", str(c), "--timesteps", "x"])
    assert result.exit_code == 2
    assert "--timesteps: got 'x', expected whole numbers, e.g. 21,61" in result.stderr


def test_a_store_is_never_overwritten_by_what_is_read_of_it(store: FeatureStore, tmp_path: Path) -> None:
    path = copy_store(store, tmp_path / "c.zarr").folder
    (tmp_path / "link.zarr").symlink_to(path)
    digest = open_store(path).content_digest()
    for out in (path, tmp_path / "link.zarr"):
        with pytest.raises(SettingsError, match="is the store that is read"):
            copy_store(open_store(path), out, overwrite=True)
        with pytest.raises(SettingsError, match="is the store that is read"):
            merge_stores(store, open_store(path), out, overwrite=True)
    assert open_store(path).content_digest() == digest


def test_a_copy_of_what_was_there_before_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "s.zarr", tmp_path / "c.zarr"
    before = random_store(path, LAYERS, TILES)
    digest = before.content_digest()
    assert copy_store(before, out).attributes.copied_from == [digest]
    copy_store(before, out)  # the same: nothing to do
    shutil.rmtree(path)
    features = made_up.random_features
    monkeypatch.setattr(made_up, "random_features", lambda n, *rest: features(n + 100, *rest))
    changed = random_store(path, LAYERS, TILES)
    assert changed.content_digest() != digest
    with pytest.raises(StoreError, match="the values it was copied from"):
        copy_store(changed, out)
    assert copy_store(changed, out, overwrite=True).content_digest() == changed.content_digest()


def test_what_is_named_twice_is_held_once_or_refused(store: FeatureStore, tmp_path: Path) -> None:
    twice = copy_store(store, tmp_path / "c.zarr", ["train", "train"])
    assert twice.table("tiles/tile_id").tolist() == ["t0", "t4", "t5"]
    with pytest.raises(SettingsError, match="timesteps: name each once, got 21, 21"):
        copy_store(store, tmp_path / "d.zarr", timesteps=[21, 21])


def test_an_incomplete_copy_names_the_command_that_made_it(store: FeatureStore, tmp_path: Path) -> None:
    path = copy_store(store, tmp_path / "c.zarr").folder
    (path / "commits/c/0").unlink()
    for command in ("verify", "repair"):
        told = CliRunner().invoke(cli, ["store", command, str(path)]).stderr
        assert "run the same `satdifuser store copy` command again" in told
    with pytest.raises(StoreError, match="run the same `satdifuser store copy` command again"):
        open_store(path).select()


@pytest.mark.parametrize("option", ["--splits", "--timesteps"])
def test_an_empty_choice_is_not_everything(store: FeatureStore, tmp_path: Path, option: str) -> None:
    words = ["store", "copy", str(store.folder), "-o", str(tmp_path / "c.zarr"), option, ""]
    assert CliRunner().invoke(cli, words).exit_code != 0


@pytest.mark.parametrize(
    ("out", "text"),
    [("az://bucket/x.zarr", "expected one of s3://, gs://"), ("x.zip", "a store is written to a folder")],
)
def test_where_no_store_can_be_written(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(cli, ["store", "copy", str(store.folder), "-o", out])
    assert (told.exit_code != 0, text in told.stderr, list(tmp_path.iterdir())) == (True, True, [])
