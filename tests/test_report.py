"""The report page about runs, from made-up run folders."""

from __future__ import annotations

import base64
import io
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from command_line import refuse, succeed
from made_up_report import CLASSES, TILES, Page, fake_probe, fake_run, fake_weights, record_of, tile_store

from satdifuser.errors import RunError
from satdifuser.evaluate.report.page import find_reported, write_report
from satdifuser.evaluate.results import format_table, results_table
from satdifuser.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return tile_store(tmp_path_factory.mktemp("store") / "scenes.zarr")


@pytest.fixture
def classification_runs(tmp_path: Path, store: FeatureStore) -> list[Path]:
    held: dict[str, Any] = {"store": record_of(store)}
    return [
        fake_run(tmp_path / "global_0", skill=0.8, seed=0, weights=fake_weights(), **held),
        fake_run(tmp_path / "global_1", skill=0.9, seed=1, weights=fake_weights(), **held),
        fake_run(
            tmp_path / "colour", skill=0.75, kind="baseline", history=[], fusion=None, head=None, **held
        ),
    ]


@pytest.fixture
def segmentation_runs(tmp_path: Path) -> list[Path]:
    shared: dict[str, Any] = {"task": "segmentation", "head": "upernet"}
    return [
        fake_run(tmp_path / "localized_0", skill=0.8, fusion="localized", **shared),
        fake_run(tmp_path / "single", skill=0.6, kind="baseline", history=[], fusion=None, **shared),
    ]


def page_of(paths: list[Path], out: Path, **options: Any) -> Page:
    return Page(write_report(paths, out / "r.html", "satdifuser report x", **options))


def test_page_tells_the_results_and_how_they_were_chosen(
    classification_runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "report.html"
    assert write_report(classification_runs, out, "satdifuser run", title="Land & water") == out
    page = Page(out)
    assert "Land & water" in page.words
    assert re.search(r"Chosen: global \+ linear, test accuracy 0\.\d+ ± 0\.\d+ \(95% interval 0", page.words)
    assert "Best on val among the baselines: colour (baseline), test accuracy 0." in page.words
    assert "The chosen run: global_1" in page.words
    assert "Of its 2 seeds" in page.words
    assert "The test split had no part in the choice." in page.words
    for cells in format_table(results_table(classification_runs)).splitlines()[2:-1]:
        for cell in re.split(r" {2,}", cells):
            assert cell in page.words
    assert len(page.all("svg")) == 3  # all runs, two curves
    assert "satdifuser run" in page.words


def test_weights_and_confusions_are_tables(classification_runs: list[Path], tmp_path: Path) -> None:
    page = page_of(classification_runs, tmp_path)
    tables = [a["class"] for a in page.all("table")]
    assert len([name for name in tables if name and name.startswith("heat")]) == 2
    weights = fake_weights()
    assert f'title="{weights["layers"][0]}, 21: {weights["values"][0][0]:.3f}"' in page.source
    table = pd.read_parquet(classification_runs[1] / "predictions.parquet")
    forest = table[table["target"] == 0]
    right = 100 * (forest["predicted"] == 0).mean()
    assert f'title="forest, forest: {right:.0f}"' in page.source


def test_worst_masks_come_first(segmentation_runs: list[Path], tmp_path: Path) -> None:
    page = page_of(segmentation_runs, tmp_path)
    shown = [float(value) for value in re.findall(r"mIoU: (0\.\d+)", page.words)]
    quality = pd.read_parquet(segmentation_runs[0] / "predictions.parquet")["miou"]
    assert shown[:6] == pytest.approx(sorted(quality[::4])[:6], abs=5e-4)
    assert len(shown) == 9
    assert len(page.all("img")) == 18  # without the store there are no images, truth and prediction only
    assert "not labelled" in page.words
    assert "lowest mean IoU of the 10 tiles whose masks were saved" in page.words


def test_the_worst_of_all_tiles_are_called_so(segmentation_runs: list[Path], tmp_path: Path) -> None:
    run = segmentation_runs[0]
    table = pd.read_parquet(run / "predictions.parquet")
    saved = np.load(run / "masks.npz")
    others = ~table["tile_id"].isin(saved["tile_id"])
    table.loc[others, "miou"] += 1
    table.to_parquet(run / "predictions.parquet")
    assert f"lowest mean IoU of all {TILES} tiles" in page_of([run], tmp_path).words


def test_missing_masks_are_told(segmentation_runs: list[Path], tmp_path: Path) -> None:
    (segmentation_runs[0] / "masks.npz").unlink()
    page = page_of(segmentation_runs, tmp_path)
    assert re.search(
        r"Not shown: .*localized_0/masks.npz is missing; measure the run again: `satdifuser", page.words
    )


def test_multilabel_page_tables_each_class_and_names_classes(tmp_path: Path, store: FeatureStore) -> None:
    run = fake_run(tmp_path / "global_0", task="multilabel", store=record_of(store))
    page = page_of([run], tmp_path)
    assert "Confusion matrix" not in page.words
    assert "f1_micro: over all tiles and classes together" in page.words
    assert "Support is the number of test tiles of the class" in page.words
    assert re.search(r"class\s*support\s*precision\s*recall\s*f1\s*forest\s*\d+\s*0\.\d+", page.words)
    mistakes, right = page.words.split("Some with every class right", 1)
    cards = re.findall(r"truth: (.+)\s+predicted: (.+)\s+(tile_\d+)", mistakes)
    table = pd.read_parquet(run / "predictions.parquet").set_index("tile_id")
    wrong = [(table["target"][name] != table["predicted"][name]).sum() for _, _, name in cards]
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[-1] > 0
    names = np.array(CLASSES)
    for truth, guess, name in cards:
        assert truth == (", ".join(names[table["target"][name] == 1]) or "none")
        assert guess == (", ".join(names[table["predicted"][name] == 1]) or "none")
    pairs = re.findall(r"truth: (.+)\s+predicted: (.+)", right)
    assert pairs
    assert all(truth == guess for truth, guess in pairs)


def test_mistakes_come_first_and_most_confident_first(tmp_path: Path, store: FeatureStore) -> None:
    run = fake_run(tmp_path / "global_0", skill=0.7, store=record_of(store))
    page = page_of([run], tmp_path)
    mistakes, right = page.words.split("Some right answers", 1)
    confidence = [int(value) for value in re.findall(r"predicted: .+ \((\d+)%\)", mistakes)]
    assert confidence == sorted(confidence, reverse=True)
    assert len(confidence) >= 2
    truths = re.findall(r"truth: (.+)", right)
    assert truths == re.findall(r"predicted: (.+) \(", right)
    assert set(truths[:4]) == set(CLASSES)
    table = pd.read_parquet(run / "predictions.parquet")
    wrong = (table["target"] != table["predicted"]).sum()
    assert f"Of {wrong} mistakes among {TILES} tiles" in page.words


def test_page_of_another_split_than_test(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, split="train", fusion=name) for name in ("global", "moe")]
    page = page_of(runs, tmp_path)
    assert re.search(r"Chosen: global, train accuracy 0\.\d+ \(95% interval", page.words)
    assert "Tiles of the train split" in page.words
    assert "Confusion matrix on train, in percent" in page.words
    assert not re.search(r"test (accuracy|tiles)|on test,", page.words)


def test_page_needs_nothing_else(classification_runs: list[Path], tmp_path: Path) -> None:
    page = page_of(classification_runs, tmp_path)
    references = [str(a.get("src") or a.get("href")) for _, a in page.tags if a.get("src") or a.get("href")]
    kinds = {re.split("[;,]", reference)[0] for reference in references if not reference.startswith("#")}
    assert kinds == {"data:image/jpeg", "data:image/png", "data:text/csv"}
    targets = {a["id"] for _, a in page.tags if "id" in a}
    assert {reference[1:] for reference in references if reference.startswith("#")} <= targets
    assert len(page.all("script")) == 1
    assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg|http-equiv", "", page.source)


def test_page_is_fit_for_screen_readers_and_the_keyboard(
    classification_runs: list[Path], tmp_path: Path
) -> None:
    page = page_of(classification_runs, tmp_path)
    assert page.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.all("img"))
    assert all(chart["aria-label"] and chart["role"] == "img" for chart in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(a["scope"] in ("row", "col") for a in page.all("th"))
    scrolled = [a for a in page.all("div") if a.get("class") == "scroll"]
    assert scrolled
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in scrolled)
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))


def test_every_figure_has_its_command_and_its_data(classification_runs: list[Path], tmp_path: Path) -> None:
    page = page_of(classification_runs, tmp_path)
    figures = page.source.split("<figure>")[1:]
    assert len(figures) > 8
    for figure in figures:
        assert re.search(r"<pre><code>satdifuser (report|fit|evaluate) ", figure)
        assert "data:text/csv" in figure
    (scores,) = (f for f in figures if "All metrics of this run." in f)
    encoded = re.search(r"data:text/csv;charset=utf-8;base64,([^\"]+)", scores)
    assert encoded
    saved = pd.read_csv(io.BytesIO(base64.b64decode(encoded[1])))
    metrics = json.loads((classification_runs[1] / "metrics.json").read_text())["test"]
    assert saved["test"].tolist() == pytest.approx([metrics[name] for name in saved["metric"]], abs=5e-4)


HOSTILE = "<img src=x onerror=alert(1)>\"'{{7*7}}</script><script>alert(2)</script>"


def test_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    """Class names, tile ids, run names, layers and paths are whatever a stranger wrote."""
    classes = [HOSTILE, "b", "c", "d"]
    layer = {"name": HOSTILE, "channels": 1, "stride": 8}
    weights = {"timesteps": [21], "layers": [HOSTILE], "values": [[1.0]]}
    record = {"path": f"{HOSTILE}.zarr", "hashes": {"feature": HOSTILE, "contents": "c", "labels": "l1"}}
    changes: dict[str, Any] = {"classes": classes, "layers": [layer], "weights": weights, "store": record}
    runs = [
        fake_run(tmp_path / "a", name=HOSTILE, **changes),
        fake_run(
            tmp_path / "m",
            task="segmentation",
            classes=classes,
            store=record | {"hashes": {**record["hashes"], "labels": "l2"}},
        ),
    ]
    table = pd.read_parquet(runs[1] / "predictions.parquet")
    table.assign(tile_id=HOSTILE + table["tile_id"]).to_parquet(runs[1] / "predictions.parquet")
    saved = dict(np.load(runs[1] / "masks.npz"))
    np.savez(runs[1] / "masks.npz", **saved | {"tile_id": np.char.add(HOSTILE, saved["tile_id"])})
    probe = fake_probe(tmp_path / "p", command=HOSTILE, store=record)
    swept = pd.read_parquet(probe / "probe.parquet")
    swept["layer"] = swept["layer"].where(swept["layer"].isna(), HOSTILE + swept["layer"].fillna(""))
    swept.assign(probe=HOSTILE, labels=HOSTILE).to_parquet(probe / "probe.parquet")
    page = page_of([*runs, probe], tmp_path, title=HOSTILE)
    assert page.words.count(HOSTILE.split("</script>")[0]) > 30
    assert len(page.all("script")) == 1
    assert "49" not in re.findall(r"onerror=alert\(1\)>\"'(\d+)", page.words)
    assert all((a.get("src") or "").startswith("data:image/") for a in page.all("img"))
    assert not any(name.startswith("on") for _, a in page.tags for name in a)


def test_runs_of_other_labels_have_a_chapter_of_their_own(tmp_path: Path) -> None:
    hashes = {"feature": "f1", "contents": "c1", "labels": "other"}
    runs = [
        fake_run(tmp_path / "a"),
        fake_run(tmp_path / "b", store={"path": "far/roads.zarr", "hashes": hashes}),
    ]
    page = page_of(runs, tmp_path)
    assert page.words.count("Chosen: ") == 2
    assert re.search(r"roads\.\s+Chosen: b, ", page.words)
    assert "The chosen run: a" in page.words
    assert "The chosen run: b" in page.words
    fake_run(tmp_path / "c", store={"path": "features.zarr", "hashes": hashes})
    page = page_of([runs[0], tmp_path / "c"], tmp_path)
    assert re.findall(r"<h2 id=\"c\d\">(.+)</h2>", page.source) == [
        "features, labels l1",
        "features, labels other",
        "Across data sets",
    ]


def test_broken_runs_are_named(classification_runs: list[Path], tmp_path: Path) -> None:
    run, out = classification_runs[1], tmp_path / "r.html"
    table = pd.read_parquet(run / "predictions.parquet").drop(columns="predicted")
    table.to_parquet(run / "predictions.parquet")
    with pytest.raises(
        RunError, match=r"global_1/predictions.parquet has no predicted; measure the run again"
    ):
        write_report([run], out, "")
    (run / "predictions.parquet").unlink()
    with pytest.raises(RunError, match=r"global_1/predictions.parquet is missing; measure the run again"):
        write_report([run], out, "")
    assert not out.exists()


def test_runs_and_probes_are_found_in_a_folder_and_beside_it(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, fusion=fusion) for name, fusion in (("a", "global"), ("b", "moe"))]
    probe = fake_probe(tmp_path / "sweep")
    (tmp_path / "notes").mkdir()
    assert find_reported([tmp_path]) == (runs, [probe])
    assert find_reported([probe, runs[1]]) == ([runs[1]], [probe])
    other = fake_run(tmp_path / "notes/far/x")
    assert find_reported([other, tmp_path, runs[0]]) == ([other, *runs], [probe])


def test_runs_of_few_labels_have_a_curve(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / f"moe-{tiles}-{draw}", fusion="moe", seed=draw, skill=skill, train_tiles=tiles,
                 fit={"labels": f"{tiles}%", "draw": draw})
        for tiles, draw, skill in ((10, 0, 0.5), (10, 1, 0.6), (100, 0, 0.9))
    ]  # fmt: skip
    page = page_of(runs, tmp_path)
    reported = [json.loads((run / "metrics.json").read_text())["test"]["accuracy"] for run in runs]
    assert f"<title>moe: {np.mean(reported[:2]):.4g} at 10</title>" in page.source
    assert f"<title>moe: {reported[2]:.4g} at 100</title>" in page.source
    assert "How few labels suffice" in page.words
    assert "How few labels suffice" not in page_of(runs[:2], tmp_path).words


def test_the_board_of_a_sweep_is_shown(classification_runs: list[Path], tmp_path: Path) -> None:
    board = pd.DataFrame({"run": ["moe-lr0.1", HOSTILE], "val": [0.75, 0.5], "lr": [0.1, 0.2]})
    board.to_csv(tmp_path / "leaderboard.csv", index=False)
    page = page_of(classification_runs, tmp_path)
    assert re.search(r"run\s*val\s*lr\s*moe-lr0\.1\s*0\.75\s*0\.1", page.words)
    assert HOSTILE.split("</script>")[0] in page.words
    assert len(page.all("script")) == 1


def test_a_folder_of_neither_is_told_what_one_holds(tmp_path: Path) -> None:
    for folder, hint in ((tmp_path, ""), (tmp_path / "begun", "; its training is unfinished")):
        message = (
            rf"{folder}: not a run \(no run.json\){hint}; a run is a folder with settings.yaml, run.json and "
            "metrics.json; make one with `satdifuser fit`"
        )
        (tmp_path / "begun").mkdir(exist_ok=True)
        (tmp_path / "begun/checkpoint.pt").write_bytes(b"")
        with pytest.raises(RunError, match=message):
            find_reported([folder])
    with pytest.raises(RunError, match="nowhere: no such run folder"):
        find_reported([tmp_path / "nowhere"])


def test_command_line_reports_folders_and_refuses_others(
    classification_runs: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    assert succeed("report", tmp_path, "-o", out).strip() == str(out)
    assert "Chosen: global + linear" in Page(out).words
    assert "no such run folder" in refuse("report", tmp_path / "nowhere", "-o", out)
    assert "no such store" in refuse("report", tmp_path, "--store", tmp_path / "none.zarr", "-o", out)
