"""The layer table against real forwards, and the taps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from made_up import tiny_unet
from torch import nn

from satdifuser.errors import SettingsError
from satdifuser.extract.layers import layer_table, select_layers, tapped
from satdifuser.extract.unet import Conditions

DEFAULT = ["up_blocks.*.attn1", "up_blocks.*.conv2"]


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return tiny_unet().eval()


def inputs(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    torch.manual_seed(1)
    return torch.randn(2, 4, height, width), torch.tensor([21.0, 21.0]), Conditions(torch.randn(2, 1, 8))


def run(unet: Any, height: int, width: int) -> torch.Tensor:
    x, t, conditions = inputs(height, width)
    output: torch.Tensor = unet(x, t, conditions.prompt).sample
    return output


def count_hooks(unet: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (16, 2)])
@torch.no_grad()
def test_table_equals_a_real_forward(unet: Any, height: int, width: int) -> None:
    table = layer_table(UNet2DConditionModel, unet.config, (height, width), 2)
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, name=name: outputs.update({name: out}))
        for name, module in unet.named_modules()
        if name.startswith(("down_blocks", "mid_block", "up_blocks"))
        and name.endswith((".attn1", ".attn2", ".ff", ".conv1", ".conv2"))
    ]
    run(unet, height, width)
    for handle in handles:
        handle.remove()
    assert {layer.name for layer in table} == set(outputs)
    for layer in table:
        out = outputs[layer.name]
        assert layer.stride == 2 * height // layer.height
        assert layer.stride == 2 * width // layer.width
        if out.ndim == 4:
            assert out.shape == (2, layer.channels, layer.height, layer.width)
        else:
            assert out.shape == (2, layer.height * layer.width, layer.channels)


def test_order_of_the_table(unet: Any) -> None:
    names = [layer.name for layer in layer_table(UNet2DConditionModel, unet.config, (8, 8), 2)]
    assert len(names) == 28
    assert [n for n in names if n.startswith("up_blocks.1") and n.endswith(("attn1", "conv2"))] == [
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
        "up_blocks.1.resnets.0.conv2",
        "up_blocks.1.resnets.1.conv2",
    ]
    assert [n.split(".")[0] for n in (names[0], names[7], names[-1])] == [
        "down_blocks",
        "mid_block",
        "up_blocks",
    ]


def test_patterns_keep_table_order_and_do_not_repeat(unet: Any) -> None:
    table = layer_table(UNet2DConditionModel, unet.config, (8, 8), 2)
    chosen = select_layers(table, ["up_blocks.*.conv2", *DEFAULT, "mid_block.*.conv1"])
    assert chosen == [layer for layer in table if layer in chosen]
    assert len(chosen) == len({layer.name for layer in chosen}) == 8


def test_pattern_that_matches_nothing_suggests(unet: Any) -> None:
    table = layer_table(UNet2DConditionModel, unet.config, (8, 8), 2)
    message = (
        r"extract.layers: 'up_blocks.1.resnets.0.conv3' matches none of the backbone's 28 layers; "
        r"did you mean up_blocks.1.resnets.0.conv., .*; `satdifuser layers` lists them"
    )
    with pytest.raises(SettingsError, match=message):
        select_layers(table, ["up_blocks.*", "up_blocks.1.resnets.0.conv3"])


@pytest.mark.parametrize("patterns", [["*"], DEFAULT, ["down_blocks.0.*"], ["mid_block.*.attn2", "*.conv1"]])
@torch.no_grad()
def test_features_only_equals_the_full_run(unet: Any, patterns: list[str]) -> None:
    layers = select_layers(layer_table(UNet2DConditionModel, unet.config, (4, 12), 2), patterns)
    with tapped(unet, layers) as taps:
        early = taps.features_only(*inputs(4, 12))
        output = taps.output(*inputs(4, 12))
        full = taps.features()
    for layer, a, b in zip(layers, early, full, strict=True):
        assert a.shape == (2, layer.channels, layer.height, layer.width)
        assert torch.equal(a, b), layer.name
    assert torch.equal(output, run(unet, 4, 12))


@torch.no_grad()
def test_tokens_become_maps_row_by_row(unet: Any) -> None:
    layers = select_layers(layer_table(UNet2DConditionModel, unet.config, (4, 12), 2), ["up_blocks.*.attn1"])
    tokens: list[torch.Tensor] = []
    module = dict(unet.named_modules())[layers[0].name]
    handle = module.register_forward_hook(lambda _m, _a, out: tokens.append(out))
    with tapped(unet, layers) as taps:
        feature = taps.features_only(*inputs(4, 12))[0]
    handle.remove()
    torch.testing.assert_close(feature[1, :, 3, 5], tokens[0][1, 3 * 12 + 5], atol=0, rtol=0)


@torch.no_grad()
def test_features_only_leaves_before_the_output(unet: Any) -> None:
    layers = layer_table(UNet2DConditionModel, unet.config, (8, 8), 2)[:3]
    reached: list[bool] = []
    handle = unet.conv_out.register_forward_hook(lambda *_: reached.append(True))
    with tapped(unet, layers) as taps:
        taps.features_only(*inputs(8, 8))
    handle.remove()
    assert not reached


def test_taps_are_removed_even_after_an_error(unet: Any) -> None:
    layers = layer_table(UNet2DConditionModel, unet.config, (8, 8), 2)
    with tapped(unet, layers):
        assert count_hooks(unet) == len(layers)
    assert count_hooks(unet) == 0
    with pytest.raises(ZeroDivisionError), tapped(unet, layers):
        raise ZeroDivisionError
    assert count_hooks(unet) == 0
