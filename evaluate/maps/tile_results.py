"""Classes of whole tiles as a file: a table, polygons in a GeoPackage, or a GeoTIFF with a pixel per tile.

Letters of shapes: N tiles, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyogrio
from numpy.typing import NDArray

from satdifuser.errors import SettingsError
from satdifuser.evaluate.maps.area import Raster, tile_polygons
from satdifuser.evaluate.maps.map_file import NODATA, MapFile, write_map
from satdifuser.evaluate.maps.origin import Origin
from satdifuser.evaluate.maps.pixel_maps import MapOptions, in_steps, margin
from satdifuser.evaluate.maps.stac import write_item
from satdifuser.evaluate.maps.strip_file import cannot_write
from satdifuser.evaluate.metrics import at_least_half
from satdifuser.store.location import TIFF_SUFFIXES
from satdifuser.store.tile_grid import TileGrid, regular_grid

TABLES, VECTORS = (".csv", ".parquet"), (".gpkg",)


@dataclass(frozen=True)
class Ground:
    """Where tiles lie on a raster: each from a row and column (N, 2) on, and the grid they are of."""

    raster: Raster
    places: NDArray[np.int64]
    tile: tuple[int, int]  # (H, W) px
    grid: TileGrid | None = None

    def only(self, chosen: NDArray[np.bool_]) -> Ground:
        """The same for some of the tiles."""
        return replace(self, places=self.places[chosen])


@dataclass(frozen=True)
class TileResults:
    """What became of some tiles; `ground` is None where they have no place."""

    task: str
    classes: Sequence[str]
    tile_ids: Sequence[str]
    probabilities: NDArray[np.float32]  # (N, K)
    ground: Ground | None = None


def check_suffix(out: Path, task: str) -> None:
    """Refuse an output of a kind that cannot hold classes of this task.

    Raises:
        SettingsError: naming those that can.
    """
    kinds = {"classification": TIFF_SUFFIXES + VECTORS + TABLES, "multilabel": VECTORS + TABLES}
    fitting = kinds.get(task, TIFF_SUFFIXES)
    if out.suffix.lower() not in fitting:
        raise SettingsError(
            f"-o {out}: got the ending {out.suffix!r}, expected {' or '.join(fitting)} for a run of {task}"
        )


def write_results(results: TileResults, out: Path, options: MapOptions, origin: Origin) -> Path:
    """Write the classes of tiles in the form that the output's ending names.

    Raises:
        SettingsError: it needs places, which the tiles do not have.
        MapError: it cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    suffix = out.suffix.lower()
    if suffix in TABLES:
        return _write_table(results_table(results, options), out)
    if results.ground is None:
        raise SettingsError(f"-o {out}: the tiles have no place on the ground; write a table, NAME.csv")
    if suffix in VECTORS:
        return _write_polygons(results_table(results, options), results.ground, out)
    return _write_cells(results, results.ground, out, options, origin)


def results_table(results: TileResults, options: MapOptions) -> pd.DataFrame:
    """One row per tile: its class with its probability, or its classes; and as asked the rest."""
    table = pd.DataFrame({"tile_id": list(results.tile_ids)})
    if results.ground is not None:
        table["row"], table["column"] = results.ground.places.T
    names, probabilities = np.array(results.classes, dtype=object), results.probabilities
    if results.task == "multilabel":
        table["classes"] = [";".join(names[row]) for row in at_least_half(probabilities)]
    else:
        best = probabilities.argmax(axis=1)
        table["class"], table["class_number"] = names[best], best
        table["probability"] = probabilities[np.arange(len(best)), best]
        if options.confidence:
            table["confidence"] = margin(probabilities.T)
    if options.probabilities or results.task == "multilabel":
        for number, name in enumerate(results.classes):
            table[f"probability: {name}"] = probabilities[:, number]
    return table


def _write_table(table: pd.DataFrame, out: Path) -> Path:
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.suffix.lower() == ".csv":
            table.to_csv(partial, index=False)
        else:
            table.to_parquet(partial)
        partial.replace(out)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return out


def _write_polygons(table: pd.DataFrame, ground: Ground, out: Path) -> Path:
    tops, lefts = ground.places.T.tolist()
    polygons = tile_polygons(ground.raster, tops, lefts, ground.tile)
    fields: list[Any] = [table[name].to_numpy() for name in table]
    partial = out.with_name(f".{out.stem}.partial{out.suffix}")
    partial.unlink(missing_ok=True)
    try:
        pyogrio.raw.write(
            partial,
            np.array([polygon.wkb for polygon in polygons], dtype=object),
            fields,
            np.array(list(table), dtype=object),
            geometry_type="Polygon",
            crs=ground.raster.crs_wkt,
            driver="GPKG",
            layer="tiles",
        )
        partial.replace(out)
    except (OSError, RuntimeError, ValueError) as error:
        raise cannot_write(out, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return out


def _write_cells(
    results: TileResults, ground: Ground, out: Path, options: MapOptions, origin: Origin
) -> Path:
    """One pixel for each cell of the grid: the middle of its tile, where neighbours overlap."""
    grid = ground.grid or regular_grid(ground.places, ground.tile)
    bands = options.bands(results.classes)
    size = (len(grid.tops), len(grid.lefts))
    cells = np.full((size[0], len(bands), size[1]), NODATA, np.uint8)
    rows, columns = ((ground.places - (grid.tops[0], grid.lefts[0])) // grid.step).T
    cells[rows, :, columns] = _cell_bands(results, options)
    first = (grid.tops[0] + grid.overlap[0] / 2, grid.lefts[0] + grid.overlap[1] / 2)
    transform = ground.raster.part(*first, grid.step)
    file = out.with_name(f".{out.name}.cells")
    try:
        file.write_bytes(cells.tobytes())
        map_file = MapFile(size, ground.raster.crs_wkt, transform, results.classes, bands, origin.tags)
        write_item(out, map_file, origin)
        write_map(file, out, map_file)
    except OSError as error:
        raise cannot_write(out, error) from error
    finally:
        file.unlink(missing_ok=True)
    return out


def _cell_bands(results: TileResults, options: MapOptions) -> NDArray[np.uint8]:
    probabilities = results.probabilities
    bands = [probabilities.argmax(axis=1).astype(np.uint8)[:, None]]
    if options.confidence:
        bands.append(in_steps(margin(probabilities.T))[:, None])
    if options.probabilities:
        bands.append(in_steps(probabilities))
    return np.concatenate(bands, axis=1)
