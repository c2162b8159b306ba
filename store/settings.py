"""The strict base of every settings model, and the store's own settings."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

PARTITION_NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"

Encoding = Literal["float32", "float16", "rounded", "int8", "int4", "reduced"]


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values are validated, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class StoreSettings(Settings):
    """How features are kept on disk."""

    path: str = "features.zarr"
    encoding: Encoding = "int8"
    pool: PositiveInt | dict[PositiveInt, PositiveInt] = 2
    tiles_per_shard: PositiveInt | Literal["auto"] = "auto"
    previews: bool = True
    latents: bool = True
    license: str = ""
    citation: str = ""

    def pool_of(self, stride: int) -> int:
        """Pixels a side of the windows that maps of a stride are averaged over before they are kept."""
        if self.encoding != "reduced":
            return 1
        return self.pool if isinstance(self.pool, int) else self.pool.get(stride, 1)
