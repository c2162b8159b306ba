"""The strict base of every settings model, and the store's own settings."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

Encoding = Literal["float32", "float16", "int8"]


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values are validated, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class StoreSettings(Settings):
    """How features are kept on disk."""

    path: str = "features.zarr"
    encoding: Encoding = "int8"
    tiles_per_shard: PositiveInt | Literal["auto"] = "auto"
    previews: bool = True
