"""Digests of data, and stores from before, whose digests are SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from blake3 import blake3
from command_line import refuse, succeed
from made_up import image_folder
from made_up_store import build, contents, flip, new_attributes

from satdifuser.errors import StoreError
from satdifuser.extract import job
from satdifuser.store.copy import tile_rows
from satdifuser.store.digest import DigestAlgorithm, digest_of, file_digest
from satdifuser.store.encoding import tile_digests
from satdifuser.store.metadata import seal
from satdifuser.store.opening import open_or_create, open_part
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

BOTH: list[DigestAlgorithm] = ["sha256", "blake3"]
OTHER: dict[DigestAlgorithm, DigestAlgorithm] = {"sha256": "blake3", "blake3": "sha256"}
PLAIN: dict[str, Callable[[bytes], Any]] = {"sha256": hashlib.sha256, "blake3": blake3}


@pytest.mark.parametrize("algorithm", BOTH)
def test_a_digest_is_that_of_the_bytes(tmp_path: Path, algorithm: DigestAlgorithm) -> None:
    data = bytes(range(256)) * 5000  # more than one piece of a file
    expected = PLAIN[algorithm](data).hexdigest()
    (tmp_path / "file").write_bytes(data)
    assert digest_of(data, algorithm) == file_digest(tmp_path / "file", algorithm) == expected
    arrays = {"b": np.arange(6, dtype=np.int8).reshape(2, 3), "a": np.ones((2, 1, 2), np.float32)[:, :, ::2]}
    tiles = [arrays["a"][tile].tobytes() + arrays["b"][tile].tobytes() for tile in (0, 1)]
    digests = [PLAIN[algorithm](tile).hexdigest() for tile in tiles]
    assert tile_digests({"g": arrays}, algorithm) == digests


def test_known_digests_of_nothing() -> None:
    """As the two algorithms' authors publish them."""
    assert digest_of(b"", "sha256").startswith("e3b0c44298fc1c149afbf4c8996fb924")
    assert digest_of(b"", "blake3").startswith("af1349b9f5f9a1a6a0404dea36dcc949")


@pytest.mark.parametrize("algorithm", BOTH)
def test_a_store_is_checked_by_its_own_digests(tmp_path: Path, algorithm: DigestAlgorithm) -> None:
    store = open_store(build(tmp_path / "s.zarr", digest_algorithm=algorithm))
    for key, (size, digest) in store.recorded_files().items():
        data = (store.folder / key).read_bytes()
        assert (size, digest) == (len(data), PLAIN[algorithm](data).hexdigest())
    assert verify(store, deep=True) == []
    key = next(key for key in store.recorded_files() if "values" in key)
    flip(store.folder / key, -1)
    altered = f"shard 0: {key} was altered after it was committed (its digest differs)"
    assert verify(store, deep=True) == [altered]


@pytest.mark.parametrize("algorithm", BOTH)
def test_a_copy_keeps_them_and_joins_only_its_like(tmp_path: Path, algorithm: DigestAlgorithm) -> None:
    store = build(tmp_path / "s.zarr", digest_algorithm=algorithm)
    succeed("store", "copy", store, "-o", tmp_path / "copy.zarr")
    copy = open_store(tmp_path / "copy.zarr")
    assert copy.attributes.digest_algorithm == algorithm
    assert copy.content_digest() == open_store(store).content_digest()
    assert verify(copy, deep=True) == []
    other = build(tmp_path / "other.zarr", digest_algorithm=OTHER[algorithm])
    said = refuse("store", "merge", store, other, "-o", tmp_path / "both.zarr")
    assert f"the digests of their images are {OTHER[algorithm]} and {algorithm}, and copies keep them" in said
    assert contents(store) != contents(other)


def test_a_store_is_gone_on_with_by_its_own_digests_only(tmp_path: Path) -> None:
    """As where another process made it, or left it behind, since its shards were planned."""
    path = build(tmp_path / "s.zarr", (0,), digest_algorithm="sha256")
    for open_it in (
        lambda asked: open_or_create(path, asked, overwrite=False),
        lambda asked: open_part(path, asked),
    ):
        with pytest.raises(StoreError, match="digest_algorithm: sha256, asked for blake3"):
            open_it(new_attributes(digest_algorithm="blake3"))


@pytest.mark.parametrize("algorithm", BOTH)
def test_files_that_another_store_takes_over_keep_their_digests(
    tmp_path: Path, algorithm: DigestAlgorithm, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = open_store(build(tmp_path / "old.zarr", digest_algorithm=algorithm))

    def refuse_links(*_: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse_links)
    with open_or_create(tmp_path / "new.zarr", old.attributes, overwrite=False) as writer:
        for shard in range(old.attributes.shards):
            rows = tile_rows(old, np.arange(*old.attributes.shard_range(shard)))
            writer.adopt_shard(shard, old, rows)
    new = open_store(tmp_path / "new.zarr")
    assert new.recorded_files() == old.recorded_files()
    assert verify(new, deep=True) == []


def test_a_store_of_newer_software_is_not_called_damaged(tmp_path: Path) -> None:
    path = build(tmp_path / "s.zarr")
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["satdifuser"]["colours_of_tomorrow"] = 1
    (path / "zarr.json").write_text(json.dumps(root))
    seal(path)
    with pytest.raises(StoreError, match=r"declares colours_of_tomorrow, .* newer one; update satdifuser"):
        open_store(path)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """An extraction of before."""
    image_folder(tmp_path / "images", {"field": 3, "water": 3})
    settings = {
        "source": {"kind": "folder", "root": str(tmp_path / "images"), "tile_size": 16},
        "extract": {"timesteps": [21], "layers": ["up_blocks.1.*attn1"], "batch_size": 2, "threads": 1},
        "backbone": {"device": "cpu"},
        "store": {"tiles_per_shard": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(settings))
    with monkeypatch.context() as before:
        before.setattr(job, "CURRENT", "sha256")
        succeed("extract", "-c", tmp_path / "job.yaml", "-o", tmp_path / "old.zarr")
    return open_store(tmp_path / "old.zarr")


def test_an_extraction_of_before_goes_on_with_its_digests(old: FeatureStore, tmp_path: Path) -> None:
    assert old.attributes.digest_algorithm == "sha256"
    (old.folder / "commits/c/1").unlink()
    for image in (tmp_path / "images").rglob("*.png"):  # so that digests decide whether it is the same
        os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
    succeed("extract", "-c", tmp_path / "job.yaml", "-o", old.path)
    redone = open_store(old.path)
    assert redone.content_digest() == old.content_digest()
    assert verify(redone, deep=True) == []


def test_a_store_of_before_grows_with_its_digests(old: FeatureStore, tmp_path: Path) -> None:
    shutil.copy(next((tmp_path / "images").rglob("*.png")), tmp_path / "images/water/new.png")
    succeed("extract", "-o", old.path, "--add-timesteps", "61", "--add-tiles")
    grown = open_store(old.path)
    assert (grown.attributes.digest_algorithm, grown.attributes.tiles) == ("sha256", 7)
    assert verify(grown, deep=True) == []


def test_an_extraction_that_replaces_one_of_before_has_new_digests(old: FeatureStore, tmp_path: Path) -> None:
    before = set(old.tiles.image_digest)
    succeed("extract", "-c", tmp_path / "job.yaml", "-o", old.path, "--overwrite")
    new = open_store(old.path)
    assert new.attributes.digest_algorithm == "blake3"
    assert before.isdisjoint(new.tiles.image_digest)
    assert verify(new, deep=True) == []
