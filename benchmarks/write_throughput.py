"""How fast shards are written, against a plain file write and fsync of the same bytes.

    python benchmarks/write_throughput.py [--folder FOLDER] [--tiles 24] [--rounds 3]

Makes up features of Stable Diffusion 2.1's size at 256 px, 21 layers, one timestep: 7 MB a tile in float16.
Each round writes the same encoded shard plainly and with `StoreWriter.write_shard`, once with digests of
BLAKE3 and once with SHA-256 as stores had them before, in turns so that other load on the machine meets all
alike; the store's write has all checksums, digests and syncs. Prints MB/s of encoded bytes, seconds of the
processor's cores for a GB, and the median ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from satdifuser.store.digest import CURRENT, DigestAlgorithm
from satdifuser.store.encoding import decode_formula, encode
from satdifuser.store.opening import open_or_create
from satdifuser.store.schema import Attributes, Hashes, LayerInfo, group_layers
from satdifuser.store.settings import Encoding
from satdifuser.store.writer import Encoded, TileRow

# up block: channels, image pixels per feature pixel, attn1 layers, conv2 layers
BLOCKS = [(1280, 64, 0, 3), (1280, 32, 3, 3), (640, 16, 3, 3), (320, 8, 3, 3)]
IMAGE_SIZE = 256
ALGORITHMS: tuple[DigestAlgorithm, ...] = ("blake3", "sha256")
ENCODINGS: tuple[Encoding, ...] = ("float16", "rounded", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where to write; the system's temporary folder if left out"
    )
    parser.add_argument("--tiles", type=int, default=24, help="tiles of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for encoding in ENCODINGS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            compare(Path(folder), encoding, args.tiles, args.rounds)


def sd_layers() -> list[LayerInfo]:
    """The 21 layers that are tapped by default in a U-Net of Stable Diffusion's shape."""
    layers = []
    for block, (channels, stride, attentions, convolutions) in enumerate(BLOCKS):
        size = IMAGE_SIZE // stride
        names = [f"attentions.{i}.transformer_blocks.0.attn1" for i in range(attentions)]
        names += [f"resnets.{i}.conv2" for i in range(convolutions)]
        for name in names:
            full = f"up_blocks.{block}.{name}"
            layers.append(LayerInfo(name=full, channels=channels, stride=stride, height=size, width=size))
    return layers


def attributes(
    layers: list[LayerInfo],
    encoding: Encoding,
    tiles: int,
    shards: int,
    algorithm: DigestAlgorithm = CURRENT,
) -> Attributes:
    """What a store of made-up features declares about itself."""
    return Attributes(
        store_id="benchmark",
        created="now",
        software={"satdifuser": "benchmark"},
        task=None,
        classes=[],
        ignore_value=255,
        tiles=tiles * shards,
        left_out=0,
        tile_size=(IMAGE_SIZE, IMAGE_SIZE),
        tiles_per_shard=tiles,
        timesteps=[61],
        layers=layers,
        encoding=encoding,
        decode=decode_formula(encoding),
        digest_algorithm=algorithm,
        previews=False,
        colour_statistics=[],
        backbone={"model": "made up"},
        feature_identity={},
        planned=Hashes(feature="", contents="", labels=""),
        settings={},
    )


def made_up(layers: list[LayerInfo], encoding: Encoding, tiles: int) -> Encoded:
    """Random encoded features."""
    random, encoded = np.random.default_rng(0), {}
    for group, positions in group_layers(layers).items():
        first = layers[positions[0]]
        shape = (tiles, 1, len(positions), first.channels, first.height, first.width)
        encoded[group] = encode(random.standard_normal(shape, dtype=np.float32), encoding)
    return encoded


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds that an action takes, and those of the cores that work on it."""
    began = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def write_plainly(path: Path, encoded: Encoded) -> None:
    """Write all arrays to one file, one after the other, and sync it."""
    with path.open("wb") as file:
        for arrays in encoded.values():
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).data)
        file.flush()
        os.fsync(file.fileno())


def compare(folder: Path, encoding: Encoding, tiles: int, rounds: int) -> None:
    """Write a shard a round each way and print the rates; the first round warms up and is not counted."""
    layers = sd_layers()
    encoded = made_up(layers, encoding, tiles)
    gigabytes = sum(array.nbytes for arrays in encoded.values() for array in arrays.values()) / 1e9
    print(f"{encoding}: {1e3 * gigabytes:.0f} MB a shard of {tiles} tiles")
    found: dict[str, list[tuple[float, float]]] = {}
    with ExitStack() as stack:
        writers = {
            algorithm: stack.enter_context(
                open_or_create(
                    folder / f"{algorithm}.zarr",
                    attributes(layers, encoding, tiles, rounds + 1, algorithm),
                    overwrite=False,
                )
            )
            for algorithm in ALGORITHMS
        }
        for shard in range(rounds + 1):
            rows = [TileRow(f"{shard}-{tile}", "train") for tile in range(tiles)]
            ways: dict[str, Callable[[], object]] = {
                "plain": lambda: write_plainly(folder / "plain", encoded)
            }
            ways |= {
                algorithm: lambda writer=writer, shard=shard, rows=rows: writer.write_shard(
                    shard, rows, [encoded], {}
                )
                for algorithm, writer in writers.items()
            }
            for way, write in ways.items():
                found.setdefault(way, []).append(timed(write))
            (folder / "plain").unlink()
    for way, times in found.items():
        wall, cores = (statistics.median(column) for column in zip(*times[1:], strict=True))
        ratio = statistics.median(p[0] / t[0] for p, t in zip(found["plain"][1:], times[1:], strict=True))
        print(
            f"  {way:7} {1e3 * gigabytes / wall:6.0f} MB/s, {cores / gigabytes:5.2f} s of cores a GB, "
            f"{ratio:.2f} of a plain write (medians)"
        )


if __name__ == "__main__":
    main()
