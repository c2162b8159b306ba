"""What `satdifuser plan` and `satdifuser layers` print."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from satdifuser.extract.job import tile_size
from satdifuser.extract.plan import ENCODINGS, Plan, format_bytes
from satdifuser.extract.trial import Trial
from satdifuser.store.schema import LayerInfo


def describe_plan(plan: Plan, trial: Trial | None) -> dict[str, Any]:
    """Everything `satdifuser plan` tells, as plain JSON values: sizes in bytes, times in seconds.

    ``shards`` are null where no store will be gone on with, ``trial`` is where there was none.
    """
    tiles, left, begun = len(plan.records), len(plan.left), plan.begun
    features = {name: _sizes(plan.feature_bytes(name), tiles) for name in ENCODINGS}
    return {
        "out": str(plan.out),
        "tiles": tiles,
        "left_out": plan.source.left_out,
        "tiles_to_do": left,
        "shards": begun and begun.attributes.shards,
        "shards_to_do": begun and len(begun.missing_shards()),
        "other_store": plan.other,
        "tile_size": list(tile_size(plan.records)),
        "image_size": list(plan.image_size),
        "layers": [layer.model_dump() for layer in plan.kept],
        "timesteps": plan.timesteps,
        "noising": plan.job.settings.noising,
        "unet_passes": {"per_tile": plan.passes_per_tile, "to_do": left * plan.passes_per_tile},
        "encoding": plan.job.store.encoding,
        "features": features,
        "previews": _sizes(plan.preview_bytes, tiles),
        "latents": _sizes(plan.latent_bytes, tiles),
        "tables": _sizes(plan.table_bytes, tiles),
        "to_write": plan.total_bytes(plan.job.store.encoding, left),
        "needed": plan.needed_bytes,
        "free": plan.free_bytes,
        "fits": plan.fits,
        "trial": trial and _describe_trial(trial, left),
    }


def _sizes(per_tile: int, tiles: int) -> dict[str, int]:
    return {"per_tile": per_tile, "total": per_tile * tiles}


def _describe_trial(trial: Trial, left: int) -> dict[str, float]:
    return {
        "tiles": trial.tiles,
        "seconds": round(trial.seconds, 3),
        "tiles_per_second": round(trial.tiles_per_second, 3),
        "eta_seconds": round(trial.seconds_for(left), 1),
    }


def format_plan(plan: Plan, trial: Trial | None) -> str:
    """The same for reading."""
    blocks = (_tiles(plan), format_layers(plan.kept), _passes(plan), _sizes_table(plan), _end(plan, trial))
    return "\n\n".join("\n".join(lines) for lines in blocks)


def format_layers(table: Sequence[LayerInfo]) -> Iterator[str]:
    """The layer table, line by line."""
    width = max(len(layer.name) for layer in table)
    yield f"{'layer':{width}}  channels  stride  height x width"
    for layer in table:
        yield f"{layer.name:{width}}  {layer.channels:8d}  {layer.stride:6d}  {layer.height} x {layer.width}"


def _tiles(plan: Plan) -> Iterator[str]:
    size, seen = (f"{height} x {width} px" for height, width in (tile_size(plan.records), plan.image_size))
    yield f"tiles       {len(plan.records)} of {size}, {plan.source.left_out} left out; seen at {seen}"
    if plan.begun:
        missing, shards = len(plan.begun.missing_shards()), plan.begun.attributes.shards
        state = f"begun: {missing} of {shards} shards are missing ({len(plan.left)} tiles)"
        yield f"store       {plan.out} is {state if missing else 'complete'}"
    elif plan.other:
        yield f"store       {plan.out} was made with other settings: extract will refuse to go on with it"


def _passes(plan: Plan) -> Iterator[str]:
    settings, each = plan.job.settings, plan.passes_per_tile
    how = f"{len(plan.timesteps)} timesteps" + (f" x {settings.draws} draws" if settings.draws > 1 else "")
    if settings.noising == "inversion":
        how = f"every step up to timestep {plan.timesteps[-1]}"
        how += "" if settings.guidance is False else ", all but the last one twice for guidance"
    yield f"timesteps   {', '.join(map(str, plan.timesteps))}; {settings.noising} noising"
    yield f"passes      {each} through the U-Net a tile ({how}), {each * len(plan.left)} in all"


def _sizes_table(plan: Plan) -> Iterator[str]:
    rows = {name: plan.feature_bytes(name) for name in ENCODINGS}
    sizes = {f"features, {name}": size for name, size in rows.items()}
    sizes |= {"previews": plan.preview_bytes, "latents": plan.latent_bytes, "tables": plan.table_bytes}
    width = max(map(len, sizes))
    yield f"{'':{width}}       a tile   {len(plan.records)} tiles"
    for name, size in sizes.items():
        chosen = "  chosen" if name == f"features, {plan.job.store.encoding}" else ""
        yield f"{name:{width}}  {format_bytes(size):>11}  {format_bytes(size * len(plan.records)):>9}{chosen}"
    yield "as written; `rounded` is compressed and ends below that"


def _end(plan: Plan, trial: Trial | None) -> Iterator[str]:
    if not plan.left:
        yield f"to do       nothing: {plan.out} is complete"
        return
    size = format_bytes(plan.total_bytes(plan.job.store.encoding, len(plan.left)))
    verdict = "fits" if plan.fits else f"DOES NOT FIT: needs {format_bytes(plan.needed_bytes)} with a margin"
    yield f"to write    {size} to {plan.out}; {format_bytes(plan.free_bytes)} free: {verdict}"
    if trial:
        device, threads = plan.job.backbone_settings.device, plan.job.settings.threads
        took = f"{trial.tiles} tiles in {trial.seconds:.1f} s on {device}, {threads} threads"
        expected = timedelta(seconds=math.ceil(trial.seconds_for(len(plan.left))))
        yield f"time        {expected} at {trial.tiles_per_second:.3g} tiles/s ({took})"
