"""One figure per model over several data sets, as GEO-Bench reports it (Lacoste et al., NeurIPS 2023).

The scores of a data set are scaled so that the worst of all models and seeds is 0 and the best is 1; a
model's figure is the interquartile mean (that of the middle half) over its data sets and seeds, with an
interval by bootstrap over seeds within each data set (Agarwal et al., NeurIPS 2021): it tells what other
seeds would change, not other data sets.

Legend: D data sets, S seeds of one model on one data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import trim_mean

from satdifuser.errors import RunError
from satdifuser.evaluate.interchange import budget_of, dataset_name
from satdifuser.evaluate.intervals import percentiles
from satdifuser.evaluate.metrics import Floats
from satdifuser.evaluate.results import check_alike, lay_out, main_metric, reported_split, span
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.run_folder import Run, open_run, read_settings

Scores = dict[str, dict[str, Floats]]
"""Model to data set to the scores of its seeds, (S,)."""


def across_datasets(folders: Sequence[Path], settings: EvaluateSettings) -> pd.DataFrame:
    """Tabulate models over data sets, best first.

    Args:
        folders: Runs that are measured on one split: each model on each data set, with one seed or more.
        settings: Of the bootstrap.

    Returns:
        Columns model, iqm, low, high, seeds (over all data sets), and one per data set: its mean score.

    Raises:
        RunError: a model lacks a data set, or the runs report different splits.
    """
    return tabulate_models([open_run(folder) for folder in folders], settings)


def tabulate_models(runs: Sequence[Run], settings: EvaluateSettings) -> pd.DataFrame:
    """The table of `across_datasets`, of opened runs."""
    check_alike("evaluate.split", {run.path: reported_split(run) for run in runs})
    scores = gather(runs)
    scaled = min_max(scores)
    rows = [
        {
            "model": model,
            "iqm": interquartile_mean(scaled[model]),
            **dict(zip(("low", "high"), seed_interval(scaled[model], settings), strict=True)),
            "seeds": sum(map(len, by_dataset.values())),
            **{dataset: float(values.mean()) for dataset, values in by_dataset.items()},
        }
        for model, by_dataset in scores.items()
    ]
    return pd.DataFrame(rows).sort_values("iqm", ascending=False, kind="stable", ignore_index=True)


def gather(runs: Sequence[Run]) -> Scores:
    """The reported scores of every model on every data set.

    Raises:
        RunError: a model lacks a data set.
    """
    datasets = name_datasets(runs)
    models = name_models(runs)
    found: dict[str, dict[str, list[float]]] = {}
    for run, dataset, model in zip(runs, datasets, models, strict=True):
        value = run.metrics[reported_split(run)][main_metric(run)]
        found.setdefault(model, {}).setdefault(dataset, []).append(value)
    for model, held in found.items():
        lacking = sorted(set(datasets) - held.keys())
        if lacking:
            raise RunError(
                f"{model} was not measured on {', '.join(lacking)}; every model needs a run on each data set"
            )
    order = list(dict.fromkeys(datasets))
    return {m: {d: np.array(held[d]) for d in order} for m, held in found.items()}


def name_datasets(runs: Sequence[Run]) -> list[str]:
    """Each run's data set: runs with equal labels share one; told apart by number where names are equal."""
    labels = [run.info["store"]["hashes"]["labels"] for run in runs]
    names: dict[str, str] = {}
    for run, label in zip(runs, labels, strict=True):
        if label not in names:
            name = dataset_name(read_settings(run).get("source", {}))
            again = sum(known.split(" #")[0] == name for known in names.values())
            names[label] = f"{name} #{again + 1}" if again else name
    return [names[label] for label in labels]


def name_models(runs: Sequence[Run]) -> list[str]:
    """Each run's model: fusion, and noising, backbone and number of labels where the runs differ in them."""
    parts = []
    for run in runs:
        stages = read_settings(run)
        parts.append(
            [
                f"{run.info['fusion']}{' (baseline)' if run.info['kind'] == 'baseline' else ''}",
                str(stages.get("extract", {}).get("noising", "")),
                Path(str(stages.get("backbone", {}).get("model", ""))).name,
                str(budget_of(run)),
            ]
        )
    varied = [i for i in range(len(parts[0])) if i == 0 or len({part[i] for part in parts}) > 1]
    return [", ".join(part[i] for i in varied if part[i]) for part in parts]


def min_max(scores: Scores) -> Scores:
    """Scale each data set's scores: the worst of all models becomes 0, the best 1; if all are equal, 0.5."""
    ends = {}
    for dataset in next(iter(scores.values())):
        values = np.concatenate([held[dataset] for held in scores.values()])
        ends[dataset] = values.min(), values.max()

    def scale(values: Floats, low: float, high: float) -> Floats:
        return (values - low) / (high - low) if high > low else np.full_like(values, 0.5)

    return {m: {d: scale(values, *ends[d]) for d, values in held.items()} for m, held in scores.items()}


def interquartile_mean(scores: Mapping[str, Floats]) -> float:
    """Mean of the middle half of all scores of a model."""
    return float(trim_mean(np.concatenate(list(scores.values())), 0.25))


def seed_interval(scores: Mapping[str, Floats], settings: EvaluateSettings) -> tuple[float, float]:
    """Interval of the interquartile mean, by drawing seeds with replacement within each data set.

    NaN where no data set has several seeds.
    """
    if all(len(values) < 2 for values in scores.values()):
        return float("nan"), float("nan")
    generator = np.random.default_rng(settings.seed)
    drawn = [
        values[generator.integers(len(values), size=(settings.bootstrap, len(values)))]
        for values in scores.values()
    ]
    return percentiles(trim_mean(np.concatenate(drawn, axis=1), 0.25, axis=1), settings.level)


def format_across(table: pd.DataFrame, level: float) -> str:
    """The table for a terminal."""
    datasets = [str(name) for name in table.columns[5:]]
    rows = [
        {
            "model": row["model"],
            "IQM": f"{row['iqm']:.3f}",
            f"{100 * level:g}% interval (seeds)": span(row["low"], row["high"]),
            "seeds": str(row["seeds"]),
            **{name: f"{row[name]:.3f}" for name in datasets},
        }
        for row in table.to_dict("records")
    ]
    return "\n".join(lay_out(rows))
