"""Tiles of the reported split to look at: each with its image, its truth and the prediction, worst first.

Shape letters: H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from satdifuser.evaluate.report.colours import IGNORED, Picture, colour_mask, exact_picture, palette, photo
from satdifuser.evaluate.report.figure import Card, Cards, Figure, Missing
from satdifuser.evaluate.report.runs import command_of
from satdifuser.evaluate.results import predictions, score
from satdifuser.fuse.run_folder import Run

Preview = Callable[[str], NDArray[np.uint8] | None]
"""Tile id -> its (H, W, 3) uint8 picture, or None where there is none."""

SHOWN_MISTAKES, SHOWN_RIGHT = 12, 12
SHOWN_WORST, SHOWN_TYPICAL = 6, 3


def tile_figures(run: Run, preview: Preview) -> list[Figure | Missing]:
    """Tiles under their headings."""
    kinds = {"classification": class_figures, "multilabel": label_figures, "segmentation": mask_figures}
    return kinds[run.info["task"]](run, preview)


def class_figures(run: Run, preview: Preview) -> list[Figure | Missing]:
    """Tiles with their true and predicted class: confident mistakes first, then right ones of all classes."""
    table = predictions(run, ["tile_id", "target", "predicted", "probabilities"])
    table["confidence"] = [p[c] for p, c in zip(table["probabilities"], table["predicted"], strict=True)]
    is_right = table["target"] == table["predicted"]
    mistakes = table[~is_right].sort_values("confidence", ascending=False, kind="stable")
    right = table[is_right].sample(frac=1, random_state=0)
    turn = right.groupby("target").cumcount()  # one of each class, then the next of each class
    right = right.assign(turn=turn).sort_values(["turn", "target"])
    wrong_cards = class_cards(mistakes.head(SHOWN_MISTAKES), run, preview)
    right_cards = class_cards(right.head(SHOWN_RIGHT), run, preview)
    return [
        *cards_figure(
            "The most confident mistakes",
            wrong_cards,
            f"Of {len(mistakes)} mistakes among {len(table)} tiles, those that the model was surest of.",
            run,
        ),
        *cards_figure("Some right answers", right_cards, "Drawn at random, of all classes in turn.", run),
    ]


def class_cards(table: pd.DataFrame, run: Run, preview: Preview) -> list[Card]:
    """One card per row of predictions whose tile has a preview."""
    classes, cards = run.info["classes"], []
    for row in table.to_dict("records"):
        truth, predicted = classes[row["target"]], classes[row["predicted"]]
        pictures = image_of(preview(row["tile_id"]), f"Tile {row['tile_id']}, of class {truth}")
        guess = f"{predicted} ({row['confidence']:.0%})"
        cards.append(Card(pictures, {"truth": truth, "predicted": guess, "tile": row["tile_id"]}))
    return cards


def label_figures(run: Run, preview: Preview) -> list[Figure | Missing]:
    """Tiles with the names of their true and predicted classes: those with most mistakes first."""
    table = predictions(run, ["tile_id", "target", "predicted"])
    table["wrong"] = [int((t != p).sum()) for t, p in zip(table["target"], table["predicted"], strict=True)]
    mistakes = table[table["wrong"] > 0].sort_values("wrong", ascending=False, kind="stable")
    right = table[table["wrong"] == 0].sample(frac=1, random_state=0)
    wrong_cards = [label_card(run, preview, row) for row in mistakes.head(SHOWN_MISTAKES).to_dict("records")]
    right_cards = [label_card(run, preview, row) for row in right.head(SHOWN_RIGHT).to_dict("records")]
    words = f"Of {len(mistakes)} tiles with any mistake among {len(table)}, those with most."
    return [
        *cards_figure("Most classes missed or wrongly named", wrong_cards, words, run),
        *cards_figure("Some with every class right", right_cards, "Drawn at random.", run),
    ]


def label_card(run: Run, preview: Preview, row: Mapping[Any, Any]) -> Card:
    """Image, true and predicted class names of one tile."""
    names = np.array(run.info["classes"])
    truth, guess = (", ".join(names[row[key] == 1]) or "none" for key in ("target", "predicted"))
    pictures = image_of(preview(row["tile_id"]), f"Tile {row['tile_id']}, with {truth}")
    return Card(pictures, {"truth": truth, "predicted": guess, "tile": row["tile_id"]})


def mask_figures(run: Run, preview: Preview) -> list[Figure | Missing]:
    """Image, truth and prediction of the saved tiles: worst first, then those nearest the median."""
    path = run.path / "masks.npz"
    if not path.is_file():
        reason = f"{path} is missing; measure the run again: `satdifuser evaluate {run.path}`"
        return [Missing("Predicted and true masks", reason)]
    with np.load(path) as saved:
        ids, truths, guesses = (saved[name] for name in ("tile_id", "target", "predicted"))
    quality = predictions(run, ["tile_id", "miou"]).set_index("tile_id")["miou"]
    here = quality.reindex(ids).to_numpy()
    order = np.argsort(here, kind="stable")  # tiles without a label are NaN and come last
    worst, rest = order[:SHOWN_WORST], order[SHOWN_WORST:]
    typical = rest[np.argsort(np.abs(here[rest] - quality.median()), kind="stable")][:SHOWN_TYPICAL]
    worst_cards, typical_cards = (
        [mask_card(run, preview, str(ids[i]), truths[i], guesses[i], here[i]) for i in chosen]
        for chosen in (worst, typical)
    )
    of_all = set(ids[worst]) == set(quality.nsmallest(len(worst)).index)
    among = f"all {len(quality)} tiles" if of_all else f"the {len(ids)} tiles whose masks were saved"
    words = f"Those with the lowest mean IoU of {among}, worst first. Predictions are left as they are where "
    words += "the truth is not labelled; these pixels do not count."
    return [
        *cards_figure("The worst tiles", worst_cards, words, run),
        *cards_figure("Typical tiles", typical_cards, "Nearest to the median of all tiles.", run),
    ]


def mask_card(
    run: Run, preview: Preview, tile_id: str, truth: NDArray[np.uint8], guess: NDArray[np.uint8], miou: float
) -> Card:
    """Image, truth and prediction of one tile."""
    colours = palette(len(run.info["classes"]))
    true_colours = colour_mask(truth, colours, run.info["ignore_value"])
    pictures = image_of(preview(tile_id), f"Tile {tile_id}", "image")
    pictures.append(exact_picture(true_colours, f"True classes of tile {tile_id}", "truth"))
    guessed = colour_mask(guess, colours)
    pictures.append(exact_picture(guessed, f"Predicted classes of tile {tile_id}", "prediction"))
    return Card(pictures, {"mIoU": score(miou), "tile": tile_id})


def cards_figure(title: str, cards: list[Card], words: str, run: Run) -> list[Figure | Missing]:
    """A figure of the cards that have pictures; nothing where there was nothing to show."""
    shown = [card for card in cards if card.pictures]
    if not cards:
        return []
    if not shown:
        return [Missing(title, "the store is not at hand, or holds no previews of these tiles")]
    masks = run.info["task"] == "segmentation"
    body = Cards(shown, wide=masks, legend=legend(run.info["classes"]) if masks else {})
    source = str(run.path / ("masks.npz" if masks else "predictions.parquet"))
    data = pd.DataFrame([card.facts for card in shown])
    return [Figure(title, body, words, command_of(run), data, source)]


def legend(classes: list[str]) -> dict[str, str]:
    """The CSS colour of each class."""
    colours = [*palette(len(classes)).tolist(), IGNORED]
    names = [*classes, "not labelled"]
    return {name: f"rgb({','.join(map(str, c))})" for name, c in zip(names, colours, strict=True)}


def image_of(rgb: NDArray[np.uint8] | None, alt: str, label: str = "") -> list[Picture]:
    """The picture of a tile, or none."""
    return [] if rgb is None else [photo(rgb, alt, label)]
