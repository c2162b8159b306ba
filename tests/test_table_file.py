"""Files of small arrays, against those that zarr-python writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from made_up_store import build, tile_row
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from satdifuser.store.encoding import table_codecs
from satdifuser.store.table_file import pack_table
from satdifuser.store.writer import StoreWriter

PLACES = 5


def by_zarr(rows: Any, dtype: Any, blank: Any) -> bytes:
    """The file of the first chunk of an array that holds some rows."""
    store = MemoryStore()
    array: Any = zarr.create_array(
        store,
        shape=(len(rows), *rows.shape[1:]),
        chunks=(PLACES, *rows.shape[1:]),
        dtype=dtype,
        fill_value=blank,
        compressors=table_codecs(),
        config={"write_empty_chunks": True},
    )
    array[:] = rows
    key = "/".join(["c", *"0" * rows.ndim])
    found = sync(store.get(key, default_buffer_prototype()))
    assert found is not None
    return found.to_bytes()


@pytest.mark.parametrize("count", [1, 4, PLACES])
@pytest.mark.parametrize(
    ("dtype", "shape", "blank"),
    [
        ("bool", (), False),
        ("uint8", (3, 2), 7),
        ("int32", (), -1),
        ("float32", (2,), np.nan),
        ("float64", (6,), np.nan),
    ],
)
def test_numbers(count: int, dtype: str, shape: tuple[int, ...], blank: Any) -> None:
    rows = np.random.default_rng(0).integers(0, 9, (count, *shape)).astype(dtype)
    assert b"".join(pack_table(rows, PLACES, blank)) == by_zarr(rows, dtype, blank)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=PLACES))
def test_texts(texts: list[str]) -> None:
    rows = np.array(texts, np.dtypes.StringDType())
    assert b"".join(pack_table(rows, PLACES, "")) == by_zarr(rows, str, "")


@pytest.mark.parametrize("count", [1, 3])
def test_a_shard_of_too_few_or_too_many_rows_is_refused(tmp_path: Path, count: int) -> None:
    store = build(tmp_path / "s.zarr", ())
    with (
        StoreWriter(store, lock=None) as writer,
        pytest.raises(ValueError, match=r"tile_id: got rows of shape \(\d,\), expected \(2,\)"),
    ):
        writer._write_tiles(0, [tile_row(tile) for tile in range(count)])


def test_a_store_holds_what_zarr_would_write(tmp_path: Path) -> None:
    store = build(tmp_path / "s.zarr")  # whose last shard is half empty
    root = zarr.open_group(store, mode="r+")
    tables = [
        array
        for _, array in root.members(max_depth=None)
        if isinstance(array, zarr.Array) and not array.shards
    ]
    for array in tables:
        files = sorted(path for path in (store / array.path / "c").rglob("*") if path.is_file())
        ours, values = [path.read_bytes() for path in files], array[...]
        for path in files:
            path.unlink()
        array.with_config({"write_empty_chunks": True})[...] = values
        assert [path.read_bytes() for path in files] == ours, array.path
    assert len(tables) > 15
