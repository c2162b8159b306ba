"""Trains one network on cached features: store in, run folder out.

The protocol of Jia et al. (arXiv 2503.07890, section 4): Adam, linear warm-up then cosine decay, early
stopping on validation; the weights of the best validation epoch are kept. Every epoch draws its order and
its dropout from (seed, epoch), so that a training that was interrupted ends where an undisturbed one does.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from satdifuser.errors import RunError, SettingsError
from satdifuser.fuse.data import MapLoader, Statistics, TrainingData, channels_by_stride
from satdifuser.fuse.device import choose_device
from satdifuser.fuse.fusion import FeatureMaps
from satdifuser.fuse.network import HEADS, OURS, Network, Variant, build_network, choose_widths
from satdifuser.fuse.run_folder import (
    CHECKPOINT_FILE,
    RUN_FILE,
    Run,
    load_checkpoint,
    load_weights,
    open_run,
    save_checkpoint,
    save_run,
)
from satdifuser.fuse.settings import FitSettings, FusionName
from satdifuser.store.place import typical_pixel_size
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import differing_fields

MAIN_METRIC = {"classification": "accuracy", "multilabel": "f1_micro", "segmentation": "miou"}
"""What is best of a task: decides on val which epoch, probe or run is chosen."""

Prediction = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Probabilities (B, classes) or (B, classes, H, W), and targets (B,), (B, classes) or (B, H, W)."""
Measure = Callable[[FeatureStore, Iterator[Prediction]], dict[str, float]]
"""Turns the predictions of a split into metrics; handed in, since `evaluate` builds on this room."""


def fit(
    store: FeatureStore,
    settings: FitSettings,
    fusion: FusionName,
    seed: int,
    out: Path,
    measure: Measure,
    overwrite: bool = False,
    data: TrainingData | None = None,
) -> Run:
    """Train one fusion with one seed, or go on with a training that was interrupted.

    Args:
        store: A complete store with targets and the splits train and val.
        settings: Of the training.
        fusion: Which fusion module.
        seed: Of initial weights, batch order and dropout.
        out: The run's folder; a finished run of the same settings is returned as it is.
        measure: Metrics of the predictions of a split.
        overwrite: Train anew whatever is at `out`.
        data: What is read of the store, shared by several trainings; None reads it for this one.

    Raises:
        StoreError: shards are missing, or a split is empty.
        RunError: another run is at `out`.
        SettingsError: the store has no targets or not those, or not the partition, that the settings ask for.
    """
    check_task(store, settings)
    identity = run_identity(store, settings, fusion, seed)
    if not overwrite and (done := _finished(out, identity)):
        return done
    training = Training(store, settings, fusion, seed, data or TrainingData(store, settings))
    training.restore(None if overwrite else _unfinished(out, identity))
    name = f"fit {fusion} (seed {seed})"
    epochs = range(training.epoch, settings.epochs)
    with tqdm(epochs, desc=name, unit="epoch", disable=None, initial=training.epoch) as bar:
        for epoch in bar:
            if training.epoch - training.best_epoch > settings.patience:
                break
            metrics = training.run_epoch(epoch, measure)
            bar.set_postfix_str(" ".join(f"{key} {value:.3f}" for key, value in metrics.items()))
            save_checkpoint(_made(out), training.state() | {"identity": identity})
    info = training.describe() | {"name": out.name, "identity": identity}
    run = save_run(
        out,
        info,
        {"fit": settings.model_dump(mode="json")} | store.attributes.settings,
        training.best,
        training.statistics,
    )
    (out / CHECKPOINT_FILE).unlink(missing_ok=True)
    return run


def check_task(store: FeatureStore, settings: FitSettings) -> None:
    """Refuse a store without the targets that the settings ask for."""
    task = store.attributes.task
    if task is None:
        raise SettingsError(f"{store.path}: holds no targets to fit to; extract from a source with labels")
    if settings.task not in ("auto", task):
        raise SettingsError(f"fit.task: got {settings.task}, but {store.path} holds targets for {task}")


def run_identity(store: FeatureStore, settings: FitSettings, fusion: FusionName, seed: int) -> dict[str, Any]:
    """What a run must share with another to be the same one."""
    whereabouts = {"memory_gb", "device_memory_gb", "device"}
    shaping = settings.model_dump(mode="json", exclude={"fusion", "seeds"} | whereabouts)
    shaping["partition"] = store.choose_partition(settings.partition)
    return {"fusion": fusion, "seed": seed, "settings": shaping, "store": store.hashes().model_dump()}


def _finished(out: Path, identity: dict[str, Any]) -> Run | None:
    if not (out / RUN_FILE).is_file():
        return None
    run = open_run(out)
    _check_same(out, identity, run.info.get("identity", {}))
    return run


def _unfinished(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    state = load_checkpoint(out)
    if state is not None:
        _check_same(out, identity, state["identity"])
    return state


def _check_same(out: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if ours != theirs:
        fields = [line.replace("store has", "run has") for line in differing_fields(ours, theirs)]
        raise RunError(
            f"{out}: holds a run of other settings:\n  " + "\n  ".join(fields) + "\n"
            "write to another folder, or replace it with --overwrite"
        )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Training:
    """The state of one training between two epochs."""

    def __init__(
        self,
        store: FeatureStore,
        settings: FitSettings,
        fusion: FusionName,
        seed: int,
        data: TrainingData,
    ) -> None:
        self.store, self.settings, self.fusion, self.seed = store, settings, fusion, seed
        self.train, self.val = data.train, data.val
        self.statistics = data.statistics if settings.normalise else None
        torch.manual_seed(seed)
        self.device = choose_device(settings.device)
        self.network = new_network(store, settings, fusion).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.epoch, self.best_epoch, self.best_value = 0, 0, -math.inf
        self.best: dict[str, Tensor] = {}
        self.history: list[dict[str, Any]] = []

    def run_epoch(self, epoch: int, measure: Measure) -> dict[str, float]:
        """Train one epoch, measure it on validation, and keep the weights if they are the best so far."""
        began = time.monotonic()
        loss = self._train_epoch(epoch)
        metrics = measure(self.store, predict(self.network, self.val, self.settings, self.statistics))
        task = str(self.store.attributes.task)
        value = metrics[MAIN_METRIC[task]]
        if not math.isfinite(value):
            lacking = "tile with a class" if task == "multilabel" else "labelled pixel"
            raise RunError(f"{self.store.path}: split 'val' holds no {lacking} to choose an epoch by")
        self.epoch = epoch + 1
        if value > self.best_value:
            self.best_value, self.best_epoch = value, self.epoch
            self.best = copy.deepcopy(self.network.state_dict())
        seconds = round(time.monotonic() - began, 3)
        self.history.append({"epoch": self.epoch, "train_loss": loss, "val": metrics, "seconds": seconds})
        return metrics

    def _train_epoch(self, epoch: int) -> float:
        torch.manual_seed(self.seed * 100_003 + epoch)  # dropout
        order = training_order(len(self.train.rows), self.settings.batch_size, [self.seed, epoch])
        batches = -(-len(order) // self.settings.batch_size)
        self.network.train()
        losses = []
        for index, (maps, targets, _) in enumerate(
            self.train.batches(order, self.settings.batch_size, self.statistics)
        ):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(epoch + index / batches, self.settings)
            loss = self._loss(maps, targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return float(np.mean(losses))

    def _loss(self, maps: FeatureMaps, targets: Tensor | None) -> Tensor:
        if targets is None:
            raise SettingsError(f"{self.store.path}: holds no targets to fit to")
        targets = targets.to(self.device)
        logits, _ = self.network(maps, mask_size(targets))
        return loss(logits, targets, self.store.attributes.ignore_value)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
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
        for name in ("best", "epoch", "best_epoch", "best_value", "history"):
            setattr(self, name, state[name])

    def describe(self) -> dict[str, Any]:
        """The run's run.json."""
        described = describe_run(self.store, self.settings, self.fusion, self.seed, self.network, self.best)
        return described | {
            "history": self.history,
            "best_epoch": self.best_epoch,
            "seconds": round(sum(row["seconds"] for row in self.history), 3),
        }


def describe_run(
    store: FeatureStore,
    settings: FitSettings,
    fusion: FusionName,
    seed: int | None,
    network: Network,
    state: Mapping[str, Tensor],
) -> dict[str, Any]:
    """A run.json as far as it does not tell of the training.

    ``resolved`` says what became of the settings that may be ``auto``.

    Args:
        store: What the run is for.
        settings: Of the training.
        fusion: Which fusion module.
        seed: Of the training; None where it is not known.
        network: The network.
        state: Its weights that are kept.
    """
    a = store.attributes
    projection, norm_groups = choose_widths(channels_by_stride(a.layers), settings)
    head = HEADS[a.task] if a.task else None
    partition = store.choose_partition(settings.partition)
    return {
        "format_version": 1,
        "kind": "fusion",
        "task": a.task,
        "fusion": fusion,
        "head": head,
        "seed": seed,
        "partition": partition,
        "classes": a.classes,
        "ignore_value": a.ignore_value,
        "timesteps": a.timesteps,
        "layers": [layer.model_dump() for layer in a.layers],
        "feature_identity": a.feature_identity,
        "pixel_size_m": typical_pixel_size(store),
        "store": {"path": str(store.path), "hashes": store.hashes().model_dump()},
        "fit": settings.model_dump(mode="json"),
        "resolved": {
            "task": a.task,
            "partition": partition,
            "head": head,
            "projection": projection,
            "norm_groups": norm_groups,
            "device": str(choose_device(settings.device)),
        },
        "parameters": sum(p.numel() for p in network.parameters()),
        "weights": mixing_weights(store, state) if fusion == "global" else None,
    }


def mixing_weights(store: FeatureStore, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Learned weights of the global fusion, (T, L) with layers from fine to coarse."""
    layers = sorted(store.attributes.layers, key=lambda layer: layer.stride)
    weights = state["fusion.mixing_weights"].softmax(0).view(-1, len(layers))
    return {
        "timesteps": store.attributes.timesteps,
        "layers": [layer.name for layer in layers],
        "values": weights.tolist(),
    }


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


def mask_size(targets: Tensor) -> tuple[int, int] | None:
    """Height and width of masks (B, H, W); None for labels."""
    return None if targets.ndim < 3 else (targets.shape[-2], targets.shape[-1])


def training_order(tiles: int, batch_size: int, seed: list[int]) -> NDArray[np.intp]:
    """A shuffled order of tiles; a last batch of one tile is left out, since batch norm needs two."""
    order: NDArray[np.intp] = np.random.default_rng(seed).permutation(tiles)
    return order[:-1] if tiles > 1 and tiles % batch_size == 1 else order


def new_network(
    store: FeatureStore, settings: FitSettings, fusion: FusionName, variant: Variant = OURS
) -> Network:
    """Build the network for a store's layers, timesteps and classes."""
    a = store.attributes
    if a.task is None:
        raise SettingsError(f"{store.path}: holds no targets to fit to")
    return build_network(
        fusion, channels_by_stride(a.layers), len(a.timesteps), len(a.classes), a.task, settings, variant
    )


def load_network(run: Run) -> tuple[Network, Statistics | None, FitSettings]:
    """Rebuild a run's network with its weights, in evaluation mode; no store is needed."""
    info = run.info
    settings = FitSettings.model_validate(info["fit"])
    variant = Variant(**info.get("variant", {}))  # of a run that was imported
    channels, steps, classes = channels_by_stride(run.layers), len(info["timesteps"]), len(info["classes"])
    network = build_network(info["fusion"], channels, steps, classes, info["task"], settings, variant)
    state, statistics = load_weights(run)
    network.load_state_dict(state)
    # not the device of the fit: a run made on a GPU is used on machines without one
    return network.to(choose_device("auto")).eval(), statistics, settings


def learning_rate(epoch: float, settings: FitSettings) -> float:
    """Linear warm-up from ``warmup_lr``, then half a cosine down to ``final_lr``; epoch may be fractional."""
    if epoch < settings.warmup_epochs:
        start = min(settings.warmup_lr, settings.lr)
        return start + (settings.lr - start) * epoch / settings.warmup_epochs
    final = min(settings.final_lr, settings.lr)
    progress = (epoch - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1)
    return final + (settings.lr - final) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


@torch.no_grad()
def predict(
    network: Network, loader: MapLoader, settings: FitSettings, statistics: Statistics | None
) -> Iterator[Prediction]:
    """Yield the probabilities and targets of all of a loader's tiles, in their order."""
    network.eval()
    order = np.arange(len(loader.rows))
    for maps, targets, _ in loader.batches(order, settings.batch_size, statistics):
        if targets is None:
            raise SettingsError(f"{loader.store.path}: holds no targets to compare with")
        logits, _ = network(maps, mask_size(targets))
        probabilities = logits.sigmoid() if targets.shape == logits.shape else logits.softmax(1)
        yield probabilities.cpu().numpy(), targets.numpy()
