"""Compares two fits tile by tile, and says how sure the difference is.

The paired bootstrap draws the same tiles for both, so that what the tiles share cancels out. McNemar's test
("Note on the sampling error of the difference between correlated proportions or percentages", 1947; the
exact form) asks of the tiles that only one of the two has right whether they could be a coin's. Masks are
compared by the mean IoU of each tile; Wilcoxon's signed ranks ("Individual comparisons by ranking methods",
1945) test these pairs. Several seeds of a fit are compared by the mean of their scores.

Legend: N tiles, K classes, B draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest, wilcoxon

from satdifuser.errors import RunError, SettingsError
from satdifuser.evaluate.chosen import ensure_all_evaluated, seeds_behind
from satdifuser.evaluate.intervals import Scores, paired_difference, percentiles, sample
from satdifuser.evaluate.metrics import (
    Floats,
    classification_scores,
    multilabel_scores,
    ratio,
    segmentation_scores,
)
from satdifuser.evaluate.results import check_alike, predictions
from satdifuser.evaluate.settings import EvaluateSettings
from satdifuser.fuse.run_folder import RUN_FILE, Run, open_run
from satdifuser.fuse.train import MAIN_METRIC
from satdifuser.store.location import Location

LISTED = 3  # tiles named in an error


def compare_runs(paths: Sequence[Path], store: Location | None, settings: EvaluateSettings) -> dict[str, Any]:
    """Compare two fits on the tiles of a split, which is measured where it is not yet.

    Args:
        paths: Two run folders; ``runs/moe`` stands for all seeds, ``runs/moe-seed0`` …
        store: A store with the features of both; None for those they were fitted on.
        settings: Split, bootstrap.

    Returns:
        What `compare_fits` finds, and `names`: the paths.

    Raises:
        SettingsError: not two paths.
        RunError: they are not of the same task, classes and tiles with the same targets.
    """
    if len(paths) != 2:
        raise SettingsError(f"--compare: got {len(paths)} runs, expected two: `evaluate --compare A B`")
    first, second = (seeds_of(path) for path in paths)
    for runs in (first, second):
        ensure_all_evaluated([run.path for run in runs], store, settings)
    return {"names": [str(path) for path in paths], **compare_fits(first, second, settings)}


def compare_fits(
    first_runs: Sequence[Run], second_runs: Sequence[Run], settings: EvaluateSettings
) -> dict[str, Any]:
    """Compare two fits that are measured, each by one run or by several seeds.

    Args:
        first_runs: The one …
        second_runs: … and the other.
        settings: How they were measured: split, bootstrap.

    Returns:
        seeds, task, split, tiles, level; `metrics`: of each the values of both, their difference, its
        interval and the share of draws in which the first is ahead; `mcnemar` of single runs, or `tile_iou`
        of masks.

    Raises:
        RunError: they are not of the same task, classes and tiles with the same targets.
    """
    sides = [first_runs, second_runs]
    tables = [[tile_table(run) for run in runs] for runs in sides]
    check_comparable([run for runs in sides for run in runs], [table for side in tables for table in side])
    task = sides[0][0].info["task"]
    first, second = ([scores_of(task, table) for table in side] for side in tables)
    tiles = len(tables[0][0])
    found = {
        "seeds": [[run.info["seed"] for run in runs] for runs in sides],
        "task": task,
        "split": settings.split,
        "tiles": tiles,
        "level": settings.level,
        "metrics": compare_metrics(mean_scores(first), mean_scores(second), tiles, settings),
    }
    if task == "segmentation":
        ours, theirs = (tile_iou(side) for side in tables)
        return found | {"tile_iou": compare_tiles(ours, theirs, settings)}
    if len(first) == len(second) == 1:
        found["mcnemar"] = mcnemar(*(right_tiles(side[0]) for side in tables))
    return found


def seeds_of(path: Path) -> list[Run]:
    """A run, or all seeds of a fit."""
    seeds = seeds_behind(path)
    return [open_run(path)] if (path / RUN_FILE).is_file() or not seeds else [open_run(s) for s in seeds]


def tile_table(run: Run) -> pd.DataFrame:
    """A run's predictions, one row per tile, in the order of the tiles' ids."""
    named = ["target", "predicted", "probabilities"]
    columns = ["confusion", "miou"] if run.info["task"] == "segmentation" else named
    return predictions(run, ["tile_id", *columns]).sort_values("tile_id", ignore_index=True)


def check_comparable(runs: Sequence[Run], tables: Sequence[pd.DataFrame]) -> None:
    """Refuse runs that do not predict the same targets of the same tiles."""
    check_alike("task", {run.path: run.info["task"] for run in runs})
    check_alike("list of classes", {run.path: ", ".join(run.info["classes"]) for run in runs})
    remedy = "compare runs of the same tiles, or measure both on one store: `evaluate --compare A B STORE`"
    first = tables[0]
    for run, table in zip(runs, tables, strict=True):
        apart = sorted(set(first["tile_id"]) ^ set(table["tile_id"]))
        if apart:
            raise RunError(
                f"{runs[0].path} was measured on {len(first)} tiles and {run.path} on {len(table)}, with "
                f"{len(apart)} in one of them only: {shorten(apart)}; {remedy}"
            )
        pairs = zip(table["tile_id"], truth(first), truth(table), strict=True)
        other = [name for name, ours, theirs in pairs if ours != theirs]
        if other:
            raise RunError(
                f"{runs[0].path} and {run.path} were measured against different targets of {len(other)} "
                f"tiles: {shorten(other)}; {remedy}"
            )


def shorten(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:LISTED]) + (" …" if len(names) > LISTED else "")


def truth(table: pd.DataFrame) -> list[tuple[int, ...]]:
    """What each tile's targets are, as far as predictions tell: of masks, the pixels of each class."""
    if "confusion" in table:
        cells = np.stack(table["confusion"].to_list())
        classes = round(cells.shape[1] ** 0.5)
        return [tuple(row) for row in cells.reshape(len(cells), classes, classes).sum(axis=2)]
    return [tuple(np.atleast_1d(target)) for target in table["target"]]


def scores_of(task: str, table: pd.DataFrame) -> Scores:
    """How a run scores on draws of the tiles."""
    if task == "segmentation":
        cells = np.stack(table["confusion"].to_list())
        classes = round(cells.shape[1] ** 0.5)
        return partial(segmentation_scores, cells.reshape(len(cells), classes, classes))
    scores = multilabel_scores if task == "multilabel" else classification_scores
    return partial(scores, np.stack(table["target"].to_list()), np.stack(table["probabilities"].to_list()))


def mean_scores(several: Sequence[Scores]) -> Scores:
    """Mean of the scores over seeds."""

    def scores(counts: NDArray[np.int64]) -> dict[str, Floats]:
        found = [one(counts) for one in several]
        return {name: np.mean([each[name] for each in found], axis=0) for name in found[0]}

    return scores


def compare_metrics(first: Scores, second: Scores, tiles: int, settings: EvaluateSettings) -> dict[str, Any]:
    """The values of both, and `paired_difference`."""
    once = np.ones((1, tiles), np.int64)
    values = [{name: float(value[0]) for name, value in scores(once).items()} for scores in (first, second)]
    paired = paired_difference(first, second, tiles, settings.bootstrap, settings.seed, settings.level)
    return {name: {"values": [side[name] for side in values], **paired[name]} for name in paired}


def right_tiles(table: pd.DataFrame) -> NDArray[np.bool_]:
    """(N,) whether a tile's class, or all its classes, were predicted."""
    target, predicted = (np.stack(table[name].to_list()) for name in ("target", "predicted"))
    same: NDArray[np.bool_] = (target == predicted).reshape(len(table), -1).all(axis=1)
    return same


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> dict[str, Any]:
    """McNemar's exact test of two (N,) outcomes of the same tiles."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    split = only_first + only_second
    p = float(binomtest(only_first, split).pvalue) if split else 1.0
    return {"only_first": only_first, "only_second": only_second, "p": p}


def tile_iou(tables: Sequence[pd.DataFrame]) -> Floats:
    """(N,) mean IoU of each tile, over the seeds; NaN where a tile has no labelled pixel."""
    mean: Floats = np.mean([table["miou"].to_numpy(np.float64) for table in tables], axis=0)
    return mean


def compare_tiles(first: Floats, second: Floats, settings: EvaluateSettings) -> dict[str, Any]:
    """Compare the (N,) IoU of tiles pair by pair."""
    difference = first - second
    difference = difference[~np.isnan(difference)]

    def mean(counts: NDArray[np.int64]) -> dict[str, Floats]:
        return {"mean": ratio(counts @ difference, counts.sum(axis=1))}

    drawn = sample(mean, len(difference), settings.bootstrap, settings.seed)["mean"]
    return {
        "mean_difference": float(difference.mean()),
        "interval": list(percentiles(drawn, settings.level)),
        "first_ahead": int((difference > 0).sum()),
        "second_ahead": int((difference < 0).sum()),
        "p": float(wilcoxon(difference).pvalue) if difference.any() else 1.0,
    }


def format_comparison(found: dict[str, Any]) -> str:
    """A comparison for reading."""
    names, level = found["names"], f"{100 * found['level']:g}%"
    lines = [f"A  {names[0]}", f"B  {names[1]}", f"{found['tiles']} {found['split']} tiles"]
    lines.append(f"{'':18} {'A':>6} {'B':>6} {'A - B':>7}  {level} interval    A ahead in")
    for metric, one in found["metrics"].items():
        low, high = one["interval"]
        a, b = one["values"]
        span = f"[{low:+.3f}, {high:+.3f}]"
        lines.append(f"{metric:18} {a:6.3f} {b:6.3f} {one['difference']:+7.3f}  {span}  {one['ahead']:.1%}")
    if "mcnemar" in found:
        test = found["mcnemar"]
        lines.append(
            f"right in A only: {test['only_first']} tiles, in B only: {test['only_second']}; McNemar "
            f"p = {test['p']:.3g}"
        )
    if "tile_iou" in found:
        test = found["tile_iou"]
        low, high = test["interval"]
        lines.append(
            f"IoU of a tile: A - B {test['mean_difference']:+.3f} [{low:+.3f}, {high:+.3f}] in the mean, A "
            f"ahead in {test['first_ahead']} tiles, B in {test['second_ahead']}; Wilcoxon p = {test['p']:.3g}"
        )
    return "\n".join([*lines, verdict(found)])


def verdict(found: dict[str, Any]) -> str:
    """What the interval of the main metric says, in words."""
    metric = MAIN_METRIC[found["task"]]
    one = found["metrics"][metric]
    low, high = one["interval"]
    level = f"{100 * found['level']:g}%"
    if low <= 0 <= high:
        return f"{metric}: no difference that other tiles of the same kind might not turn around ({level})"
    return f"{metric}: {'A' if low > 0 else 'B'} is ahead beyond its {level} interval"
