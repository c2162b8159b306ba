"""Writes the page: all layers of one canvas, two at a time beside a slider. It needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from satdifuser.errors import SettingsError
from satdifuser.evaluate.html import render_page
from satdifuser.evaluate.report.colours import data_uri
from satdifuser.evaluate.view.canvas import Canvas, lay_out
from satdifuser.evaluate.view.layers import Choice, Layer, store_layers
from satdifuser.evaluate.view.rasters import raster_layers
from satdifuser.fuse.predictor import Predictor
from satdifuser.store.files import write_durably
from satdifuser.store.location import Location, is_tiff
from satdifuser.store.reader import open_store

FOLDER = Path(__file__).parent
NOT_SEEN = 0.001  # share of the canvas that a layer must cover


@dataclass(frozen=True)
class ViewRequest:
    """What is shown, and how large."""

    choice: Choice = field(default_factory=Choice)
    bands: list[int | str] | None = None  # of scenes
    largest: int = 1200  # px a side of the pictures at most
    command: str = ""  # that makes the page


def write_view(
    places: Sequence[Location], out: Path, request: ViewRequest, predictor: Predictor | None = None
) -> Path:
    """Write the page of some stores, maps and scenes, laid on the ground of the first.

    Args:
        places: Stores and GeoTIFFs.
        out: The HTML file.
        request: What is shown.
        predictor: A run whose predictions are shown of each store.

    Raises:
        SettingsError: one of them does not lie on the ground of the first, or what is for stores is asked
            of none.
        StoreError: a store is incomplete, or its tiles have no places beside a raster.
        SatDiFuserError: as `store_layers` and `raster_layers`.
    """
    asked = predictor or request.choice.layers or request.choice.timestep is not None
    if asked and all(map(is_tiff, places)):
        raise SettingsError("--run, --timestep, --layers: are for stores, but none is named; name one")
    canvas: Canvas | None = None
    layers: list[Layer] = []
    for place in places:
        own, found = _layers_of(place, request, predictor)
        canvas = canvas or own
        found = [_laid(canvas, own, place, layer) for layer in found]
        several = f" ({Path(str(place)).name})" if len(places) > 1 else ""
        layers += [replace(layer, name=layer.name + several) for layer in found]
    page = render_page(
        FOLDER,
        "view",
        title=", ".join(Path(str(place)).name for place in places),
        layers=[_shown(layer) for layer in layers],
        right=_most_telling(layers),
        command=request.command,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_durably(out, page)
    return out


def _layers_of(
    place: Location, request: ViewRequest, predictor: Predictor | None
) -> tuple[Canvas, list[Layer]]:
    if is_tiff(place):
        ground, layers = raster_layers(place, request.bands, request.largest)
        return Canvas(ground.size, ground), layers
    store = open_store(place)
    sheet = lay_out(store, store.select(), request.largest)
    return sheet.canvas, store_layers(store, sheet, request.choice, predictor)


def _laid(canvas: Canvas, own: Canvas, place: Location, layer: Layer) -> Layer:
    """A layer on the canvas of the page."""
    if own is canvas:
        return layer
    if own.ground is None:
        raise SettingsError(f"{place}: its tiles have no places on one grid; view it by itself")
    picture = canvas.bring(layer.picture, own.ground, layer.smooth)
    if (picture[..., 3] == 255).mean() < NOT_SEEN:
        raise SettingsError(
            f"{place}: does not lie on the ground of the first that is named; view it by itself, or name it "
            "first"
        )
    return replace(layer, picture=picture)


def _most_telling(layers: Sequence[Layer]) -> int:
    """Which layer to show beside the first: a prediction, or else labels, or else the last."""
    for kind in ("prediction", "labels"):
        found = [i for i, layer in enumerate(layers) if layer.name.startswith(kind)]
        if found:
            return found[-1]
    return len(layers) - 1


def _shown(layer: Layer) -> dict[str, object]:
    """What the template needs of a layer: WebP for photos, PNG for classes, which keeps their colours."""
    image = Image.fromarray(layer.picture)
    uri = data_uri(image, "webp", quality=85) if layer.smooth else data_uri(image, "png", optimize=True)
    height, width = layer.picture.shape[:2]
    colours = {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in layer.legend.items()}
    return {
        "name": layer.name,
        "note": layer.note,
        "uri": uri,
        "sharp": not layer.smooth,
        "legend": colours,
        "width": width,
        "height": height,
    }
