"""Settings of sources, backbone and extraction. Every field is explained in pipeline.yaml."""

from __future__ import annotations

from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from satdifuser.extract.geobench_datasets import RGB, SCALES
from satdifuser.labels.settings import AnySplit, RandomSplit, Share, SplitShares, VectorSettings
from satdifuser.store.settings import Settings


def parse_scale(value: Any) -> Any:
    """Read "1/4095" as a number; leave anything else to the model."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError("expected a number or a fraction such as 1/4095") from error
    return value


Scale = Annotated[float, BeforeValidator(parse_scale), Field(gt=0)]
Size = PositiveInt | tuple[PositiveInt, PositiveInt]


class ImageSettings(Settings):
    """How raw pixel values become RGB in [0, 1]: value * scale + offset of three bands."""

    bands: list[PositiveInt | str] | None = Field(default=None, min_length=3, max_length=3)
    scale: Scale | None = None
    offset: float = 0.0
    on_error: Literal["fail", "skip"] = "fail"


class FolderSettings(ImageSettings):
    """Images in one folder per class."""

    kind: Literal["folder"]
    root: Path
    splits: Path | None = None
    split_column: str = "split"
    split: SplitShares = SplitShares()
    tile_size: Size | None = None
    pad: bool = False


class PairsSettings(ImageSettings):
    """Images with index masks of the same size."""

    kind: Literal["pairs"]
    root: Path
    splits: Path | None = None
    split_column: str = "split"
    classes: Path | None = None
    tile_size: Size = 256
    min_valid: Share = 0.5
    pad: bool = False


class ScenesSettings(ImageSettings):
    """Georeferenced rasters cut into a grid of tiles."""

    kind: Literal["scenes"]
    root: Path
    tile_size: Size = 256
    overlap: NonNegativeInt = 0
    min_valid: Share = 0.5
    nodata: float | None = None
    labels: Path | None = None
    classes: Path | None = None
    vectors: VectorSettings = VectorSettings()
    split: AnySplit = RandomSplit()
    date: str | None = None
    cloud_cover: Share | None = None
    pad: bool = False

    @field_validator("date", mode="before")
    @classmethod
    def check_date(cls, date: Any) -> Any:
        """Keep what YAML read as a date or time as text again."""
        text = date.isoformat() if hasattr(date, "isoformat") else date
        if isinstance(text, str):
            datetime.fromisoformat(text)
        return text


class GeobenchSettings(ImageSettings):
    """A data set of GEO-Bench, as its package writes it."""

    kind: Literal["geobench"]
    root: Path
    dataset: str
    partition: str = "default"


class PythonSettings(ImageSettings):
    """A torch data set, or anything alike, that the user's own code makes."""

    kind: Literal["python"]
    target: str
    kwargs: dict[str, JsonValue] = Field(default={})  # JSON, as the store keeps them
    splits: dict[Literal["train", "val", "test", "none"], dict[str, JsonValue]] | None = Field(
        default=None, min_length=1
    )
    split: SplitShares = SplitShares()
    classes: list[str] | None = Field(default=None, min_length=1)
    ignore_index: int = 255

    @field_validator("target")
    @classmethod
    def check_target(cls, target: str) -> str:
        words = target.replace(":", ".").split(".")
        if target.count(":") != 1 or not all(map(str.isidentifier, words)):
            raise ValueError("expected package.module:name, the name of a data set's class or of a function")
        return target


class SyntheticSettings(Settings):
    """Generated land-cover scenes: no data needed."""

    kind: Literal["synthetic"] = "synthetic"
    task: Literal["classification", "segmentation"] = "classification"
    tiles: PositiveInt = 900
    tile_size: Size = 64
    seed: NonNegativeInt = 0
    split: SplitShares = SplitShares()


SourceSettings = Annotated[
    FolderSettings | GeobenchSettings | PairsSettings | PythonSettings | ScenesSettings | SyntheticSettings,
    Field(discriminator="kind"),
]


def image_settings(source: Settings) -> ImageSettings:
    """How a source's raw values become RGB; generated scenes are plain 8-bit RGB."""
    if isinstance(source, GeobenchSettings):
        scale = SCALES.get(source.dataset) if source.scale is None else source.scale
        return source.model_copy(update={"bands": source.bands or list(RGB), "scale": scale})
    return source if isinstance(source, ImageSettings) else ImageSettings()


class BackboneSettings(Settings):
    """Which frozen diffusion model, and how it runs."""

    model: str = "embedded"
    prompt: str | list[str] = "A satellite image"
    negative_prompt: str = ""
    metadata: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    overflow: Literal["stop", "widen"] = "stop"
    device: str = "auto"

    @property
    def widens(self) -> bool:
        """Whether what overflows is computed anew in float32; this waits for every batch."""
        return self.overflow == "widen" and self.dtype != "float32"


class ExtractSettings(Settings):
    """Which features are taken from the backbone."""

    layers: list[str] = Field(default=["up_blocks.*.attn1", "up_blocks.*.conv2"], min_length=1)
    noising: Literal["forward", "inversion"] = "forward"  # stands first: the timesteps are checked by it
    timesteps: list[int] | Literal["released", "paper"] = "released"
    steps: PositiveInt = 50
    draws: PositiveInt = 1
    latent: Literal["mode", "sample"] = "mode"
    prediction: Literal["scheduler", "epsilon"] = "scheduler"
    guidance: Literal[False] | Annotated[float, Field(strict=True)] = False
    image_size: Literal["auto"] | Size = "auto"
    seed: NonNegativeInt = 0
    batch_size: PositiveInt | Literal["auto"] = "auto"
    threads: PositiveInt | Literal["auto"] = "auto"
    compile: bool = False
    read_threads: PositiveInt | Literal["auto"] = "auto"
    read_processes: bool | Literal["auto"] = "auto"

    @field_validator("guidance")
    @classmethod
    def check_guidance(cls, guidance: float | Literal[False], info: ValidationInfo) -> float | Literal[False]:
        if guidance is not False and info.data.get("noising") == "forward":
            raise ValueError(
                "guidance steers the inversion; set extract.noising: inversion, or guidance: false"
            )
        return guidance

    @field_validator("timesteps")
    @classmethod
    def check_timesteps(cls, timesteps: list[int] | str, info: ValidationInfo) -> list[int] | str:
        """What can be told without a backbone; `noising.check_timesteps` tells the rest."""
        if isinstance(timesteps, str):
            return timesteps
        lowest = 0 if info.data.get("noising") == "forward" else -1  # inversion starts at the clean latent
        if not timesteps or len(set(timesteps)) < len(timesteps) or min(timesteps) < lowest:
            raise ValueError(f"expected one or more timesteps of at least {lowest}, each named once")
        return timesteps
