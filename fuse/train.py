"""Trains networks on cached features, several at once on the same batches.

The protocol of Jia et al. (arXiv 2503.07890, section 4): Adam, linear warm-up then cosine decay, early
stopping on validation; the weights of the best validation epoch are kept. Every epoch draws its order from
(seed, epoch) and every step its dropout from (seed, epoch, step), so that a training that was interrupted, or
that shares its batches with others, ends where an undisturbed one does.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from satdifuser.errors import RunError, SettingsError
from satdifuser.fuse.data import TrainingData
from satdifuser.fuse.fusion import FeatureMaps
from satdifuser.fuse.grid import Candidate
from satdifuser.fuse.inputs import choose_inputs
from satdifuser.fuse.network import Network
from satdifuser.fuse.processes import from_first, is_first, number, own_part, parallel, processes, weight_of
from satdifuser.fuse.run_network import Prediction, describe_run, mask_size, new_network, predict_batch
from satdifuser.fuse.settings import FitSettings
from satdifuser.store.device import check_dtype, choose_device, gpu_uuid
from satdifuser.store.energy import EnergyMeter, sum_if_all_tell
from satdifuser.store.reader import FeatureStore

MAIN_METRIC = {"classification": "accuracy", "multilabel": "f1_micro", "segmentation": "miou"}
"""What is best of a task: decides on val which epoch, probe or run is chosen."""

SHORTCUT_DECAY = 0.05
"""L2 penalty of the shortcut: of 2,000 tiles that of a logistic regression with scikit-learn's C = 0.01."""

COST = ("seconds", "device_seconds", "joules")
"""Of an epoch and of a whole training: wall time, what of it the device worked on, energy if it is shown."""


class Scorer(Protocol):
    """Takes in the predictions of a split, and turns them into metrics."""

    def add(self, probabilities: NDArray[np.float32], targets: NDArray[np.int64]) -> None:
        """Take in a prediction."""

    def metrics(self) -> dict[str, float]:
        """Metrics of all that was taken in."""


NewScorer = Callable[[FeatureStore], Scorer]
"""Makes an empty one; handed in, since `evaluate` builds on this room."""


class Training:
    """The state of one training between two epochs.

    Args:
        data: What is read of the store.
        candidate: Fusion, settings, and the seed of initial weights, batch order and dropout.
    """

    def __init__(self, data: TrainingData, candidate: Candidate) -> None:
        self.data, self.store, self.candidate = data, data.store, candidate
        self.settings = settings = candidate.settings
        self.inputs = choose_inputs(data.store, settings)
        whole = data.statistics
        self.statistics = None if whole is None else self.inputs.statistics_of(data.inputs, whole)
        self.positions = data.training_positions(settings.budget, settings.draw)
        torch.manual_seed(candidate.seed)
        self.device = choose_device(settings.device, "fit.device")
        self.network = new_network(data.store, self.inputs, settings, candidate.fusion).to(self.device)
        self._check_batches()
        self.parallel = parallel(self.network)
        self.optimizer = torch.optim.Adam(parameter_groups(self.network, settings), lr=settings.lr)
        self.precision = check_precision(self.device, settings)
        # float16 alone needs its small gradients scaled up
        self.scaler = torch.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.epoch, self.best_epoch, self.best_value = 0, 0, -math.inf
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []
        self._losses: list[float] = []
        self.seconds = 0.0
        """What the steps of this epoch took."""

    def _check_batches(self) -> None:
        """Refuse batches of one tile where a batch norm would have nothing to compare it with."""
        if self.settings.batch_size < 2 and holds_batch_norm(self.network):
            raise SettingsError(
                "fit.batch_size: got 1, but the batch norm of this head compares the tiles of a batch; set "
                "it to 2 or more, or set fit.head=linear"
            )

    @property
    def is_over(self) -> bool:
        """Whether all epochs are trained, or none of the last ones was better."""
        return self.epoch >= self.settings.epochs or self.epoch - self.best_epoch > self.settings.patience

    @property
    def order_seed(self) -> list[int]:
        """What the order of this epoch's tiles is drawn from."""
        return [self.candidate.seed, self.epoch]

    @property
    def bytes(self) -> int:
        """Memory of the weights, their gradients, Adam's two moments and the best weights."""
        return sum(5 * p.numel() * p.element_size() for p in self.network.parameters())

    def learn(self, maps: FeatureMaps, targets: Tensor, step: int, steps: int) -> None:
        """Take one step of an epoch.

        Args:
            maps: What `data` reads of a batch.
            targets: Of the same tiles; where several processes train, of this one's part of the batch.
            step: Which one of the epoch …
            steps: … of so many.
        """
        began = time.monotonic()
        self.network.train()
        drawn = step * processes() + number()
        torch.manual_seed((self.candidate.seed * 100_003 + self.epoch) * 1_000_003 + drawn)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.epoch + step / steps, self.settings)
        targets, ignore = targets.to(self.device), self.store.attributes.ignore_value
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            logits, _ = self.parallel(self.inputs.maps_of(self.data.inputs, maps), mask_size(targets))
        value = loss(logits.float(), targets, ignore) * weight_of((targets != ignore).sum())
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._losses.append(value.item())
        self.seconds += time.monotonic() - began

    def predict(self, maps: FeatureMaps, targets: Tensor) -> Prediction:
        """Predict some tiles, from what `data` reads of them."""
        began = time.monotonic()
        self.network.eval()
        found = predict_batch(self.network, self.inputs.maps_of(self.data.inputs, maps), targets)
        self.seconds += time.monotonic() - began
        return found

    def close_epoch(self, metrics: dict[str, float], cost: Mapping[str, float | None]) -> None:
        """End an epoch with its metrics on val and its cost; keep the weights if they are the best so far."""
        task = str(self.store.attributes.task)
        value = metrics[MAIN_METRIC[task]]
        if not math.isfinite(value):
            lacking = "tile with a class" if task == "multilabel" else "labelled pixel"
            raise RunError(f"{self.store.path}: split 'val' holds no {lacking} to choose an epoch by")
        self.epoch += 1
        if value > self.best_value:
            self.best_value, self.best_epoch = value, self.epoch
            self.best = copy.deepcopy(self.network.state_dict())
        loss_of_epoch = float(np.mean(self._losses))
        self.history.append({"epoch": self.epoch, "train_loss": loss_of_epoch, "val": metrics, **cost})
        self._losses, self.seconds = [], 0.0

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_value": self.best_value,
            "history": self.history,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a saved state, if there is one."""
        if state is None:
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name in ("best", "epoch", "best_epoch", "best_value", "history"):
            setattr(self, name, state[name])

    def describe(self) -> dict[str, Any]:
        """The run's run.json."""
        one = self.candidate
        facts = describe_run(
            self.store, self.inputs, one.settings, one.fusion, one.seed, self.network, self.best
        )
        tiles = {
            "train_tiles": len(self.positions),
            "unseen_classes": self.data.unseen_classes(self.positions),
        }
        return facts | tiles | self.progress()

    def progress(self) -> dict[str, Any]:
        """How far it is; a part of run.json."""
        return {
            "history": self.history,
            "best_epoch": self.best_epoch,
        } | {name: sum_if_all_tell([row.get(name) for row in self.history]) for name in COST}


def check_precision(device: torch.device, settings: FitSettings) -> torch.dtype:
    """The dtype of the training's forward.

    Raises:
        SettingsError: the device does not compute it.
    """
    precision: torch.dtype = getattr(torch, settings.precision)
    check_dtype(device, precision, "fit.precision", "use float16 or float32")
    return precision


def run_epoch(trainings: Sequence[Training], new_scorer: NewScorer) -> None:
    """Train one epoch of each on the same batches, and measure them on validation.

    Where several processes train, each takes its part of every batch, and the first one measures.

    Args:
        trainings: Of the same data, tiles, seed and batch size, with as many epochs behind them.
        new_scorer: Measures predictions.
    """
    first = trainings[0]
    began, meter = time.monotonic(), EnergyMeter(gpu_uuid(first.device))
    data, size, least = first.data, first.settings.batch_size, first.settings.min_steps
    order = first.positions[training_order(len(first.positions), size, first.order_seed, least)]
    steps, part = -(-len(order) // size), own_part(order, size)
    batches = data.train.labelled_batches(part, size // processes(), data.statistics)
    for step, (maps, targets) in enumerate(batches):
        for training in trainings:
            training.learn(maps, targets, step, steps)
    metrics = from_first(measure(trainings, new_scorer) if is_first() else [])
    costs = share_cost([training.seconds for training in trainings], time.monotonic() - began, meter.joules())
    for training, found, cost in zip(trainings, metrics, costs, strict=True):
        training.close_epoch(found, cost)


def measure(trainings: Sequence[Training], new_scorer: NewScorer) -> list[dict[str, float]]:
    """Metrics on validation of trainings that share their batches."""
    data, size = trainings[0].data, trainings[0].settings.batch_size
    scorers = [new_scorer(data.store) for _ in trainings]
    for maps, targets in data.val.labelled_batches(np.arange(len(data.val.rows)), size, data.statistics):
        for training, scorer in zip(trainings, scorers, strict=True):
            scorer.add(*training.predict(maps, targets))
    return [scorer.metrics() for scorer in scorers]


def share_cost(own: Sequence[float], seconds: float, joules: float | None) -> list[dict[str, float | None]]:
    """What each of several trainings cost that shared their batches.

    Args:
        own: Seconds of the device for each; the rest of the time is shared evenly.
        seconds: All of them took together.
        joules: All of them used, shared as the time is; None where the machine does not tell.

    Returns:
        A row of `COST` for each.
    """
    each = [mine + (seconds - sum(own)) / len(own) for mine in own]
    return [
        {
            "seconds": round(whole, 3),
            "device_seconds": round(mine, 3),
            "joules": None if joules is None else round(joules * whole / seconds, 3),
        }
        for whole, mine in zip(each, own, strict=True)
    ]


def loss(logits: Tensor, targets: Tensor, ignore: int) -> Tensor:
    """Mean cross-entropy over the targets that are not ignored; binary for each class of a multilabel task.

    Args:
        logits: (B, classes) or (B, classes, H, W) float32.
        targets: (B,) or (B, H, W) int64; or zeros and ones of the logits' shape, none of which is ignored.
        ignore: The target that counts for nothing.
    """
    if targets.shape == logits.shape:
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
    total = F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")
    return total / (targets != ignore).sum().clamp(min=1)  # a batch may hold ignored pixels only


def parameter_groups(network: Network, settings: FitSettings) -> list[dict[str, Any]]:
    """What Adam trains; the shortcut has thousands of inputs, and is penalised more than the rest."""
    decay, shortcut = settings.weight_decay, network.shortcut
    if shortcut is None:
        return [{"params": list(network.parameters()), "weight_decay": decay}]
    rest = [*network.fusion.parameters(), *network.head.parameters()]
    own = {"params": list(shortcut.parameters()), "weight_decay": decay + SHORTCUT_DECAY}
    return [{"params": rest, "weight_decay": decay}, own]


def holds_batch_norm(network: Network) -> bool:
    """Whether tiles of a batch are compared with each other."""
    return any(
        isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d) for module in network.modules()
    )


def training_order(tiles: int, batch_size: int, seed: list[int], min_steps: int) -> NDArray[np.intp]:
    """A shuffled order of tiles, all of them as often as `min_steps` batches need.

    A last batch of one tile for a process is left out, since batch norm needs two.
    """
    generator = np.random.default_rng(seed)
    rounds = max(1, -(-min_steps * batch_size // tiles))
    order: NDArray[np.intp] = np.concatenate([generator.permutation(tiles) for _ in range(rounds)])
    order = order[: max(tiles, min_steps * batch_size)]
    last = len(order) % batch_size
    return order[:-last] if 0 < last < 2 * processes() and last < len(order) else order


def learning_rate(epoch: float, settings: FitSettings) -> float:
    """Linear warm-up from ``warmup_lr``, then half a cosine down to ``final_lr``; epoch may be fractional."""
    if epoch < settings.warmup_epochs:
        start = min(settings.warmup_lr, settings.lr)
        return start + (settings.lr - start) * epoch / settings.warmup_epochs
    final = min(settings.final_lr, settings.lr)
    progress = (epoch - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1)
    return final + (settings.lr - final) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
