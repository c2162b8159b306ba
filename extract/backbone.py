"""Loads a frozen latent diffusion model from a diffusers folder, a hub id, or the package itself."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import Tensor, nn

from satdifuser.errors import BackboneError, SettingsError
from satdifuser.extract.layers import layer_table
from satdifuser.extract.settings import BackboneSettings
from satdifuser.store.schema import LayerInfo

EMBEDDED = "embedded"
PROMPT_FILE = "prompt_embedding.safetensors"
# Both libraries report every unused key and every file; what matters is checked here and raised.
diffusers_logging.set_verbosity_error()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
COMPONENTS = {
    "unet": "config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
}


@dataclass(frozen=True)
class BackboneInfo:
    """What is known of a backbone from its configuration alone."""

    name: str
    folder: Path
    unet_config: dict[str, Any]
    vae_config: dict[str, Any]
    scheduler: DDIMScheduler

    @property
    def latent_stride(self) -> int:
        """Image pixels per latent pixel."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def coarsest_stride(self) -> int:
        """Image pixels per pixel of the U-Net's coarsest map."""
        return int(self.latent_stride * 2 ** (len(self.unet_config["block_out_channels"]) - 1))

    @property
    def train_steps(self) -> int:
        """Noise levels of the schedule."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def steps_offset(self) -> int:
        """First timestep of a leading-spaced schedule."""
        return int(self.scheduler.config.steps_offset)

    def layers(self, image_size: tuple[int, int]) -> list[LayerInfo]:
        """All tappable layers for images of this (H, W) size in pixels."""
        latent = (image_size[0] // self.latent_stride, image_size[1] // self.latent_stride)
        return layer_table(UNet2DConditionModel, self.unet_config, latent, self.latent_stride)


@dataclass(frozen=True)
class Backbone:
    """A loaded backbone, frozen, on its device."""

    info: BackboneInfo
    unet: nn.Module
    vae: Any
    prompt: Tensor  # (1, tokens, C) hidden states of the one prompt
    alphas: Tensor  # (train steps,) float64, cumulative products of alphas
    weights_digest: str
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def encode(self, rgb: Tensor, noise: Tensor | None) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to scaled latents (B, c, h, w).

        Args:
            rgb: Images.
            noise: Standard normal (B, c, h, w) to sample the posterior with; None takes its mode.
        """
        posterior = self.vae.encode((2 * rgb - 1).to(self.device, self.dtype)).latent_dist
        z = posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
        scaled: Tensor = z * self.vae.config.scaling_factor
        return scaled


def find_backbone(settings: BackboneSettings) -> BackboneInfo:
    """Find a backbone and read its configuration; no weights are read.

    Raises:
        SettingsError: there is no such folder or hub id.
        BackboneError: a component is missing.
    """
    folder = _locate(settings.model)
    missing = [f"{part}/{name}" for part, name in COMPONENTS.items() if not (folder / part / name).is_file()]
    if not (folder / PROMPT_FILE).is_file():
        texts = ("text_encoder/config.json", "tokenizer/tokenizer_config.json")
        missing += [name for name in texts if not (folder / name).is_file()]
    if missing:
        raise BackboneError(
            f"backbone.model {settings.model}: {folder} lacks {', '.join(missing)}; expected a diffusers "
            "folder with unet, vae, scheduler, text_encoder and tokenizer"
        )
    return BackboneInfo(
        name=settings.model,
        folder=folder,
        unet_config=json.loads((folder / "unet/config.json").read_text()),
        vae_config=json.loads((folder / "vae/config.json").read_text()),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
    )


def _locate(model: str) -> Path:
    if model == EMBEDDED:
        return Path(str(files("satdifuser") / "weights" / "embedded"))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not folder.parent.is_dir():
        return _download(model)
    raise SettingsError(
        f"backbone.model: no folder {model}; expected 'embedded', a diffusers folder or a hub id"
    )


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["unet/*", "vae/*", "scheduler/*", "text_encoder/*", "tokenizer/*", PROMPT_FILE]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SettingsError(
            f"backbone.model: no folder {model}, and it cannot be fetched from the hub: {error}"
        ) from error


def load_backbone(info: BackboneInfo, settings: BackboneSettings) -> Backbone:
    """Load the weights of a backbone.

    Raises:
        SettingsError: the device is not there.
        BackboneError: the weights cannot be read.
    """
    device = resolve_device(settings.device)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    unet = _load(UNet2DConditionModel, info.folder / "unet")
    vae = _load(AutoencoderKL, info.folder / "vae")
    prompt = _prompt(info, settings.prompt)
    digest = _digest(unet, vae)
    return Backbone(
        info=info,
        unet=unet.to(device, dtype),
        vae=vae.to(device, dtype),
        prompt=prompt.to(device, dtype),
        alphas=info.scheduler.alphas_cumprod.double(),
        weights_digest=digest,
        device=device,
        dtype=dtype,
    )


def resolve_device(device: str) -> torch.device:
    """Choose the device: ``auto`` is a GPU where there is one.

    Raises:
        SettingsError: the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"backbone.device: {device!r} is not available here: {error}; use auto or cpu"
        ) from error
    return chosen


def _load(model_class: Any, folder: Path) -> Any:
    try:
        model, report = model_class.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises many kinds; the cause is kept
        raise BackboneError(f"{folder}: cannot load the weights: {error}") from error
    absent = sorted(report["missing_keys"])
    if absent:  # diffusers would leave them at random values
        raise BackboneError(
            f"{folder}: the weights lack {len(absent)} tensors that config.json asks for, e.g. {absent[0]}; "
            "expected a complete checkpoint of this model"
        )
    return model.eval().requires_grad_(False)


def _prompt(info: BackboneInfo, prompt: str) -> Tensor:
    """Hidden states of all the prompt's tokens, or the backbone's own fixed embedding."""
    fixed = info.folder / PROMPT_FILE
    if fixed.is_file():
        embedding: Tensor = load_file(fixed)["hidden_states"]
        return embedding
    tokenizer = transformers.CLIPTokenizer.from_pretrained(info.folder / "tokenizer", local_files_only=True)
    encoder = transformers.CLIPTextModel.from_pretrained(
        info.folder / "text_encoder", local_files_only=True
    ).eval()
    length = tokenizer.model_max_length
    tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden: Tensor = encoder(tokens.input_ids).last_hidden_state
    return hidden.float()


def _digest(*models: nn.Module) -> str:
    """SHA-256 over all weights in float32, by name: the same for .bin and .safetensors files."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.float().contiguous().numpy().data)
    return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's float32 values."""
    return hashlib.sha256(tensor.float().cpu().contiguous().numpy().data).hexdigest()
