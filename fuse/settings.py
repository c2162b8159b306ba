"""Settings of fusion, head and training. Every field is explained in pipeline.yaml."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from satdifuser.errors import SettingsError
from satdifuser.store.settings import Settings

FusionName = Literal["global", "localized", "moe"]
HeadName = Literal["linear", "upernet"]
Task = Literal["classification", "multilabel", "segmentation"]


def check_norm_groups(projection: int, norm_groups: int) -> None:
    """Refuse group norms that do not fit the bottlenecks, whose inner width is P/4.

    Raises:
        SettingsError: If P is no multiple of 4, or the groups do not divide P/4.
    """
    if projection % 4:
        raise SettingsError(f"projection is {projection}, but must be a multiple of 4, such as 96 or 384")
    narrow = projection // 4
    if narrow % norm_groups:
        valid = ", ".join(str(n) for n in range(1, narrow + 1) if narrow % n == 0)
        raise SettingsError(
            f"norm_groups is {norm_groups}, but must divide the projection {projection} and its quarter "
            f"{narrow}: choose one of {valid}"
        )


def check_top_k(top_k: int, experts: int) -> None:
    """Refuse a choice of more experts than there are.

    Raises:
        SettingsError: If ``top_k`` is not within 1 and ``experts``.
    """
    if not 1 <= top_k <= experts:
        raise SettingsError(f"top_k is {top_k}, but must be 1 to {experts}, the number of experts")


class FitSettings(Settings):
    """Which networks are trained from a store, and how."""

    task: Task | Literal["auto"] = "auto"
    partition: str = "auto"
    fusion: list[FusionName] = Field(default=["global", "localized", "moe"], min_length=1)
    head: HeadName | Literal["auto"] = "auto"
    projection: PositiveInt | Literal["auto"] = "auto"
    norm_groups: PositiveInt | Literal["auto"] = "auto"
    experts: PositiveInt = 8
    top_k: PositiveInt = 2
    warmup_steps: NonNegativeInt = 20
    epochs: PositiveInt = 8
    batch_size: PositiveInt = 16
    lr: PositiveFloat = 0.004
    warmup_epochs: NonNegativeInt = 1
    warmup_lr: PositiveFloat = 2e-5
    final_lr: PositiveFloat = 1e-5
    weight_decay: NonNegativeFloat = 0.0
    patience: PositiveInt = 10
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)
    normalise: bool = True
    reference_slicing: bool = False
    memory_gb: NonNegativeFloat = 4.0
    device_memory_gb: NonNegativeFloat = 0.0
    device: str = "auto"

    @field_validator("fusion", "seeds")
    @classmethod
    def check_unique(cls, values: list[Any]) -> list[Any]:
        twice = [str(value) for value, count in Counter(values).items() if count > 1]
        if twice:
            raise ValueError(f"name each value once, got {', '.join(twice)} twice or more")
        return values

    # A check of two fields stands at the later one, so that it is reported with all others.

    @field_validator("projection")
    @classmethod
    def check_projection(cls, projection: Any) -> Any:
        if projection != "auto":
            check_norm_groups(projection, 1)
        return projection

    @field_validator("norm_groups")
    @classmethod
    def check_groups(cls, norm_groups: Any, info: ValidationInfo) -> Any:
        projection = info.data.get("projection", "auto")
        if "auto" not in (projection, norm_groups):
            check_norm_groups(projection, norm_groups)
        return norm_groups

    @field_validator("top_k")
    @classmethod
    def check_chosen(cls, top_k: int, info: ValidationInfo) -> int:
        if "experts" in info.data:
            check_top_k(top_k, info.data["experts"])
        return top_k
