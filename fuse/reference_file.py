"""Reads checkpoints of SatDiFuser's released training script: torch files of weights and settings.

The file is read weights-only with a closed list of types, so that nothing in it can run. Its settings are
an omegaconf tree, whose classes are taken in as `Node`: omegaconf itself is not needed.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import Tensor

from satdifuser.errors import RunError
from satdifuser.fuse.heads import POOL_SIZES
from satdifuser.fuse.settings import check_norm_groups, check_top_k

CLEAN = -1
"""The timestep that inversion feeds with the clean latent."""


class Node:
    """Stands in for a class of omegaconf: keeps the attributes that the file gives it."""


OMEGACONF = (
    "base.ContainerMetadata",
    "base.Metadata",
    "dictconfig.DictConfig",
    "listconfig.ListConfig",
    "nodes.AnyNode",
)
# The plain types are those that omegaconf's metadata names.
ADMITTED: list[Any] = [(Node, f"omegaconf.{name}") for name in OMEGACONF]
ADMITTED += [dict, list, int, defaultdict, (Node, "typing.Any")]


class ReferenceConfig(BaseModel):
    """The settings that shape a network of the script or its inputs, by the script's names and defaults."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: Literal["classification", "multi_label_classification", "segmentation"]
    fuser: Literal["gw", "lw", "moe"]
    num_classes: PositiveInt
    class_names: list[str] | None = Field(None, validation_alias=AliasChoices("class_names", "class_list"))

    projection_dim: PositiveInt = 384
    num_norm_groups: PositiveInt = 32
    num_res_blocks: PositiveInt = 1
    gating_tempature: PositiveFloat = 1.0  # spelt so in the released code
    num_experts: PositiveInt = 8
    top_k: PositiveInt = 2
    warmup_steps: PositiveInt | None = None
    channels: PositiveInt = 512
    pool_scales: list[int] = [*POOL_SIZES]
    rescales: list[float] = [1.0] * len(POOL_SIZES)
    align_corners: Literal[False] = False

    save_timesteps: list[NonNegativeInt] = [47, 45, 40]
    num_timesteps: PositiveInt = 50
    diffusion_mode: Literal["inversion", "generation"] = "inversion"
    layer_idxs: dict[str, dict[str, Any]] = {"up_blocks": {"attn1": "all", "conv2": "all"}}
    resize_outputs: int = -1
    img_size: PositiveInt | None = None
    prompt: str | list[str] = "A satellite image"

    seed: NonNegativeInt | None = None
    batch_size: PositiveInt = 32
    max_train_epochs: PositiveInt = 40
    lr: PositiveFloat = 0.01
    min_lr: PositiveFloat = 1e-5
    warmup_epochs: NonNegativeInt = 5
    op_weight_decay: NonNegativeFloat = 0.0

    @field_validator("pool_scales", "rescales")
    @classmethod
    def check_pyramid(cls, values: list[float], info: Any) -> list[float]:
        usual = POOL_SIZES if info.field_name == "pool_scales" else (1,) * len(values)
        if tuple(values) != usual[: len(values)]:
            raise ValueError(f"only {list(usual)} can be rebuilt")
        return values

    @field_validator("resize_outputs")
    @classmethod
    def check_scales(cls, size: int) -> int:
        if size > 0:
            raise ValueError("only -1 can be rebuilt; a store keeps every layer at its own size")
        return size

    @model_validator(mode="after")
    def check_fields_together(self) -> ReferenceConfig:
        check_norm_groups(self.projection_dim, self.num_norm_groups)
        check_top_k(self.top_k, self.num_experts)
        if not self.save_timesteps or max(self.save_timesteps) >= self.num_timesteps:
            raise ValueError(f"save_timesteps {self.save_timesteps} are not steps of {self.num_timesteps}")
        return self

    def timesteps(self, train_steps: int, offset: int) -> list[int]:
        """What the U-Net was fed at the saved steps, ascending.

        Args:
            train_steps: Noise levels of the scheduler, usually 1000.
            offset: The scheduler's ``steps_offset``.
        """
        spacing, last = train_steps // self.num_timesteps, self.num_timesteps - 1
        if self.diffusion_mode == "generation":  # noises once, to the level of its lowest saved step
            return [(last - min(self.save_timesteps)) * spacing + offset]
        steps = sorted(last - saved for saved in self.save_timesteps)
        # inversion starts from the clean latent, so that it is one step behind the scheduler's timesteps
        return [CLEAN if step == 0 else (step - 1) * spacing + offset for step in steps]


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """A checkpoint in memory."""

    path: Path
    sha256: str
    epoch: Any
    global_step: Any
    config: ReferenceConfig
    values: dict[str, Any]  # all settings, as plain values
    state: dict[str, Tensor]


def read_checkpoint(path: Path) -> ReferenceCheckpoint:
    """Read a checkpoint of the authors' training script; nothing that it holds is run.

    Args:
        path: A torch file with ``decoder_net`` (the weights) and ``config`` (omegaconf's or a plain dict).

    Raises:
        RunError: the file is missing, damaged, asks for other types, or lacks something.
    """
    held = load_closed(path)
    missing = [name for name in ("decoder_net", "config") if not isinstance(held, dict) or name not in held]
    if missing:
        raise RunError(
            f"{path}: lacks {' and '.join(missing)}; expected the dict that the authors' training script "
            "saves, with its weights as decoder_net and its settings as config"
        )
    state, values = held["decoder_net"], to_plain(held["config"])
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise RunError(f"{path}: decoder_net is no state dict; expected tensors by name")
    if not isinstance(values, dict):
        raise RunError(f"{path}: config is {type(values).__name__}, expected settings by name")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    epoch, step = (to_plain(held.get(name)) for name in ("epoch", "global_step"))
    return ReferenceCheckpoint(path, sha256, epoch, step, parse_config(path, values), values, state)


def load_closed(path: Path) -> Any:
    """Load a torch file that may hold tensors, plain values and omegaconf's containers, and nothing else."""
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(ADMITTED):
            warnings.simplefilter("ignore")  # of files that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, some of which advise to load without care
        asked = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if asked:
            raise RunError(
                f"{path}: asks for {asked[1]}, which is not among the types that a checkpoint may hold "
                "(tensors, plain values, omegaconf's containers); nothing in it was run. If you trust the "
                "file, save it anew with its config as a plain dict"
            ) from error
        raise RunError(
            f"{path}: is not a whole file of torch.save ({type(error).__name__}); copy the checkpoint anew"
        ) from error


def to_plain(value: Any) -> Any:
    """Turn a tree of nodes into dicts, lists, texts, numbers and None; anything else becomes its text."""
    if isinstance(value, Node):
        fields = vars(value)
        return to_plain(fields.get("_val", fields.get("_content")))
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def parse_config(path: Path, values: dict[str, Any]) -> ReferenceConfig:
    """Read the settings; null is as good as absent."""
    try:
        return ReferenceConfig.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise RunError(
            f"{path}: its config does not describe a network that can be rebuilt:\n" + "\n".join(lines)
        ) from error
