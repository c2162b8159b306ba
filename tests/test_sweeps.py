"""Sweeps: which networks become of lists, that shared batches change nothing, what is kept and shown."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import RANDOM_STEPS, random_mask_row, random_row, random_store

from satdifuser.errors import DeviceError, RunError, SettingsError, StoreError
from satdifuser.evaluate.chosen import best_of_each
from satdifuser.evaluate.evaluation import check_features, ensure_measured_on_val, evaluate_run, new_outcome
from satdifuser.evaluate.results import format_cells, results_table
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse import fit as fit_module
from satdifuser.fuse.data import MapLoader, TrainingData
from satdifuser.fuse.fit import fit, fit_candidates
from satdifuser.fuse.fusion import ConcatenationFusion
from satdifuser.fuse.grid import Candidate, expand, sweep_section
from satdifuser.fuse.inputs import choose_inputs, join_inputs, named_inputs
from satdifuser.fuse.run_folder import Run, load_weights
from satdifuser.fuse.settings import FitSettings, SweepSettings
from satdifuser.fuse.train import COST, NewScorer, Training, run_epoch, share_cost
from satdifuser.store import energy
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

LAYERS = [
    LayerInfo(name="up.0.attn1", channels=4, stride=8, height=2, width=2),
    LayerInfo(name="up.0.conv2", channels=3, stride=8, height=2, width=2),
    LayerInfo(name="up.1.attn1", channels=4, stride=4, height=4, width=4),
    LayerInfo(name="up.1.conv2", channels=4, stride=4, height=4, width=4),
]
QUICK: dict[str, Any] = {"projection": 8, "norm_groups": 1, "epochs": 2, "warmup_epochs": 0, "device": "cpu"}
QUICK |= {"batch_size": 4, "min_steps": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return random_store(tmp_path_factory.mktemp("sweep") / "s.zarr", LAYERS, 24)


def names(store: FeatureStore, **lists: Any) -> list[str]:
    return [one.name for one in expand(SweepSettings(**lists), store)]


def test_every_combination_is_named_by_what_varies(store: FeatureStore) -> None:
    assert names(store, fusion=["global", "moe"]) == ["global-seed0", "moe-seed0"]
    assert names(store, fusion=["global"], lr=[0.1, 0.02], seeds=[3, 4]) == [
        "global-lr0.1-seed3",
        "global-lr0.1-seed4",
        "global-lr0.02-seed3",
        "global-lr0.02-seed4",
    ]
    assert names(store, fusion=["global"], lr=[0.1], timesteps=[1]) == ["global-seed0"]
    lists = {"timesteps": [[1], [1, 21], "all"], "layers": [["up.0.attn1"], ["*.attn1", "up.1.*"]]}
    assert names(store, fusion=["moe"], **lists)[:3] == [
        "moe-up.0.attn1-t1-seed0",
        "moe-up.0.attn1-t1_21-seed0",
        "moe-up.0.attn1-tall-seed0",
    ]
    assert all(name.startswith("moe-_.attn1+up.1._~") for name in names(store, fusion=["moe"], **lists)[3:])


def test_single_is_each_timestep_and_kind_of_layer(store: FeatureStore) -> None:
    found = expand(SweepSettings(fusion=["single"]), store)
    assert [one.name for one in found] == [
        f"single-t{t}-{kind}-seed0" for t in RANDOM_STEPS for kind in ("attn1", "conv2")
    ]
    assert found[3].settings.timesteps == [21]
    assert found[3].settings.layers == ["up.0.conv2", "up.1.conv2"]
    some = names(store, fusion=["single"], timesteps=[[1], [1, 21]], layers=["up.0.attn1"])
    assert some == ["single-t1-attn1-seed0", "single-t21-attn1-seed0"]  # what the lists share counts once


def test_inputs_pick_from_what_is_read_together(store: FeatureStore) -> None:
    few = named_inputs(store, [101], ["up.1.*"])
    other = named_inputs(store, [1, 21], ["*.attn1"])
    whole = join_inputs(store, [few, other])
    assert [layer.name for layer in whole.layers] == ["up.0.attn1", "up.1.attn1", "up.1.conv2"]
    rows, order = store.select("train"), np.array([3, 0])

    def read(inputs: Any) -> tuple[Any, Any]:
        loader = MapLoader(store, rows, FitSettings(), torch.device("cpu"), inputs)
        return next(loader.batches(order, 2, loader.statistics()))[0], loader.statistics()

    maps, statistics = read(whole)
    for inputs in (few, other, whole):
        alone, own = read(inputs)
        picked = inputs.maps_of(whole, maps)
        assert picked.keys() == alone.keys() == inputs.channels.keys()
        for stride, layers in picked.items():
            assert all(torch.equal(a, b) for a, b in zip(layers, alone[stride], strict=True))
        for group, pair in inputs.statistics_of(whole, statistics).items():
            assert all(np.array_equal(a, b) for a, b in zip(pair, own[group], strict=True))


def test_concatenation_joins_all_maps_of_a_scale() -> None:
    torch.manual_seed(0)
    fusion = ConcatenationFusion({8: [4, 3], 4: [2]}, 2, 8, 1)
    maps = {8: [torch.randn(3, 2, 4, 2, 2), torch.randn(3, 2, 3, 2, 2)], 4: [torch.randn(3, 2, 2, 4, 4)]}
    (fine, coarse), weights = fusion(maps)
    assert weights == []
    assert (fine.shape, coarse.shape) == ((3, 8, 4, 4), (3, 8, 2, 2))
    joined = torch.cat([maps[8][layer][:, t] for t in range(2) for layer in range(2)], dim=1)
    torch.testing.assert_close(fusion.bottleneck_layers[1](joined), coarse)


GRID = SweepSettings(
    fusion=["single", "concatenation", "global", "localized", "moe"],
    timesteps=[[1, 101], "all"],
    lr=[0.01, 0.001],
    **QUICK,
)


def facts(run: Run) -> dict[str, Any]:
    """A run.json without what may differ between two trainings of the same network."""
    told = {k: v for k, v in run.info.items() if k not in ("name", *COST)}
    return told | {"history": [{k: v for k, v in e.items() if k not in COST} for e in run.info["history"]]}


def test_networks_that_share_batches_end_where_each_ends_alone(store: FeatureStore, tmp_path: Path) -> None:
    candidates = [one for one in expand(GRID, store) if one.settings.lr == 0.01]
    assert len(candidates) == 6 + 8
    together = fit_candidates(store, candidates, tmp_path / "together", new_outcome)
    for one, run in zip(candidates, together, strict=True):
        assert run.path.name == one.name
        alone = fit(store, one.settings, one.fusion, one.seed, tmp_path / "alone", new_outcome, True)
        assert facts(alone) == facts(run)
        assert alone.info["model_sha256"] == run.info["model_sha256"]


def test_masks_and_their_dropout_do_not_depend_on_company(tmp_path: Path) -> None:
    store = random_store(tmp_path / "m.zarr", LAYERS, 24, row_of=random_mask_row, task="segmentation")
    sweep = SweepSettings(fusion=["global", "concatenation"], head=["upernet", "linear"], **QUICK)
    candidates = expand(sweep, store)
    assert [one.name for one in candidates][:2] == ["global-upernet-seed0", "global-linear-seed0"]
    together = fit_candidates(store, candidates, tmp_path / "together", new_outcome)
    for one, run in zip(candidates, together, strict=True):
        alone = fit(store, one.settings, one.fusion, one.seed, tmp_path / "alone", new_outcome, True)
        assert alone.info["model_sha256"] == run.info["model_sha256"]
        assert run.info["head"] == one.settings.head


def test_a_batch_is_read_once_for_all_networks_of_a_seed(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, steps = [], []
    read, learn = MapLoader.batches, Training.learn

    def count(self: MapLoader, *args: Any) -> Any:
        for batch in read(self, *args):
            batches.append(len(batch[2]))
            yield batch

    monkeypatch.setattr(MapLoader, "batches", count)
    monkeypatch.setattr(Training, "learn", lambda self, *args: (steps.append(self), learn(self, *args)))
    candidates = expand(SweepSettings(fusion=["global", "moe"], seeds=[0, 1], **QUICK), store)
    fit_candidates(store, candidates, tmp_path / "together", new_outcome)
    together = len(batches)
    batches.clear()
    assert len(steps) == 4 * 2 * 3
    for one in candidates:
        fit_candidates(store, [one], tmp_path / "apart", new_outcome)
    assert len(batches) == 2 * together


def test_networks_beyond_the_memory_wait(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(fit_module, "run_epoch", lambda t, new: (sizes.append(len(t)), run_epoch(t, new)))
    sweep = SweepSettings(fusion=["global"], lr=[0.1, 0.2, 0.3], **QUICK | {"epochs": 1})
    data = TrainingData(store, sweep)
    one = Training(data, expand(sweep, store)[0])
    assert one.bytes == 5 * 4 * sum(p.numel() for p in one.network.parameters())
    for share, expected in ((0, [1, 1, 1]), (2.5, [2, 1]), (3, [3])):
        sizes.clear()
        small = sweep.model_copy(update={"networks_gb": share * one.bytes / 1e9})
        fit_candidates(store, expand(small, store), tmp_path / str(share), new_outcome)
        assert sizes == expected


def test_an_interrupted_sweep_goes_on_and_keeps_what_is_done(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = expand(SweepSettings(fusion=["global", "moe"], seeds=[0, 1], **QUICK), store)
    whole = fit_candidates(store, candidates, tmp_path / "whole", new_outcome)
    seen: list[tuple[str, int]] = []

    def interrupt_in(round_of: int, epoch: int) -> Any:
        def step(trainings: Sequence[Training], new_scorer: NewScorer) -> None:
            if (trainings[0].candidate.seed, trainings[0].epoch) == (round_of, epoch):
                raise KeyboardInterrupt
            seen.extend((t.candidate.name, t.epoch) for t in trainings)
            run_epoch(trainings, new_scorer)

        return step

    for stop in ((0, 1), (1, 1), (9, 9)):
        monkeypatch.setattr(fit_module, "run_epoch", interrupt_in(*stop))
        if stop == (9, 9):
            runs = fit_candidates(store, candidates, tmp_path / "parts", new_outcome)
        else:
            with pytest.raises(KeyboardInterrupt):
                fit_candidates(store, candidates, tmp_path / "parts", new_outcome)
    assert sorted(seen) == sorted((one.name, epoch) for one in candidates for epoch in (0, 1))
    for a, b in zip(whole, runs, strict=True):
        assert a.info["model_sha256"] == b.info["model_sha256"]
        assert not (b.path / "checkpoint.pt").exists()


def test_out_of_memory_says_what_takes_less_and_the_sweep_goes_on(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = expand(SweepSettings(fusion=["global", "moe"], **QUICK), store)
    whole = fit_candidates(store, candidates, tmp_path / "whole", new_outcome)

    def step(trainings: Sequence[Training], new_scorer: NewScorer) -> None:
        if trainings[0].epoch == 1 and len(trainings) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        run_epoch(trainings, new_scorer)

    monkeypatch.setattr(fit_module, "run_epoch", step)
    message = r"no memory for a step with batches of 4 tiles \(CUDA out of memory\); finished epochs are kept"
    with pytest.raises(DeviceError, match=message):
        fit_candidates(store, candidates, tmp_path / "parts", new_outcome)
    alone = SweepSettings(fusion=["global", "moe"], **QUICK | {"networks_gb": 0, "device_memory_gb": 0})
    runs = fit_candidates(store, expand(alone, store), tmp_path / "parts", new_outcome)
    assert [run.info["model_sha256"] for run in runs] == [run.info["model_sha256"] for run in whole]


def test_a_sweep_that_grew_trains_only_what_is_new(store: FeatureStore, tmp_path: Path) -> None:
    first = SweepSettings(fusion=["global"], lr=[0.01, 0.001], **QUICK)
    fit_candidates(store, expand(first, store), tmp_path, new_outcome)
    old = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/model.safetensors")}
    grown = first.model_copy(update={"lr": [0.01, 0.001, 0.1], "fusion": ["global", "moe"]})
    runs = fit_candidates(store, expand(grown, store), tmp_path, new_outcome)
    assert len(runs) == 6
    assert {path: path.stat().st_mtime_ns for path in old} == old
    other = grown.model_copy(update={"epochs": 3})
    with pytest.raises(
        RunError, match=r"(?s)holds a run of other settings:.*settings\.epochs: run has 2, asked"
    ):
        fit_candidates(store, expand(other, store), tmp_path, new_outcome)


def test_the_leaderboard_shows_val_alone_after_every_epoch(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boards: list[list[dict[str, str]]] = []
    board = tmp_path / "leaderboard.csv"
    write = fit_module.write_board

    def spy(path: Path, rows: Any) -> None:
        write(path, rows)
        with path.open() as file:
            boards.append(list(csv.DictReader(file)))

    monkeypatch.setattr(fit_module, "write_board", spy)
    candidates = expand(SweepSettings(fusion=["global", "moe"], seeds=[0, 1], **QUICK), store)
    runs = fit_candidates(store, candidates, tmp_path, new_outcome, board=board)
    assert [len(rows) for rows in boards] == [2, 2, 4, 4, 4]
    assert [row["epochs"] for row in boards[0]] == ["1", "1"]
    assert {row["done"] for row in boards[0]} == {"False"}
    assert {row["done"] for row in boards[-1]} == {"True"}
    values = [float(row["val"]) for row in boards[-1]]
    assert values == sorted(values, reverse=True)
    best = {run.path.name: max(e["val"]["accuracy"] for e in run.info["history"]) for run in runs}
    assert {row["run"]: float(row["val"]) for row in boards[-1]} == pytest.approx(best)
    assert "test" not in board.read_text()


def test_the_leaderboard_keeps_what_earlier_commands_fitted_to_the_same_store(
    store: FeatureStore, tmp_path: Path
) -> None:
    def fit_some(where: FeatureStore, **lists: Any) -> list[str]:
        candidates = expand(SweepSettings(**lists, **QUICK), where)
        board = tmp_path / "leaderboard.csv"
        fit_candidates(where, candidates, tmp_path, new_outcome, board=board)
        with board.open() as file:
            rows = list(csv.DictReader(file))
        values = [float(row["val"]) for row in rows]
        assert values == sorted(values, reverse=True)
        return sorted(f"{row['run']} {row['lr']}" for row in rows)

    first = ["global-lr0.01-seed0 0.01", "global-lr0.02-seed0 0.02"]
    assert fit_some(store, fusion=["global"], lr=[0.01, 0.02]) == first
    assert fit_some(store, fusion=["moe"], lr=[0.01]) == [*first, "moe-seed0 0.01"]
    other = random_store(tmp_path / "other.zarr", LAYERS, 12)
    (tmp_path / "global-lr0.02-seed0/run.json").write_text("{")
    for number, spoilt in enumerate(
        ({"fit": {"newer": 1}}, {"kind": None}, {"best_epoch": 9}, {"history": [1]})
    ):
        copied = shutil.copytree(tmp_path / "global-lr0.01-seed0", tmp_path / f"spoilt{number}")
        info = json.loads((copied / "run.json").read_text()) | spoilt
        (copied / "run.json").write_text(json.dumps(info))
    assert fit_some(other, fusion=["single"], timesteps=[21], layers=["*.attn1"])[0].startswith("single-")
    assert fit_some(store, fusion=["moe"], lr=[0.01]) == [first[0], "moe-seed0 0.01"]


def test_a_finished_sweep_needs_no_device(store: FeatureStore, tmp_path: Path) -> None:
    candidates = expand(SweepSettings(fusion=["global"], **QUICK), store)
    runs = fit_candidates(store, candidates, tmp_path, new_outcome)
    elsewhere = expand(SweepSettings(fusion=["global"], **QUICK | {"device": "gone:0"}), store)
    assert [run.info for run in fit_candidates(store, elsewhere, tmp_path, new_outcome)] == [
        run.info for run in runs
    ]
    with pytest.raises(SettingsError, match=r"fit\.device: 'gone:0' is not available here"):
        fit_candidates(store, elsewhere, tmp_path / "new", new_outcome)


def test_a_run_of_few_layers_is_measured_on_a_store_that_holds_more(
    store: FeatureStore, tmp_path: Path
) -> None:
    settings = FitSettings(layers=["*.attn1"], timesteps=[101, 1], **QUICK)
    run = fit(store, settings, "global", 0, tmp_path / "run", new_outcome)
    assert run.info["timesteps"] == [1, 101]
    assert [layer["name"] for layer in run.info["layers"]] == ["up.0.attn1", "up.1.attn1"]
    assert np.shape(run.info["weights"]["values"]) == (2, 2)
    metrics = evaluate_run(run.path, None, EvaluateSettings(bootstrap=5))
    assert metrics["val"] == run.info["history"][run.info["best_epoch"] - 1]["val"]
    fewer = random_store(tmp_path / "fewer.zarr", LAYERS[:1], 24)
    with pytest.raises(
        RunError, match=r"layers: run expects \['up.0.attn1', 'up.1.attn1'\], store has \['up.0"
    ):
        check_features(run, fewer)


def test_few_labels_are_nested_and_drawn_several_times(store: FeatureStore, tmp_path: Path) -> None:
    sweep = SweepSettings(fusion=["global"], labels="50%,100%", shots="1", draws=2, seeds=[0, 1], **QUICK)
    candidates = expand(sweep, store)
    assert [one.name for one in candidates if one.seed == 0] == [
        "global-50pct-draw0-seed0",
        "global-50pct-draw1-seed0",
        "global-100pct-seed0",
        "global-1shot-draw0-seed0",
        "global-1shot-draw1-seed0",
    ]
    data = TrainingData(store, sweep)
    drawn = [set(data.training_positions(one.settings.budget, one.settings.draw)) for one in candidates[::2]]
    assert drawn[3] < drawn[0] < drawn[2]
    assert drawn[0] != drawn[1]
    labels = np.asarray(store.targets(data.train.rows[sorted(drawn[3])]))
    assert sorted(labels) == [0, 1]
    runs = fit_candidates(store, candidates, tmp_path, new_outcome)
    assert [run.info["train_tiles"] for run in runs[::2]] == [len(tiles) for tiles in drawn]
    for run in runs:
        ensure_measured_on_val(run, store, EvaluateSettings(bootstrap=5))
    table = results_table([run.path for run in runs], "val")
    assert sorted(zip(table["run"], map(len, table["seeds"]), strict=True)) == [
        ("global-100pct", 2),
        ("global-1shot", 4),
        ("global-50pct", 4),
    ]
    assert best_of_each([run.path for run in runs]) == [run.path for run in runs]


def test_a_network_of_few_labels_sees_no_other_tile(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    read = MapLoader.batches

    def spy(self: MapLoader, order: Any, *args: Any) -> Any:
        if len(self.rows) == len(store.select("train")) - 1:  # one has no label
            seen.extend(order)
        return read(self, order, *args)

    monkeypatch.setattr(MapLoader, "batches", spy)
    settings = FitSettings(shots="2", **QUICK | {"min_steps": 32})
    run = fit(store, settings, "global", 0, tmp_path / "run", new_outcome)
    assert len(set(seen)) == run.info["train_tiles"] == 4
    assert len(seen) == 2 * 32 * 4  # epochs, steps and tiles of a step


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    def only(value: int) -> Any:
        return lambda number: replace(random_row(number), target=np.array(value, np.int32))

    store = random_store(tmp_path / "one.zarr", LAYERS, 12, row_of=only(1))
    with pytest.raises(
        StoreError, match=r"nothing to tell apart: .* training tiles are the same \(land\); choose"
    ):
        fit(store, FitSettings(**QUICK), "global", 0, tmp_path / "run", new_outcome)

    def ignored(number: int) -> Any:
        row = random_mask_row(number)
        return replace(row, target=np.full((16, 16), 255, np.uint8)) if row.split == "train" else row

    store = random_store(tmp_path / "masks.zarr", LAYERS, 12, row_of=ignored, task="segmentation")
    with pytest.raises(StoreError, match=r"training tiles are the same \(none, all pixels are ignored\)"):
        fit(store, FitSettings(**QUICK), "global", 0, tmp_path / "run", new_outcome)


def test_batches_of_one_tile_are_refused_where_a_batch_norm_compares_tiles(tmp_path: Path) -> None:
    store = random_store(tmp_path / "masks.zarr", LAYERS, 12, row_of=random_mask_row, task="segmentation")
    with pytest.raises(SettingsError, match=r"fit.batch_size: got 1, but the batch norm of this head"):
        fit(store, FitSettings(**QUICK | {"batch_size": 1}), "global", 0, tmp_path / "run", new_outcome)


def test_one_training_tile_is_enough(tmp_path: Path) -> None:
    def one_in_train(number: int) -> Any:
        return replace(random_mask_row(number), split="train" if number == 4 else "val")

    store = random_store(tmp_path / "masks.zarr", LAYERS, 12, row_of=one_in_train, task="segmentation")
    run = fit(store, FitSettings(**QUICK), "global", 0, tmp_path / "run", new_outcome)
    assert run.info["train_tiles"] == 1


def test_a_class_that_only_val_has_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(number: int) -> Any:
        made = random_row(number)
        return replace(made, target=np.array(2, np.int32)) if made.split == "val" else made

    store = random_store(tmp_path / "s.zarr", LAYERS, 24, row_of=row, classes=["sea", "land", "ice"])
    sweep = SweepSettings(fusion=["global"], seeds=[0, 1], **QUICK)
    runs = fit_candidates(store, expand(sweep, store), tmp_path, new_outcome)
    told = capsys.readouterr().err
    assert (
        told.count("val holds ice, but no training tile does (labels: 100%): it will never be predicted") == 1
    )
    assert [run.info["unseen_classes"] for run in runs] == [["ice"], ["ice"]]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"shots": "50"}, r"shots: 50 shots of each class, but there are fewer training tiles: sea has \d+"),
        ({"labels": "1%"}, r"labels: 1% of the \d+ training tiles leaves none of "),
        (
            {"labels": "0.01x_train"},
            r"labels: got '0.01x_train', expected a share such as 10%, or a partition",
        ),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(
    store: FeatureStore, tmp_path: Path, asked: Any, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        fit(store, FitSettings(**asked, **QUICK), "global", 0, tmp_path / "run", new_outcome)


def test_budgets_that_cannot_be_read_are_wrong_settings(store: FeatureStore) -> None:
    assert SweepSettings(shots=5).shots == "5"
    with pytest.raises(ValueError, match="labels: got '0%', expected shares above 0%"):
        SweepSettings(labels="0%")
    with pytest.raises(ValueError, match="shots: got 'x', expected whole numbers from 1"):
        SweepSettings(shots="x")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"timesteps": [22]}, r"timestep 22 is not in .*s\.zarr; it holds \[1, 21, 101\]"),
        ({"layers": ["up.0.attn"]}, r"layer 'up\.0\.attn' is not in .*s\.zarr; did you mean up\.0\.attn1"),
    ],
)
def test_what_the_store_does_not_hold_is_refused(store: FeatureStore, asked: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        choose_inputs(store, FitSettings(**asked))
    with pytest.raises(SettingsError, match=message):
        expand(SweepSettings(**asked), store)


def test_a_candidate_alone_is_a_pipeline_file(store: FeatureStore) -> None:
    for one in expand(GRID, store):
        again = expand(SweepSettings.model_validate(sweep_section(one)), store)
        assert [(c.fusion, c.seed, c.settings) for c in again] == [(one.fusion, one.seed, one.settings)]
        assert isinstance(again[0], Candidate)


# --- cost


def test_trainings_that_share_batches_share_their_cost() -> None:
    first, second = share_cost([1.0, 2.0], seconds=5.0, joules=100.0)
    assert first == {"seconds": 2.0, "device_seconds": 1.0, "joules": 40.0}
    assert second == {"seconds": 3.0, "device_seconds": 2.0, "joules": 60.0}
    assert share_cost([1.0], 1.5, None) == [{"seconds": 1.5, "device_seconds": 1.0, "joules": None}]


@pytest.mark.parametrize("counters", [[], [itertools.count().__next__]], ids=["without RAPL", "with"])
def test_a_run_records_its_cost_and_the_table_shows_it(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counters: list[Any]
) -> None:
    monkeypatch.setattr(energy, "cpu_counters", lambda: counters)
    run = fit(store, FitSettings(**QUICK), "global", 0, tmp_path / "run", new_outcome)
    assert run.info["device_seconds"] == pytest.approx(sum(e["device_seconds"] for e in run.info["history"]))
    assert 0 < run.info["device_seconds"] <= run.info["seconds"]
    assert run.info["joules"] == (2.0 if counters else None)  # one between the two readings of each epoch
    evaluate_run(run.path, store.path, EvaluateSettings(bootstrap=10, pictures=1))
    table = results_table([run.path])
    (cells,) = format_cells(table)
    assert cells["device seconds"] == f"{run.info['device_seconds']:.1f}"
    assert cells.get("joules") == ("2.0" if counters else None)


@pytest.mark.parametrize("fusion", ["global", "localized", "moe"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_nearly_alike(
    store: FeatureStore, tmp_path: Path, fusion: Any, precision: str
) -> None:
    wide, narrow = (
        fit(store, FitSettings(**QUICK, precision=p), fusion, 0, tmp_path / p, new_outcome)  # type: ignore[arg-type]
        for p in ("float32", precision)
    )
    for ours, theirs in zip(narrow.info["history"], wide.info["history"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)
        assert ours["train_loss"] != theirs["train_loss"]
    state, _ = load_weights(narrow)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
