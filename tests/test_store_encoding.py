"""How values are encoded, and how a store names and sizes its parts."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from satdifuser.store.encoding import content_digest, decode, encode, largest_value, tile_digests
from satdifuser.store.schema import (
    Attributes,
    LayerInfo,
    auto_tiles_per_shard,
    bytes_per_tile,
    canonical_hash,
    contents_hash,
    differing_fields,
    group_layers,
    labels_hash,
)
from satdifuser.store.settings import Encoding

ENCODINGS: list[Encoding] = ["float32", "float16", "int8"]
LAYERS = [
    LayerInfo(name=f"up.{i}.attn1", channels=c, stride=s, height=16 // s, width=16 // s)
    for i, (c, s) in enumerate([(4, 8), (4, 8), (2, 4), (3, 4)])
]

# --- encoding

MAPS = arrays(
    np.float32,
    array_shapes(min_dims=3, max_dims=4, max_side=4),
    elements=st.floats(-60000, 60000, width=32),
)


@given(MAPS, st.sampled_from(ENCODINGS))
@settings(max_examples=100, deadline=None)
def test_decoded_values_stay_within_the_bound_of_their_encoding(
    maps: NDArray[np.float32], encoding: Encoding
) -> None:
    arrays_ = encode(maps, encoding)
    scale: Any = arrays_.get("scale")
    found = decode(arrays_["values"], scale)
    error = np.abs(found.astype(np.float64) - maps)
    assert found.dtype == np.float32
    assert arrays_["values"].dtype == encoding
    if encoding == "int8":
        np.testing.assert_array_equal(scale, np.abs(maps).max((-2, -1)) / np.float32(127))
        assert (error <= 0.5001 * scale[..., None, None] + 1e-42).all()
    elif encoding == "float16":
        assert (error <= np.abs(maps) * 2.0**-11 + 2.0**-25).all()
    else:
        assert not error.any()
    assert set(arrays_) == {"values", "pooled"} | ({"scale"} if encoding == "int8" else set())
    np.testing.assert_array_equal(
        arrays_["pooled"], maps.astype(np.float64).mean((-2, -1)).astype(np.float32)
    )


def test_int8_uses_its_whole_range_and_keeps_constant_zero() -> None:
    maps = np.array([[[-254.0, 1.1]], [[0, 0]]], np.float32)
    arrays_ = encode(maps, "int8")
    assert arrays_["values"].tolist() == [[[-127, 1]], [[0, 0]]]
    assert arrays_["scale"].tolist() == [2, 0]


def test_largest_value_is_the_last_that_stays_finite() -> None:
    assert [largest_value(e) for e in ENCODINGS] == [np.finfo("f4").max, 65504, np.finfo("f4").max]


def test_tile_digests_see_values_and_ignore_the_order_of_names() -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.ones((2, 2), np.int8)
    first = tile_digests({"g": {"v": a, "s": b}})
    assert first == tile_digests({"g": {"s": b, "v": a}})
    a[1, 0] += 1
    second = tile_digests({"g": {"v": a, "s": b}})
    assert (first[0] == second[0], first[1] == second[1]) == (True, False)
    assert content_digest(["b", "a"], ["2", "1"]) == content_digest(["a", "b"], ["1", "2"])
    assert content_digest(["b", "a"], ["1", "2"]) != content_digest(["a", "b"], ["1", "2"])


# --- schema


def test_layers_group_by_stride_and_width_finest_first() -> None:
    assert group_layers(LAYERS) == {"stride_04": [2], "stride_04_c3": [3], "stride_08": [0, 1]}
    wide = [LayerInfo(name=str(c), channels=c, stride=16, height=1, width=1) for c in (640, 320, 640)]
    assert group_layers(wide) == {"stride_16": [0, 2], "stride_16_c320": [1]}


def test_sizes_and_shards() -> None:
    per_step = 2 * 4 * 4 + (2 + 3) * 16
    assert bytes_per_tile(LAYERS, 2, "float16") == 2 * (per_step * 2 + 13 * 4)
    assert bytes_per_tile(LAYERS, 2, "int8") == 2 * (per_step + 13 * 8)
    assert auto_tiles_per_shard(LAYERS, 2, "int8", 5) == 5
    assert auto_tiles_per_shard(LAYERS, 2, "int8", 1000) == 64
    huge = [LayerInfo(name="h", channels=10**4, stride=1, height=10**3, width=10**3)]
    assert auto_tiles_per_shard(huge, 1, "float32", 9) == 1
    five = Attributes.model_construct(tiles=5, tiles_per_shard=2)
    assert [five.shard_range(s) for s in range(five.shards)] == [(0, 2), (2, 4), (4, 5)]


def test_hashes_and_differences() -> None:
    assert canonical_hash({"a": 1, "b": 2}) == canonical_hash({"b": 2, "a": 1})
    assert labels_hash(["sea"], ["x"], {"default": [1]}) != labels_hash(["sea"], ["x"], {"default": [2]})
    assert contents_hash(["a"], [1], LAYERS) != contents_hash(["a"], [2], LAYERS)
    assert differing_fields({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "d": 4}) == [
        "a.b: store has 3, asked for 1",
        "c: store has 'nothing', asked for 2",
        "d: store has 4, asked for 'nothing'",
    ]
