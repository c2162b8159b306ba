"""Reads GEO-Bench's pickles without running anything that they name.

A pickle names functions and classes for its reader to import and call. Here each name is looked up in
`ADMITTED`, and nothing else is imported or called. Behind nearly all of them is a `StandIn`, which keeps what
it is given and does nothing with it; the rest are plain values of Python itself. Arrays are built from their
kept parts by `to_array`, because numpy's own unpickling trusts the sizes and flags that a file declares.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satdifuser.errors import SourceError

PACKAGES = ("geobench", "geobench.io", "ccb.io")  # the benchmark's package, and what it was called before
CLASSES = {
    "dataset": (
        *("BandInfo", "SpectralBand", "Sentinel1", "Sentinel2", "Landsat8", "ElevationBand", "Mask"),
        *("CloudProbability", "MultiBand", "HyperSpectralBands", "SegmentationClasses", "Stats"),
    ),
    "label": (
        *("Classification", "MultiLabelClassification", "SemanticSegmentation"),
        *("Regression", "Detection", "PointAnnotation"),
    ),
    "task": (
        *("TaskSpecifications", "Loss", "Accuracy", "MultilabelAccuracy", "AccuracyTop30"),
        *("CrossEntropy", "SegmentationAccuracy"),
    ),
}
NUMPY = {
    "numpy": ("ndarray", "dtype"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
}
PLACES = {"affine": ("Affine",), "rasterio.crs": ("CRS",)}


class StandIn:
    """What a file says of an object: the arguments it was made with, and the state it was given."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> StandIn:  # a pickle may make objects without calling __init__
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


def stand_ins(names: Mapping[str, tuple[str, ...]]) -> dict[tuple[str, str], type]:
    """Make a class of stand-ins for each (module, name); its name tells what it stands for."""
    return {(module, name): type(name, (StandIn,), {}) for module in names for name in names[module]}


ADMITTED: dict[tuple[str, str], type] = {
    **{("datetime", kind.__name__): kind for kind in (date, datetime, timedelta, timezone)},
    ("collections", "OrderedDict"): dict,
    **stand_ins(NUMPY),
    **stand_ins(PLACES),
    **stand_ins({f"{package}.{module}": CLASSES[module] for package in PACKAGES for module in CLASSES}),
}


class ClosedUnpickler(pickle.Unpickler):
    """An unpickler that knows the names in `ADMITTED` and no others."""

    def __init__(self, raw: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(raw))
        self.path = path

    def find_class(self, module: str, name: str) -> type:
        """Look up one name that the file asks for."""
        if (module, name) not in ADMITTED:
            raise SourceError(
                f"{self.path}: refused, its pickle asks for {module}.{name}, which no GEO-Bench file needs; "
                "nothing of it was run; get the file anew from its publisher"
            )
        return ADMITTED[module, name]


def load_closed(raw: bytes, path: Path) -> Any:
    """Read a pickle.

    Args:
        raw: The pickle.
        path: The file it lies in, for the message.

    Returns:
        Plain Python values and stand-ins.

    Raises:
        SourceError: it asks for a name outside the closed list.
        ValueError: it is damaged.
    """
    try:
        return ClosedUnpickler(raw, path).load()
    except SourceError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"its pickle is damaged: {error}") from error


def to_array(value: Any) -> NDArray[np.generic]:
    """Turn a number, a list of numbers, or the stand-in of a numpy scalar or array into an array.

    Raises:
        ValueError: it is none of these.
    """
    if not isinstance(value, StandIn):
        items = value if isinstance(value, list) else []
        return np.asarray([to_array(item) if isinstance(item, StandIn) else item for item in items] or value)
    order: Any = "C"
    match type(value).__name__:
        case "scalar":
            (dtype, raw), shape = value.args, ()
        case "_reconstruct":
            _, shape, dtype, fortran, raw = value.state
            order = "F" if fortran else "C"
        case "_frombuffer":
            raw, dtype, shape, order = value.args
        case name:
            raise ValueError(f"{name} is not a number or an array")
    return np.frombuffer(raw, to_dtype(dtype)).reshape(shape, order=order)


def to_dtype(value: StandIn) -> np.dtype[Any]:
    """Return the numeric dtype that a stand-in of numpy.dtype describes."""
    kind, byte_order = value.args[0], value.state[1]
    if not re.fullmatch(r"[biuf][1248]", kind) or byte_order not in ("<", ">", "|"):
        raise ValueError(f"array of dtype {byte_order}{kind}, expected numbers")
    dtype: np.dtype[Any] = np.dtype(byte_order + kind)
    return dtype
