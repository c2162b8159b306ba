"""Sweeps of probes: chosen on val, blind to test, resumable, the same on any number of workers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from command_line import call, refuse, succeed
from made_up_labelled import CLASSES, LAYERS, SPLITS, labelled_store
from numpy.typing import NDArray

import satdifuser
from satdifuser.errors import ClusterError, RunError
from satdifuser.evaluate import probe_sweep, probe_workers
from satdifuser.evaluate.evaluation import new_outcome
from satdifuser.evaluate.probe_cells import Cell, Row, SweepData, fit_cell, list_cells
from satdifuser.evaluate.probe_folder import COLUMNS, JOURNAL_FILE, open_probe
from satdifuser.evaluate.probe_predictions import predict_with
from satdifuser.evaluate.probes import fit_probes
from satdifuser.evaluate.report.probes import open_probe as open_for_report
from satdifuser.evaluate.report.probes import probe_figures
from satdifuser.evaluate.samples import gather_samples
from satdifuser.evaluate.settings import ProbeSettings
from satdifuser.store.reader import FeatureStore, Indices

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
TASKS = ["classification", "multilabel", "segmentation"]
STEPS = (21, 61)
QUICK: dict[str, Any] = {"evaluate": {"bootstrap": 10}}
INPUTS = ["labels", "draw", "inputs", "timestep", "layer", "probe", "strength"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return labelled_store(tmp_path_factory.mktemp("labels") / "s.zarr", "classification", 0, STEPS, blur=0.4)


@pytest.fixture(scope="module")
def mask_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return labelled_store(tmp_path_factory.mktemp("masks") / "s.zarr", "segmentation", 0, STEPS)


@pytest.fixture(scope="module")
def swept(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept") / "probe"
    satdifuser.probe(store, folder, **QUICK)
    return folder


def told(table: pd.DataFrame) -> pd.DataFrame:
    """A table without its timings."""
    return table.drop(columns="seconds")


def test_the_table_holds_every_cell_probe_and_strength(store: FeatureStore, swept: Path) -> None:
    table, info = open_probe(swept)
    assert list(table.columns) == COLUMNS
    val, settings = table[table["split"] == "val"], ProbeSettings()
    neighbours = [count for count in settings.neighbours if count <= 12]
    per_cell = len(settings.logistic) + len(settings.ridge) + len(neighbours)
    cells = {"single": 4, "timestep": 2, "layer": 2, "all": 1}
    assert val["inputs"].value_counts().to_dict() == {kind: n * per_cell for kind, n in cells.items()}
    assert set(val["metric"]) == {"accuracy"}
    assert val[["low", "high"]].isna().all(axis=None)
    facts = table[["dataset", "partition", "labels", "draw", "n_train", "n_val", "n_test", "seed"]]
    assert facts.drop_duplicates().values.tolist() == [["synthetic", "default", "100%", 0, 12, 6, 6, 0]]
    singles = table[table["inputs"] == "single"]
    strides = {layer.name: layer.stride for layer in LAYERS}
    assert singles["stride"].tolist() == [strides[name] for name in singles["layer"]]
    assert (
        table.loc[table["inputs"] != "single", "stride"].notna().sum() == (table["inputs"] == "layer").sum()
    )
    everything = table[table["inputs"] == "all"]
    assert everything[["timestep", "layer"]].isna().all(axis=None)
    written = pd.read_csv(swept / "probe.csv")
    pd.testing.assert_frame_equal(written, table, check_dtype=False)
    assert info["kind"] == "probe"
    assert info["store"]["hashes"] == store.hashes().model_dump()
    assert info["settings"]["draws"] == 5
    assert (info["version"], info["selected_on"]) == (satdifuser.__version__, "val")
    assert "satdifuser probe" in info["command"]


def test_the_best_on_val_of_each_kind_of_inputs_is_chosen_and_measured_on_test(
    store: FeatureStore, swept: Path
) -> None:
    table, info = open_probe(swept)
    val, test = table[table["split"] == "val"], table[table["split"] == "test"]
    best = val.groupby(["inputs", "probe"])["value"].transform("max")
    chosen = val[val["chosen"]]
    assert len(chosen) == 4 * 3 == info["test_reads"]
    assert (chosen["value"] == best[chosen.index]).all()
    assert test["chosen"].all()
    measured, wanted = (set(map(tuple, t[INPUTS].astype(str).to_numpy().tolist())) for t in (test, chosen))
    assert measured == wanted
    assert set(test["metric"]) == {"accuracy", "f1_macro", "f1_micro", "average_precision"}
    assert (test["low"] <= test["value"]).all()
    assert (test["value"] <= test["high"]).all()


def test_rows_are_those_of_probes_fitted_by_hand(store: FeatureStore, swept: Path) -> None:
    table, _ = open_probe(swept)
    train, val, test = (gather_samples(store, store.select(split), 0) for split in ("train", "val", "test"))
    keys = [(21, "up.fine"), (21, "up.coarse")]
    rows = table[(table["inputs"] == "timestep") & (table["timestep"] == 21) & (table["probe"] == "ridge")]
    for row in rows[rows["metric"] == "accuracy"].to_dict("records"):
        probe = fit_probes("ridge", train.joined(keys), train.labels, CLASSES, [row["strength"]])
        samples = {"val": val, "test": test}[row["split"]]
        found = (probe.probabilities(samples.joined(keys))[0].argmax(1) == samples.labels).mean()
        assert row["value"] == pytest.approx(found)


@pytest.mark.parametrize("task", TASKS)
def test_test_tiles_have_no_part_in_a_choice(task: str, tmp_path: Path) -> None:
    """Two stores that differ in their test tiles only."""
    tables = []
    for seed in (0, 1):
        store = labelled_store(tmp_path / f"{seed}.zarr", task, seed, STEPS, blur=0.4)
        settings: dict[str, Any] = {"logistic": [0.01, 1.0], "ridge": [1.0, 100.0], **QUICK}
        tables.append(told(satdifuser.probe(store, tmp_path / f"probe{seed}", **settings)))
    val = [table[table["split"] == "val"] for table in tables]
    pd.testing.assert_frame_equal(val[0], val[1])
    assert not tables[0].equals(tables[1])


def test_without_test_its_labels_and_features_are_never_asked_for(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    gather = FeatureStore.gather

    def spy(self: FeatureStore, name: str, rows: Indices) -> Any:
        asked.extend(rows.tolist())
        return gather(self, name, rows)

    monkeypatch.setattr(FeatureStore, "gather", spy)
    table = satdifuser.probe(store, tmp_path / "probe", test=False, **QUICK)
    held_back = set(store.select("test").tolist())
    assert asked
    assert not held_back & set(asked)
    assert set(table["split"]) == {"val"}
    assert open_probe(tmp_path / "probe")[1]["test_reads"] == 0
    table = satdifuser.probe(store, tmp_path / "probe", **QUICK)  # goes on with test alone
    assert held_back <= set(asked)
    assert set(table["split"]) == {"val", "test"}
    assert open_probe(tmp_path / "probe")[1]["test_reads"] == 12


def test_an_interrupted_sweep_goes_on_where_it_stopped(
    store: FeatureStore, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[Cell] = []

    def interrupt(data: SweepData, cell: Cell) -> list[Row]:
        if len(fitted) >= 3:
            raise KeyboardInterrupt
        fitted.append(cell)
        return fit_cell(data, cell)

    words = ["probe", store.path, "-o", tmp_path / "p", "--set", "evaluate.bootstrap=10"]
    with monkeypatch.context() as patch:
        patch.setattr(probe_workers, "fit_cell", interrupt)
        result = call(*words)
    assert result.exit_code == 130
    assert "interrupted; the same command" in result.stderr
    journal = tmp_path / "p" / JOURNAL_FILE
    kept = journal.read_text().count('"cell"')
    assert 0 < kept <= 3
    with journal.open("a") as file:
        file.write('{"cell": "torn')  # by a kill
    before = len(fitted)
    monkeypatch.setattr(probe_workers, "fit_cell", lambda d, c: (fitted.append(c), fit_cell(d, c))[1])
    succeed(*words)
    assert len(fitted) - before == len(list_cells(store, ProbeSettings())) - kept
    pd.testing.assert_frame_equal(told(open_probe(tmp_path / "p")[0]), told(open_probe(swept)[0]))
    monkeypatch.setattr(probe_workers, "fit_cell", interrupt)
    succeed(*words)  # nothing is left to do
    assert open_probe(tmp_path / "p")[1]["test_reads"] == 12


def test_a_test_read_is_counted_before_it_happens(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(probe_sweep, "predict_with", interrupt)
        with pytest.raises(KeyboardInterrupt):
            satdifuser.probe(store, tmp_path / "p", probes=["ridge"], **QUICK)
    satdifuser.probe(store, tmp_path / "p", probes=["ridge"], **QUICK)
    assert open_probe(tmp_path / "p")[1]["test_reads"] == 4 + 1


def test_another_probe_is_kept_unless_it_is_to_be_replaced(
    store: FeatureStore, swept: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(swept, tmp_path / "p")
    words = ["probe", store.path, "-o", folder, "--set", "evaluate.bootstrap=10"]
    message = refuse(*words, "--set", "probe.ridge=[1.0]")
    assert "holds a probe with other settings or of another store" in message
    assert "settings.ridge: it has [30000.0" in message
    assert "asked for [1.0]" in message
    assert "--overwrite" in message
    succeed(*words, "--set", "probe.ridge=[1.0]", "--overwrite")
    assert open_probe(folder)[1]["test_reads"] == 24  # what was read once stays read
    (folder / JOURNAL_FILE).write_text("[1, 2]\nno json\n")
    with pytest.raises(RunError, match=r"cells\.jsonl: is damaged: .*; write to another folder, or probe"):
        satdifuser.probe(store, folder, ridge=[1.0], **QUICK)
    succeed(*words, "--overwrite")
    (folder / "probe.parquet").unlink()
    with pytest.raises(RunError, match=r"no readable probe: .*; run `satdifuser probe` again"):
        open_probe(folder)


def test_workers_of_dask_give_the_same_bits(store: FeatureStore, swept: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="the extra dask is not installed")
    succeed(
        *("probe", store.path, "-o", tmp_path / "p", "--set", "evaluate.bootstrap=10"),
        *("--workers", "2"),
    )
    found, expected = (open_probe(folder)[0] for folder in (tmp_path / "p", swept))
    pd.testing.assert_frame_equal(told(found), told(expected), check_exact=True)


def test_workers_that_cannot_be_had_are_told(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["probe", store.path, "-o", tmp_path / "p"]
    assert "name one of them" in refuse(*words, "--workers", "1", "--scheduler", "tcp://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ClusterError, match=r"install it with `pip install 'satdifuser\[dask\]'`"):
        satdifuser.probe(store, tmp_path / "p", workers=2)


def test_few_labels_are_drawn_several_times(store: FeatureStore, tmp_path: Path) -> None:
    output = succeed(
        *("probe", store.path, "-o", tmp_path / "p", "--labels", "50%,100%", "--shots", "1", "--draws", "2"),
        *("--set", "probe.inputs=[single]", "--set", "evaluate.bootstrap=10"),
    )
    table = open_probe(tmp_path / "p")[0]
    amounts = table.groupby(["labels", "draw"], sort=False)["n_train"].first()
    assert amounts.to_dict() == {
        ("50%", 0): 6,
        ("50%", 1): 6,
        ("100%", 0): 12,
        ("1 shot", 0): CLASSES,
        ("1 shot", 1): CLASSES,
    }
    few = table[(table["labels"] == "1 shot") & (table["probe"] == "neighbours")]
    assert set(few["strength"]) == {1.0, 3.0}  # there are no more than 3 tiles
    line = next(line for line in output.splitlines() if line.startswith("1 shot") and "logistic" in line)
    assert "±" in line


def test_masks_are_probed_by_pixel_and_measured_whole(mask_store: FeatureStore, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    summary = json.loads(
        succeed("probe", mask_store.path, "-o", folder, "--set", "evaluate.bootstrap=10", "--json")
    )
    assert {line["probe"] for line in summary} == {"logistic", "ridge"}
    table, _ = open_probe(folder)
    assert set(table.loc[table["split"] == "test", "metric"]) == {"miou", "pixel_accuracy", "f1_macro"}
    (line,) = [s for s in summary if (s["inputs"], s["probe"]) == ("single", "logistic")]
    assert line["chosen"] == "t = 21, up.fine"
    rows, key = mask_store.select("test"), [(21, "up.fine")]
    train = gather_samples(mask_store, mask_store.select("train"), 0)
    probe = fit_probes("logistic", train.joined(key), train.labels, CLASSES, [float(line["strength"])])
    outcome = new_outcome(mask_store)
    for probabilities, targets in predict_with(mask_store, probe, key, rows):
        outcome.add(probabilities, targets)
    assert line["test"] == pytest.approx(outcome.metrics()["miou"])
    message = refuse("probe", mask_store.path, "-o", tmp_path / "q", "--set", "probe.probes=[neighbours]")
    assert "neighbours are sought among tiles, but this store holds masks; use logistic, ridge" in message


def test_fits_that_do_not_converge_are_counted_and_named(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("satdifuser.evaluate.logistic.STEPS", 1)
    words = ["--set", "probe.inputs=[single]", "--set", "probe.logistic=[10.0]", "--no-test"]
    output = succeed("probe", store.path, "-o", tmp_path / "p", *words)
    table, info = open_probe(tmp_path / "p")
    failed = table[~table["converged"]]
    assert set(failed["probe"]) == {"logistic"}
    assert info["convergence_failures"] == len(failed) == len(info["failures"]) > 0
    row = failed.iloc[0]
    assert f"100%, draw 0, single: t = {row['timestep']:g}, {row['layer']}, logistic 10: gradient norm" in (
        "\n".join(info["failures"])
    )
    assert f"{len(failed)} fits did not converge; probe.json names them." in output


def test_the_report_draws_a_probe(swept: Path) -> None:
    figures = probe_figures(open_for_report(swept))
    assert [figure.title for figure in figures][-1] == "What was chosen"
    assert len(figures) == 4


# --- bad input


def changed_store(path: Path, train: Sequence[int], val: Sequence[int], task: str = "classification") -> Path:
    """A store whose training and val tiles have these classes."""
    labels = dict(zip(range(len(SPLITS)), [*train, *val], strict=False))

    class Labels:
        def __call__(self, index: int, target: NDArray[np.generic]) -> NDArray[np.generic]:
            wanted = labels.get(index)
            if wanted is None:
                return target
            return np.full_like(target, wanted)

    labelled_store(path, task, 0, STEPS, retarget=Labels())
    return path


@pytest.mark.parametrize(
    ("train", "val", "words", "code", "message"),
    [
        (
            [1] * 12,
            [1] * 6,
            [],
            1,
            "nothing to tell apart: the classes of all 12 training tiles are",
        ),
        ([0, 1] * 6, [0, 1, 2] * 2, [], 1, "no training tile has the class class 2 (2 tiles on val)"),
        ([0, 1] * 6, [0, 1] * 3, ["--shots", "7"], 2, "shots: 7 shots of each class, but there are fewer"),
        ([0, 1] * 6, [0, 1] * 3, ["--labels", "1%"], 2, "labels: 1% of the 12 training tiles leaves none of"),
        ([0, 1] * 6, [0, 1] * 3, ["--labels", "0%"], 2, "labels: got '0%', expected shares above 0%"),
        (
            [0, 1] * 6,
            [0, 1] * 3,
            ["--labels", "few"],
            2,
            "labels: got 'few', expected a share such as 10%",
        ),
        ([0, 1] * 6, [0, 1] * 3, ["--partition", "x"], 2, "holds no partition 'x'; it holds default"),
        ([0, 1] * 6, [-1] * 6, [], 1, "no tile of split 'val' has a label"),
    ],
)
def test_labels_that_cannot_be_probed_are_refused(
    train: list[int], val: list[int], words: list[str], code: int, message: str, tmp_path: Path
) -> None:
    path = changed_store(tmp_path / "s.zarr", train, val)
    result = call("probe", path, "-o", tmp_path / "p", *words)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert not (tmp_path / "p").exists()  # nothing was begun


def test_masks_that_are_ignored_are_refused(tmp_path: Path) -> None:
    path = changed_store(tmp_path / "a.zarr", [255] * 12, [], "segmentation")
    assert "(none, all pixels are ignored)" in refuse("probe", path, "-o", tmp_path / "p")
    path = changed_store(tmp_path / "b.zarr", [0, 1] * 6, [255] * 6, "segmentation")
    assert "all pixels of the masks of split 'val' are ignored" in refuse("probe", path, "-o", tmp_path / "p")


def test_a_store_without_pooled_features_is_refused(tmp_path: Path) -> None:
    store = labelled_store(tmp_path / "s.zarr", "classification")
    for group in store.groups:
        shutil.rmtree(tmp_path / "s.zarr/features" / group / "pooled")
    message = refuse("probe", tmp_path / "s.zarr", "-o", tmp_path / "p")
    assert "s.zarr" in message
    assert "pooled" in message
    assert "Traceback" not in message
