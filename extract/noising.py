"""How a latent reaches the noise levels at which features are read (SatDiFuser, ICCV 2025, section 3).

`inversion` walks the deterministic DDIM trajectory backwards (Song et al. 2021, arXiv 2010.02502, eq. 12
with eta = 0); `forward` draws the closed-form marginal (Ho et al. 2020, arXiv 2006.11239, eq. 4).
A timestep of -1 stands for the clean latent, where the cumulative product of alphas is 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from satdifuser.errors import BackboneError, SettingsError

CLEAN = -1
PRESETS = {"released": [21, 61, 161], "paper": [1, 101, 201]}
SEED_RULE = "sha256(seed:tile_id:purpose:draw) -> Philox -> standard normal float32"


def resolve_timesteps(timesteps: Sequence[int] | str) -> list[int]:
    """Look up a preset's timesteps, or take the given ones in ascending order."""
    return PRESETS[timesteps] if isinstance(timesteps, str) else sorted(timesteps)


def inversion_grid(train_steps: int, steps: int, offset: int) -> list[int]:
    """The timesteps that DDIM inversion feeds to the network, in order.

    Args:
        train_steps: Noise levels of the scheduler, usually 1000.
        steps: Inversion steps N over the whole schedule.
        offset: The scheduler's ``steps_offset``.

    Returns:
        -1 and the first N - 1 of the N leading-spaced timesteps: for 1000, 50, 1: -1, 1, 21, 41, …, 961.
    """
    spacing = train_steps // steps
    return [CLEAN, *(i * spacing + offset for i in range(steps - 1))]


def check_timesteps(
    timesteps: Sequence[int], noising: str, train_steps: int, steps: int, offset: int
) -> None:
    """Refuse timesteps that the noising cannot reach with this backbone's schedule.

    Raises:
        SettingsError: naming the nearest ones that it can.
    """
    if noising == "forward":
        wrong = [t for t in timesteps if not 0 <= t < train_steps]
        if wrong:
            raise SettingsError(
                f"extract.timesteps: got {wrong}, expected values from 0 to {train_steps - 1}"
            )
        return
    if steps > train_steps:
        raise SettingsError(
            f"extract.steps: got {steps}, expected at most {train_steps}, the noise levels of the scheduler"
        )
    grid = inversion_grid(train_steps, steps, offset)
    for t in timesteps:
        if t not in grid:
            nearest = sorted(sorted(grid, key=lambda g: abs(g - t))[:2])
            raise SettingsError(
                f"extract.timesteps: {t} is not on the inversion grid of extract.steps {steps} "
                f"({', '.join(map(str, grid[:3]))}, … {grid[-1]}); nearest: {nearest[0]} and {nearest[-1]}"
            )


@dataclass(frozen=True)
class Level:
    """One noise level on the backbone's device, so that no step of a loop waits for the device.

    ``time`` (1,) float32 is what the network is told; ``signal`` and ``noise``, scalars of the latents'
    dtype, are sqrt(ᾱ) and sqrt(1 - ᾱ).
    """

    time: Tensor
    signal: Tensor
    noise: Tensor


def noise_level(
    alphas: Tensor, t: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Level:
    """Prepare a noise level.

    Args:
        alphas: (train steps,) float64, cumulative products of alphas.
        t: The timestep; at -1, the clean latent, the product is 1.
        dtype: Of the latents.
        device: Where they are.
    """
    alpha = alpha_bar(alphas, t)
    parts = alpha.sqrt().to(device, dtype), (1 - alpha).sqrt().to(device, dtype)
    return Level(torch.full((1,), float(t), device=device), *parts)


def alpha_bar(alphas: Tensor, t: int) -> Tensor:
    """Cumulative product of alphas at a timestep, () float64; 1 at the clean latent."""
    return alphas.new_ones(()) if t == CLEAN else alphas[t]


def split_prediction(output: Tensor, x: Tensor, level: Level, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Read a network's output as (x0, epsilon).

    Args:
        output: What the network returned for x, (B, c, h, w).
        x: Its noisy input.
        level: The input's noise level.
        prediction_type: ``epsilon``, or ``v_prediction`` (Salimans & Ho 2022, arXiv 2202.00512).
    """
    signal, noise = level.signal, level.noise
    if prediction_type == "epsilon":
        return (x - noise * output) / signal, output
    if prediction_type == "v_prediction":
        return signal * x - noise * output, signal * output + noise * x
    raise BackboneError(
        f"the scheduler's prediction_type is {prediction_type!r}, expected epsilon or v_prediction"
    )


def invert_step(x: Tensor, output: Tensor, level: Level, next_level: Level, prediction_type: str) -> Tensor:
    """One DDIM inversion step: x at one noise level to x at the next."""
    x0, epsilon = split_prediction(output, x, level, prediction_type)
    return add_noise(x0, epsilon, next_level)


def add_noise(z0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """The forward marginal at one noise level: sqrt(ᾱ) z0 + sqrt(1 - ᾱ) noise."""
    return level.signal * z0 + level.noise * noise


def tile_noise(seed: int, tile_id: str, purpose: str, draw: int, shape: Sequence[int]) -> Tensor:
    """Standard normal noise that depends on (seed, tile_id, purpose, draw) only.

    Args:
        seed: The job's seed.
        tile_id: The tile.
        purpose: ``noise`` or ``latent``, so that the two never coincide.
        draw: Index of the draw.
        shape: Shape of the result.

    Returns:
        float32 on the CPU, the same whatever batch, worker or device uses it.
    """
    digest = hashlib.sha256(f"{seed}:{tile_id}:{purpose}:{draw}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
