"""The STAC Item of a map, written beside it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import shapely

from satdifuser.evaluate.maps.map_file import NODATA, STEPS, MapFile
from satdifuser.evaluate.maps.origin import Origin
from satdifuser.evaluate.maps.strip_file import cannot_write
from satdifuser.fuse.run_folder import MODEL_FILE, Run
from satdifuser.store.files import write_durably
from satdifuser.store.georeference import Georeference
from satdifuser.store.place import outline
from satdifuser.store.stac import MLM, PROJECTION, crs_fields, image_input, item, model_name, times

CLASSIFICATION = "https://stac-extensions.github.io/classification/v2.0.0/schema.json"
RASTER = "https://stac-extensions.github.io/raster/v2.0.0/schema.json"
TASKS = {"segmentation": "semantic-segmentation", "classification": "scene-classification"}


def write_item(out: Path, map_file: MapFile, origin: Origin) -> Path:
    """Write the Item of a map as ``NAME.stac.json`` beside it.

    Args:
        out: The map.
        map_file: What it says of itself.
        origin: What it was made with.

    Raises:
        MapError: it cannot be written.
    """
    path = out.with_name(f"{out.stem}.stac.json")
    try:
        write_durably(path, (json.dumps(map_item(out, map_file, origin), indent=1) + "\n").encode())
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def map_item(out: Path, map_file: MapFile, origin: Origin) -> dict[str, Any]:
    """The Item of a map."""
    run = origin.run
    a, b, c, d, e, f = map_file.transform
    place = Georeference(map_file.crs_wkt, (a, b, c, d, e, f))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    properties = times([origin.date], created) | {
        "title": f"{out.stem}: classes by {run.info['name']}",
        "created": created,
        **crs_fields(map_file.crs_wkt),
        "proj:shape": list(map_file.size),
        "proj:transform": [a, b, c, d, e, f],
        "proj:bbox": list(place.bounds(*map_file.size)),
        **_model(run, map_file.colours),
    }
    assets = {
        "map": {
            "href": f"./{out.name}",
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "title": "Classes of pixels" if run.info["task"] == "segmentation" else "Classes of tiles",
            "roles": ["data"],
            "bands": [_band(name) for name in map_file.bands],
            "classification:classes": [
                {"value": value, "name": _word(name, value), "title": name, "color_hint": _hint(colour)}
                for value, (name, colour) in enumerate(zip(map_file.classes, map_file.colours, strict=True))
            ],
        },
        "model": {
            "href": os.path.relpath(run.path / MODEL_FILE, out.parent),
            "title": "Weights of the fitted network",
            "roles": ["mlm:model"],
            "mlm:artifact_type": "safetensors.torch.save_file",
            "satdifuser:sha256": run.info["model_sha256"],
        },
    }
    ground = shapely.Polygon(outline(place, map_file.size))
    return item(out.stem, ground, properties, assets, [PROJECTION, MLM, CLASSIFICATION, RASTER])


def _band(name: str) -> dict[str, Any]:
    scale = {} if name == "class" else {"raster:scale": 1 / STEPS}
    return {"name": name, "data_type": "uint8", "nodata": NODATA, **scale}


def _model(run: Run, colours: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """The run as the mlm extension describes models: from an image to classes."""
    info, task = run.info, TASKS[run.info["task"]]
    images = info["feature_identity"]["images"]
    height, width = images["tile_size"]
    dimensions = ["batch", "class", "height", "width"]
    shape = [-1, len(info["classes"]), height, width]
    pixels = info["task"] == "segmentation"
    classes = [
        {"value": value, "name": _word(name, value), "description": name, "color_hint": _hint(colour)}
        for value, (name, colour) in enumerate(zip(info["classes"], colours, strict=True))
    ]
    return {
        "mlm:name": model_name(info["name"]),
        "mlm:architecture": f"diffusion features, {info['fusion']} fusion, {info['head']} head",
        "mlm:tasks": [task],
        "mlm:framework": "PyTorch",
        "mlm:framework_version": version("torch"),
        "mlm:total_parameters": info["parameters"],
        "mlm:input": [image_input((height, width), images)],
        "mlm:output": [
            {
                "name": "probabilities of the classes",
                "tasks": [task],
                "result": {
                    "shape": shape if pixels else shape[:2],
                    "dim_order": dimensions if pixels else dimensions[:2],
                    "data_type": "float32",
                },
                "classification:classes": classes,
            }
        ],
    }


def _word(name: str, value: int) -> str:
    """A class name in the letters that STAC allows for it."""
    return re.sub("[^0-9A-Za-z_-]+", "-", name).strip("-") or f"class-{value}"


def _hint(colour: tuple[int, int, int]) -> str:
    return "{:02X}{:02X}{:02X}".format(*colour)
