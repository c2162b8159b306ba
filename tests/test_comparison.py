"""Comparing runs: tile by tile, by scaled scores over several data sets; and which of them are measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from command_line import refuse, succeed
from made_up import random_mask_row, random_row, random_store
from made_up_labelled import labelled_store
from scipy.stats import chi2

from satdifuser.errors import RunError, SettingsError
from satdifuser.evaluate.across import across_datasets, format_across, interquartile_mean, min_max
from satdifuser.evaluate.chosen import best_of_each, choose_runs, ensure_all_evaluated, split_store
from satdifuser.evaluate.comparison import (
    compare_runs,
    compare_tiles,
    format_comparison,
    mcnemar,
    seeds_of,
    tile_table,
)
from satdifuser.evaluate.evaluation import ensure_measured_on_val, new_outcome
from satdifuser.evaluate.results import results_table
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.fit import fit_candidates
from satdifuser.fuse.grid import expand
from satdifuser.fuse.run_folder import open_run
from satdifuser.fuse.settings import SweepSettings
from satdifuser.pipeline import validate_settings
from satdifuser.stages import fit_all
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo
from satdifuser.store.writer import TileRow

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

LAYERS = [LayerInfo(name="up.attn1", channels=4, stride=4, height=4, width=4)]
QUICK: dict[str, Any] = {"projection": 8, "norm_groups": 1, "epochs": 1, "warmup_epochs": 0, "device": "cpu"}
BOOTSTRAP = EvaluateSettings(bootstrap=50)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    made = {"source": {"kind": "synthetic"}, "extract": {"noising": "forward"}}
    return random_store(tmp_path_factory.mktemp("store") / "s.zarr", LAYERS, 40, settings=made)


@pytest.fixture(scope="module")
def runs(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """global and moe with two seeds each, measured on val."""
    return fitted(store, tmp_path_factory.mktemp("runs"), ["global", "moe"], [0, 1])


def fitted(store: FeatureStore, folder: Path, fusions: Sequence[str], seeds: Sequence[int]) -> Path:
    sweep = SweepSettings.model_validate({"fusion": fusions, "seeds": seeds} | QUICK)
    for run in fit_candidates(store, expand(sweep, store), folder, new_outcome):
        ensure_measured_on_val(run, store, BOOTSTRAP)
    return folder


def test_a_comparison_of_two_runs(runs: Path) -> None:
    found = compare_runs([runs / "global-seed0", runs / "moe-seed0"], None, BOOTSTRAP)
    metrics = [open_run(runs / name).metrics["test"] for name in ("global-seed0", "moe-seed0")]
    assert found["tiles"] == 10
    for name, one in found["metrics"].items():
        assert one["values"] == pytest.approx([side[name] for side in metrics])
        assert one["difference"] == pytest.approx(one["values"][0] - one["values"][1])
        low, high = one["interval"]
        assert low <= one["difference"] <= high
    tables = [tile_table(open_run(runs / name)) for name in ("global-seed0", "moe-seed0")]
    right = [table["target"] == table["predicted"] for table in tables]
    assert found["mcnemar"]["only_first"] == (right[0] & ~right[1]).sum()
    assert found["mcnemar"]["only_second"] == (right[1] & ~right[0]).sum()
    text = format_comparison(found)
    assert "10 test tiles" in text
    assert "McNemar p = " in text


def test_a_run_against_itself_is_even(runs: Path) -> None:
    found = compare_runs([runs / "moe-seed1", runs / "moe-seed1"], None, BOOTSTRAP)
    assert found["mcnemar"] == {"only_first": 0, "only_second": 0, "p": 1.0}
    assert found["metrics"]["accuracy"]["interval"] == [0, 0]
    assert found["metrics"]["accuracy"]["ahead"] == 0.5
    assert format_comparison(found).endswith(
        "accuracy: no difference that other tiles of the same kind might not turn around (95%)"
    )


def test_seeds_are_compared_by_their_mean(runs: Path) -> None:
    found = compare_runs([runs / "global", runs / "moe"], None, BOOTSTRAP)
    assert found["seeds"] == [[0, 1], [0, 1]]
    assert "mcnemar" not in found
    for side, fusion in enumerate(("global", "moe")):
        both = [open_run(runs / f"{fusion}-seed{seed}").metrics["test"]["accuracy"] for seed in (0, 1)]
        assert found["metrics"]["accuracy"]["values"][side] == pytest.approx(np.mean(both))
    assert [run.path.name for run in seeds_of(runs / "moe-seed1")] == ["moe-seed1"]


def test_a_clear_difference_is_called_so(runs: Path, tmp_path: Path) -> None:
    """The predictions of one run are made right, those of the other wrong."""
    paths = [tmp_path / name for name in ("good", "bad")]
    for path, right in zip(paths, (True, False), strict=True):
        compare_runs([runs / "global-seed0"] * 2, None, BOOTSTRAP)
        path.mkdir()
        for name in ("run.json", "metrics.json", "model.safetensors", "settings.yaml"):
            (path / name).write_bytes((runs / "global-seed0" / name).read_bytes())
        table = pd.read_parquet(runs / "global-seed0/predictions.parquet")
        table["predicted"] = table["target"] if right else 1 - table["target"]
        table["probabilities"] = [np.eye(2, dtype=np.float32)[c] for c in table["predicted"]]
        table.sample(frac=1, random_state=0).to_parquet(path / "predictions.parquet")
    found = compare_runs(paths, None, BOOTSTRAP)
    assert found["metrics"]["accuracy"]["values"] == [1, 0]
    assert found["metrics"]["accuracy"]["ahead"] == 1
    assert found["mcnemar"] == {"only_first": 10, "only_second": 0, "p": pytest.approx(2 / 2**10)}
    assert format_comparison(found).endswith("accuracy: A is ahead beyond its 95% interval")


def test_mcnemar_is_near_its_approximation_for_many_tiles() -> None:
    random = np.random.default_rng(0)
    first, second = random.random(4000) < 0.8, random.random(4000) < 0.77
    found = mcnemar(first, second)
    b, c = found["only_first"], found["only_second"]
    assert found["p"] == pytest.approx(chi2.sf((abs(b - c) - 1) ** 2 / (b + c), 1), rel=0.02)


def test_masks_are_compared_by_the_iou_of_each_tile(tmp_path: Path) -> None:
    store = random_store(tmp_path / "m.zarr", LAYERS, 40, row_of=random_mask_row, task="segmentation")
    folder = fitted(store, tmp_path / "runs", ["global", "concatenation"], [0])
    found = compare_runs([folder / "global-seed0", folder / "concatenation-seed0"], None, BOOTSTRAP)
    first, second = (
        pd.read_parquet(folder / f"{name}-seed0/predictions.parquet") for name in ("global", "concatenation")
    )
    assert found["tile_iou"]["mean_difference"] == pytest.approx((first["miou"] - second["miou"]).mean())
    assert found["tile_iou"]["first_ahead"] == (first["miou"] > second["miou"]).sum()
    assert "Wilcoxon p = " in format_comparison(found)
    assert found["metrics"]["miou"]["difference"] == pytest.approx(
        open_run(folder / "global-seed0").metrics["test"]["miou"]
        - open_run(folder / "concatenation-seed0").metrics["test"]["miou"]
    )


def test_tiles_without_labels_are_left_out_of_the_comparison() -> None:
    found = compare_tiles(np.array([0.5, np.nan, 0.7]), np.array([0.25, np.nan, 0.75]), BOOTSTRAP)
    assert found["mean_difference"] == pytest.approx(0.1)
    assert (found["first_ahead"], found["second_ahead"]) == (1, 1)


def test_runs_of_other_tiles_or_targets_are_not_compared(
    runs: Path, store: FeatureStore, tmp_path: Path
) -> None:
    fewer = random_store(tmp_path / "fewer.zarr", LAYERS, 32)
    other = fitted(fewer, tmp_path / "fewer", ["global"], [0])
    message = r"measured on 10 tiles and .*fewer/global-seed0 on 8, with 2 in one of them only: t35, t39; "
    with pytest.raises(RunError, match=message):
        compare_runs([runs / "global-seed0", other / "global-seed0"], None, BOOTSTRAP)

    def swapped(number: int) -> TileRow:
        made = random_row(number)
        return replace(made, target=np.array(0, np.int32)) if number in (3, 7) else made

    relabelled = random_store(tmp_path / "other.zarr", LAYERS, 40, row_of=swapped)
    other = fitted(relabelled, tmp_path / "other", ["global"], [0])
    with pytest.raises(
        RunError, match=r"different targets of 2 tiles: t3, t7; compare runs of the same tiles"
    ):
        compare_runs([runs / "global-seed0", other / "global-seed0"], None, BOOTSTRAP)
    same = compare_runs([runs / "global-seed0", other / "global-seed0"], store.path, BOOTSTRAP)
    assert same["tiles"] == 10  # measured on one store, they can be compared


def test_runs_of_other_classes_are_not_compared(runs: Path, tmp_path: Path) -> None:
    store = random_store(tmp_path / "c.zarr", LAYERS, 40, classes=["sea", "rock"])
    other = fitted(store, tmp_path / "runs", ["global"], [0])
    with pytest.raises(
        RunError, match=r"needs runs of one list of classes, got: .*\(sea, land\), .*\(sea, rock\)"
    ):
        compare_runs([runs / "global-seed0", other / "global-seed0"], None, BOOTSTRAP)


def test_two_runs_are_needed(runs: Path) -> None:
    with pytest.raises(SettingsError, match="--compare: got 1 runs, expected two: `evaluate --compare A B`"):
        compare_runs([runs / "moe-seed0"], None, BOOTSTRAP)


# Which runs are measured


def test_of_each_fusion_what_is_best_on_val_is_measured(store: FeatureStore, tmp_path: Path) -> None:
    fit_section = QUICK | {"fusion": ["single", "global"], "lr": [0.01, 1e-6], "seeds": [0, 1], "epochs": 2}
    pipeline = validate_settings({"fit": fit_section, "evaluate": {"bootstrap": 20}}, "test")
    folders = fit_all(store, pipeline, tmp_path / "runs")
    assert len(folders) == 3 + (3 + 1) * 2 * 2
    chosen = choose_runs([tmp_path / "runs"])
    assert chosen == best_of_each(sorted(folders))
    values: dict[str, list[float]] = {}
    for path in folders:
        values.setdefault(path.name.split("-seed")[0], []).append(open_run(path).metrics["val"]["accuracy"])
    for fusion in ("single", "global"):
        best = max((k for k in values if k.startswith(fusion)), key=lambda k: np.mean(values[k]))
        picked = [np.mean(values[p.name.split("-seed")[0]]) for p in chosen if p.name.startswith(fusion)]
        assert picked == [np.mean(values[best])] * 2
    assert sum(path.name.startswith("baseline") for path in chosen) == 3
    table = succeed("evaluate", tmp_path / "runs", "--set", "evaluate.bootstrap=20")
    assert "test accuracy" in table
    reads = {path.name: open_run(path).metrics["test_reads"] for path in folders}
    assert reads == {path.name: int(path in chosen) for path in folders}


def test_test_tiles_have_no_part_in_which_runs_are_chosen(tmp_path: Path) -> None:
    """Two stores that differ in their test tiles only."""
    fit_section = QUICK | {"fusion": ["single", "global"], "lr": [0.01, 1e-6], "epochs": 2}
    pipeline = validate_settings({"fit": fit_section, "evaluate": {"bootstrap": 20}}, "test")
    boards, chosen, tables = [], [], []
    for seed in (0, 1):
        store = labelled_store(tmp_path / f"{seed}.zarr", "classification", seed, (21, 61), blur=0.4)
        runs = tmp_path / f"runs{seed}"
        fit_all(store, pipeline, runs)
        boards.append(pd.read_csv(runs / "leaderboard.csv").drop(columns="seconds"))
        before = choose_runs([runs])
        ensure_all_evaluated(before, None, pipeline.evaluate)
        assert choose_runs([runs]) == before  # nor once they are measured
        chosen.append([path.name for path in before])
        tables.append(results_table(before))
    pd.testing.assert_frame_equal(boards[0], boards[1])
    assert chosen[0] == chosen[1]
    on_val = ["run", "val", "chosen"]
    pd.testing.assert_frame_equal(tables[0][on_val], tables[1][on_val])
    assert not tables[0]["reported"].equals(tables[1]["reported"])


def test_runs_that_are_named_are_all_measured(runs: Path) -> None:
    named = [runs / "moe-seed1", runs / "global-seed0"]
    assert choose_runs(named) == named
    with pytest.raises(RunError, match="no such run folder"):
        choose_runs([runs / "none"])


def test_the_last_place_may_be_a_store(runs: Path, store: FeatureStore) -> None:
    run = runs / "moe-seed0"
    assert split_store([run]) == ([run], None)
    assert split_store([run, runs]) == ([run, runs], None)
    assert split_store([run, runs / "global"]) == ([run, runs / "global"], None)  # all its seeds
    assert split_store([run, Path(store.path)]) == ([run], store.path)
    assert split_store([run, "s3://bucket/s.zarr"]) == ([run], "s3://bucket/s.zarr")
    with pytest.raises(RunError, match=r"moe-sed0: no such run or store; did you mean moe-seed0"):
        split_store([runs / "global", runs / "moe-sed0"])


def test_compare_and_report_by_the_command_line(runs: Path, tmp_path: Path) -> None:
    words = (
        "evaluate",
        "--compare",
        runs / "global-seed0",
        runs / "moe-seed0",
        "--set",
        "evaluate.bootstrap=20",
    )
    assert "McNemar" in succeed(*words)
    assert json.loads(succeed(*words, "--json"))["tiles"] == 10
    assert "mo-seed0: no such run" in refuse(
        "evaluate", "--compare", runs / "global-seed0", runs / "mo-seed0"
    )
    succeed("report", runs, "-o", tmp_path / "page.html")
    assert "test" in (tmp_path / "page.html").read_text()


# Over several data sets


def fake_run(folder: Path, dataset: str, fusion: str, seed: int, value: float, **changes: Any) -> Path:
    """Write what the sum over data sets reads of a run."""
    info = {"kind": "fusion", "task": "classification", "fusion": fusion, "seed": seed}
    info["store"] = {"path": "s.zarr", "hashes": {"labels": dataset}}
    path = folder / f"{dataset}-{fusion}-{seed}"
    path.mkdir(parents=True)
    metrics = {"evaluate": {"split": "test"}, "val": {"accuracy": 0.5}, "test": {"accuracy": value}}
    settings = {"source": {"root": f"data/{dataset}"}, "extract": {"noising": "forward"}} | changes
    (path / "run.json").write_text(json.dumps(info))
    (path / "metrics.json").write_text(json.dumps(metrics))
    (path / "settings.yaml").write_text(yaml.safe_dump(settings))
    return path


def test_scores_are_scaled_within_each_data_set(tmp_path: Path) -> None:
    values = {
        ("eurosat", "global"): [0.9, 0.8],
        ("eurosat", "moe"): [0.7, 0.5],
        ("so2sat", "global"): [0.3, 0.3],
        ("so2sat", "moe"): [0.2, 0.4],
    }
    folders = [
        fake_run(tmp_path, dataset, fusion, seed, value)
        for (dataset, fusion), scores in values.items()
        for seed, value in enumerate(scores)
    ]
    table = across_datasets(folders, BOOTSTRAP)
    assert table["model"].tolist() == ["global", "moe"]
    # global: 1, 0.75 and 0.5, 0.5, whose middle half is 0.5 and 0.75; moe: 0.5, 0 and 0, 1
    assert table["iqm"].tolist() == pytest.approx([0.625, 0.25])
    assert table["eurosat"].tolist() == pytest.approx([0.85, 0.6])
    assert table["seeds"].tolist() == [4, 4]
    assert (table["low"] <= table["iqm"]).all()
    assert (table["iqm"] <= table["high"]).all()
    text = format_across(table, 0.95).splitlines()
    assert text[0].split() == ["model", "IQM", "95%", "interval", "(seeds)", "seeds", "eurosat", "so2sat"]
    assert text[1].startswith("global  0.625  ")


def test_the_interquartile_mean_leaves_a_quarter_out_at_each_end() -> None:
    assert interquartile_mean({"a": np.array([0.0, 1.0, 2.0, 100.0])}) == 1.5
    even = min_max({"m": {"a": np.array([0.4])}, "n": {"a": np.array([0.4])}})
    assert even["m"]["a"].tolist() == [0.5]


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    folders = [fake_run(tmp_path, d, f, 0, 0.5) for d in "ab" for f in ("global", "moe")]
    table = across_datasets(folders, BOOTSTRAP)
    assert table[["low", "high"]].isna().all(axis=None)
    assert " – " in format_across(table, 0.95)


def test_a_model_must_stand_on_every_data_set(tmp_path: Path) -> None:
    folders = [fake_run(tmp_path, d, "global", 0, 0.5) for d in "ab"]
    folders.append(fake_run(tmp_path, "a", "moe", 0, 0.5))
    with pytest.raises(RunError, match="moe was not measured on b; every model needs a run on each data set"):
        across_datasets(folders, BOOTSTRAP)


def test_models_are_told_apart_by_noising_where_it_differs(tmp_path: Path) -> None:
    folders = [
        fake_run(tmp_path / noising, "a", "global", 0, value, extract={"noising": noising})
        for noising, value in (("forward", 0.5), ("inversion", 0.6))
    ]
    assert across_datasets(folders, BOOTSTRAP)["model"].tolist() == ["global, inversion", "global, forward"]


def test_models_are_told_apart_by_their_labels_where_these_differ(tmp_path: Path) -> None:
    folders = []
    for labels, value in (("10%", 0.5), ("", 0.6)):
        folder = fake_run(tmp_path / f"few{labels}", "a", "global", 0, value)
        info = json.loads((folder / "run.json").read_text()) | {"fit": {"labels": labels}}
        (folder / "run.json").write_text(json.dumps(info))
        folders.append(folder)
    assert across_datasets(folders, BOOTSTRAP)["model"].tolist() == ["global, 100%", "global, 10%"]
