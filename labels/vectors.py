"""Polygons and points of a GeoPackage, GeoJSON or Shapefile, checked and ready to be placed on tiles.

Files are read by pyogrio, which brings a GDAL of its own beside rasterio's; geometries are shapely's.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import shapely
from numpy.typing import NDArray
from pyogrio.errors import DataLayerError, DataSourceError
from rasterio.crs import CRS
from rasterio.errors import CRSError

from satdifuser.errors import LabelError, SatDiFuserError, SettingsError, suggest

VECTOR_SUFFIXES = (".gpkg", ".geojson", ".json", ".shp")
POINT, POLYGON = 0, 3  # shapely's numbers of these types
LINES = (1, 2, 5)
SHOWN = 5  # features that a message names

Geometries = NDArray[Any]  # of shapely geometries


@dataclass(frozen=True)
class Shapes:
    """Simple polygons and points of one layer, in the order of its features."""

    path: Path
    crs: str
    geometry: Geometries  # (S,) each a polygon or a point
    feature: NDArray[np.intp]  # (S,) number of the feature that each is a part of, from 0
    values: NDArray[Any] | None  # (features,) what the asked column holds
    features: int
    repaired: int = 0  # features whose polygons crossed themselves
    empty: int = 0  # features without a geometry

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) of all, in units of the CRS."""
        left, bottom, right, top = shapely.total_bounds(self.geometry).tolist()
        return left, bottom, right, top


def is_vector(path: Path) -> bool:
    """Tell whether a file is named as one of polygons and points."""
    return path.suffix.lower() in VECTOR_SUFFIXES


def read_shapes(
    path: Path, column: str | None = None, layer: str | None = None, refuse_invalid: bool = False
) -> Shapes:
    """Read the polygons and points of a layer.

    Args:
        path: A GeoPackage, GeoJSON or Shapefile.
        column: A column to read with them.
        layer: The layer; None where the file has one with geometries.
        refuse_invalid: Refuse polygons that are not valid rather than repair them.

    Raises:
        SettingsError: there is no such file, layer or column.
        LabelError: the file cannot be read, has no CRS, holds lines or no geometry at all, or polygons that
            cross themselves where these are refused.
    """
    if not path.is_file():
        raise SettingsError(
            f"{path}: no such file of polygons or points, its path seen from the working folder"
        )
    with _reading(path):
        layer = _choose_layer(path, layer)
        _check_column(path, column, pyogrio.read_info(path, layer=layer)["fields"].tolist())
        columns = [column] if column else []
        meta, _, raw, fields = pyogrio.raw.read(path, layer=layer, columns=columns, force_2d=True)
    crs = _check_crs(path, meta["crs"])
    geometry, feature, repaired = _parse(path, raw, refuse_invalid)
    parts, owner = _simple_parts(geometry)
    values = fields[0] if column else None
    return Shapes(path, crs, parts, feature[owner], values, len(raw), repaired, len(raw) - len(geometry))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what is raised on a damaged file into one error that names it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GDAL, on matters of form
            yield
    except SatDiFuserError:
        raise
    except (DataSourceError, DataLayerError, OSError, ValueError, RuntimeError) as error:
        raise LabelError(f"{path}: cannot be read as polygons or points ({error}); replace it") from error


def _choose_layer(path: Path, layer: str | None) -> str:
    layers = [str(name) for name, kind in pyogrio.list_layers(path) if kind is not None]
    if not layers:
        raise LabelError(f"{path}: holds no layer with geometries; expected polygons or points")
    if layer is None and len(layers) == 1:
        return layers[0]
    if layer not in layers:
        what = "holds several layers" if layer is None else f"holds no layer {layer!r}"
        hint = suggest(layer, layers) if layer else ""
        raise SettingsError(
            f"{path}: {what} ({', '.join(layers)}); name one of them in label.layer, or "
            f"source.vectors.layer of scenes{hint}"
        )
    return layer


def _check_column(path: Path, column: str | None, held: Sequence[str]) -> None:
    if column is not None and column not in held:
        raise SettingsError(
            f"{path}: has no column {column!r}; it has {', '.join(held) or 'none'}{suggest(column, held)}; "
            "name the one that holds the class in label.column, or source.vectors.column of scenes"
        )


def _check_crs(path: Path, crs: str | None) -> str:
    if not crs:
        beside = " (a Shapefile keeps it in a .prj beside it)" if path.suffix.lower() == ".shp" else ""
        raise LabelError(
            f"{path}: has no CRS{beside}, so nobody knows where its shapes lie; assign the one that they "
            "were drawn in, in QGIS or by `ogr2ogr -a_srs EPSG:… NEW OLD`"
        )
    try:
        CRS.from_user_input(crs)
    except CRSError as error:
        raise LabelError(
            f"{path}: its CRS is not understood ({error}); reproject it to a common one"
        ) from error
    return crs


def _parse(path: Path, raw: NDArray[Any], refuse_invalid: bool) -> tuple[Geometries, NDArray[np.intp], int]:
    """Geometries that are there, the feature of each, and how many were repaired."""
    geometry = shapely.from_wkb(raw, on_invalid="fix")  # closes rings that are open
    lost = [i for i, parsed in enumerate(geometry) if parsed is None and raw[i] is not None]
    if lost:
        raise LabelError(f"{path}: {_named(lost)}: the geometry cannot be read; mend or remove it")
    feature = np.flatnonzero(~(shapely.is_missing(geometry) | shapely.is_empty(geometry)))
    if not len(feature):
        raise LabelError(f"{path}: holds no polygon or point in its {len(raw)} features; draw some first")
    lines = feature[np.isin(shapely.get_type_id(geometry[feature]), LINES)].tolist()
    if lines:
        raise LabelError(f"{path}: {_named(lines)}: a line, expected polygons or points; buffer or remove it")
    open_ring = shapely.is_missing(shapely.from_wkb(raw, on_invalid="ignore"))
    wrong = feature[open_ring[feature] | ~shapely.is_valid(geometry[feature])].tolist()
    if wrong and refuse_invalid:
        reason = shapely.is_valid_reason(geometry[wrong[0]])
        raise LabelError(
            f"{path}: {_named(wrong)}: not valid ({'a ring is open' if open_ring[wrong[0]] else reason}); "
            "mend it, or set `invalid` to repair"
        )
    for i in wrong:
        geometry[i] = _polygonal(shapely.make_valid(geometry[i]))
    return geometry[feature], feature, len(wrong)


def _polygonal(geometry: Any) -> Any:
    """The polygons of a repaired geometry, without lines and points that are left where it had no width."""
    parts = _simple_parts(np.array([geometry]))[0]
    return shapely.multipolygons(parts[shapely.get_type_id(parts) == POLYGON])


def _simple_parts(geometry: Geometries) -> tuple[Geometries, NDArray[np.intp]]:
    """All polygons and points of some geometries, and which of these each is a part of."""
    outer, owner = shapely.get_parts(geometry, return_index=True)
    parts, inner = shapely.get_parts(outer, return_index=True)  # a collection may hold several of several
    return parts, owner[inner]


def _named(features: Sequence[int]) -> str:
    """Features as a message names them, counted from 1."""
    shown = ", ".join(str(i + 1) for i in features[:SHOWN]) + (", …" if len(features) > SHOWN else "")
    return f"feature {shown}" + (f" ({len(features)} in all)" if len(features) > 1 else "")


# --- classes


def class_names(shapes: Shapes, column: str, names: dict[int, str]) -> list[str | None]:
    """What the column says of each feature, as a name; None where it says nothing.

    Args:
        shapes: With the values of the column.
        column: Its name, for the message.
        names: Names of numbers; a number without a name is its own.

    Raises:
        LabelError: the column holds other things than texts and whole numbers.
    """
    values = shapes.values
    if values is None:
        raise ValueError("the shapes were read without a column")
    if values.dtype.kind == "M":
        raise _no_classes(shapes, column, values[0])
    return [_name(shapes, column, value, names) for value in values.tolist()]


def _name(shapes: Shapes, column: str, value: Any, names: dict[int, str]) -> str | None:
    if value is None or value == "" or value != value:  # NaN differs from itself
        return None
    if isinstance(value, str):
        return value
    if not isinstance(value, int | float) or value != int(value):
        raise _no_classes(shapes, column, value)
    return names.get(int(value), str(int(value)))


def _no_classes(shapes: Shapes, column: str, value: Any) -> LabelError:
    return LabelError(
        f"{shapes.path}: column {column!r} holds {value!r}, expected names or whole numbers of classes; name "
        "the column that holds the class in label.column, or source.vectors.column of scenes"
    )


def sorted_names(names: Sequence[str | None]) -> tuple[str, ...]:
    """The names that occur, numbers by their value, texts after them in alphabetical order."""
    found = {name for name in names if name is not None}
    whole = {name for name in found if name.lstrip("-").isdecimal()}
    return (*sorted(whole, key=int), *sorted(found - whole))


def count_unknown(names: Sequence[str | None], classes: Sequence[str]) -> Counter[str]:
    """How many features have a class that is not in a list."""
    known = set(classes)
    return Counter(name for name in names if name is not None and name not in known)
