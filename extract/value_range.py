"""Whether source.scale and source.offset fit: a wrong scale clips values or leaves the tiles all but black.

Neither is an error, since clouds may saturate and water may be dark: people are told, and decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from satdifuser.extract.images import Prepared
from satdifuser.extract.settings import ImageSettings

CLIPPED_SHARE = 0.02  # of all values; a few clouds and roofs may well be brighter than 1
DARK = 0.1  # a tile is dark where no value reaches this; reflectance of land mostly does somewhere


@dataclass
class ValueRange:
    """The values of the tiles read so far, and how they lie in [0, 1]."""

    settings: ImageSettings
    tiles: int = 0
    dark: int = 0
    clipped: float = 0.0  # sum of the tiles' shares
    low: float = inf  # raw
    high: float = -inf

    def add(self, tile: Prepared) -> None:
        """Take note of one more tile."""
        self.tiles += 1
        self.dark += tile.brightest < DARK
        self.clipped += tile.clipped_share
        self.low = min(self.low, tile.raw_range[0])
        self.high = max(self.high, tile.raw_range[1])

    def warning(self) -> str:
        """Say why the scale looks wrong and what to try; "" where it looks right."""
        if self.clipped > CLIPPED_SHARE * self.tiles:
            found = f"{self.clipped / self.tiles:.1%} of the values lie outside [0, 1] and are clipped"
        elif self.dark > self.tiles / 2:
            found = f"in {self.dark} of {self.tiles} tiles no value reaches {DARK:g}"
        else:
            return ""
        scale = self.settings.scale or 1 / 255  # 8-bit images need none
        return (
            f"warning: {found}: raw values of {self.low:g} to {self.high:g} ({self.tiles} tiles read) with "
            f"source.scale {scale:g} and source.offset {self.settings.offset:g}; check both against the "
            "data's documentation, reflectance is often stored times 10000 or 65535; "
            f"{self._whole_range()} would bring all values into [0, 1]"
        )

    def _whole_range(self) -> str:
        least = min(self.low, 0)
        span = (self.high - least) or 1
        scale = f"1/{span:.0f}" if span >= 10 else f"{1 / span:.3g}"
        return f"source.scale={scale}" + (f" source.offset={-least / span:.3g}" if least else "")
