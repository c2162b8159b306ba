"""Shows how trainings go in TensorBoard or Weights & Biases, where these are installed.

Each training is a run there, with its fusion, seed and settings; every epoch adds its loss, learning rate and
metrics on val. What an interrupted training had behind it is written again, so that its run is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from satdifuser.errors import RunError, SettingsError
from satdifuser.fuse.settings import LogName
from satdifuser.fuse.train import Training, learning_rate

PROJECT = "satdifuser"  # in Weights & Biases


class Log(Protocol):
    """Takes in the epochs of one training."""

    def write(self, epoch: int, values: dict[str, float]) -> None:
        """Take in the values of an epoch, counted from 1."""

    def close(self) -> None:
        """Nothing more will come."""


class TensorBoardLog:
    """Event files in the run's folder: `tensorboard --logdir RUNS`."""

    def __init__(self, training: Training, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # values of an earlier training in this folder are hidden from the first epoch on
        self.writer = SummaryWriter(folder / training.candidate.name, purge_step=1)
        self.writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in settings_of(training).items()))

    def write(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbLog:
    """A run in Weights & Biases; with WANDB_MODE=offline a folder beside the runs, for `wandb sync`."""

    def __init__(self, training: Training, folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(
                project=PROJECT,
                group=folder.resolve().name,
                name=training.candidate.name,
                config=settings_of(training),
                dir=folder,
                reinit="create_new",  # several networks train at once
            )
        except wandb.Error as error:
            raise RunError(
                f"fit.log: wandb cannot begin a run: {error}; log in with `wandb login`, keep the log on "
                "this machine with WANDB_MODE=offline, or set fit.log=none"
            ) from error

    def write(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log(values, step=epoch)

    def close(self) -> None:
        self.run.finish()


LOGS: dict[str, Callable[[Training, Path], Log]] = {"tensorboard": TensorBoardLog, "wandb": WandbLog}


def check_log(kind: LogName) -> None:
    """Refuse a log whose package is not installed, before anything is trained.

    Raises:
        SettingsError: it is not.
    """
    if kind != "none" and find_spec(kind) is None:
        raise SettingsError(
            f"fit.log: {kind} is not installed; install it with `pip install {kind}`, or set fit.log=none"
        )


@contextmanager
def open_logs(trainings: Sequence[Training], folder: Path) -> Iterator[dict[str, Log]]:
    """The logs of trainings that advance together, by name; none where none are asked for.

    Args:
        trainings: Of one sweep.
        folder: Holds their folders.
    """
    with ExitStack() as stack:
        logs: dict[str, Log] = {}
        for training in (one for one in trainings if one.settings.log != "none"):
            log = logs[training.candidate.name] = LOGS[training.settings.log](training, folder)
            stack.callback(log.close)
            for row in training.history:
                log.write(row["epoch"], values_of(training, row))
        yield logs


def values_of(training: Training, row: dict[str, Any]) -> dict[str, float]:
    """What is shown of an epoch, a row of a training's history; the learning rate is that of its end."""
    rate = learning_rate(row["epoch"], training.settings)
    val = {f"val/{name}": value for name, value in row["val"].items()}
    return {"train/loss": row["train_loss"], "train/lr": rate, **val}


def settings_of(training: Training) -> dict[str, Any]:
    """What tells one run from another."""
    one = training.candidate
    return {"fusion": one.fusion, "seed": one.seed, **one.settings.model_dump(mode="json")}
