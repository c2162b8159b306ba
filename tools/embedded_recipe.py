"""Every choice in the training of the embedded backbone; the defaults are what ships."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run."""

    # What the U-Net sees of an image
    latents: Literal["vae", "patches"] = (
        "vae"  # patches of 4 x 4 px in fixed linear coordinates, nothing learned
    )
    components: int = 48  # patches: principal components that are kept; of 48 nothing is lost
    whitening: float = (
        0.0  # patches: power by which their spreads are evened out, 0: not at all, 1: all equal
    )
    size: int = 64  # px, side of the images and crops
    vae_channels: int = 4  # of the latents that a VAE makes
    vae_steps: int = 1000
    vae_batch: int = 64
    vae_crop: int = 32  # px
    vae_lr: float = 1e-3

    # The U-Net; finest level first
    channels: tuple[int, ...] = (48, 96, 128)
    heads: tuple[int, ...] = (2, 3, 4)  # of attention; 0: none at this level
    layers_per_block: int = 1
    prompt_width: int = 32

    # Its task
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    low_noise: int = 300  # features are read below this timestep,
    low_noise_share: float = 0.5  # so this share of the noise levels is drawn there
    min_snr: float = 0.0  # Hang et al. 2023 (arXiv 2303.09556), their gamma is 5; 0: plain mean squared error

    # Its training: warm-up, a constant rate, and a linear decay to 0 over the last steps
    steps: int = 16_000
    batch: int = 64
    crop: int = 16  # latent px; smaller than the latents: a random window of them
    turned: bool = True  # flips and quarter turns
    lr: float = 5e-4
    warmup: int = 100
    decay: int = 1_000
    weight_decay: float = 0.01
    average: float = 0.998  # decay of the moving average that is kept
    seed: int = 0

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.vae_channels if self.latents == "vae" else self.components

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step."""
        rise = (step + 1) / self.warmup
        fall = (self.steps - step) / self.decay
        return self.lr * min(1.0, rise, fall)
