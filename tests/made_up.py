"""What several test files make up: the attributes of a store, the record of a run, a tiny U-Net."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel

from satdifuser.store.schema import Attributes, Hashes


def store_attributes(**fields: Any) -> Attributes:
    """Attributes of a store; what its shape depends on (tiles, layers, timesteps, …) is for the caller."""
    common = {
        "store_id": "x",
        "created": "now",
        "software": {"satdifuser": "0"},
        "ignore_value": 255,
        "left_out": 0,
        "backbone": {"model": "a"},
        "feature_identity": {},
        "planned": Hashes(feature="f", contents="c", labels="l"),
    }
    return Attributes.model_validate(common | fields)


def run_record(**fields: Any) -> dict[str, Any]:
    """The run.json of a global fusion; name, classes, layers, timesteps and history are for the caller."""
    common = {
        "kind": "fusion",
        "task": "classification",
        "fusion": "global",
        "head": "linear",
        "seed": 0,
        "ignore_value": 255,
        "timesteps": [21, 61],
        "store": {"path": "features.zarr", "hashes": {"feature": "f1", "contents": "c1", "labels": "l1"}},
        "history": [],
        "parameters": 123456,
        "seconds": 12.34,
        "weights": None,
    }
    return common | fields


def tiny_unet() -> UNet2DConditionModel:
    """Two levels of 8 and 16 channels, attention at the finer one; weights from torch's seed."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
