"""STAC Items (https://stacspec.org): a store among other data of its place and time.

Beside the core, fields of the extensions projection and mlm (machine learning models), and of the proposed
embeddings extension; that one is not declared, since its schema is of STAC 1.0 and not published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.crs import CRS

from satdifuser.store.encoding import FORMS
from satdifuser.store.georeference import Georeference
from satdifuser.store.place import to_degrees
from satdifuser.store.reader import FeatureStore

STAC_VERSION = "1.1.0"
PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"
MLM = "https://stac-extensions.github.io/mlm/v1.6.0/schema.json"
LONG_AGO = "1900-01-01T00:00:00Z"  # where no date is known
MOST_POINTS = 2000  # of a footprint; a larger one becomes its hull
DIGITS = 7  # of degrees: a centimetre


def store_item(store: FeatureStore) -> dict[str, Any]:
    """The Item of a store."""
    a = store.attributes
    ground = footprint(store)
    extensions = [MLM]
    properties = times(_dates(store), a.created) | {
        "title": f"Diffusion features of {a.tiles} satellite image tiles",
        "created": zulu(a.created),
        **_model(store),
        **_embeddings(store),
    }
    codes = set(store.table("tiles/crs").tolist()) - {""}
    if len(codes) == 1:
        properties |= crs_fields(codes.pop())
        extensions.append(PROJECTION)
    digest = store.content_digest()
    assets = {
        "embeddings": {
            "href": str(store.path),
            "type": "application/vnd.zarr; version=3",
            "title": "The feature store",
            "roles": ["data"],
            **({"satdifuser:content_digest": digest} if digest else {}),
        },
        "model": {
            "href": model_address(str(a.backbone.get("model"))),
            "title": "The diffusion model",
            "roles": ["mlm:model"],
            "mlm:artifact_type": "safetensors.torch.save_file",
            "satdifuser:weights_sha256": a.backbone.get("weights_sha256"),
        },
    }
    return item(a.store_id, ground, properties, assets, extensions)


def item(
    name: str,
    ground: shapely.Geometry | None,
    properties: Mapping[str, Any],
    assets: Mapping[str, Any],
    extensions: Sequence[str],
) -> dict[str, Any]:
    """An Item of its parts; `ground` is in longitude and latitude, or None where no place is known."""
    place: dict[str, Any] = {"geometry": None}
    if ground is not None:
        rounded = shapely.set_precision(ground, 10**-DIGITS)
        bounds = [round(value, DIGITS) for value in shapely.bounds(rounded).tolist()]
        place = {"geometry": shapely.geometry.mapping(rounded), "bbox": bounds}
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": list(extensions),
        "id": name,
        **place,
        "properties": dict(properties),
        "links": [],
        "assets": dict(assets),
    }


# --- place and time


def footprint(store: FeatureStore) -> shapely.Geometry | None:
    """The ground of all tiles in longitude and latitude; None where none has a place."""
    names, transforms = store.table("tiles/crs"), store.table("tiles/transform")
    height, width = store.attributes.tile_size
    parts = []
    for name in sorted(set(names.tolist()) - {""}):
        places = [Georeference(name, tuple(row.tolist())) for row in transforms[names == name]]
        whole = shapely.union_all([shapely.Polygon(place.corners(height, width)) for place in places])
        parts.append(shapely.transform(whole, partial(_in_degrees, name)))
    if not parts:
        return None
    ground = shapely.union_all(parts)
    return ground if shapely.get_num_coordinates(ground) <= MOST_POINTS else shapely.convex_hull(ground)


def _in_degrees(crs: str, points: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array(to_degrees(crs, points.tolist()))


def crs_fields(crs: str) -> dict[str, Any]:
    """A CRS as the projection extension has it: its code, or else its WKT."""
    found = CRS.from_user_input(crs)
    authority = found.to_authority()
    if authority:
        return {"proj:code": ":".join(authority)}
    return {"proj:code": None, "proj:wkt2": found.to_wkt(version="WKT2_2019")}


def times(dates: Sequence[str], created: str) -> dict[str, Any]:
    """The datetime of images, or when the first and the last were taken; STAC asks for one of them."""
    known = sorted(zulu(date) for date in set(dates) if date)
    if len(known) == 1:
        return {"datetime": known[0]}
    first, last = (known[0], known[-1]) if known else (LONG_AGO, zulu(created))
    return {"datetime": None, "start_datetime": first, "end_datetime": last}


def zulu(date: str) -> str:
    """An ISO 8601 date as RFC 3339 asks for it; without a zone it counts as UTC."""
    day, _, time = date.partition("T")
    time = time or "00:00:00"
    return f"{day}T{time}" if re.search(r"(Z|[+-]\d\d:\d\d)$", time) else f"{day}T{time}Z"


def _dates(store: FeatureStore) -> list[str]:
    return [str(date) for date in set(store.table("tiles/date").tolist())]


# --- model and embeddings


def _model(store: FeatureStore) -> dict[str, Any]:
    """The backbone as the mlm extension describes models."""
    a = store.attributes
    images = a.feature_identity.get("images", {})
    height, width = images.get("image_size", a.tile_size)
    outputs = []
    for name, held in store.groups.items():
        first = a.layers[held[0]]
        shape = [-1, len(a.timesteps), len(held), first.channels, first.height, first.width]
        dimensions = ["batch", "timestep", "layer", "channel", "height", "width"]
        result = {"shape": shape, "dim_order": dimensions, "data_type": "float32"}
        outputs.append({"name": name, "tasks": ["generative"], "result": result})
    return {
        "mlm:name": model_name(str(a.backbone.get("model"))),
        "mlm:architecture": "latent diffusion model (U-Net)",
        "mlm:tasks": ["generative"],
        "mlm:framework": "PyTorch",
        "mlm:framework_version": a.software.get("torch", "0.0.0"),
        "mlm:input": [image_input((height, width), images)],
        "mlm:output": outputs,
    }


def image_input(size: Sequence[int], images: Mapping[str, Any]) -> dict[str, Any]:
    """Images of (H, W) px as the mlm extension describes inputs.

    Args:
        size: (H, W) px.
        images: Their scale and offset, from a feature's identity.
    """
    scale, offset = images.get("scale") or 1 / 255, images.get("offset") or 0.0
    return {
        "name": "red, green and blue",
        "bands": [],
        "input": {
            "shape": [-1, 3, *size],
            "dim_order": ["batch", "channel", "height", "width"],
            "data_type": "float32",
        },
        # one object for all bands, which brings values to 0 to 1
        "value_scaling": [{"type": "min-max", "minimum": -offset / scale, "maximum": (1 - offset) / scale}],
    }


def model_name(text: str) -> str:
    """A text in the letters that names of models may have."""
    name = re.sub(r"[^a-zA-Z0-9_.\-\s]+", "-", text).strip("-_. ")
    return name if re.match("[a-zA-Z]..", name) else f"model-{name or 'x'}"


def model_address(model: str) -> str:
    """Where a backbone is: on the hub, or its folder."""
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists()
    return f"https://huggingface.co/{model}" if hub else model


def _embeddings(store: FeatureStore) -> dict[str, Any]:
    """What the proposed embeddings extension (0.0.1) tells of a run of a model."""
    a = store.attributes
    settings = a.settings.get("extract", {})
    names = ("noising", "steps", "draws", "latent", "guidance", "prediction", "image_size", "seed")
    parameters = {name: settings[name] for name in names if name in settings}
    layers = [layer.name for layer in a.layers]
    quantization = {
        "method": a.decode,
        "original_dtype": "float32",
        "quantized_dtype": FORMS[a.encoding].dtype,
    }
    return {
        "emb:runtime_parameters": parameters | {"timesteps": a.timesteps, "layers": layers},
        "emb:quantization": quantization,
        "processing:datetime": zulu(a.created),
    }
