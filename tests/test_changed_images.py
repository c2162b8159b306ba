"""Images that changed after extraction are noticed, copied ones are welcome, skipped tiles are listed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from satdifuser.cli import cli
from satdifuser.errors import StoreError
from satdifuser.extract.changes import SHOWN_SHARDS, file_state, refuse_changed
from satdifuser.extract.images import to_rgb
from satdifuser.extract.settings import FolderSettings
from satdifuser.extract.sources import list_tiles, open_source
from satdifuser.extract.sources.tile import TileRecord
from satdifuser.store.digest import CURRENT
from satdifuser.store.reader import open_store
from satdifuser.store.writer import TileRow

EXTRACT = ("timesteps=[21]", "layers=['up_blocks.1.*attn1']", "batch_size=2", "threads=1")
SIZE = 16
pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: Path, value: int) -> None:
    Image.fromarray(np.full((SIZE, SIZE), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six unlabelled images."""
    for number in range(6):
        write_picture(tmp_path / f"images/{number}.png", number)
    return tmp_path / "images"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Four images with masks."""
    root = tmp_path / "pairs"
    rows = ["image,mask,split"]
    for number, split in enumerate(("train", "train", "val", "test")):
        write_picture(root / f"{number}.png", number)
        write_mask(root / f"{number}_mask.png", number % 2)
        rows.append(f"{number}.png,{number}_mask.png,{split}")
    (root / "splits.csv").write_text("\n".join(rows))
    classes = [{"id": 0, "name": "land"}, {"id": 1, "name": "water"}]
    (root / "classes.json").write_text(json.dumps({"classes": classes}))
    return root


def extract(root: Path, kind: str = "folder", *source: str) -> Result:
    """Extract a source beside its images, two tiles a shard."""
    settings = [f"kind={kind}", f"root={root}", f"tile_size={SIZE}", *source]
    words = [f"source.{text}" for text in settings] + [f"extract.{text}" for text in EXTRACT]
    words += ["store.tiles_per_shard=2", "backbone.device=cpu"]
    options = [option for word in words for option in ("--set", word)]
    return CliRunner().invoke(cli, ["extract", *options, "-o", str(store_of(root))])


def store_of(root: Path) -> Path:
    return root.with_name("s.zarr")


def succeed(root: Path, *more: str) -> Result:
    result = extract(root, *more)
    assert result.exit_code == 0, result.output
    return result


def fail(root: Path, *more: str) -> str:
    result = extract(root, *more)
    assert result.exit_code == 1, result.output
    return result.stderr


def redo(root: Path, shard: int) -> None:
    """Do as the message says."""
    (store_of(root) / f"commits/c/{shard}").unlink()


def touch(path: Path) -> None:
    """Change the time of change only."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def commit_times(root: Path) -> list[int]:
    return [file.stat().st_mtime_ns for file in sorted((store_of(root) / "commits/c").iterdir())]


# --- images that changed


def test_the_store_keeps_states_and_digests(folder: Path) -> None:
    succeed(folder)
    tiles = open_store(store_of(folder)).tiles
    source = open_source(settings := FolderSettings(kind="folder", root=folder))
    records = list_tiles(source)
    assert tiles.file_state.tolist() == [file_state(record) for record in records]
    digests = [to_rgb(source.read(record), settings).digest(CURRENT) for record in records]
    assert tiles.image_digest.tolist() == digests
    assert len(set(digests)) == 6


def test_a_changed_image_is_refused_until_its_shard_is_done_again(folder: Path) -> None:
    succeed(folder)
    before = open_store(store_of(folder)).tiles.digest
    write_picture(folder / "3.png", seed=99)
    message = (
        f"error: {store_of(folder)}: tile 3: its image {folder}/3.png changed after it was extracted; "
        f"delete {store_of(folder)}/commits/c/1 and run the same `satdifuser extract` command again to redo "
        "this shard, or replace the store with --overwrite\n"
    )
    assert message in fail(folder)
    assert message in fail(folder)
    redo(folder, 1)
    succeed(folder)
    after = open_store(store_of(folder)).tiles.digest
    assert (before != after).tolist() == [number == 3 for number in range(6)]
    times = commit_times(folder)
    succeed(folder)
    assert commit_times(folder) == times


def test_a_store_begun_is_checked_before_it_goes_on(folder: Path) -> None:
    succeed(folder)
    redo(folder, 0)
    write_picture(folder / "0.png", seed=99)  # not committed any more: simply extracted
    write_picture(folder / "4.png", seed=98)
    assert "tile 4: its image" in fail(folder)
    redo(folder, 2)
    succeed(folder)


def test_every_changed_tile_is_counted(folder: Path) -> None:
    succeed(folder)
    for number in (0, 1, 5):
        write_picture(folder / f"{number}.png", seed=90 + number)
    message = fail(folder)
    assert "tile 0: its image" in message
    assert "(and 2 more tiles)" in message
    commits = store_of(folder) / "commits/c"
    assert f"delete {commits}/0, {commits}/2 and run" in message
    assert "to redo these shards" in message


def test_images_that_were_merely_copied_are_welcome(folder: Path) -> None:
    succeed(folder)
    times = commit_times(folder)
    for file in folder.iterdir():
        touch(file)
    pixels = Image.open(folder / "2.png").copy()
    pixels.save(folder / "2.png", compress_level=0)  # another size, the same picture
    succeed(folder)
    assert commit_times(folder) == times


def test_where_nothing_changed_no_image_is_read(folder: Path) -> None:
    succeed(folder)

    def read(record: TileRecord) -> TileRow:
        raise AssertionError(record)

    records = list_tiles(open_source(FolderSettings(kind="folder", root=folder)))
    refuse_changed(open_store(store_of(folder)), records, read)
    touch(folder / "0.png")
    with pytest.raises(AssertionError, match=r"0\.png"):
        refuse_changed(open_store(store_of(folder)), records, read)


def test_at_most_ten_shards_are_named(folder: Path) -> None:
    for number in range(6, 24):
        write_picture(folder / f"{number}.png", number)
    succeed(folder)
    records = list_tiles(open_source(FolderSettings(kind="folder", root=folder)))
    for record in records:
        touch(Path(record.path))
    with pytest.raises(StoreError, match=r"\(and 23 more tiles\); delete .* and 2 more and run") as caught:
        refuse_changed(
            open_store(store_of(folder)), records, lambda r: TileRow(r.tile_id, r.split, image_digest="other")
        )
    assert str(caught.value).count("commits/c/") == SHOWN_SHARDS


def test_a_changed_mask_is_refused(pairs: Path) -> None:
    succeed(pairs, "pairs")
    write_mask(pairs / "1_mask.png", 1)  # the same picture
    touch(pairs / "1_mask.png")
    succeed(pairs, "pairs")
    write_mask(pairs / "1_mask.png", 0)
    assert f"its mask {pairs}/1_mask.png changed after it was extracted; delete" in fail(pairs, "pairs")
    redo(pairs, 0)
    succeed(pairs, "pairs")
    assert open_store(store_of(pairs)).targets(np.array([1])).max() == 0  # type: ignore[union-attr]


def test_states_of_files(tmp_path: Path) -> None:
    image, mask = tmp_path / "a.tif", tmp_path / "a.png"
    record = TileRecord("a", str(image), "none", (4, 4), mask_path=str(mask))
    assert file_state(TileRecord("a", "", "none", (4, 4))) == ""
    assert file_state(record) == "missing missing"
    image.write_bytes(b"12345")
    os.utime(image, ns=(0, 10**18 + 7))
    assert file_state(record) == "5:1000000000000000007 missing"


# --- tiles that are skipped

SKIP = ("folder", "on_error=skip")


def truncate(path: Path) -> bytes:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return content


def test_a_skipped_tile_that_can_be_read_now_is_refused(folder: Path) -> None:
    content = truncate(folder / "2.png")
    succeed(folder, *SKIP)
    tile = open_store(store_of(folder)).tiles.iloc[2]
    assert (tile.image_digest, tile.target_digest) == ("", "")
    touch(folder / "2.png")  # and still unreadable
    succeed(folder, *SKIP)
    (folder / "2.png").write_bytes(content)
    assert f"its image {folder}/2.png changed after it was extracted" in fail(folder, *SKIP)
    redo(folder, 1)
    assert "skipped" not in succeed(folder, *SKIP).stderr


def test_a_tile_that_cannot_be_read_any_more_is_refused(folder: Path) -> None:
    succeed(folder, *SKIP)
    truncate(folder / "2.png")
    message = fail(folder, *SKIP)
    assert f"its image or mask (unusable now: {folder}/2.png: cannot be read as an image" in message
    assert "2.png: cannot be read as an image" in fail(folder)


def test_skipped_tiles_are_listed_at_the_end(folder: Path) -> None:
    truncate(folder / "2.png")
    for _ in range(2):
        result = succeed(folder, *SKIP)
        assert "1 of 6 tiles were skipped:\n  2: " in result.stderr
        assert f"\n`satdifuser store info {store_of(folder)}` lists all\n" in result.stderr
        assert "were skipped" not in result.stdout


def test_at_most_ten_skipped_tiles_are_listed(folder: Path) -> None:
    for number in range(10, 22):
        write_picture(folder / f"{number}.png", number)
        truncate(folder / f"{number}.png")
    listed = succeed(folder, *SKIP).stderr.split("12 of 18 tiles were skipped:\n")[1].splitlines()
    assert listed[0].startswith("  10: ")
    assert listed[9].startswith("  19: ")
    assert listed[10] == "  …"
    assert listed[11].startswith("`satdifuser store info ")


def test_nothing_is_left_where_every_tile_was_skipped(folder: Path) -> None:
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    for file in folder.glob("*.png"):
        Image.new("RGBA", (SIZE, SIZE)).save(file)
    message = fail(folder, *SKIP)
    assert (
        "all 6 tiles were skipped, so there is nothing to extract and no store was kept; the first:\n  0: "
    ) in message
    assert "it has 4 bands (R, G, B, A), expected 3" in message
    assert not store_of(folder).exists()
    shutil.rmtree(folder)
    whole.rename(folder)
    succeed(folder, *SKIP)
