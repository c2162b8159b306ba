"""What turns the stored values of GEO-Bench's data sets into [0, 1]: value * scale, clipped.

Sentinel-2 digital numbers, reflectance and 8-bit values each have their scale, whatever dtype holds them.
m-chesapeake's is that of SatDiFuser's released code, which only clips its values. Bands need no table: every
data set calls its own red, green and blue by these names.

Of the published m-eurosat and m-brick-kiln, the benchmark's authors say that most other bands are called by
wrong names (github.com/ServiceNow/geo-bench, issues 28 and 29); red, green and blue are not among these.
"""

from __future__ import annotations

RGB = ("red", "green", "blue")

SENTINEL2 = 1 / 4095  # digital numbers
EIGHT_BIT = 1 / 255

SCALES: dict[str, float | None] = {  # None: nobody has said, so the user must
    "m-eurosat": SENTINEL2,
    "m-brick-kiln": SENTINEL2,
    "m-bigearthnet": SENTINEL2,
    "m-so2sat": 1 / 0.4095,  # the same limit, in reflectance
    "m-forestnet": EIGHT_BIT,
    "m-pv4ger": EIGHT_BIT,
    "m-pv4ger-seg": EIGHT_BIT,
    "m-nz-cattle": EIGHT_BIT,
    "m-NeonTree": EIGHT_BIT,
    "m-chesapeake": 1.0,
    "m-cashew-plant": None,
    "m-SA-crop-type": None,
}
