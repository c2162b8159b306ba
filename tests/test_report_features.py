"""What the report draws of features and of the inside of fusions, from a small store and real fits."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from command_line import succeed
from made_up_report import LAYERS, MAPS, Page, fake_probe, fake_run, fake_weights, record_of, tile_store

from satdifuser.errors import SettingsError
from satdifuser.evaluate.evaluation import ensure_evaluated, new_outcome
from satdifuser.evaluate.report.colours import glow_over
from satdifuser.evaluate.report.features import maps_of, pca_colours, telling_inputs
from satdifuser.evaluate.report.figure import Figure
from satdifuser.evaluate.report.fusions import expert_figures, gate_figures, inner_weights
from satdifuser.evaluate.report.page import write_report
from satdifuser.evaluate.report.stores import sample_rows
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.fit import fit
from satdifuser.fuse.run_folder import Run
from satdifuser.fuse.settings import FitSettings
from satdifuser.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

QUICK = FitSettings(projection=8, norm_groups=1, experts=3, warmup_steps=0, epochs=1, device="cpu")
BRIEF = EvaluateSettings(bootstrap=5)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return tile_store(tmp_path_factory.mktemp("store") / "scenes.zarr")


@pytest.fixture(scope="module")
def runs(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for fusion in ("global", "localized", "moe"):
        found[fusion] = fit(store, QUICK, fusion, 0, folder / fusion, new_outcome)
        ensure_evaluated(found[fusion], store, BRIEF)
    return found


def numbers(figure: Figure) -> pd.DataFrame:
    assert figure.data is not None
    saved = pd.read_csv(io.BytesIO(base64.b64decode(figure.csv_uri.split(",", 1)[1])))
    assert list(saved) == list(figure.data)
    return saved


def test_every_picture_of_features_is_drawn(runs: Mapping[str, Run], tmp_path: Path) -> None:
    page = Page(write_report([run.path for run in runs.values()], tmp_path / "r.html", "satdifuser report"))
    assert "Not shown" not in page.words
    for heading in (
        "<h4>Weights of the global fusion</h4>",
        "<h4>Mean gates of the localized fusion</h4>",
        "<h4>Gates of the localized fusion over tiles</h4>",
        "<h4>Experts of the mixture</h4>",
        ">What layers see</h3>",
    ):
        assert heading in page.source
    shown = [str(image["alt"]) for image in page.all("img")]
    assert len([alt for alt in shown if ", over tile tile_" in alt]) == 3 * 2 * 3  # tiles, scales, gates
    assert len([alt for alt in shown if ", of tile tile_" in alt]) == 4 * 2  # tiles, one layer of each stride


def test_gates_are_those_of_the_network(runs: Mapping[str, Run], store: FeatureStore) -> None:
    means, over = gate_figures(runs["localized"], store, "")
    rows = sample_rows(store, "default", 32)
    fine, coarse = inner_weights(runs["localized"], store, rows)
    assert fine.shape == (len(rows), 3 * 2, 8, 8)
    assert coarse.shape == (len(rows), 3 * 2, 4, 4)
    np.testing.assert_allclose(fine.sum(axis=1), 1, rtol=1e-5)
    table = numbers(means).set_index(["layer", "timestep"])
    assert set(table.index) == {(layer, t) for layer in LAYERS for t in (1, 21, 101)}
    # index t * L + l; the fine scale holds the layers at stride 4, in the store's order
    for position, layer in enumerate(x.name for x in MAPS if x.stride == 4):
        for step, timestep in enumerate((1, 21, 101)):
            expected = fine[:, step * 2 + position].mean()
            assert table.loc[(layer, timestep), "gate"] == pytest.approx(expected, rel=1e-4)
            assert table.loc[(layer, timestep), "times_equal_share"] == pytest.approx(6 * expected, rel=1e-4)
    widest = numbers(over)
    spread = fine.std(axis=(2, 3)).mean(axis=0)
    assert widest[widest["stride"] == 4]["spread"].tolist() == pytest.approx(
        sorted(spread, reverse=True)[:3], rel=1e-4
    )


def test_experts_shares_add_up(runs: Mapping[str, Run], store: FeatureStore) -> None:
    (figure,) = expert_figures(runs["moe"], store, "")
    table = numbers(figure)
    assert set(table["expert"]) == {1, 2, 3}
    sums = table.groupby(["stride", "timestep"])["mean_share"].sum()
    assert len(sums) == 2 * 3
    assert sums.tolist() == pytest.approx([1.0] * 6, rel=1e-4)
    used = table.groupby(["stride", "timestep"])["used_by"].sum()
    assert used.tolist() == pytest.approx([2.0] * 6)  # top 2 of 3


def test_the_test_split_is_not_read_for_pictures(store: FeatureStore) -> None:
    rows = sample_rows(store, "default", 5)
    assert set(store.splits()[rows]) == {"val"}
    labels = np.asarray(store.targets(rows)).tolist()
    assert labels == sorted(labels)
    assert len(set(labels)) > 1


def test_pca_finds_the_directions_and_paints_them() -> None:
    random = np.random.default_rng(0)
    hidden = random.normal(size=(2, 3, 5, 7)) * np.array([9.0, 3.0, 1.0])[:, None, None]
    mixed, _ = np.linalg.qr(random.normal(size=(6, 3)))
    colours, shares = pca_colours(np.einsum("bkhw,ck->bchw", hidden, mixed) + 100)
    assert colours.shape == (2, 5, 7, 3)
    for k in range(3):
        painted = colours[..., k].ravel().astype(float)
        assert abs(np.corrcoef(painted, hidden[:, k].ravel())[0, 1]) > 0.9
        assert (painted.min(), painted.max()) == (0, 255)
    assert shares.sum() == pytest.approx(1)
    assert shares[0] > shares[1] > shares[2] > 0
    again, _ = pca_colours(np.einsum("bkhw,ck->bchw", hidden, mixed) + 100)
    assert (again == colours).all()


def test_pca_of_one_channel_leaves_two_colours_black() -> None:
    colours, shares = pca_colours(np.arange(12.0).reshape(1, 1, 3, 4))
    assert (colours[..., 1:] == 0).all()
    assert shares.tolist() == [1, 0, 0]
    flat, shares = pca_colours(np.ones((1, 4, 2, 2)))
    assert np.isfinite(shares).all()
    assert flat.dtype == np.uint8


def test_maps_are_those_of_the_timestep_and_layer(store: FeatureStore) -> None:
    rows = sample_rows(store, "default", 4)
    whole = store.maps(rows)["stride_04"]  # (B, T, L, C, H, W)
    np.testing.assert_array_equal(maps_of(store, rows, 101, MAPS[3].name), whole[:, 2, 1])


def test_the_layer_that_tells_most_is_painted(store: FeatureStore) -> None:
    scores = {(1, LAYERS[0]): 0.2, (101, LAYERS[1]): 0.9, (21, "another store's"): 1.0, (61, LAYERS[2]): 1.0}
    assert telling_inputs(store, scores) == [(21, LAYERS[3]), (101, LAYERS[1])]


def painted(page: Page) -> set[str]:
    alts = [re.match(r"(t \d+, .+), of tile", str(image["alt"])) for image in page.all("img")]
    return {found[1] for found in alts if found}


def test_a_probe_decides_what_is_painted_and_else_the_global_weights(
    store: FeatureStore, tmp_path: Path
) -> None:
    probe = fake_probe(tmp_path / "p", store=record_of(store))
    swept = pd.read_parquet(probe / "probe.parquet")
    swept.assign(timestep=swept["timestep"].replace({61: 101, 161: 1})).to_parquet(probe / "probe.parquet")
    expected = {"t 101, up 2 resnet 0 conv2"}
    assert painted(Page(write_report([probe], tmp_path / "p.html", ""))) > expected
    weights: dict[str, Any] = fake_weights() | {"timesteps": [1, 21, 101]}
    weights["values"] = [[0.0, 0.1, 0.0, 0.0], [0.0, 0.0, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0]]
    run = fake_run(tmp_path / "g", weights=weights, store=record_of(store))
    found = painted(Page(write_report([run], tmp_path / "g.html", "")))
    assert found == {"t 1, up 1 resnet 0 conv2", "t 21, up 2 attn 0 attn1"}


def test_layers_to_paint_can_be_named(runs: Mapping[str, Run], tmp_path: Path) -> None:
    out = tmp_path / "r.html"
    succeed("report", runs["global"].path, "-o", out, "--layers", "up_blocks.2.*")
    parts = ("attn 0 attn1", "resnet 0 conv2")
    assert painted(Page(out)) == {f"t {t}, up 2 {part}" for t in (1, 21, 101) for part in parts}
    with pytest.raises(SettingsError, match="layer 'down' is not in "):
        write_report([runs["global"].path], out, "", layers=["down"])


def test_what_needs_the_store_says_why_it_is_missing_and_where_to_say_where_it_is(
    runs: Mapping[str, Run], store: FeatureStore, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.zarr"
    shutil.copytree(store.folder, moved)
    away = store.folder.rename(store.folder.with_name("away"))
    paths = [run.path for run in runs.values()]
    try:
        page = Page(write_report(paths, tmp_path / "r.html", ""))
        told = r"Not shown: .*scenes\.zarr: no such store; if it was moved, name where it is with --store"
        assert len(re.findall(told, page.words)) == 3
        assert re.search(r"store\s*not at hand: .*scenes\.zarr: no such store", page.words)
        assert len(re.findall("Not shown: the store is not at hand, or holds no previews", page.words)) >= 1
        assert "<h4>Weights of the global fusion</h4>" in page.source
        healed = Page(write_report(paths, tmp_path / "r.html", "", stores=[moved]))
        assert "Not shown" not in healed.words
    finally:
        away.rename(store.folder)


def test_another_store_at_the_same_place_is_not_taken_for_it(
    runs: Mapping[str, Run], store: FeatureStore, tmp_path: Path
) -> None:
    run = shutil.copytree(runs["moe"].path, tmp_path / "moe")
    text = (run / "run.json").read_text()
    (run / "run.json").write_text(text.replace(store.attributes.planned.feature, "0123"))
    page = Page(write_report([run], tmp_path / "r.html", ""))
    assert "scenes.zarr: holds other features by now; name the right store with --store" in page.words


def test_a_store_without_previews_says_so(tmp_path: Path) -> None:
    bare = tile_store(tmp_path / "s.zarr", previews=False)
    page = Page(write_report([fake_run(tmp_path / "g", store=record_of(bare))], tmp_path / "r.html", ""))
    assert "holds no previews; extract with store.previews: true" in page.words


def test_a_glow_is_where_the_map_is_large() -> None:
    tile = np.full((4, 4, 3), 100, np.uint8)
    glowing = glow_over(tile, np.array([[0.0, 1.0], [0.0, 0.0]]))
    assert (glowing[:2, 2:] == [231, 117, 15]).all()  # 15% of the grey, 85% of the orange
    assert (glowing[2:] == 100).all()
    assert (glowing[:, :2] == 100).all()
