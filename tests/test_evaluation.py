"""Measuring runs, on a made-up store: what is written, and when it is measured again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from made_up import store_attributes
from numpy.typing import NDArray

from satdifuser.errors import RunError
from satdifuser.evaluate import evaluation
from satdifuser.evaluate.evaluation import (
    Outcome,
    check_features,
    ensure_evaluated,
    evaluate_run,
    format_metrics,
    new_outcome,
    spread_positions,
)
from satdifuser.evaluate.results import format_table, results_table
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.data import MapLoader
from satdifuser.fuse.fit import fit
from satdifuser.fuse.run_folder import Run, open_run
from satdifuser.fuse.settings import FitSettings, SweepSettings
from satdifuser.pipeline import Pipeline, validate_settings
from satdifuser.stages import fit_all
from satdifuser.store.encoding import encode
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import Hashes, LayerInfo
from satdifuser.store.writer import TileRow

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

SPLITS = ["train"] * 8 + ["val"] * 4 + ["test"] * 12
LAYER = LayerInfo(name="up.attn1", channels=4, stride=4, height=4, width=4)
QUICK = EvaluateSettings(bootstrap=10, pictures=3)
SHARED = set(FitSettings.model_fields) & set(SweepSettings.model_fields)
FIT = FitSettings(projection=8, norm_groups=1, epochs=1, warmup_epochs=0, device="cpu")


def make_store(
    path: Path, task: str, classes: int = 3, feature_hash: str = "f", splits: Sequence[str] = SPLITS
) -> FeatureStore:
    """Write a store of 16 x 16 px tiles whose features know a little of the targets."""
    attributes = store_attributes(
        task=task,
        classes=[f"class {c}" for c in range(classes)],
        tiles=len(splits),
        tile_size=(16, 16),
        tiles_per_shard=len(splits),
        timesteps=[21],
        layers=[LAYER],
        encoding="float32",
        previews=False,
        colour_statistics=["mean"],
        planned=Hashes(feature=feature_hash, contents="c", labels="l"),
        settings={"source": {"kind": "synthetic"}, "extract": {"seed": 0}},
    )
    random = np.random.default_rng(0)
    coarse = random.integers(0, classes, (len(splits), 4, 4))
    labels = coarse[:, 0, 0]
    known = coarse if task == "segmentation" else np.broadcast_to(labels[:, None, None], coarse.shape)
    maps = random.normal(size=(len(splits), 1, 1, 4, 4, 4)).astype(np.float32)
    maps[:, 0, 0, 0] += known
    masks = coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)
    targets: list[Any] = list(labels.astype(np.int32)) if task == "classification" else list(masks)
    if task == "multilabel":
        targets = list((np.arange(classes) <= labels[:, None]).astype(np.uint8))
        targets[0] = targets[-1] = np.full(classes, 255, np.uint8)  # not labelled
    rows = [
        TileRow(f"t{i:02}", split, colour=np.zeros(1, np.float32), target=np.asarray(target))
        for i, (split, target) in enumerate(zip(splits, targets, strict=True))
    ]
    writer = open_or_create(path, attributes, overwrite=False)
    writer.write_shard(0, rows, [{"stride_04": encode(maps, "float32")}], {})
    return FeatureStore(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("labels") / "s.zarr", "classification")


@pytest.fixture(scope="module")
def mask_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("masks") / "s.zarr", "segmentation")


@pytest.fixture
def run(store: FeatureStore, tmp_path: Path) -> Run:
    return fit(store, FIT, "global", 0, tmp_path / "run", new_outcome)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[EvaluateSettings]:
    """The settings of every evaluation, in order."""
    seen: list[EvaluateSettings] = []

    def spy(folder: Path, store_path: Path | None, settings: EvaluateSettings) -> dict[str, Any]:
        seen.append(settings)
        return evaluate_run(folder, store_path, settings)

    monkeypatch.setattr(evaluation, "evaluate_run", spy)
    return seen


def test_metrics_say_what_was_measured_and_how(run: Run) -> None:
    written = evaluate_run(run.path, None, QUICK)
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert metrics == written == open_run(run.path).metrics
    named = [metrics[name] for name in ("task", "fusion", "head", "seed", "selected_on")]
    assert named == ["classification", "global", "shortcut", 0, "val"]
    assert metrics["store_fingerprint"] == "f"
    assert metrics["evaluate"] == QUICK.model_dump(mode="json", exclude={"baselines"})
    assert metrics["val"] == pytest.approx(run.info["history"][0]["val"])
    figures = set(metrics["val"])
    assert set(metrics["test"]) == {*figures, "interval"}
    assert set(metrics["test"]["interval"]) == figures
    low, high = metrics["test"]["interval"]["accuracy"]
    assert low <= metrics["test"]["accuracy"] <= high
    table = pd.read_parquet(run.path / "predictions.parquet")
    assert table["tile_id"].tolist() == [f"t{i:02}" for i in range(12, 24)]
    assert (table["target"] == table["predicted"]).mean() == metrics["test"]["accuracy"]


@pytest.mark.parametrize("split", ["val", "train"])
def test_another_split_is_reported_with_intervals_and_leaves_test_unread(run: Run, split: str) -> None:
    metrics = evaluate_run(run.path, None, EvaluateSettings(split=split, bootstrap=10))  # type: ignore[arg-type]
    assert metrics["evaluate"]["split"] == split
    assert set(metrics) & {"train", "val", "test"} == {"val", split}
    assert "accuracy" in metrics[split]["interval"]
    assert metrics["val"]["accuracy"] == pytest.approx(run.info["history"][0]["val"]["accuracy"])
    assert metrics["test_reads"] == 0
    assert f"{split} accuracy" in format_table(results_table([run.path]))
    shown = [line.split()[:2] for line in format_metrics(run.path, metrics).splitlines()[1:]]
    assert [split, "accuracy"] in shown
    assert shown.count(["val", "accuracy"]) == 1


def test_a_run_is_measured_once_for_the_same_settings(
    run: Run, store: FeatureStore, measured: list[EvaluateSettings]
) -> None:
    first = ensure_evaluated(run, store, QUICK)
    assert ensure_evaluated(run, store, QUICK.model_copy(update={"baselines": False})) == first
    assert ensure_evaluated(open_run(run.path), FeatureStore(store.path), QUICK) == first
    assert len(measured) == 1
    assert first["test_reads"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"split": "val"},
        {"metrics": "reference"},
        {"bootstrap": 11},
        {"level": 0.5},
        {"seed": 1},
        {"pictures": 4},
    ],
)
def test_other_settings_are_measured_again(
    run: Run, store: FeatureStore, measured: list[EvaluateSettings], change: dict[str, Any]
) -> None:
    ensure_evaluated(run, store, QUICK)
    settings = QUICK.model_copy(update=change)
    metrics = ensure_evaluated(run, store, settings)
    assert measured == [QUICK, settings]
    assert metrics["evaluate"].items() >= change.items()
    assert open_run(run.path).metrics == metrics


def test_a_run_that_was_trained_anew_is_measured_again(
    run: Run, store: FeatureStore, measured: list[EvaluateSettings]
) -> None:
    """As after an --overwrite that was interrupted between training and measuring."""
    ensure_evaluated(run, store, QUICK)
    other = fit(store, FIT.model_copy(update={"lr": 0.5}), "global", 0, run.path, new_outcome, overwrite=True)
    ensure_evaluated(other, store, QUICK)
    assert len(measured) == 2


def test_a_run_that_was_measured_on_another_store_is_measured_again(
    run: Run, store: FeatureStore, tmp_path: Path, measured: list[EvaluateSettings]
) -> None:
    ensure_evaluated(run, store, QUICK)
    other = make_store(tmp_path / "other.zarr", "classification", splits=SPLITS[:-1])
    evaluate_run(run.path, other.path, QUICK)
    assert open_run(run.path).metrics["store_hashes"] != store.hashes().model_dump()
    ensure_evaluated(run, store, QUICK)
    assert len(measured) == 2
    assert open_run(run.path).metrics["store_hashes"] == store.hashes().model_dump()
    assert open_run(run.path).metrics["test_reads"] == 3


@pytest.mark.parametrize("damage", ["", "{", "[1]", "null"])
def test_a_damaged_count_of_test_reads_is_told_before_test_is_read(
    run: Run, store: FeatureStore, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run.path / "metrics.json"
    file.write_text(damage)
    message = (
        rf"{file}: is damaged: .+; delete it, which starts its count of test reads anew, and measure the run "
        rf"again: `satdifuser evaluate {run.path}`"
    )
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "predict", lambda *_: pytest.fail("the test split was read"))
        with pytest.raises(RunError, match=message):
            evaluate_run(run.path, None, QUICK)
        with pytest.raises(RunError, match=message):
            ensure_evaluated(run, store, QUICK)
    assert file.read_text() == damage
    file.unlink()
    assert evaluate_run(run.path, None, QUICK)["test_reads"] == 1


def asking(fusion: Sequence[str] = ("global",), baselines: bool = False, **evaluate: Any) -> Pipeline:
    fit_section = FIT.model_dump(include=SHARED) | {"fusion": list(fusion)}
    sections = {"fit": fit_section, "evaluate": {"bootstrap": 10, "baselines": baselines} | evaluate}
    return validate_settings(sections, "test")


def test_fit_all_measures_on_val_and_leaves_test_unread(store: FeatureStore, tmp_path: Path) -> None:
    folders = fit_all(store, asking(baselines=True), tmp_path)
    assert len(folders) == 4
    for folder in folders:
        metrics = open_run(folder).metrics
        assert (metrics["evaluate"]["split"], metrics["test_reads"]) == ("val", 0)
        assert "test" not in metrics
        assert "accuracy" in metrics["val"]["interval"]
        assert set(pd.read_parquet(folder / "predictions.parquet")["split"]) == {"val"}


def test_fit_all_keeps_what_was_measured_on_test(store: FeatureStore, tmp_path: Path) -> None:
    (path,) = fit_all(store, asking(), tmp_path)
    weights = (path / "model.safetensors").stat().st_mtime_ns
    before = open_run(path).metrics["val"]
    metrics = evaluate_run(path, None, QUICK)
    assert metrics["val"] == before
    assert fit_all(store, asking(), tmp_path) == [path]
    assert open_run(path).metrics == metrics
    assert (path / "model.safetensors").stat().st_mtime_ns == weights


def test_features_are_read_once_for_all_fusions_and_seeds(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    monkeypatch.setattr(MapLoader, "statistics", lambda self: read.append(len(self.rows)) or None)
    fit_section = FIT.model_dump(include=SHARED) | {
        "fusion": ["global", "moe"],
        "seeds": [0, 1],
        "normalise": True,
    }
    sections = {"fit": fit_section, "evaluate": {"bootstrap": 5, "baselines": False}}
    assert len(fit_all(store, validate_settings(sections, "test"), tmp_path)) == 4
    assert read == [len(store.select("train"))]


def test_a_run_folder_holds_its_resolved_settings(store: FeatureStore, tmp_path: Path) -> None:
    automatic = FitSettings(epochs=1, warmup_epochs=0)
    run = fit(store, automatic, "global", 0, tmp_path / "run", new_outcome)
    assert open_run(run.path).info["resolved"] == {
        "task": "classification",
        "partition": "default",
        "head": "shortcut",
        "projection": 96,
        "norm_groups": 8,
        "device": run.info["resolved"]["device"],
        "device_name": run.info["resolved"]["device_name"],
        "processes": 1,
    }
    assert run.info["resolved"]["device"] in ("cpu", "cuda")
    sections = yaml.safe_load((run.path / "settings.yaml").read_text())
    own = {"fusion": ["global"], "seeds": [0], **automatic.model_dump(mode="json", include=SHARED)}
    assert sections == {"fit": sections["fit"] | own, **store.attributes.settings}
    evaluate_run(run.path, None, QUICK)
    measured = yaml.safe_load((run.path / "settings.yaml").read_text())
    assert measured == sections | {"evaluate": QUICK.model_dump(mode="json")}


class Undefined(Outcome):
    """Metrics of nothing."""

    def metrics(self) -> dict[str, float]:
        return dict.fromkeys(super().metrics(), float("nan"))


def undefined(store: FeatureStore) -> Undefined:
    return Undefined(str(store.attributes.task), len(store.attributes.classes), 255)


def test_a_val_split_without_labels_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="split 'val' holds no labelled pixel to choose an epoch by"):
        fit(store, FIT, "global", 0, tmp_path / "run", undefined)


def test_several_classes_per_tile_are_learned_and_measured(tmp_path: Path) -> None:
    """The features' first channel tells all classes; tiles without labels are left out everywhere."""
    store = make_store(tmp_path / "s.zarr", "multilabel")
    longer = FIT.model_copy(update={"epochs": 30, "lr": 0.02, "patience": 30})
    run = fit(store, longer, "global", 0, tmp_path / "run", new_outcome)
    metrics = evaluate_run(run.path, None, QUICK)
    scores = [epoch["val"]["f1_micro"] for epoch in run.info["history"]]
    assert scores[run.info["best_epoch"] - 1] == max(scores) == metrics["val"]["f1_micro"]
    assert metrics["test"]["f1_micro"] > 0.8
    assert set(metrics["test"]["interval"]) == set(metrics["val"])
    table = pd.read_parquet(run.path / "predictions.parquet")
    assert table["tile_id"].tolist() == [f"t{i:02}" for i in range(12, 23)]
    predicted, probabilities = np.stack(table["predicted"]), np.stack(table["probabilities"])
    np.testing.assert_array_equal(predicted, probabilities >= 0.5)
    truth = np.stack(table["target"])
    assert (truth[:, 0] == 1).all()
    assert (predicted == truth).all(axis=1).mean() == pytest.approx(metrics["test"]["accuracy"])


def test_a_val_split_without_any_class_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", "multilabel")
    with pytest.raises(RunError, match="split 'val' holds no tile with a class to choose an epoch by"):
        fit(store, FIT, "global", 0, tmp_path / "run", undefined)


def test_masks_are_kept_of_tiles_spread_over_the_split(mask_store: FeatureStore, tmp_path: Path) -> None:
    run = fit(
        mask_store, FIT.model_copy(update={"batch_size": 5}), "global", 0, tmp_path / "run", new_outcome
    )
    evaluate_run(run.path, None, QUICK)
    with np.load(run.path / "masks.npz") as saved:
        ids, target, predicted = (saved[name] for name in ("tile_id", "target", "predicted"))
    assert {"t12", "t18", "t23"} <= set(ids.tolist())  # beside the worst ones
    truth = np.asarray(mask_store.targets(np.array([int(name[1:]) for name in ids])))
    np.testing.assert_array_equal(target, truth)
    table = pd.read_parquet(run.path / "predictions.parquet").set_index("tile_id")
    shares = [(p == t).mean() for p, t in zip(predicted, target, strict=True)]
    assert table.loc[ids, "pixel_accuracy"].tolist() == pytest.approx(shares)
    others = table.drop(index=["t12", "t18", "t23"])["miou"]
    assert sorted(table.loc[ids].drop(index=["t12", "t18", "t23"])["miou"]) == sorted(others)[:3]


@given(st.integers(1, 400), st.integers(1, 40))
def test_spread_positions_are_distinct_and_even(tiles: int, count: int) -> None:
    positions = spread_positions(tiles, count)
    assert len(set(positions)) == len(positions) == min(tiles, count)
    assert positions[0] == 0
    assert positions[-1] == (tiles - 1 if count > 1 else 0)
    gaps = np.diff(positions)
    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


def confident(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    return np.moveaxis(np.eye(classes, dtype=np.float32)[labels], -1, 1)


def test_an_outcome_does_not_depend_on_the_batches() -> None:
    random = np.random.default_rng(0)
    truth, guess = random.integers(0, 3, (2, 7, 4, 4))
    whole, parts = Outcome("segmentation", 3, 255, [0, 3, 6]), Outcome("segmentation", 3, 255, [0, 3, 6])
    whole.add(confident(guess, 3), truth)
    for start in (0, 2, 4, 6):
        parts.add(confident(guess[start : start + 2], 3), truth[start : start + 2])
    assert whole.metrics() == parts.metrics()
    assert whole.metrics()["pixel_accuracy"] == pytest.approx((truth == guess).mean())
    assert {0, 3, 6} <= set(whole.masks) == set(parts.masks)
    for position, (a, b) in whole.masks.items():
        c, d = parts.masks[position]
        np.testing.assert_array_equal(a, guess[position])
        np.testing.assert_array_equal(b, truth[position])
        assert (a == c).all()
        assert (b == d).all()


def test_a_store_of_other_features_is_refused(run: Run, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other.zarr", "classification", classes=4, feature_hash="g")
    with pytest.raises(
        RunError, match=r"(?s)does not hold the features that .*/run was fitted on:"
    ) as caught:
        check_features(run, other)
    assert "\n  feature: run expects 'f', store has 'g'" in str(caught.value)
    assert "\n  classes: run expects ['class 0'" in str(caught.value)
    with pytest.raises(RunError, match="does not hold the features"):
        evaluate_run(run.path, other.path, QUICK)
    assert not (run.path / "metrics.json").exists()


def test_what_is_no_fitted_network_is_refused(run: Run) -> None:
    (run.path / "run.json").write_text(json.dumps(run.info | {"kind": "baseline"}))
    with pytest.raises(RunError, match="is no fitted network but a baseline"):
        evaluate_run(run.path, None, QUICK)
