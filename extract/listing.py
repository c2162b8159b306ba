"""What `satdifuser tiles` and `satdifuser layers` print: a look before any work."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from satdifuser.errors import ImageError
from satdifuser.extract.images import raw_means, to_rgb
from satdifuser.extract.settings import (
    BackboneSettings,
    ExtractSettings,
    ImageSettings,
    SourceSettings,
)
from satdifuser.extract.sources import list_tiles, open_source
from satdifuser.extract.sources.tile import Source, Tile
from satdifuser.extract.value_range import ValueRange
from satdifuser.store.schema import LayerInfo


def describe_tiles(source: Source, images: ImageSettings) -> Iterator[dict[str, Any]]:
    """Read every tile of a source and describe it.

    After the last one, a scale that looks wrong is warned of on stderr.

    Yields:
        tile_id, path, split, splits by partition where there are several, size (H, W) px, bands, band_names,
        label as numbers, target summary, raw_means of all bands, prepared_means of red, green and blue in
        [0, 1], clipped (share of their values that lay outside), bounds, crs, date, cloud_cover (0 to 1),
        valid_share, padded; or
        an ``error`` in place of what could not be read where ``on_error`` is skip.
    """
    values = ValueRange(images)
    for record in list_tiles(source):
        place = record.georeference
        line: dict[str, Any] = {
            "tile_id": record.tile_id,
            "path": record.path,
            "split": record.split,
            "partitions": dict(record.partitions),
            "size": list(record.size),
            "bounds": list(place.bounds(*record.size)) if place else None,
            "crs": place.crs if place else None,
            "date": record.date or None,
            "cloud_cover": record.cloud_cover,
            "label": record.label,
            "padded": record.padded,
        }
        try:
            tile = source.read(record)
            prepared = to_rgb(tile, images)
        except ImageError as error:
            if images.on_error == "fail":
                raise
            yield line | {"error": str(error)}
            continue
        values.add(prepared)
        yield line | {
            "target": _target(source, tile),
            "valid_share": float(tile.valid.mean()),
            "bands": len(tile.image),
            "band_names": list(tile.band_names),
            "raw_means": raw_means(tile),
            "prepared_means": [float(mean) for mean in prepared.rgb.mean(axis=(1, 2), dtype=np.float64)],
            "clipped": prepared.clipped_share,
        }
    if warning := values.warning():
        print(warning, file=sys.stderr)


def _target(source: Source, tile: Tile) -> Any:
    """A class name, a list of them, the share of each class in a mask, or None."""
    if tile.mask is not None:
        values, counts = np.unique(tile.mask, return_counts=True)
        names = dict(enumerate(source.classes)) | {source.ignore_value: "ignored"}
        return {names[int(v)]: round(int(n) / tile.mask.size, 6) for v, n in zip(values, counts, strict=True)}
    label = tile.record.label
    if isinstance(label, tuple):
        return [name for name, present in zip(source.classes, label, strict=True) if present]
    return None if label is None else source.classes[label]


def format_counts(kinds: Counter[str], left_out: int) -> str:
    """The last line of the list: tiles by split, skipped ones, and those with too few valid pixels."""
    parts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{kinds.total()} tiles ({parts}); {left_out} left out for lack of valid pixels"


def format_tile(line: dict[str, Any]) -> str:
    """One line of the human-readable list."""
    start = f"{line['tile_id']:40} {line['split']:5} {line['size'][0]} x {line['size'][1]}"
    if "error" in line:
        return f"{start}  SKIPPED: {line['error']}"
    means = " ".join(f"{mean:.3f}" for mean in line["prepared_means"])
    target = line["target"]
    if isinstance(target, dict):
        target = ", ".join(f"{name} {share:.0%}" for name, share in target.items())
    if isinstance(target, list):
        target = ", ".join(target)
    notes = "  padded" if line["padded"] else ""
    notes += f"  clipped {line['clipped']:.2%}" if line["clipped"] else ""
    return f"{start}  rgb {means}  {target or '-'}{notes}"


def describe_layers(
    source: SourceSettings, backbone: BackboneSettings, extract: ExtractSettings, show_all: bool
) -> list[LayerInfo]:
    """The layer table for a source's tiles: what the patterns select, or all that can be tapped."""
    # diffusers takes seconds to import, and `satdifuser tiles` needs none of it
    from satdifuser.extract.backbone import find_backbone
    from satdifuser.extract.job import tile_size
    from satdifuser.extract.layers import select_layers

    info = find_backbone(backbone)
    size = tile_size(list_tiles(open_source(source)))
    table = info.layers(info.image_size(extract.image_size, size))
    return table if show_all else select_layers(table, extract.layers)
