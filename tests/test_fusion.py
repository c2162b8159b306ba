"""Fusion modules: their equations, their counters, and parity with the released ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from satdifuser.errors import RunError, SettingsError
from satdifuser.fuse.fusion import Bottleneck, FeatureMaps, GlobalFusion, LocalizedFusion, MoEFusion

CHANNELS = {8: [6, 16], 16: [12, 16, 5]}  # 16 is the projection too: such a layer has no projected shortcut
SIZES = {8: (6, 8), 16: (3, 4), 32: (2, 2), 64: (1, 1)}
FUSIONS = {"global": GlobalFusion, "localized": LocalizedFusion, "moe": MoEFusion}
ALL = pytest.mark.parametrize("name", FUSIONS)


def make_fusion(
    name: str, channels: dict[int, list[int]] = CHANNELS, timesteps: int = 3, **kwargs: Any
) -> Any:
    torch.manual_seed(0)
    return FUSIONS[name](channels, timesteps, projection=16, norm_groups=4, **kwargs)


def make_maps(
    channels: dict[int, list[int]] = CHANNELS, tiles: int = 2, timesteps: int = 3, seed: int = 1
) -> FeatureMaps:
    random = torch.Generator().manual_seed(seed)
    return {
        stride: [torch.randn(tiles, timesteps, width, *SIZES[stride], generator=random) for width in widths]
        for stride, widths in channels.items()
    }


def weight_sums(name: str, weights: Any) -> list[Tensor]:
    """Sums that must be one: over everything, over the maps at a pixel, over the experts."""
    if name == "global":
        return [weights.sum()]
    return [w.sum(1 if name == "localized" else -1) for w in weights]


@ALL
def test_fused_maps_keep_each_scales_size(name: str) -> None:
    fused, weights = make_fusion(name)(make_maps())
    assert [tuple(x.shape) for x in fused] == [(2, 16, 6, 8), (2, 16, 3, 4)]
    shapes = {
        "global": (3, 5),
        "localized": [(2, 6, 6, 8), (2, 9, 3, 4)],
        "moe": [(2, 3, 8), (2, 3, 8)],
    }
    assert (tuple(weights.shape) if name == "global" else [tuple(w.shape) for w in weights]) == shapes[name]


@ALL
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4),
    timesteps=st.integers(1, 3),
    tiles=st.integers(1, 3),
)
def test_any_layer_table_gives_finite_maps_and_weights_that_sum_to_one(
    name: str, widths: list[list[int]], timesteps: int, tiles: int
) -> None:
    channels = dict(zip(SIZES, widths, strict=False))
    fused, weights = make_fusion(name, channels, timesteps)(make_maps(channels, tiles, timesteps))
    assert [tuple(x.shape) for x in fused] == [(tiles, 16, *SIZES[stride]) for stride in channels]
    assert all(x.isfinite().all() for x in fused)
    for total in weight_sums(name, weights):
        torch.testing.assert_close(total, torch.ones_like(total))


def test_global_weights_start_equal() -> None:
    _, weights = make_fusion("global")(make_maps())
    torch.testing.assert_close(weights, torch.full((3, 5), 1 / 15))


@ALL
def test_gradient_reaches_every_parameter(name: str) -> None:
    fusion = make_fusion(name)
    fused, weights = fusion(make_maps())
    torch.manual_seed(2)
    sum((x * torch.randn_like(x)).sum() for x in fused).backward()
    still = [key for key, p in fusion.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert still == []
    assert not any(w.requires_grad for w in (weights if isinstance(weights, list) else [weights]))


@ALL
def test_state_dict_round_trip(name: str) -> None:
    source, other = make_fusion(name), make_fusion(name)
    with torch.no_grad():
        for p in source.parameters():
            p.add_(0.1)
    source(make_maps())  # advances the warm-up counter of a mixture
    other.load_state_dict(source.state_dict())
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, source.state_dict()[key])
    torch.testing.assert_close(other.eval()(make_maps())[0], source.eval()(make_maps())[0])


@ALL
def test_a_seed_fixes_the_initial_parameters(name: str) -> None:
    for a, b in zip(make_fusion(name).parameters(), make_fusion(name).parameters(), strict=True):
        assert torch.equal(a, b)


@ALL
def test_the_order_of_the_dict_does_not_matter(name: str) -> None:
    maps = make_maps()
    turned = {stride: maps[stride] for stride in reversed(maps)}
    fusion = make_fusion(name, {stride: CHANNELS[stride] for stride in reversed(CHANNELS)}).eval()
    torch.testing.assert_close(fusion(turned)[0], make_fusion(name).eval()(maps)[0])


def test_bottleneck_projects_the_shortcut_only_where_the_width_changes() -> None:
    assert isinstance(Bottleneck(16, 16, 4).shortcut, nn.Identity)
    assert {key.split(".")[0] for key in Bottleneck(6, 16, 4).state_dict()} == {
        "shortcut",
        "conv1",
        "conv2",
        "conv3",
    }


def test_a_single_map_of_one_pixel_is_normalised() -> None:
    """The coarsest scale of a small tile; torch's own module refuses it."""
    assert Bottleneck(6, 16, 2)(torch.ones(1, 6, 1, 1)).isfinite().all()


# Timesteps are folded into the batch; the equations, one timestep and layer at a time, give the same.


def layers_by_scale(fusion: GlobalFusion | LocalizedFusion) -> list[list[nn.Module]]:
    modules = list(fusion.bottleneck_layers)
    return [[modules.pop(0) for _ in CHANNELS[stride]] for stride in CHANNELS]


def loop_global(fusion: GlobalFusion, maps: FeatureMaps) -> list[Tensor]:
    weights, fused, first = fusion.mixing_weights.softmax(0), [], 0
    for xs, layers in zip(maps.values(), layers_by_scale(fusion), strict=True):
        terms = [
            weights[t * 5 + first + i] * layer(x[:, t])
            for i, (x, layer) in enumerate(zip(xs, layers, strict=True))
            for t in range(3)
        ]
        fused.append(torch.stack(terms).sum(0))
        first += len(xs)
    return fused


def loop_localized(fusion: LocalizedFusion, maps: FeatureMaps) -> list[Tensor]:
    fused = []
    for xs, layers, gate in zip(maps.values(), layers_by_scale(fusion), fusion.gate_modules, strict=True):
        ys = torch.stack([layer(x[:, t]) for t in range(3) for x, layer in zip(xs, layers, strict=True)])
        weights = gate(ys.mean(0)).softmax(1)
        fused.append(sum(weights[:, k, None] * y for k, y in enumerate(ys)))
    return fused


def loop_moe(fusion: MoEFusion, maps: FeatureMaps) -> list[Tensor]:
    fused = []
    for xs, mixture in zip(maps.values(), fusion.scale_moes, strict=True):
        terms = []
        for t in range(3):
            x = torch.cat([layer[:, t] for layer in xs], 1)
            shares = (mixture.gate_network[0](x).mean((2, 3)) / mixture.temperature).softmax(1)
            terms.append(sum(shares[:, e, None, None, None] * f(x) for e, f in enumerate(mixture.experts)))
        fused.append(torch.stack(terms).mean(0))
    return fused


@pytest.mark.parametrize(
    ("name", "loop"), [("global", loop_global), ("localized", loop_localized), ("moe", loop_moe)]
)
def test_folded_timesteps_equal_a_loop(name: str, loop: Callable[..., list[Tensor]]) -> None:
    fusion = make_fusion(name, num_res_blocks=2).eval()
    with torch.no_grad():
        for p in fusion.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        torch.testing.assert_close(fusion(make_maps())[0], loop(fusion, make_maps()), rtol=1e-4, atol=1e-4)


def test_a_high_temperature_evens_out_the_localized_weights() -> None:
    _, sharp = make_fusion("localized", temperature=0.1)(make_maps())
    _, even = make_fusion("localized", temperature=1e4)(make_maps())
    assert sharp[0].std() > 0.1
    torch.testing.assert_close(even[0], torch.full_like(even[0], 1 / 6), rtol=1e-3, atol=0)


def test_reference_slicing_reads_the_first_channels_for_every_layer() -> None:
    channels = {8: [6, 6]}
    maps, changed = make_maps(channels), make_maps(channels)
    changed[8][1] = changed[8][1] + 1
    for reference_slicing in (True, False):
        fusion = make_fusion("localized", channels, reference_slicing=reference_slicing)
        assert torch.equal(fusion(maps)[0][0], fusion(changed)[0][0]) is reference_slicing


def test_after_warmup_only_the_best_experts_run() -> None:
    channels = {8: [6]}
    fusion = make_fusion("moe", channels, timesteps=1, experts=5, top_k=2, warmup_steps=0).eval()
    maps = make_maps(channels, tiles=1, timesteps=1)
    (before,), (shares,) = fusion(maps)
    used = (shares[0, 0] > 0).tolist()
    assert sum(used) == 2
    for expert, is_used in zip(fusion.scale_moes[0].experts, used, strict=True):
        if not is_used:
            for p in expert.parameters():
                nn.init.constant_(p, torch.nan)
    torch.testing.assert_close(fusion(maps)[0][0], before)


def test_top_k_of_all_experts_equals_warmup() -> None:
    soft, chosen = (make_fusion("moe", top_k=8, warmup_steps=steps).eval() for steps in (1, 0))
    torch.testing.assert_close(soft(make_maps())[0], chosen(make_maps())[0])


def test_warmup_counts_training_forwards_only() -> None:
    fusion = make_fusion("moe", warmup_steps=2)
    used = []
    for training in (True, False, True, False, True):
        _, shares = fusion.train(training)(make_maps())
        used.append(int((shares[0][0, 0] > 0).sum()))
    assert used == [8, 8, 8, 2, 2]
    assert fusion.state_dict()["forwards"] == 3


def test_a_state_dict_without_the_counter_leaves_it() -> None:
    fusion = make_fusion("moe")
    state = fusion.state_dict()
    del state["forwards"]
    fusion.forwards.fill_(7)
    fusion.load_state_dict(state)
    assert fusion.forwards == 7
    assert "forwards" not in state


def test_reference_counting_advances_by_timestep_and_in_evaluation() -> None:
    fusion = make_fusion("moe", warmup_steps=5, reference_counting=True).eval()
    assert fusion.warming_up().tolist() == [True, True, True]
    fusion(make_maps())
    assert fusion.warming_up().tolist() == [True, False, False]


@ALL
def test_norm_groups_that_do_not_divide_are_refused(name: str) -> None:
    message = (
        "norm_groups is 5, but must divide the projection 96 and its quarter 24: "
        "choose one of 1, 2, 3, 4, 6, 8, 12, 24"
    )
    with pytest.raises(SettingsError) as error:
        FUSIONS[name](CHANNELS, 3, projection=96, norm_groups=5)
    assert str(error.value) == message


def test_a_projection_that_is_no_multiple_of_four_is_refused() -> None:
    with pytest.raises(
        SettingsError, match="projection is 90, but must be a multiple of 4, such as 96 or 384"
    ):
        GlobalFusion(CHANNELS, 3, projection=90, norm_groups=1)


@pytest.mark.parametrize("top_k", [0, 5])
def test_more_or_fewer_experts_than_there_are_are_refused(top_k: int) -> None:
    with pytest.raises(SettingsError, match=f"top_k is {top_k}, but must be 1 to 4, the number of experts"):
        make_fusion("moe", experts=4, top_k=top_k)


@ALL
@pytest.mark.parametrize(
    ("maps", "found"),
    [
        (make_maps({8: [6, 16]}), "got {8: [(3, 6), (3, 16)]}"),
        (make_maps(timesteps=2), "got {8: [(2, 6), (2, 16)], 16: [(2, 12), (2, 16), (2, 5)]}"),
        (make_maps({8: [6], 16: [12, 16, 5]}), "got {8: [(3, 6)], 16: [(3, 12), (3, 16), (3, 5)]}"),
    ],
    ids=["stride missing", "timestep missing", "layer missing"],
)
def test_maps_of_another_table_are_refused(name: str, maps: FeatureMaps, found: str) -> None:
    with pytest.raises(RunError) as error:
        make_fusion(name)(maps)
    assert str(error.value) == (
        "the features do not fit this network: per stride, (timesteps, channels) of the layers must be "
        f"{{8: [(3, 6), (3, 16)], 16: [(3, 12), (3, 16), (3, 5)]}}, {found}; use a store with the layers and "
        "timesteps of the fit, or fit again"
    )


# Parity with arrays recorded from the authors' released code.


def read_golden(folder: Path, case: str) -> tuple[dict[str, Any], dict[str, Tensor], FeatureMaps]:
    kwargs = json.loads((folder / f"{case}.json").read_text())["kwargs"]
    with np.load(folder / f"{case}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    maps = {}
    for i, size in enumerate(sorted(map(int, kwargs["feature_dims"]), reverse=True)):
        joined = torch.stack([arrays[f"in/{step}/{i}"] for step in kwargs["save_timesteps"]], 1)
        maps[128 // size] = list(joined.split(kwargs["feature_dims"][str(size)], 2))
    return kwargs, arrays, maps


def load_golden(fusion_class: type, kwargs: dict[str, Any], arrays: dict[str, Tensor], **own: Any) -> Any:
    widths = {128 // int(size): dims for size, dims in kwargs["feature_dims"].items()}
    shared = kwargs["projection_dim"], kwargs["num_norm_groups"], kwargs["num_res_blocks"]
    fusion = fusion_class(widths, len(kwargs["save_timesteps"]), *shared, **own)
    fusion.load_state_dict({key[6:]: value for key, value in arrays.items() if key.startswith("state/")})
    return fusion.eval()


def assert_near(ours: list[Tensor], arrays: dict[str, Tensor], prefix: str) -> None:
    golden = [arrays[key] for key in sorted(arrays) if key.startswith(prefix)]
    for x, y in zip(ours, golden, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= 1e-4 * y.abs().max()


def test_golden_global(shared: Path) -> None:
    kwargs, arrays, maps = read_golden(shared / "golden/A", "A_gw")
    fused, weights = load_golden(GlobalFusion, kwargs, arrays)(maps)
    assert_near(fused, arrays, "out/fused/")
    assert_near([weights.flatten()], arrays, "out/mixing_softmax")


def test_golden_localized(shared: Path) -> None:
    kwargs, arrays, maps = read_golden(shared / "golden/A", "A_lw")
    own = {"temperature": kwargs["gating_tempature"], "reference_slicing": True}
    fused, weights = load_golden(LocalizedFusion, kwargs, arrays, **own)(maps)
    assert_near(fused, arrays, "out/fused/")
    assert_near(weights, arrays, "out/gating/")


def test_golden_moe_from_warmup_to_top_k(shared: Path) -> None:
    kwargs, arrays, maps = read_golden(shared / "golden/A", "A_moe_transition")
    own = {"experts": kwargs["num_experts"], "top_k": kwargs["top_k"], "warmup_steps": kwargs["warmup_steps"]}
    fusion = load_golden(MoEFusion, kwargs, arrays, **own, reference_counting=True)
    assert_near(fusion(maps)[0], arrays, "out/fused/")
    fused, shares = fusion(maps)
    assert_near(fused, arrays, "out2/fused/")
    for i, step in enumerate(kwargs["save_timesteps"][1:], start=1):  # the top-k branch starts at the second
        best = arrays[f"out2/per_call/0/{step}/topk_indices"]
        assert torch.equal(shares[0][:, i].topk(2).indices, best)
