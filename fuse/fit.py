"""Fits networks to a store: candidates in, run folders out.

Candidates of one seed read the store once: each batch is read and decoded, then every network takes its step.
What was finished before is kept, what was interrupted goes on with its next epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from satdifuser.errors import DeviceError, RunError, SettingsError
from satdifuser.fuse.data import TrainingData
from satdifuser.fuse.grid import Candidate, sweep_section
from satdifuser.fuse.inputs import choose_inputs, join_inputs
from satdifuser.fuse.leaderboard import describe_first, finished_before, standings, write_board
from satdifuser.fuse.log import Log, check_log, open_logs, values_of
from satdifuser.fuse.network import choose_head
from satdifuser.fuse.processes import is_first
from satdifuser.fuse.run_folder import (
    CHECKPOINT_FILE,
    RUN_FILE,
    Run,
    load_checkpoint,
    open_run,
    save_checkpoint,
    save_run,
)
from satdifuser.fuse.settings import WHEREABOUTS, FitSettings, FusionName, TrainingSettings
from satdifuser.fuse.train import NewScorer, Training, check_precision, run_epoch
from satdifuser.store.device import choose_device, device_name, first_sentence, is_out_of_memory
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import differing_fields


def fit(
    store: FeatureStore,
    settings: FitSettings,
    fusion: FusionName,
    seed: int,
    out: Path,
    new_scorer: NewScorer,
    overwrite: bool = False,
) -> Run:
    """Train one fusion with one seed, or go on with a training that was interrupted.

    Args:
        store: A complete store with targets and the splits train and val.
        settings: Of the training.
        fusion: Which fusion module.
        seed: Of initial weights, batch order and dropout.
        out: The run's folder; a finished run of the same settings is returned as it is.
        new_scorer: Measures the predictions of a split.
        overwrite: Train anew whatever is at `out`.

    Raises:
        StoreError: shards are missing, or a split is empty.
        RunError: another run is at `out`, or there is nothing to learn from.
        SettingsError: the store has no targets or not those, or not the partition, timesteps or layers, that
            the settings ask for.
    """
    candidate = Candidate(out.name, fusion, seed, settings)
    (run,) = fit_candidates(store, [candidate], out.parent, new_scorer, overwrite)
    return run


def fit_candidates(
    store: FeatureStore,
    candidates: Sequence[Candidate],
    folder: Path,
    new_scorer: NewScorer,
    overwrite: bool = False,
    board: Path | None = None,
) -> list[Run]:
    """Train candidates that share their `TrainingSettings`, each into its folder; see `fit`.

    Args:
        store: A complete store with targets and the splits train and val.
        candidates: What to train.
        folder: Holds their folders.
        new_scorer: Measures the predictions of a split.
        overwrite: Train anew whatever is there.
        board: A CSV file that shows after every epoch how these stand on val, and the networks that earlier
            commands fitted to the same store in the same folder.

    Returns:
        Their runs, in the same order.

    Raises:
        DeviceError: the device has no memory for a step; finished epochs are kept.
    """
    check_task(store, candidates[0].settings)
    done: dict[str, Run] = {}
    for one in candidates:
        found = None if overwrite else _finished(folder / one.name, run_identity(store, one))
        done |= {one.name: found} if found else {}
    left = [one for one in candidates if one.name not in done]
    check_candidates(store, left)
    earlier = finished_before(folder, store, candidates) if board and is_first() else []
    shown = [*candidates, *(one for one, _ in earlier)]
    done |= {one.name: run for one, run in earlier}
    with (
        _telling_what_takes_less_memory(candidates[0].settings),
        tqdm(total=_epochs(left), desc="fit", unit="epoch", disable=None if is_first() else True) as bar,
    ):
        for trainings in _rounds(store, left, folder, overwrite):
            bar.update(sum(training.epoch for training in trainings))
            for advanced in _train(store, trainings, folder, new_scorer):
                bar.set_postfix_str(describe_first(standings(candidates, done, trainings)))
                bar.update(advanced)
                if board and is_first():
                    write_board(board, standings(shown, done, trainings))
            done |= {one.candidate.name: _finish(folder, one) for one in trainings}
    if board and is_first():
        write_board(board, standings(shown, done, []))
    return [done[one.name] for one in candidates]


@contextmanager
def _telling_what_takes_less_memory(settings: TrainingSettings) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        device = device_name(choose_device(settings.device, "fit.device"))
        raise DeviceError(
            f"fit: {device} has no memory for a step with batches of {settings.batch_size} tiles "
            f"({first_sentence(error)}); finished epochs are kept, and the same command (without "
            "--overwrite) goes on with them if given fit.device_memory_gb=0 (features stay off the GPU) or "
            "fit.networks_gb=0 (one network at a time); what takes less besides, as new runs: a smaller "
            "fit.batch_size or fit.projection, fit.precision=bfloat16, fewer fit.layers or fit.timesteps"
        ) from error


def _epochs(candidates: Sequence[Candidate]) -> int:
    return sum(one.settings.epochs for one in candidates)


def _rounds(
    store: FeatureStore, candidates: Sequence[Candidate], folder: Path, overwrite: bool
) -> Iterator[list[Training]]:
    """Trainings that share their batches, as many at a time as `networks_gb` holds."""
    if not candidates:
        return
    common = candidates[0].settings
    inputs = join_inputs(store, [choose_inputs(store, one.settings) for one in candidates])
    data = TrainingData(store, common, inputs)
    warned: list[str] = []
    for _, same in groupby(sorted(candidates, key=_batches), key=_batches):
        waiting: list[Training] = []
        for one in same:
            training = Training(data, one)
            training.restore(None if overwrite else _unfinished(folder / one.name, run_identity(store, one)))
            if waiting and sum(t.bytes for t in [*waiting, training]) > common.networks_gb * 1e9:
                yield waiting
                waiting = []
            waiting.append(training)
        unseen = data.unseen_classes(waiting[0].positions)
        if unseen and unseen != warned and is_first():
            warned = unseen
            tqdm.write(_unseen_warning(store, unseen, waiting[0].settings), file=sys.stderr)
        yield waiting


def _unseen_warning(store: FeatureStore, unseen: list[str], settings: FitSettings) -> str:
    return (
        f"warning: {store.path}: val holds {', '.join(unseen)}, but no training tile does (labels: "
        f"{settings.budget}): it will never be predicted; move tiles to train, or ask for more labels"
    )


def _batches(candidate: Candidate) -> tuple[str, int, int]:
    """What decides which tiles a training sees when."""
    return str(candidate.settings.budget), candidate.settings.draw, candidate.seed


def _train(
    store: FeatureStore, trainings: Sequence[Training], folder: Path, new_scorer: NewScorer
) -> Iterator[int]:
    """Train all to their end; yields after every epoch how many took part."""
    with open_logs(trainings if is_first() else (), folder) as logs:
        for epoch in range(max(training.settings.epochs for training in trainings)):
            active = [training for training in trainings if training.epoch == epoch and not training.is_over]
            if not active:
                continue
            run_epoch(active, new_scorer)
            if is_first():
                _record(store, active, folder, logs)
            yield len(active)


def _record(
    store: FeatureStore, trainings: Sequence[Training], folder: Path, logs: Mapping[str, Log]
) -> None:
    """Write what an epoch brought."""
    for training in trainings:
        _keep(store, training, folder)
        if log := logs.get(training.candidate.name):
            log.write(training.epoch, values_of(training, training.history[-1]))


def _keep(store: FeatureStore, training: Training, folder: Path) -> None:
    """Write the state of a training."""
    out = folder / training.candidate.name
    out.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, training.state() | {"identity": run_identity(store, training.candidate)})


def _finish(folder: Path, training: Training) -> Run:
    """Write the run of a training that is over."""
    one, store = training.candidate, training.store
    out = folder / one.name
    info = training.describe() | {"name": one.name, "identity": run_identity(store, one)}
    if not is_first():
        return Run(out, info)
    sections = {"fit": sweep_section(one)} | store.attributes.settings
    run = save_run(out, info, sections, training.best, training.statistics)
    (out / CHECKPOINT_FILE).unlink(missing_ok=True)
    return run


def check_task(store: FeatureStore, settings: TrainingSettings) -> None:
    """Refuse a store without the targets that the settings ask for."""
    task = store.attributes.task
    if task is None:
        raise SettingsError(f"{store.path}: holds no targets to fit to; extract from a source with labels")
    if settings.task not in ("auto", task):
        raise SettingsError(f"fit.task: got {settings.task}, but {store.path} holds targets for {task}")


def check_candidates(store: FeatureStore, candidates: Sequence[Candidate]) -> None:
    """Refuse, before any work is done, candidates that do not fit the store's targets or this machine.

    Args:
        store: With targets.
        candidates: They share their `TrainingSettings`.

    Raises:
        SettingsError: head, device, dtype or log are not to be had.
    """
    task = store.attributes.task
    if not candidates or task is None:
        return
    for one in candidates:
        choose_head(task, one.settings)
    common = candidates[0].settings
    check_log(common.log)
    check_precision(choose_device(common.device, "fit.device"), common)


def run_identity(store: FeatureStore, candidate: Candidate) -> dict[str, Any]:
    """What a run must share with another to be the same one."""
    inputs = choose_inputs(store, candidate.settings)
    shaping = candidate.settings.model_dump(mode="json", exclude=set(WHEREABOUTS))
    shaping["partition"] = store.choose_partition(candidate.settings.partition)
    shaping |= {"timesteps": inputs.timesteps, "layers": [layer.name for layer in inputs.layers]}
    hashes = store.hashes().model_dump()
    return {"fusion": candidate.fusion, "seed": candidate.seed, "settings": shaping, "store": hashes}


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
        fields = differing_fields(ours, theirs, "run has")
        raise RunError(
            f"{out}: holds a run of other settings:\n  " + "\n  ".join(fields) + "\n"
            "write to another folder, or replace it with --overwrite"
        )
