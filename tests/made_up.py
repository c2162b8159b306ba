"""What several test files make up: the attributes of a store, the record of a run, tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from satdifuser.extract.unet import SatUNet
from satdifuser.store.digest import CURRENT
from satdifuser.store.encoding import decode_formula, encode
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import Attributes, Hashes, LayerInfo, canonical_hash, contents_hash, group_layers
from satdifuser.store.settings import Encoding
from satdifuser.store.writer import Encoded, TileRow


def store_attributes(**fields: Any) -> Attributes:
    """Attributes of a store; what its shape depends on (tiles, layers, timesteps, …) is for the caller."""
    common = {
        "store_id": "x",
        "decode": decode_formula(fields["encoding"]),
        "digest_algorithm": CURRENT,
        "created": "now",
        "software": {"satdifuser": "0"},
        "ignore_value": 255,
        "left_out": 0,
        "backbone": {"model": "a"},
        "feature_identity": {},
        "planned": Hashes(feature="f", contents="c", labels="l"),
    }
    return Attributes.model_validate(common | fields)


RANDOM_STEPS = [1, 21, 101]


def random_store(
    path: Path,
    layers: list[LayerInfo],
    tiles: int,
    encoding: Encoding = "float32",
    first: int = 0,
    row_of: Callable[[int], TileRow] | None = None,
    **fields: Any,
) -> FeatureStore:
    """A store of tiles ``t0`` … whose features depend on their number alone; the second was skipped."""
    a = store_attributes(
        **{
            "task": "classification",
            "classes": ["sea", "land"],
            "tiles": tiles,
            "tile_size": (16, 16),
            "tiles_per_shard": 3,
            "timesteps": RANDOM_STEPS,
            "layers": layers,
            "encoding": encoding,
            "previews": True,
            "colour_statistics": ["mean"],
            "settings": {},
            "planned": Hashes(
                feature=canonical_hash({}),
                contents=contents_hash([f"t{first + i}" for i in range(tiles)], RANDOM_STEPS, layers),
                labels="",
            ),
        }
        | fields
    )
    with open_or_create(path, a, overwrite=False) as writer:
        for shard in range(a.shards):
            numbers = [first + tile for tile in range(*a.shard_range(shard))]
            rows = [(row_of or random_row)(number) for number in numbers]
            kept = [number for number in numbers if number != SKIPPED]
            batches = [random_features(number, layers, encoding) for number in kept]
            writer.write_shard(shard, rows, batches, {})
    return FeatureStore(path)


SKIPPED = 1


def random_row(number: int) -> TileRow:
    """What a random store keeps of a tile beside its features."""
    if number == SKIPPED:
        return TileRow(f"t{number}", "train", skip_reason="all nan")
    return TileRow(
        f"t{number}",
        ("train", "train", "val", "test")[number % 4],
        crs="EPSG:32632",
        bounds=(number, 0, number + 1, 1),
        transform=(1, 0, number, 0, -1, 1),
        valid_share=1 / (1 + number),
        padded=number % 3 == 0,
        colour=np.array([number], np.float32),
        target=None if number == 0 else np.array(number % 2, np.int32),
        preview=np.full((16, 16, 3), number % 256, np.uint8),
    )


def random_mask_row(number: int) -> TileRow:
    """The same with a mask of two classes."""
    row = random_row(number)
    mask = np.random.default_rng(number).integers(0, 2, (16, 16)).astype(np.uint8)
    return row if row.skip_reason else replace(row, target=mask)


def random_features(number: int, layers: list[LayerInfo], encoding: Encoding) -> Encoded:
    """Encoded features of one tile of a random store."""
    random, encoded = np.random.default_rng(number), {}
    for group, held in group_layers(layers).items():
        layer = layers[held[0]]
        shape = (1, len(RANDOM_STEPS), len(held), layer.channels, layer.height, layer.width)
        encoded[group] = encode(random.standard_normal(shape, dtype=np.float32), encoding)
    return encoded


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


def image_folder(root: Path, classes: Mapping[str, int], seed: int = 0) -> None:
    """Write so many images of 16 x 16 px for each class; those that are there come out the same."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng([seed, i, *name.encode()]).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")


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


def text_encoder(folder: Path, width: int = 8) -> None:
    """Write a tiny CLIP text encoder and a tokenizer that knows single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(
        str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt"), model_max_length=12
    ).save_pretrained(tokenizer)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    CLIPTextModel(config).eval().save_pretrained(folder / "text_encoder")


def tiny_vae() -> AutoencoderKL:
    """Two levels, 4 latent channels; weights from torch's seed."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def diffusionsat(folder: Path) -> Path:
    """Write a tiny checkpoint in the layout of DiffusionSat's folders; weights from torch's seed."""
    unet = SatUNet(**{k: v for k, v in tiny_unet().config.items() if not k.startswith("_")})
    unet.save_pretrained(folder / "checkpoint-150000/unet")
    config = folder / "checkpoint-150000/unet/config.json"
    content = json.loads(config.read_text()) | {"use_metadata": True, "num_metadata": 7}
    config.write_text(json.dumps(content))
    tiny_vae().save_pretrained(folder / "vae")
    DDIMScheduler(steps_offset=1, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    text_encoder(folder)
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusionsat.sat_unet", "SatUNet"]}))
    return folder
