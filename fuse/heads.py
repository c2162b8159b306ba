"""Heads: fused maps of all scales become logits of a tile, or of every pixel.

``LinearHead`` is the classifier of Jia et al. (SatDiFuser), ICCV 2025, arXiv 2503.07890; ``UPerNetHead`` is
UPerNet's decoder (Xiao et al., ECCV 2018, arXiv 1807.10221): the pyramid pooling of PSPNet (Zhao et al.,
CVPR 2017, arXiv 1612.01105) on the coarsest scale below a feature pyramid (Lin et al., CVPR 2017, arXiv
1612.03144). Parameters carry the names of the authors' released modules, so that their weights load.

Letters of shapes: B tiles, P projected channels, D decoder channels, H and W pixels of a map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from satdifuser.fuse.fusion import FeatureMaps

POOL_SIZES = (1, 2, 3, 6)
"""Grids of the pyramid pooling; the released code uses as many of them as there are scales."""


class LinearHead(nn.Module):
    """Sum of the scales, global average, linear layer.

    Args:
        projection: Channels P of every fused map.
        classes: Number of classes.
    """

    def __init__(self, projection: int, classes: int) -> None:
        super().__init__()
        self.decoder_head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(projection, classes)
        )

    def forward(self, fused: list[Tensor]) -> Tensor:
        """Logits of tiles.

        Args:
            fused: Per scale (B, P, H, W) float32, finest first.

        Returns:
            (B, classes) float32.
        """
        logits: Tensor = self.decoder_head(torch.stack(resize_to_finest(fused)).sum(0))
        return logits


class PooledShortcut(nn.Module):
    """Adds to the logits of a head a linear layer from mean and spread of the maps before their fusion.

    Group norms take each tile's level and contrast away and fusion keeps P channels: the means still hold
    both, and the spreads tell texture. Wide and deep learning (Cheng et al., 2016, arXiv 1606.07792) on
    the statistics pooling of speaker recognition (Snyder et al., Interspeech 2017). It starts at zero.

    Args:
        channels: Width of every map, over timesteps, layers and scales.
        classes: Number of classes.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2 * channels, affine=False)
        self.linear = nn.Linear(2 * channels, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, maps: FeatureMaps) -> Tensor:
        """What to add to the logits of tiles.

        Args:
            maps: Stride -> one (B, T, C, H, W) float32 tensor per layer.

        Returns:
            (B, classes) float32.
        """
        pooled = [
            statistic for stride in sorted(maps) for x in maps[stride] for statistic in spread_and_mean(x)
        ]
        logits: Tensor = self.linear(self.norm(torch.cat(pooled, dim=1)))
        return logits


def spread_and_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean of maps (B, T, C, H, W) over H and W, each (B, T * C).

    What `torch.std_mean` finds in five times the time on a CPU.
    """
    mean = x.mean((-2, -1), keepdim=True)
    return (x - mean).square().mean((-2, -1)).sqrt().flatten(1), mean.flatten(1)


class PixelHead(nn.Module):
    """Sum of the scales, then the same linear layer at every pixel: the linear head of a segmentation.

    Args:
        projection: Channels P of every fused map.
        classes: Number of classes.
    """

    def __init__(self, projection: int, classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(projection, classes, 1)

    def forward(self, fused: list[Tensor]) -> Tensor:
        """Logits of pixels.

        Args:
            fused: Per scale (B, P, H, W) float32, finest first.

        Returns:
            (B, classes, H, W) float32, at the size of the finest scale.
        """
        logits: Tensor = self.conv_seg(torch.stack(resize_to_finest(fused)).sum(0))
        return logits


class UPerNetHead(nn.Module):
    """Pyramid pooling on the coarsest scale, top-down feature pyramid, one logit map per class.

    Args:
        projection: Channels P of every fused map.
        scales: Number of fused maps.
        classes: Number of classes.
        channels: Channels D inside the decoder.
        dropout: Share of channels dropped before the last convolution while training.
    """

    def __init__(
        self, projection: int, scales: int, classes: int, channels: int = 512, dropout: float = 0.1
    ) -> None:
        super().__init__()
        pools, finer = POOL_SIZES[:scales], range(scales - 1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), *conv_norm_relu(projection, channels, 1))
            for size in pools
        )
        self.bottleneck = conv_norm_relu(projection + len(pools) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_norm_relu(projection, channels, 1) for _ in finer)
        self.fpn_convs = nn.ModuleList(conv_norm_relu(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = conv_norm_relu(scales * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, classes, 1)

    def forward(self, fused: list[Tensor]) -> Tensor:
        """Logits of pixels.

        Args:
            fused: Per scale (B, P, H, W) float32, finest first.

        Returns:
            (B, classes, H, W) float32, at the size of the finest scale.
        """
        pyramid = [self.pool_pyramid(fused[-1])]  # built from the coarsest scale up: (B, D, H, W)
        for x, lateral in reversed(list(zip(fused[:-1], self.lateral_convs, strict=True))):
            pyramid.insert(0, lateral(x) + resize(pyramid[0], x.shape[2:]))
        smooth = [conv(x) for conv, x in zip(self.fpn_convs, pyramid[:-1], strict=True)]
        merged = self.fpn_bottleneck(torch.cat(resize_to_finest([*smooth, pyramid[-1]]), dim=1))
        logits: Tensor = self.conv_seg(self.dropout(merged))
        return logits

    def pool_pyramid(self, x: Tensor) -> Tensor:
        """See the coarsest map in grids of growing size: (B, P, H, W) -> (B, D, H, W)."""
        pooled = [resize(pool(x), x.shape[2:]) for pool in self.psp_modules]
        context: Tensor = self.bottleneck(torch.cat([x, *pooled], dim=1))
        return context


def conv_norm_relu(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """A convolution that keeps the size, batch norm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear, pixels as areas: (B, C, H, W) -> (B, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def resize_to_finest(maps: list[Tensor]) -> list[Tensor]:
    """Bring all maps to the size of the first one."""
    return [resize(x, maps[0].shape[2:]) for x in maps]
