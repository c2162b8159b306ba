"""Backbones of random weights in several sizes, and images to send through them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file


@dataclass(frozen=True)
class Size:
    """Shapes of a backbone."""

    channels: tuple[int, ...]
    heads: int | tuple[int, ...]  # channels of an attention head, as diffusers names it
    text: tuple[int, int]  # tokens, width
    vae: tuple[int, ...]


SIZES = {
    "tiny": Size((32, 64, 64, 64), 8, (77, 64), (8, 8, 8, 8)),  # to try this script
    "small": Size((64, 128, 256, 256), 8, (77, 64), (16, 16, 32, 32)),
    "sd21": Size((320, 640, 1280, 1280), (5, 10, 20, 20), (77, 1024), (128, 256, 512, 512)),
}


def make_backbone(folder: Path, size: Size) -> None:
    """Write a backbone of random weights."""
    torch.manual_seed(0)
    tokens, width = size.text
    unet = UNet2DConditionModel(
        block_out_channels=size.channels,
        attention_head_dim=size.heads,
        cross_attention_dim=width,
        use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    vae = AutoencoderKL(
        block_out_channels=size.vae,
        layers_per_block=2 if size.vae[0] > 100 else 1,
        norm_num_groups=min(32, size.vae[0]),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(steps_offset=1).save_pretrained(folder / "scheduler")
    save_file({"hidden_states": torch.randn(1, tokens, width)}, folder / "prompt_embedding.safetensors")


def make_images(folder: Path, count: int, pixels: int) -> None:
    """Write PNG files of smooth noise, half of them of one class."""
    random = np.random.default_rng(0)
    for i in range(count):
        place = folder / ("land", "sea")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (pixels // 8, pixels // 8, 3), np.uint8)
        Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC).save(place / f"{i}.png")
