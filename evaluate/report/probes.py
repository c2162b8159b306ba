"""Figures of probe sweeps: which layer at which noise level tells most, and how few labels suffice.

A sweep's table holds one row for each split, amount of labels, draw of them, probe and inputs: one timestep
and layer (`single`), all layers of a timestep (`timestep`), all timesteps of a layer (`layer`), or all.
Everything is chosen on val; figures of the reported split are shown of what was chosen only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from satdifuser.errors import RunError
from satdifuser.evaluate.probe_folder import COLUMNS, TABLE_FILE
from satdifuser.evaluate.probe_folder import open_probe as read_probe
from satdifuser.evaluate.report.charts import Line, label_chart
from satdifuser.evaluate.report.figure import Charts, Figure, Table
from satdifuser.evaluate.report.heat_map import heat_map, short_name
from satdifuser.evaluate.results import score, span

FIELDS = ["store", "command", "metric"]
ALL_LAYERS, ALL_TIMESTEPS = "all layers", "all"
SETTING = ["labels", "draw", "probe", "metric"]
INPUTS = ["inputs", "timestep", "layer"]
EXPLAINED = (
    "A probe is the plainest model there is: it weighs features up and learns no new ones. So its figure "
    "tells what the features themselves hold."
)


@dataclass(frozen=True)
class Probe:
    """A sweep on disk: its table, and ``info``, what it was made of."""

    path: Path
    table: pd.DataFrame
    info: Mapping[str, Any]


def open_probe(path: Path) -> Probe:
    """Open a probe folder.

    Raises:
        RunError: a file is missing or damaged, or lacks a column.
    """
    table, info = read_probe(path)
    missing = [name for name in COLUMNS if name not in table] + [name for name in FIELDS if name not in info]
    if missing or table.empty:
        raise RunError(f"{path}: has no {', '.join(missing) or 'rows'}; run `satdifuser probe` again")
    numbers = ["timestep", "stride", "strength", "value", "low", "high"]  # where one is missing it is NaN
    return Probe(path, table.astype(dict.fromkeys(numbers, "float64") | {"n_train": "int64"}), info)


def probe_figures(probe: Probe) -> list[Figure]:
    """The maps of a sweep with all labels it was given, what was chosen, and how it grows with labels."""
    table = with_main_metric(probe)
    best = best_strengths(table)
    most = best[best["n_train"] == best["n_train"].max()]
    maps = [sweep_map(rows, str(kind), probe) for kind, rows in most.groupby("probe", sort=False)]
    choices = chosen_on_val(best, table)
    figures = [*maps, choices_figure(choices, probe)]
    return [*figures, labels_figure(choices, probe)] if choices["n_train"].nunique() > 1 else figures


def with_main_metric(probe: Probe) -> pd.DataFrame:
    """Only the rows of the metric that choices are made by."""
    return pd.DataFrame(probe.table[probe.table["metric"] == probe.info["metric"]])


def best_strengths(table: pd.DataFrame) -> pd.DataFrame:
    """For all inputs of a setting the row whose strength is best on val."""
    val = table[table["split"] == "val"].sort_values("value", ascending=False, kind="stable")
    return val.drop_duplicates([*SETTING, *INPUTS]).sort_index()


def sweep_map(rows: pd.DataFrame, kind: str, probe: Probe) -> Figure:
    """Figure on val of each layer and timestep, with concatenations at the edges; mean over the draws."""
    layers = [*fine_to_coarse(rows), ALL_LAYERS]
    timesteps = [*(str(t) for t in sorted(rows["timestep"].dropna().astype(int).unique())), ALL_TIMESTEPS]
    named = rows.assign(layer=rows["layer"].fillna(ALL_LAYERS), timestep=rows["timestep"].map(timestep_name))
    means = named.groupby(["layer", "timestep"], sort=False)["value"].mean()
    best: Any = means.idxmax()  # (layer, timestep); of equal ones the first of the table, as everywhere
    values = means.unstack("timestep").reindex(index=layers, columns=timesteps).to_numpy(np.float64)
    metric, labels = rows["metric"].iloc[0], rows["labels"].iloc[0]
    return Figure(
        f"Which layer, which noise level: {kind} probe",
        heat_map(
            values,
            layers,
            timesteps,
            "layer ↓ timestep →",
            "{:.3f}".format,
            chosen=(layers.index(best[0]), timesteps.index(best[1])),
        ),
        f"{metric} on val of a {kind} probe on the features of one layer (rows, fine to coarse) at one "
        f"timestep (columns; larger means more noise), fitted on {rows['n_train'].iloc[0]:,} tiles ({labels} "
        f"of the labels{of_draws(rows)}). The last column and row join the features of all timesteps, of all "
        "layers. The framed cell is the best on val.",
        str(probe.info["command"]),
        rows.drop(columns=["low", "high"]),
        str(probe.path / TABLE_FILE),
    )


def timestep_name(timestep: float) -> str:
    """A timestep in words; NaN stands for all of them."""
    return ALL_TIMESTEPS if math.isnan(timestep) else str(int(timestep))


def fine_to_coarse(rows: pd.DataFrame) -> list[str]:
    """Names of the layers, finest stride first."""
    layers = rows[["layer", "stride"]].dropna().drop_duplicates("layer")
    return [str(name) for name in layers.sort_values("stride", kind="stable")["layer"]]


def of_draws(rows: pd.DataFrame) -> str:
    """How many draws of the labels a mean is over, in words."""
    draws = rows["draw"].nunique()
    return f", mean over {draws} draws of them" if draws > 1 else ""


def chosen_on_val(best: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Of every setting the inputs that are best on val: of all, and of those of one layer and timestep.

    Args:
        best: A table of `best_strengths`.
        table: The whole table, for figures of the reported split.

    Returns:
        Columns of the table, with val and reported in place of value, and among: all or single.
    """
    best = best.rename(columns={"value": "val"}).drop(columns=["split", "low", "high"])
    held = table[table["split"] == reported_split(table)].rename(columns={"value": "reported"})
    keys = [*SETTING, *INPUTS, "strength"]
    both = best.merge(held[[*keys, "reported", "low", "high"]], "left", keys)
    parts = []
    for among, rows in (("all", both), ("single", both[both["inputs"] == "single"])):
        first = rows.sort_values("val", ascending=False, kind="stable").drop_duplicates(SETTING)
        parts.append(first.assign(among=among).sort_values(["n_train", "probe", "draw"]))
    return pd.concat(parts, ignore_index=True)


def reported_split(table: pd.DataFrame) -> str:
    """The split that is reported: the one beside train and val, or val where there is no other."""
    others = [str(name) for name in table["split"].unique() if name not in ("train", "val")]
    return others[0] if others else "val"


def choices_figure(choices: pd.DataFrame, probe: Probe) -> Figure:
    """What was chosen with each amount of labels, and how good it is on the reported split."""
    split, metric = reported_split(probe.table), choices["metric"].iloc[0]
    rows = []
    for (_, labels, kind), here in choices[choices["among"] == "all"].groupby(
        ["n_train", "labels", "probe"], sort=False
    ):
        spread = "" if len(here) < 2 else f" ± {here['reported'].std():.3f}"
        rows.append({
            "labels": str(labels),
            "training tiles": f"{here['n_train'].iloc[0]:,}",
            "probe": str(kind),
            "chosen on val": choice_in_words(here),
            f"val {metric}": score(here["val"].mean()),
            f"{split} {metric}": score(here["reported"].mean()) + spread,
            "interval": span(here["low"].mean(), here["high"].mean()),
        })  # fmt: skip
    return Figure(
        "What was chosen",
        Table(rows),
        f"Inputs and strength with the highest {metric} on val. The {split} split had no part in the choice. "
        "Where labels were drawn several times: means over the draws, ± the standard deviation over them.",
        str(probe.info["command"]),
        choices,
        str(probe.path / TABLE_FILE),
    )


def choice_in_words(rows: pd.DataFrame) -> str:
    """The inputs chosen in all draws, or the most frequent ones."""
    words = [
        f"t {timestep_name(t)}, {short_name(layer)}"
        for t, layer in zip(rows["timestep"], rows["layer"].fillna(ALL_LAYERS), strict=True)
    ]
    first = max(words, key=words.count)
    same = words.count(first)
    return first if same == len(words) else f"{first} (in {same} of {len(words)} draws)"


def labels_figure(choices: pd.DataFrame, probe: Probe) -> Figure:
    """The figure over the number of labelled tiles, a line for each probe."""
    split, metric = reported_split(probe.table), choices["metric"].iloc[0]
    names = {"all": "best inputs", "single": "best single layer"}
    lines = [
        labels_line(f"{kind}, {names[str(among)]}", rows)
        for (kind, among), rows in choices.groupby(["probe", "among"], sort=False)
        if rows["reported"].notna().any()
    ]
    return Figure(
        "How few labels suffice",
        Charts([label_chart(lines, split, str(metric))]),
        f"{metric} on {split} over the number of labelled tiles that a probe learned from, of the inputs "
        "chosen on val. Each doubling is a step of the same width. Upright lines reach from the lowest to "
        "the highest draw of the labels, or where there is one draw over its interval.",
        str(probe.info["command"]),
        choices.drop(columns="metric"),
        str(probe.path / TABLE_FILE),
    )


def labels_line(name: str, rows: pd.DataFrame) -> Line:
    """Mean over the draws for each number of tiles, and how far it reaches."""
    points, spans = [], []
    for n_train, here in rows.groupby("n_train"):
        points.append((float(str(n_train)), float(here["reported"].mean())))
        if len(here) > 1:
            spans.append((float(here["reported"].min()), float(here["reported"].max())))
        else:
            spans.append((float(here["low"].iloc[0]), float(here["high"].iloc[0])))
    return Line(name, points, spans)


def probe_scores(probe: Probe) -> dict[tuple[int, str], float]:
    """The best figure on val of each single timestep and layer, with most labels."""
    best = best_strengths(with_main_metric(probe))
    single = best[(best["inputs"] == "single") & (best["n_train"] == best["n_train"].max())]
    scores: dict[tuple[int, str], float] = {}
    for timestep, layer, value in zip(single["timestep"], single["layer"], single["value"], strict=True):
        if math.isfinite(value):
            key = (int(timestep), str(layer))
            scores[key] = max(value, scores.get(key, -math.inf))
    return scores
