"""Settings of labels and of splits. Every field is explained in pipeline.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeInt, Tag, model_validator

from satdifuser.store.settings import Settings

Share = Annotated[float, Field(ge=0, le=1)]


class SplitShares(Settings):
    """Shares of a seeded random split."""

    train: Share = 0.6
    val: Share = 0.2
    test: Share = 0.2
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def check_sum(self) -> SplitShares:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            shares = f"train {self.train:g} + val {self.val:g} + test {self.test:g}"
            raise ValueError(f"{shares} must be 1, got {total:g}")
        return self


class RandomSplit(SplitShares):
    """Tiles are drawn one by one, wherever they lie."""

    kind: Literal["random"] = "random"


class SpatialBlocks(SplitShares):
    """Square blocks of ground are drawn, with all their tiles."""

    kind: Literal["spatial_blocks"]
    size_m: Annotated[float, Field(gt=0)]
    buffer_m: Annotated[float, Field(ge=0)] = 0.0


class SpatialFolds(Settings):
    """As many partitions as folds: each tests on other blocks of ground."""

    kind: Literal["spatial_folds"]
    size_m: Annotated[float, Field(gt=0)]
    buffer_m: Annotated[float, Field(ge=0)] = 0.0
    folds: Annotated[int, Field(ge=3, le=100)] = 5
    seed: NonNegativeInt = 0


def kind_of(split: Any) -> str:
    """The kind of a split as it stands in a file, random where it names none."""
    if isinstance(split, dict):
        return str(split.get("kind", "random"))
    return str(getattr(split, "kind", split))


AnySplit = Annotated[
    Annotated[RandomSplit, Tag("random")]
    | Annotated[SpatialBlocks, Tag("spatial_blocks")]
    | Annotated[SpatialFolds, Tag("spatial_folds")],
    Discriminator(kind_of),
]
SplitOrKeep = Annotated[
    Annotated[RandomSplit, Tag("random")]
    | Annotated[SpatialBlocks, Tag("spatial_blocks")]
    | Annotated[SpatialFolds, Tag("spatial_folds")]
    | Annotated[Literal["keep"], Tag("keep")],
    Discriminator(kind_of),
]


class VectorSettings(Settings):
    """How polygons and points become labels of pixels."""

    column: str = "class"
    layer: str | None = None
    touch: Literal["centre", "all"] = "centre"
    overlaps: Literal["ignore", "first", "last"] = "ignore"
    invalid: Literal["repair", "refuse"] = "repair"
    unknown: Literal["refuse", "ignore"] = "refuse"


class LabelSettings(VectorSettings):
    """How the labels of a store are made after its extraction."""

    classes: Path | None = None
    per_tile: Literal[False, "majority", "containing"] = False
    split: SplitOrKeep = RandomSplit()
