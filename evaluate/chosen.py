"""Opens the test split for what val has chosen: of each fusion one set of settings, and the baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from satdifuser.errors import RunError, suggest
from satdifuser.evaluate.baselines import evaluate_baseline
from satdifuser.evaluate.evaluation import evaluate_run, is_evaluated
from satdifuser.evaluate.results import group_seeds, mean, open_measured
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.run_folder import RUN_FILE, Run, find_runs, open_run
from satdifuser.store.location import Location
from satdifuser.store.reader import open_store


def split_store(places: Sequence[Location]) -> tuple[list[Path], Location | None]:
    """Runs, and the store behind the last of them if the last place is none or holds none.

    Raises:
        RunError: the last place is not there.
    """
    last = places[-1]
    is_run = isinstance(last, Path) and (holds_runs(last) or bool(seeds_behind(last)))
    if isinstance(last, Path) and not is_run and not last.exists():
        near = suggest(last.name, [path.name for path in last.parent.glob("*")])
        raise RunError(f"{last}: no such run or store{near}")
    runs = list(places if is_run or len(places) == 1 else places[:-1])
    return [Path(place) for place in runs], None if len(runs) == len(places) else last


def seeds_behind(path: Path) -> list[Path]:
    """The runs that a name without its seed stands for: ``runs/moe`` for ``runs/moe-seed0`` …"""
    return sorted(file.parent for file in path.parent.glob(f"{path.name}-seed*/{RUN_FILE}"))


def holds_runs(path: Path) -> bool:
    """Whether a folder is a run or has runs in it."""
    return (path / RUN_FILE).is_file() or any(path.glob(f"*/{RUN_FILE}"))


def choose_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs that are named, and of every folder that holds runs those that are best on val.

    Raises:
        RunError: a folder neither is a run nor holds one, or holds runs that cannot be compared.
    """
    found: list[Path] = []
    for path in paths:
        inside = find_runs([path])
        found += inside if inside == [path] else best_of_each(inside)
    return list(dict.fromkeys(found))


def best_of_each(folders: Sequence[Path]) -> list[Path]:
    """Of each fusion, baseline and number of labels the runs (all seeds) that are best on val, in order.

    So the reported split is read for one set of settings each, and it has no part in their choice.
    """
    best: dict[str, list[Run]] = {}
    for group in group_seeds(open_measured(folders, "val")):
        info = group[0].info
        fit = info.get("fit", {})
        labels = [group[0].partition, fit.get("labels"), fit.get("shots")]
        kind = json.dumps([info["kind"], info["fusion"], info["store"]["hashes"], *labels])
        if kind not in best or mean(group, "val") > mean(best[kind], "val"):
            best[kind] = group
    kept = {run.path for group in best.values() for run in group}
    return [folder for folder in folders if folder in kept]


def ensure_all_evaluated(folders: Sequence[Path], store: Location | None, settings: EvaluateSettings) -> None:
    """Measure runs on a store (None: their own), unless that was done in the same way."""
    for folder in folders:
        run = open_run(folder)
        if not is_evaluated(run, open_store(store or run.info["store"]["path"]), settings):
            evaluate(folder, store, settings)


def ensure_reported(paths: Sequence[Path], split: str, stores: Sequence[Location] = ()) -> None:
    """Measure what a report shows on a split where that is not the one they report.

    Args:
        paths: Run folders and folders that hold such; what holds none is passed over.
        split: test or val.
        stores: Where feature stores are now, if not where they were at the fit.
    """
    given = {open_store(place).attributes.planned.feature: place for place in stores}
    for folder in choose_runs([path for path in paths if holds_runs(path)]):
        run = open_run(folder)
        held = run.metrics["evaluate"]
        if held["split"] != split:
            settings = EvaluateSettings.model_validate(held | {"split": split})
            evaluate(folder, given.get(run.info["store"]["hashes"]["feature"]), settings)


def evaluate(folder: Path, store: Location | None, settings: EvaluateSettings) -> dict[str, Any]:
    """Measure a fitted network or a baseline, and write what was found beside it.

    Args:
        folder: The run.
        store: A store with its features; None for the one it was fitted on.
        settings: Split, bootstrap, number of pictures.

    Returns:
        What metrics.json holds.

    Raises:
        RunError: the run or the store is not there, or they do not fit each other.
    """
    run = open_run(folder)
    if run.info["kind"] != "baseline":
        return evaluate_run(folder, store, settings)
    return evaluate_baseline(run, open_store(store or run.info["store"]["path"]), settings)
