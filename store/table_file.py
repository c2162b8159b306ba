"""One file of a small array: a shard's rows as one chunk, compressed, with a CRC32C behind it.

It is byte for byte what zarr-python writes for the codecs of `table_codecs`. A shard has twenty of them:
zarr's event loop takes 3 ms for each, while a thread that launches a GPU's work waits for the interpreter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numcodecs import zstd
from numcodecs.vlen import VLenUTF8
from numpy.typing import NDArray

from satdifuser.store.encoding import TABLE_LEVEL
from satdifuser.store.shard_file import checksum


def pack_table(rows: NDArray[Any], places: int, blank: Any) -> list[bytes]:
    """Lay out the chunk of some rows.

    Args:
        rows: (row, …) numbers, or (row,) texts of numpy's variable-width dtype.
        places: How many rows a whole chunk has.
        blank: What is in the places beyond `rows`.

    Returns:
        The file's content, in parts that follow each other.
    """
    absent = np.full((places - len(rows), *rows.shape[1:]), blank, rows.dtype)
    chunk = np.concatenate([rows, absent]) if len(absent) else rows
    raw = VLenUTF8().encode(chunk.astype(object)) if rows.dtype.kind == "T" else np.ascontiguousarray(chunk)
    body: bytes = zstd.compress(raw, TABLE_LEVEL)
    return [body, checksum(body)]
