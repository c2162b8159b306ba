"""The report page: what was done, the results of several runs, and pictures of the chosen one.

One HTML file that needs no network. Class names, paths and tile ids come from files and are escaped.

Shape letters: C classes, T timesteps, L layers, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from satdifuser.errors import RunError
from satdifuser.evaluate.metrics import confusion_matrix, per_class_table
from satdifuser.evaluate.pictures import colour_mask, heat_map_svg, line_chart_svg, palette, png_data_uri
from satdifuser.evaluate.results import (
    REMEDY,
    best_on_val,
    choice_sentence,
    choose,
    format_cells,
    group_seeds,
    interval,
    main_metric,
    open_runs,
    percent,
    reported_split,
    require,
    score,
    span,
    tabulate,
)
from satdifuser.fuse.run_folder import Run
from satdifuser.store.files import write_durably

Preview = Callable[[str], NDArray[np.uint8] | None]

PICTURE_PX = 128  # smaller pictures are enlarged to about this width
SHOWN_MISTAKES, SHOWN_RIGHT = 12, 12
SHOWN_WORST, SHOWN_TYPICAL = 3, 3


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
        RunError: A run folder is incomplete, or the runs differ in task, split or level.
    """
    groups = group_seeds(open_runs(runs))
    results = tabulate(groups)
    seeds = choose(groups)
    chosen = best_on_val(seeds)
    confusion = confusion_of(chosen)
    page = {
        "title": title,
        "command": command,
        "facts": store.facts if store else {},
        "run": chosen,
        "seeds": len(seeds),
        "label_sets": len({run.info["store"]["hashes"]["labels"] for group in groups for run in group}),
        "metric": main_metric(chosen),
        "split": reported_split(chosen),
        "level": percent(chosen.metrics["evaluate"]["level"]),
        "results": format_cells(results),
        "answer": answer(results),
        "choice": choice_sentence(results),
        "scores": score_cells(chosen),
        "per_class": class_cells(confusion, chosen.info["classes"]),
        "confusion": confusion_svg(confusion, chosen.info["classes"], reported_split(chosen)),
        "curves": curve_svgs([best_on_val(group) for group in groups]),
        "weights": weights_svg(chosen.info["weights"]),
        "legend": list(zip(chosen.info["classes"], palette(len(confusion)).tolist(), strict=True)),
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


def predictions(run: Run, columns: list[str]) -> pd.DataFrame:
    """These columns of a run's predictions, one row per tile of the reported split."""
    path = run.path / "predictions.parquet"
    if not path.is_file():
        raise RunError(f"{path} is missing; {REMEDY}")
    table = pd.read_parquet(path)
    require(path, table, ["split", *columns])
    return table.loc[table["split"] == reported_split(run), columns].reset_index(drop=True)


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
        if name != "interval"
    ]


def confusion_of(run: Run) -> NDArray[np.int64]:
    """(C, C) confusion matrix of the reported tiles: counts of tiles, or of pixels for a segmentation."""
    classes = len(run.info["classes"])
    if run.info["task"] == "classification":
        table = predictions(run, ["target", "predicted"])
        return confusion_matrix(table["target"].to_numpy(), table["predicted"].to_numpy(), classes)
    cells = np.stack(predictions(run, ["confusion"])["confusion"].to_list()).sum(axis=0)
    return np.asarray(cells, np.int64).reshape(classes, classes)


def class_cells(confusion: NDArray[np.int64], classes: list[str]) -> list[dict[str, str]]:
    """The per-class table, as texts."""
    table = per_class_table(confusion, classes)
    table["support"] = table["support"].map("{:,}".format)
    scores = ["precision", "recall", "f1", "iou"]
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


def pictures(run: Run, preview: Preview) -> dict[str, list[dict[str, Any]]]:
    """Cards of reported tiles under their headings; each card has images (label, uri, alt) and a caption."""
    cards = tile_cards(run, preview) if run.info["task"] == "classification" else mask_cards(run, preview)
    return {heading: shown for heading, shown in cards.items() if shown}


def tile_cards(run: Run, preview: Preview) -> dict[str, list[dict[str, Any]]]:
    """Tiles with their true and predicted class: confident mistakes first, then right ones of all classes."""
    table = predictions(run, ["tile_id", "target", "predicted", "probabilities"])
    table["confidence"] = [p[c] for p, c in zip(table["probabilities"], table["predicted"], strict=True)]
    is_right = table["target"] == table["predicted"]
    mistakes = table[~is_right].sort_values("confidence", ascending=False, kind="stable")
    right = table[is_right].sample(frac=1, random_state=0)
    turn = right.groupby("target").cumcount()  # one of each class, then the next of each class
    right = right.assign(turn=turn).sort_values(["turn", "target"])
    return {
        "The most confident mistakes": class_cards(mistakes.head(SHOWN_MISTAKES), run, preview),
        "Some right answers": class_cards(right.head(SHOWN_RIGHT), run, preview),
    }


def class_cards(table: pd.DataFrame, run: Run, preview: Preview) -> list[dict[str, Any]]:
    """One card per row of predictions whose tile has a preview."""
    classes, cards = run.info["classes"], []
    for row in table.to_dict("records"):
        truth, predicted = classes[row["target"]], classes[row["predicted"]]
        image = image_of(preview(row["tile_id"]), "", f"Tile {row['tile_id']}, of class {truth}")
        caption = [f"truth: {truth}", f"predicted: {predicted} ({row['confidence']:.0%})", row["tile_id"]]
        cards.append({"images": image, "caption": caption})
    return [card for card in cards if card["images"]]


def mask_cards(run: Run, preview: Preview) -> dict[str, list[dict[str, Any]]]:
    """Image, truth and prediction of the saved tiles: worst first, then those nearest the median."""
    path = run.path / "masks.npz"
    if not path.is_file():
        return {}
    with np.load(path) as saved:
        ids, truths, guesses = (saved[name] for name in ("tile_id", "target", "predicted"))
    quality = predictions(run, ["tile_id", "miou"]).set_index("tile_id")["miou"]
    here = quality.reindex(ids).to_numpy()
    order = np.argsort(here, kind="stable")  # tiles without a label are NaN and come last
    worst, rest = order[:SHOWN_WORST], order[SHOWN_WORST:]
    typical = rest[np.argsort(np.abs(here[rest] - quality.median()), kind="stable")][:SHOWN_TYPICAL]

    def cards(chosen: NDArray[np.int64]) -> list[dict[str, Any]]:
        return [mask_card(run, preview, str(ids[i]), truths[i], guesses[i], here[i]) for i in chosen]

    return {"The worst of the saved tiles": cards(worst), "Typical tiles": cards(typical)}


def mask_card(
    run: Run, preview: Preview, tile_id: str, truth: NDArray[np.uint8], guess: NDArray[np.uint8], miou: float
) -> dict[str, Any]:
    """Image, truth and prediction of one tile."""
    colours = palette(len(run.info["classes"]))
    ignore_value = run.info["ignore_value"]
    images = image_of(preview(tile_id), "image", f"Tile {tile_id}")
    images += image_of(colour_mask(truth, colours, ignore_value), "truth", f"True classes of tile {tile_id}")
    images += image_of(colour_mask(guess, colours), "prediction", f"Predicted classes of tile {tile_id}")
    return {"images": images, "caption": [f"mIoU {score(miou)}", tile_id]}


def image_of(rgb: NDArray[np.uint8] | None, label: str, alt: str) -> list[dict[str, str]]:
    """One image of a card, or none."""
    if rgb is None:
        return []
    scale = max(1, PICTURE_PX // rgb.shape[1])
    return [{"label": label, "uri": png_data_uri(rgb, scale), "alt": alt}]
