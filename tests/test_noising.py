"""Timesteps, the DDIM algebra and the seeded noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from satdifuser.errors import BackboneError, SettingsError
from satdifuser.extract.noising import (
    CLEAN,
    PRESETS,
    add_noise,
    alpha_bar,
    check_timesteps,
    inversion_grid,
    invert_step,
    noise_level,
    resolve_timesteps,
    split_prediction,
    tile_noise,
)

LEVEL = noise_level(torch.tensor([0.7], dtype=torch.float64), 0)


def draw(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


def test_grids_equal_the_reference(shared: Path) -> None:
    table = json.loads((shared / "golden/D/D_timesteps_table.json").read_text())
    alphas = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).alphas_cumprod
    assert table
    for steps, case in table.items():
        grid = inversion_grid(1000, int(steps), 1)
        assert grid[: len(case["t_per_call"])] == case["t_per_call"]
        for saved, t in case["t_of_saved"].items():
            position = int(steps) - 1 - int(saved)
            assert grid[position] == t
            assert float(alpha_bar(alphas, grid[position])) == pytest.approx(case["alpha_of_saved"][saved])


def test_grid_and_presets() -> None:
    assert inversion_grid(1000, 50, 1)[:4] == [CLEAN, 1, 21, 41]
    assert inversion_grid(1000, 50, 1)[-1] == 961
    assert resolve_timesteps("released") == PRESETS["released"] == [21, 61, 161]
    assert resolve_timesteps([161, 21]) == [21, 161]
    for preset in PRESETS.values():
        check_timesteps(preset, "inversion", 1000, 50, 1)
        check_timesteps(preset, "forward", 1000, 50, 1)


@pytest.mark.parametrize(
    ("timesteps", "noising", "steps", "message"),
    [
        ([-1, 5, 1000], "forward", 50, r"got \[-1, 1000\], expected values from 0 to 999"),
        ([21, 50], "inversion", 50, r"50 is not on .*\.steps 50 \(-1, 1, 21, … 961\); nearest: 41 and 61"),
        ([990], "inversion", 50, "nearest: 941 and 961"),
        ([21], "inversion", 2, r"steps 2 \(-1, 1, … 1\); nearest: -1 and 1"),
        ([21], "inversion", 1, r"steps 1 \(-1, … -1\); nearest: -1 and -1"),
    ],
)
def test_unreachable_timesteps(timesteps: list[int], noising: str, steps: int, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_timesteps(timesteps, noising, 1000, steps, 1)


def test_both_predictions_split_into_the_same_parts() -> None:
    x0, epsilon = draw(0), draw(1)
    x = add_noise(x0, epsilon, LEVEL)
    velocity = LEVEL.signal * epsilon - LEVEL.noise * x0
    for output, kind in ((epsilon, "epsilon"), (velocity, "v_prediction")):
        torch.testing.assert_close(
            split_prediction(output, x, LEVEL, kind), (x0, epsilon), atol=1e-5, rtol=1e-5
        )


def test_unknown_prediction_type() -> None:
    with pytest.raises(BackboneError, match="prediction_type is 'sample', expected epsilon or v_prediction"):
        split_prediction(draw(0), draw(1), LEVEL, "sample")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inversion_step_is_undone_by_a_ddim_step(kind: str) -> None:
    scheduler = DDIMScheduler(steps_offset=1, prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(50)
    x0, epsilon = draw(0), draw(1)
    low, high = (noise_level(scheduler.alphas_cumprod.double(), t) for t in (141, 161))
    x = add_noise(x0, epsilon, low)
    down = high.signal * epsilon - high.noise * x0
    low_output = low.signal * epsilon - low.noise * x0
    up = invert_step(x, epsilon if kind == "epsilon" else low_output, low, high, kind)
    back = scheduler.step(epsilon if kind == "epsilon" else down, 161, up).prev_sample
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)


def test_forward_marginal_equals_the_scheduler() -> None:
    scheduler = DDIMScheduler()
    ours = add_noise(draw(0), draw(1), noise_level(scheduler.alphas_cumprod.double(), 161))
    torch.testing.assert_close(ours, scheduler.add_noise(draw(0), draw(1), torch.tensor([161, 161])))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.text(max_size=20), st.integers(0, 9))
def test_noise_is_a_function_of_its_name(seed: int, tile_id: str, index: int) -> None:
    first = tile_noise(seed, tile_id, "noise", index, (2, 3))
    assert torch.equal(first, tile_noise(seed, tile_id, "noise", index, (2, 3)))
    for other in (
        (seed + 1, tile_id, "noise", index),
        (seed, tile_id + "x", "noise", index),
        (seed, tile_id, "latent", index),
        (seed, tile_id, "noise", index + 1),
    ):
        assert not torch.equal(first, tile_noise(*other, (2, 3)))


def test_noise_is_standard_normal() -> None:
    noise = tile_noise(0, "a", "noise", 0, (4, 100, 100))
    assert noise.dtype == torch.float32
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
