"""What `satdifuser plan` tells against what an extraction then does, and disks that are too small."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import call
from hypothesis import given
from hypothesis import strategies as st
from made_up import diffusionsat
from PIL import Image

import satdifuser.extract.trial as trial
from satdifuser.extract.compute import compute_shard
from satdifuser.extract.job import Job
from satdifuser.extract.plan import ENCODINGS, format_bytes, make_plan, with_margin
from satdifuser.extract.run import load_work
from satdifuser.extract.settings import BackboneSettings, ExtractSettings, SyntheticSettings
from satdifuser.store.reader import open_store
from satdifuser.store.settings import StoreSettings

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with a text encoder, for guidance."""
    torch.manual_seed(0)
    return diffusionsat(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def config(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {
        "source": {"kind": "synthetic", "tiles": 11, "tile_size": [16, 24]},
        "backbone": {"model": str(folder), "device": "cpu"},
        "extract": {"timesteps": [21, 161], "batch_size": 2, "threads": 1},
        "store": {"tiles_per_shard": 3},
    }
    path = tmp_path_factory.mktemp("plan") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def store(config: Path) -> Path:
    path = config.parent / "s.zarr"
    assert call("extract", "-c", config, "-o", path).exit_code == 0
    return path


def plan(*words: object) -> dict[str, Any]:
    result = call("plan", "--no-trial", "--json", *words)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def job(folder: Path, **extract: Any) -> Job:
    chosen = ExtractSettings(**({"batch_size": 2, "threads": 1} | extract))
    backbone = BackboneSettings(model=str(folder), device="cpu")
    return Job(SyntheticSettings(tiles=4, tile_size=16), backbone, chosen, StoreSettings())


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


# --- what is told


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, 3),
        ({"draws": 2, "timesteps": [5]}, 2),
        ({"noising": "inversion"}, 10),
        ({"noising": "inversion", "timesteps": [-1], "guidance": 2.0}, 1),
        ({"noising": "inversion", "timesteps": [21, 61], "guidance": 2.0}, 9),
    ],
)
def test_passes_are_those_the_network_makes(
    folder: Path, tmp_path: Path, settings: dict[str, Any], passes: int
) -> None:
    planned = make_plan(job(folder, **settings), tmp_path / "s.zarr")
    work = load_work(planned)
    sent: list[int] = []
    work.extractor.backbone.unet.register_forward_pre_hook(lambda _, args: sent.append(len(args[0])))
    trial._seconds(work, planned.source, planned.records, trial.ValueRange(planned.job.images), None)
    assert planned.passes_per_tile == passes
    assert sum(sent) == passes * len(planned.records)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_sizes_are_those_of_the_arrays(config: Path, tmp_path: Path, encoding: str) -> None:
    words = ("-c", config, "-o", tmp_path / "s.zarr", "--set", f"store.encoding={encoding}")
    told = plan(*words)
    assert not (tmp_path / "s.zarr").exists()
    assert call("extract", *words).exit_code == 0
    written = open_store(tmp_path / "s.zarr")
    arrays = [array for _, array in written._root["features"].members(max_depth=None)]
    held = sum(array.nbytes for array in arrays if hasattr(array, "nbytes"))
    assert told["features"][encoding]["total"] == held == 11 * told["features"][encoding]["per_tile"]
    assert told["previews"]["total"] == written._root["previews/rgb"].nbytes
    assert told["layers"] == [layer.model_dump() for layer in written.attributes.layers]
    assert written.size_bytes() < told["needed"] < with_margin(2 * told["to_write"])


def test_every_encoding_is_told_and_the_chosen_one_counts(config: Path, tmp_path: Path) -> None:
    told = plan("-c", config, "-o", tmp_path / "s.zarr")
    assert tuple(told["features"]) == ENCODINGS
    sizes = [told[name]["total"] for name in ("previews", "latents", "tables")]
    assert told["to_write"] == told["features"]["int8"]["total"] + sum(sizes)
    wider = plan("-c", config, "-o", tmp_path / "s.zarr", "--set", "store.encoding=float32")
    assert wider["to_write"] == told["features"]["float32"]["total"] + sum(sizes)
    bare = plan("-c", config, "-o", tmp_path / "s.zarr", "--set", "store.previews=false")
    assert (bare["previews"]["total"], bare["to_write"]) == (0, told["to_write"] - sizes[0])


def test_masks_are_counted(config: Path, tmp_path: Path) -> None:
    segments = ("--set", "source.task=segmentation")
    plain, masks = (plan("-c", config, "-o", tmp_path / "s.zarr", *words) for words in ((), segments))
    assert masks["tables"]["per_tile"] - plain["tables"]["per_tile"] >= 16 * 24 - 100


def test_the_plan_for_reading(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inverted = ("--set", "extract.noising=inversion", "--set", "extract.guidance=2.0")
    result = call("plan", "-c", config, "-o", tmp_path / "deep/s.zarr", *inverted, "--no-trial")
    assert result.stderr == ""
    for text in (
        "tiles       11 of 16 x 24 px, 0 left out; seen at 16 x 24 px\n",
        "up_blocks.1.resnets.1.conv2",
        "timesteps   21, 161; inversion noising\n",
        "passes      19 through the U-Net a tile (every step up to timestep 161, all but the last one twice",
        "features, int8 ",
        f"to {tmp_path}/deep/s.zarr; ",
        "free: fits\n",
    ):
        assert text in result.stdout
    assert "time " not in result.stdout
    assert list(tmp_path.iterdir()) == []
    leave_free(monkeypatch, 10**6)
    crowded = call("plan", "-c", config, "-o", tmp_path / "s.zarr", "--no-trial", "--set", "extract.draws=4")
    assert (crowded.exit_code, "1.0 MB free: DOES NOT FIT: needs 10" in crowded.stdout) == (0, True)
    assert "(2 timesteps x 4 draws), 88 in all" in crowded.stdout


@pytest.mark.parametrize("tiles", [1, 2, 3, 11])
def test_the_trial_sends_real_tiles_and_writes_nothing(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiles: int
) -> None:
    computed: list[int] = []

    def count(work: Any, tiles: Any, number: int, *rest: Any) -> Any:
        computed.append(number)
        return compute_shard(work, tiles, number, *rest)

    monkeypatch.setattr(trial, "compute_shard", count)
    words = ("plan", "-c", config, "-o", tmp_path / "s.zarr", "--set", f"source.tiles={tiles}")
    split = ("--set", "source.split={train: 1, val: 0, test: 0}")
    result = call(*words, *split, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["trial"]
    assert computed[0] == min(2, tiles)  # one batch warms up
    assert told["tiles"] == computed[1] == {1: 1, 2: 2, 3: 1, 11: 8}[tiles]
    assert told["tiles_per_second"] == pytest.approx(told["tiles"] / told["seconds"], rel=0.1)
    assert told["eta_seconds"] == pytest.approx(tiles / told["tiles_per_second"], rel=0.1, abs=0.06)
    assert list(tmp_path.iterdir()) == []
    assert " tiles/s (" in call(*words, *split).stdout


@pytest.mark.parametrize(
    ("batches", "warming", "at_once", "timed"),
    [(1, 1, 2, 1), (2, 1, 2, 2), (4, 1, 2, 2), (5, 1, 2, 4), (5, 10, 2, 4), (5, 15, 2, 2), (5, 50, 2, 2)],
)
def test_as_many_batches_are_timed_as_are_computed_at_once(
    batches: int, warming: float, at_once: int, timed: int
) -> None:
    assert len(trial._timed([[]] * batches, warming, at_once)) == timed


def test_a_slow_backbone_is_timed_on_one_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "_seconds", lambda work, source, records, values, readers: 50.0)
    large = replace(job(folder), source_settings=SyntheticSettings(tiles=40, tile_size=16))
    timed = trial.time_batches(make_plan(large, tmp_path / "s.zarr"))
    assert (timed.tiles, timed.seconds_for(40)) == (2, 1000)


def test_a_scale_that_looks_wrong_is_warned_of(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images/dark").mkdir(parents=True)
    for index in range(10):
        Image.new("RGB", (16, 16), (3, index, 2)).save(tmp_path / f"images/dark/{index}.png")
    source = {"kind": "folder", "root": str(tmp_path / "images")}
    file = tmp_path / "dark.yaml"
    file.write_text(yaml.safe_dump({"source": source, "backbone": {"model": str(folder), "device": "cpu"}}))
    result = call("plan", "-c", file, "-o", tmp_path / "s.zarr", "--set", "extract.threads=1")
    assert result.stderr.startswith("warning: in 10 of 10 tiles no value reaches 0.1")


# --- a store that is there


def test_a_begun_store_is_planned_to_its_end(config: Path, store: Path, tmp_path: Path) -> None:
    begun = shutil.copytree(store, tmp_path / "begun.zarr")
    for shard in (1, 3):
        (begun / f"commits/c/{shard}").unlink()
    whole, told = plan("-c", config, "-o", tmp_path / "new.zarr"), plan("-c", config, "-o", begun)
    assert (told["shards"], told["shards_to_do"], told["tiles_to_do"]) == (4, 2, 5)
    assert told["to_write"] == whole["to_write"] * 5 // 11
    assert told["unet_passes"] == {"per_tile": 2, "to_do": 10}
    text = call("plan", "-c", config, "-o", begun).stdout
    assert f"store       {begun} is begun: 2 of 4 shards are missing (5 tiles)\n" in text
    assert f"store       {store} is complete\n" in call("plan", "-c", config, "-o", store).stdout
    assert "(3 tiles in " in text  # of shards 1 and 3, after a first batch


def test_a_complete_store_leaves_nothing_to_do(config: Path, store: Path) -> None:
    result = call("plan", "-c", config, "-o", store)
    assert result.stdout.endswith(f"to do       nothing: {store} is complete\n")
    told = plan("-c", config, "-o", store)
    assert (told["tiles_to_do"], told["to_write"], told["needed"], told["fits"]) == (0, 0, 0, True)


@pytest.mark.parametrize(
    "setting",
    ["extract.timesteps=[21]", "source.tiles=5", "store.encoding=float32", "extract.layers=['*attn1']"],
)
def test_a_store_of_other_settings_is_told(config: Path, store: Path, setting: str) -> None:
    words = ("-c", config, "-o", store, "--set", setting)
    told = plan(*words)
    assert (told["other_store"], told["shards"]) == (True, None)
    assert told["tiles_to_do"] == told["tiles"]
    assert "was made with other settings: extract will refuse to go on" in call("plan", *words).stdout


# --- a disk that is too small


def needed(config: Path, out: Path) -> int:
    size: int = plan("-c", config, "-o", out)["needed"]
    return size


@pytest.mark.parametrize("command", ["extract", "run"])
def test_a_disk_too_small_is_refused_before_anything_is_written(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    out = tmp_path / "out/features.zarr"
    words = ("run", config, "-o", out.parent) if command == "run" else ("extract", "-c", config, "-o", out)
    size = needed(config, out)
    leave_free(monkeypatch, size - 1)
    result = call(*words)
    assert (result.exit_code, result.stdout) == (1, "")
    shown = format_bytes(size)
    assert result.stderr == (
        f"error: {out}: the disk cannot hold the result: 11 tiles in int8 need {shown} with a margin, "
        f"{shown} are free; free some space, write to another disk (-o), choose another store.encoding "
        "(int4 100.1 MB, reduced 100.1 MB), take fewer extract.timesteps or extract.layers, or start anyway "
        "with --ignore-free-space (`satdifuser plan` tells more)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_names_smaller_encodings(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, 10**6)
    result = call("extract", "-c", config, "-o", tmp_path / "s.zarr", "--set", "store.encoding=float32")
    assert "choose another store.encoding (float16 10" in result.stderr
    assert "float32 10" not in result.stderr


def test_a_disk_just_large_enough_will_do(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, needed(config, tmp_path / "s.zarr"))
    assert call("extract", "-c", config, "-o", tmp_path / "s.zarr").exit_code == 0


def test_free_space_can_be_ignored(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_free(monkeypatch, 0)
    words = ("extract", "-c", config, "-o", tmp_path / "s.zarr")
    assert call(*words).exit_code == 1
    assert call(*words, "--ignore-free-space").exit_code == 0


def test_committed_shards_count_as_there(
    config: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = shutil.copytree(store, tmp_path / "begun.zarr")
    (begun / "commits/c/3").unlink()
    size = needed(config, begun)
    assert size < needed(config, tmp_path / "new.zarr")
    leave_free(monkeypatch, size - 1)
    refused = call("extract", "-c", config, "-o", begun)
    assert "2 tiles in int8 need " in refused.stderr
    assert "store.encoding" not in refused.stderr  # another one would be another store
    leave_free(monkeypatch, size)
    assert call("extract", "-c", config, "-o", begun).exit_code == 0
    leave_free(monkeypatch, 0)
    assert call("extract", "-c", config, "-o", begun).exit_code == 0  # complete


def test_a_store_that_is_replaced_makes_room(
    config: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = shutil.copytree(store, tmp_path / "old.zarr")
    words = ("extract", "-c", config, "-o", old, "--set", "extract.seed=3", "--overwrite")
    held = sum(file.stat().st_size for file in old.rglob("*") if file.is_file())
    size = needed(config, tmp_path / "new.zarr")
    leave_free(monkeypatch, size - held - 1)
    assert "the disk cannot hold the result" in call(*words).stderr
    leave_free(monkeypatch, size - held)
    assert call(*words).exit_code == 0


def test_a_store_of_other_settings_is_refused_as_such(
    config: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_free(monkeypatch, 0)
    result = call("extract", "-c", config, "-o", store, "--set", "extract.timesteps=[21]")
    assert "this store was made with other settings" in result.stderr


# --- sizes in words


@given(st.integers(0, 10**16))
def test_sizes_in_words_are_near(size: int) -> None:
    number, unit = format_bytes(size).split()
    power = ("B", "kB", "MB", "GB", "TB").index(unit)
    assert abs(float(number) * 1000**power - size) <= 0.05 * 1000**power + 1e-6 * size
    assert float(number) <= 1000 or unit == "TB"


def test_the_margin_grows_with_the_result() -> None:
    assert with_margin(0) == 100 * 10**6
    assert with_margin(10**12) == 10**12 + 50 * 10**9 + 100 * 10**6
