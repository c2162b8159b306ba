"""From a run and the features of tiles to a map or a table of classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shapely

from satdifuser.errors import LabelError, MapError, SettingsError
from satdifuser.evaluate.maps.area import Area, Raster, polygon_area, whole, window_area
from satdifuser.evaluate.maps.origin import Origin
from satdifuser.evaluate.maps.pixel_maps import MapOptions, TileFeatures, write_pixel_map
from satdifuser.evaluate.maps.store_features import NetworkInputs, StoreFeatures, choose_tiles
from satdifuser.evaluate.maps.strip_file import StripFile
from satdifuser.evaluate.maps.tile_maps import (
    find_ground,
    predict_scene_tiles,
    predict_store_tiles,
    strip_bytes,
    strip_identity,
)
from satdifuser.evaluate.maps.tile_results import TABLES, check_suffix, write_results
from satdifuser.fuse.predictor import Predictor
from satdifuser.labels.vectors import POLYGON, read_shapes
from satdifuser.store.lock import StoreLock
from satdifuser.store.reader import FeatureStore, Indices
from satdifuser.store.tile_grid import Window


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    out: Path
    options: MapOptions = field(default_factory=MapOptions)
    window: Window | None = None  # (row, col, height, width) px
    aoi: Path | None = None  # polygons of the area of interest
    tiles: str = "*"  # of a store: pattern of their ids
    overwrite: bool = False


@dataclass(frozen=True)
class Scene:
    """What a map needs to know of a scene."""

    name: str
    raster: Raster
    date: str = ""  # ISO 8601


def parse_window(text: str) -> Window:
    """Read ``ROW,COL,HEIGHT,WIDTH``.

    Raises:
        SettingsError: it is of another form.
    """
    try:
        row, col, height, width = map(int, text.split(","))
    except ValueError:
        raise SettingsError(
            f"--window {text}: expected row, column, height and width in px, e.g. 0,0,1024,1024"
        ) from None
    return row, col, height, width


def check_request(request: Request, predictor: Predictor) -> None:
    """Refuse an output that is there, or cannot hold what the run tells.

    Raises:
        MapError: the output exists.
        SettingsError: its ending does not fit.
    """
    check_suffix(request.out, predictor.task)
    if request.window and request.aoi:
        raise SettingsError("--window and --aoi: name one of them")
    if request.out.exists() and not request.overwrite:
        raise MapError(f"{request.out}: exists; choose another -o, or replace it with --overwrite")
    request.out.parent.mkdir(parents=True, exist_ok=True)


def find_area(raster: Raster, request: Request) -> Area:
    """The part of a raster that is asked for.

    Raises:
        SettingsError: the window reaches beyond the raster, or no polygon lies on it.
        LabelError: the polygons cannot be read, or there is none.
    """
    if request.aoi is not None:
        shapes = read_shapes(request.aoi)
        polygons = shapes.geometry[shapely.get_type_id(shapes.geometry) == POLYGON]
        if not len(polygons):
            raise LabelError(
                f"{request.aoi}: holds {shapes.features} features and no polygon; draw the area of interest "
                "as polygons, or put buffers around its points"
            )
        return polygon_area(raster, polygons, shapes.crs, str(request.aoi))
    return window_area(raster, request.window) if request.window else whole(raster)


def predict_features(
    predictor: Predictor,
    features: TileFeatures,
    area: Area,
    request: Request,
    scene: Scene,
    identity: Mapping[str, Any],
    tile_id: Callable[[int, int], str],
) -> Path:
    """Map a scene whose features are made as they are used.

    Args:
        predictor: The run.
        features: Of the tiles that touch the area.
        area: What is mapped.
        request: What is asked for.
        scene: The scene.
        identity: All that shapes the features.
        tile_id: Gives a tile's id by its row and column in px.
    """
    identity = {**identity, "model": predictor.run.info["model_sha256"]}
    origin = Origin(predictor.run, scene.name, scene.date)
    if predictor.task == "segmentation":
        return write_pixel_map(predictor, features, area, request.out, request.options, identity, origin)
    with StoreLock(request.out):
        sizes = strip_bytes(features.grid, len(predictor.classes))
        strips = StripFile(request.out, strip_identity(identity, area), sizes)
        try:
            results = predict_scene_tiles(predictor, features, area, strips, tile_id)
        finally:
            strips.close()
        write_results(results, request.out, request.options, origin)
        strips.discard()
    return request.out


def predict_store(
    predictor: Predictor, store: FeatureStore, request: Request, scene: Scene | None = None
) -> Path:
    """Map the tiles of a store; nothing of a backbone is loaded.

    Args:
        predictor: The run.
        store: A complete store of the run's features.
        request: What is asked for.
        scene: The scene whose tiles these are; None where that is told by the tiles alone.

    Raises:
        RunError: the store's features are not those that the run was fitted on.
        StoreError: the tiles lie on no one grid.
        SatDiFuserError: as `check_request` and `find_area`.
    """
    rows, inputs = choose_tiles(store, request.tiles), NetworkInputs(store, predictor)
    name = scene.name if scene else Path(str(store.path)).name
    origin = Origin(predictor.run, name, scene.date if scene else common_date(store))
    if predictor.task == "segmentation":
        return _map_pixels(predictor, inputs, rows, request, scene, origin)
    return _map_tiles(predictor, inputs, rows, request, scene, origin)


def _map_pixels(
    predictor: Predictor,
    inputs: NetworkInputs,
    rows: Indices,
    request: Request,
    scene: Scene | None,
    origin: Origin,
) -> Path:
    features = StoreFeatures(inputs, rows, scene.raster if scene else None)
    area = find_area(scene.raster if scene else features.covered(), request)
    features.grid = features.grid.touching(area.window)
    model = predictor.run.info["model_sha256"]
    identity = {"store": inputs.store.content_digest(), "tiles": request.tiles, "model": model}
    return write_pixel_map(predictor, features, area, request.out, request.options, identity, origin)


def _map_tiles(
    predictor: Predictor,
    inputs: NetworkInputs,
    rows: Indices,
    request: Request,
    scene: Scene | None,
    origin: Origin,
) -> Path:
    partly = request.window is not None or request.aoi is not None
    required = partly or request.out.suffix.lower() not in TABLES
    ground = find_ground(inputs.store, rows, required, scene.raster if scene else None)
    if ground is not None and partly:
        tops, lefts = ground.places.T.tolist()
        kept = find_area(ground.raster, request).touches(tops, lefts, ground.tile)
        if not kept.any():
            raise SettingsError(
                f"{request.out}: not written, for no tile of {inputs.store.path} lies on what is asked for; "
                "choose another --window or --aoi"
            )
        rows, ground = rows[kept], ground.only(kept)
    results = predict_store_tiles(predictor, inputs, rows, ground)
    return write_results(results, request.out, request.options, origin)


def common_date(store: FeatureStore) -> str:
    """The one date of all tiles of a store, "" where there is none or several."""
    dates = set(store.table("tiles/date").tolist())
    return str(dates.pop()) if len(dates) == 1 else ""
