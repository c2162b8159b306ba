"""Rows with torchgeo-bench's columns, of runs and probes."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from command_line import refuse, succeed
from made_up_labelled import SIZE, labelled_store

import satdifuser
from satdifuser.evaluate.interchange import COLUMNS, dataset_name, probe_method
from satdifuser.evaluate.probe_folder import open_probe
from satdifuser.fuse.run_folder import open_run

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
QUICK = {"evaluate": {"bootstrap": 10}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, a probe of it with few labels, and two runs."""
    root = tmp_path_factory.mktemp("results")
    store = labelled_store(root / "s.zarr", "classification")
    probes = ["logistic", "neighbours"]
    satdifuser.probe(
        store, root / "probe", labels="50%,100%", draws=2, probes=probes, inputs=["single"], **QUICK
    )
    few = ["--set", "fit.fusion=[global]", "--set", "fit.epochs=1", "--set", "evaluate.bootstrap=10"]
    succeed("fit", root / "s.zarr", "-o", root / "runs", "--shots", "1", *few)
    succeed("evaluate", root / "runs", "--set", "evaluate.bootstrap=10")
    return root


def rows_of(*words: object) -> pd.DataFrame:
    return pd.read_csv(StringIO(succeed("interchange", *words)))


def test_a_probe_gives_a_row_for_what_was_chosen(folder: Path) -> None:
    rows, table = rows_of(folder / "probe"), open_probe(folder / "probe")[0]
    assert list(rows.columns) == COLUMNS
    test = table[(table["split"] == "test") & (table["metric"] == "accuracy")].reset_index(drop=True)
    assert len(rows) == len(test) == 2 * 3
    for ours, theirs in {"metric_value": "value", "ci_lower": "low", "ci_upper": "high"}.items():
        pd.testing.assert_series_equal(rows[ours], test[theirs], check_names=False)
    for name in ("n_train", "n_val", "n_test"):
        assert rows[name].tolist() == test[name].tolist()
    assert set(rows["dataset"]) == {"synthetic"}
    assert set(rows["metric_name"]) == {"accuracy"}
    assert set(rows["partition"]) == {"50%", "default"}
    few = rows[(rows["partition"] == "50%") & (rows["method"] == "linear")]
    assert sorted(few["seed"]) == [0, 1]  # the draws
    linear = rows["method"] == "linear"
    assert rows.loc[linear, "best_c"].tolist() == test.loc[linear, "strength"].tolist()
    assert rows.loc[~linear, "best_c"].isna().all()
    assert rows.loc[~linear, "method"].str.match(r"knn\d+$").all()
    assert (rows["normalization"].iloc[0], rows["bands"].iloc[0]) == ("model_native", "rgb")
    assert set(rows["image_size"]) == {SIZE}
    assert rows["name"].str.contains("t = 21, up.").all()


def test_runs_stand_beside(folder: Path) -> None:
    rows = rows_of(folder / "runs", folder / "probe")
    runs = rows[~rows["name"].str.contains("t = 21")].set_index("method")
    assert {"global-shortcut", "colour", "single", "concatenation"} == set(runs.index)
    (network,) = (path for path in (folder / "runs").iterdir() if path.name.startswith("global"))
    metrics = open_run(network).metrics["test"]
    row = runs.loc["global-shortcut"]
    assert row["metric_value"] == metrics["accuracy"]
    assert [row["ci_lower"], row["ci_upper"]] == metrics["interval"]["accuracy"]
    assert (row["n_train"], row["n_val"], row["n_test"]) == (3, 6, 6)  # 1 shot of 3 classes
    assert (row["partition"], row["dataset"], row["image_size"]) == ("1 shot", "synthetic", SIZE)
    assert (runs.loc["single", "n_train"], runs.loc["single", "partition"]) == (12, "default")
    assert runs.loc["single", "best_c"] == open_run(folder / "runs/baseline-single").info["strength"]


def test_rows_go_to_a_file_that_is_not_replaced_by_itself(folder: Path, tmp_path: Path) -> None:
    words = ["interchange", folder / "probe", "-o", tmp_path / "rows.csv"]
    assert succeed(*words).strip() == str(tmp_path / "rows.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "rows.csv"), rows_of(folder / "probe"))
    assert "is there; choose another name, or replace it with --overwrite" in refuse(*words)
    succeed(*words, "--overwrite")


def test_of_a_folder_of_runs_those_that_are_best_on_val_have_rows(folder: Path, tmp_path: Path) -> None:
    few = ["--set", "fit.fusion=[global]", "--set", "fit.epochs=1", "--set", "evaluate.bootstrap=10"]
    few += ["--set", "evaluate.baselines=false", "--set", "fit.lr=[0.001,0.1]"]
    succeed("fit", folder / "s.zarr", "-o", tmp_path / "runs", *few)
    succeed("evaluate", tmp_path / "runs", "--set", "evaluate.bootstrap=10")
    rows = rows_of(tmp_path / "runs")
    runs = [open_run(path) for path in (tmp_path / "runs").glob("global*")]
    best = max(runs, key=lambda run: run.metrics["val"]["accuracy"])
    assert [name.rsplit(", ")[-1] for name in rows["name"]] == [best.info["name"]]


def test_what_was_not_measured_on_test_is_refused(folder: Path, tmp_path: Path) -> None:
    store = satdifuser.open_store(folder / "s.zarr")
    satdifuser.probe(store, tmp_path / "p", test=False, probes=["ridge"], inputs=["all"])
    assert "nothing was measured on test; run `satdifuser probe` without --no-test" in refuse(
        "interchange", tmp_path / "p"
    )
    succeed(
        "fit",
        folder / "s.zarr",
        "-o",
        tmp_path / "runs",
        "--set",
        "fit.fusion=[global]",
        "--set",
        "fit.epochs=1",
    )
    (run,) = (path for path in (tmp_path / "runs").iterdir() if path.name.startswith("global"))
    assert f"{run}: was not measured on test; run `satdifuser evaluate {run}`" in refuse("interchange", run)
    assert "no such run folder" in refuse("interchange", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"kind": "geobench", "root": "/data", "dataset": "m-eurosat"}, "m-eurosat"),
        ({"kind": "folder", "root": "/data/eurosat/"}, "eurosat"),
        ({"kind": "scenes", "root": "/data/scene.tif"}, "scene"),
        ({"kind": "python", "target": "mydata:EuroSAT"}, "mydata:EuroSAT"),
        ({"kind": "synthetic"}, "synthetic"),
    ],
)
def test_data_sets_have_names(source: dict[str, str], name: str) -> None:
    assert dataset_name(source) == name


def test_methods_have_their_names() -> None:
    assert probe_method("classification", "logistic", 1.0) == "linear"
    assert probe_method("classification", "neighbours", 5.0) == "knn5"
    assert probe_method("segmentation", "logistic", 1.0) == "seg-linear"
    assert probe_method("segmentation", "ridge", 1.0) == "seg-ridge"
