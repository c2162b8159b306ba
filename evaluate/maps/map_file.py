"""The map as a file: a Cloud-Optimised GeoTIFF with class names, colours and what it was made with.

Bands are uint8 with 255 for no data: class numbers, then as asked the confidence and the probability of each
class in steps of 1/250, which the bands' scale tells. GDAL's COG driver writes the file from finished rows
on disk, described by a VRT (https://gdal.org/drivers/raster/vrt.html). In a TIFF of two bands a colour table
would make the second one the first's opacity, and more bands hold none: with several it stands in
``NAME.aux.xml`` beside the map, and in any case in the tag `SATDIFUSER_COLOURS`.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rasterio
import rasterio.shutil
from rasterio.errors import RasterioError

from satdifuser.evaluate.maps.strip_file import cannot_write
from satdifuser.evaluate.report.colours import palette

NODATA = 255
STEPS = 250  # of a probability
BLOCK = 512
CACHE_MB = 256  # of decoded blocks, else a share of all memory
CLASSES_TAG, COLOURS_TAG, MODEL_TAG = "SATDIFUSER_CLASSES", "SATDIFUSER_COLOURS", "SATDIFUSER_MODEL_SHA256"


@dataclass(frozen=True)
class MapFile:
    """What a map says of itself."""

    size: tuple[int, int]  # (H, W) px
    crs_wkt: str
    transform: Sequence[float]  # (a, b, c, d, e, f), see `satdifuser.evaluate.maps.area.Transform`
    classes: Sequence[str]
    bands: Sequence[str]  # descriptions; the first is of the classes
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def colours(self) -> list[tuple[int, int, int]]:
        """Red, green and blue of each class."""
        return [(int(r), int(g), int(b)) for r, g, b in palette(len(self.classes))]


def write_map(rows: Path, out: Path, map_file: MapFile) -> Path:
    """Write the map of finished rows.

    Args:
        rows: File of (H, bands, W) uint8.
        out: The map; it takes this name when it is complete. Category names are beside it, in
            ``NAME.aux.xml``, where GDAL looks for them.
        map_file: What it says of itself.

    Raises:
        MapError: it cannot be written.
    """
    vrt, partial = rows.with_suffix(".vrt"), out.with_name(f".{out.name}.partial.tif")
    sidecar, sidecar_partial = (path.with_name(f"{path.name}.aux.xml") for path in (out, partial))
    overviews = "mode" if len(map_file.bands) == 1 else "nearest"  # a mode of probabilities means nothing
    options = {"compress": "deflate", "blocksize": BLOCK, "bigtiff": "if_safer"}
    try:
        vrt.write_bytes(describe(map_file, rows.name))
        with rasterio.Env(GDAL_CACHEMAX=CACHE_MB):
            rasterio.shutil.copy(vrt, partial, driver="COG", overview_resampling=overviews, **options)
        if len(map_file.bands) > 1:
            _add_colours_beside(sidecar_partial, map_file)
        sidecar_partial.replace(sidecar)
        partial.replace(out)
    except (OSError, RasterioError) as error:
        raise cannot_write(out, error) from error
    finally:
        for left in (vrt, *out.parent.glob(f"{partial.name}*")):
            left.unlink(missing_ok=True)
    return out


def describe(map_file: MapFile, rows: str) -> bytes:
    """The VRT of finished rows in a file of that name beside it."""
    height, width = map_file.size
    root = ET.Element("VRTDataset", rasterXSize=str(width), rasterYSize=str(height))
    ET.SubElement(root, "SRS").text = map_file.crs_wkt
    a, b, c, d, e, f = map_file.transform
    ET.SubElement(root, "GeoTransform").text = ", ".join(map(repr, (c, a, b, f, d, e)))  # GDAL's order
    metadata = ET.SubElement(root, "Metadata")
    for name, value in (_own_tags(map_file) | dict(map_file.tags)).items():
        ET.SubElement(metadata, "MDI", key=name).text = value
    for index, description in enumerate(map_file.bands):
        band = ET.SubElement(
            root, "VRTRasterBand", dataType="Byte", band=str(index + 1), subClass="VRTRawRasterBand"
        )
        ET.SubElement(band, "Description").text = description
        ET.SubElement(band, "NoDataValue").text = str(NODATA)
        if index == 0:
            _add_classes(band, map_file)
        else:
            ET.SubElement(band, "Scale").text = repr(1 / STEPS)
        ET.SubElement(band, "SourceFilename", relativeToVRT="1").text = rows
        ET.SubElement(band, "ImageOffset").text = str(index * width)
        ET.SubElement(band, "PixelOffset").text = "1"
        ET.SubElement(band, "LineOffset").text = str(len(map_file.bands) * width)
    return bytes(ET.tostring(root, encoding="utf-8"))


def _own_tags(map_file: MapFile) -> dict[str, str]:
    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in map_file.colours]
    return {
        CLASSES_TAG: json.dumps(list(map_file.classes), ensure_ascii=False),
        COLOURS_TAG: json.dumps(colours),
    }


def _add_classes(band: ET.Element, map_file: MapFile) -> None:
    if len(map_file.bands) == 1:
        _add_colours(band, map_file)
    names = ET.SubElement(band, "CategoryNames")
    for name in map_file.classes:
        ET.SubElement(names, "Category").text = name


def _add_colours(band: ET.Element, map_file: MapFile) -> None:
    ET.SubElement(band, "ColorInterp").text = "Palette"
    table = ET.SubElement(band, "ColorTable")
    for colour in map_file.colours:
        red, green, blue = map(str, colour)
        ET.SubElement(table, "Entry", c1=red, c2=green, c3=blue, c4="255")


def _add_colours_beside(sidecar: Path, map_file: MapFile) -> None:
    """Add the colour table to what GDAL keeps beside a map."""
    root = ET.fromstring(sidecar.read_bytes())
    for band in root.iterfind("PAMRasterBand[@band='1']"):
        _add_colours(band, map_file)
    sidecar.write_bytes(ET.tostring(root, encoding="utf-8"))
