"""Result rows with the columns of torchgeo-bench's CSV files, so that they stand beside published ones.

The facts about its columns are those of its public results file (github.com/torchgeo/torchgeo-bench,
results/all_results.csv): shares of 1, methods such as `linear`, `knn5`, `seg-linear`, metrics `accuracy`,
`mAP`, `mIoU`, normalisation `model_native` where a model prepares images in its own way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from satdifuser.errors import RunError, SatDiFuserError
from satdifuser.evaluate.chosen import choose_runs
from satdifuser.evaluate.probe_folder import PROBE_FILE, open_probe
from satdifuser.evaluate.published import METRICS
from satdifuser.evaluate.results import reported_split
from satdifuser.fuse.data import DRAW_SEED, labelled
from satdifuser.fuse.run_folder import Run, open_run, read_settings
from satdifuser.store.few_labels import ALL_LABELS, Budget, draw_labelled, parse_budgets
from satdifuser.store.reader import FeatureStore, open_store

COLUMNS = ["dataset", "method", "metric_name", "metric_value", "ci_lower", "ci_upper", "n_train", "n_val"]
COLUMNS += ["n_test", "seed", "name", "partition", "normalization", "image_size", "bands", "best_c"]
METRIC_NAMES = {"accuracy": "accuracy", "average_precision": "mAP", "miou": "mIoU"}
PREPARED = {"normalization": "model_native", "bands": "rgb"}


def dataset_name(source: Mapping[str, Any]) -> str:
    """The name of the data set behind a `source` section: GEO-Bench's, a folder's, a code's, or the kind."""
    if source.get("dataset"):
        return str(source["dataset"])
    if source.get("root"):
        return Path(str(source["root"])).resolve().stem
    return str(source.get("target") or source.get("kind", "unknown"))


def interchange_rows(folders: Sequence[Path]) -> pd.DataFrame:
    """Rows of probes and runs, in torchgeo-bench's columns; of a folder of runs those that are best on val.

    Args:
        folders: Run and probe folders, and folders that hold runs.

    Raises:
        RunError: a folder is neither, or a run or probe was not measured on test.
    """
    rows: list[dict[str, Any]] = []
    for folder in folders:
        if (folder / PROBE_FILE).is_file():
            rows += probe_rows(folder)
        else:
            rows += [run_row(open_run(path)) for path in choose_runs([folder])]
    return pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(("n_train", "n_val", "n_test"), "Int64"))


def probe_rows(folder: Path) -> list[dict[str, Any]]:
    """A row for everything that a probe chose on val and measured on test."""
    table, info = open_probe(folder)
    metric = METRICS[info["task"]]
    measured = table[(table["split"] == "test") & (table["metric"] == metric)]
    if measured.empty:
        raise RunError(f"{folder}: nothing was measured on test; run `satdifuser probe` without --no-test")
    rows = []
    for row in measured.to_dict("records"):
        whole = row["labels"] == "100%"
        rows.append({
            "dataset": row["dataset"],
            "method": probe_method(info["task"], row["probe"], row["strength"]),
            "metric_name": METRIC_NAMES[metric],
            "metric_value": row["value"],
            "ci_lower": row["low"],
            "ci_upper": row["high"],
            "n_train": row["n_train"],
            "n_val": row["n_val"],
            "n_test": row["n_test"],
            "seed": row["seed"] + row["draw"],
            "name": f"satdifuser {info['backbone']}, {inputs_in_words(row)}",
            "partition": row["partition"] if whole else row["labels"],
            "image_size": image_size(info["layers"]),
            "best_c": row["strength"] if row["probe"] == "logistic" else math.nan,
            **PREPARED,
        })  # fmt: skip
    return rows


def probe_method(task: str, probe: str, strength: float) -> str:
    """What torchgeo-bench calls a probe."""
    name = {"logistic": "linear", "neighbours": f"knn{strength:g}"}.get(probe, probe)
    return f"seg-{name}" if task == "segmentation" else name


def inputs_in_words(row: Mapping[Any, Any]) -> str:
    """Which features a probe saw."""
    timestep = "all timesteps" if pd.isna(row["timestep"]) else f"t = {row['timestep']:g}"
    return f"{timestep}, {'all layers' if pd.isna(row['layer']) else row['layer']}"


def run_row(run: Run) -> dict[str, Any]:
    """The row of a fitted run that was measured."""
    info, metric = run.info, METRICS[run.info["task"]]
    split = reported_split(run)
    if split != "test":
        raise RunError(f"{run.path}: was not measured on test; run `satdifuser evaluate {run.path}`")
    low, high = run.metrics[split]["interval"][metric]
    sections = read_settings(run)
    budget = budget_of(run)
    return {
        "dataset": dataset_name(sections.get("source", {})),
        "method": info["fusion"] if info["kind"] == "baseline" else f"{info['fusion']}-{info['head']}",
        "metric_name": METRIC_NAMES[metric],
        "metric_value": run.metrics[split][metric],
        "ci_lower": low,
        "ci_upper": high,
        **count_tiles(run),
        "seed": info["seed"],
        "name": f"satdifuser {sections.get('backbone', {}).get('model', 'unknown')}, {info['name']}",
        "partition": str(budget) if budget.is_drawn or budget.partition else run.partition,
        "image_size": image_size(info["layers"]),
        "best_c": info.get("strength", math.nan),
        **PREPARED,
    }


def count_tiles(run: Run) -> dict[str, int | None]:
    """How many tiles a run learned from, was chosen by and was measured on; None where its store is gone."""
    try:
        store = open_store(run.info["store"]["path"])
        test, val = (len(labelled(store, split, run.partition)) for split in ("test", "val"))
        return {"n_train": count_training_tiles(run, store), "n_val": val, "n_test": test}
    except SatDiFuserError:
        return {"n_train": None, "n_val": None, "n_test": None}


def count_training_tiles(run: Run, store: FeatureStore) -> int:
    """How many tiles a run learned from."""
    rows, budget = labelled(store, "train", run.partition), budget_of(run)
    if budget == ALL_LABELS:
        return len(rows)
    return len(draw_labelled(store, rows, budget, DRAW_SEED, run.info["fit"].get("draw", 0)))


def budget_of(run: Run) -> Budget:
    """How many labels a run learned from; a baseline learns from all."""
    fit = run.info.get("fit", {})
    return parse_budgets(str(fit.get("labels", "")), str(fit.get("shots", "")))[0]


def image_size(layers: Sequence[Mapping[str, Any]]) -> int:
    """Pixels a side of the images that the backbone saw."""
    return max(int(layer["height"]) * int(layer.get("pool", 1)) * int(layer["stride"]) for layer in layers)
