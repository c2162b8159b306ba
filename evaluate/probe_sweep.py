"""The sweep of probes over timesteps and layers: fit all, choose on val, measure what was chosen on test.

For each amount of labels, draw, kind of inputs and probe one cell and strength is chosen, the best on val.
Only these are measured on test, by the code that `evaluate` uses, and each reading of test is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from satdifuser.evaluate.evaluation import new_outcome
from satdifuser.evaluate.interchange import dataset_name
from satdifuser.evaluate.probe_cells import Cell, Row, SweepData, fit_again, list_cells
from satdifuser.evaluate.probe_folder import Journal, as_table, write_probe
from satdifuser.evaluate.probe_predictions import predict_with
from satdifuser.evaluate.probe_workers import fit_cells, in_threads
from satdifuser.evaluate.probes import Probes
from satdifuser.evaluate.samples import pooled_features
from satdifuser.evaluate.settings import EvaluateSettings, ProbeKind, ProbeSettings
from satdifuser.fuse.data import labelled
from satdifuser.fuse.train import MAIN_METRIC
from satdifuser.store.cluster import Cluster
from satdifuser.store.reader import FeatureStore


@dataclass(frozen=True)
class Choice:
    """A cell and strength that are best on val among those with the same labels, draw, inputs and probe."""

    cell: Cell
    row: Row

    def __str__(self) -> str:
        return f"{self.cell}, {self.row['probe']} {self.row['strength']:g}"


def probe_store(
    store: FeatureStore,
    settings: ProbeSettings,
    evaluate: EvaluateSettings,
    folder: Path,
    command: str,
    overwrite: bool = False,
    test: bool = True,
    cluster: Cluster | None = None,
) -> pd.DataFrame:
    """Fit all probes of a store, or go on where an earlier call stopped.

    Args:
        store: A complete store with targets.
        settings: Which probes, inputs and labels.
        evaluate: Bootstrap of what is measured on test.
        folder: Where the probe is written.
        command: What was typed, for the reader of a report.
        overwrite: Replace what is there.
        test: Measure what was chosen on test, too.
        cluster: Dask's workers; None for threads of this process.

    Returns:
        The table, see `satdifuser.evaluate.probe_folder.COLUMNS`.

    Raises:
        SettingsError: a setting does not fit the store.
        StoreError: the store is incomplete, damaged or without targets, or a split is empty.
        RunError: the folder holds another probe, or there is nothing to learn or to choose by.
        ClusterError: Dask's workers cannot be reached, or fail.
    """
    data = SweepData(store, settings)
    journal = Journal(folder, _identity(store, settings, evaluate), overwrite)
    cells = list_cells(store, settings)
    _fit_missing(data, cells, journal, cluster)
    choices = choose(cells, journal)
    if test:
        _measure_missing(data, choices, journal, evaluate)
    table = _tabulate(data, cells, choices, journal)
    write_probe(folder, table, _describe(data, evaluate, table, journal, command))
    return table


def _identity(store: FeatureStore, settings: ProbeSettings, evaluate: EvaluateSettings) -> dict[str, Any]:
    """What the lines of one journal have in common."""
    return {
        "settings": settings.model_dump(mode="json", exclude={"device"}),
        "evaluate": evaluate.model_dump(mode="json", include={"bootstrap", "level", "seed"}),
        "store": store.hashes().model_dump(),
    }


def _fit_missing(data: SweepData, cells: Sequence[Cell], journal: Journal, cluster: Cluster | None) -> None:
    missing = [cell for cell in cells if str(cell) not in journal.cells]
    # the largest first, so that no worker is left alone with one at the end
    missing.sort(key=lambda cell: -len(data.drawn[cell.labels, cell.draw]) * len(data.inputs(cell)))
    with tqdm(
        total=len(cells), initial=len(cells) - len(missing), desc="probe", unit="cell", disable=None
    ) as bar:
        for cell, rows in fit_cells(data, missing, cluster):
            journal.add_cell(str(cell), rows)
            bar.update()


def choose(cells: Sequence[Cell], journal: Journal) -> list[Choice]:
    """The best on val of each amount of labels, draw, kind of inputs and probe; of equals the first."""
    best: dict[tuple[str, int, str, str], Choice] = {}
    for cell in cells:
        for row in journal.cells[str(cell)]:
            key = (cell.labels, cell.draw, cell.inputs, row["probe"])
            if key not in best or row["value"] > best[key].row["value"]:
                best[key] = Choice(cell, row)
    return list(best.values())


def _measure_missing(
    data: SweepData, choices: Sequence[Choice], journal: Journal, evaluate: EvaluateSettings
) -> None:
    """Measure on test what was chosen on val."""
    missing: dict[Cell, list[Choice]] = {}
    for choice in choices:
        if str(choice) not in journal.choices:
            missing.setdefault(choice.cell, []).append(choice)
    if not missing:
        return
    data.load()
    rows = labelled(data.store, "test", data.partition)

    def fit(cell: Cell) -> list[Probes]:
        kinds: list[tuple[ProbeKind, float]] = [(c.row["probe"], c.row["strength"]) for c in missing[cell]]
        return fit_again(data, cell, kinds)

    pooled = None  # of the test tiles: read once for all probes, after the first reading is counted
    with tqdm(total=sum(map(len, missing.values())), desc="test", unit="probe", disable=None) as bar:
        for cell, probes in in_threads(fit, list(missing), data.device):
            for choice, probe in zip(missing[cell], probes, strict=True):
                journal.count_test_read(str(choice))
                if pooled is None and data.store.attributes.task != "segmentation":
                    pooled = pooled_features(data.store, rows)
                outcome = new_outcome(data.store)
                for found in predict_with(data.store, probe, data.inputs(cell), rows, pooled):
                    outcome.add(*found)
                measured = {"metrics": outcome.metrics(), "interval": outcome.intervals(evaluate)}
                journal.add_choice(str(choice), {"n_test": len(rows), **measured})
                bar.update()


def _tabulate(
    data: SweepData, cells: Sequence[Cell], choices: Sequence[Choice], journal: Journal
) -> pd.DataFrame:
    """Rows on val, one for each cell, probe and strength, then those on test of what was chosen."""
    chosen = {(str(choice.cell), choice.row["probe"], choice.row["strength"]) for choice in choices}
    strides = {layer.name: layer.stride for layer in data.store.attributes.layers}
    metric = MAIN_METRIC[str(data.store.attributes.task)]
    test_tiles = _count_test(data)
    table = []
    for cell in cells:
        common = {
            "dataset": dataset_name(data.store.attributes.settings.get("source", {})),
            "partition": data.partition,
            "n_train": len(data.drawn[cell.labels, cell.draw]),
            "n_val": len(data.val_rows),
            "n_test": test_tiles,
            "stride": strides.get(cell.layer or ""),
            "seed": data.settings.seed,
            **asdict(cell),
        }
        for row in journal.cells[str(cell)]:
            is_chosen = (str(cell), row["probe"], row["strength"]) in chosen
            table.append({**common, **row, "metric": metric, "split": "val", "chosen": is_chosen})
    return as_table(table + _test_rows(table, choices, journal))


def _test_rows(val_rows: Sequence[Row], choices: Sequence[Choice], journal: Journal) -> list[Row]:
    by_choice = {(r["labels"], r["draw"], r["inputs"], r["probe"]): r for r in val_rows if r["chosen"]}
    rows = []
    for choice in choices:
        measured = journal.choices.get(str(choice))
        if measured is None:
            continue
        cell = choice.cell
        like = by_choice[cell.labels, cell.draw, cell.inputs, choice.row["probe"]]
        for metric, value in measured["metrics"].items():
            low, high = measured["interval"][metric]
            rows.append({**like, "n_test": measured["n_test"], "split": "test", "metric": metric})
            rows[-1] |= {"value": value, "low": low, "high": high}
    return rows


def _count_test(data: SweepData) -> int:
    """Tiles of the test split, whose labels are not looked at."""
    return int((data.store.splits(data.partition)[data.store.tiles.index] == "test").sum())


def _describe(
    data: SweepData, evaluate: EvaluateSettings, table: pd.DataFrame, journal: Journal, command: str
) -> dict[str, Any]:
    """What probe.json holds."""
    a = data.store.attributes
    failures = name_failures(table)
    return {
        "format_version": 1,
        "kind": "probe",
        "version": version("satdifuser"),
        "command": command,
        "backbone": str(a.backbone.get("model")),
        "task": a.task,
        "classes": a.classes,
        "metric": MAIN_METRIC[str(a.task)],
        "partition": data.partition,
        "timesteps": a.timesteps,
        "layers": [layer.model_dump() for layer in a.layers],
        "store": {"path": str(data.store.path), "hashes": data.store.hashes().model_dump()},
        "settings": data.settings.model_dump(mode="json"),
        "evaluate": evaluate.model_dump(mode="json", include={"bootstrap", "level", "seed"}),
        "selected_on": "val",
        "test_reads": journal.test_reads,
        "convergence_failures": len(failures),
        "failures": failures,
    }


def name_failures(table: pd.DataFrame) -> list[str]:
    """The fits whose gradient was still too large when they were stopped."""
    failed = table[(table["split"] == "val") & ~table["converged"].astype(bool)]
    return [
        f"{_cell_of(r)}, {r['probe']} {r['strength']:g}: gradient norm {r['gradient_norm']:.2g}"
        for r in failed.to_dict("records")
    ]


def _cell_of(row: Mapping[Any, Any]) -> Cell:
    timestep = None if pd.isna(row["timestep"]) else int(row["timestep"])
    layer = None if pd.isna(row["layer"]) else row["layer"]
    return Cell(row["labels"], row["draw"], row["inputs"], timestep, layer)
