"""Figures that compare fits: how far the chosen one is ahead, and models over several data sets."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from satdifuser.evaluate.across import tabulate_models
from satdifuser.evaluate.chosen import seeds_behind
from satdifuser.evaluate.comparison import compare_fits
from satdifuser.evaluate.report.charts import interval_chart
from satdifuser.evaluate.report.figure import Charts, Figure, Table
from satdifuser.evaluate.results import choose, main_metric, percent, score, span, summarise
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.run_folder import Run

TESTS = {
    True: "IoU of each tile, pair by pair: in how many tiles either is ahead, and Wilcoxon's p, how likely "
    "so uneven a count and size of differences would be between equals.",
    False: "Right alone: tiles that only one of the two has right; McNemar's p is how likely so uneven a "
    "split of them would be between equals. It is told of single runs, not of means over seeds.",
}


def differences_figure(groups: Sequence[list[Run]], command: str) -> Figure:
    """How far the chosen fit is ahead of every other one, measured on the same tiles.

    Args:
        groups: All fits of the same labels, each with its seeds; two or more.
        command: That made the page.

    Raises:
        RunError: they were not measured on the same tiles.
    """
    chosen = choose(groups)
    settings = settings_of(chosen[0])
    others = [group for group in groups if group is not chosen]
    found = [compare_fits(chosen, other, settings) for other in others]
    metric, name = main_metric(chosen[0]), name_of(chosen)
    rows = [difference_row(name_of(other), one, metric) for other, one in zip(others, found, strict=True)]
    return Figure(
        "How sure the differences are",
        Table([difference_cells(row, metric, settings) for row in rows]),
        f"{name}, which was chosen on val, against every other row on the {found[0]['tiles']:,} tiles of "
        f"{settings.split}, both on the same tiles: so what is hard about a tile counts for both. Where the "
        f"{percent(settings.level)} interval holds 0, other tiles of the same kind might turn the order "
        f"around. {TESTS[found[0]['task'] == 'segmentation']} Of many rows, one in twenty looks sure by "
        "chance.",
        "\n".join(compare_command(chosen, other, command) for other in others),
        pd.DataFrame(rows),
        ", ".join(str(run.path / "predictions.parquet") for group in groups for run in group),
    )


def settings_of(run: Run) -> EvaluateSettings:
    """How a run was measured."""
    return EvaluateSettings.model_validate(run.metrics["evaluate"])


def name_of(group: Sequence[Run]) -> str:
    """What a fit is called in the table of results."""
    return str(summarise(group)["run"])


def difference_row(name: str, found: dict[str, Any], metric: str) -> dict[str, Any]:
    """The numbers of one comparison."""
    one = found["metrics"][metric]
    low, high = one["interval"]
    row = {"against": name, "difference": one["difference"], "low": low, "high": high, "ahead": one["ahead"]}
    if found["task"] == "segmentation":
        test = found["tile_iou"]
        return row | {"chosen": test["first_ahead"], "other": test["second_ahead"], "p": test["p"]}
    test = found.get("mcnemar", {"only_first": None, "only_second": None, "p": math.nan})
    return row | {"chosen": test["only_first"], "other": test["only_second"], "p": test["p"]}


def difference_cells(row: dict[str, Any], metric: str, settings: EvaluateSettings) -> dict[str, str]:
    """The texts of one comparison."""
    counted = row["chosen"] is not None
    what = "tiles ahead: chosen, it" if metric == "miou" else "right alone: chosen, it"
    return {
        "chosen against": row["against"],
        f"difference in {settings.split} {metric}": f"{row['difference']:+.3f}",
        f"{percent(settings.level)} interval": f"{row['low']:+.3f} to {row['high']:+.3f}",
        "chosen ahead in": f"{row['ahead']:.1%} of draws",
        what: f"{row['chosen']}, {row['other']}" if counted else "–",
        "Wilcoxon p" if metric == "miou" else "McNemar p": f"{row['p']:.3g}" if counted else "–",
    }


def compare_command(first: Sequence[Run], second: Sequence[Run], otherwise: str) -> str:
    """A command line that compares two fits; where no name stands for all runs of one, that of the page."""
    places = [place_of(group) for group in (first, second)]
    if None in places:
        return otherwise
    return shlex.join(["satdifuser", "evaluate", "--compare", *map(str, places)])


def place_of(group: Sequence[Run]) -> Path | None:
    """The run, or the name that stands for all its seeds."""
    paths = sorted(run.path for run in group)
    if len(paths) == 1:
        return paths[0]
    place = paths[0].with_name(paths[0].name.removesuffix(f"-seed{group[0].info['seed']}"))
    return place if seeds_behind(place) == paths else None


def across_figures(fitted: Sequence[Run], command: str) -> list[Figure]:
    """One figure per model over all data sets of the page.

    Args:
        fitted: Runs of two data sets or more.
        command: That made the page.

    Raises:
        RunError: a model lacks a data set, or the runs report different splits.
    """
    settings = settings_of(fitted[0])
    table = tabulate_models(fitted, settings)
    bars = [(r["model"], r["iqm"], r["low"], r["high"]) for r in table.to_dict("records")]
    words = (
        "Scores of a data set are scaled so that the worst of all models and seeds is 0 and the best is 1; a "
        "model's figure is the mean of the middle half of its scores over all data sets and seeds (the "
        f"interquartile mean, as GEO-Bench reports it). The {percent(settings.level)} interval says what "
        "other seeds would change, not other data sets; it needs several seeds."
    )
    again = shlex.join(["satdifuser", "evaluate", "--across", *(str(run.path) for run in fitted)])
    chart = interval_chart(bars, "Interquartile mean of every model", "interquartile mean of scaled scores")
    return [
        Figure("All models over all data sets", Charts([chart]), words, again, table),
        Figure(
            "The same as a table",
            Table([across_cells(row, settings.level) for row in table.to_dict("records")]),
            "The columns of data sets hold each model's plain score there, the mean over its seeds.",
            again,
            table,
        ),
    ]


def across_cells(row: dict[Any, Any], level: float) -> dict[str, str]:
    """The texts of one model; scores of data sets stand last."""
    scores = {str(name): score(value) for name, value in list(row.items())[5:]}
    return {
        "model": row["model"],
        "interquartile mean": score(row["iqm"]),
        f"{percent(level)} interval": span(row["low"], row["high"]),
        "seeds": str(row["seeds"]),
        **scores,
    }
