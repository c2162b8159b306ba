"""One extraction in several processes: job arrays, Dask workers, refusals, and what survives a kill."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread, Timer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from child_processes import children_of, is_alive
from command_line import call, refuse, succeed
from diffusers import DDIMScheduler
from made_up import tiny_unet, tiny_vae
from made_up_store import build, new_attributes
from safetensors.torch import save_file

from satdifuser.errors import ClusterError, SettingsError, StoreError
from satdifuser.extract import cluster, worker
from satdifuser.extract.cluster import rates_text
from satdifuser.extract.device import share_memory
from satdifuser.extract.run import Part, parse_part
from satdifuser.extract.worker import Machine, check_versions, own_versions
from satdifuser.pipeline import load_pipeline
from satdifuser.store import opening
from satdifuser.store.cluster import Cluster
from satdifuser.store.lock import StoreLock, lock_file
from satdifuser.store.opening import MOMENT_SECONDS, create_unless_there, open_or_create, open_part
from satdifuser.store.reader import open_store
from satdifuser.store.schema import Hashes
from satdifuser.store.verify import verify
from satdifuser.store.writer import StoreWriter

pytest.importorskip("distributed", reason="the extra dask is not installed")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline file: 23 small tiles in shards of 3."""
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_unet().save_pretrained(root / "unet")
    tiny_vae().save_pretrained(root / "vae")
    DDIMScheduler(steps_offset=1).save_pretrained(root / "scheduler")
    save_file({"hidden_states": torch.randn(1, 1, 8)}, root / "prompt_embedding.safetensors")
    file = root / "pipeline.yaml"
    file.write_text(
        f"source: {{tiles: 23, tile_size: [16, 24]}}\nbackbone: {{model: {root}, device: cpu}}\n"
        "extract: {batch_size: 2, threads: 1}\nstore: {tiles_per_shard: 3}\n"
    )
    return file


@pytest.fixture(scope="module")
def digest(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The content digest of a single process."""
    out = tmp_path_factory.mktemp("one") / "s.zarr"
    succeed("extract", "-c", config, "-o", out)
    found = open_store(out).content_digest()
    assert found
    return found


# --- job arrays


def test_parts_cover_all_shards_once() -> None:
    for of in (1, 2, 3, 7):
        shards = [shard for number in range(1, of + 1) for shard in Part(number, of).shards(range(10))]
        assert sorted(shards) == list(range(10))


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_wrong_parts(text: str) -> None:
    with pytest.raises(
        SettingsError, match=r"--shard: got .*, expected part I of N from 1/N to N/N, e\.g\. 1/8"
    ):
        parse_part(text)


def test_a_job_array_writes_what_one_process_writes(config: Path, tmp_path: Path, digest: str) -> None:
    out = tmp_path / "s.zarr"
    words = ("extract", "-c", config, "-o", out, "--shard")
    assert "part 2 of 3 is done; the store lacks shards of parts 1, 3" in call(*words, "2/3").stderr
    assert "8 of" not in call(*words, "2/3").stderr  # again: nothing to do, nothing lost
    assert "part 3 of 3 is done; the store lacks shards of part 1\n" in call(*words, "3/3").stderr
    assert "part 1 of 3 is done; and all others" in call(*words, "1/3").stderr
    store = open_store(out)
    assert store.content_digest() == digest
    assert verify(store, deep=True) == []
    assert (out / "README.md").is_file()
    assert not lock_file(out).exists()


def test_a_part_begins_while_others_are_at_work(config: Path, tmp_path: Path) -> None:
    words = ("extract", "-c", config, "-o", tmp_path / "s.zarr", "--shard")
    succeed(*words, "1/2")
    with StoreLock(tmp_path / "s.zarr", shared=True):
        succeed(*words, "2/2")


def test_parts_that_begin_at_once_take_the_values_of_the_first(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part whose own `auto` differs from what the store was begun with meanwhile."""
    import satdifuser.extract.run as run

    out, create = tmp_path / "s.zarr", run.create_unless_there

    def late(path: Path, attributes: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(run, "create_unless_there", create)
            succeed("extract", "-c", config, "-o", out, "--shard", "2/2", "--set", "extract.batch_size=3")
        create(path, attributes)

    monkeypatch.setattr(run, "create_unless_there", late)
    succeed("extract", "-c", config, "-o", out, "--shard", "1/2", "--set", "extract.batch_size=auto")
    store = open_store(out)
    assert store.missing_shards() == []
    assert {record["batch_size"] for record in store.commits} == {3}


def test_ways_of_spreading_exclude_each_other(config: Path, tmp_path: Path) -> None:
    words = ("extract", "-c", config, "-o", tmp_path / "s.zarr")
    told = refuse(*words, "--workers", "2", "--shard", "1/2")
    assert "--workers and --shard: each is a way by itself; name one of them" in told
    assert "--shard: with --overwrite each part would delete" in refuse(
        *words, "--shard", "1/2", "--overwrite"
    )
    assert "--workers: a store grows in one process" in refuse(*words, "--workers", "2", "--relabel")


# --- locks and writers


def test_a_shared_lock_keeps_others_away_and_goes_with_its_last_holder(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    first, second = StoreLock(path, shared=True), StoreLock(path, shared=True)
    with pytest.raises(StoreError, match="is being written by process"):
        StoreLock(path)
    first.release()
    with pytest.raises(StoreError, match="is being written by process"):
        StoreLock(path)
    second.release()
    assert not lock_file(path).exists()
    alone = StoreLock(path)
    with pytest.raises(StoreError, match="is being written by process"):
        StoreLock(path, shared=True)
    alone.release()


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    held = StoreLock(tmp_path / "s.zarr")
    Timer(0.3, held.release).start()
    StoreLock(tmp_path / "s.zarr", patience=10.0).release()


def test_a_store_for_several_is_created_once_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    create_unless_there(path, new_attributes(store_id="a"))
    create_unless_there(path, new_attributes(store_id="b"))
    assert open_store(path).attributes.store_id == "a"
    other = Hashes(feature="f", contents="c", labels="other")
    with pytest.raises(StoreError, match="made with other settings"):
        open_part(path, new_attributes(planned=other))
    open_or_create(path, new_attributes(), overwrite=False).close()  # the lock of the refused one is free
    (tmp_path / "other").mkdir()
    with pytest.raises(StoreError, match="exists and is not a feature store"):
        create_unless_there(tmp_path / "other", new_attributes())


def test_a_store_that_others_fill_is_not_waited_for(tmp_path: Path) -> None:
    path = build(tmp_path / "s.zarr", shards=(0,))
    with StoreLock(path, shared=True):
        began = time.monotonic()
        create_unless_there(path, new_attributes())
        open_part(path, new_attributes()).close()
        assert time.monotonic() - began < MOMENT_SECONDS


def test_parts_wait_for_the_first_one_to_create_the_store_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, begun, create = tmp_path / "s.zarr", Event(), opening.create_store

    def slowly(*given: Any) -> None:
        begun.set()
        time.sleep(0.5)
        create(*given)

    def first() -> None:
        create_unless_there(path, new_attributes())
        held.append(open_part(path, new_attributes()))  # and fills it

    held: list[StoreWriter] = []
    monkeypatch.setattr(opening, "create_store", slowly)
    thread = Thread(target=first)
    thread.start()
    assert begun.wait(10)
    create_unless_there(path, new_attributes())
    open_part(path, new_attributes()).close()
    thread.join()
    held[0].close()
    assert not lock_file(path).exists()


def test_a_writer_among_others_leaves_their_unfinished_files(tmp_path: Path) -> None:
    path = build(tmp_path / "s.zarr", shards=(0,))
    orphan = path / "commits/c/1.partial"
    orphan.write_bytes(b"")
    StoreWriter(path, lock=None, alone=False).close()
    assert orphan.exists()
    open_or_create(path, new_attributes(), overwrite=False).close()
    assert not orphan.exists()


# --- versions and messages


def test_a_worker_of_another_version_is_refused() -> None:
    check_versions(own_versions())
    with pytest.raises(ClusterError, match=r"worker .* has code .* instead of 0; its features could differ"):
        check_versions(own_versions() | {"code": "0"})
    with pytest.raises(
        ClusterError, match=r"torch .* instead of 1\.0; .*install the same versions everywhere"
    ):
        check_versions(own_versions() | {"torch": "1.0"})


@pytest.mark.parametrize(
    ("device", "gpus", "workers", "expected"),
    [
        ("cuda", 4, 4, 1),
        ("cuda", 4, 5, 2),
        ("cuda", 1, 3, 3),
        ("cuda:1", 4, 3, 3),  # one that was asked for
        ("cuda", 2, 0, 1),  # wherever a scheduler has them
        ("cpu", 0, 4, 1),
    ],
)
def test_workers_share_gpus(device: str, gpus: int, workers: int, expected: int) -> None:
    assert Machine(device, cores=16, gpus=gpus).processes_per_gpu(workers) == expected


def test_processes_that_share_a_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: limits.append(given))
    gpu = SimpleNamespace(total_memory=12e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for device, processes in (("cpu", 2), ("cuda", 1), ("cuda", 2), ("cuda:1", 3)):
        share_memory(torch.device(device), processes)
    assert limits == [(0.45, None), (pytest.approx(1 / 3 - 0.05), torch.device("cuda:1"))]


class Here:
    """Stands for a cluster's client: whatever is sent to a worker runs here."""

    def wait_for_workers(self, count: int) -> None:
        pass

    def submit(self, task: Any, *given: Any, pure: bool) -> Any:
        found = task(*given)
        return SimpleNamespace(result=lambda: found)


def test_workers_are_told_how_many_share_a_gpu(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[Any] = []
    monkeypatch.setattr(worker, "share_memory", lambda *given: shares.append(given))
    monkeypatch.setattr(cluster, "survey", lambda *given: Machine("cuda", cores=16, gpus=2))
    job = load_pipeline(config, ["extract.threads=auto"]).job()
    plan, order = cluster._order(job, tmp_path / "s.zarr", Cluster(workers=6), Here(), False, False)
    assert (order.processes_per_gpu, order.job.settings.threads, order.reader_processes) == (3, 2, 1)
    on_cpu = order.job.backbone_settings.model_copy(update={"device": "cpu"})
    on_cpu_order = replace(order, job=replace(order.job, backbone_settings=on_cpu))
    loaded = worker._load(on_cpu_order, list(plan.records))
    assert shares == [(torch.device("cpu"), 3)]
    assert loaded.readers
    monkeypatch.setattr(cluster, "survey", lambda *given: Machine("cpu", cores=16, gpus=0))
    plan, order = cluster._order(job, tmp_path / "t.zarr", Cluster(workers=6), Here(), False, False)
    assert worker._load(order, list(plan.records)).readers is None
    assert len(loaded.readers.read(plan.records[:2])) == 2  # of a shard that is still under way


def test_rates_name_the_slowest_workers() -> None:
    assert rates_text({"0": (10, 2.0), "1": (6, 2.0)}) == "1: 3, 0: 5 tiles/s"
    assert rates_text({str(i): (i + 1, 1.0) for i in range(9)}).endswith("5: 6, … tiles/s")


def test_a_scheduler_that_is_not_there(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = cluster.Cluster.connect
    monkeypatch.setattr(cluster.Cluster, "connect", lambda self: connect(self, patience=0.5))
    told = refuse("extract", "-c", config, "-o", tmp_path / "s.zarr", "--scheduler", "tcp://127.0.0.1:9")
    assert "--scheduler tcp://127.0.0.1:9: cannot be reached within 0 s" in told
    assert "start it with `dask scheduler`" in told


# --- a real cluster: the command in a process of its own, since Dask starts its workers anew from it


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "satdifuser", *map(str, words)]


@contextlib.contextmanager
def started(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process group that ends with the block."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def committed(out: Path) -> int:
    folder = out / "commits/c"
    return len([file for file in folder.iterdir() if file.name.isdecimal()]) if folder.is_dir() else 0


def wait_for(condition: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("readers", [0, 2])
def test_two_workers_of_which_one_is_killed(config: Path, tmp_path: Path, digest: str, readers: int) -> None:
    import psutil

    out = tmp_path / "s.zarr"
    words = ["extract", "-c", config, "-o", out, "--workers", "2"]
    if readers:
        words += [f"--set=extract.read_threads={readers}", "--set=extract.read_processes=true"]
    with started(command(*words)) as process:
        wait_for(lambda: committed(out) >= 1 or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) >= 2
        of_the_killed = children_of(workers[-1].pid)
        assert len(of_the_killed) == readers
        workers[-1].kill()
        left = committed(out)
        _, told = process.communicate(timeout=400)
    assert re.search("^worker tcp://.* has left; what it had begun is done again$", told, re.MULTILINE)
    wait_for(lambda: not any(map(is_alive, of_the_killed)))
    assert process.returncode == 0, told
    assert left < 8, "all was done before the kill"
    store = open_store(out)
    assert store.content_digest() == digest
    assert verify(store, deep=True) == []


@pytest.mark.slow
def test_a_scheduler_that_is_started_anew(config: Path, tmp_path: Path, digest: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, address = tmp_path / "s.zarr", f"tcp://127.0.0.1:{port}"
    dask = [sys.executable, "-m", "distributed.cli"]
    scheduler = [*dask[:-1], "distributed.cli.dask_scheduler", "--port", str(port), "--no-dashboard"]
    worker = [*dask[:-1], "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    with started(command("extract", "-c", config, "-o", out, "--scheduler", address)) as process:
        with started(scheduler), started(worker):
            wait_for(lambda: committed(out) >= 2 or process.poll() is not None)
            assert process.poll() is None, process.communicate()[1]
        left = committed(out)
        assert left < 8, "all was done before the restart"
        with started(scheduler), started(worker):
            _, told = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert "the scheduler is lost" in told
    assert open_store(out).content_digest() == digest
