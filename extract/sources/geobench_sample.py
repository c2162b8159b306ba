"""One GEO-Bench sample: an HDF5 file with a dataset per band, and a pickle that describes them.

Bands that are smaller than the largest ones, or have more than two dimensions (m-NeonTree's canopy height and
hyperspectral cube), are left aside: the bands of a tile share one grid.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import CRSError

from satdifuser.errors import ImageError, SourceError
from satdifuser.extract.sources.closed_pickle import StandIn, load_closed, to_array
from satdifuser.extract.sources.tile import Label, Task
from satdifuser.store.georeference import Georeference

LABEL = "label"  # how the name of a band begins that holds the mask
DAMAGE = (
    *(OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, SyntaxError, MemoryError),
    CRSError,
)  # what HDF5, and a description of another form than expected, may raise
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # the transform of an image that lies nowhere


@dataclass(frozen=True)
class SampleHeader:
    """What a sample says of itself."""

    size: tuple[int, int]  # (H, W) px
    bands: tuple[str, ...]  # datasets of that size, in the sample's order
    names: tuple[str, ...]  # what these bands are called
    aliases: Mapping[str, int]  # their other names, in lower case
    mask: str  # dataset that holds the mask, "" for none
    label: Any  # as the pickle has it, None where there is none
    georeference: Georeference | None
    date: str  # ISO 8601, "" where unknown


@contextmanager
def open_sample(path: Path) -> Iterator[h5py.File]:
    """Open a sample; whatever is wrong with it becomes an error that names it.

    Raises:
        ImageError: the file is missing, truncated, or not a sample.
        SourceError: its pickle asks for a name outside the closed list.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except SourceError:
        raise
    except DAMAGE as error:
        raise ImageError(
            f"{path}: cannot be read as a GEO-Bench sample ({error}); "
            "replace or remove it, or leave such tiles out with source.on_error: skip"
        ) from error


def read_header(file: h5py.File, path: Path) -> SampleHeader:
    """Read what an open sample says of itself, without a pixel.

    Args:
        file: The sample.
        path: Where it lies, for the message of a refusal.
    """
    content = load_closed(ast.literal_eval(file.attrs["pickle"]), path)
    keys = content.get("bands_order") or list(file)
    shapes = {key: open_band(file, key).shape for key in keys}
    flat = [shape for key, shape in shapes.items() if len(shape) == 2 and not key.startswith(LABEL)]
    if not flat:
        raise ValueError("it holds no band of two dimensions")
    size = max(flat, key=math.prod)
    bands = [key for key in keys if shapes[key] == size and not key.startswith(LABEL)]
    notes = [content[key] for key in bands]
    names, aliases = name_bands(bands, [note["band_info"].state for note in notes])
    places = (georeference_of(note.get("transform"), note.get("crs")) for note in notes)
    dates = (note["date"].isoformat() for note in notes if isinstance(note.get("date"), date))
    return SampleHeader(
        size=size,
        bands=tuple(bands),
        names=names,
        aliases=aliases,
        mask=next((key for key in keys if key.startswith(LABEL)), ""),
        label=content.get("label"),
        georeference=next((place for place in places if place), None),
        date=next(dates, ""),
    )


def name_bands(
    keys: Sequence[str], infos: Sequence[Mapping[str, Any]]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the bands' names without dates, and their other names by position.

    A sample with several dates holds bands of one name: there the datasets' full names stand, and no others.
    """
    names = tuple(info["name"] for info in infos)
    if len(set(names)) < len(names):
        return tuple(keys), {}
    known = [(info["name"], *(info.get("alt_names") or ())) for info in infos]
    return names, {alias.lower(): position for position, aliases in enumerate(known) for alias in aliases}


def open_band(file: h5py.File, key: str) -> h5py.Dataset:
    """Return a band whose pixels lie in this very file; HDF5 can point to any other.

    Raises:
        ValueError: there is no such band, or it is not an array of numbers in this file.
    """
    inside = "/" not in key and isinstance(file.get(key, getlink=True), h5py.HardLink)
    band: Any = file[key] if inside else None
    held = isinstance(band, h5py.Dataset) and not band.external and not band.is_virtual
    if not held or band.dtype.kind not in "biuf":
        raise ValueError(f"band {key!r} is missing, or not an array of numbers in this file")
    return band


def read_pixels(file: h5py.File, bands: Sequence[str]) -> NDArray[np.generic]:
    """Read bands of one size: (B, H, W), as stored."""
    return np.stack([open_band(file, key)[()] for key in bands])


def georeference_of(transform: Any, crs: Any) -> Georeference | None:
    """Return where a band lies by its transform and CRS (text or stand-in), or None where it lies nowhere."""
    text = crs.state if isinstance(crs, StandIn) else crs
    if not isinstance(transform, StandIn) or not isinstance(text, str):
        return None
    a, b, c, d, e, f = transform.args[:6] or (transform.state[name] for name in "abcdef")
    numbers = (float(a), float(b), float(c), float(d), float(e), float(f))
    name, is_geographic = parse_crs(text)
    off_globe = is_geographic and (abs(numbers[2]) > 360 or abs(numbers[5]) > 90)  # as in m-forestnet
    return None if numbers == IDENTITY or off_globe else Georeference(name, numbers)


@lru_cache  # the samples of a data set share a few
def parse_crs(text: str) -> tuple[str, bool]:
    """Return a CRS in its short form, ``EPSG:32632``, where it has one, and whether it counts in degrees."""
    crs = CRS.from_user_input(text)
    return str(crs.to_string()), bool(crs.is_geographic)


def parse_label(header: SampleHeader, task: Task | None, classes: int, path: Path) -> Label:
    """Return a sample's class, or 0 or 1 for each class; None where a mask takes its place.

    Raises:
        ImageError: there is no label, or it is not of the task's form.
    """
    remedy = "get the file anew, or leave such tiles out with source.on_error: skip"
    if not header.mask if task == "segmentation" else header.label is None:
        expected = "a band named label" if task == "segmentation" else "one in its pickle"
        raise ImageError(f"{path}: has no label, expected {expected}; {remedy}")
    if task == "segmentation":
        return None
    try:
        numbers = to_array(header.label)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ImageError(f"{path}: label cannot be read ({error}); {remedy}") from error
    if task == "classification" and numbers.size == 1 and numbers.item() in range(classes):
        return int(numbers.item())
    if task == "multilabel" and numbers.shape == (classes,) and np.isin(numbers, (0, 1)).all():
        return tuple(map(int, numbers.tolist()))
    expected = f"0 to {classes - 1}" if task == "classification" else f"{classes} numbers that are 0 or 1"
    raise ImageError(f"{path}: label is {numbers.tolist()!r:.80}, expected {expected}; {remedy}")
