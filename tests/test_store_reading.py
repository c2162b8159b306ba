"""Reading parts of a store: shard files, selections, batches from memory and read ahead."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import RANDOM_STEPS as STEPS
from made_up import random_store
from numpy.typing import NDArray

from satdifuser.errors import SettingsError, StoreError
from satdifuser.store import sharded_array
from satdifuser.store.batches import BatchReader, read_ahead
from satdifuser.store.encoding import FORMS
from satdifuser.store.reader import FeatureStore, Stored
from satdifuser.store.schema import LayerInfo
from satdifuser.store.shard_file import DamagedShardError, ShardFile, pack_shard
from satdifuser.store.sharded_array import runs

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

TILES = 7
LAYERS = [  # maps of the finest stride are too large to share a chunk
    *(LayerInfo(name=f"coarse.{i}", channels=4, stride=8, height=3, width=3) for i in range(3)),
    *(LayerInfo(name=f"fine.{i}", channels=3, stride=1, height=101, width=101) for i in range(4)),
]


@pytest.fixture(scope="module", params=FORMS)
def any_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return random_store(tmp_path_factory.mktemp("any") / "s.zarr", LAYERS, TILES, request.param)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return random_store(tmp_path_factory.mktemp("one") / "s.zarr", LAYERS, TILES, "int8")


# --- shard files


def chunks(count: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 9, (count, size), np.uint8)


def read_all(path: Path, places: int, size: int, count: int, compressed: bool = False) -> NDArray[np.uint8]:
    found = np.empty((count, size + 4), np.uint8)
    ShardFile(path, places, size, compressed).read(0, count, found.reshape(-1))
    return found[:, :size]


@pytest.mark.parametrize("itemsize", [0, 2])
def test_a_packed_shard_is_read_back_and_absent_chunks_are_refused(tmp_path: Path, itemsize: int) -> None:
    written = chunks(5, 64)
    (tmp_path / "s").write_bytes(b"".join(pack_shard(written, 7, itemsize)))
    np.testing.assert_array_equal(read_all(tmp_path / "s", 7, 64, 5, itemsize > 0), written)
    with pytest.raises(DamagedShardError, match="chunk 5 is absent"):
        read_all(tmp_path / "s", 7, 64, 6, itemsize > 0)


def test_shards_of_zarr_python_are_read_though_their_chunks_lie_in_another_order(tmp_path: Path) -> None:
    values = chunks(8, 4 * 6).reshape(8, 1, 4, 6)
    array = zarr.create_array(
        tmp_path / "a",
        shape=values.shape,
        shards=(8, 1, 4, 6),
        chunks=(1, 1, 1, 6),
        dtype="uint8",
        compressors=[zarr.codecs.Crc32cCodec()],
    )
    array[:] = values
    np.testing.assert_array_equal(read_all(tmp_path / "a/c/0/0/0/0", 32, 6, 32), values.reshape(32, 6))


@pytest.mark.parametrize("itemsize", [0, 2])
def test_every_flipped_bit_and_every_truncation_is_refused(tmp_path: Path, itemsize: int) -> None:
    whole = b"".join(pack_shard(chunks(3, 8), 4, itemsize))
    damaged = [whole[:length] for length in range(len(whole))]
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(DamagedShardError):
            read_all(tmp_path / "s", 4, 8, 3, itemsize > 0)


def test_a_request_that_the_system_cuts_short_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = chunks(4, 10)
    (tmp_path / "s").write_bytes(b"".join(pack_shard(written, 4)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, buffers, at, flags=0: whole(f, [buffers[0][:3]], at, flags))
    np.testing.assert_array_equal(read_all(tmp_path / "s", 4, 10, 4), written)


# --- selections


def by_zarr(store: FeatureStore, group: str, name: str) -> NDArray[Any]:
    array: Any = zarr.open_group(store.path, mode="r")[f"features/{group}/{name}"]
    return np.asarray(array[...])


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_tiles_timesteps_and_layers_are_those_of_zarr_python(any_store: FeatureStore, data: Any) -> None:
    rows = np.array(data.draw(st.lists(st.integers(0, TILES - 1), max_size=9)), np.intp)
    steps = data.draw(st.lists(st.sampled_from(STEPS), min_size=1, unique=True))
    pattern = data.draw(st.sampled_from(["*", "fine.*", "coarse.[02]", "*.1", "fine.[023]"]))
    chosen = any_store.selection(steps, pattern)
    found = any_store.stored(rows, chosen)
    assert list(found) == [g for g in any_store.groups if g in chosen.layers]
    for group, layers in chosen.layers.items():
        for name, array in found[group].items():
            expected = by_zarr(any_store, group, name)[rows][:, list(chosen.steps)][:, :, list(layers)]
            np.testing.assert_array_equal(array, expected)


def test_buffers_are_filled_in_place(store: FeatureStore) -> None:
    buffers = store.buffers(4)
    before = store.stored(np.arange(4), into=buffers)
    found = store.stored(np.array([6, 2]), into=buffers)
    for group, arrays in store.stored(np.array([6, 2])).items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[group][name], array)
            assert np.shares_memory(found[group][name], before[group][name])


def test_only_what_is_selected_is_read(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    whole = os.preadv

    def counted(*args: Any) -> int:
        taken.append(whole(*args))
        return taken[-1]

    monkeypatch.setattr(os, "preadv", counted)
    chosen = store.selection([21], "fine.2")
    store.stored(np.array([1, 5]), chosen)
    scale = 4 * 3 * 4  # of all layers of a tile and timestep
    assert sum(taken) == 2 * (3 * 101 * 101 + 4 + scale + 4)
    assert store.stored_bytes_per_tile(chosen) == 3 * 101 * 101 + 3 * 4


def test_few_files_stay_open(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_array, "MOST_DESCRIPTORS", 8)
    fresh = FeatureStore(store.path)
    before = open_files()
    fresh.stored(np.arange(TILES))
    assert open_files() - before <= 2
    del fresh
    assert open_files() == before


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_cutting_into_runs() -> None:
    assert runs([0, 1, 2, 5, 6, 4], most=9) == [(0, 3), (3, 5), (5, 6)]
    assert runs([0, 1, 2, 3, 4, 6], most=2) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert runs([3], most=1) == [(0, 1)]
    assert runs([], most=1) == []


# --- batches


def copies(batches: Iterator[Stored]) -> list[Stored]:
    return [{g: {n: a.copy() for n, a in arrays.items()} for g, arrays in b.items()} for b in batches]


def test_batches_from_memory_and_from_disk_are_the_same(store: FeatureStore) -> None:
    rows = np.arange(1, TILES)
    order = np.random.default_rng(0).permutation(len(rows))
    parts = [order[i : i + 2] for i in range(0, len(order), 2)] + [order[:1], order[:2]]
    streaming, resident = (BatchReader(store, rows, budget_bytes=budget) for budget in (0, 1e9))
    first, second = copies(streaming.batches(parts)), copies(resident.batches(parts))
    assert len(first) == len(second) == len(parts)
    for part, a, b in zip(parts, first, second, strict=True):
        expected = store.stored(rows[part])
        for group, arrays in expected.items():
            for name, array in arrays.items():
                np.testing.assert_array_equal(a[group][name], array)
                np.testing.assert_array_equal(b[group][name], array)


def test_a_budget_that_fits_reads_once(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(TILES)
    need = store.stored_bytes_per_tile() * TILES
    resident, streaming = BatchReader(store, rows, None, need), BatchReader(store, rows, None, need - 1)

    def refuse(*args: Any) -> int:
        raise OSError("read")

    monkeypatch.setattr(os, "preadv", refuse)
    assert len(copies(resident.batches([rows]))) == 1
    with pytest.raises(StoreError, match=r"values, tile \d: cannot be read \(read\)"):
        copies(streaming.batches([rows]))


def test_memory_stays_at_three_batches(store: FeatureStore) -> None:
    parts = [np.array([i % TILES]) for i in range(30)]
    batches = BatchReader(store, np.arange(TILES)).batches(parts)
    assert len({batch["stride_01"]["values"].ctypes.data for batch in batches}) == 3


def test_a_store_yields_parts_of_its_layers_and_timesteps(store: FeatureStore) -> None:
    batches = list(store.batches(batch_size=3, seed=1, timesteps=[101], layers="fine.[13]"))
    assert [len(batch.tile_ids) for batch in batches] == [3, 3]
    for batch in batches:
        assert list(batch.features) == ["stride_01"]
        whole = store.maps(batch.indices)["stride_01"]
        np.testing.assert_array_equal(batch.features["stride_01"], whole[:, 2:, 1::2])
    again = store.batches(batch_size=3, seed=1, timesteps=[101], layers="fine.[13]", memory_gb=1)
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one.features["stride_01"], other.features["stride_01"])
    with pytest.raises(SettingsError, match=r"timestep 2 is not in"):
        next(store.batches(timesteps=[2]))


def test_reading_ahead_passes_on_errors_and_ends_its_thread() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise StoreError("torn")

    items = read_ahead(broken())
    assert next(items) == 1
    with pytest.raises(StoreError, match="torn"):
        next(items)
    before = threading.active_count()
    endless = read_ahead(iter(int, 1))
    assert next(endless) == 0
    assert threading.active_count() == before + 1
    endless.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_reading_ahead_makes_one_item_more_than_the_one_that_waits() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            yield number

    ahead = read_ahead(items())
    assert next(ahead) == 0
    time.sleep(0.3)
    assert made == [0, 1, 2]
    assert list(ahead) == list(range(1, 9))
