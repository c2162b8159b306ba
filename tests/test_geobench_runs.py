"""GEO-Bench from its files to the report: several classes per tile, several partitions, one extraction."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner, Result
from made_up_geobench import CLASSES, Bench, fake_geobench

from satdifuser.cli import cli
from satdifuser.errors import SettingsError, StoreError
from satdifuser.fuse.data import labelled
from satdifuser.fuse.run_folder import open_run
from satdifuser.store.reader import FeatureStore, open_store

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

SPLITS = {"train": list("abcdef"), "valid": list("ghi"), "test": list("jkl")}
HALF = {"train": list("abc"), "valid": list("gh"), "test": list("ijkl")}  # train holds no town
TESTED = {"default": "jkl", "0.50x_train": "ijkl"}
LABELS = dict(zip("abcdefghijkl", ["100", "010", "110", "001", "101", "011"] * 2, strict=True))
SMALL: dict[str, Any] = {
    "extract": {"timesteps": [21], "layers": ["up_blocks.1.*attn1"], "batch_size": 4, "threads": 1},
    "backbone": {"device": "cpu"},
    "store": {"tiles_per_shard": 5},
    "fit": {"fusion": ["global"], "projection": 8, "norm_groups": 1, "epochs": 2, "device": "cpu"},
    "evaluate": {"bootstrap": 20, "pictures": 2},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Twelve tiles with one or two of three classes."""
    with pytest.MonkeyPatch.context() as patch:
        made = Bench(tmp_path_factory.mktemp("bench"), fake_geobench(patch, "geobench"))
        made.task("label.MultiLabelClassification", n_classes=3, class_name=CLASSES)
        for name, label in LABELS.items():
            made.sample(name, label=np.array([int(digit) for digit in label]))
        made.partition("default", **SPLITS)
        made.partition("0.50x_train", **HALF)
    return made


@pytest.fixture(scope="module")
def config(bench: Bench) -> Path:
    source = {"kind": "geobench", "root": str(bench.root), "dataset": "m-eurosat"}
    path = bench.root / "small.yaml"
    path.write_text(yaml.safe_dump({"source": source, **SMALL}))
    return path


@pytest.fixture(scope="module")
def store(config: Path) -> FeatureStore:
    path = config.parent / "bench.zarr"
    succeed("extract", "-c", config, "-o", path)
    return open_store(path)


@pytest.fixture(scope="module")
def runs(config: Path, store: FeatureStore) -> dict[str, Path]:
    """Folders of the runs on each partition."""
    folders = {name: config.parent / f"runs-{name}" for name in ("default", "0.50x_train")}
    for name, folder in folders.items():
        succeed("fit", store.path, "-c", config, "--set", f"fit.partition={name}", "-o", folder)
        succeed("evaluate", folder, "-c", config)
    return folders


def call(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def succeed(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def ids(store: FeatureStore, split: str, partition: str = "auto") -> str:
    return "".join(store.tiles.tile_id[labelled(store, split, partition)])


def test_the_store_holds_every_tile_once_with_its_classes_and_all_partitions(store: FeatureStore) -> None:
    rows = store.select()
    targets = store.targets(rows)
    assert targets is not None
    assert (targets.dtype, targets.shape) == (np.uint8, (12, 3))
    assert ["".join(map(str, row)) for row in targets] == list(LABELS.values())
    assert store.tiles.labels[2] == "wood;field"
    assert store.partitions() == ["default", "0.50x_train"]
    assert (ids(store, "train"), ids(store, "train", "0.50x_train")) == ("abcdef", "abc")
    assert (ids(store, "val", "0.50x_train"), ids(store, "test", "0.50x_train")) == ("gh", "ijkl")
    info = json.loads(succeed("store", "info", "--json", store.path))
    assert info["partition"] == "default"
    assert info["partitions"]["0.50x_train"] == {"none": 3, "train": 3, "val": 2, "test": 4}
    words = succeed("store", "info", store.path)
    assert "partition  default (in use): 6 train, 3 val, 3 test" in words
    assert "partition  0.50x_train: 3 none, 3 train, 2 val, 4 test" in words
    succeed("store", "verify", "--deep", store.path)


def test_a_run_records_its_partition_and_is_trained_and_measured_on_it(
    store: FeatureStore, runs: dict[str, Path]
) -> None:
    for name, folder in runs.items():
        found = {path.name: open_run(path) for path in folder.iterdir() if path.is_dir()}
        assert set(found) == {"global-seed0", "baseline-colour", "baseline-single", "baseline-concatenation"}
        for run in found.values():
            assert run.info["partition"] == run.metrics["partition"] == name
            head = "shortcut" if run.info["kind"] == "fusion" else "linear"
            assert (run.info["task"], run.info["head"]) == ("multilabel", head)
            table = pd.read_parquet(run.path / "predictions.parquet")
            assert "".join(table["tile_id"]) == TESTED[name]
            assert np.stack(table["target"])[-3:].tolist() == [[0, 0, 1], [1, 0, 1], [0, 1, 1]]
            assert np.stack(table["predicted"]).shape == (len(TESTED[name]), 3)
        assert found["global-seed0"].info["identity"]["settings"]["partition"] == name
        assert found["global-seed0"].info["resolved"]["partition"] == name
    weights = [(folder / "global-seed0/model.safetensors").read_bytes() for folder in runs.values()]
    assert weights[0] != weights[1]
    whole, half = (open_run(folder / "baseline-concatenation").info["parameters"] for folder in runs.values())
    assert half * 3 == whole * 2  # no model for the class that half of train lacks


def test_evaluate_reads_the_runs_own_partition(runs: dict[str, Path], config: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["0.50x_train"] / "global-seed0", tmp_path / "run"))
    words = ("--json", "--set", "evaluate.split=train", "--set", "evaluate.bootstrap=20")
    metrics = json.loads(succeed("evaluate", run, *words))
    assert metrics["partition"] == "0.50x_train"
    assert "".join(pd.read_parquet(run / "predictions.parquet")["tile_id"]) == "abc"
    figures = {"accuracy", "f1_macro", "f1_micro", "average_precision"}
    assert set(metrics["train"]["interval"]) == figures
    low, high = metrics["train"]["interval"]["f1_micro"]
    assert low <= metrics["train"]["f1_micro"] <= high
    assert "train f1_micro" in succeed("evaluate", run, *words[1:])
    chosen = open_run(run).info["history"][open_run(run).info["best_epoch"] - 1]["val"]
    val = json.loads(succeed("evaluate", run, "--json", "--set", "evaluate.split=val"))["val"]
    assert {name: val[name] for name in figures} == pytest.approx(chosen, nan_ok=True)


def test_the_report_shows_classes_and_no_confusion_matrix(runs: dict[str, Path], tmp_path: Path) -> None:
    page = Path(succeed("report", runs["0.50x_train"], "-o", tmp_path / "r.html").strip()).read_text()
    assert "(partition 0.50x_train)" in page
    assert "Confusion matrix" not in page
    assert "Support is the number of test tiles of the class;" in page
    assert "f1_micro: over all tiles and classes together" in page
    assert "truth: field, town" in page


def test_runs_of_two_partitions_do_not_share_a_table(runs: dict[str, Path], tmp_path: Path) -> None:
    result = call("report", *runs.values(), "-o", tmp_path / "r.html")
    assert result.exit_code == 1
    assert "a table needs runs of one partition, got: " in result.stderr
    assert "(default), " in result.stderr
    assert "(0.50x_train); name runs that can be compared" in result.stderr


def test_runs_of_another_partition_are_not_replaced(
    store: FeatureStore, runs: dict[str, Path], config: Path
) -> None:
    other = ("fit", store.path, "-c", config, "-o", runs["default"], "--set", "fit.partition=0.50x_train")
    result = call(*other)
    assert result.exit_code == 1
    assert (
        "baseline-colour: holds a baseline of partition default, asked for 0.50x_train; write to another "
        "folder, or replace it with --overwrite"
    ) in result.stderr
    result = call(*other, "--set", "evaluate.baselines=false")
    assert "settings.partition: run has 'default', asked for '0.50x_train'" in result.stderr
    succeed(*other[:-1], "fit.partition=auto")  # the default one by its other name: nothing is done again


def test_a_partition_that_is_not_held_is_named(store: FeatureStore, config: Path, tmp_path: Path) -> None:
    words = ("fit", store.path, "-c", config, "-o", tmp_path / "runs")
    message = (
        f"fit.partition: {store.path} holds no partition '0.5x_train'; it holds default, 0.50x_train; did "
        "you mean 0.50x_train?"
    )
    for baselines in ("true", "false"):
        evaluate = f"evaluate.baselines={baselines}"
        result = call(*words, "--set", "fit.partition=0.5x_train", "--set", evaluate)
        assert result.exit_code == 2
        assert message in result.stderr
    assert not (tmp_path / "runs").exists()
    with pytest.raises(SettingsError, match=r"holds no partition '0\.5x_train'"):
        store.select("train", "0.5x_train")
    with pytest.raises(StoreError, match="in split 'none'; the store holds 6 train, 3 val, 3 test; "):
        store.select("none", "default")


def test_the_partition_the_source_was_asked_for_is_the_one_in_use(config: Path, tmp_path: Path) -> None:
    """The data set's own default partition keeps its name."""
    path = tmp_path / "half.zarr"
    words = ("extract", "-c", config, "-o", path, "--set", "source.partition=0.50x_train")
    succeed(*words)
    store = open_store(path)
    assert (ids(store, "train"), ids(store, "train", "default")) == ("abc", "abcdef")
    assert store.split_counts() == {"none": 3, "train": 3, "val": 2, "test": 4}
    assert "".join(store.tiles.tile_id[store.tiles.split == "none"]) == "def"
    assert store.tiles.split[0] == "train"
    result = call(*words[:-2])
    assert result.exit_code == 1
    assert "source.partition: store has '0.50x_train', asked for 'default'" in result.stderr
    assert "(fit.partition chooses among the partitions that this store holds: no need to" in result.stderr


def test_other_partitions_are_other_labels(bench: Bench, config: Path, store: FeatureStore) -> None:
    """A partition that nobody uses yet counts too: a later fit may ask for it."""
    before = store.hashes().labels
    edited = Path(shutil.copytree(bench.root, bench.root.with_name("edited")))
    path = edited / "classification_v1.0/m-eurosat/0.50x_train_partition.json"
    words = ("extract", "-c", config, "--set", f"source.root={edited}", "-o")
    copy, fresh = edited / "copy.zarr", edited / "fresh.zarr"
    succeed(*words, copy)
    assert open_store(copy).hashes().labels == before
    path.write_text(json.dumps(HALF | {"train": ["d"]}))
    result = call(*words, copy)
    assert result.exit_code == 1
    assert "the tiles' ids, splits or labels differ" in result.stderr
    succeed(*words, fresh)
    assert open_store(fresh).hashes().labels != before


@pytest.mark.parametrize("name", ["a b", ".hidden", "", "é"])
def test_a_partition_whose_name_no_array_can_have(
    bench: Bench, config: Path, tmp_path: Path, name: str
) -> None:
    path = bench.folder / f"{name}_partition.json"
    path.write_text(json.dumps(HALF))
    try:
        result = call("extract", "-c", config, "-o", tmp_path / "s.zarr")
    finally:
        path.unlink()
    assert result.exit_code == 1
    assert f"partition {name!r}: a store keeps each partition under its name, which must" in result.stderr
    assert not (tmp_path / "s.zarr").exists()


def test_the_shared_multilabel_data_set(shared: Path, tmp_path: Path) -> None:
    root = shared / "data/geobench"
    source = {"kind": "geobench", "root": str(root), "dataset": "m-bigearthnet"}
    config = tmp_path / "b.yaml"
    sections = SMALL | {"source": source, "fit": SMALL["fit"] | {"epochs": 1}}
    config.write_text(yaml.safe_dump(sections | {"evaluate": {"bootstrap": 20, "baselines": False}}))
    succeed("extract", "-c", config, "-o", tmp_path / "b.zarr")
    store = open_store(tmp_path / "b.zarr")
    assert (store.attributes.task, store.partitions()) == ("multilabel", ["default", "0.50x_train"])
    table = succeed("fit", store.path, "-c", config, "-o", tmp_path / "runs")
    assert "val f1_micro" in table
    succeed("evaluate", tmp_path / "runs", "-c", config)
    assert open_run(tmp_path / "runs/global-seed0").metrics["test"]["f1_micro"] >= 0
