"""Checkpoints of the authors' released code become runs of ours, and back; docs/fidelity.md tables the names.

A checkpoint says nothing of its layers' places in the U-Net, its classes' order or the features' origin, so
it becomes a run for one store, named at once or at the first evaluation, after all that can be compared has
been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from satdifuser.errors import RunError
from satdifuser.fuse.fusion import MoEFusion
from satdifuser.fuse.inputs import choose_inputs
from satdifuser.fuse.network import REFERENCE_HEADS, Variant
from satdifuser.fuse.reference_checks import TASKS, check_store, check_tensors
from satdifuser.fuse.reference_file import (
    ReferenceCheckpoint,
    ReferenceConfig,
    parse_config,
    read_checkpoint,
)
from satdifuser.fuse.run_folder import CHECKPOINT_FILE, METRICS_FILE, RUN_FILE, Run, load_weights, save_run
from satdifuser.fuse.run_network import describe_run, new_network
from satdifuser.fuse.settings import FitSettings, FusionName, Task
from satdifuser.store.reader import FeatureStore

FUSIONS: dict[str, FusionName] = {"gw": "global", "lw": "localized", "moe": "moe"}
WARMUP_STEPS: dict[Task, int] = {"classification": 300, "multilabel": 300, "segmentation": 500}
WAITING = "reference"
"""Kind of a run that was imported without a store."""
FORWARDS = "fusion.forwards"  # the released code does not save it


def import_reference(
    checkpoint: Path, out: Path, store: FeatureStore | None = None, overwrite: bool = False
) -> Run:
    """Turn a checkpoint of the authors' training script into a run, to be measured and used like any other.

    Args:
        checkpoint: The torch file.
        out: The run's folder.
        store: A store of the features that the checkpoint was trained on, or of other tiles' features;
            without one the run waits for the first store that it is evaluated on.
        overwrite: Replace the run that is at `out`.

    Raises:
        StoreError: shards are missing.
        RunError: the checkpoint cannot be read or does not fit the store, or a run is at `out`.
    """
    if not overwrite and any((out / name).exists() for name in (RUN_FILE, CHECKPOINT_FILE)):
        raise RunError(f"{out}: holds a run; write to another folder, or replace it with --overwrite")
    found = read_checkpoint(checkpoint)
    info, state = (_waiting(found), found.state) if store is None else _fitted_to(found, store)
    for stale in (CHECKPOINT_FILE, METRICS_FILE):
        (out / stale).unlink(missing_ok=True)
    return save_run(out, info | {"name": out.name}, _sections(found, store), state)


def _sections(found: ReferenceCheckpoint, store: FeatureStore | None) -> dict[str, Any]:
    """The settings.yaml of an imported run."""
    own = {"fusion": [FUSIONS[found.config.fuser]], "seeds": [found.config.seed or 0]}
    fit = {"fit": own | fit_settings(found.config).model_dump(mode="json")}
    return fit if store is None else fit | store.attributes.settings


def _waiting(found: ReferenceCheckpoint) -> dict[str, Any]:
    """The run.json of a checkpoint that no store has completed yet; its tensors keep the released names."""
    task = TASKS[found.config.task]
    return {
        "format_version": 1,
        "kind": WAITING,
        "task": task,
        "fusion": FUSIONS[found.config.fuser],
        "head": REFERENCE_HEADS[task],
        "seed": found.config.seed,
        "reference": _origin(found, []),
    }


def _origin(found: ReferenceCheckpoint, notes: list[str]) -> dict[str, Any]:
    return {
        "file": found.path.name,
        "sha256": found.sha256,
        "epoch": found.epoch,
        "global_step": found.global_step,
        "config": found.values,
        "notes": notes,
    }


def _fitted_to(found: ReferenceCheckpoint, store: FeatureStore) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The run.json and the weights of a checkpoint as a run for a store, after all checks."""
    notes = check_store(found, store)
    settings, variant = fit_settings(found.config), network_variant(found.config)
    fusion, inputs = FUSIONS[found.config.fuser], choose_inputs(store, settings)
    network = new_network(store, inputs, settings, fusion, variant)
    check_tensors(found, reference_names(network.state_dict()))
    network.load_reference(found.state)
    if isinstance(network.fusion, MoEFusion):
        network.fusion.forwards.fill_(settings.warmup_steps)  # evaluation counts there, so it was long over
    state = network.state_dict()
    info = describe_run(store, inputs, settings, fusion, found.config.seed, network, state) | {
        "history": [],
        "best_epoch": 0,
        "seconds": 0.0,
        "variant": asdict(variant),
        "reference": _origin(found, notes),
    }
    return info, state


def complete(run: Run, store: FeatureStore) -> Run:
    """Make a run that was imported without a store one for this store, in its own folder.

    Raises:
        StoreError: shards are missing.
        RunError: the run does not fit the store, or its weights are damaged.
    """
    origin = run.info["reference"]
    found = ReferenceCheckpoint(
        path=run.path,
        sha256=origin["sha256"],
        epoch=origin["epoch"],
        global_step=origin["global_step"],
        config=parse_config(run.path, origin["config"]),
        values=origin["config"],
        state=load_weights(run)[0],
    )
    info, state = _fitted_to(found, store)
    named = {"name": run.path.name, "reference": info["reference"] | {"file": origin["file"]}}
    return save_run(run.path, info | named, _sections(found, store), state)


def export_reference(run: Run) -> dict[str, Tensor]:
    """A run's weights by the names of the authors' released modules, for their ``load_state_dict``.

    Their code feeds features as they are: of a run with ``normalise`` the standardisation is left out. A
    localized fusion of ours that was not imported reads all its layers, which theirs does not.

    Returns:
        Tensors by name, float32 and int64.

    Raises:
        RunError: their modules have no such head, or the run's weights are missing or damaged.
    """
    if run.info["head"] not in REFERENCE_HEADS.values():
        raise RunError(
            f"{run.path}: the released code has no head {run.info['head']}; fit with fit.head=reference"
        )
    return reference_names(load_weights(run)[0])


def reference_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours without the prefixes ``fusion.`` and ``head.`` and without the warm-up counter."""
    return {name.split(".", 1)[1]: tensor for name, tensor in state.items() if name != FORWARDS}


def fit_settings(config: ReferenceConfig) -> FitSettings:
    """A checkpoint's settings in our terms; features are not standardised, as in the released code."""
    return FitSettings(
        task=TASKS[config.task],
        head="reference",
        projection=config.projection_dim,
        norm_groups=config.num_norm_groups,
        experts=config.num_experts,
        top_k=config.top_k,
        warmup_steps=config.warmup_steps or WARMUP_STEPS[TASKS[config.task]],
        epochs=config.max_train_epochs,
        batch_size=config.batch_size,
        lr=config.lr,
        warmup_epochs=config.warmup_epochs,
        final_lr=config.min_lr,
        weight_decay=config.op_weight_decay,
        normalise=False,
        reference_slicing=True,
    )


def network_variant(config: ReferenceConfig) -> Variant:
    """What a checkpoint's network has beyond our settings."""
    return Variant(
        num_res_blocks=config.num_res_blocks,
        temperature=config.gating_tempature,
        decoder_channels=config.channels,
    )
