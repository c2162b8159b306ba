"""How feature values are kept: float32, float16, or int8 with one scale per tile, timestep, layer, channel.

Quantisation happens before writing and the scales are a plain array, so that any Zarr reader decodes a
store with one multiplication: no private codec.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from satdifuser.store.settings import Encoding

Floats = NDArray[np.float32]
INT8_MAX = 127


def largest_value(encoding: Encoding) -> float:
    """The largest magnitude an encoding can hold."""
    return float(np.finfo(np.float16 if encoding == "float16" else np.float32).max)


def encode(maps: Floats, encoding: Encoding) -> dict[str, NDArray[np.generic]]:
    """Encode feature maps and pool them.

    Args:
        maps: (..., C, H, W) float32, finite and within `largest_value`.
        encoding: One of the store encodings.

    Returns:
        ``values`` of the same shape; ``pooled`` (..., C) float32, the exact means of the unencoded maps;
        for int8 also ``scale`` (..., C) float32.
    """
    arrays: dict[str, NDArray[np.generic]] = {
        "pooled": maps.mean(axis=(-2, -1), dtype=np.float64).astype(np.float32)
    }
    if encoding == "int8":
        scale = np.abs(maps).max(axis=(-2, -1)) / np.float32(INT8_MAX)
        step = np.where(scale > 0, scale, np.float32(1))[..., None, None]
        arrays["values"] = np.rint(maps / step).clip(-INT8_MAX, INT8_MAX).astype(np.int8)
        arrays["scale"] = scale
    else:
        arrays["values"] = maps.astype(encoding)
    return arrays


def decode(values: NDArray[np.generic], scale: Floats | None) -> Floats:
    """Decode stored values (..., C, H, W) with their scales (..., C), if any, to float32."""
    maps = values.astype(np.float32)
    if scale is not None:
        maps *= scale[..., None, None]
    return maps


def value_codecs(encoding: Encoding) -> list[BytesBytesCodec]:
    """Portable codecs of a value array; each chain ends in a checksum, since blosc has none."""
    if encoding == "int8":  # one scale per channel leaves nothing to compress
        return [Crc32cCodec()]
    width = np.dtype(encoding).itemsize
    return [BloscCodec(typesize=width, cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec()]


def table_codecs() -> list[BytesBytesCodec]:
    """Codecs of every small array; zstd's own checksum would leave some bits of the file uncovered."""
    return [ZstdCodec(level=3), Crc32cCodec()]


def tile_digests(groups: Mapping[str, Mapping[str, NDArray[np.generic]]]) -> list[str]:
    """SHA-256 of each tile's stored arrays (values, pooled, scale), groups and arrays in name order.

    Args:
        groups: Group name to array name to an array whose first axis is the tile.
    """
    arrays = [groups[group][name] for group in sorted(groups) for name in sorted(groups[group])]
    digests = []
    for items in zip(*arrays, strict=True):
        digest = hashlib.sha256()
        for item in items:
            digest.update(np.ascontiguousarray(item).data)
        digests.append(digest.hexdigest())
    return digests


def content_digest(tile_ids: Iterable[str], digests: Iterable[str]) -> str:
    """SHA-256 over the digests of tiles in tile_id order."""
    pairs = sorted(zip(tile_ids, digests, strict=True))
    return hashlib.sha256("".join(f"{a}\0{b}\n" for a, b in pairs).encode()).hexdigest()
