"""The baselines on made-up stores: chosen on val, blind to test, and right where a shortcut is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from made_up_labelled import CLASSES, SIZE, labelled_store

from satdifuser.errors import RunError
from satdifuser.evaluate.baselines import (
    NAMES,
    STRENGTHS,
    choose_on_val,
    evaluate_baseline,
    fit_baselines,
)
from satdifuser.evaluate.evaluation import is_evaluated
from satdifuser.evaluate.probe_predictions import predict_masks
from satdifuser.evaluate.probes import LinearProbes, fit_probes
from satdifuser.evaluate.samples import PIXEL_BYTES, Samples, gather_samples, pixels_per_tile
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.run_folder import Run, open_run
from satdifuser.store.reader import FeatureStore

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

QUICK = EvaluateSettings(bootstrap=10, pictures=2)
FINE, COARSE = (21, "up.fine"), (21, "up.coarse")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return labelled_store(tmp_path_factory.mktemp("labels") / "s.zarr", "classification")


@pytest.fixture(scope="module")
def mask_store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return labelled_store(tmp_path_factory.mktemp("masks") / "s.zarr", "segmentation")


def probe_of(samples: Samples, inputs: list[tuple[int, str]], classes: int = CLASSES) -> LinearProbes:
    probes = fit_probes("logistic", samples.joined(inputs), samples.labels, classes, [1.0])
    assert isinstance(probes, LinearProbes)
    return probes


def test_inputs_and_strength_are_chosen_on_val(store: FeatureStore) -> None:
    """One input is perfect in training and noise on val; the other is fair in both."""
    random = np.random.default_rng(0)
    labels = {split: random.integers(0, CLASSES, 60) for split in ("train", "val")}
    fair = {s: (y[:, None] + random.normal(0, 0.5, (60, 1))).astype(np.float32) for s, y in labels.items()}
    noise = random.normal(size=(60, 1))
    fickle = {"train": labels["train"][:, None].astype(np.float32), "val": noise.astype(np.float32)}
    samples = {
        s: Samples({FINE: fickle[s], COARSE: fair[s]}, labels[s], np.arange(60)) for s in ("train", "val")
    }
    inputs, probe, strength = choose_on_val(store, samples, [[FINE], [COARSE]])
    assert inputs == [COARSE]
    rivals = fit_probes("logistic", fair["train"], labels["train"], CLASSES, STRENGTHS)
    scores = (rivals.probabilities(fair["val"]).argmax(2) == labels["val"]).mean(axis=1)
    assert scores[STRENGTHS.index(strength)] == scores.max()
    chosen = probe.probabilities(fair["val"])[0]
    np.testing.assert_array_equal(chosen, rivals.probabilities(fair["val"])[STRENGTHS.index(strength)])
    with pytest.raises(RunError, match=r"s\.zarr: holds no features to probe"):
        choose_on_val(store, samples, [])


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_baselines_never_see_test(task: str, tmp_path: Path) -> None:
    """Two stores that differ in their test tiles only give the same models and the same figures on val."""
    found = []
    for seed in (0, 1):
        store = labelled_store(tmp_path / f"{seed}.zarr", task, seed)
        runs = fit_baselines(store, QUICK, tmp_path / f"runs-{seed}", overwrite=False)
        assert all(run.metrics["test_reads"] == 0 for run in runs)
        for run in runs:
            evaluate_baseline(run, store, QUICK)
        assert [run.info["fusion"] for run in runs] == list(NAMES)
        found.append(runs)
    for first, second in zip(*found, strict=True):
        assert facts(first) == facts(second)
        assert first.metrics["val"] == second.metrics["val"]
        assert first.metrics["test"] != second.metrics["test"]
    assert found[0][1].info["inputs"] == [FINE]


def facts(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.info.items() if name not in ("store", "seconds")}


def test_pixels_are_drawn_where_there_is_a_label_with_the_features_there(mask_store: FeatureStore) -> None:
    train = mask_store.select("train")
    samples = gather_samples(mask_store, train, seed=0)
    assert samples.features[FINE].shape == (12 * 64, 3)
    assert samples.features[COARSE].shape == (12 * 64, 2)
    np.testing.assert_array_equal(samples.features[FINE][:, 0], samples.labels)
    assert set(samples.labels) == set(range(CLASSES))
    again = gather_samples(mask_store, train, seed=0)
    np.testing.assert_array_equal(samples.labels, again.labels)
    assert (samples.labels != gather_samples(mask_store, train, seed=1).labels).any()


def test_a_tile_gives_the_same_pixels_whatever_others_are_drawn_from(mask_store: FeatureStore) -> None:
    train = mask_store.select("train")
    samples = gather_samples(mask_store, train, seed=0, pixels=5)
    few = gather_samples(mask_store, train[[7, 2]], seed=0, pixels=5)
    places = samples.places(train[[7, 2]])
    assert len(places) == 10
    order = np.argsort(few.rows, kind="stable")
    np.testing.assert_array_equal(samples.rows[places], few.rows[order])
    np.testing.assert_array_equal(samples.joined([FINE], places), few.joined([FINE])[order])


def test_pixels_of_wide_features_are_fewer(mask_store: FeatureStore) -> None:
    assert pixels_per_tile(mask_store, 1000) == 64
    assert pixels_per_tile(mask_store, 10**7) == PIXEL_BYTES // (4 * 5 * 10**7)
    assert pixels_per_tile(mask_store, 10**9) == 1


def test_masks_predicted_at_each_layers_own_size_equal_those_of_enlarged_features(
    mask_store: FeatureStore,
) -> None:
    inputs = [FINE, COARSE]
    probe = probe_of(gather_samples(mask_store, mask_store.select("train"), seed=0), inputs)
    rows = mask_store.select("val")
    ((probabilities, targets),) = predict_masks(mask_store, probe, inputs, rows)
    maps = mask_store.maps(rows)
    enlarged = [
        F.interpolate(torch.from_numpy(maps[group][:, 0, 0]), (SIZE, SIZE), mode="bilinear")
        for group in ("stride_04", "stride_08")
    ]
    pixels = torch.cat(enlarged, dim=1).movedim(1, -1).flatten(0, 2).numpy()
    direct = probe.probabilities(pixels)[0].reshape(len(rows), SIZE, SIZE, CLASSES)
    np.testing.assert_allclose(probabilities, np.moveaxis(direct, -1, 1), atol=1e-5)
    np.testing.assert_array_equal(targets, mask_store.targets(rows))


def test_baselines_are_kept_until_another_seed_is_asked_for(store: FeatureStore, tmp_path: Path) -> None:
    def written() -> list[int]:
        return [(tmp_path / f"baseline-{name}/metrics.json").stat().st_mtime_ns for name in NAMES]

    runs = fit_baselines(store, QUICK, tmp_path, overwrite=False)
    first, on_val = written(), QUICK.model_copy(update={"split": "val"})
    assert all(is_evaluated(open_run(run.path), store, on_val) for run in runs)
    sections = yaml.safe_load((runs[0].path / "settings.yaml").read_text())
    assert sections == {"source": {"kind": "synthetic"}, "evaluate": on_val.model_dump(mode="json")}
    kept = fit_baselines(store, QUICK, tmp_path, overwrite=False)
    assert [run.info for run in kept] == [open_run(run.path).info for run in runs]
    assert written() == first
    fit_baselines(store, QUICK.model_copy(update={"seed": 1}), tmp_path, overwrite=False)
    assert all(new != old for new, old in zip(written(), first, strict=True))


@pytest.mark.parametrize("task", ["classification", "multilabel", "segmentation"])
def test_a_baseline_that_is_fitted_again_is_the_same(task: str, tmp_path: Path) -> None:
    """Its weights are not kept, only what it chose on val: val tells that the same model is measured."""
    store = labelled_store(tmp_path / "s.zarr", task)
    for run in fit_baselines(store, QUICK, tmp_path / "runs", overwrite=False):
        before = {name: value for name, value in run.metrics["val"].items() if name != "interval"}
        (run.path / "metrics.json").unlink()  # so that val is measured, not remembered
        metrics = evaluate_baseline(open_run(run.path), store, QUICK)
        assert metrics["val"] == before
        assert metrics["test_reads"] == 1
        assert "interval" in metrics["test"]


def test_a_baseline_is_not_measured_on_another_store(store: FeatureStore, tmp_path: Path) -> None:
    run = fit_baselines(store, QUICK, tmp_path / "runs", overwrite=False)[0]
    other = labelled_store(tmp_path / "other.zarr", "segmentation")
    with pytest.raises(RunError, match=r"baseline-colour: was fitted on another store than .*other\.zarr"):
        evaluate_baseline(run, other, QUICK)
