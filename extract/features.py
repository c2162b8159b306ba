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
from satdifuser.extract.unet import Conditions
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

    def latents(self, rgb: Tensor, tile_ids: Sequence[str]) -> Tensor:
        """Encode a batch of images.

        Args:
            rgb: (B, 3, H, W) float32 in [0, 1] at the backbone's image size.
            tile_ids: The B tiles' ids, which seed the noise that latents are sampled with.

        Returns:
            Clean latents (B, c, h, w) of the backbone's dtype.
        """
        if self.settings.latent == "mode":
            return self.backbone.encode(rgb, noise=None)
        shape = self.backbone.info.latent_shape((rgb.shape[-2], rgb.shape[-1]))
        return self.backbone.encode(rgb, self._noise("latent", 0, tile_ids, shape))

    def __call__(self, rgb: Tensor, tile_ids: Sequence[str], metadata: Tensor | None = None) -> list[Tensor]:
        """Compute the features of a batch of images: `features` of their `latents`."""
        return self.features(self.latents(rgb, tile_ids), tile_ids, metadata)

    def features(
        self, latents: Tensor, tile_ids: Sequence[str], metadata: Tensor | None = None
    ) -> list[Tensor]:
        """Compute the features of a batch.

        Args:
            latents: Clean latents (B, c, h, w).
            tile_ids: The B tiles' ids, which seed their noise.
            metadata: (B, 7) float32 as `normalise` makes it, for a backbone that reads metadata.

        Returns:
            One (B, T, C, H, W) float32 tensor per layer, timesteps ascending.
        """
        conditions = self.backbone.conditions(len(latents), metadata)
        if self.settings.noising == "inversion":
            return self.invert(latents, conditions)
        draws = [self._noise("noise", i, tile_ids, latents.shape[1:]) for i in range(self.settings.draws)]
        return self.noise_once(latents, draws, conditions)

    def _noise(self, purpose: str, draw: int, tile_ids: Sequence[str], shape: Sequence[int]) -> Tensor:
        drawn = [tile_noise(self.settings.seed, tile_id, purpose, draw, shape) for tile_id in tile_ids]
        return torch.stack(drawn).to(self.backbone.device, self.backbone.dtype)

    @torch.no_grad()
    def invert(self, x: Tensor, conditions: Conditions) -> list[Tensor]:
        """Walk up the DDIM trajectory and keep the features at the requested timesteps.

        Args:
            x: Clean latents (B, c, h, w).
            conditions: What the U-Net is told beside them.

        Returns:
            One (B, T, C, H, W) float32 tensor per layer, timesteps ascending.
        """
        info = self.backbone.info
        grid = inversion_grid(info.train_steps, self.settings.steps, info.steps_offset)
        kept: list[list[Tensor]] = []
        with tapped(self.backbone.unet, self.layers) as taps:
            for t, t_next in zip(grid, [*grid[1:], CLEAN], strict=True):
                time = torch.full((len(x),), float(t), device=x.device)
                self.unet_calls += 1
                if t == self.timesteps[-1]:
                    kept.append([f.float() for f in taps.features_only(x, time, conditions)])
                    break
                output = taps.output(x, time, conditions)
                if t in self.timesteps:
                    kept.append([f.float() for f in taps.features()])
                output = self._guide(taps, output, x, time, conditions)
                alpha, alpha_next = (
                    alpha_bar(self.backbone.alphas, t),
                    alpha_bar(self.backbone.alphas, t_next),
                )
                x = invert_step(x, output, alpha, alpha_next, self.prediction_type)
        return [torch.stack(maps, dim=1) for maps in zip(*kept, strict=True)]

    def _guide(self, taps: Taps, output: Tensor, x: Tensor, time: Tensor, conditions: Conditions) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): away from the negative prompt."""
        if self.settings.guidance is False:
            return output
        self.unet_calls += 1
        unconditional = taps.output(x, time, self.backbone.negative_conditions(conditions))
        return unconditional + self.settings.guidance * (output - unconditional)

    @torch.no_grad()
    def noise_once(self, z0: Tensor, draws: Sequence[Tensor], conditions: Conditions) -> list[Tensor]:
        """Send all timesteps of a batch through the U-Net at once; average over the draws.

        Args:
            z0: Clean latents (B, c, h, w).
            draws: Standard normal noises of the same shape.
            conditions: What the U-Net is told beside them.

        Returns:
            One (B, T, C, H, W) float32 tensor per layer, timesteps ascending.
        """
        steps = len(self.timesteps)
        time = torch.tensor(self.timesteps, dtype=torch.float32, device=z0.device).repeat(len(z0))
        alphas = [alpha_bar(self.backbone.alphas, t) for t in self.timesteps]
        sums: list[Tensor] = []
        with tapped(self.backbone.unet, self.layers) as taps:
            for noise in draws:
                x = torch.stack([add_noise(z0, noise, alpha) for alpha in alphas], dim=1)  # (B, T, c, h, w)
                self.unet_calls += 1
                maps = taps.features_only(x.flatten(0, 1), time, conditions.repeat(steps))
                drawn = [m.float().unflatten(0, (len(z0), steps)) for m in maps]
                sums = [a + b for a, b in zip(sums, drawn, strict=True)] if sums else drawn
        return [total / len(draws) for total in sums]
