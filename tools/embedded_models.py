"""The parts of the embedded backbone: what turns images into latents, the U-Net, the schedule, the folder."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from embedded_recipe import Recipe
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STRIDE = 4  # image px per latent px
CPU = torch.device("cpu")


def to_signed(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def new_vae(recipe: Recipe) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=recipe.vae_channels,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )


class PatchSpace(nn.Module):
    """Fixed linear coordinates of 4 x 4 patches in the place of a VAE: each patch becomes a latent pixel.

    The coordinates are the first principal components of the patches, divided by a power of their spread: by
    none of it (whitening 0) the noise of diffusion is the same in every pixel, by all of it (1) in every
    component. With all 48 components nothing is lost.
    """

    def __init__(self, images: Tensor, components: int, whitening: float) -> None:
        super().__init__()
        patches = F.pixel_unshuffle(to_signed(images.cpu()), STRIDE).movedim(1, -1).flatten(0, -2)
        variance, basis = torch.linalg.eigh(torch.cov(patches.T.double()))
        variance, basis = variance.flip(0)[:components].clamp(min=1e-6), basis.flip(1)[:, :components]
        scale = variance ** (-whitening / 2)
        scale /= (variance * scale**2).mean().sqrt()
        self.register_buffer("mean", patches.mean(0))
        self.register_buffer("analysis", (basis * scale).float())
        self.register_buffer("synthesis", (basis / scale).T.float().contiguous())
        self.config = SimpleNamespace(scaling_factor=1.0)

    def encode(self, x: Tensor) -> SimpleNamespace:
        """Images (B, 3, H, W) in [-1, 1] to latents, in a form like a VAE's."""
        patches = F.pixel_unshuffle(x, STRIDE).movedim(1, -1)
        z = ((patches - self.mean) @ self.analysis).movedim(-1, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    def decode(self, z: Tensor) -> SimpleNamespace:
        patches = z.movedim(1, -1) @ self.synthesis + self.mean
        return SimpleNamespace(sample=F.pixel_shuffle(patches.movedim(-1, 1), STRIDE))


def new_unet(recipe: Recipe, device: torch.device = CPU) -> UNet2DConditionModel:
    """The U-Net at random weights.

    Attention by plain products is a third faster on CPUs than PyTorch's fused one, at these sizes.
    """
    kinds = ["CrossAttnDownBlock2D" if heads else "DownBlock2D" for heads in recipe.heads]
    unet = UNet2DConditionModel(
        sample_size=recipe.size // STRIDE,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=recipe.channels,
        down_block_types=tuple(kinds),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        layers_per_block=recipe.layers_per_block,
        cross_attention_dim=recipe.prompt_width,
        attention_head_dim=tuple(max(1, heads) for heads in recipe.heads),  # diffusers: number of heads
        norm_num_groups=16,
    )
    if device.type == "cpu":
        unet.set_attn_processor(AttnProcessor())
        return unet
    return unet.to(device, memory_format=torch.channels_last)


def new_scheduler(recipe: Recipe) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=recipe.beta_start,
        beta_end=recipe.beta_end,
        beta_schedule="scaled_linear",
        prediction_type=recipe.prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def prompt_embedding(recipe: Recipe) -> Tensor:
    """The constant condition of this label-free model: one fixed token, (1, 1, width) float32."""
    return torch.randn(1, 1, recipe.prompt_width, generator=torch.Generator().manual_seed(0))


def load_matching(model: nn.Module, file: Path) -> list[str]:
    """Load the tensors of a file whose name and shape fit; return the names that stay at random values."""
    held = {name: tensor.float() for name, tensor in load_file(file).items()}
    own = model.state_dict()
    fitting = {name: held[name] for name in own if name in held and held[name].shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    return sorted(set(own) - set(fitting))


def save_backbone(folder: Path, vae: Any, unet: UNet2DConditionModel, recipe: Recipe) -> None:
    """Write the diffusers folder, weights in float16."""
    for name, model in (("vae", vae), ("unet", unet)):
        plain = deepcopy(model).to(CPU, torch.float16, memory_format=torch.contiguous_format)
        plain.save_pretrained(folder / name)
    new_scheduler(recipe).save_pretrained(folder / "scheduler")
    save_file({"hidden_states": prompt_embedding(recipe)}, folder / "prompt_embedding.safetensors")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
