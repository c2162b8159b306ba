"""How values are encoded, and how a store names and sizes its parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numcodecs import BitRound
from numpy.typing import NDArray

import satdifuser.store.encoding as encoding_module
from satdifuser.store.encoding import (
    FORMS,
    average_windows,
    content_digest,
    decode,
    encode,
    pack_pairs,
    spatial_means,
    tile_digests,
    unpack_pairs,
)
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


@given(MAPS, st.sampled_from(list(FORMS)))
@settings(max_examples=200, deadline=None)
def test_decoded_values_stay_within_the_bound_of_their_encoding(
    maps: NDArray[np.float32], encoding: Encoding
) -> None:
    arrays_ = encode(maps, encoding)
    found = decode(arrays_, maps.shape[-1])
    error = np.abs(found.astype(np.float64) - maps)
    assert (found.dtype, found.shape) == (np.float32, maps.shape)
    assert set(arrays_) == {"values", "pooled", *FORMS[encoding].per_channel}
    assert arrays_["values"].dtype == FORMS[encoding].dtype
    assert (error <= bound(maps, encoding)).all()
    means = maps.astype(np.float64).mean((-2, -1))
    smallest = 1e-12 * np.abs(maps).max() + 1e-44
    np.testing.assert_allclose(arrays_["pooled"].astype(np.float64), means, rtol=1e-7, atol=smallest)


@given(MAPS, st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_means_do_not_depend_on_how_many_values_are_summed_at_once(
    maps: NDArray[np.float32], at_once: int
) -> None:
    expected = spatial_means(maps)
    assert (expected.dtype, expected.shape) == (np.float32, maps.shape[:-2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding_module, "CPU_AT_ONCE", at_once)
        np.testing.assert_array_equal(spatial_means(maps), expected)
        np.testing.assert_array_equal(spatial_means(torch.from_numpy(maps)).numpy(), expected)


@given(MAPS, st.sampled_from(list(FORMS)), st.integers(1, 4))
@example(np.array([[[0.0, -0.0]]], np.float32), "int4", 1)
@settings(max_examples=300, deadline=None)
def test_tensors_are_encoded_to_the_same_bits(
    maps: NDArray[np.float32], encoding: Encoding, pool: int
) -> None:
    ours = encode(torch.from_numpy(maps), encoding, pool)
    expected = encode(maps, encoding, pool)
    assert set(ours) == set(expected)
    for name, array in expected.items():
        assert (ours[name].numpy().dtype, ours[name].numpy().tobytes()) == (array.dtype, array.tobytes()), (
            name
        )


@given(arrays(np.float32, (2, 3, 5), elements=st.floats(-60000, 60000, width=32)))
@settings(max_examples=50, deadline=None)
def test_rounding_is_that_of_bitround(maps: NDArray[np.float32]) -> None:
    expected = BitRound(keepbits=5).encode(maps.astype(np.float16)).view(np.float16).reshape(maps.shape)
    np.testing.assert_array_equal(encode(maps, "rounded")["values"], expected)


def bound(maps: NDArray[np.float32], encoding: Encoding) -> NDArray[np.float64]:
    """The largest error that each value may have: half a step, and what float32 rounds away."""
    wide = maps.astype(np.float64)
    rest = 1e-6 * np.abs(wide).max((-2, -1), keepdims=True) + 1e-42
    if encoding in ("int8", "reduced"):
        return 0.5 / 127 * np.abs(wide).max((-2, -1), keepdims=True) + rest
    if encoding == "int4":
        return 0.5 / 15 * (wide.max((-2, -1), keepdims=True) - wide.min((-2, -1), keepdims=True)) + rest
    bits = {"float32": 60, "float16": 11, "rounded": 6}[encoding]
    return np.abs(wide) * 2.0**-bits + (0 if encoding == "float32" else 2.0**-19)


def test_int8_uses_its_whole_range_and_keeps_constant_zero() -> None:
    maps = np.array([[[-254.0, 1.1]], [[0, 0]]], np.float32)
    arrays_ = encode(maps, "int8")
    assert arrays_["values"].tolist() == [[[-127, 1]], [[0, 0]]]
    assert arrays_["scale"].tolist() == [2, 0]


def test_int4_uses_its_whole_range_and_packs_two_values_of_a_row() -> None:
    maps = np.array([[[-1.0, 0, 14], [3, 3, 3]]], np.float32)
    arrays_ = encode(maps, "int4")
    assert arrays_["values"].tolist() == [[[0 + 16 * 1, 15], [4 + 16 * 4, 4]]]
    assert (arrays_["scale"].tolist(), arrays_["offset"].tolist()) == ([1], [-1])


@given(arrays(np.uint8, array_shapes(max_side=5), elements=st.integers(0, 15)))
@settings(deadline=None)
def test_pairs_unpack_to_what_was_packed(codes: NDArray[np.uint8]) -> None:
    packed = pack_pairs(codes)
    assert packed.shape == (*codes.shape[:-1], -(-codes.shape[-1] // 2))
    np.testing.assert_array_equal(unpack_pairs(packed, codes.shape[-1]), codes)


def test_windows_at_the_edge_average_what_they_hold() -> None:
    maps = np.arange(15, dtype=np.float32).reshape(1, 3, 5)
    expected = [[[(0 + 1 + 5 + 6) / 4, (2 + 3 + 7 + 8) / 4, (4 + 9) / 2], [10.5, 12.5, 14]]]
    np.testing.assert_array_equal(average_windows(maps, 2), np.array(expected, np.float32))
    arrays_ = encode(maps, "reduced", pool=2)
    assert arrays_["values"].shape == (1, 2, 3)
    assert arrays_["pooled"].tolist() == [7]  # of the maps before they were averaged


def test_the_largest_magnitude_of_an_encoding_stays_finite_and_the_next_does_not() -> None:
    for encoding in ("float16", "rounded"):
        largest = FORMS[encoding].largest
        maps = np.array([[[largest, -largest]]], np.float32)
        assert decode(encode(maps, encoding), 2).tolist() == maps.tolist()
    assert np.isinf(encode(np.full((1, 1, 1), 65504, np.float32), "rounded")["values"]).all()


def test_tile_digests_see_values_and_ignore_the_order_of_names() -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.ones((2, 2), np.int8)
    first = tile_digests({"g": {"v": a, "s": b}}, "blake3")
    assert first == tile_digests({"g": {"s": b, "v": a}}, "blake3")
    a[1, 0] += 1
    second = tile_digests({"g": {"v": a, "s": b}}, "blake3")
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
