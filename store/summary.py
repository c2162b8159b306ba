"""Describes a store to people and programs."""

from __future__ import annotations

from typing import Any

from satdifuser.store.energy import cost_text, total_cost
from satdifuser.store.reader import FeatureStore

NOT_YET = "none: shards are missing"


def describe_store(store: FeatureStore) -> dict[str, Any]:
    """Everything `satdifuser store info` tells, as plain JSON values.

    ``content_digest`` and the hash of labels are null while shards are missing.
    """
    a = store.attributes
    tiles = store.tiles
    skipped = tiles[tiles.skip_reason != ""]
    return {
        "path": str(store.path),
        "format_version": a.format_version,
        "store_id": a.store_id,
        "created": a.created,
        "software": a.software,
        "complete": not store.missing_shards(),
        "shards": a.shards,
        "missing_shards": store.missing_shards(),
        "tiles": a.tiles,
        "tile_size": list(a.tile_size),
        "left_out": a.left_out,
        "skipped": dict(zip(skipped.tile_id, skipped.skip_reason, strict=True)),
        "partition": a.partition,
        "splits": store.split_counts(),
        "partitions": {name: store.split_counts(name) for name in store.partitions()},
        "task": a.task,
        "classes": a.classes,
        "labelled": a.labelled,
        "timesteps": a.timesteps,
        "layers": [layer.model_dump() for layer in a.layers],
        "encoding": a.encoding,
        "bytes": store.size_bytes(),
        "cost": total_cost(store.commits),
        "backbone": a.backbone,
        "hashes": store.hashes().model_dump() | ({"labels": None} if store.missing_shards() else {}),
        "content_digest": store.content_digest(),
        "feature_identity": a.feature_identity,
        "settings": a.settings,
    }


def format_store(store: FeatureStore) -> str:
    """The same for reading: summary, layer table, hashes, skipped tiles."""
    facts = describe_store(store)
    lines = [repr(store), "", f"{'layer':58} channels  stride  map"]
    lines += [
        f"{layer.name:58} {layer.channels:8d}  {layer.stride:6d}  {layer.height} x {layer.width}"
        for layer in store.attributes.layers
    ]
    lines += ["", f"created    {facts['created']} by satdifuser {facts['software'].get('satdifuser')}"]
    lines += [f"{name:10} {value or NOT_YET}" for name, value in facts["hashes"].items()]
    if len(store.partitions()) > 1:
        lines += [
            f"partition  {name}{' (in use)' * (name == facts['partition'])}: {store.splits_text(name)}"
            for name in store.partitions()
        ]
    lines += [f"cost       {cost_text(facts['cost'])}"]
    lines += [f"digest     {facts['content_digest'] or NOT_YET}"]
    lines += [
        f"metadata   {count} tiles without {name}"
        for name, count in store.attributes.backbone.get("metadata_missing", {}).items()
    ]
    lines += [f"left out   {facts['left_out']} tiles with too little valid data"] * bool(facts["left_out"])
    lines += [f"skipped    {name}: {reason}" for name, reason in facts["skipped"].items()]
    return "\n".join(lines)
