"""A run: one fitted network in a folder, with all that is needed to understand and use it again.

settings.yaml        the resolved settings
run.json             what was fitted on which store, with the history of its training
model.safetensors    weights, and the feature statistics they expect
checkpoint.pt        only while training is unfinished
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import load, save

from satdifuser.errors import RunError
from satdifuser.fuse.inputs import Statistics
from satdifuser.store.files import write_durably
from satdifuser.store.schema import DEFAULT_PARTITION, LayerInfo

RUN_FILE, MODEL_FILE, SETTINGS_FILE, CHECKPOINT_FILE, METRICS_FILE = (
    "run.json",
    "model.safetensors",
    "settings.yaml",
    "checkpoint.pt",
    "metrics.json",
)
STATISTICS_PREFIX = "statistics."


@dataclass(frozen=True)
class Run:
    """A fitted run on disk; ``info`` is its run.json."""

    path: Path
    info: dict[str, Any]

    @property
    def partition(self) -> str:
        """The partition of the store whose tiles it was fitted on; older runs knew the default one only."""
        return str(self.info.get("partition", DEFAULT_PARTITION))

    @property
    def layers(self) -> list[LayerInfo]:
        """The layers that its network reads."""
        return [LayerInfo.model_validate(layer) for layer in self.info["layers"]]

    @property
    def metrics(self) -> dict[str, Any]:
        """Its metrics.json.

        Raises:
            RunError: the run has not been evaluated, or the file is damaged.
        """
        path = self.path / METRICS_FILE
        if not path.is_file():
            raise RunError(f"{self.path}: has no metrics.json; run `satdifuser evaluate {self.path}`")
        try:
            metrics: dict[str, Any] = dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise RunError(
                f"{path}: is damaged: {error}; delete it, which starts its count of test reads anew, and "
                f"measure the run again: `satdifuser evaluate {self.path}`"
            ) from error
        return metrics


def open_run(path: Path) -> Run:
    """Open a run folder.

    Raises:
        RunError: it holds no finished run.
    """
    if not path.is_dir():
        raise RunError(f"{path}: no such run folder")
    if not (path / RUN_FILE).is_file():
        hint = "; its training is unfinished" if (path / CHECKPOINT_FILE).is_file() else ""
        raise RunError(
            f"{path}: not a run (no {RUN_FILE}){hint}; a run is a folder with {SETTINGS_FILE}, {RUN_FILE} "
            f"and {METRICS_FILE}; make one with `satdifuser fit`"
        )
    try:
        return Run(path, json.loads((path / RUN_FILE).read_text()))
    except ValueError as error:
        raise RunError(f"{path / RUN_FILE}: is damaged: {error}; fit again with --overwrite") from error


def read_settings(run: Run) -> dict[str, Any]:
    """The sections of a run's settings.yaml.

    Raises:
        RunError: it is missing or damaged.
    """
    file = run.path / SETTINGS_FILE
    try:
        sections = yaml.safe_load(file.read_text())
        return dict(sections)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{file}: cannot be read: {error}; fit again with --overwrite") from error


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run folders among these folders and directly in them, each once.

    Raises:
        RunError: a folder neither is a run nor holds one.
    """
    found: list[Path] = []
    for path in paths:
        inside = sorted(file.parent for file in path.glob(f"*/{RUN_FILE}"))
        found += inside or [open_run(path).path]
    return list(dict.fromkeys(found))


def save_run(
    path: Path,
    info: dict[str, Any],
    settings: dict[str, Any],
    state: dict[str, torch.Tensor] | None = None,
    statistics: Statistics | None = None,
) -> Run:
    """Write a run; run.json last, so that a run counts only once it is whole."""
    path.mkdir(parents=True, exist_ok=True)
    write_durably(path / SETTINGS_FILE, yaml.safe_dump(settings, sort_keys=False).encode())
    if state is not None:
        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in state.items()}
        for group, (mean, spread) in (statistics or {}).items():
            # safetensors writes memory as it lies, also where that is not in the order of the axes
            arrays[f"{STATISTICS_PREFIX}{group}.mean"] = np.ascontiguousarray(mean)
            arrays[f"{STATISTICS_PREFIX}{group}.spread"] = np.ascontiguousarray(spread)
        weights = save(arrays)
        write_durably(path / MODEL_FILE, weights)
        info = info | {"model_sha256": hashlib.sha256(weights).hexdigest()}
    write_durably(path / RUN_FILE, (json.dumps(info, indent=1) + "\n").encode())
    return Run(path, info)


def load_weights(run: Run) -> tuple[dict[str, torch.Tensor], Statistics | None]:
    """Read a run's state dict and feature statistics.

    Raises:
        RunError: the file is missing or damaged.
    """
    file = run.path / MODEL_FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RunError(f"{file}: cannot read the weights: {error}; fit again with --overwrite") from error
    if hashlib.sha256(data).hexdigest() != run.info.get("model_sha256"):
        raise RunError(f"{file}: was altered after the fit (SHA-256 differs); fit again with --overwrite")
    arrays = load(data)
    kept = {name: arrays.pop(name) for name in list(arrays) if name.startswith(STATISTICS_PREFIX)}
    groups = {name.split(".")[1] for name in kept}
    statistics = {
        g: (kept[f"{STATISTICS_PREFIX}{g}.mean"], kept[f"{STATISTICS_PREFIX}{g}.spread"]) for g in groups
    }
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, statistics or None


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state of an unfinished training."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_durably(path / CHECKPOINT_FILE, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read the state of an unfinished training; None where there is none."""
    if not (path / CHECKPOINT_FILE).is_file():
        return None
    state: dict[str, Any] = torch.load(path / CHECKPOINT_FILE, weights_only=True)
    return state
