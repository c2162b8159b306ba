"""Fusion modules: the feature maps of all layers and timesteps become one map per scale.

The three fusions of Jia et al. (SatDiFuser), ICCV 2025, arXiv 2503.07890, and the concatenation that they are
compared with; the bottleneck is the residual
block of He et al., CVPR 2016, arXiv 1512.03385, with the group norm of Wu & He, arXiv 1803.08494.
Parameters carry the names of the authors' released modules, so that a state dict of theirs loads as it is.

Letters of shapes: B tiles, T timesteps, L layers of a scale, S scales, C channels of a layer, P projected
channels, K = T · L maps of a scale (index t · L + l), E experts, N = B · T, H and W pixels of a map.
Timesteps ascend. Scales go from fine to coarse, and within a scale layers keep the store's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from satdifuser.errors import RunError
from satdifuser.fuse.settings import check_norm_groups, check_top_k

FeatureMaps = dict[int, list[Tensor]]
"""Stride in image pixels -> one (B, T, C, H, W) float32 tensor per layer."""

Channels = Mapping[int, Sequence[int]]
"""Stride in image pixels -> the width C of each layer."""


class ConvNorm(nn.Conv2d):
    """A convolution without bias that keeps the size, then a group norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm_groups: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.norm = nn.GroupNorm(norm_groups, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        x, norm = super().forward(x), self.norm
        # the module itself refuses a single map of one pixel, the coarsest scale of a small tile
        return torch.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions to P/4, P/4 and P channels.

    Args:
        inputs: Channels C of the input; where C differs from P the shortcut is projected.
        projection: Channels P of the output.
        norm_groups: Groups of every group norm; must divide P/4.

    Raises:
        SettingsError: If the groups do not divide P/4.
    """

    def __init__(self, inputs: int, projection: int, norm_groups: int) -> None:
        super().__init__()
        check_norm_groups(projection, norm_groups)
        narrow = projection // 4
        self.shortcut: nn.Module = nn.Identity()
        if inputs != projection:
            self.shortcut = ConvNorm(inputs, projection, 1, norm_groups)
        self.conv1 = ConvNorm(inputs, narrow, 1, norm_groups)
        self.conv2 = ConvNorm(narrow, narrow, 3, norm_groups)
        self.conv3 = ConvNorm(narrow, projection, 1, norm_groups)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, P, H, W)."""
        y = self.conv1(x).relu()
        y = self.conv2(y).relu()
        return torch.relu(self.conv3(y) + self.shortcut(x))


class ConcatenationFusion(nn.Module):
    """``X_s = Φ_s(concat_{t,l} F_{t,l})``: all maps of a scale side by side, without learned weights.

    Of one timestep and one kind of layer it is the paper's `single`.

    Args:
        channels, timesteps, projection, norm_groups, num_res_blocks: As for ``GlobalFusion``.

    Raises:
        SettingsError: If the groups do not divide P/4.
    """

    def __init__(
        self, channels: Channels, timesteps: int, projection: int, norm_groups: int, num_res_blocks: int = 1
    ) -> None:
        super().__init__()
        self.channels, self.timesteps = channels, timesteps
        self.bottleneck_layers = nn.ModuleList(
            bottlenecks(timesteps * sum(channels[stride]), projection, norm_groups, num_res_blocks)
            for stride in sorted(channels)
        )

    def forward(self, maps: FeatureMaps) -> tuple[list[Tensor], list[Tensor]]:
        """Fuse the maps of a batch of tiles.

        Args:
            maps: Per stride one (B, T, C, H, W) float32 tensor per layer.

        Returns:
            Per scale (B, P, H, W) float32, finest first, and no weights.

        Raises:
            RunError: If the maps are of other strides, layers or timesteps.
        """
        check_maps(maps, self.channels, self.timesteps)
        joined = [torch.cat(maps[stride], dim=2).flatten(1, 2) for stride in sorted(maps)]
        return [block(x) for block, x in zip(self.bottleneck_layers, joined, strict=True)], []


class GlobalFusion(nn.Module):
    """``X_s = Σ_{t,l} w_{t,l} Φ_l(F_{t,l})``, w a softmax over all timesteps and layers of all scales.

    The weights start equal.

    Args:
        channels: Widths of the layers per stride.
        timesteps: Number T of timesteps.
        projection: Channels P of every fused map.
        norm_groups: Groups of the group norms; must divide P/4.
        num_res_blocks: Bottlenecks in a row per layer.

    Raises:
        SettingsError: If the groups do not divide P/4.
    """

    def __init__(
        self, channels: Channels, timesteps: int, projection: int, norm_groups: int, num_res_blocks: int = 1
    ) -> None:
        super().__init__()
        self.channels, self.timesteps = channels, timesteps
        widths = [width for stride in sorted(channels) for width in channels[stride]]
        self.mixing_weights = nn.Parameter(torch.zeros(timesteps * len(widths)))
        self.bottleneck_layers = nn.ModuleList(
            bottlenecks(width, projection, norm_groups, num_res_blocks) for width in widths
        )

    def forward(self, maps: FeatureMaps) -> tuple[list[Tensor], Tensor]:
        """Fuse the maps of a batch of tiles.

        Args:
            maps: Per stride one (B, T, C, H, W) float32 tensor per layer.

        Returns:
            Per scale (B, P, H, W) float32, finest first, and w (T, L of all scales), detached.

        Raises:
            RunError: If the maps are of other strides, layers or timesteps.
        """
        check_maps(maps, self.channels, self.timesteps)
        weights = self.mixing_weights.softmax(0).view(self.timesteps, -1)
        shares = torch.split(
            weights.T, [len(self.channels[stride]) for stride in sorted(maps)]
        )  # S of (L, T)
        projected = project_layers(maps, self.bottleneck_layers)
        fused = [mix(ys, share[..., None, None, None]) for ys, share in zip(projected, shares, strict=True)]
        return fused, weights.detach()


class LocalizedFusion(nn.Module):
    """``X_s = Σ_k W_k Φ F_k`` with ``W = softmax_k(gate(mean_k Φ F) / temperature)`` at each pixel.

    The released code never advances its channel offset: every layer's bottlenecks read the first C channels
    of the concatenated scale. Its checkpoints were trained so, and need ``reference_slicing``.

    Args:
        channels, timesteps, projection, norm_groups, num_res_blocks: As for ``GlobalFusion``.
        temperature: Divides the gate's logits; higher is smoother.
        reference_slicing: Feed the layers as the released code does; for its checkpoints.

    Raises:
        SettingsError: If the groups do not divide P/4.
    """

    def __init__(
        self,
        channels: Channels,
        timesteps: int,
        projection: int,
        norm_groups: int,
        num_res_blocks: int = 1,
        temperature: float = 1.0,
        reference_slicing: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.timesteps = channels, timesteps
        self.temperature, self.reference_slicing = temperature, reference_slicing
        scales = [channels[stride] for stride in sorted(channels)]
        self.bottleneck_layers = nn.ModuleList(
            bottlenecks(width, projection, norm_groups, num_res_blocks)
            for widths in scales
            for width in widths
        )
        self.gate_modules = nn.ModuleList(PixelGate(projection, timesteps * len(widths)) for widths in scales)

    def forward(self, maps: FeatureMaps) -> tuple[list[Tensor], list[Tensor]]:
        """Fuse the maps of a batch of tiles.

        Args:
            maps: Per stride one (B, T, C, H, W) float32 tensor per layer.

        Returns:
            Per scale (B, P, H, W) float32, finest first, and per scale W (B, K, H, W), detached.

        Raises:
            RunError: If the maps are of other strides, layers or timesteps.
        """
        check_maps(maps, self.channels, self.timesteps)
        if self.reference_slicing:
            maps = {stride: slice_from_start(layers) for stride, layers in maps.items()}
        fused, gates = [], []
        for ys, gate in zip(project_layers(maps, self.bottleneck_layers), self.gate_modules, strict=True):
            mean = torch.stack([y.mean(1) for y in ys]).mean(0)
            weights = (gate(mean) / self.temperature).softmax(1)
            per_layer = weights.unflatten(1, (self.timesteps, -1)).movedim(2, 0)  # (L, B, T, H, W)
            fused.append(mix(ys, per_layer.unsqueeze(3)))
            gates.append(weights.detach())
        return fused, gates


class PixelGate(nn.Module):
    """A 1x1 convolution from the mean map of a scale to one logit per map and pixel."""

    def __init__(self, projection: int, maps: int) -> None:
        super().__init__()
        self.gate_conv = nn.Conv2d(projection, maps, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, H, W) -> (B, K, H, W)."""
        logits: Tensor = self.gate_conv(x)
        return logits


class MoEFusion(nn.Module):
    """Mixture of experts per scale over its concatenated layers; timesteps share it and are averaged.

    During warm-up all experts are mixed by the softmax of the gate, then the best ``top_k`` of each map.
    The released code counts warm-up per timestep, in evaluation too, one short, and does not save the count;
    ours counts training forwards and is saved as ``forwards``. A state dict without it leaves it as it is.

    Args:
        channels, timesteps, projection, norm_groups, num_res_blocks: As for ``GlobalFusion``.
        experts: Number E of experts per scale.
        top_k: Experts used for each map after warm-up.
        warmup_steps: Training forwards before the choice of experts begins.
        reference_counting: Count as the released code does; for comparisons with it.

    Raises:
        SettingsError: If the groups do not divide P/4, or top_k exceeds the experts.
    """

    forwards: Tensor

    def __init__(
        self,
        channels: Channels,
        timesteps: int,
        projection: int,
        norm_groups: int,
        num_res_blocks: int = 1,
        experts: int = 8,
        top_k: int = 2,
        warmup_steps: int = 100,
        reference_counting: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.timesteps = channels, timesteps
        self.warmup_steps, self.reference_counting = warmup_steps, reference_counting
        self.scale_moes = nn.ModuleList(
            ExpertMixture(sum(channels[stride]), projection, norm_groups, num_res_blocks, experts, top_k)
            for stride in sorted(channels)
        )
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_pre_hook(keep_forwards)  # type: ignore[no-untyped-call]

    def forward(self, maps: FeatureMaps) -> tuple[list[Tensor], list[Tensor]]:
        """Fuse the maps of a batch of tiles.

        Args:
            maps: Per stride one (B, T, C, H, W) float32 tensor per layer.

        Returns:
            Per scale (B, P, H, W) float32, finest first, and per scale the shares (B, T, E), detached.

        Raises:
            RunError: If the maps are of other strides, layers or timesteps.
        """
        check_maps(maps, self.channels, self.timesteps)
        soft = self.warming_up()
        fused, shares = [], []
        for stride, mixture in zip(sorted(maps), self.scale_moes, strict=True):
            x = torch.cat(maps[stride], dim=2)  # (B, T, C of all layers, H, W)
            y, weights = mixture(x.flatten(0, 1), soft.repeat(len(x)))
            fused.append(y.unflatten(0, x.shape[:2]).mean(1))
            shares.append(weights.unflatten(0, x.shape[:2]).detach())
        self.count_forward()
        return fused, shares

    def warming_up(self) -> Tensor:
        """Whether each timestep of the coming forward mixes all experts: (T,) bool."""
        count = self.forwards.expand(self.timesteps)
        if self.reference_counting:
            count = count + 1 + torch.arange(self.timesteps, device=count.device)
        return count < self.warmup_steps

    def count_forward(self) -> None:
        """Advance the warm-up counter."""
        if self.reference_counting:
            self.forwards += self.timesteps
        elif self.training:
            self.forwards += 1


class ExpertMixture(nn.Module):
    """The experts of one scale and their gate: 3x3 convolution, global average, learned temperature."""

    def __init__(
        self, inputs: int, projection: int, norm_groups: int, num_res_blocks: int, experts: int, top_k: int
    ) -> None:
        super().__init__()
        check_top_k(top_k, experts)
        self.projection, self.top_k = projection, top_k
        self.temperature = nn.Parameter(torch.ones(()))
        self.experts = nn.ModuleList(
            bottlenecks(inputs, projection, norm_groups, num_res_blocks) for _ in range(experts)
        )
        self.gate_network = nn.Sequential(
            nn.Conv2d(inputs, experts, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def forward(self, x: Tensor, soft: Tensor) -> tuple[Tensor, Tensor]:
        """Mix all experts where ``soft``, else the best ``top_k``.

        Args:
            x: (N, C, H, W) float32.
            soft: (N,) bool.

        Returns:
            The mixture (N, P, H, W) and the experts' shares (N, E), zero for those left out.
        """
        logits = self.gate(x)
        best = logits.topk(self.top_k).indices
        used = torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, True) | soft.unsqueeze(1)
        weights = logits.masked_fill(~used, -torch.inf).softmax(1)
        mixed = x.new_zeros(len(x), self.projection, *x.shape[2:])
        for e, expert in enumerate(self.experts):
            rows = used[:, e].nonzero().squeeze(1)  # an expert runs only on the maps that use it
            share = weights[rows, e].view(-1, 1, 1, 1)
            mixed.index_add_(0, rows, (expert(x[rows]) * share).to(mixed.dtype))  # mixed precision: wider
        return mixed, weights

    def gate(self, x: Tensor) -> Tensor:
        """Logits of the experts: (N, C, H, W) -> (N, E)."""
        logits: Tensor = self.gate_network(x) / self.temperature
        return logits


def bottlenecks(inputs: int, projection: int, norm_groups: int, num_res_blocks: int) -> nn.Sequential:
    """``num_res_blocks`` bottlenecks in a row; the first one changes the width."""
    widths = [inputs] + [projection] * (num_res_blocks - 1)
    return nn.Sequential(*(Bottleneck(width, projection, norm_groups) for width in widths))


def check_maps(maps: FeatureMaps, channels: Channels, timesteps: int) -> None:
    """Refuse maps of other strides, layers or timesteps than a fusion was built for.

    Raises:
        RunError: With what was expected and what was found.
    """
    expected = {stride: [(timesteps, width) for width in channels[stride]] for stride in sorted(channels)}
    found = {stride: [tuple(m.shape[1:-2]) for m in maps[stride]] for stride in sorted(maps)}
    if found != expected:
        raise RunError(
            "the features do not fit this network: per stride, (timesteps, channels) of the layers must be "
            f"{expected}, got {found}; use a store with the layers and timesteps of the fit, or fit again"
        )


def project_layers(maps: FeatureMaps, layers: nn.ModuleList) -> list[list[Tensor]]:
    """Pass every layer through its own bottlenecks: per scale, L tensors of (B, T, P, H, W)."""
    modules = iter(layers)
    # timesteps are folded into the batch, so that a layer's bottlenecks run once
    return [
        [next(modules)(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in maps[stride]]
        for stride in sorted(maps)
    ]


def slice_from_start(layers: list[Tensor]) -> list[Tensor]:
    """Replace each layer by as many channels from the start of the concatenated scale."""
    joined = torch.cat(layers, dim=2)
    return [joined[:, :, : layer.shape[2]] for layer in layers]


def mix(projected: list[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum over layers and timesteps: (B, P, H, W).

    Args:
        projected: L tensors of (B, T, P, H, W).
        weights: L first, then anything that spreads over (B, T, P, H, W).
    """
    return torch.stack([(y * w).sum(1) for y, w in zip(projected, weights, strict=True)]).sum(0)


def keep_forwards(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a state dict without the warm-up counter leave it as it is."""
    state.setdefault(f"{prefix}forwards", module.forwards)
