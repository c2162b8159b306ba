"""The card in a store: it says what a colleague needs, and its snippets run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner
from made_up import random_store

from satdifuser.cli import cli
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import open_store
from satdifuser.store.schema import LayerInfo
from satdifuser.store.settings import Encoding
from satdifuser.store.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

LAYERS = [LayerInfo(name="up.0.attn1", channels=3, stride=4, height=4, width=5)]
SETTINGS = {
    "store": {"license": "CC BY 4.0", "citation": "Images by us, 2026"},
    "source": {"kind": "folder", "root": "/home/somebody/dubai"},
}


@pytest.mark.parametrize("encoding", get_args(Encoding))
def test_its_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: Encoding) -> None:
    store = random_store(tmp_path / "s.zarr", LAYERS, 4, encoding)
    snippets = re.findall(r"```python\n(.*?)```", (store.folder / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, found)
    rows = np.arange(4)
    np.testing.assert_array_equal(found["maps"], store.decode(store.stored(rows))["stride_04"][0])
    np.testing.assert_array_equal(found["pooled"].values, store.pooled_group("stride_04", rows))
    assert found["tile_ids"].tolist() == ["t0", "t1", "t2", "t3"]
    found["tree"].close()


def test_it_says_what_a_colleague_needs(tmp_path: Path) -> None:
    path = random_store(tmp_path / "s.zarr", LAYERS, 4, settings=SETTINGS).folder
    shown = CliRunner().invoke(cli, ["store", "info", "--card", str(path)]).stdout
    assert shown == (path / "README.md").read_text()
    for text in (
        *("CC BY 4.0", "Images by us, 2026", "folder dubai", "sea, land", "up.0.attn1", "arXiv 2503.07890"),
        *("feature = values", str(open_store(path).content_digest())),
    ):
        assert text in shown
    assert "/home/somebody" not in shown
    bare = random_store(tmp_path / "bare.zarr", LAYERS, 4).folder
    assert "licence: not stated" in (bare / "README.md").read_text()


def test_an_edited_or_deleted_card_harms_nothing(tmp_path: Path) -> None:
    store = random_store(tmp_path / "s.zarr", LAYERS, 4)
    card = store.folder / "README.md"
    card.write_text("ours")
    with open_or_create(store.folder, store.attributes, overwrite=False):
        pass
    assert (card.read_text(), verify(open_store(store.folder), deep=True)) == ("ours", [])
    assert CliRunner().invoke(cli, ["store", "info", "--card", str(store.folder)]).stdout == "ours"
    card.unlink()
    assert verify(open_store(store.folder), deep=True) == []
    with open_or_create(store.folder, store.attributes, overwrite=False):
        pass
    assert card.read_text().startswith("# s.zarr: diffusion features of 4 satellite image tiles")


def test_an_incomplete_store_has_none(tmp_path: Path) -> None:
    store = random_store(tmp_path / "s.zarr", LAYERS, 4)
    (store.folder / "README.md").unlink()
    (store.folder / "commits/c/1").unlink()
    with open_or_create(store.folder, store.attributes, overwrite=False):
        pass
    assert not (store.folder / "README.md").exists()
