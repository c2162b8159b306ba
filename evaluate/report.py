"""The report page: what was done, the results of several runs, and pictures of the chosen one.

One HTML file that needs no network. Class names, paths and tile ids come from files and are escaped.

Shape letters: C classes, T timesteps, L layers, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from satdifuser.evaluate.cards import Preview, pictures
from satdifuser.evaluate.metrics import confusion_matrix, multilabel_table, per_class_table
from satdifuser.evaluate.pictures import heat_map_svg, line_chart_svg, palette
from satdifuser.evaluate.results import (
    best_on_val,
    choice_sentence,
    choose,
    format_cells,
    group_seeds,
    interval,
    main_metric,
    open_runs,
    percent,
    predictions,
    reported_split,
    score,
    span,
    tabulate,
)
from satdifuser.fuse.run_folder import Run
from satdifuser.store.files import write_durably

AIMS = {
    "classification": "name the class of each tile",
    "multilabel": "say which classes each tile holds",
    "segmentation": "name the class of every pixel",
}
METRICS = {
    "classification": "Accuracy is the share of tiles given the right class.",
    "multilabel": "f1_micro: over all tiles and classes together, the harmonic mean of how much of what was "
    "named is right and how much of what is there was named. A class is named where its probability is 0.5 "
    "or more.",
    "segmentation": "miou: for each class, the pixels that truth and prediction share, divided by the pixels "
    "that either of them has; then the mean over the classes.",
}


@dataclass(frozen=True)
class ReportStore:
    """What the page shows of a feature store.

    Args:
        facts: Name and value of each fact to print: tiles, layers, bytes, …
        preview: Gives the (H, W, 3) uint8 picture of a tile id, or None where there is none.
    """

    facts: Mapping[str, str]
    preview: Preview


def write_report(
    runs: Sequence[Path], out: Path, title: str, store: ReportStore | None = None, command: str = ""
) -> Path:
    """Write the page of some runs of one task, measured on one split.

    Args:
        runs: Run folders.
        out: Path of the HTML file; its folders are made.
        title: Heading of the page.
        store: Facts and previews of the store; without it the page has no images of tiles.
        command: The command line that made the runs.

    Returns:
        `out`.

    Raises:
        RunError: A run folder is incomplete, or the runs differ in task, partition, split or level.
    """
    groups = group_seeds(open_runs(runs))
    results = tabulate(groups)
    seeds = choose(groups)
    chosen = best_on_val(seeds)
    task, classes = chosen.info["task"], chosen.info["classes"]
    confusion = None if task == "multilabel" else confusion_of(chosen)
    table = labels_table(chosen) if confusion is None else per_class_table(confusion, classes)
    page = {
        "title": title,
        "command": command,
        "facts": store.facts if store else {},
        "run": chosen,
        "seeds": len(seeds),
        "label_sets": len({run.info["store"]["hashes"]["labels"] for group in groups for run in group}),
        "aim": AIMS[task],
        "metric": METRICS[task],
        "unit": "pixels" if task == "segmentation" else "tiles",
        "split": reported_split(chosen),
        "level": percent(chosen.metrics["evaluate"]["level"]),
        "results": format_cells(results),
        "answer": answer(results),
        "choice": choice_sentence(results),
        "scores": score_cells(chosen),
        "per_class": class_cells(table),
        "confusion": None if confusion is None else confusion_svg(confusion, classes, reported_split(chosen)),
        "curves": curve_svgs([best_on_val(group) for group in groups]),
        "weights": weights_svg(chosen.info["weights"]),
        "legend": list(zip(classes, palette(len(classes)).tolist(), strict=True)),
        "pictures": pictures(chosen, store.preview if store else lambda tile_id: None),
    }
    templates = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    write_durably(out, environment.get_template("report.html.jinja").render(page).encode())
    return out


def answer(table: pd.DataFrame) -> str:
    """The outcome in a sentence or two: the chosen row, and the best baseline beside it."""
    rows = format_cells(table)
    best, level = rows[int(table["chosen"].argmax())], percent(table["level"].iloc[0])
    figure = f"{table['split'].iloc[0]} {table['metric'].iloc[0]}"
    words = f"Chosen: {best['run'].removeprefix('* ')}, {figure} {best[figure]}"
    words += f" ({level} interval {best[f'{level} interval']})."
    baselines = [row for row, kind in zip(rows, table["kind"], strict=True) if kind == "baseline"]
    if baselines and baselines[0] is not best:
        simple = baselines[0]
        words += f" Best on val among the baselines: {simple['run']}, {figure} {simple[figure]}."
    return words


def score_cells(run: Run) -> list[dict[str, str]]:
    """Every metric of one run, as texts."""
    split = reported_split(run)
    reported = run.metrics[split]
    level = percent(run.metrics["evaluate"]["level"])
    return [
        {
            "metric": name,
            "val": score(run.metrics["val"].get(name, math.nan)),
            split: score(reported[name]),
            f"{level} interval": span(*interval(run, name)),
        }
        for name in reported
        if name not in ("interval", "reference")
    ]


def confusion_of(run: Run) -> NDArray[np.int64]:
    """(C, C) confusion matrix of the reported tiles: counts of tiles, or of pixels for a segmentation."""
    classes = len(run.info["classes"])
    if run.info["task"] == "classification":
        table = predictions(run, ["target", "predicted"])
        return confusion_matrix(table["target"].to_numpy(), table["predicted"].to_numpy(), classes)
    cells = np.stack(predictions(run, ["confusion"])["confusion"].to_list()).sum(axis=0)
    return np.asarray(cells, np.int64).reshape(classes, classes)


def labels_table(run: Run) -> pd.DataFrame:
    """The per-class table of the reported tiles where a tile may have several classes."""
    table = predictions(run, ["target", "predicted"])
    target, predicted = (np.stack(table[name].to_list()) for name in ("target", "predicted"))
    return multilabel_table(target, predicted, run.info["classes"])


def class_cells(table: pd.DataFrame) -> list[dict[str, str]]:
    """The per-class table, as texts."""
    table["support"] = table["support"].map("{:,}".format)
    scores = [str(name) for name in table if name not in ("class", "support")]
    table[scores] = table[scores].map(score)
    return [{str(name): str(cell) for name, cell in row.items()} for row in table.to_dict("records")]


def confusion_svg(confusion: NDArray[np.int64], classes: list[str], split: str) -> Markup:
    """Confusion matrix in percent of each row, so that rare classes are as readable as common ones."""
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    cells = [[f"{value:.0f}" for value in row] for row in percent]
    return Markup(heat_map_svg(percent, classes, classes, f"Confusion matrix on the {split} split", cells))


def weights_svg(weights: dict[str, Any] | None) -> Markup | None:
    """Learned weights of the global fusion, layers down and timesteps across."""
    if weights is None:
        return None
    values = np.array(weights["values"]).T  # (T, L) -> (L, T)
    cells = [[f"{value:.3f}" for value in row] for row in values]
    timesteps = [str(timestep) for timestep in weights["timesteps"]]
    title = "Weight of each layer and timestep"
    return Markup(heat_map_svg(values, weights["layers"], timesteps, title, cells))


def curve_svgs(runs: Sequence[Run]) -> list[Markup]:
    """Training loss and val metric of every run that was trained epoch by epoch."""
    trained = [(run.info["name"], run.info["history"]) for run in runs if run.info["history"]]
    if not trained:
        return []
    metric = main_metric(runs[0])
    losses = [(name, [(e["epoch"], e["train_loss"]) for e in history]) for name, history in trained]
    scores = [(name, [(e["epoch"], e["val"][metric]) for e in history]) for name, history in trained]
    return [
        Markup(line_chart_svg(losses, "Training loss by epoch", "epoch", "training loss")),
        Markup(line_chart_svg(scores, f"{metric} on val by epoch", "epoch", f"val {metric}")),
    ]
