"""How feature values are kept on disk, and how they become numbers again.

Everything is quantised before it is written, and scales are plain arrays, so that any Zarr reader decodes a
store with one multiplication and at most one addition: no private codec.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from satdifuser.store.digest import DigestAlgorithm, new_hasher
from satdifuser.store.settings import Encoding
from satdifuser.store.shard_file import BLOSC_LEVEL

Floats = NDArray[np.float32]
FLOAT32_MAX = float(np.finfo(np.float32).max)
INT8_MAX = 127
INT4_STEPS = 15
MANTISSA_BITS, KEPT_BITS = 10, 5  # of float16; by `rounded`
CPU_AT_ONCE, GPU_AT_ONCE = 2**19, 2**26  # values that are summed, in float64: 4 MB stay in a cache
TABLE_LEVEL = 3  # of zstd, for small arrays


@dataclass(frozen=True)
class Form:
    """The arrays of an encoding: dtype of `values`, those per channel, whether chunks are compressed."""

    dtype: str
    per_channel: tuple[str, ...] = ()
    compressed: bool = False
    largest: float = FLOAT32_MAX  # magnitude that it can hold
    packed: bool = False  # two values of a row in each byte

    @property
    def limited(self) -> bool:
        """Whether there are finite float32 features that it cannot hold."""
        return self.largest < FLOAT32_MAX


FORMS: dict[Encoding, Form] = {
    "float32": Form("float32"),
    "float16": Form("float16", largest=65504),
    "rounded": Form("float16", compressed=True, largest=64512),
    "int8": Form("int8", ("scale",)),
    "int4": Form("uint8", ("scale", "offset"), packed=True),
    "reduced": Form("int8", ("scale",)),
}


def decode_formula(encoding: Encoding) -> str:
    """What turns stored values into features, in words for the store's attributes."""
    per_channel = FORMS[encoding].per_channel
    if not per_channel:
        return "feature = values"
    added = " + offset" if "offset" in per_channel else ""
    names = " and ".join(f"{name}[tile, timestep, layer, channel]" for name in per_channel)
    text = f"feature = values * scale{added}, with {names}"
    if FORMS[encoding].packed:
        text += (
            "; each byte holds two values along x: the lower four bits x = 0, 2, ..., the upper four "
            "x = 1, 3, ...; the last upper four are padding where the width is odd"
        )
    return text


def encode(maps: Any, encoding: Encoding, pool: int = 1) -> dict[str, Any]:
    """Encode feature maps and pool them; on a CPU the same bits from a numpy array and from a torch tensor.

    Args:
        maps: (..., C, H, W) float32, finite and of at most the form's `largest` magnitude.
        encoding: One of the store encodings.
        pool: Average windows of this many pixels a side first.

    Returns:
        ``values`` as the form says; ``pooled`` (..., C) float32, the exact means of the unencoded maps;
        ``scale`` and ``offset`` (..., C) float32 where the form has them. All of the maps' kind, on their
        device.
    """
    return {"pooled": spatial_means(maps)} | _quantise(average_windows(maps, pool), encoding)


def _quantise(maps: Any, encoding: Encoding) -> dict[str, Any]:
    xp = array_namespace(maps)
    if encoding in ("int8", "reduced"):
        scale = _magnitudes(maps) / INT8_MAX
        codes = maps / _safe(scale)
        codes = xp.clip(xp.round(codes, out=codes), -INT8_MAX, INT8_MAX, out=codes)
        return {"values": xp.astype(codes, xp.int8), "scale": scale}
    if encoding == "int4":
        # Libraries differ in which of 0 and -0 is the smaller: + 0 leaves no -0.
        low, high = (extreme(maps, axis=(-2, -1)) + 0.0 for extreme in (xp.min, xp.max))
        scale = (high - low) / INT4_STEPS
        codes = xp.clip(xp.round((maps - low[..., None, None]) / _safe(scale)), 0, INT4_STEPS)
        return {"values": pack_pairs(xp.astype(codes, xp.uint8)), "scale": scale, "offset": low}
    values = xp.astype(maps, getattr(xp, FORMS[encoding].dtype))
    return {"values": _rounded(values) if encoding == "rounded" else values}


def _magnitudes(maps: Any) -> Any:
    """Largest magnitude of each map: (..., C, H, W) to (..., C)."""
    xp = array_namespace(maps)
    low, high = (extreme(maps, axis=(-2, -1)) for extreme in (xp.min, xp.max))
    return xp.maximum(xp.abs(low), xp.abs(high))  # no copy of the maps, as their absolute values would be


def _safe(scale: Any) -> Any:
    """Scales (..., C) to divide maps by: 1 where a map is constant."""
    xp = array_namespace(scale)
    return xp.where(scale > 0, scale, xp.ones_like(scale))[..., None, None]


def _rounded(values: Any) -> Any:
    """Round float16 to KEPT_BITS bits of mantissa, half to even, as numcodecs' BitRound does."""
    xp = array_namespace(values)
    dropped = MANTISSA_BITS - KEPT_BITS
    bits = values.view(xp.int16)
    bits = bits + ((bits >> dropped) & 1) + (2 ** (dropped - 1) - 1)
    return ((bits >> dropped) << dropped).view(xp.float16)


def spatial_means(maps: Any) -> Any:
    """Means over H and W, summed in float64 in an order of our own, as libraries and devices have others.

    Args:
        maps: (..., C, H, W) float32.

    Returns:
        (..., C) float32.
    """
    xp = array_namespace(maps)
    pixels = math.prod(maps.shape[-2:])
    rows = xp.reshape(maps, (math.prod(maps.shape[:-2]), pixels))
    at_once = max(1, (CPU_AT_ONCE if str(device(maps)) == "cpu" else GPU_AT_ONCE) // pixels)
    parts = [_sums(rows[first : first + at_once]) for first in range(0, max(1, len(rows)), at_once)]
    return xp.astype(xp.reshape(xp.concat(parts), maps.shape[:-2]) / pixels, xp.float32)


def _sums(rows: Any) -> Any:
    """Sums of rows, (row, value) to (row,) float64."""
    xp = array_namespace(rows)
    sums = xp.astype(rows, xp.float64)
    while (count := sums.shape[-1]) > 1:  # fold the second half onto the first
        half = count // 2
        folded = sums[:, :half] + sums[:, half : 2 * half]
        sums = xp.concat([folded, sums[:, 2 * half :]], axis=-1) if count % 2 else folded
    return sums[:, 0]


def average_windows(maps: Any, side: int) -> Any:
    """Average windows of (side, side) pixels; those at the far edges may be smaller.

    Args:
        maps: (..., H, W) float32.

    Returns:
        (..., ceil(H / side), ceil(W / side)) float32.
    """
    if side == 1:
        return maps
    xp, where = array_namespace(maps), device(maps)
    height, width = maps.shape[-2:]
    shape = *maps.shape[:-2], -(-height // side) * side, -(-width // side) * side
    whole = xp.zeros(shape, dtype=maps.dtype, device=where)
    whole[..., :height, :width] = maps
    sums = sum(whole[..., y::side, x::side] for y in range(side) for x in range(side))
    # made on the device, which would be waited for if they came from elsewhere
    lefts = (n - xp.arange(0, n, side, dtype=maps.dtype, device=where) for n in (height, width))
    rows, columns = (xp.clip(left, max=side) for left in lefts)
    return sums / (rows[:, None] * columns)


def pack_pairs(codes: Any) -> Any:
    """Put neighbours along x into one byte: (..., W) of 0 to 15 to (..., ceil(W / 2)) uint8."""
    xp = array_namespace(codes)
    if codes.shape[-1] % 2:
        codes = xp.concat([codes, xp.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_pairs(packed: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Undo `pack_pairs`: (..., ceil(W / 2)) uint8 to (..., W) of 0 to 15."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    codes[..., 0::2] = packed & 15
    codes[..., 1::2] = packed >> 4
    return codes[..., :width]


def decode(arrays: Mapping[str, NDArray[Any]], width: int) -> Floats:
    """Decode stored arrays to feature maps.

    Args:
        arrays: ``values``, and ``scale`` and ``offset`` (..., C) where the encoding has them.
        width: W of the maps; two values share a byte where `values` has half of it.

    Returns:
        (..., C, H, W) float32.
    """
    values = arrays["values"]
    if values.dtype == np.uint8:
        values = unpack_pairs(values, width)
    maps: Floats = values.astype(np.float32)
    if "scale" in arrays:
        maps *= arrays["scale"][..., None, None]
    if "offset" in arrays:
        maps += arrays["offset"][..., None, None]
    return maps


def value_codecs(encoding: Encoding) -> list[BytesBytesCodec]:
    """Portable codecs of a feature array's chunks; each chain ends in a checksum, since blosc has none."""
    form = FORMS[encoding]
    if not form.compressed:  # nearly incompressible, and read at the speed of the disk
        return [Crc32cCodec()]
    width = np.dtype(form.dtype).itemsize
    blosc = BloscCodec(typesize=width, cname="zstd", clevel=BLOSC_LEVEL, shuffle="bitshuffle")
    return [blosc, Crc32cCodec()]


def table_codecs() -> list[BytesBytesCodec]:
    """Codecs of every small array; zstd's own checksum would leave some bits of the file uncovered."""
    return [ZstdCodec(level=TABLE_LEVEL), Crc32cCodec()]


def tile_digests(
    groups: Mapping[str, Mapping[str, NDArray[np.generic]]], algorithm: DigestAlgorithm
) -> list[str]:
    """Digest of each tile's stored arrays (values, pooled, scale …), groups and arrays in name order.

    Args:
        groups: Group name to array name to an array whose first axis is the tile.
        algorithm: Of the store.
    """
    arrays = [groups[group][name] for group in sorted(groups) for name in sorted(groups[group])]
    digests = []
    for items in zip(*arrays, strict=True):
        hasher = new_hasher(algorithm)
        for item in items:
            hasher.update(np.ascontiguousarray(item).reshape(-1).view(np.uint8).data)
        digests.append(hasher.hexdigest())
    return digests


def content_digest(tile_ids: Iterable[str], digests: Iterable[str]) -> str:
    """SHA-256 over the digests of tiles in tile_id order."""
    pairs = sorted(zip(tile_ids, digests, strict=True))
    return hashlib.sha256("".join(f"{a}\0{b}\n" for a, b in pairs).encode()).hexdigest()
