"""The results table: runs of one task side by side, best on val first, for the terminal and the page.

The choice among the fusions is made by the val split; figures of the reported split (test, unless the
settings name another) are shown, never used to choose.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from satdifuser.errors import RunError
from satdifuser.fuse.run_folder import METRICS_FILE, RUN_FILE, Run, open_run
from satdifuser.fuse.settings import OF_A_SWEEP, WHEREABOUTS
from satdifuser.fuse.train import MAIN_METRIC

RUN_FIELDS = ["name", "kind", "task", "fusion", "head", "seed", "classes", "ignore_value", "timesteps"]
RUN_FIELDS += ["layers", "store", "history", "parameters", "seconds", "weights"]
REMEDY = "measure the run again: `satdifuser evaluate`"


def results_table(runs: Sequence[Path], split: str | None = None) -> pd.DataFrame:
    """Tabulate runs, best on val first; runs that differ only in their seed share a row.

    Args:
        runs: Run folders of one task, fitted on one partition, measured on one split.
        split: val: report that one, which all runs are measured on, whatever else some are measured on.

    Returns:
        Columns run, kind, seeds, metric, split (the reported one), val, reported (means over the seeds),
        spread (standard deviation of reported over the seeds, NaN for one), level, low, high (bootstrap
        interval of reported; over several seeds the mean of each end), parameters, seconds,
        device_seconds and joules (of training, means over the seeds, NaN where not recorded), chosen (whether
        this fusion is best on val).

    Raises:
        RunError: A run folder is incomplete, or the runs differ in task, partition, split or level.
    """
    opened = open_measured(runs, split)
    check_comparable(opened, split)
    return tabulate(group_seeds(opened), split)


def format_table(table: pd.DataFrame) -> str:
    """Lay out a table of `results_table` as plain text for a terminal."""
    heading, *lines = lay_out(format_cells(table))
    return "\n".join([heading, "-" * len(heading), *lines, choice_sentence(table)])


def lay_out(rows: Sequence[dict[str, str]]) -> list[str]:
    """Lines of a table with aligned columns, their names first."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [dict(zip(widths, widths, strict=True)), *rows]
    return ["  ".join(line[name].ljust(width) for name, width in widths.items()).rstrip() for line in lines]


def choice_sentence(table: pd.DataFrame) -> str:
    """How the marked row was chosen, in words."""
    among = "the fusions" if (table["kind"] == "fusion").any() else "these runs"
    metric = table["metric"].iloc[0]
    return f"* chosen: highest {metric} on val among {among}. The test split had no part in the choice."


def open_measured(folders: Sequence[Path], split: str | None = None) -> list[Run]:
    """Open run folders and see that they are whole, and measured on a split (None: the one they report)."""
    runs = [open_run(folder) for folder in folders]
    for run in runs:
        metrics, path = run.metrics, run.path / METRICS_FILE
        require(run.path / RUN_FILE, run.info, RUN_FIELDS)
        require(path, metrics, ["evaluate"])
        for needed in ("val", split or reported_split(run)):
            require(f"{path}, {needed},", metrics.get(needed, {}), [main_metric(run)])
    return runs


def check_comparable(runs: Sequence[Run], split: str | None = None) -> None:
    """Refuse runs that cannot stand in one table of a split (None: the one they report)."""
    check_alike("task", {run.path: run.info["task"] for run in runs})
    check_alike("partition", {run.path: run.partition for run in runs})
    if split is None:
        check_alike("evaluate.split", {run.path: reported_split(run) for run in runs})
    check_alike("evaluate.level", {run.path: run.metrics["evaluate"]["level"] for run in runs})


def predictions(run: Run, columns: list[str]) -> pd.DataFrame:
    """These columns of a run's predictions, one row per tile of the reported split."""
    path = run.path / "predictions.parquet"
    if not path.is_file():
        raise RunError(f"{path} is missing; {REMEDY}")
    table = pd.read_parquet(path)
    require(path, table, ["split", *columns])
    return table.loc[table["split"] == reported_split(run), columns].reset_index(drop=True)


def require(path: Path | str, found: Any, names: list[str]) -> None:
    """Refuse a record or table that lacks some of these fields or columns."""
    missing = [name for name in names if name not in found]
    if missing:
        raise RunError(f"{path} has no {', '.join(missing)}; {REMEDY}")


def check_alike(what: str, values: dict[Path, Any]) -> None:
    """Refuse runs that cannot be compared: of no or several tasks, partitions, splits or levels."""
    first: dict[Any, Path] = {}
    for path, value in values.items():
        first.setdefault(value, path)
    if len(first) != 1:
        named = ", ".join(f"{path} ({value})" for value, path in first.items()) or "none"
        raise RunError(f"a table needs runs of one {what}, got: {named}; name runs that can be compared")


def main_metric(run: Run) -> str:
    """The metric that runs of this task are ranked by."""
    return MAIN_METRIC[run.info["task"]]


def reported_split(run: Run) -> str:
    """The split that a run was measured on, beside val."""
    return str(run.metrics["evaluate"]["split"])


def interval(run: Run, metric: str, split: str | None = None) -> tuple[float, float]:
    """Ends of the interval of a metric of a split (None: the reported one); NaN where none was computed."""
    measured = run.metrics[split or reported_split(run)]
    low, high = measured.get("interval", {}).get(metric, (math.nan, math.nan))
    return low, high


def group_seeds(runs: Sequence[Run]) -> list[list[Run]]:
    """Group the runs that differ only in their seed, in order of their first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        info = run.info
        same = [info["kind"], info["fusion"], info["head"], info["parameters"], info["timesteps"]]
        same += [[layer["name"] for layer in info["layers"]], info["store"]["hashes"]]
        apart = (*OF_A_SWEEP, *WHEREABOUTS, "draw")
        same.append({k: v for k, v in info.get("fit", {}).items() if k not in apart})
        if info["kind"] == "baseline" or "reference" in info:  # imported: more than the seed may differ
            same.append(info["name"])
        groups.setdefault(json.dumps(same), []).append(run)
    result: list[list[Run]] = []
    for group in groups.values():
        # a seed twice means that something else differs, which an average would hide
        repeated = len({seed_and_draw(run.info) for run in group}) < len(group)
        result.extend([[run] for run in group] if repeated else [group])
    return result


def choose(groups: Sequence[list[Run]]) -> list[Run]:
    """The fusion (without any: the baseline) with the highest mean on val."""
    fusions = [group for group in groups if group[0].info["kind"] == "fusion"]
    return max(fusions or groups, key=lambda group: mean(group, "val"))


def best_on_val(group: Sequence[Run]) -> Run:
    """The seed with the highest value on val."""
    return max(group, key=lambda run: mean([run], "val"))


def mean(group: Sequence[Run], split: str) -> float:
    """Mean over the seeds of the metric that runs are ranked by."""
    return float(np.mean([run.metrics[split][main_metric(run)] for run in group]))


def tabulate(groups: Sequence[list[Run]], split: str | None = None) -> pd.DataFrame:
    """The rows of `results_table`."""
    chosen = choose(groups)
    rows = [{**summarise(group, split), "chosen": group is chosen} for group in groups]
    return pd.DataFrame(rows).sort_values("val", ascending=False, kind="stable", ignore_index=True)


def summarise(group: Sequence[Run], split: str | None = None) -> dict[str, Any]:
    """One row of `results_table`, without the choice."""
    first, metric, split = group[0].info, main_metric(group[0]), split or reported_split(group[0])
    low, high = np.mean([interval(run, metric, split) for run in group], axis=0)
    reported = [run.metrics[split][metric] for run in group]
    averaged = len(group) > 1 and first["kind"] == "fusion"
    return {
        "run": name_of_seeds(first) if averaged else first["name"],
        "kind": first["kind"],
        "seeds": [run.info["seed"] for run in group],
        "metric": metric,
        "split": split,
        "val": mean(group, "val"),
        "reported": mean(group, split),
        "spread": float(np.std(reported, ddof=1)) if len(group) > 1 else math.nan,
        "level": group[0].metrics["evaluate"]["level"],
        "low": float(low),
        "high": float(high),
        "parameters": first["parameters"],
        "seconds": float(np.mean([run.info["seconds"] for run in group])),
        "device_seconds": mean_cost(group, "device_seconds"),
        "joules": mean_cost(group, "joules"),
    }


def mean_cost(group: Sequence[Run], name: str) -> float:
    """Mean over the seeds of what a run records of its training's cost; NaN where one does not."""
    found = [run.info.get(name) for run in group]
    return float(np.mean([math.nan if cost is None else cost for cost in found]))


def name_of_seeds(info: dict[str, Any]) -> str:
    """One name for runs that differ in seed and draw: that of a sweep's folders, else fusion and head."""
    seed, draw = seed_and_draw(info)
    name, ending = str(info["name"]), f"-seed{seed}"
    if not name.endswith(ending):
        return f"{info['fusion']} + {info['head']}"
    return name.removesuffix(ending).removesuffix(f"-draw{draw}")


def seed_and_draw(info: dict[str, Any]) -> tuple[int | None, int]:
    """What runs that are averaged may differ in."""
    return info["seed"], info.get("fit", {}).get("draw", 0)


def format_cells(table: pd.DataFrame) -> list[dict[str, str]]:
    """The texts of a table of `results_table`, row by row, for the terminal and the page alike."""
    rows = []
    for row in table.to_dict("records"):
        mark = "* " if row["chosen"] else ""
        note = " (baseline)" if row["kind"] == "baseline" else ""
        spread = "" if math.isnan(row["spread"]) else f" ± {row['spread']:.3f}"
        cells = {
            "run": f"{mark}{row['run']}{note}",
            f"val {row['metric']}": score(row["val"]),
            f"{row['split']} {row['metric']}": score(row["reported"]) + spread,
            f"{percent(row['level'])} interval": span(row["low"], row["high"]),
            "seeds": ", ".join("–" if seed is None else str(seed) for seed in dict.fromkeys(row["seeds"])),
            "parameters": f"{row['parameters']:,}",
            "seconds": f"{row['seconds']:.1f}",
            "device seconds": amount(row["device_seconds"]),
        }
        if table["joules"].notna().any():
            cells["joules"] = amount(row["joules"])
        rows.append(cells)
    return rows


def score(value: float) -> str:
    """Three decimals, or a dash where there is no value."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def amount(value: float) -> str:
    """One decimal, or a dash where there is no value."""
    return "–" if math.isnan(value) else f"{value:,.1f}"


def span(low: float, high: float) -> str:
    """An interval, or a dash where there is none."""
    return "–" if math.isnan(low) else f"{low:.3f} to {high:.3f}"


def percent(share: float) -> str:
    """A share such as 0.95 as ``95%``."""
    return f"{100 * share:g}%"
