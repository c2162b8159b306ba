"""Cards of the report page: reported tiles with their image, truth and prediction.

Each card has images (label, uri, alt) and a caption; they come under headings, the worst first.

Shape letters: H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from satdifuser.evaluate.pictures import colour_mask, palette, png_data_uri
from satdifuser.evaluate.results import predictions, score
from satdifuser.fuse.run_folder import Run

Preview = Callable[[str], NDArray[np.uint8] | None]

PICTURE_PX = 128  # smaller pictures are enlarged to about this width
SHOWN_MISTAKES, SHOWN_RIGHT = 12, 12
SHOWN_WORST, SHOWN_TYPICAL = 3, 3


def pictures(run: Run, preview: Preview) -> dict[str, list[dict[str, Any]]]:
    """Cards of reported tiles under their headings; each card has images (label, uri, alt) and a caption."""
    kinds = {"classification": tile_cards, "multilabel": label_cards, "segmentation": mask_cards}
    cards = kinds[run.info["task"]](run, preview)
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


def label_cards(run: Run, preview: Preview) -> dict[str, list[dict[str, Any]]]:
    """Tiles with the names of their true and predicted classes: those with most mistakes first."""
    table = predictions(run, ["tile_id", "target", "predicted"])
    table["wrong"] = [int((t != p).sum()) for t, p in zip(table["target"], table["predicted"], strict=True)]
    mistakes = table[table["wrong"] > 0].sort_values("wrong", ascending=False, kind="stable")
    right = table[table["wrong"] == 0].sample(frac=1, random_state=0)

    def cards(chosen: pd.DataFrame) -> list[dict[str, Any]]:
        shown = [label_card(run, preview, row) for row in chosen.to_dict("records")]
        return [card for card in shown if card["images"]]

    return {
        "Most classes missed or wrongly named": cards(mistakes.head(SHOWN_MISTAKES)),
        "Some with every class right": cards(right.head(SHOWN_RIGHT)),
    }


def label_card(run: Run, preview: Preview, row: Mapping[Any, Any]) -> dict[str, Any]:
    """Image, true and predicted class names of one tile."""
    names = np.array(run.info["classes"])
    truth, guess = (", ".join(names[row[key] == 1]) or "none" for key in ("target", "predicted"))
    image = image_of(preview(row["tile_id"]), "", f"Tile {row['tile_id']}, with {truth}")
    return {"images": image, "caption": [f"truth: {truth}", f"predicted: {guess}", row["tile_id"]]}


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
