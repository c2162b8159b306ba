"""A store that was damaged, edited, or met a full disk: all is told, nothing is read as something else."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from click.testing import CliRunner
from made_up_store import (
    STEPS,
    TILES,
    VALUES,
    build,
    contents,
    contents_or_refusal,
    files_of,
    flip,
    new_attributes,
    problems,
    write,
)
from numpy.typing import NDArray

from satdifuser.cli import cli
from satdifuser.errors import StoreError
from satdifuser.store.digest import CURRENT, digest_of
from satdifuser.store.encoding import encode
from satdifuser.store.files import take_place
from satdifuser.store.metadata import seal
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore, open_store
from satdifuser.store.repair import repair
from satdifuser.store.verify import verify
from satdifuser.store.writer import WRITE_THREADS, TileRow

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("whole") / "s.zarr")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy.zarr"))


# --- any damage, anywhere


def test_a_flipped_bit_anywhere_is_found_and_never_read(copy: Path) -> None:
    random, expected = np.random.default_rng(0), contents(copy)
    for file in files_of(copy):
        held = file.read_bytes()
        for byte in random.integers(0, len(held), 2):
            bit = int(random.integers(8))
            flip(file, byte, bit)
            where = f"{file.relative_to(copy)}, byte {byte}, bit {bit}"
            assert problems(copy, deep=True), where
            found = contents_or_refusal(copy)
            assert found == expected or found.startswith("refused: "), where
            file.write_bytes(held)
    assert problems(copy, deep=True) == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "halved": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "last byte gone": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_truncated_or_deleted_file_is_found_and_refused_with_a_remedy(copy: Path, damage: str) -> None:
    for file in files_of(copy):
        held = file.read_bytes()
        DAMAGES[damage](file)
        assert problems(copy), file
        refusal = contents_or_refusal(copy)
        assert refusal.startswith("refused: "), file
        assert "again" in refusal or "copy" in refusal, refusal
        file.write_bytes(held)
    assert problems(copy) == []


def test_missing_and_truncated_files_are_listed_by_name(copy: Path) -> None:
    (copy / "features/stride_02/pooled/c/0/0/0/0").unlink()
    values = copy / f"{VALUES}/1/1/0/0/0/0"
    size = values.stat().st_size
    values.write_bytes(values.read_bytes()[:-1])
    for deep in (False, True):
        assert problems(copy, deep) == [
            "shard 0: features/stride_02/pooled/c/0/0/0/0 is missing",
            f"shard 1: {VALUES}/1/1/0/0/0/0 has {size - 1} bytes, committed were {size}",
        ]


def test_verify_on_the_command_line_says_how_to_mend(copy: Path) -> None:
    flip(copy / f"{VALUES}/1/1/0/0/0/0", 5)
    told = CliRunner().invoke(cli, ["store", "verify", str(copy), "--deep"])
    assert (told.exit_code, told.stdout.count("\n")) == (1, 1)
    assert told.stdout.endswith(
        f"{VALUES}/1/1/0/0/0/0 was altered after it was committed (its digest differs)\n"
    )
    assert told.stderr.endswith(
        f"to mend: `satdifuser store repair {copy} --deep` drops what is damaged, and the same "
        "`satdifuser extract` command again redoes it; or copy the store anew\n"
    )
    flip(copy / "tiles/zarr.json", 5)
    told = CliRunner().invoke(cli, ["store", "verify", str(copy)])
    assert (told.exit_code, told.stdout) == (1, "")
    assert told.stderr.startswith(f"error: {copy}: tiles/zarr.json was altered after the store was created")


def test_every_metadata_edit_is_refused(copy: Path) -> None:
    def reindent() -> None:
        file = copy / "zarr.json"
        file.write_text(json.dumps(json.loads(file.read_bytes())))

    def add(name: str) -> None:
        zarr.open_group(copy, mode="r+")[name].attrs["note"] = "x"

    held = {file: file.read_bytes() for file in copy.rglob("zarr.json")}
    for edit, name in [
        (reindent, "zarr.json"),
        (lambda: add("/"), "zarr.json"),
        (lambda: add("tiles"), "tiles/zarr.json"),
        (lambda: add("tiles/partitions/default"), "tiles/partitions/default/zarr.json"),
        (lambda: add("features/stride_02/values"), "features/stride_02/values/zarr.json"),
    ]:
        edit()
        altered = (
            rf"copy.zarr: {name} was altered after .* \(SHA-256 differs\); copy the store anew, or extract"
        )
        with pytest.raises(StoreError, match=altered):
            open_store(copy)
        with pytest.raises(StoreError, match=altered):
            open_or_create(copy, new_attributes(), overwrite=False)
        for file, data in held.items():
            file.write_bytes(data)
    assert problems(copy, deep=True) == []


def test_a_deleted_or_garbled_zarr_json_is_named(copy: Path) -> None:
    (copy / "features/zarr.json").unlink()
    with pytest.raises(
        StoreError, match=r"features/zarr.json is missing; copy the store anew, or extract it"
    ):
        open_store(copy)
    (copy / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"copy.zarr: zarr.json is damaged .*; copy the store anew"):
        open_store(copy)
    (copy / "zarr.json").unlink()
    with pytest.raises(
        StoreError, match=r"not a feature store \(no zarr.json\); if it was one, copy it anew"
    ):
        open_store(copy)


def test_sealed_metadata_opens_elsewhere_without_a_warning(whole: Path) -> None:
    root = zarr.open_group(whole, mode="r")
    assert sorted(root) == ["commits", "features", "previews", "targets", "tiles"]
    sealed: Any = root.attrs["sha256"]
    assert sealed.keys() == {str(file.relative_to(whole)) for file in whole.rglob("zarr.json")}
    with xr.open_datatree(whole, engine="zarr", consolidated=False) as tree:
        assert tree.attrs["sha256"] == sealed


def test_sealed_attributes_of_another_kind_are_refused(copy: Path) -> None:
    document = json.loads((copy / "zarr.json").read_bytes())
    document["attributes"]["satdifuser"]["tiles"] = -1
    (copy / "zarr.json").write_text(json.dumps(document))
    seal(copy)
    with pytest.raises(StoreError, match=r"its attributes are damaged: tiles: Input should be .*; copy the"):
        open_store(copy)


# --- reading damaged data


@pytest.mark.parametrize("byte", [0, 5, -1])
@pytest.mark.parametrize(
    ("key", "array", "tiles"),
    [
        (f"{VALUES}/1/0/0/0/0/0", "features/stride_02/values", "2"),
        ("features/stride_02/pooled/c/0/0/0/0", "features/stride_02/pooled", "0 to 1"),
        ("targets/label/c/0", "targets/label", "0 to 1"),
        ("tiles/colour/c/1/0", "tiles/colour", "2 to 2"),
        ("previews/rgb/c/0/0/0/0", "previews/rgb", "0 to 1"),
    ],
)
def test_damaged_data_is_named_by_store_array_and_tiles(
    copy: Path, key: str, array: str, tiles: str, byte: int
) -> None:
    flip(copy / key, byte)
    store, rows = open_store(copy), np.arange(TILES)
    text = rf"copy.zarr: {array}, tiles? {tiles}: cannot be read \(.*\); `satdifuser store verify .*copy.z"
    reads = (store.maps, store.colour, store.previews, store.targets)
    with pytest.raises(StoreError, match=text):
        [read(rows) for read in (*reads, lambda rows: store.pooled_group("stride_02", rows))]
    (found,) = verify(store, deep=True)
    assert found.endswith(f"{key} was altered after it was committed (its digest differs)")


def test_damaged_tables_are_refused(copy: Path) -> None:
    flip(copy / "tiles/tile_id/c/0", 5)
    for read in (FeatureStore.content_digest, FeatureStore.hashes, repr, FeatureStore.select):
        with pytest.raises(StoreError, match="tiles/tile_id, tiles 0 to 2: cannot be read"):
            read(open_store(copy))


def test_an_array_of_another_version_is_not_there(whole: Path) -> None:
    message = r"holds no array tiles/weather; it was written by another satdifuser \(0\): use that one, or"
    with pytest.raises(StoreError, match=message):
        FeatureStore(whole).table("tiles/weather")


def test_a_damaged_commit_record_is_told_and_hides_no_other_shard(copy: Path) -> None:
    flip(copy / "commits/c/1", 5)
    with pytest.raises(
        StoreError,
        match=r"the commit record of shard 1 is damaged .*; `satdifuser store repair .*copy.zarr` drops what",
    ):
        open_store(copy).content_digest()
    flip(copy / f"{VALUES}/0/1/0/0/0/0", 5)
    for deep in (False, True):
        *found, last = problems(copy, deep)
        assert (
            found
            == [f"shard 0: {VALUES}/0/1/0/0/0/0 was altered after it was committed (its digest differs)"]
            * deep
        )
        assert last.startswith("shard 1: commits/c/1 is damaged (")


@pytest.mark.parametrize(
    "text", ["{", "5", "[1]", '"x"', '{"files": 3}', '{"files": {"a": 3}}', '{"files": {"../a": [1, "b"]}}']
)
def test_a_commit_record_of_another_kind_is_told(copy: Path, text: str) -> None:
    root: Any = zarr.open_group(copy, mode="r+")
    root["commits"][1:] = np.array([text], np.dtypes.StringDType())
    (found,) = problems(copy, deep=True)
    assert re.match(r"shard 1: commits/c/1 is (damaged|no commit record) \(", found)


def test_renamed_and_exchanged_files_are_found(copy: Path) -> None:
    first, second = copy / f"{VALUES}/0/0/0/0/0/0", copy / f"{VALUES}/0/1/0/0/0/0"
    names = [str(file.relative_to(copy)) for file in (first, second)]
    first.rename(first.with_name("aside"))
    assert problems(copy) == [f"shard 0: {names[0]} is missing"]
    second.rename(first)
    first.with_name("aside").rename(second)
    altered = "was altered after it was committed (its digest differs)"
    assert problems(copy, deep=True) == [f"shard 0: {name} {altered}" for name in names]


def test_verify_as_json_names_shards_and_metadata(copy: Path) -> None:
    (copy / "commits/c/0").unlink()
    flip(copy / "commits/c/1", 5)
    words = ["store", "verify", str(copy), "--json"]
    told = json.loads(CliRunner().invoke(cli, words).stdout)
    assert (told["ok"], told["deep"], told["missing"], told["damaged"]) == (False, False, [0], [1])
    assert len(told["problems"]) == 2
    flip(copy / "tiles/zarr.json", 5)
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert "tiles/zarr.json was altered after the store was created" in problem


# --- repair


def test_repair_drops_what_is_damaged_and_the_rest_stays(copy: Path, whole: Path) -> None:
    (copy / f"{VALUES}/1/0/0/0/0/0").unlink()
    (copy / "tiles/path/c/0.0a.partial").write_bytes(b"x")
    kept = (copy / "commits/c/0").stat().st_mtime_ns
    told = CliRunner().invoke(cli, ["store", "repair", str(copy)])
    assert told.exit_code == 0
    assert told.stdout == f"dropped shard 1: {VALUES}/1/0/0/0/0/0 is missing\n"
    assert told.stderr == "to redo what is missing: run the same `satdifuser extract` command again\n"
    assert problems(copy) == ["shard 1: not committed"]
    assert not [file for file in files_of(copy) if file.parts[-2:] == ("c", "1")]
    assert not (copy / VALUES / "1").exists()
    write(open_or_create(copy, new_attributes(), overwrite=False), 1)
    assert (copy / "commits/c/0").stat().st_mtime_ns == kept
    assert problems(copy, deep=True) == []
    assert contents(copy) == contents(whole)


def test_repair_sees_flipped_bits_when_it_looks_deep(copy: Path) -> None:
    flip(copy / f"{VALUES}/0/0/0/0/0/0", 5)
    words = ["store", "repair", str(copy)]
    told = CliRunner().invoke(cli, words)
    assert told.stdout == f"{copy}: no damaged shard\n"
    assert told.stderr == "--deep also finds damage that left the files' sizes as they were\n"
    told = CliRunner().invoke(cli, [*words, "--deep", "--json"])
    assert json.loads(told.stdout) == {"dropped": [0], "missing": [0]}
    assert problems(copy) == ["shard 0: not committed"]


def test_repair_drops_damaged_commit_records(copy: Path, whole: Path) -> None:
    flip(copy / "commits/c/0", 5)
    flip(copy / "commits/c/1", 5)
    assert sorted(repair(copy).damaged) == [0, 1]
    for shard in (0, 1):
        write(open_or_create(copy, new_attributes(), overwrite=False), shard)
    assert contents(copy) == contents(whole)


def test_repair_removes_the_record_durably_before_the_files(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(copy / f"{VALUES}/1/0/0/0/0/0", 5)

    def crash(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr("satdifuser.store.repair.sync_folder", crash)
    before = files_of(copy)
    with pytest.raises(StoreError, match=r"copy.zarr: cannot write: .*commits/c'; committed shards are kept"):
        repair(copy, deep=True)
    assert set(before) - set(files_of(copy)) == {copy / "commits/c/1"}


def test_repair_deletes_nothing_beyond_the_store(copy: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(copy / VALUES, tmp_path / "elsewhere"))
    shutil.rmtree(copy / VALUES)
    (copy / VALUES).symlink_to(elsewhere)
    before = files_of(elsewhere)
    (copy / "tiles/path/c/0").unlink()
    assert list(repair(copy).damaged) == [0, 1]  # a link out of the store counts for nothing
    assert not (copy / "tiles/crs/c/0").exists()
    assert files_of(elsewhere) == before


def test_repair_refuses_damaged_metadata(copy: Path) -> None:
    flip(copy / "tiles/zarr.json", 5)
    before = files_of(copy)
    told = CliRunner().invoke(cli, ["store", "repair", str(copy)])
    assert (told.exit_code, told.stdout) == (1, "")
    assert told.stderr.startswith(f"error: {copy}: tiles/zarr.json was altered after the store was created")
    assert told.stderr.endswith("with --overwrite; repair mends shards only, and changed nothing\n")
    assert files_of(copy) == before


def test_a_damaged_shard_is_mended_alone(copy: Path, whole: Path) -> None:
    files = open_store(copy).commits[1]["files"]
    for key in files:
        flip(copy / key, -1)
    (copy / f"{VALUES}/1/0/0/0/0/0").unlink()
    (copy / "commits/c/1").unlink()
    writer = open_or_create(copy, new_attributes(), overwrite=False)
    assert writer.missing_shards() == [1]
    write(writer, 1)
    assert problems(copy, deep=True) == []
    assert contents(copy) == contents(whole)


def test_a_forged_commit_record_does_not_hide_altered_features(copy: Path) -> None:
    key = f"{VALUES}/1/0/0/0/0/0"
    root: Any = zarr.open_group(copy, mode="r+")
    root["features/stride_02/values"][2, 0] = 1
    record = json.loads(str(root["commits"][1]))
    data = (copy / key).read_bytes()
    record["files"][key] = [len(data), digest_of(data, CURRENT)]
    root["commits"][1:] = np.array([json.dumps(record)], np.dtypes.StringDType())
    assert problems(copy) == []
    found = ["shard 1: tile t2: features differ from the digest recorded for them"]
    assert problems(copy, deep=True) == found


# --- incomplete stores


def test_rows_of_missing_shards_are_refused_and_others_read(tmp_path: Path) -> None:
    store = open_store(build(tmp_path / "s.zarr", shards=(0,)))
    reads: list[Callable[[NDArray[np.intp]], Any]] = [
        store.targets,
        store.colour,
        store.previews,
        store.stored,
        lambda rows: store.pooled_group("stride_02", rows),
    ]
    for read in reads:
        assert read(np.array([1, 0])) is not None
        for rows in (np.array([2]), np.array([0, 2])):
            with pytest.raises(
                StoreError, match=r"1 of 2 shards are missing \(1 tiles; shards 1\); run the same"
            ):
                read(rows)
    with pytest.raises(StoreError, match="1 of 2 shards are missing"):
        store.to_xarray()
    (store.path / "tiles/colour/c/0/0").unlink()
    fresh = open_store(store.path)
    for attempt in (lambda: fresh.colour(np.array([0])), lambda: fresh.tiles):
        with pytest.raises(
            StoreError,
            match=r"shard 0: tiles/colour/c/0/0 is missing \(1 of its 22 files\); `satdifuser store repair",
        ):
            attempt()


def test_files_that_hold_only_fill_values_are_written_too(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    writer = open_or_create(path, new_attributes(task="segmentation"), overwrite=False)
    skipped = [TileRow(f"t{i}", "none", skip_reason="no data") for i in range(TILES)]
    writer.write_shard(0, skipped[:2], [], {})
    zeros = {"stride_02": encode(np.zeros((1, len(STEPS), 1, 2, 2, 2), np.float32), "int8")}
    row = TileRow("t2", "none", target=np.full((4, 4), 255, np.uint8), preview=np.zeros((4, 4, 3), np.uint8))
    writer.write_shard(1, [row], [zeros], {})
    nodes = {
        str(file.parent.relative_to(path)): json.loads(file.read_bytes()) for file in path.rglob("zarr.json")
    }
    arrays = {name for name, node in nodes.items() if node["node_type"] == "array"} - {"commits"}
    for record in open_store(path).commits:
        assert {key.split("/c/")[0] for key in record["files"]} == arrays
        assert sum(key.startswith(VALUES) for key in record["files"]) == len(STEPS)
        assert all((path / key).is_file() for key in record["files"])


# --- writes that fail


def test_no_write_goes_on_once_another_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "s.zarr", shards=(0,))
    writer = open_or_create(path, new_attributes(), overwrite=False)
    calls: list[int] = []

    def slow_disk(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.2)

    before, seen = files_of(path), []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", slow_disk)
        for _ in range(2):  # the writer that failed takes nothing more
            with pytest.raises(StoreError, match="shard 1: the disk is full; committed shards are kept"):
                write(writer, 1)
            seen.append((files_of(path), len(calls)))
        time.sleep(0.5)
        assert [seen[0], (files_of(path), len(calls))] == [seen[1]] * 2
    assert len(calls) <= WRITE_THREADS + 1  # what was under way ended before the error came out
    assert not [file for file in files_of(path) if file not in before and "1" not in file.parts]
    assert open_store(path).colour(np.array([0, 1]))[:, 0].tolist() == [0, 1]
    write(open_or_create(path, new_attributes(), overwrite=False), 1)
    assert problems(path, deep=True) == []


SMALL = ["source.tiles=4", "source.tile_size=32", "extract.threads=1", "store.tiles_per_shard=2"]
LIMIT_THE_SECOND_SHARD = """
import resource
from satdifuser.cli import main
from satdifuser.store.writer import StoreWriter
write_shard = StoreWriter.write_shard
def limited(self, shard, *rest):
    if shard == 1:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    return write_shard(self, shard, *rest)
StoreWriter.write_shard = limited
main()
"""


def extraction(path: Path) -> list[str]:
    return ["extract", "-o", str(path), *(word for setting in SMALL for word in ("--set", setting))]


def refused_run(*command: str) -> str:
    """Run a command that must fail; return its one line of explanation."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    (line,) = done.stderr.splitlines()
    return line


def finish(path: Path, expected: list[int]) -> None:
    """After a refusal: committed shards are kept, nothing lies about, the same command completes."""
    store = open_store(path)
    assert store.missing_shards() == expected
    assert store.previews(np.array([0, 1])).shape == (2, 32, 32, 3)
    assert not list(path.rglob("*.partial"))
    kept = (path / "commits/c/0").stat().st_mtime_ns
    result = CliRunner().invoke(cli, extraction(path))
    assert result.exit_code == 0, result.output
    assert (path / "commits/c/0").stat().st_mtime_ns == kept
    assert problems(path, deep=True) == []


def test_extraction_meets_a_file_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    line = refused_run("-c", LIMIT_THE_SECOND_SHARD, *extraction(path))
    assert line.startswith(f"error: {path}: shard 1: cannot write: [Errno {errno.EFBIG}]")
    assert line.endswith("committed shards are kept: mend the cause and run the same command again")
    finish(path, [1])


@pytest.mark.slow
def test_extraction_meets_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=560k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here: needs root on Linux")
    try:
        line = refused_run("-m", "satdifuser", *extraction(disk / "s.zarr"), "--ignore-free-space")
        assert line.startswith(f"error: {disk}/s.zarr: shard 1: the disk is full; committed shards are kept")
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        finish(disk / "s.zarr", [1])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_store_that_changes_while_it_is_read(copy: Path, tmp_path: Path) -> None:
    reader, unread = open_store(copy), open_store(copy)
    assert len(reader.pooled()) == TILES
    assert len(unread.tiles) == TILES
    (copy / "commits/c/1").unlink()
    shutil.rmtree(copy / "features/stride_02/pooled/c/1")
    with pytest.raises(StoreError, match="pooled/c/1/0/0/0 is missing"):  # what Zarr reads as fill values
        reader.pooled()
    build(tmp_path / "new.zarr", store_id="another")
    take_place(tmp_path / "new.zarr", copy)
    for asked in (lambda: reader.table("tiles/bounds"), lambda: unread.maps(np.array([0]))):
        with pytest.raises(StoreError, match="was replaced while it was read"):
            asked()


def test_metadata_that_are_written_again_as_they_were(copy: Path) -> None:
    reader, root = open_store(copy), copy / "zarr.json"
    text = root.read_bytes()
    root.unlink()
    root.write_bytes(text)
    assert len(reader.pooled()) == TILES


def test_a_commit_record_of_another_shard(copy: Path) -> None:
    for array in {key.split("/c/")[0] for key in open_store(copy).commits[1]["files"]}:
        shutil.rmtree(copy / array / "c/1", ignore_errors=True)
        (copy / array / "c/1").unlink(missing_ok=True)
    shutil.copy(copy / "commits/c/0", copy / "commits/c/1")
    assert problems(copy) == ["shard 1: commits/c/1 is damaged (it is that of shard 0)"]
    with pytest.raises(StoreError, match="commit record of shard 1 is damaged"):
        open_store(copy).targets(np.arange(TILES))


def test_a_commit_record_that_leaves_a_file_out(copy: Path) -> None:
    commits: Any = zarr.open_group(copy, mode="r+")["commits"]
    record = json.loads(str(commits[0]))
    del record["files"]["targets/label/c/0"]
    commits[0] = json.dumps(record)
    assert problems(copy) == ["shard 0: commits/c/0 is damaged (it names no file of targets/label)"]
