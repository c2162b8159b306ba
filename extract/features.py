"""From images to the feature maps of all layers and timesteps, by one of two noisings.

Legend: B tiles, T timesteps, C channels, h and w latent pixels, H and W feature pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from satdifuser.extract.backbone import Backbone
from satdifuser.extract.layers import Taps, tapped
from satdifuser.extract.noising import (
    CLEAN,
    add_noise,
    alpha_bar,
    inversion_grid,
    invert_step,
    resolve_timesteps,
    tile_noise,
)
from satdifuser.extract.settings import ExtractSettings
from satdifuser.store.schema import LayerInfo


class FeatureExtractor:
    """Computes feature maps with a backbone.

    ``unet_calls`` counts the U-Net's forward passes, whatever their batch.
    """

    def __init__(self, backbone: Backbone, settings: ExtractSettings, layers: Sequence[LayerInfo]) -> None:
        self.backbone = backbone
        self.settings = settings
        self.layers = layers
        self.timesteps = resolve_timesteps(settings.timesteps)
        declared = backbone.info.scheduler.config.prediction_type
        self.prediction_type = declared if settings.prediction == "scheduler" else settings.prediction
        self.unet_calls = 0

    @torch.no_grad()
    def __call__(self, rgb: Tensor, tile_ids: Sequence[str]) -> list[Tensor]:
        """Compute the features of a batch.

        Args:
            rgb: (B, 3, H, W) float32 in [0, 1] at the backbone's image size.
            tile_ids: The B tiles' ids, which seed their noise.

        Returns:
            One (B, T, C, H, W) float32 tensor per layer, timesteps ascending.
        """
        latents = self._latents(rgb, tile_ids)
        with tapped(self.backbone.unet, self.layers) as taps:
            if self.settings.noising == "inversion":
                return self._invert(taps, latents)
            return self._forward(taps, latents, tile_ids)

    def _latents(self, rgb: Tensor, tile_ids: Sequence[str]) -> Tensor:
        if self.settings.latent == "mode":
            return self.backbone.encode(rgb, noise=None)
        stride = self.backbone.info.latent_stride
        channels = self.backbone.vae.config.latent_channels
        shape = (channels, rgb.shape[-2] // stride, rgb.shape[-1] // stride)
        return self.backbone.encode(rgb, self._noise("latent", 0, tile_ids, shape))

    def _noise(self, purpose: str, draw: int, tile_ids: Sequence[str], shape: Sequence[int]) -> Tensor:
        drawn = [tile_noise(self.settings.seed, tile_id, purpose, draw, shape) for tile_id in tile_ids]
        return torch.stack(drawn).to(self.backbone.device, self.backbone.dtype)

    def _invert(self, taps: Taps, x: Tensor) -> list[Tensor]:
        """Walk up the DDIM trajectory and keep the features at the requested timesteps."""
        info = self.backbone.info
        grid = inversion_grid(info.train_steps, self.settings.steps, info.steps_offset)
        prompt = self.backbone.prompt.expand(len(x), -1, -1)
        kept: list[list[Tensor]] = []
        for t, t_next in zip(grid, [*grid[1:], CLEAN], strict=True):
            time = torch.full((len(x),), float(t), device=x.device)
            self.unet_calls += 1
            if t == self.timesteps[-1]:
                kept.append([f.float() for f in taps.features_only(x, time, prompt)])
                break
            output = taps.output(x, time, prompt)
            if t in self.timesteps:
                kept.append([f.float() for f in taps.features()])
            alpha, alpha_next = alpha_bar(self.backbone.alphas, t), alpha_bar(self.backbone.alphas, t_next)
            x = invert_step(x, output, alpha, alpha_next, self.prediction_type)
        return [torch.stack(maps, dim=1) for maps in zip(*kept, strict=True)]

    def _forward(self, taps: Taps, z0: Tensor, tile_ids: Sequence[str]) -> list[Tensor]:
        """Send all timesteps of a batch through the U-Net at once; average over the draws."""
        sums: list[Tensor] = []
        for draw in range(self.settings.draws):
            noise = self._noise("noise", draw, tile_ids, z0.shape[1:])
            alphas = [alpha_bar(self.backbone.alphas, t) for t in self.timesteps]
            x = torch.stack([add_noise(z0, noise, alpha) for alpha in alphas], dim=1)  # (B, T, c, h, w)
            time = torch.tensor(self.timesteps, dtype=torch.float32, device=z0.device).repeat(len(z0))
            prompt = self.backbone.prompt.expand(len(time), -1, -1)
            self.unet_calls += 1
            maps = taps.features_only(x.flatten(0, 1), time, prompt)
            drawn = [m.float().unflatten(0, (len(z0), len(self.timesteps))) for m in maps]
            sums = [a + b for a, b in zip(sums, drawn, strict=True)] if sums else drawn
        return [total / self.settings.draws for total in sums]
