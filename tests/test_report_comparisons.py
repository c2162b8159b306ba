"""What the report says of several fits: how sure their differences are, and models over several data sets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from made_up_report import TILES, Page, fake_run

from satdifuser.evaluate.across import across_datasets
from satdifuser.evaluate.comparison import compare_fits
from satdifuser.evaluate.report.comparisons import differences_figure
from satdifuser.evaluate.report.page import write_report
from satdifuser.evaluate.results import group_seeds
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.run_folder import open_run

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
OTHER = {"path": "far/roads.zarr", "hashes": {"feature": "f2", "contents": "c2", "labels": "l2"}}


def test_the_chosen_run_is_compared_with_every_other(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "moe", fusion="moe", skill=0.9, seed=1)]
    runs += [fake_run(tmp_path / "global", skill=0.5, seed=2)]
    runs += [fake_run(tmp_path / "colour", kind="baseline", fusion=None, skill=0.95, history=[], seed=3)]
    figure = differences_figure(group_seeds([open_run(run) for run in runs]), "")
    assert figure.data is not None
    assert figure.data["against"].tolist() == ["global", "colour"]  # a baseline is never chosen
    for row, other in zip(figure.data.to_dict("records"), runs[1:], strict=True):
        found = compare_fits([open_run(runs[0])], [open_run(other)], EvaluateSettings())
        accuracy, test = found["metrics"]["accuracy"], found["mcnemar"]
        assert [row[name] for name in ("difference", "ahead")] == [accuracy["difference"], accuracy["ahead"]]
        assert [row["low"], row["high"]] == accuracy["interval"]
        assert [row[name] for name in ("chosen", "other", "p")] == list(test.values())
    assert figure.command.splitlines()[1] == f"satdifuser evaluate --compare {runs[0]} {runs[2]}"
    page = Page(write_report(runs, tmp_path / "r.html", "satdifuser report x"))
    number = r"([+-]\d\.\d{3})"
    cells = re.search(rf"McNemar p\s*global{number}{number} to {number}([\d.]+)% of draws", page.words)
    assert cells
    first = figure.data.iloc[0]
    assert list(cells.groups()[:3]) == [f"{first[name]:+.3f}" for name in ("difference", "low", "high")]
    assert float(cells[4]) == pytest.approx(100 * first["ahead"], abs=0.05)
    assert f"on the {TILES} tiles of test" in page.words


def test_seeds_are_compared_by_their_mean_and_named_together(tmp_path: Path) -> None:
    names = [(fusion, seed) for fusion in ("moe", "global") for seed in (0, 1)]
    runs = [fake_run(tmp_path / f"{fusion}-seed{s}", fusion=fusion, seed=s) for fusion, s in names]
    groups = group_seeds([open_run(run) for run in runs])
    figure = differences_figure(groups, "")
    assert figure.command == f"satdifuser evaluate --compare {tmp_path}/moe {tmp_path}/global"
    assert figure.data is not None
    assert figure.data["p"].isna().all()  # McNemar's test is of single runs
    found = compare_fits(*groups, EvaluateSettings())
    assert figure.data["difference"].tolist() == [found["metrics"]["accuracy"]["difference"]]


def test_masks_are_compared_tile_by_tile(tmp_path: Path) -> None:
    runs = [
        fake_run(tmp_path / fusion, task="segmentation", fusion=fusion, skill=skill, seed=seed)
        for seed, (fusion, skill) in enumerate((("moe", 0.9), ("global", 0.5)))
    ]
    page = Page(write_report(runs, tmp_path / "r.html", "satdifuser report x"))
    found = compare_fits(*([open_run(run)] for run in runs), EvaluateSettings())["tile_iou"]
    assert f"{found['first_ahead']}, {found['second_ahead']}" in page.words
    assert f"{found['p']:.3g}" in page.words
    assert "Wilcoxon p" in page.words


def test_runs_of_other_tiles_are_not_compared_and_the_page_says_why(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / fusion, fusion=fusion) for fusion in ("moe", "global")]
    table = pd.read_parquet(runs[1] / "predictions.parquet")
    table.iloc[1:].to_parquet(runs[1] / "predictions.parquet")
    page = Page(write_report(runs, tmp_path / "r.html", "satdifuser report x"))
    assert re.search(r"Not shown: .*measured on 40 tiles and .* on 39, with 1 in one of them", page.words)
    alone = Page(write_report(runs[:1], tmp_path / "r.html", "satdifuser report x"))
    assert "How sure the differences are" not in alone.words


def two_data_sets(folder: Path) -> list[Path]:
    """moe and global with two seeds each on two data sets."""
    runs = []
    for dataset, changes in (("fields", {}), ("roads", {"store": OTHER})):
        for number, (fusion, seed) in enumerate((f, s) for f in ("moe", "global") for s in (0, 1)):
            skill = 0.5 + 0.1 * number
            path = folder / dataset / f"{fusion}-seed{seed}"
            runs.append(fake_run(path, fusion=fusion, seed=seed, skill=skill, **changes))
            source = {"source": {"kind": "folder", "root": f"/data/{dataset}"}}
            (path / "settings.yaml").write_text(yaml.safe_dump(source))
    return runs


def test_models_are_summed_up_over_data_sets(tmp_path: Path) -> None:
    runs = two_data_sets(tmp_path)
    page = Page(write_report(runs, tmp_path / "r.html", "satdifuser report x"))
    table = across_datasets(runs, EvaluateSettings()).to_dict("records")
    assert {"fields", "roads"} < set(table[0])
    for row in table:
        cells = [row["model"], f"{row['iqm']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", "4"]
        cells += [f"{row[name]:.3f}" for name in ("fields", "roads")]
        assert re.search(r"\s*".join(map(re.escape, cells)), page.words)
    assert f"satdifuser evaluate --across {runs[0]} " in page.words
    one = Page(write_report(runs[:4], tmp_path / "r.html", "satdifuser report x"))
    assert "Across data sets" not in one.words


def test_a_model_that_lacks_a_data_set_is_told(tmp_path: Path) -> None:
    runs = two_data_sets(tmp_path)
    page = Page(write_report(runs[:6], tmp_path / "r.html", "satdifuser report x"))
    assert "Not shown: global was not measured on roads; every model needs a run on each" in page.words
    metrics = json.loads((runs[5] / "metrics.json").read_text())
    assert "test" in metrics
