"""Stores of format 1, as it was when it was first released, stay readable and are never changed in place."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from satdifuser.cli import cli
from satdifuser.errors import StoreError
from satdifuser.store import metadata
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.repair import repair
from satdifuser.store.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

STORES = Path(__file__).parent / "stores"


@pytest.fixture
def old(tmp_path: Path) -> FeatureStore:
    zipfile.ZipFile(STORES / "format-1.zip").extractall(tmp_path / "old.zarr")
    return open_store(tmp_path / "old.zarr")


def test_format_1_is_read(old: FeatureStore) -> None:
    expected = json.loads((STORES / "format-1.json").read_text())
    assert verify(old, deep=True) == []
    assert old.content_digest() == expected["content_digest"]
    assert old.hashes().model_dump() == expected["hashes"]
    assert old.tiles.tile_id.tolist() == expected["tile_ids"]
    assert old.tiles.label.tolist() == expected["labels"]
    maps = old.decode(old.stored(np.arange(4)))
    for group, values in expected["last_tile"].items():
        np.testing.assert_array_equal(maps[group][3, 2], np.array(values, np.float32))


def test_format_1_is_read_from_where_it_is_not_local(
    old: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SATDIFUSER_CACHE", str(tmp_path / "cache"))
    remote = open_store(STORES / "format-1.zip")
    assert verify(remote, deep=True) == []
    assert remote.content_digest() == old.content_digest()


def test_no_command_changes_a_store_of_an_older_format(
    old: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in old.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(metadata, "FORMAT_VERSION", 2)
    text = r"old\.zarr: is of format 1, which this software reads but does not change \(it writes 2\)"
    with pytest.raises(StoreError, match=text):
        open_or_create(old.folder, old.attributes, overwrite=False)
    with pytest.raises(StoreError, match=text):
        repair(old.folder)
    result = CliRunner().invoke(cli, ["store", "repair", str(old.folder)])
    assert (result.exit_code, "Traceback" in result.output) == (1, False)
    assert {path: path.read_bytes() for path in old.folder.rglob("*") if path.is_file()} == before
