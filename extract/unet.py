"""DiffusionSat's U-Net, and what a U-Net is told beside the latents.

DiffusionSat (Khanna et al., ICLR 2024, arXiv 2312.03606) is Stable Diffusion's U-Net with one more embedding
per metadata field, all added to the embedding of the timestep.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from satdifuser.extract.metadata import FIELDS


@dataclass(frozen=True)
class Conditions:
    """What a U-Net is told of the B images of a batch."""

    prompt: Tensor  # (B, tokens, C) hidden states
    metadata: Tensor | None = None  # (B, 7) normalised, for `SatUNet`

    def repeat(self, times: int) -> Conditions:
        """Repeat each image's conditions, as its latents are repeated over timesteps."""
        metadata = None if self.metadata is None else self.metadata.repeat_interleave(times, dim=0)
        return Conditions(self.prompt.repeat_interleave(times, dim=0), metadata)

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of a U-Net's forward."""
        known = {"encoder_hidden_states": self.prompt}
        return known if self.metadata is None else known | {"added_cond_kwargs": {"metadata": self.metadata}}


class SatUNet(UNet2DConditionModel):  # type: ignore[misc]
    """DiffusionSat's U-Net with its metadata embeddings; without them it is `UNet2DConditionModel`."""

    # diffusers reads the signature to know the fields of config.json
    @wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        width = self.config.block_out_channels[0]
        self.metadata_embedding = nn.ModuleList(TimestepEmbedding(width, 4 * width) for _ in FIELDS)

    def get_aug_embed(
        self, emb: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: dict[str, Tensor]
    ) -> Tensor:
        """Sum of the metadata embeddings, which diffusers adds to that of the timestep: (B, 4 * width)."""
        metadata = added_cond_kwargs["metadata"]  # (B, 7)
        waves = self.time_proj(metadata.flatten()).unflatten(0, metadata.shape).to(emb.dtype)
        embedded = [embed(waves[:, i]) for i, embed in enumerate(self.metadata_embedding)]
        return torch.stack(embedded).sum(0)
