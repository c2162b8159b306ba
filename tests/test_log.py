"""Trainings shown in TensorBoard and Weights & Biases."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from command_line import call
from made_up import random_store

from satdifuser.errors import RunError, SettingsError
from satdifuser.evaluate.evaluation import new_outcome
from satdifuser.fuse import fit as fit_module
from satdifuser.fuse import log as log_module
from satdifuser.fuse.fit import fit_candidates
from satdifuser.fuse.grid import expand
from satdifuser.fuse.run_folder import Run
from satdifuser.fuse.settings import LogName, SweepSettings
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import LayerInfo

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
LAYERS = [LayerInfo(name="up.attn1", channels=4, stride=4, height=4, width=4)]
QUICK: dict[str, Any] = {"projection": 8, "norm_groups": 1, "epochs": 2, "warmup_epochs": 0, "device": "cpu"}
GRID: dict[str, Any] = {"fusion": ["global", "moe"], "seeds": [0, 1], **QUICK}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return random_store(tmp_path_factory.mktemp("store") / "s.zarr", LAYERS, 24)


def train(store: FeatureStore, folder: Path, kind: LogName, **changes: Any) -> list[Run]:
    sweep = SweepSettings(log=kind, **(GRID | changes))
    return fit_candidates(store, expand(sweep, store), folder, new_outcome)


def expected(run: Run) -> dict[int, dict[str, float]]:
    """What is told of each epoch, the learning rate aside."""
    return {
        row["epoch"]: {"train/loss": row["train_loss"]} | {f"val/{k}": v for k, v in row["val"].items()}
        for row in run.info["history"]
    }


class FakeWandb(ModuleType):
    """What of wandb is used; keeps what it was told."""

    class Error(Exception):
        """wandb's own."""

    def __init__(self, *, refuses: bool = False) -> None:
        super().__init__("wandb")
        self.refuses, self.runs = refuses, []  # type: ignore[var-annotated]

    def init(self, **words: Any) -> FakeRun:
        if self.refuses:
            raise self.Error("api_key not configured")
        self.runs.append(FakeRun(words))
        return self.runs[-1]


class FakeRun:
    def __init__(self, words: dict[str, Any]) -> None:
        self.words, self.epochs, self.finished = words, {}, False  # type: ignore[var-annotated]

    def log(self, values: dict[str, float], step: int) -> None:
        assert not self.finished
        self.epochs[step] = dict(values)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(log_module, "find_spec", lambda name: name)
    return fake


def test_every_epoch_of_every_network_is_told(store: FeatureStore, tmp_path: Path, wandb: FakeWandb) -> None:
    runs = train(store, tmp_path / "runs", "wandb", final_lr=0.001)
    assert len(runs) == len(wandb.runs) == 4
    told = {run.words["name"]: run for run in wandb.runs}
    for run in runs:
        log = told[run.info["name"]]
        rates = [values.pop("train/lr") for values in log.epochs.values()]
        assert rates == pytest.approx([0.0025, 0.001])  # half a cosine from 0.004
        assert log.epochs == expected(run)
        assert log.finished
        named = [log.words[key] for key in ("project", "group", "reinit")]
        assert named == ["satdifuser", "runs", "create_new"]
        held = {key: log.words["config"][key] for key in ("fusion", "seed", "lr")}
        assert held == {"fusion": run.info["fusion"], "seed": run.info["seed"], "lr": 0.004}


def test_what_an_interrupted_training_had_behind_it_is_told_again(
    store: FeatureStore, tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "_finish", lambda *_: pytest.fail("stopped"))
        with pytest.raises(BaseException, match="stopped"):
            train(store, tmp_path, "wandb", fusion=["global"], seeds=[0], patience=10)
    assert wandb.runs[0].finished
    (run,) = train(store, tmp_path, "wandb", fusion=["global"], seeds=[0], patience=10)
    assert [log.epochs.keys() for log in wandb.runs] == [{1, 2}, {1, 2}]
    assert wandb.runs[1].epochs == wandb.runs[0].epochs
    train(store, tmp_path, "wandb", fusion=["global"], seeds=[0], patience=10)
    assert len(wandb.runs) == 2  # a finished run is not trained, nor told, again
    assert train(store, tmp_path, "none", fusion=["global"], seeds=[0])[0].info == run.info


def test_wandb_that_cannot_begin_is_told(store: FeatureStore, tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.refuses = True
    with pytest.raises(RunError, match=r"fit\.log: wandb cannot .* api_key .* WANDB_MODE=offline, or set"):
        train(store, tmp_path, "wandb")


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_log_that_is_not_installed_is_refused_before_the_training(
    store: FeatureStore, tmp_path: Path, kind: LogName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "find_spec", lambda name: None)
    message = f"fit.log: {kind} is not installed; install it with `pip install {kind}`, or set fit.log=none"
    with pytest.raises(SettingsError, match=message):
        train(store, tmp_path / "runs", kind)
    result = call("fit", store.path, "-o", tmp_path / "runs", "--set", f"fit.log={kind}")
    assert (result.exit_code, message in result.stderr) == (2, True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_every_epoch(store: FeatureStore, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(store, tmp_path, "tensorboard", lr=[0.5], seeds=[0])
    for run in train(store, tmp_path / "again", "tensorboard", seeds=[0]):
        events = EventAccumulator(str(run.path)).Reload()
        names = [*expected(run)[1], "train/lr"]
        assert sorted(events.Tags()["scalars"]) == sorted(names)
        for name in expected(run)[1]:
            values = {event.step: event.value for event in events.Scalars(name)}
            assert values == pytest.approx({e: row[name] for e, row in expected(run).items()})
        assert "fusion: global" in str(events.Tensors("settings/text_summary")) or run.info["fusion"] == "moe"


@pytest.mark.slow
def test_wandb_holds_every_epoch(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(store, tmp_path, "wandb", seeds=[0])
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 2
