"""How fast random batches of whole tiles come out of a store, beside the disk's own speed.

    python benchmarks/read_throughput.py [--shape sd|small] [--tiles 96] [--folder FOLDER]

P is `os.preadv` of a raw float16 file of the same tiles. All ways of reading fill buffers that are made once,
and take turns of a few batches in one run; figures are medians of the ratio to the first of the same turn.
MB/s count the float16 bytes of the tiles, whatever the encoding, so 1.3 P means 1.3 times the tiles per
second. Our reader checks every checksum. Cold: the page cache is emptied of the files before each turn, for
all. Training: forward, backward and step of the fusion that `fit` would train, fed from int8.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import zarr
from numpy.typing import NDArray

from satdifuser.fuse.data import as_feature_maps, decode, to_tensors
from satdifuser.fuse.inputs import named_inputs
from satdifuser.fuse.network import build_network
from satdifuser.fuse.settings import FitSettings
from satdifuser.store.batches import BatchReader
from satdifuser.store.digest import CURRENT
from satdifuser.store.encoding import decode_formula, encode
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore, Stored
from satdifuser.store.schema import Attributes, Hashes, LayerInfo, group_layers
from satdifuser.store.settings import Encoding
from satdifuser.store.writer import TileRow

BATCH = 16
TURN_BYTES = 2e8  # of tiles that each way reads in its turn: long enough for its own pace
TRAINED = 8  # batches of a turn of training
SHARD = 32
SD = [(3, 1280, 64, 4), (6, 1280, 32, 8), (6, 640, 16, 16), (6, 320, 8, 32)]  # layers, channels, stride, side
SMALL = [(21, 200, 8, 8)]  # 25 KB a layer in float16
SHAPES = {"sd": SD, "small": SMALL}
Read = Callable[[NDArray[np.intp]], object]  # of one batch
Pass = Callable[[Sequence[NDArray[np.intp]]], object]  # over several


def main() -> None:
    args = parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        layers = table(SHAPES[args.shape])
        raw = write_raw(folder / "raw.bin", layers, args.tiles)
        shutil.copyfile(folder / "raw.bin", folder / "unmapped.bin")  # what is mapped stays in the page cache
        sync(folder / "unmapped.bin")
        stores = {
            name: write_store(folder / f"{name}.zarr", layers, raw, name) for name in ("float16", "int8")
        }
        per_tile = raw.shape[1] * 2
        print(
            f"{args.tiles} tiles of {per_tile / 1e6:.2f} MB, {len(layers)} layers; batches of {BATCH} tiles"
        )
        ways = whole_tiles(folder / "raw.bin", raw, stores)
        compare("whole tiles, warm", each(ways), folder, args, per_tile, cold=False)
        own = {
            "P": plain(folder / "unmapped.bin", raw),
            **{n: ways[n] for n in ("ours float16", "ours int8")},
        }
        compare("whole tiles, cold", each(own), folder, args, per_tile, cold=True)
        training = passes(folder, stores["int8"])
        compare(
            "training of a global fusion, warm",
            training,
            folder,
            args,
            per_tile,
            False,
            TRAINED * BATCH * per_tile,
        )
        one = one_layer(raw, stores["float16"], layers)
        compare("one layer, warm", each(one), folder, args, per_tile // len(layers), cold=False)
    finally:
        shutil.rmtree(folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="sd", help="sd: 7 MB a tile; small: 25 KB a layer")
    parser.add_argument("--tiles", type=int, default=96)
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--folder", type=Path, help="where to write; default: the temporary folder")
    return parser.parse_args()


def table(shape: list[tuple[int, int, int, int]]) -> list[LayerInfo]:
    return [
        LayerInfo(name=f"stride{stride}.{i}", channels=channels, stride=stride, height=side, width=side)
        for count, channels, stride, side in shape
        for i in range(count)
    ]


def write_raw(path: Path, layers: list[LayerInfo], tiles: int) -> NDArray[np.float16]:
    """A raw file of tiles, (tiles, values) float16, and its memory map."""
    width = sum(layer.channels * layer.height * layer.width for layer in layers)
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(tiles):
            file.write(random.standard_normal(width, dtype=np.float32).astype(np.float16).tobytes())
        os.fsync(file.fileno())
    return np.memmap(path, np.float16, "r", shape=(tiles, width))


def write_store(
    path: Path, layers: list[LayerInfo], raw: NDArray[np.float16], encoding: Encoding
) -> FeatureStore:
    attributes = Attributes(
        store_id="benchmark",
        created="",
        software={},
        task=None,
        classes=[],
        ignore_value=255,
        tiles=len(raw),
        left_out=0,
        tile_size=(256, 256),
        tiles_per_shard=min(SHARD, len(raw)),
        timesteps=[21],
        layers=layers,
        encoding=encoding,
        decode=decode_formula(encoding),
        digest_algorithm=CURRENT,
        previews=False,
        colour_statistics=[],
        backbone={},
        feature_identity={},
        planned=Hashes(feature="", contents="", labels=""),
        settings={},
    )
    with open_or_create(path, attributes, overwrite=True) as writer:
        for shard in range(attributes.shards):
            tiles = range(*attributes.shard_range(shard))
            rows = [TileRow(str(tile), "train", colour=np.empty(0, np.float32)) for tile in tiles]
            groups = [split_tile(raw[tile], layers) for tile in tiles]
            batches = [{name: encode(maps, encoding) for name, maps in tile.items()} for tile in groups]
            writer.write_shard(shard, rows, batches, {})
    return FeatureStore(path)


def split_tile(values: NDArray[np.float16], layers: list[LayerInfo]) -> dict[str, NDArray[np.float32]]:
    """One raw tile as groups of maps, (1, 1, L, C, H, W) float32."""
    groups, start = {}, 0
    for name, held in sorted(group_layers(layers).items(), key=lambda item: item[1][0]):
        first = layers[held[0]]
        shape = (1, 1, len(held), first.channels, first.height, first.width)
        size = int(np.prod(shape))
        groups[name] = values[start : start + size].astype(np.float32).reshape(shape)
        start += size
    return groups


def whole_tiles(path: Path, raw: NDArray[np.float16], stores: dict[str, FeatureStore]) -> dict[str, Read]:
    """Ways to read whole tiles, each into buffers of its own that are made once."""
    buffer = np.empty((BATCH, raw.shape[1]), np.float16)

    def memmap(rows: NDArray[np.intp]) -> None:
        for i, row in enumerate(rows.tolist()):
            buffer[i] = raw[row]

    ways: dict[str, Read] = {"P": plain(path, raw), "memmap": memmap}
    for name, store in stores.items():
        buffers = store.buffers(BATCH)
        ways[f"ours {name}"] = lambda rows, s=store, b=buffers: s.stored(rows, into=b)
    ways["zarr-python float16"] = zarr_python(stores["float16"])
    ways |= tensorstore(stores["float16"])
    return ways


def plain(path: Path, raw: NDArray[np.float16]) -> Read:
    descriptor, buffer = os.open(path, os.O_RDONLY), np.empty((BATCH, raw.shape[1]), np.float16)

    def read(rows: NDArray[np.intp]) -> None:
        for i, row in enumerate(rows.tolist()):
            os.preadv(descriptor, [buffer[i]], row * buffer[i].nbytes)

    return read


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def zarr_python(store: FeatureStore) -> Read:
    root = zarr.open_group(store.path, mode="r")
    arrays = [root[f"features/{group}/values"] for group in store.groups]
    return lambda rows: [np.stack([array[row] for row in rows.tolist()]) for array in arrays]


def tensorstore(store: FeatureStore) -> dict[str, Read]:
    try:
        import tensorstore as ts
    except ImportError:
        print("tensorstore is not installed, so it is not compared")
        return {}
    arrays = [
        ts.open(
            {"driver": "zarr3", "kvstore": f"file://{store.path}/features/{group}/values"},
            open=True,
            read=True,
        ).result()
        for group in store.groups
    ]

    def read(rows: NDArray[np.intp]) -> None:
        for future in [array[rows.tolist()].read() for array in arrays]:
            future.result()

    return {"tensorstore float16": read}


def one_layer(raw: NDArray[np.float16], store: FeatureStore, layers: list[LayerInfo]) -> dict[str, Read]:
    """Ways to read the last layer of the table only, one of the largest maps."""
    width = layers[-1].channels * layers[-1].height * layers[-1].width
    buffer = np.empty((BATCH, width), np.float16)
    selection = store.selection(layers=layers[-1].name)
    buffers = store.buffers(BATCH, selection)

    def memmap(rows: NDArray[np.intp]) -> None:
        for i, row in enumerate(rows.tolist()):
            buffer[i] = raw[row, -width:]

    return {"memmap": memmap, "ours float16": lambda rows: store.stored(rows, into=buffers)}


def each(ways: dict[str, Read]) -> dict[str, Pass]:
    """Ways to read a batch as ways to read one batch after the other."""
    return {name: lambda batches, r=read: [r(rows) for rows in batches] for name, read in ways.items()}


def passes(folder: Path, store: FeatureStore) -> dict[str, Pass]:
    """Ways to train a global fusion on batches of stored bytes."""
    mapped: dict[str, dict[str, NDArray[Any]]] = {}
    rows = np.arange(store.attributes.tiles)
    for group, arrays in store.stored(rows).items():
        mapped[group] = {}
        for name, array in arrays.items():
            path = folder / f"{group}-{name}.npy"
            np.save(path, array)
            mapped[group][name] = np.load(path, mmap_mode="r")
    streamed = BatchReader(store, rows)
    resident = BatchReader(store, rows, budget_bytes=FitSettings().memory_gb * 1e9)

    layers, inputs = store.attributes.layers, named_inputs(store, None, ["*"])
    network = build_network("global", inputs.channels, 1, 10, "classification", FitSettings())
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def use(stored: Stored) -> None:
        maps = decode(layers, to_tensors(stored, torch.device("cpu")))
        logits, _ = network(as_feature_maps(layers, maps, None, inputs))
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
        optimizer.step()

    def from_memmap(batches: Sequence[NDArray[np.intp]]) -> None:
        for rows in batches:
            use({group: {n: array[rows] for n, array in a.items()} for group, a in mapped.items()})

    def from_store(reader: BatchReader, batches: Sequence[NDArray[np.intp]]) -> None:
        for stored in reader.batches(batches):
            use(stored)

    return {
        "memmap int8": from_memmap,
        "ours int8, streamed": partial(from_store, streamed),
        "ours int8, as fit has it": partial(from_store, resident),  # in memory where that is enough
    }


def compare(
    title: str,
    ways: dict[str, Pass],
    folder: Path,
    args: argparse.Namespace,
    tile_bytes: int,
    cold: bool,
    turn_bytes: float = TURN_BYTES,
) -> None:
    """Time all ways in turn; print tiles per second and the median ratio to the first."""
    random, seconds = np.random.default_rng(1), {name: [] for name in ways}
    count = max(1, round(turn_bytes / tile_bytes / BATCH))
    if not cold:
        warm(folder)
    for turn in range(args.turns + 1):
        batches = [random.permutation(args.tiles)[:BATCH] for _ in range(count)]
        for name, read in ways.items():
            if cold:
                forget(folder)
            began = time.perf_counter()
            read(batches)
            if turn:  # the first fills the caches
                seconds[name].append(time.perf_counter() - began)
    first = seconds[next(iter(ways))]
    print(f"\n{title}")
    for name, taken in seconds.items():
        ratio = median(a / b for a, b in zip(first, taken, strict=True))
        speed = BATCH * count / median(taken)
        print(f"  {name:24} {speed:9.0f} tiles/s  {speed * tile_bytes / 1e6:8.0f} MB/s  {ratio:5.2f}")


def warm(folder: Path) -> None:
    """Fill the page cache with all files of a folder."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def forget(folder: Path) -> None:
    """Empty the page cache of all files of a folder."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
