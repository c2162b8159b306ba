"""Heads, networks of fusion and head, their settings, and parity with the released code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_corners import on_each_side
from pydantic import ValidationError
from torch import Tensor, nn

from satdifuser.errors import SettingsError
from satdifuser.fuse.fusion import FeatureMaps, GlobalFusion, LocalizedFusion, MoEFusion
from satdifuser.fuse.heads import LinearHead, UPerNetHead, resize_to_finest
from satdifuser.fuse.network import Network, build_network
from satdifuser.fuse.settings import FitSettings, SweepSettings

CHANNELS = {8: [6, 16], 16: [12, 16, 5]}
SIZES = [(12, 16), (6, 8), (3, 4), (2, 2)]


def make_fused(scales: int, channels: int = 8, tiles: int = 2) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(tiles, channels, *size, generator=random) for size in SIZES[:scales]]


def make_maps(tiles: int = 2) -> FeatureMaps:
    random = torch.Generator().manual_seed(1)
    return {
        stride: [
            torch.randn(tiles, 3, width, 48 // stride, 64 // stride, generator=random) for width in widths
        ]
        for stride, widths in CHANNELS.items()
    }


def parameters_without_gradient(module: nn.Module) -> list[str]:
    return [key for key, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_linear_head_averages_the_sum_of_the_scales() -> None:
    head, fused = LinearHead(8, 5), make_fused(3)
    linear = head.decoder_head[2]
    expected = linear(sum(x.mean((2, 3)) for x in fused))  # of sizes 1, 1/2, 1/4 resizing keeps the mean
    torch.testing.assert_close(head(fused), expected)


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
def test_upernet_gives_logits_at_the_finest_scale(scales: int) -> None:
    torch.manual_seed(0)
    head = UPerNetHead(8, scales, classes=5, channels=6)
    logits = head(make_fused(scales))
    assert logits.shape == (2, 5, 12, 16)
    assert len(head.psp_modules) == scales


def test_upernet_passes_the_coarsest_scale_down_to_the_finest() -> None:
    torch.manual_seed(0)
    head, fused = UPerNetHead(8, 3, classes=5, channels=6).eval(), make_fused(3)
    changed = [*fused[:2], fused[2] + 1]
    assert ((head(changed) - head(fused)).abs().amax((0, 1)) > 0).all()


@pytest.mark.parametrize("head", [LinearHead(8, 5), UPerNetHead(8, 4, 5, channels=6)])
def test_gradient_reaches_every_parameter(head: nn.Module) -> None:
    fused = [x.requires_grad_() for x in make_fused(4)]
    logits = head.eval()(fused)
    torch.manual_seed(2)
    (logits * torch.randn_like(logits)).sum().backward()
    assert parameters_without_gradient(head) == []
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in fused)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    head, fused = UPerNetHead(8, 2, 5, channels=6, dropout=0.5), make_fused(2)
    torch.testing.assert_close(head.eval()(fused), head(fused))
    assert not torch.equal(head.train()(fused), head(fused))


@pytest.mark.parametrize(
    ("fusion", "kind"), [("global", GlobalFusion), ("localized", LocalizedFusion), ("moe", MoEFusion)]
)
def test_build_network_for_narrow_backbones(fusion: Any, kind: type) -> None:
    network = build_network(fusion, CHANNELS, 3, 10, "classification", FitSettings(experts=3, top_k=1))
    assert isinstance(network.fusion, kind)
    assert isinstance(network.head, LinearHead)
    logits, _ = network(make_maps())
    assert logits.shape == (2, 10)
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.num_channels) for m in norms} == {(8, 24), (8, 96)}


def test_build_network_for_wide_backbones() -> None:
    network = build_network("global", {8: [320], 16: [640]}, 1, 4, "segmentation", FitSettings())
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert {(m.num_groups, m.num_channels) for m in norms} == {(32, 96), (32, 384)}
    assert network.head.conv_seg.in_channels == 512


def test_build_network_takes_widths_and_experts_from_the_settings() -> None:
    settings = FitSettings(projection=16, norm_groups=2, experts=3, top_k=1, warmup_steps=7)
    network = build_network("moe", CHANNELS, 3, 10, "multilabel", settings)
    mixture = network.fusion.scale_moes[0]
    assert (len(mixture.experts), mixture.top_k, network.fusion.warmup_steps) == (3, 1, 7)
    assert mixture.experts[0][0].conv3.norm.num_groups == 2
    assert network.head.decoder_head[2].in_features == 16


def test_segmentation_logits_are_resized_to_the_labels() -> None:
    network = build_network("global", CHANNELS, 3, 4, "segmentation", FitSettings())
    assert network(make_maps())[0].shape == (2, 4, 6, 8)
    assert network(make_maps(), output_size=(48, 64))[0].shape == (2, 4, 48, 64)
    assert network.head.conv_seg.in_channels == 128


def test_network_state_dict_round_trip() -> None:
    settings = FitSettings(projection=16, experts=3)
    source, other = (build_network("moe", CHANNELS, 3, 4, "segmentation", settings) for _ in range(2))
    source(make_maps())  # moves batch norm buffers and the warm-up counter
    other.load_state_dict(source.state_dict())
    torch.testing.assert_close(other.eval()(make_maps())[0], source.eval()(make_maps())[0])
    assert other.fusion.forwards == 1


def test_a_seed_fixes_the_initial_network() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        network = build_network("localized", CHANNELS, 3, 4, "segmentation", FitSettings(projection=16))
        states.append(network.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_a_head_that_does_not_fit_the_task_is_refused(task: Any) -> None:
    message = f"head is upernet, but {task} needs shortcut or linear: set head to shortcut or linear or auto"
    with pytest.raises(SettingsError, match=message):
        build_network("global", CHANNELS, 3, 4, task, FitSettings(head="upernet"))


def test_the_linear_head_of_masks_is_the_same_layer_at_every_pixel() -> None:
    network = build_network("global", {8: [3], 16: [4]}, 1, 5, "segmentation", FitSettings(head="linear"))
    maps = {8: [torch.randn(2, 1, 3, 4, 4)], 16: [torch.randn(2, 1, 4, 2, 2)]}
    logits, _ = network(maps, (16, 16))
    assert logits.shape == (2, 5, 16, 16)
    fused, _ = network.fusion(maps)
    summed = resize_to_finest(fused)[0] + resize_to_finest(fused)[1]
    by_hand = summed[0, :, 1, 3] @ network.head.conv_seg.weight[:, :, 0, 0].T + network.head.conv_seg.bias
    torch.testing.assert_close(network(maps)[0][0, :, 1, 3], by_hand)


def test_the_shortcut_adds_a_linear_layer_of_means_and_spreads_and_starts_at_nothing() -> None:
    torch.manual_seed(0)
    plain = build_network("global", CHANNELS, 3, 4, "classification", FitSettings(head="reference"))
    network = build_network("global", CHANNELS, 3, 4, "classification", FitSettings())
    assert network.shortcut is not None
    assert plain.shortcut is None
    network.load_state_dict(plain.state_dict(), strict=False)
    maps, pooled = make_maps(), network.shortcut
    torch.testing.assert_close(network(maps)[0], plain(maps)[0])
    nn.init.normal_(pooled.linear.weight)
    layers = [x.flatten(3) for stride in (8, 16) for x in maps[stride]]
    means = [x.mean(3) for x in layers]
    spreads = [(x - mean[..., None]).square().mean(3).sqrt() for x, mean in zip(layers, means, strict=True)]
    both = [part.flatten(1) for pair in zip(spreads, means, strict=True) for part in pair]
    expected = plain(maps)[0] + pooled.linear(pooled.norm.eval()(torch.cat(both, dim=1)))
    torch.testing.assert_close(network(maps)[0], expected)
    network(maps)[0].sum().backward()
    assert parameters_without_gradient(network.shortcut) == []


def test_norm_groups_that_do_not_fit_the_automatic_projection_are_refused() -> None:
    message = "norm_groups is 32, but must divide the projection 96 and its quarter 24"
    with pytest.raises(SettingsError, match=message):
        build_network("global", CHANNELS, 3, 4, "classification", FitSettings(norm_groups=32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fusion": ["moe", "moe"]}, "name each value once, got moe twice or more"),
        ({"seeds": [1, 2, 1]}, "name each value once, got 1 twice or more"),
        ({"lr": [0.1, 0.1]}, "name each value once, got 0.1 twice or more"),
        ({"timesteps": [[21], [61], [21]]}, r"name each value once, got \[21\] twice or more"),
        ({"layers": []}, "at least 1 item"),
        ({"experts": 4, "top_k": 5}, "top_k is 5, but must be 1 to 4, the number of experts"),
        ({"projection": 90}, "projection is 90, but must be a multiple of 4, such as 96 or 384"),
        ({"projection": 96, "norm_groups": 16}, "choose one of 1, 2, 3, 4, 6, 8, 12, 24"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SweepSettings(**values)


# Parity with arrays recorded from the authors' released code.


def read_golden(folder: Path, case: str) -> tuple[Network, dict[str, Tensor], FeatureMaps]:
    """The network with the recorded weights, all arrays, and the inputs."""
    kwargs = json.loads((folder / f"{case}.json").read_text())["kwargs"]
    with np.load(folder / f"{case}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    maps, widths = {}, {128 // int(size): dims for size, dims in kwargs["feature_dims"].items()}
    for i, stride in enumerate(sorted(widths)):
        joined = torch.stack([arrays[f"in/{step}/{i}"] for step in kwargs["save_timesteps"]], 1)
        maps[stride] = list(joined.split(widths[stride], 2))
    projection, classes = kwargs["projection_dim"], kwargs["num_classes"]
    head: nn.Module = LinearHead(projection, classes)
    if "channels" in kwargs:
        head = UPerNetHead(projection, len(maps), classes, kwargs["channels"])
    fusion = GlobalFusion(widths, len(kwargs["save_timesteps"]), projection, kwargs["num_norm_groups"])
    network = Network(fusion, head)
    network.load_reference({key[6:]: v for key, v in arrays.items() if key.startswith("state/")})
    return network, arrays, maps


def assert_near(ours: Tensor, golden: Tensor) -> None:
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max() <= 1e-4 * golden.abs().max()


@pytest.mark.parametrize(("case", "output_size"), [("B_cls_gw", None), ("B_seg_gw", (40, 40))])
def test_golden_logits(shared: Path, case: str, output_size: tuple[int, int] | None) -> None:
    network, arrays, maps = read_golden(shared / "golden/B", case)
    logits, weights = network.eval()(maps, output_size)
    assert_near(logits, arrays["out/logits"])
    assert_near(weights.flatten(), arrays["out/misc"])


def test_golden_classifier_training_step(shared: Path) -> None:
    network, arrays, maps = read_golden(shared / "golden/B", "B_cls_gw_trainstep")
    network.train()
    adam = torch.optim.Adam(network.parameters(), lr=0.01)
    loss = nn.functional.cross_entropy(network(maps)[0], arrays["in_labels"])
    loss.backward()
    assert_near(loss, arrays["out/loss"])
    for key, p in network.named_parameters():
        assert_near(p.grad, arrays[f"out/grad/{key.split('.', 1)[1]}"])
    adam.step()
    assert_near(network(maps)[0], arrays["out/logits_after_one_adam_step"])


def test_golden_segmenter_in_train_mode(shared: Path) -> None:
    """All gradients at once are those of the record for one choice at the corners of ReLUs."""

    def differing() -> list[str]:
        network, arrays, maps = read_golden(shared / "golden/B", "B_seg_gw_trainmode")
        network.train().head.dropout.eval()  # as it was recorded
        logits, _ = network(maps, (40, 40))
        assert_near(logits, arrays["out/logits"])
        loss = nn.functional.cross_entropy(logits, arrays["in_labels"])
        loss.backward()
        assert_near(loss, arrays["out/loss"])
        for key, buffer in network.head.named_buffers():
            assert_near(buffer, arrays[f"out/after/{key}"])
        found = []
        for key, p in network.named_parameters():
            golden = arrays[f"out/grad_norm/{key.split('.', 1)[1]}"]
            # a bias before a batch norm has no gradient but rounding noise, at most 4e-6 here
            if (p.grad.norm() - golden).abs() > max(1e-4 * golden, 1e-5 if golden < 1e-5 else 0):
                found.append(key)
        return found

    assert [] in on_each_side(differing)


def test_an_input_of_a_relu_that_is_but_rounding_takes_both_sides() -> None:
    def gradient() -> list[float]:
        x = torch.tensor([1e-9, 1.0, -1.0], requires_grad=True)
        (2 * x.relu() + torch.relu(x + 5)).sum().backward()
        return x.grad.tolist()

    assert list(on_each_side(gradient)) == [[3, 3, 1], [3, 3, 1], [1, 3, 1]]
