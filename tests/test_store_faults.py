"""Killed, cut off from power, damaged, raced: a store goes on to the same features, or says what is wrong."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from made_up import random_store
from made_up_disk import LOSSES, power_cut, record, replay
from made_up_store import build, contents, contents_or_refusal, flip, new_attributes, write

from satdifuser.cli import cli
from satdifuser.errors import StoreError
from satdifuser.store.lock import StoreLock, lock_file
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import open_store
from satdifuser.store.repair import repair
from satdifuser.store.schema import LayerInfo
from satdifuser.store.verify import inspect_store

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
SHARDS = 12
PATIENCE_S = 120


# --- the commands


def extraction(path: Path, shards: int = SHARDS) -> list[str]:
    """A command that extracts one small tile a shard."""
    settings = [
        "source.kind=synthetic",
        f"source.tiles={shards}",
        "source.tile_size=32",
        "extract.threads=1",
        "extract.timesteps=[21]",
        "extract.layers=['up_blocks.1.*attn1']",
        "store.tiles_per_shard=1",
    ]
    return ["extract", "-o", str(path), *(word for setting in settings for word in ("--set", setting))]


def call(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def succeed(*words: object) -> Result:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result


def refuse(*words: object) -> str:
    result = call(*words)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    return result.stderr


def digest(path: Path) -> str:
    found: str = json.loads(succeed("store", "info", path, "--json").stdout)["content_digest"]
    return found


def commit_times(path: Path) -> dict[str, int]:
    files = [file for file in (path / "commits/c").glob("*") if file.name.isdigit()]
    return {file.name: file.stat().st_mtime_ns for file in files}


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in another process, and kill it at the latest when the block ends."""
    words = [sys.executable, "-m", "satdifuser", *command]
    with log.open("wb") as file:
        process = subprocess.Popen(words, env=ENVIRONMENT, cwd=log.parent, stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for_commits(path: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while len(commit_times(path)) < count and time.monotonic() < deadline:
        time.sleep(0.002)
    assert len(commit_times(path)) >= count


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose extraction nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    succeed(*extraction(path))
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "s.zarr"))


# --- kill -9


@pytest.mark.parametrize(
    ("kills", "shards"), [(3, 24), pytest.param(50, 260, marks=pytest.mark.slow, id="slow")]
)
def test_killed_at_random_moments(tmp_path: Path, kills: int, shards: int) -> None:
    killed, undisturbed, log = tmp_path / "killed.zarr", tmp_path / "whole.zarr", tmp_path / "log"
    moments = random.Random(0)
    for _ in range(kills):
        before = commit_times(killed)
        with running(extraction(killed, shards), log) as process:
            wait_for_commits(killed, len(before) + 1)
            time.sleep(moments.uniform(0, 0.15))
            process.kill()
            assert process.wait() == -signal.SIGKILL
        after = commit_times(killed)
        assert before.items() <= after.items()  # what was there stays untouched
        assert len(after) < shards
        told = f"going on: {len(before)} of {shards} shards are there"
        assert (told in log.read_text()) == bool(before)
        assert not inspect_store(open_store(killed), deep=True).damaged
    assert (
        f"going on: {len(after)} of {shards} shards are there\n"
        in succeed(*extraction(killed, shards)).stderr
    )
    assert after.items() <= commit_times(killed).items()
    assert "going on" not in succeed(*extraction(undisturbed, shards)).stderr
    assert digest(killed) == digest(undisturbed)
    succeed("store", "verify", killed, "--deep")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["killed.zarr", "log", "whole.zarr"]


@pytest.mark.parametrize(
    ("kills", "tiles"), [(2, 640), pytest.param(20, 5120, marks=pytest.mark.slow, id="slow")]
)
@pytest.mark.parametrize("verb", ["copy", "merge"])
def test_copies_and_joins_killed_at_random_moments(tmp_path: Path, verb: str, kills: int, tiles: int) -> None:
    layer = LayerInfo(name="up.0.attn1", channels=16, stride=2, height=8, width=8)
    sources = [random_store(tmp_path / "a.zarr", [layer], tiles, tiles_per_shard=64).path]
    if verb == "merge":
        sources.append(random_store(tmp_path / "b.zarr", [layer], 64, first=tiles, tiles_per_shard=64).path)
    killed, undisturbed = tmp_path / "killed.zarr", tmp_path / "whole.zarr"
    command = ["store", verb, *map(str, sources)]
    kill_repeatedly([*command, "-o", str(killed)], killed, tmp_path / "log", kills)
    for out in (killed, undisturbed):
        succeed(*command, "-o", out)
    assert digest(killed) == digest(undisturbed)
    succeed("store", "verify", killed, "--deep")


@pytest.mark.parametrize(
    ("kills", "shards"), [(2, 12), pytest.param(20, 120, marks=pytest.mark.slow, id="slow")]
)
def test_growth_killed_at_random_moments(tmp_path: Path, kills: int, shards: int) -> None:
    killed, undisturbed = tmp_path / "killed.zarr", tmp_path / "whole.zarr"
    succeed(*extraction(killed, shards))
    shutil.copytree(killed, undisturbed)
    before = digest(killed)
    growth = [*extraction(killed, shards), "--add-timesteps", "61"]
    kill_repeatedly(growth, tmp_path / ".killed.zarr.growing", tmp_path / "log", kills)
    assert digest(killed) == before  # the store as it was serves until the grown one takes its place
    for command in (growth, [*extraction(undisturbed, shards), "--add-timesteps", "61"]):
        succeed(*command)
    assert digest(killed) == digest(undisturbed) != before
    succeed("store", "verify", killed, "--deep")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["killed.zarr", "log", "whole.zarr"]


def kill_repeatedly(command: list[str], out: Path, log: Path, kills: int) -> None:
    """Kill a command after it has committed one more shard to a store, and see that it is never wrong."""
    moments = random.Random(0)
    for _ in range(kills):
        before = commit_times(out)
        with running(command, log) as process:
            wait_for_commits(out, len(before) + 1)
            time.sleep(moments.uniform(0, 0.02))
            process.kill()
            assert process.wait() == -signal.SIGKILL, log.read_text()
        assert before.items() <= commit_times(out).items()
        assert not inspect_store(open_store(out), deep=True).damaged


# --- two at once


def test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for(whole: Path, tmp_path: Path) -> None:
    path, link = tmp_path / "s.zarr", tmp_path / "link.zarr"
    link.symlink_to(path)
    with running(extraction(path), tmp_path / "log") as first:
        wait_for_commits(path, 1)
        first.send_signal(signal.SIGSTOP)
        before = commit_times(path)
        command = extraction(path)
        for words in (command, [*command, "--overwrite"], extraction(link), ["store", "repair", path]):
            told = refuse(*words)
            assert f"is being written by process {first.pid} on " in told
            assert "-m satdifuser extract -o" in told
            assert told.endswith("wait until that ends, or end it, and run the same command again\n")
        assert commit_times(path) == before
        succeed("store", "info", path)
    assert lock_file(path).exists()
    succeed(*command)
    assert not lock_file(path).exists()
    assert before.items() <= commit_times(path).items()
    assert digest(path) == digest(whole)


def test_a_lock_ends_with_its_writer(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    with open_or_create(path, new_attributes(), overwrite=False) as writer:
        with pytest.raises(StoreError, match=rf"s.zarr: is being written by process {os.getpid()} on "):
            open_or_create(path, new_attributes(), overwrite=False)
        write(writer, 0)
    with pytest.raises(StoreError, match="made with other settings"):
        open_or_create(path, new_attributes(settings={"source": {"kind": "x"}}), overwrite=False)
    writer = open_or_create(path, new_attributes(), overwrite=False)
    del writer
    write(open_or_create(path, new_attributes(), overwrite=False), 1)
    assert [place.name for place in tmp_path.iterdir()] == ["s.zarr"]


def test_a_lock_whose_text_is_not_there_yet(tmp_path: Path) -> None:
    for text in ("", "{", "[]", "{}"):
        with StoreLock(tmp_path / "s.zarr"):
            lock_file(tmp_path / "s.zarr").write_text(text)
            with pytest.raises(StoreError, match="is being written by another process; wait"):
                StoreLock(tmp_path / "s.zarr")


def test_a_lock_that_was_removed_before_it_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who opened the file of a lock that ends just then may not lock what has no name any more."""
    path = tmp_path / "s.zarr"
    first, flock = StoreLock(path), fcntl.flock

    def late(descriptor: int, how: int) -> None:
        first.release()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with StoreLock(path):
        assert lock_file(path).exists()
        with pytest.raises(StoreError, match=f"is being written by process {os.getpid()} on "):
            StoreLock(path)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (errno.EROFS, "cannot write: .*Read-only file system.*s.zarr.lock'"),
        (errno.ENOSPC, "the disk is full"),
    ],
)
def test_a_lock_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, text: str
) -> None:
    build(tmp_path / "s.zarr", shards=(0,))
    opened = os.open

    def fail(path: str | Path, flags: int, *rest: int) -> int:
        if flags & os.O_CREAT and str(path).endswith(".lock"):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", fail)
    for act in (
        lambda: open_or_create(tmp_path / "s.zarr", new_attributes(), overwrite=True),
        lambda: repair(tmp_path / "s.zarr"),
    ):
        with pytest.raises(StoreError, match=rf"s\.zarr: {text}"):
            act()
    assert len(open_store(tmp_path / "s.zarr").missing_shards()) == 1


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(StoreError, match=r"No locks available \(locking a file\): .*s.zarr.lock'"):
        build(tmp_path / "s.zarr")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_store(tmp_path: Path) -> None:
    path = build(tmp_path / "s.zarr", shards=(0,))
    tables = path / "tiles/path/c"
    tables.chmod(0o500)
    try:
        with pytest.raises(StoreError, match=r"shard 1: cannot write: .*Permission denied"):
            write(open_or_create(path, new_attributes(), overwrite=False), 1)
    finally:
        tables.chmod(0o700)
    write(open_or_create(path, new_attributes(), overwrite=False), 1)
    assert not inspect_store(open_store(path), deep=True).problems()


# --- power cuts


def scene_write(path: Path) -> Callable[[], object]:
    return lambda: build(path)


def scene_overwrite(path: Path) -> Callable[[], object]:
    build(path)

    def act() -> None:
        writer = open_or_create(path, new_attributes(store_id="new"), overwrite=True)
        for shard in writer.missing_shards():
            write(writer, shard)

    return act


def scene_repair(path: Path) -> Callable[[], object]:
    build(path)
    flip(path / "features/stride_02/values/c/0/1/0/0/0/0", 5)
    flip(path / "commits/c/1", 5)

    def act() -> None:
        repair(path, deep=True)
        mend(path)

    return act


def mend(path: Path) -> str:
    """What a person does after any accident: repair, and the same command again; returns the contents."""
    if path.exists():
        repair(path, deep=True)
    kept = open_store(path).attributes if path.exists() else new_attributes()
    writer = open_or_create(path, kept, overwrite=False)
    for shard in writer.missing_shards():
        write(writer, shard)
    writer.close()
    return contents(path)


@pytest.mark.parametrize("step", [128, pytest.param(1, marks=pytest.mark.slow, id="slow")])
@pytest.mark.parametrize("scene", [scene_write, scene_overwrite, scene_repair])
def test_power_cut_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: Callable[[Path], Callable[[], object]], step: int
) -> None:
    root, cut = tmp_path / "root", tmp_path / "cut"
    root.mkdir()
    act = scene(root / "s.zarr")
    base = Path(shutil.copytree(root, tmp_path / "base"))
    events = record(root, monkeypatch, act)
    right = {contents_or_refusal(place / "s.zarr") for place in (base, root)}
    moments = list(itertools.product(range(len(events) + 1), LOSSES))
    for until, lost in moments[::step]:
        shutil.copytree(base, cut)
        replay(events[:until], cut, *power_cut(lost, seed=until))
        moment, path = f"{until} of {len(events)} events, {lost} lost", cut / "s.zarr"
        found = contents_or_refusal(path)
        assert found in right or found.startswith("refused: "), moment
        if scene is not scene_repair and path.exists():
            assert not inspect_store(open_store(path), deep=True).damaged, moment
        assert mend(path) in right, moment
        shutil.rmtree(cut)


def test_what_a_finished_write_leaves_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, scene in {"write": scene_write, "overwrite": scene_overwrite, "repair": scene_repair}.items():
        root = tmp_path / name
        root.mkdir()
        act = scene(root / "s.zarr")
        base = Path(shutil.copytree(root, tmp_path / f"{name}-base"))
        replay(record(root, monkeypatch, act), base, *power_cut("names", 0))
        assert contents(base / "s.zarr") == contents(root / "s.zarr")


# --- damage, mended by the commands that are advised


DAMAGES: dict[str, Callable[[Path], object]] = {
    "features/stride_08/values/c/0/0/0/0/0/0": lambda file: flip(file, 70, 3),
    "features/stride_08/scale/c/1/0/0/0": lambda file: file.write_bytes(b""),
    "features/stride_08/pooled/c/2/0/0/0": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "tiles/tile_id/c/3": lambda file: file.unlink(),
    "tiles/partitions/default/c/4": lambda file: flip(file, -1),
    "targets/label/c/5": lambda file: file.rename(file.with_name("5.bak")),
    "previews/rgb/c/6/0/0/0": lambda file: flip(file, 0),
    "commits/c/7": lambda file: flip(file, 9),
    "commits/c/8": lambda file: file.write_bytes(file.read_bytes()[:20]),
    "commits/c/9": lambda file: file.write_bytes(b""),
}


def test_every_damage_is_named_and_repaired(copy: Path, whole: Path) -> None:
    for name, damage in DAMAGES.items():
        damage(copy / name)
    assert "error: " in refuse(*extraction(copy))
    told = call("store", "verify", copy, "--deep")
    assert told.exit_code == 1
    lines = told.stdout.splitlines()
    for shard, (name, line) in enumerate(zip(DAMAGES, lines, strict=True)):
        assert line.startswith(f"shard {shard}: {name} ")
    assert f"satdifuser store repair {copy} --deep" in told.stderr
    kept = commit_times(copy)
    dropped = succeed("store", "repair", copy, "--deep").stdout.splitlines()
    assert [line.split(":")[0] for line in dropped] == [f"dropped shard {shard}" for shard in range(10)]
    assert "going on: 2 of 12 shards are there" in succeed(*extraction(copy)).stderr
    assert {name for name, when in commit_times(copy).items() if kept.get(name) == when} == {"10", "11"}
    assert digest(copy) == digest(whole)
    succeed("store", "verify", copy, "--deep")


def test_damaged_metadata_is_refused_until_it_is_overwritten(copy: Path, whole: Path) -> None:
    flip(copy / "features/stride_08/values/zarr.json", 40)
    for words in (extraction(copy), ["store", "verify", copy], ["store", "repair", copy]):
        assert "features/stride_08/values/zarr.json was altered after the store was created" in refuse(*words)
    succeed(*extraction(copy), "--overwrite")
    assert digest(copy) == digest(whole)


# --- clocks


@pytest.mark.parametrize("now", [0.0, 5e9])
def test_clocks_that_jump(copy: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, now: float) -> None:
    for shard in (2, 3):
        (copy / f"commits/c/{shard}").unlink()
    lock_file(copy).write_text('{"pid": 1, "host": "here", "since": "2199-01-01", "command": "init"}')
    for file in [*copy.rglob("*"), lock_file(copy)]:
        os.utime(file, (5e9 - now, 5e9 - now))
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(time, "time_ns", lambda: int(now * 1e9))
    assert "going on: 10 of 12 shards are there" in succeed(*extraction(copy)).stderr
    assert digest(copy) == digest(whole)
    succeed("store", "verify", copy, "--deep")
