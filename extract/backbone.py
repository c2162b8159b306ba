"""Loads a frozen latent diffusion model from a diffusers folder, a hub id, or the package itself."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
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
from satdifuser.extract.device import to_device
from satdifuser.extract.images import resolve_image_size
from satdifuser.extract.layers import layer_table
from satdifuser.extract.settings import BackboneSettings, Size
from satdifuser.extract.unet import Conditions, SatUNet
from satdifuser.store.device import check_dtype, choose_device
from satdifuser.store.schema import LayerInfo

EMBEDDED = "embedded"
PROMPT_FILE = "prompt_embedding.safetensors"
# Both libraries report every unused key and every file; what matters is checked here and raised.
diffusers_logging.set_verbosity_error()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
COMPONENTS = {"vae": "config.json", "scheduler": "scheduler_config.json"}


@dataclass(frozen=True)
class BackboneInfo:
    """What is known of a backbone from its configuration alone."""

    name: str
    folder: Path
    unet_folder: Path
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
    def reads_metadata(self) -> bool:
        """Whether this is DiffusionSat's U-Net with its metadata embeddings."""
        return bool(self.unet_config.get("use_metadata"))

    @property
    def trained_size(self) -> int | None:
        """Image size in pixels that a folder of DiffusionSat's names, as in ``resolution256``."""
        named = re.fullmatch(r"resolution(\d+)", self.folder.resolve().name)
        return int(named[1]) if named else None

    @property
    def train_steps(self) -> int:
        """Noise levels of the schedule."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def steps_offset(self) -> int:
        """First timestep of a leading-spaced schedule."""
        return int(self.scheduler.config.steps_offset)

    def image_size(self, asked: str | Size, tile_size: tuple[int, int]) -> tuple[int, int]:
        """The (H, W) px at which this backbone sees tiles; ``auto`` is the trained size where it is known.

        Args:
            asked: "auto", N or (H, W).
            tile_size: (H, W) px of the tiles.

        Raises:
            SettingsError: a size is no multiple of the stride, or ``auto`` would shrink the tiles.
        """
        if asked == "auto" and self.trained_size:
            if max(tile_size) > self.trained_size:
                raise SettingsError(
                    f"extract.image_size: auto is {self.trained_size} px for {self.name}, but the tiles are "
                    f"{tile_size[0]} x {tile_size[1]} px and would be shrunk; set source.tile_size to "
                    f"{self.trained_size} or less, or extract.image_size to the size you want"
                )
            asked = self.trained_size
        return resolve_image_size(asked, tile_size, self.coarsest_stride)

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images of this (H, W) size in pixels."""
        height, width = (side // self.latent_stride for side in image_size)
        return int(self.vae_config["latent_channels"]), height, width

    def layers(self, image_size: tuple[int, int]) -> list[LayerInfo]:
        """All tappable layers for images of this (H, W) size in pixels."""
        size = self.latent_shape(image_size)[1:]
        return layer_table(UNet2DConditionModel, self.unet_config, size, self.latent_stride)


@dataclass(frozen=True)
class LoadedModel:
    """What is known of a backbone only once it is loaded, as a worker tells it."""

    weights_digest: str
    prompt_digest: str
    device: str  # cpu or cuda


@dataclass(frozen=True)
class Backbone:
    """A loaded backbone, frozen, on its device."""

    info: BackboneInfo
    unet: nn.Module
    vae: Any
    prompt: (
        Tensor  # (1, tokens, C) hidden states of the one prompt, or (B, tokens, C) one per image of a batch
    )
    negative: Tensor | None  # (1, tokens, C) of the prompt that guidance leads away from
    alphas: Tensor  # (train steps,) float64, cumulative products of alphas
    weights_digest: str
    device: torch.device
    dtype: torch.dtype

    def conditions(self, images: int, metadata: Tensor | None = None, first: int = 0) -> Conditions:
        """What the U-Net is told of some images.

        Args:
            images: Their number.
            metadata: (images, 7) normalised.
            first: The place of the first one in its batch, where each place has a prompt of its own.
        """
        several = len(self.prompt) > 1
        prompt = self.prompt[first : first + images] if several else self.prompt.expand(images, -1, -1)
        return Conditions(prompt, None if metadata is None else to_device(metadata, self.device))

    def negative_conditions(self, conditions: Conditions) -> Conditions:
        """The negative prompt for as many images; DiffusionSat's own guidance drops all metadata with it."""
        if self.negative is None:
            raise SettingsError(
                f"extract.guidance: {self.info.name} has a fixed prompt embedding and no text encoder for a "
                "negative prompt; set extract.guidance: false or use a backbone with a text encoder"
            )
        dropped = None if conditions.metadata is None else torch.zeros_like(conditions.metadata)
        return Conditions(self.negative.expand(len(conditions.prompt), -1, -1), dropped)

    @property
    def loaded(self) -> LoadedModel:
        """What identifies it."""
        return LoadedModel(self.weights_digest, tensor_digest(self.prompt), self.device.type)

    def to(self, dtype: torch.dtype) -> Backbone:
        """Turn the networks into another dtype, in place: this backbone as it is then."""
        negative = None if self.negative is None else self.negative.to(dtype)
        return replace(
            self,
            unet=self.unet.to(dtype),
            vae=self.vae.to(dtype),
            prompt=self.prompt.to(dtype),
            negative=negative,
            dtype=dtype,
        )

    @torch.no_grad()
    def encode(self, rgb: Tensor, noise: Tensor | None) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to scaled latents (B, c, h, w).

        Args:
            rgb: Images.
            noise: Standard normal (B, c, h, w) to sample the posterior with; None takes its mode.
        """
        images = (2 * to_device(rgb, self.device) - 1).to(self.dtype)
        posterior = self.vae.encode(images).latent_dist
        z = posterior.mode() if noise is None else posterior.mean + posterior.std * noise
        scaled: Tensor = z * self.vae.config.scaling_factor
        return scaled


def find_backbone(settings: BackboneSettings) -> BackboneInfo:
    """Find a backbone and read its configuration; no weights are read.

    Raises:
        SettingsError: there is no such folder or hub id.
        BackboneError: a component is missing.
    """
    folder = _locate(settings.model)
    unet_folder = _find_unet(folder)
    missing = [f"{part}/{name}" for part, name in COMPONENTS.items() if not (folder / part / name).is_file()]
    if not (unet_folder / "config.json").is_file():
        missing.append("unet/config.json (or checkpoint-*/unet/config.json)")
    if not (folder / PROMPT_FILE).is_file():
        texts = ("text_encoder/config.json", "tokenizer/tokenizer_config.json")
        missing += [name for name in texts if not (folder / name).is_file()]
    if missing:
        raise BackboneError(
            f"backbone.model {settings.model}: {folder} lacks {', '.join(missing)}; expected a diffusers "
            f"folder with unet, vae, scheduler, text_encoder and tokenizer{_hint(folder)}"
        )
    info = BackboneInfo(
        name=settings.model,
        folder=folder,
        unet_folder=unet_folder,
        unet_config=_read_config(unet_folder / "config.json"),
        vae_config=_read_config(folder / "vae/config.json"),
        scheduler=DDIMScheduler.from_config(_read_config(folder / "scheduler/scheduler_config.json")),
    )
    if settings.metadata and not info.reads_metadata:
        raise SettingsError(
            f"backbone.metadata: true, but the U-Net of {settings.model} has no metadata embeddings; set it "
            "to false, or name a folder of DiffusionSat"
        )
    return info


def _find_unet(folder: Path) -> Path:
    """The newest ``checkpoint-*/unet`` of a DiffusionSat folder, else ``unet``."""
    checkpoints = {
        int(path.parent.name.removeprefix("checkpoint-")): path
        for path in folder.glob("checkpoint-*/unet")
        if path.parent.name.removeprefix("checkpoint-").isdecimal()
    }
    return checkpoints[max(checkpoints)] if checkpoints else folder / "unet"


def _hint(folder: Path) -> str:
    """Where a folder holds whole backbones instead of being one."""
    inner = sorted(path.name for path in folder.glob("resolution*") if path.is_dir())
    return f"; name one of its folders {', '.join(inner)}" if inner else ""


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: not a readable JSON file: {error}; copy the checkpoint anew") from error
    return config


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
        SettingsError: the device is not there, or cannot compute with the dtype.
        BackboneError: the weights cannot be read.
    """
    device = choose_device(settings.device, "backbone.device")
    dtype: torch.dtype = getattr(torch, settings.dtype)
    instead = "use float16 (with backbone.overflow: widen where a layer overflows) or float32"
    check_dtype(device, dtype, "backbone.dtype", instead)
    unet = load_unet(info.unet_folder, settings.metadata)
    vae = load_vae(info.folder / "vae")
    prompts = [settings.prompt] if isinstance(settings.prompt, str) else settings.prompt
    prompt, negative = _embed_prompts(info, prompts, settings.negative_prompt)
    digest = _digest(unet, vae)
    return Backbone(
        info=info,
        unet=_placed(unet, device, dtype),
        vae=_placed(vae, device, dtype),
        prompt=prompt.to(device, dtype),
        negative=None if negative is None else negative.to(device, dtype),
        alphas=info.scheduler.alphas_cumprod.double(),
        weights_digest=digest,
        device=device,
        dtype=dtype,
    )


def _placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Bring a model to its device; a GPU convolves fastest with the channels last.

    On CPUs that makes the autoencoder 1.4 times as fast, but a tile's last bits then depend on the other
    tiles of its batch.
    """
    on_gpu = device.type == "cuda"
    placed: Any = model.to(device, dtype)
    return placed.to(memory_format=torch.channels_last) if on_gpu else placed


def load_unet(folder: Path, metadata: bool) -> Any:
    """Load a U-Net in float32, frozen; with its metadata embeddings if asked for.

    Raises:
        BackboneError: the weights cannot be read, or are not those that config.json describes.
    """
    return _load(SatUNet if metadata else UNet2DConditionModel, folder)


def load_vae(folder: Path) -> Any:
    """Load an autoencoder in float32, frozen, its attention keys in old or new naming.

    Raises:
        BackboneError: the weights cannot be read, or are not those that config.json describes.
    """
    return _load(AutoencoderKL, folder)


def _load(model_class: Any, folder: Path) -> Any:
    try:
        model, report = model_class.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below
        )
    except Exception as error:  # diffusers raises many kinds; the cause is kept
        raise BackboneError(
            f"{folder}: cannot load the weights: {error}; copy or convert the checkpoint anew"
        ) from error
    # DiffusionSat's metadata embeddings are left aside where backbone.metadata is false
    unknown = [name for name in report["unexpected_keys"] if not name.startswith("metadata_embedding.")]
    mismatched = [
        f"{name} {list(seen)} instead of {list(expected)}"
        for name, seen, expected in report["mismatched_keys"]
    ]
    for what, names in (
        ("lack {} tensors that config.json asks for", report["missing_keys"]),
        ("hold {} tensors that config.json knows nothing of", unknown),
        ("hold {} tensors of other shapes than config.json says", mismatched),
    ):
        if names:  # diffusers would leave them at random values, or drop them
            raise BackboneError(
                f"{folder}: the weights {what.format(len(names))}, e.g. {min(names)}; expected a complete "
                "checkpoint of this model with its own config.json"
            )
    return model.eval().requires_grad_(False)


def _embed_prompts(info: BackboneInfo, prompts: list[str], negative: str) -> tuple[Tensor, Tensor | None]:
    """Hidden states of all tokens of the prompts and of the negative one, or the backbone's own embedding."""
    fixed = info.folder / PROMPT_FILE
    if fixed.is_file():
        return load_file(fixed)["hidden_states"], None
    tokenizer = transformers.CLIPTokenizer.from_pretrained(info.folder / "tokenizer", local_files_only=True)
    encoder = transformers.CLIPTextModel.from_pretrained(
        info.folder / "text_encoder", local_files_only=True
    ).eval()
    length = tokenizer.model_max_length
    texts = [*prompts, negative]
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(tokens.input_ids).last_hidden_state.float()
    return hidden[:-1], hidden[-1:]


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
