"""Processes that read images: the same tiles as threads read, errors in turn, and one that dies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from child_processes import children_of, is_alive
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_up import image_folder
from made_up_geobench import Bench, fake_geobench
from made_up_scene import box, write_scene, write_vectors
from PIL import Image

from satdifuser.errors import ImageError, SourceError
from satdifuser.extract import readers
from satdifuser.extract.job import Job
from satdifuser.extract.plan import Plan, make_plan
from satdifuser.extract.read_tile import ReadTile
from satdifuser.extract.readers import Readers, processes_wanted, receive, send, started_readers
from satdifuser.extract.reading import read_ahead
from satdifuser.extract.run import extract
from satdifuser.extract.settings import (
    BackboneSettings,
    ExtractSettings,
    FolderSettings,
    GeobenchSettings,
    PairsSettings,
    ScenesSettings,
    SourceSettings,
    SyntheticSettings,
)
from satdifuser.store.reader import FeatureStore
from satdifuser.store.settings import StoreSettings

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
PATIENCE_S = 120


def planned(source: SourceSettings, out: Path, **chosen: Any) -> Plan:
    found = {"threads": 1, "batch_size": 4, "read_threads": 2, "read_processes": True} | chosen
    extract_settings = ExtractSettings.model_validate(
        {"timesteps": [21], "layers": ["up_blocks.1.*attn1"], "image_size": 64} | found
    )
    job = Job(source, BackboneSettings(device="cpu"), extract_settings, StoreSettings(tiles_per_shard=4))
    return make_plan(job, out)


@pytest.fixture
def folder(tmp_path: Path) -> FolderSettings:
    image_folder(tmp_path / "images", {"land": 6, "sea": 5})
    return FolderSettings(kind="folder", root=tmp_path / "images")


def read(plan: Plan, processes: Readers | None) -> list[ReadTile]:
    with closing(read_ahead(plan.job, plan.source, plan.image_size, plan.records, processes)) as tiles:
        return list(tiles)


def as_values(tile: ReadTile) -> dict[str, Any]:
    """All that is known of a tile, comparable."""
    row, picture = tile.row, tile.picture
    found: dict[str, Any] = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    if picture is not None:
        values = [(field.name, getattr(picture, field.name)) for field in dataclasses.fields(picture)]
        found |= {f"picture.{name}": value for name, value in values}
    return {
        name: (value.dtype.str, value.tolist()) if isinstance(value, np.ndarray) else repr(value)
        for name, value in found.items()
    }


def scenes(folder: Path) -> SourceSettings:
    pixels = np.random.default_rng(0).integers(1, 255, (3, 64, 64), np.uint8)
    pixels[:, :, 60:] = 0
    (folder / "scenes").mkdir()
    write_scene(folder / "scenes/a.tif", pixels, nodata=0)
    polygons = [box(0, 0, 16, 32), box(18, 2, 4, 4)]
    labels = write_vectors(folder / "fields.gpkg", polygons, ["water", "forest"], "EPSG:4326")
    root = Path("scenes")  # seen from the working folder
    return ScenesSettings(kind="scenes", root=root, tile_size=16, labels=labels, overlap=4)


def pairs(folder: Path) -> SourceSettings:
    root, rows = folder / "pairs", ["image,mask,split"]
    root.mkdir()
    for n, split in enumerate(("train", "train", "val", "test")):
        random = np.random.default_rng(n)
        Image.fromarray(random.integers(0, 255, (48, 48, 3), np.uint8)).save(root / f"{n}.png")
        Image.fromarray(np.full((48, 48), n % 2, np.uint8)).save(root / f"{n}_mask.png")
        rows.append(f"{n}.png,{n}_mask.png,{split}")
    (root / "splits.csv").write_text("\n".join(rows))
    classes = [{"id": 0, "name": "land"}, {"id": 1, "name": "water"}]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    broken = root / "2.png"
    broken.write_bytes(broken.read_bytes()[:100])
    return PairsSettings(kind="pairs", root=root, tile_size=16, on_error="skip")


def geobench(folder: Path) -> SourceSettings:
    with pytest.MonkeyPatch.context() as patch:
        Bench(folder, fake_geobench(patch, "geobench"))
    return GeobenchSettings(kind="geobench", root=folder, dataset="m-eurosat", partition="0.50x_train")


def synthetic(_: Path) -> SourceSettings:
    return SyntheticSettings(task="segmentation", tiles=9, tile_size=32)


@pytest.mark.parametrize("make", [None, scenes, pairs, geobench, synthetic])
def test_processes_read_what_threads_read(
    make: Callable[[Path], SourceSettings] | None,
    folder: FolderSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise RuntimeError")  # it is the standard library's that is wanted
    plan = planned(make(tmp_path) if make else folder, tmp_path / "s.zarr")
    with started_readers(plan) as processes:
        assert processes
        assert processes.count == 2
        found = read(plan, processes)
        assert [tile.row.tile_id for tile in read(plan, processes)] == [r.tile_id for r in plan.records]
    expected = read(plan, None)
    assert [as_values(tile) for tile in found] == [as_values(tile) for tile in expected]
    assert found[0].picture is not None
    assert found[0].picture.rgb.shape == (3, 64, 64)
    assert any(tile.row.skip_reason for tile in found) == (make is pairs)


def test_features_are_those_of_threads(folder: FolderSettings, tmp_path: Path) -> None:
    digests = set()
    for own in (True, False):
        plan = planned(folder, tmp_path / f"{own}.zarr", read_processes=own)
        digests.add(extract(plan.job, plan.out).content_digest())
    assert len(digests) == 1


def test_a_broken_image_is_told_when_its_turn_comes(folder: FolderSettings, tmp_path: Path) -> None:
    plan = planned(folder, tmp_path / "s.zarr")
    broken = Path(plan.records[6].path)
    broken.write_bytes(broken.read_bytes()[:60])
    with started_readers(plan) as processes:
        tiles = read_ahead(plan.job, plan.source, plan.image_size, plan.records, processes)
        assert [next(tiles).row.tile_id for _ in range(6)] == [r.tile_id for r in plan.records[:6]]
        with pytest.raises(ImageError, match=rf"^{broken}: cannot be read"):
            next(tiles)


def test_a_process_that_was_killed(folder: FolderSettings, tmp_path: Path) -> None:
    plan = planned(folder, tmp_path / "s.zarr")
    with started_readers(plan) as processes:
        assert processes
        for process in processes._processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
        ids = plan.records[0].tile_id, plan.records[3].tile_id
        message = (
            f"^tiles {ids[0]} to {ids[1]}: a process that reads images has ended \\(signal 9\\); what is "
            r"committed is kept: .* smaller extract.read_threads, or with extract.read_processes=false$"
        )
        with pytest.raises(SourceError, match=message):
            read(plan, processes)


def test_processes_end_when_nobody_holds_them(
    folder: FolderSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(folder, tmp_path / "s.zarr")
    held = Readers(2, folder, plan.preparation)
    processes = held._processes
    assert [process.poll() for process in processes] == [None, None]
    del held
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 2
    started: list[Any] = []
    start = readers._start

    def start_one() -> Any:
        if started:
            raise OSError("no more processes")
        started.append(start())
        return started[0]

    monkeypatch.setattr(readers, "_start", start_one)
    with pytest.raises(OSError, match="no more processes"):
        Readers(2, folder, plan.preparation)
    assert started[0].poll() == -signal.SIGKILL


def test_an_answer_that_is_cut_short_is_not_taken_for_the_next_one(
    folder: FolderSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(folder, tmp_path / "s.zarr", read_threads=1)
    with started_readers(plan) as processes:
        assert processes
        with monkeypatch.context() as patch:

            def break_off(pipe: IO[bytes]) -> Any:
                pipe.read(8)
                raise MemoryError

            patch.setattr(readers, "receive", break_off)
            with pytest.raises(MemoryError):
                processes.read(plan.records[:4])
        with pytest.raises(SourceError, match=r"has ended \(signal 9\)"):
            processes.read(plan.records[4:8])


def test_a_process_whose_answer_nobody_awaits_ends_without_a_word(
    folder: FolderSettings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = planned(folder, tmp_path / "s.zarr")
    held = Readers(1, folder, plan.preparation)
    (process,) = held._processes
    assert process.stdout
    process.stdout.close()
    send(process.stdin, plan.records[:4])  # type: ignore[arg-type]
    assert process.wait(PATIENCE_S) == -signal.SIGPIPE
    assert capfd.readouterr().err == ""


def test_an_error_of_another_kind_brings_its_traceback(folder: FolderSettings, tmp_path: Path) -> None:
    plan = planned(folder, tmp_path / "s.zarr")
    plan.records[2] = dataclasses.replace(plan.records[2], label="x")  # type: ignore[arg-type]
    with started_readers(plan) as processes, pytest.raises(ValueError, match="invalid literal") as caught:
        read(plan, processes)
    assert "in read_row" in caught.value.__notes__[0]


def test_what_a_process_prints_does_not_get_into_its_answers(
    folder: FolderSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = "import satdifuser.extract.sources.folder as f; g = f.read_pixels; "
    noisy += "f.read_pixels = lambda path: (print('a word'), g(path))[1]; "
    first, last = readers.PROGRAM.rsplit("; ", 1)
    monkeypatch.setattr(readers, "PROGRAM", f"{first}; {noisy}{last}")
    plan = planned(folder, tmp_path / "s.zarr")
    with started_readers(plan) as processes:
        assert len(read(plan, processes)) == 11


def test_when_there_are_processes(folder: FolderSettings, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"

    def count(plan: Plan) -> int:
        return processes_wanted(plan.job, plan.source, cores=12)

    assert count(planned(folder, out, read_threads="auto")) == 6
    assert count(planned(folder, out, read_threads=3)) == 3
    assert count(planned(folder, out, read_processes="auto")) == 0  # on a CPU
    assert count(planned(folder, out, read_processes=False)) == 0
    own_code = planned(folder, out)
    own_code.source.thread_safe = False
    assert count(own_code) == 0
    on_gpu = planned(folder, out, read_processes="auto")
    object.__setattr__(on_gpu.job, "backbone_settings", BackboneSettings(device="cuda:1"))
    assert count(on_gpu) == 2
    extract(planned(folder, out, read_processes=False).job, out)
    with started_readers(planned(folder, out)) as processes:
        assert processes is None  # nothing is left to read


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists child processes as Linux does")
def test_processes_end_with_the_one_that_began_them_and_free_the_store(tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    chosen = {
        "source.kind": "synthetic",
        "source.tiles": 60,
        "source.tile_size": 32,
        "extract.threads": 1,
        "extract.read_processes": "true",
        "extract.read_threads": 2,
        "extract.timesteps": "[21]",
        "extract.layers": "['up_blocks.1.*attn1']",
        "store.tiles_per_shard": 1,
    }
    words = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "satdifuser", "extract", "-o", str(out), *words]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not (out / "commits/c/2").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            children = children_of(process.pid)
        finally:
            process.kill()
            process.wait()
    assert len(children) == 2, (tmp_path / "log").read_text()
    assert FeatureStore(out).missing_shards()
    while any(map(is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_alive, children))
    assert "Traceback" not in (tmp_path / "log").read_text()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not FeatureStore(out).missing_shards()


# --- what goes between both

ANY_ARRAY = arrays.arrays(
    st.sampled_from([np.uint8, np.float32, np.bool_, np.int32]),
    arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=5),
)


@settings(deadline=None)
@given(st.lists(st.one_of(ANY_ARRAY, ANY_ARRAY.map(np.transpose), st.text(max_size=5)), max_size=4))
def test_values_arrive_as_they_were_sent(values: list[Any]) -> None:
    pipe = BytesIO()
    send(pipe, values)
    pipe.seek(0)
    found = receive(pipe)
    assert len(found) == len(values)
    for value, there in zip(values, found, strict=True):
        if isinstance(value, str):
            assert there == value
        else:
            assert (there.dtype, there.flags.writeable) == (value.dtype, True)
            np.testing.assert_array_equal(there, value)


def test_an_answer_that_breaks_off() -> None:
    pipe = BytesIO()
    send(pipe, np.arange(100))
    for length in (0, 4, 8, 20, len(pipe.getvalue()) - 1):
        with pytest.raises(EOFError):
            receive(BytesIO(pipe.getvalue()[:length]))
