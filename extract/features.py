"""From images to the feature maps of all layers and timesteps, by one of two noisings.

Legend: B tiles, T timesteps, C channels, h and w latent pixels, H and W feature pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from satdifuser.extract.backbone import Backbone
from satdifuser.extract.compiled import CompiledTaps
from satdifuser.extract.device import to_device
from satdifuser.extract.layers import Taps, tapped
from satdifuser.extract.noising import (
    CLEAN,
    Level,
    add_noise,
    inversion_grid,
    invert_step,
    noise_level,
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
        self._levels = {t: self._level(t) for t in (*self._grid(), *self.timesteps)}
        self._compiled = self._compile() if settings.compile else None

    def _compile(self) -> CompiledTaps:
        steps = len(self.timesteps) if self.settings.noising == "forward" else 1
        return CompiledTaps(self.backbone.unet, self.layers, int(self.settings.batch_size) * steps)

    def check(self, tiles: int, image_size: tuple[int, int], metadata: Tensor | None) -> None:
        """Compare the network, where it is compiled, with itself as it is, in a batch of so many tiles.

        Raises:
            BackboneError: it cannot be compiled, or a layer differs.
        """
        if self._compiled is None:
            return
        forward = self.settings.noising == "forward"
        level, rows = self._levels[self.timesteps[-1]], tiles * (len(self.timesteps) if forward else 1)
        shape = self.backbone.info.latent_shape(image_size)
        x = self._noise("check", 0, [str(row) for row in range(rows)], shape)
        conditions = self.backbone.conditions(tiles, metadata).repeat(rows // tiles)
        self._compiled.check(x, level.time.expand(rows), conditions)

    def _grid(self) -> list[int]:
        """The timesteps of the inversion up to the last one that is asked for; none with forward noising."""
        if self.settings.noising == "forward":
            return []
        info = self.backbone.info
        grid = inversion_grid(info.train_steps, self.settings.steps, info.steps_offset)
        return grid[: grid.index(self.timesteps[-1]) + 1]

    def _level(self, t: int) -> Level:
        return noise_level(self.backbone.alphas, t, self.backbone.dtype, self.backbone.device)

    @contextmanager
    def in_float32(self) -> Iterator[FeatureExtractor]:
        """An extractor that computes in float32 with the same weights, while the `with` block lasts."""
        narrow, settings = self.backbone, self.settings.model_copy(update={"compile": False})
        try:  # where memory does not suffice, what is float32 by then is narrowed again, too
            yield FeatureExtractor(narrow.to(torch.float32), settings, self.layers)
        finally:
            narrow.to(narrow.dtype)

    @contextmanager
    def _taps(self) -> Iterator[Taps | CompiledTaps]:
        if self._compiled:
            yield self._compiled
            return
        with tapped(self.backbone.unet, self.layers) as taps:
            yield taps

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
        self, latents: Tensor, tile_ids: Sequence[str], metadata: Tensor | None = None, first: int = 0
    ) -> list[Tensor]:
        """Compute the features of a batch.

        Args:
            latents: Clean latents (B, c, h, w).
            tile_ids: The B tiles' ids, which seed their noise.
            metadata: (B, 7) float32 as `normalise` makes it, for a backbone that reads metadata.
            first: The place of the first tile, where each place of a batch has a prompt of its own.

        Returns:
            One (B, T, C, H, W) tensor per layer, timesteps ascending; of the backbone's dtype with forward
            noising and one draw, else float32.
        """
        conditions = self.backbone.conditions(len(latents), metadata, first)
        if self.settings.noising == "inversion":
            return self.invert(latents, conditions)
        draws = [self._noise("noise", i, tile_ids, latents.shape[1:]) for i in range(self.settings.draws)]
        return self.noise_once(latents, draws, conditions)

    def _noise(self, purpose: str, draw: int, tile_ids: Sequence[str], shape: Sequence[int]) -> Tensor:
        drawn = [tile_noise(self.settings.seed, tile_id, purpose, draw, shape) for tile_id in tile_ids]
        return self.to_backbone(torch.stack(drawn))

    def to_backbone(self, values: Tensor) -> Tensor:
        """Bring values to the backbone's device and dtype."""
        return to_device(values, self.backbone.device).to(self.backbone.dtype)

    @torch.no_grad()
    def invert(self, x: Tensor, conditions: Conditions) -> list[Tensor]:
        """Walk up the DDIM trajectory and keep the features at the requested timesteps.

        Args:
            x: Clean latents (B, c, h, w).
            conditions: What the U-Net is told beside them.

        Returns:
            One (B, T, C, H, W) float32 tensor per layer, timesteps ascending.
        """
        kept: list[list[Tensor]] = []
        grid = self._grid()
        with self._taps() as taps:
            for t, t_next in zip(grid, [*grid[1:], CLEAN], strict=True):
                level = self._levels[t]
                time = level.time.expand(len(x))
                self.unet_calls += 1
                if t == self.timesteps[-1]:
                    kept.append([f.float() for f in taps.features_only(x, time, conditions)])
                    break
                output = taps.output(x, time, conditions)
                if t in self.timesteps:
                    kept.append([f.float() for f in taps.features()])
                output = self._guide(taps, output, x, time, conditions)
                x = invert_step(x, output, level, self._levels[t_next], self.prediction_type)
        return [torch.stack(maps, dim=1) for maps in zip(*kept, strict=True)]

    def _guide(
        self, taps: Taps | CompiledTaps, output: Tensor, x: Tensor, time: Tensor, conditions: Conditions
    ) -> Tensor:
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
            One (B, T, C, H, W) tensor per layer, timesteps ascending; of the backbone's dtype where there is
            one draw, else float32.
        """
        steps = len(self.timesteps)
        levels = [self._levels[t] for t in self.timesteps]
        time = torch.cat([level.time for level in levels]).repeat(len(z0))
        sums: list[Tensor] = []
        with self._taps() as taps:
            for noise in draws:
                x = torch.stack([add_noise(z0, noise, level) for level in levels], dim=1)  # (B, T, c, h, w)
                self.unet_calls += 1
                maps = taps.features_only(x.flatten(0, 1), time, conditions.repeat(steps))
                drawn = [m.unflatten(0, (len(z0), steps)) for m in maps]
                if len(draws) == 1:
                    return drawn
                wide = [m.float() for m in drawn]
                sums = [a + b for a, b in zip(sums, wide, strict=True)] if sums else wide
        return [total / len(draws) for total in sums]
