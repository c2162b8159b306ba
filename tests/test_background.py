"""Encoding and writing beside the backbone: order, errors, interruption and how much waits in memory."""

from __future__ import annotations

import errno
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from made_up import tiny_unet, tiny_vae
from safetensors.torch import save_file

import satdifuser.extract.compute as compute
import satdifuser.store.files as store_files
from satdifuser.errors import FeatureError, StoreError
from satdifuser.extract.background import Background
from satdifuser.extract.job import Job
from satdifuser.extract.run import extract
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, SyntheticSettings
from satdifuser.store.reader import open_store
from satdifuser.store.settings import StoreSettings
from satdifuser.store.verify import verify
from satdifuser.store.writer import StoreWriter

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
WRITE_SHARD = StoreWriter.write_shard


def our_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("encode", "write", "read"))]


# --- the thread alone


def test_tasks_run_one_by_one_in_their_order() -> None:
    running, seen = threading.Lock(), []

    def task(number: int) -> int:
        with running:  # a second one at a time would find it taken
            time.sleep(0.002)
            seen.append(number)
            return number * number

    with Background("write") as thread:
        futures = [thread.hand(partial(task, number)) for number in range(20)]
    assert seen == list(range(20))
    assert [future.result() for future in futures] == [number * number for number in seen]


def test_tasks_of_another_one_count_as_those_before() -> None:
    """Through one without tasks, too, and whatever becomes of them."""
    release, ended = threading.Event(), list[str]()

    def slow() -> None:
        assert release.wait(60)
        ended.append("slow")
        raise ValueError

    with pytest.raises(ValueError), Background("a") as first:  # noqa: PT011, PT012
        first.hand(slow)
        with Background("b") as second, Background("c") as third:
            second.after, third.after = first, second
            threading.Timer(0.2, release.set).start()
            third.hand(lambda: ended.append("quick"))
            assert ended[0] == "slow"
            assert third.after is None
    assert ended == ["slow", "quick"]


def test_at_most_one_task_is_under_way() -> None:
    release, begun = threading.Event(), threading.Event()

    def task() -> None:
        begun.set()
        release.wait(10)

    with Background("write") as thread:
        thread.hand(task)
        assert begun.wait(10)
        thread.check()  # does not wait
        threading.Timer(0.05, release.set).start()
        before = time.monotonic()
        thread.hand(bool)
        assert time.monotonic() - before > 0.03


def test_as_many_tasks_wait_as_may() -> None:
    release, seen = threading.Event(), []

    def task(number: int) -> None:
        release.wait(10)
        seen.append(number)

    with Background("write", waiting=1) as thread:
        before = time.monotonic()
        thread.hand(partial(task, 0))
        thread.hand(partial(task, 1))  # does not wait
        assert time.monotonic() - before < 5
        threading.Timer(0.05, release.set).start()
        before = time.monotonic()
        thread.hand(partial(task, 2))
        assert time.monotonic() - before > 0.03
    assert seen == [0, 1, 2]


def test_an_error_is_not_overlooked_for_those_it_causes() -> None:
    """The first task fails after it was looked at, so that the second one is looked at next."""
    release = threading.Event()

    def fail_late() -> None:
        release.wait(10)
        fail()

    def hand_both() -> Future[bool]:
        with Background("write", waiting=1) as thread:
            thread.hand(fail_late)
            second = thread.hand(bool)
            release.set()
            assert isinstance(second.exception(10), OSError)
            thread.check()
            return second

    with pytest.raises(OSError, match="full"):
        hand_both()


def test_a_task_that_waits_behind_one_that_fails_is_not_begun() -> None:
    release, done = threading.Event(), []

    def fail_late() -> None:
        release.wait(10)
        fail()

    def hand_both() -> None:
        with Background("write", waiting=1) as thread:
            thread.hand(fail_late)
            thread.hand(partial(done.append, 1))
            release.set()

    with pytest.raises(OSError, match="full"):
        hand_both()
    assert done == []


def fail() -> None:
    raise OSError(errno.ENOSPC, "full")


def check_when_done(thread: Background) -> None:
    while not thread._handed or not thread._handed[0].done():
        time.sleep(0.001)
    thread.check()


DONE: list[int] = []
WAYS: dict[str, Callable[[Background], object]] = {
    "hand": lambda thread: thread.hand(partial(DONE.append, 1)),
    "wait": Background.wait,
    "check": check_when_done,
    "leave": lambda thread: None,
}


@pytest.mark.parametrize("way", WAYS)
def test_an_error_reaches_the_caller_and_nothing_is_begun_after_it(way: str) -> None:
    with pytest.raises(OSError, match="full"):
        hand_and(fail, WAYS[way])
    assert DONE == []
    assert our_threads() == []


def hand_and(task: Callable[[], object], then: Callable[[Background], object]) -> None:
    with Background("write") as thread:
        thread.hand(task)
        then(thread)


def interrupt(_: Background) -> None:
    raise KeyboardInterrupt


def test_an_interruption_lets_the_task_under_way_finish() -> None:
    done: list[int] = []

    def task() -> None:
        time.sleep(0.05)
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        hand_and(task, interrupt)
    assert done == [1]
    assert our_threads() == []


def test_tasks_can_tell_that_nobody_waits_for_them() -> None:
    with Background("write") as left_in_peace:
        pass
    with pytest.raises(KeyboardInterrupt), Background("write") as left_by_an_error:
        raise KeyboardInterrupt
    assert (left_in_peace.stopped.is_set(), left_by_an_error.stopped.is_set()) == (False, True)


def test_an_interruption_while_tasks_are_waited_for_stops_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which reaches the main thread where it waits, since most work is with the others."""
    thread, ended = Background("write"), list[bool]()

    def cut_off() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(thread, "wait", cut_off)
    with pytest.raises(KeyboardInterrupt), thread:
        thread.hand(lambda: ended.append(thread.stopped.wait(20)))
    assert ended == [True]
    assert our_threads() == []


def test_several_threads_begin_tasks_in_their_order() -> None:
    both, begun = threading.Barrier(2, timeout=20), []

    def task(number: int) -> int:
        begun.append(number)
        both.wait()  # two are under way, or this fails
        return threading.get_ident()

    with Background("write", threads=2) as threads:
        idents = {threads.hand(partial(task, number)) for number in range(6)}
    assert sorted(begun) == list(range(6))
    assert sorted(begun[:2]) == [0, 1]
    assert len({ident.result() for ident in idents}) == 2


# --- extraction


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_unet().save_pretrained(root / "unet")
    tiny_vae().save_pretrained(root / "vae")
    DDIMScheduler(steps_offset=1).save_pretrained(root / "scheduler")
    save_file({"hidden_states": torch.randn(1, 1, 8)}, root / "prompt_embedding.safetensors")
    return root


def make_job(folder: Path, tiles: int = 11) -> Job:
    """Shards of 3 tiles in batches of 2 tiles."""
    return Job(
        SyntheticSettings(tiles=tiles, tile_size=(16, 24)),
        BackboneSettings(model=str(folder), device="cpu"),
        ExtractSettings(batch_size=2, threads=1),
        StoreSettings(tiles_per_shard=3),
    )


def test_a_tile_count_that_is_no_multiple_of_the_shard(folder: Path, tmp_path: Path) -> None:
    store = extract(make_job(folder), tmp_path / "s.zarr")
    assert (len(store.tiles), store.attributes.shards) == (11, 4)
    assert verify(store, deep=True) == []
    assert [record["shard"] for record in store.commits] == list(range(4))
    assert our_threads() == []


def test_features_do_not_depend_on_what_runs_beside_what(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk, and everything one after the other in one thread."""
    first = extract(make_job(folder), tmp_path / "a.zarr").content_digest()
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "write_shard", slow_write)
        assert extract(make_job(folder), tmp_path / "b.zarr").content_digest() == first
    hand = Background.hand

    def serially(self: Background, task: Any) -> Any:
        future = hand(self, task)
        self.wait()
        return future

    monkeypatch.setattr(Background, "hand", serially)
    assert extract(make_job(folder), tmp_path / "c.zarr").content_digest() == first


def slow_write(self: StoreWriter, *shard: Any) -> int:
    time.sleep(0.02)
    return WRITE_SHARD(self, *shard)


def test_a_full_disk_stops_at_the_next_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, batches = tmp_path / "s.zarr", []
    launch = compute.launch_images
    under_way, failed = threading.Event(), threading.Event()

    def count(work: Any, tiles: Sequence[Any], *rest: Any) -> Any:
        if len(batches) == 4:  # of shard 2, while shard 1 is being written
            under_way.set()
            assert failed.wait(10)
            time.sleep(0.1)
        batches.append(len(tiles))
        return launch(work, tiles, *rest)

    def full(self: StoreWriter, shard: int, *rest: Any) -> int:
        if shard != 1:
            return WRITE_SHARD(self, shard, *rest)
        assert under_way.wait(10)
        with monkeypatch.context() as patch:
            patch.setattr(store_files, "write_durably", lambda *_, **__: fail())
            try:
                return WRITE_SHARD(self, shard, *rest)
            finally:
                failed.set()

    monkeypatch.setattr(compute, "launch_images", count)
    monkeypatch.setattr(StoreWriter, "write_shard", full)
    with pytest.raises(
        StoreError, match=r"s\.zarr: shard 1: the disk is full; committed shards are kept: free"
    ):
        extract(make_job(folder), out)
    assert batches == [2, 1, 2, 1, 2]  # shards 0 and 1, and the first batch of shard 2 that was under way
    assert open_store(out).missing_shards() == [1, 2, 3]
    assert our_threads() == []
    monkeypatch.undo()
    resumed = extract(make_job(folder), out)
    assert resumed.content_digest() == extract(make_job(folder), tmp_path / "whole.zarr").content_digest()


def test_a_value_that_cannot_be_encoded_is_refused_with_its_tile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, calls = compute._send, []

    def spoil(work: Any, latents: Any, maps: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the last batch of shard 1: its write would come first to meet the error
            maps[0][:] = np.nan
        return send(work, latents, maps, *rest)

    monkeypatch.setattr(compute, "_send", spoil)
    with pytest.raises(FeatureError, match=r"tile .*, layer up_blocks.* magnitude nan, expected a finite"):
        extract(make_job(folder), tmp_path / "s.zarr")
    assert open_store(tmp_path / "s.zarr").missing_shards() == [1, 2, 3]
    assert our_threads() == []


def test_an_interruption_keeps_the_shard_being_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, calls = compute.launch_images, []

    def interrupt(*words: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return launch(*words)

    monkeypatch.setattr(compute, "launch_images", interrupt)
    monkeypatch.setattr(StoreWriter, "write_shard", slow_write)
    with pytest.raises(KeyboardInterrupt):
        extract(make_job(folder), tmp_path / "s.zarr")
    assert open_store(tmp_path / "s.zarr").missing_shards() == [2, 3]
    assert our_threads() == []


def test_no_more_than_three_shards_are_held(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slower than the backbone; each encoded batch is counted for as long as it lives."""
    alive: list[int] = []
    counts: list[int] = []
    send = compute._send

    def watch(*words: Any) -> Any:
        finish = send(*words)

        def watched() -> Any:
            found = finish()
            alive.append(1)
            weakref.finalize(next(iter(found.encoded.values()))["values"], alive.pop)
            counts.append(len(alive))
            return found

        return watched

    def blocked_write(self: StoreWriter, *shard: Any) -> int:
        while len(counts) < 5:  # whatever the disk does, two shards and a batch are computed
            time.sleep(0.001)
        return slow_write(self, *shard)

    monkeypatch.setattr(compute, "_send", watch)
    monkeypatch.setattr(StoreWriter, "write_shard", blocked_write)
    extract(make_job(folder), tmp_path / "s.zarr")
    assert len(counts) == 7
    assert 5 <= max(counts) <= 6  # two batches a shard: that is more than two shards, and at most three
