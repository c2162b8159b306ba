"""Figures of fitted runs: how good each is and how sure that is, and the chosen one in detail.

Shape letters: C classes, T timesteps, L layers.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from satdifuser.evaluate.metrics import confusion_matrix, multilabel_table, per_class_table
from satdifuser.evaluate.report.charts import Line, interval_chart, label_chart, line_chart
from satdifuser.evaluate.report.figure import Charts, Figure, Table, as_text
from satdifuser.evaluate.report.heat_map import heat_map
from satdifuser.evaluate.results import (
    choice_sentence,
    format_cells,
    interval,
    main_metric,
    percent,
    predictions,
    reported_split,
    score,
    span,
)
from satdifuser.fuse.leaderboard import BOARD_FILE
from satdifuser.fuse.run_folder import SETTINGS_FILE, Run

METRICS = {
    "classification": "Accuracy is the share of tiles given the right class.",
    "multilabel": "f1_micro: over all tiles and classes together, the harmonic mean of how much of what was "
    "named is right and how much of what is there was named. A class is named where its probability is 0.5 "
    "or more.",
    "segmentation": "miou: for each class, the pixels that truth and prediction share, divided by the pixels "
    "that either of them has; then the mean over the classes.",
}


def command_of(run: Run) -> str:
    """A command line that makes a run again."""
    store, info = str(run.info["store"]["path"]), run.info
    if "reference" in info:  # imported: its training was done elsewhere
        return shlex.join(["satdifuser", "evaluate", str(run.path), store])
    words = ["satdifuser", "fit", store, "-c", str(run.path / SETTINGS_FILE)]
    if info["kind"] == "fusion":
        words += ["--set", f"fit.fusion=[{info['fusion']}]", "--set", f"fit.seeds=[{info['seed']}]"]
    return shlex.join([*words, "-o", str(run.path.parent)])


def results_figures(results: pd.DataFrame, task: str, command: str) -> list[Figure]:
    """All runs side by side, as a chart with intervals and as a table.

    Args:
        results: A table of `satdifuser.evaluate.results.results_table`.
        task: Of the runs.
        command: That made the page.
    """
    split, metric = results["split"].iloc[0], results["metric"].iloc[0]
    rows = format_cells(results)
    bars = [
        (cells["run"].removesuffix(" (baseline)"), row["reported"], row["low"], row["high"])
        for cells, row in zip(rows, results.to_dict("records"), strict=True)
    ]
    figure = f"{split} {metric}"
    chart = interval_chart(bars, f"{figure} of every run, with its interval", figure)
    level = percent(results["level"].iloc[0])
    return [
        Figure(
            "All runs at a glance",
            Charts([chart]),
            f"Each dot is a run's figure on {split}, further right is better. The line is its {level} "
            "interval, which says how much the figure could change with other tiles of the same kind; where "
            f"intervals overlap widely, runs are hardly to be told apart. {METRICS[task]} 1 is perfect.",
            command,
            results.drop(columns="seeds").assign(seeds=[", ".join(map(str, s)) for s in results["seeds"]]),
        ),
        Figure(
            "All runs as a table",
            Table(rows),
            f"Highest on val first. {choice_sentence(results)} Runs that differ only in the random seed "
            "share a row: means of the figures and of the ends of the interval, ± the standard deviation "
            "over the seeds. Parameters are the trained ones; seconds are the time to train, device seconds "
            "what of it the device worked on; joules are shown where the machine measures them.",
            command,
            pd.DataFrame(rows),
        ),
    ]


def labels_figures(groups: Sequence[list[Run]]) -> list[Figure]:
    """The figure of each fusion over the tiles it learned from, where runs learned from different numbers."""
    tidy = [
        {"fusion": run.info["fusion"], "tiles": run.info["train_tiles"], "draw": run.info["fit"]["draw"]}
        | {"seed": run.info["seed"], "reported": run.metrics[reported_split(run)][main_metric(run)]}
        for group in groups
        for run in group
        if "train_tiles" in run.info
    ]
    data = pd.DataFrame(tidy)
    if data.empty or data["tiles"].nunique() < 2:
        return []
    run = groups[0][0]
    lines = [labels_line(str(fusion), rows) for fusion, rows in data.groupby("fusion", sort=False)]
    return [
        Figure(
            "How few labels suffice",
            Charts([label_chart(lines, reported_split(run), main_metric(run))]),
            "Mean over seeds and draws of the labels; upright lines reach from the lowest to the highest of "
            "them. Each doubling of the tiles is a step of the same width.",
            "\n".join(command_of(run) for group in groups for run in group if "train_tiles" in run.info),
            data,
        )
    ]


def labels_line(name: str, rows: pd.DataFrame) -> Line:
    """Mean for each number of tiles, and how far it reaches."""
    found = rows.groupby("tiles")["reported"].agg(["mean", "min", "max"])
    points = [(float(str(tiles)), float(mean)) for tiles, mean in found["mean"].items()]
    return Line(name, points, list(zip(found["min"], found["max"], strict=True)))


def board_figures(runs: Sequence[Run]) -> list[Figure]:
    """How all networks of the sweeps stand on val that these runs were chosen from."""
    files = dict.fromkeys(run.path.parent / BOARD_FILE for run in runs)
    return [board_figure(file, runs) for file in files if file.is_file()]


def board_figure(file: Path, runs: Sequence[Run]) -> Figure:
    """The networks of one sweep, best on val first."""
    board = pd.read_csv(file)
    rows = [{str(name): as_text(cell) for name, cell in row.items()} for row in board.to_dict("records")]
    return Figure(
        f"All networks in {file.parent.name}",
        Table(rows),
        "Every network of the sweep, as it stands on val. Of each fusion only the one that is best here is "
        "measured on the reported split.",
        "\n".join(command_of(run) for run in runs if run.path.parent == file.parent),
        board,
        str(file),
    )


def answer(results: pd.DataFrame) -> str:
    """The outcome in a sentence or two: the chosen row, and the best baseline beside it."""
    rows = format_cells(results)
    best, level = rows[int(results["chosen"].argmax())], percent(results["level"].iloc[0])
    figure = f"{results['split'].iloc[0]} {results['metric'].iloc[0]}"
    words = f"Chosen: {best['run'].removeprefix('* ')}, {figure} {best[figure]}"
    words += f" ({level} interval {best[f'{level} interval']})."
    baselines = [row for row, kind in zip(rows, results["kind"], strict=True) if kind == "baseline"]
    if baselines and baselines[0] is not best:
        simple = baselines[0]
        words += f" Best on val among the baselines: {simple['run']}, {figure} {simple[figure]}."
    return words


def run_figures(run: Run) -> list[Figure]:
    """One run in detail: all its metrics, each class, and what is taken for what."""
    split, task, classes = reported_split(run), run.info["task"], run.info["classes"]
    command, source = command_of(run), str(run.path / "predictions.parquet")
    confusion = None if task == "multilabel" else confusion_of(run)
    table = labels_table(run) if confusion is None else per_class_table(confusion, classes)
    unit = "pixels" if task == "segmentation" else "tiles"
    scores, each = score_cells(run), class_cells(table)
    figures = [
        Figure("All metrics", Table(scores), "All metrics of this run.", command, pd.DataFrame(scores)),
        Figure(
            "Class by class",
            Table(each),
            f"Each class on {split}. Support is the number of {split} {unit} of the class; precision is the "
            "share of what was given this class that has it, recall the share of what has it that was found.",
            command,
            pd.DataFrame(each),
            source,
        ),
    ]
    return figures if confusion is None else [*figures, confusion_figure(confusion, run, command, source)]


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


def confusion_figure(confusion: NDArray[np.int64], run: Run, command: str, source: str) -> Figure:
    """Confusion matrix in percent of each row, so that rare classes are as readable as common ones."""
    classes, split = run.info["classes"], reported_split(run)
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    tidy = [
        {"true class": truth, "predicted class": guess, "count": int(confusion[r, k]), "percent": share[r, k]}
        for r, truth in enumerate(classes)
        for k, guess in enumerate(classes)
    ]
    return Figure(
        "What is taken for what",
        heat_map(share, classes, classes, "truth ↓ prediction →", "{:.0f}".format, low=0.0),
        f"Confusion matrix on {split}, in percent of each row: rows are the true class, columns the "
        "predicted one. A perfect model has 100 on the diagonal.",
        command,
        pd.DataFrame(tidy),
        source,
    )


def curves_figure(runs: Sequence[Run]) -> Figure | None:
    """Training loss and val metric of every run that was trained epoch by epoch."""
    trained = [(run.info["name"], run.info["history"]) for run in runs if run.info["history"]]
    if not trained:
        return None
    metric = main_metric(runs[0])
    tidy = [
        (name, e["epoch"], e["train_loss"], e["val"][metric]) for name, history in trained for e in history
    ]
    data = pd.DataFrame(tidy, columns=["run", "epoch", "training loss", f"val {metric}"])
    return Figure(
        "Training",
        Charts([curve(data, "training loss"), curve(data, f"val {metric}")]),
        "The loss is what training makes small; of each run the epoch that is best on val is kept. Where "
        "several seeds were trained, the seed that is best on val is drawn.",
        "\n".join(command_of(run) for run in runs if run.info["history"]),
        data,
        ", ".join(str(run.path / "run.json") for run in runs if run.info["history"]),
    )


def curve(data: pd.DataFrame, column: str) -> Any:
    """One column of the history over the epochs, a line for each run."""
    lines = [
        Line(str(name), list(zip(rows["epoch"], rows[column], strict=True)))
        for name, rows in data.groupby("run", sort=False)
    ]
    return line_chart(lines, f"{column} by epoch", "epoch", column)
