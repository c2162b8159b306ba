"""How fast several processes extract side by side, by the times of their commits."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from satdifuser.extract.job import Job
from satdifuser.store.device import cores


def rate_of(job: Job, per_shard: int, out: Path, count: int) -> float:
    """Tiles per second of so many processes, each of which has its own shards and part of the cores.

    Args:
        job: What they extract; its number of threads does not count.
        per_shard: Tiles of a shard; all shards are whole, and each process has as many of them.
        out: Where the store lies meanwhile.
        count: Of the processes.
    """
    config = out.with_suffix(".yaml")
    settings = job.settings.model_copy(update={"threads": max(1, cores() // count)})
    names = ("source", "backbone", "extract", "store")
    parts = (job.source_settings, job.backbone_settings, settings, job.store)
    dumped = [part.model_dump(mode="json") for part in parts]
    config.write_text(yaml.safe_dump(dict(zip(names, dumped, strict=True))))
    command = [sys.executable, "-m", "satdifuser", "extract", "-c", config, "-o", out]
    running = [
        subprocess.Popen([*command, "--shard", f"{i}/{count}"], stdout=subprocess.DEVNULL)
        for i in range(1, count + 1)
    ]
    try:
        if any(process.wait() for process in running):
            raise SystemExit(f"{out}: a process failed")
    finally:
        for process in running:
            process.kill()
    rate = per_shard * common_rate(out / "commits/c", count)
    shutil.rmtree(out)
    return rate


def common_rate(commits: Path, count: int) -> float:
    """Shards per second while all processes were past their first shard and before their last commit."""
    times: list[list[float]] = [[] for _ in range(count)]
    for file in sorted(commits.iterdir(), key=lambda file: int(file.name)):
        times[int(file.name) % count].append(file.stat().st_mtime)
    start, end = max(own[0] for own in times), min(own[-1] for own in times)
    shards = sum(float(np.diff(np.interp([start, end], own, range(len(own))))[0]) for own in times)
    return shards / (end - start)
