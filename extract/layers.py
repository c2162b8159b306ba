"""Which U-Net modules are tapped: a table known before the first forward, and the taps themselves.

The table comes from a forward on torch's meta device, which computes shapes and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from satdifuser.errors import SettingsError, suggest
from satdifuser.extract.unet import Conditions
from satdifuser.store.schema import LayerInfo

KINDS = ("attn1", "attn2", "ff", "conv1", "conv2")  # also their order within a block
STAGES = ("down_blocks", "mid_block", "up_blocks")


class _LastLayerReached(Exception):  # noqa: N818  a signal, not an error
    """Leaves a forward whose remaining blocks nobody needs."""


def layer_table(
    unet_class: Any, config: Any, latent_size: tuple[int, int], latent_stride: int
) -> list[LayerInfo]:
    """List all layers that can be tapped, block by block, in a block attn1 first and conv2 last.

    Args:
        unet_class: The U-Net's class, a diffusers model.
        config: Its configuration.
        latent_size: (h, w) of the latents.
        latent_stride: Image pixels per latent pixel.
    """
    with torch.device("meta"):
        unet = unet_class.from_config(config).eval()
        latents = torch.empty(1, unet.config.in_channels, *latent_size)
        prompt = torch.empty(1, 1, _prompt_width(unet.config))
        found: dict[str, LayerInfo] = {}
        with _recorded(unet, latent_size, latent_stride, found), torch.no_grad():
            unet(latents, torch.zeros(1), prompt)
    return sorted(found.values(), key=lambda layer: _order(layer.name))


def _prompt_width(config: Any) -> int:
    width = config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


@contextmanager
def _recorded(
    unet: nn.Module, latent_size: tuple[int, int], latent_stride: int, found: dict[str, LayerInfo]
) -> Iterator[None]:
    sizes: dict[str, tuple[int, int]] = {}

    def remember_size(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes[name] = (args[0].shape[-2], args[0].shape[-1])

        return hook

    def record(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if output.ndim == 4:
                channels, (height, width) = output.shape[1], output.shape[-2:]
            else:
                channels, (height, width) = output.shape[2], sizes[name.split(".transformer_blocks")[0]]
            stride = latent_stride * round(latent_size[0] / height)
            found[name] = LayerInfo(name=name, channels=channels, stride=stride, height=height, width=width)

        return hook

    with _hooks() as handles:
        for name, module in unet.named_modules():
            if _is_tappable(name):
                handles.append(module.register_forward_hook(record(name)))
            elif re.search(r"attentions\.\d+$", name):
                handles.append(module.register_forward_pre_hook(remember_size(name)))
        yield


@contextmanager
def _hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _is_tappable(name: str) -> bool:
    parts = name.split(".")
    return parts[0] in STAGES and parts[-1] in KINDS


def _order(name: str) -> tuple[int, ...]:
    stage, kind = name.split(".")[0], name.split(".")[-1]
    numbers = [int(n) for n in re.findall(r"\.(\d+)", name)]
    block = numbers.pop(0) if stage != "mid_block" else 0
    return (STAGES.index(stage), block, KINDS.index(kind), *numbers)


def select_layers(table: Sequence[LayerInfo], patterns: Sequence[str]) -> list[LayerInfo]:
    """Layers of the table that match any pattern, in table order.

    Raises:
        SettingsError: a pattern matches nothing.
    """
    names = [layer.name for layer in table]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SettingsError(
                f"extract.layers: {pattern!r} matches none of the backbone's {len(names)} layers"
                f"{suggest(pattern, names)}; `satdifuser layers` lists them"
            )
    return [layer for layer in table if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]


@contextmanager
def tapped(unet: nn.Module, layers: Sequence[LayerInfo]) -> Iterator[Taps]:
    """Tap the given layers for the length of a `with` block."""
    with _hooks() as handles:
        taps = Taps(unet, layers)
        for layer in layers:
            module = unet.get_submodule(layer.name)
            handles.append(module.register_forward_hook(taps.keep(layer.name)))
        yield taps


class Taps:
    """Runs a U-Net and collects the raw outputs of some of its modules."""

    def __init__(self, unet: nn.Module, layers: Sequence[LayerInfo]) -> None:
        self._unet = unet
        self._layers = layers
        self._outputs: dict[str, Tensor] = {}
        self._stop_early = False

    def keep(self, name: str) -> Callable[..., None]:
        """Make the forward hook of one layer."""

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._outputs[name] = output
            if self._stop_early and len(self._outputs) == len(self._layers):
                raise _LastLayerReached

        return hook

    def output(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Run the whole network: (B, c, h, w) latents to its output of the same shape."""
        self._outputs.clear()
        self._stop_early = False
        result: Tensor = self._unet(x, t, **conditions.keywords()).sample
        return result

    def features_only(self, x: Tensor, t: Tensor, conditions: Conditions) -> list[Tensor]:
        """Run the network up to the last tapped layer and return the maps, see `features`."""
        self._outputs.clear()
        self._stop_early = True
        try:
            self._unet(x, t, **conditions.keywords())
        except _LastLayerReached:
            pass
        finally:
            self._stop_early = False
        return self.features()

    def features(self) -> list[Tensor]:
        """Maps of the last forward, in layer order: (B, C, H, W), tokens laid out as maps."""
        return [as_map(self._outputs[layer.name], layer) for layer in self._layers]


def as_map(output: Tensor, layer: LayerInfo) -> Tensor:
    """A tapped output as (B, C, H, W): tokens (B, H·W, C) are laid out row by row."""
    if output.ndim == 4:
        return output
    # (B, H*W, C) -> (B, C, H, W)
    maps: Tensor = output.transpose(1, 2).unflatten(2, (layer.height, layer.width))
    return maps
