"""A network: one fusion module and one head, as trained from a feature store.

Letters of shapes: B tiles, T timesteps, H and W pixels of a map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from satdifuser.errors import SettingsError
from satdifuser.fuse.fusion import (
    Channels,
    ConcatenationFusion,
    FeatureMaps,
    GlobalFusion,
    LocalizedFusion,
    MoEFusion,
)
from satdifuser.fuse.heads import LinearHead, PixelHead, PooledShortcut, UPerNetHead, resize
from satdifuser.fuse.settings import FitSettings, FusionName, HeadName, Task

WIDE_LAYER = 320
"""A backbone with layers at least this wide is of Stable Diffusion's size."""

HEADS: dict[Task, tuple[HeadName, ...]] = {
    "classification": ("shortcut", "linear"),
    "multilabel": ("shortcut", "linear"),
    "segmentation": ("upernet", "linear"),
}
"""The heads that fit a task; `auto` is the first."""

REFERENCE_HEADS: dict[Task, HeadName] = {
    "classification": "linear",
    "multilabel": "linear",
    "segmentation": "upernet",
}
"""Those of the paper."""


@dataclass(frozen=True)
class Variant:
    """What networks read from the authors' checkpoints may have, and no setting of ours asks for."""

    num_res_blocks: int = 1
    temperature: float = 1.0
    decoder_channels: int | None = None  # None: in proportion to the projection


OURS = Variant()


class Network(nn.Module):
    """A fusion module and a head.

    Args:
        fusion: Feature maps -> fused maps and weights to look at.
        head: Fused maps -> logits.
        shortcut: Feature maps -> what is added to the logits, if anything.
    """

    def __init__(self, fusion: nn.Module, head: nn.Module, shortcut: PooledShortcut | None = None) -> None:
        super().__init__()
        self.fusion, self.head, self.shortcut = fusion, head, shortcut

    def forward(
        self, maps: FeatureMaps, output_size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Logits of a batch of tiles.

        Args:
            maps: Stride -> one (B, T, C, H, W) float32 tensor per layer, timesteps ascending.
            output_size: Height and width that logit maps are resized to; only for segmentation.

        Returns:
            (B, classes) or (B, classes, H, W) float32, and the fusion's weights, detached.

        Raises:
            RunError: If the maps are of other strides, layers or timesteps.
        """
        fused, weights = self.fusion(maps)
        logits: Tensor = self.head(fused)
        if self.shortcut is not None:
            logits = logits + self.shortcut(maps)
        return (logits if output_size is None else resize(logits, output_size)), weights

    def load_reference(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict of the authors' released code, which keeps fusion and head in one module.

        Args:
            state: Their parameters and buffers by name.
        """
        head = self.head.state_dict()
        self.load_state_dict({f"{'head' if key in head else 'fusion'}.{key}": v for key, v in state.items()})


def build_network(
    fusion: FusionName,
    channels: Channels,
    timesteps: int,
    classes: int,
    task: Task,
    settings: FitSettings,
    variant: Variant = OURS,
) -> Network:
    """Build the network that the settings ask for, its ``auto`` values resolved.

    Args:
        fusion: Which fusion module.
        channels: Widths of the layers per stride.
        timesteps: Number T of timesteps.
        classes: Number of logits.
        task: What the logits mean.
        settings: Head, widths and experts.
        variant: What else a network that was read from a checkpoint of the authors needs.

    Raises:
        SettingsError: If the head does not fit the task, or the norm groups the projection.
    """
    projection, norm_groups = choose_widths(channels, settings)
    pooled = timesteps * sum(sum(widths) for widths in channels.values())
    return Network(
        build_fusion(fusion, channels, timesteps, projection, norm_groups, settings, variant),
        build_head(task, projection, len(channels), classes, settings, variant),
        PooledShortcut(pooled, classes) if choose_head(task, settings) == "shortcut" else None,
    )


def choose_widths(channels: Channels, settings: FitSettings) -> tuple[int, int]:
    """Resolve ``projection`` and ``norm_groups``: 384 and 32 for wide backbones, 96 and 8 for narrow ones."""
    widest = max(width for widths in channels.values() for width in widths)
    projection, norm_groups = settings.projection, settings.norm_groups
    if projection == "auto":
        projection = 384 if widest >= WIDE_LAYER else 96
    if norm_groups == "auto":
        norm_groups = math.gcd(32, projection // 4)
    return projection, norm_groups


def build_fusion(
    name: FusionName,
    channels: Channels,
    timesteps: int,
    projection: int,
    norm_groups: int,
    settings: FitSettings,
    variant: Variant,
) -> ConcatenationFusion | GlobalFusion | LocalizedFusion | MoEFusion:
    """Build the fusion module of that name; `single` concatenates the little that it is given."""
    blocks = variant.num_res_blocks
    if name in ("single", "concatenation"):
        return ConcatenationFusion(channels, timesteps, projection, norm_groups, blocks)
    if name == "global":
        return GlobalFusion(channels, timesteps, projection, norm_groups, blocks)
    if name == "localized":
        return LocalizedFusion(
            channels,
            timesteps,
            projection,
            norm_groups,
            blocks,
            temperature=variant.temperature,
            reference_slicing=settings.reference_slicing,
        )
    return MoEFusion(
        channels,
        timesteps,
        projection,
        norm_groups,
        blocks,
        experts=settings.experts,
        top_k=settings.top_k,
        warmup_steps=settings.warmup_steps,
    )


def build_head(
    task: Task, projection: int, scales: int, classes: int, settings: FitSettings, variant: Variant
) -> LinearHead | PixelHead | UPerNetHead:
    """Build the head that the settings ask for.

    Raises:
        SettingsError: If it does not fit the task.
    """
    head = choose_head(task, settings)
    if head == "upernet":
        # the published 512 for a projection of 384, in proportion for others
        channels = variant.decoder_channels or projection * 4 // 3
        return UPerNetHead(projection, scales, classes, channels=channels)
    return (PixelHead if task == "segmentation" else LinearHead)(projection, classes)


def choose_head(task: Task, settings: FitSettings) -> HeadName:
    """Resolve ``head`` where it is ``auto`` or ``reference``.

    Raises:
        SettingsError: If it does not fit the task.
    """
    fitting = HEADS[task]
    if settings.head == "auto":
        return fitting[0]
    if settings.head == "reference":
        return REFERENCE_HEADS[task]
    if settings.head not in fitting:
        raise SettingsError(
            f"head is {settings.head}, but {task} needs {' or '.join(fitting)}: set head to "
            f"{' or '.join(fitting)} or auto"
        )
    return settings.head
