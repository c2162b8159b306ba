"""Settings of fusion, head and training. Every field is explained in pipeline.yaml."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationInfo,
    field_validator,
)

from satdifuser.errors import SettingsError
from satdifuser.store.few_labels import Budget, parse_budgets
from satdifuser.store.settings import Settings

FusionName = Literal["single", "concatenation", "global", "localized", "moe"]
HeadName = Literal["linear", "shortcut", "upernet"]
Precision = Literal["float32", "bfloat16", "float16"]
Task = Literal["classification", "multilabel", "segmentation"]
Head = HeadName | Literal["auto", "reference"]
LogName = Literal["none", "tensorboard", "wandb"]
Timesteps = Annotated[list[NonNegativeInt], Field(min_length=1)] | Literal["all"]
Patterns = Annotated[list[str], Field(min_length=1)]


def are_values(value: Any) -> bool:
    """Whether several values are given, not one."""
    return isinstance(value, list)


def are_lists(value: Any) -> bool:
    """Whether several lists are given (one of which may be the word all), not one."""
    return isinstance(value, list) and any(isinstance(part, list) or part == "all" for part in value)


# A union is decided before it is checked, so that an error speaks of what was meant.
ONE, SEVERAL = Tag("one"), Tag("several")
BY_VALUE = Discriminator(lambda value: "several" if are_values(value) else "one")
BY_LIST = Discriminator(lambda value: "several" if are_lists(value) else "one")
Heads = Annotated[
    Annotated[Head, ONE] | Annotated[list[Head], Field(min_length=1), SEVERAL],
    BY_VALUE,
]
Rates = Annotated[
    Annotated[PositiveFloat, ONE] | Annotated[list[PositiveFloat], Field(min_length=1), SEVERAL],
    BY_VALUE,
]
PatternLists = Annotated[Annotated[Patterns, ONE] | Annotated[list[Patterns], SEVERAL], BY_LIST]
TimestepLists = Annotated[Annotated[Timesteps, ONE] | Annotated[list[Timesteps], SEVERAL], BY_LIST]


OF_A_SWEEP = ("fusion", "seeds", "draws")
"""Settings of a sweep that a network is told apart by; they stand beside its own settings in run.json."""


WHEREABOUTS = ("memory_gb", "device_memory_gb", "networks_gb", "device", "log")
"""Settings of a training that change no value."""


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


class TrainingSettings(Settings):
    """What all networks of one sweep share."""

    task: Task | Literal["auto"] = "auto"
    partition: str = "auto"
    projection: PositiveInt | Literal["auto"] = "auto"
    norm_groups: PositiveInt | Literal["auto"] = "auto"
    experts: PositiveInt = 8
    top_k: PositiveInt = 2
    warmup_steps: NonNegativeInt = 20
    epochs: PositiveInt = 6
    batch_size: PositiveInt = 16
    warmup_epochs: NonNegativeInt = 1
    warmup_lr: PositiveFloat = 2e-5
    final_lr: PositiveFloat = 1e-5
    weight_decay: NonNegativeFloat = 0.0
    precision: Precision = "float32"
    patience: PositiveInt = 10
    min_steps: PositiveInt = 32
    normalise: bool = True
    reference_slicing: bool = False
    memory_gb: NonNegativeFloat = 4.0
    device_memory_gb: NonNegativeFloat | Literal["auto"] = "auto"
    networks_gb: NonNegativeFloat = 1.0
    device: str = "auto"
    log: LogName = "none"

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


class FitSettings(TrainingSettings):
    """How one network is trained."""

    head: Head = "auto"
    lr: PositiveFloat = 0.004
    layers: Patterns = Field(default=["*"])
    timesteps: Timesteps = "all"
    labels: str = ""
    shots: str = ""
    draw: NonNegativeInt = 0

    @property
    def budget(self) -> Budget:
        """How many labels may be used."""
        return parse_budgets(self.labels, self.shots)[0]


class SweepSettings(TrainingSettings):
    """The section `fit` of a pipeline file: every combination of its lists becomes a network."""

    fusion: list[FusionName] = Field(default=["global", "localized", "moe"], min_length=1)
    head: Heads = "auto"
    lr: Rates = 0.004
    layers: PatternLists = Field(default=["*"])
    timesteps: TimestepLists = "all"
    labels: str = ""
    shots: str = ""
    draws: PositiveInt = 1
    seeds: list[NonNegativeInt] = Field(default=[0], min_length=1)

    @field_validator("shots", mode="before")
    @classmethod
    def as_text(cls, value: Any) -> Any:
        """One number alone is read as such by YAML."""
        return str(value) if isinstance(value, int) else value

    @field_validator("labels", "shots")
    @classmethod
    def check_budgets(cls, text: str, info: ValidationInfo) -> str:
        parse_budgets(**{str(info.field_name): text})
        return text

    @field_validator("fusion", "head", "lr", "layers", "timesteps", "seeds")
    @classmethod
    def check_unique(cls, values: Any) -> Any:
        twice = [value for value in values if values.count(value) > 1] if isinstance(values, list) else []
        if twice:
            raise ValueError(f"name each value once, got {twice[0]} twice or more")
        return values
