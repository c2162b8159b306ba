"""Training's reads from a bucket with a warm cache, against the same store in a local folder.

    python benchmarks/remote_training.py STORE [--rounds 5] [--batch 16]

Uploads the store to an S3 server of its own on this machine (moto), fills the cache, then reads all batches
of the train split both ways, in turns. Prints seconds a pass with the opening of the store, and the median
ratio.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

from moto.server import ThreadedMotoServer

from satdifuser.store.reader import open_store
from satdifuser.store.remote import upload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "made",
            "AWS_SECRET_ACCESS_KEY": "up",
            "AWS_REGION": "us-east-1",
            "SATDIFUSER_CACHE": cache,
        }
        connection = HTTPConnection("127.0.0.1", port)
        connection.request("PUT", "/bench")
        connection.getresponse().read()
        address = "s3://bench/store.zarr"
        upload(open_store(args.store), address)
        print(f"first pass, which fills the cache: {timed(lambda: read_all(address, args.batch)):.2f} s")
        compare(str(args.store), address, args.batch, args.rounds)
    server.stop()


def compare(local: str, address: str, batch: int, rounds: int) -> None:
    """Time both in turns."""
    ratios = []
    for _ in range(rounds):
        here = timed(lambda: read_all(local, batch))
        there = timed(lambda: read_all(address, batch))
        ratios.append(there / here)
        print(f"  folder {here:.3f} s   s3 {there:.3f} s")
    print(f"s3 takes {statistics.median(ratios):.2f} of the time of the folder (median)")


def read_all(store: str, batch: int) -> None:
    for _ in open_store(store).batches(split="train", batch_size=batch, seed=0):
        pass


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
