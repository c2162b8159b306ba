"""Stores that somebody made to hurt: refused at once, with little memory, and nothing outside is touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up import random_store

from satdifuser.errors import StoreError
from satdifuser.store.metadata import MAX_METADATA_BYTES, seal
from satdifuser.store.reader import open_store
from satdifuser.store.schema import LayerInfo
from satdifuser.store.shard_file import DamagedShardError, ShardFile, pack_shard
from satdifuser.store.zstd_frame import HEAD_BYTES, content_size

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

LAYERS = [LayerInfo(name="up.0.attn1", channels=3, stride=4, height=4, width=4)]
SECONDS, MEGABYTES = 1.0, 100.0  # of the processor: other load on the machine does not count
CODE = """
import resource, sys, time
from satdifuser.store.reader import open_store
from satdifuser.store.verify import verify
from satdifuser.errors import SatDiFuserError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
began, before = time.process_time(), peak()
try:
    store = open_store(sys.argv[1])
    problems = verify(store)
    store.tiles
    list(store.batches())
    told = "; ".join(problems) or "nothing"
except SatDiFuserError as error:
    told = str(error)
print(time.process_time() - began, peak() - before, "torch" in sys.modules, told[:2000])
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_store(tmp_path_factory.mktemp("hostile") / "s.zarr", LAYERS, 4, "int8").folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s.zarr"))


def change(path: Path, edit: Callable[[Any], object], key: str = "zarr.json") -> None:
    """Edit a zarr.json and seal the store anew, as whoever made it can."""
    document = json.loads((path / key).read_text())
    edit(document)
    (path / key).write_text(json.dumps(document))
    seal(path)


def declare(path: Path, **fields: Any) -> None:
    change(path, lambda document: document["attributes"]["satdifuser"].update(fields))


def refused(path: Path) -> str:
    """What a process of its own says of a store; it must say so soon, and take little memory."""
    done = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seconds, megabytes, torch, told = done.stdout.split(" ", 3)
    assert (float(seconds) < SECONDS, float(megabytes) < MEGABYTES, torch) == (True, True, "False"), (
        done.stdout
    )
    assert told.strip() != "nothing"
    return told


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"tiles": 10**15}, "tiles: Input should be less than or equal to"),
        ({"tiles": -1}, "tiles: Input should be greater than 0"),
        ({"tiles": 10**8, "tiles_per_shard": 1}, "100000000 shards, expected at most 1000000"),
        ({"tiles": 10**8, "tiles_per_shard": 10**8}, "commits has shape"),
        ({"tile_size": [10**9, 10**9]}, "tile_size"),
        ({"timesteps": list(range(100_001))}, "timesteps: List should have at most"),
        ({"latents": [1, 2**60, 1]}, "latents.2: Input should be less|latents"),
        ({"partitions": ["../../x"]}, "partitions.0: String should match pattern"),
        ({"partitions": [f"p{i}" for i in range(500)]}, "partitions: List should have at most 100 items"),
        ({"partition": "fold"}, "partition 'fold' is not among default"),
    ],
)
def test_absurd_attributes(copy: Path, fields: dict[str, Any], text: str) -> None:
    declare(copy, **fields)
    assert text.split("|")[-1] in refused(copy)


def test_a_million_layers(copy: Path) -> None:
    layer = LAYERS[0].model_dump()
    declare(copy, layers=[layer | {"name": f"x{i}"} for i in range(100_001)])
    assert "at most" in refused(copy)


def test_huge_and_deep_metadata(copy: Path) -> None:
    (copy / "zarr.json").write_text("[" * 1_000_000)
    assert "zarr.json is damaged" in refused(copy)
    (copy / "zarr.json").write_text("[" + "{}," * (MAX_METADATA_BYTES // 3 - 1) + "{}]")
    assert "not a feature store" in refused(copy)
    with (copy / "zarr.json").open("wb") as file:
        file.truncate(10 * 1024**3)
    assert f"is no plain file of at most {MAX_METADATA_BYTES} bytes" in refused(copy)


def test_pipes_and_links(whole: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "zarr.json").unlink()
    os.mkfifo(copy / "zarr.json")
    assert "is no plain file" in refused(copy)
    (copy / "zarr.json").unlink()
    shutil.copy(whole / "zarr.json", copy / "zarr.json")
    chunk = next(path for path in copy.glob("features/*/values/c/0/0/**/0") if path.is_file())
    shutil.move(chunk, tmp_path / "outside")
    chunk.symlink_to(tmp_path / "outside")
    assert f"{chunk.relative_to(copy)} is missing" in refused(copy)
    chunk.unlink()
    os.mkfifo(chunk)
    assert f"{chunk.relative_to(copy)} is missing" in refused(copy)


@pytest.mark.parametrize("own", ["", "0", "0" * 63, "A" * 64])
def test_a_seal_that_is_no_hash(copy: Path, own: str) -> None:
    document = json.loads((copy / "zarr.json").read_text())
    document["attributes"] |= {"sha256": {"zarr.json": own}, "much": "x" * (MAX_METADATA_BYTES - 2**17)}
    (copy / "zarr.json").write_text(json.dumps(document))
    assert "zarr.json was altered" in refused(copy)


def test_commit_records_that_are_no_files_of_the_store(copy: Path, tmp_path: Path) -> None:
    record = copy / "commits/c/0"
    shutil.move(record, tmp_path / "outside")
    record.symlink_to(tmp_path / "outside")
    assert "commits/c/0 is no plain file in the store" in refused(copy)
    record.unlink()
    os.mkfifo(record)
    assert "commits/c/0 is no plain file in the store" in refused(copy)


def test_metadata_outside_of_the_store(copy: Path, tmp_path: Path) -> None:
    shutil.copy(copy / "tiles/zarr.json", tmp_path / "zarr.json")
    text = (copy / "zarr.json").read_text()
    document = json.loads(text)
    sealed = document["attributes"]["sha256"]
    sealed["../zarr.json"] = hashlib.sha256((tmp_path / "zarr.json").read_bytes()).hexdigest()
    sealed["zarr.json"] = "0" * 64
    blank = json.dumps(document, indent=2)
    (copy / "zarr.json").write_text(blank.replace("0" * 64, hashlib.sha256(blank.encode()).hexdigest()))
    assert "its seal names '../zarr.json', which is outside of the store" in refused(copy)


@pytest.mark.parametrize(
    ("array", "edit", "part"),
    [
        ("tiles/path", lambda d: d["chunk_grid"]["configuration"].update(chunk_shape=[2**40]), "chunk_grid"),
        ("features/stride_04/values", lambda d: d.update(shape=[4, 3, 1, 3, 4, 2**40]), "shape"),
        (
            "features/stride_04/scale",
            lambda d: d["codecs"][0]["configuration"].update(chunk_shape=[1] * 4),
            "",
        ),
        ("tiles/valid_share", lambda d: d.update(data_type="float64"), "data_type"),
    ],
)
def test_arrays_that_contradict_the_attributes(
    copy: Path, array: str, edit: Callable[[Any], object], part: str
) -> None:
    change(copy, edit, f"{array}/zarr.json")
    told = refused(copy)
    assert f"{array} has {part}" in told or f"the metadata of {array} cannot be read" in told


@pytest.mark.parametrize(
    "record",
    [
        [1],
        {"files": 3},
        {"files": {"a": [-1, ""]}},
        {"files": {"a": ["x", ""]}},
        {"files": {"../../etc/passwd": [3, ""]}},
        {"files": {"/etc/passwd": [3, ""]}},
    ],
)
def test_commit_records_that_are_none(copy: Path, record: Any) -> None:
    import zarr

    commits: Any = zarr.open_group(copy, mode="r+")["commits"]
    commits[0] = json.dumps(record)
    assert "commit" in refused(copy)
    with pytest.raises(StoreError, match="commit record of shard 0 is damaged"):
        open_store(copy).tiles  # noqa: B018


def test_chunks_that_claim_too_much(tmp_path: Path) -> None:
    chunk = np.arange(64, dtype=np.uint8)
    parts = pack_shard([chunk], 1, 2)
    bomb = bytearray(parts[0])
    bomb[4:8] = (2**31 - 1).to_bytes(4, "little")  # what blosc says it inflates to
    (tmp_path / "s").write_bytes(b"".join([*pack_shard_of(bytes(bomb), len(bomb) + 4)]))
    with pytest.raises(DamagedShardError, match="does not inflate to 64 bytes"):
        ShardFile(tmp_path / "s", 1, 64, True).read(0, 1, np.empty(68, np.uint8))
    (tmp_path / "s").write_bytes(b"".join([*pack_shard_of(bytes(parts[0]), 2**60)]))
    with pytest.raises(DamagedShardError, match="its index points out of the file"):
        ShardFile(tmp_path / "s", 1, 64, True).read(0, 1, np.empty(68, np.uint8))


TABLES = ["targets/label/c/0", "tiles/tile_id/c/0", "features/stride_04/pooled/c/0/0/0/0"]


@pytest.mark.parametrize("key", TABLES)
def test_tables_that_claim_too_much(key: str, copy: Path) -> None:
    replace_table_chunk(copy, key, table_chunk(bytes(2**27)))
    with pytest.raises(StoreError, match="claims to hold 134217728 bytes, expected at most"):
        read_all_tables(copy)


def test_a_commit_record_that_claims_too_much(copy: Path) -> None:
    (copy / "commits/c/0").write_bytes(table_chunk(b" " * 2**27))
    with pytest.raises(StoreError, match="claims to hold 134217728 bytes, expected at most 67108864"):
        open_store(copy).tiles  # noqa: B018


def test_a_table_that_does_not_say_what_it_holds(copy: Path) -> None:
    replace_table_chunk(copy, "targets/label/c/0", b"\x28\xb5\x2f\xfd\x00\x58" + bytes(20))
    with pytest.raises(StoreError, match="the zstd frame does not say how much it holds"):
        read_all_tables(copy)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 300, 65791, 65792, 2**20])
def test_the_size_that_a_frame_claims(size: int) -> None:
    from numcodecs import zstd

    assert content_size(zstd.compress(bytes(size), 3)[:HEAD_BYTES]) == size


def table_chunk(content: bytes) -> bytes:
    from awscrt.checksums import crc32c
    from numcodecs import zstd

    body: bytes = zstd.compress(content, 3)
    return body + crc32c(body).to_bytes(4, "little")


def replace_table_chunk(path: Path, key: str, chunk: bytes) -> None:
    """Put another file in place of a committed one, and its size into the commit record."""
    import zarr

    (path / key).write_bytes(chunk)
    commits: Any = zarr.open_group(path, mode="r+")["commits"]
    record = json.loads(str(commits[0]))
    record["files"][key][0] = len(chunk)
    commits[0] = json.dumps(record)


def read_all_tables(path: Path) -> None:
    store = open_store(path)
    rows = np.arange(store.attributes.tiles)
    store.tiles  # noqa: B018
    store.targets(rows)
    for group in store.groups:
        store.pooled_group(group, rows)


def pack_shard_of(body: bytes, size: int) -> list[bytes]:
    """A shard file of one chunk with the right checksums, and any size in its index."""
    from awscrt.checksums import crc32c

    table = np.array([[0, size]], "<u8").tobytes()
    sums = [crc32c(part).to_bytes(4, "little") for part in (body, table)]
    return [body, sums[0], table, sums[1]]
