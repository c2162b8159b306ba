"""The geobench source: data sets in the benchmark's layout, agreement with its package, and damaged files."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from affine import Affine
from click.testing import CliRunner
from made_up_geobench import AERIAL, CLASSES, S2, Bench, fake_geobench

from satdifuser.cli import cli
from satdifuser.errors import ImageError, SettingsError, SourceError
from satdifuser.extract.images import raw_means, to_rgb
from satdifuser.extract.settings import GeobenchSettings, image_settings
from satdifuser.extract.sources import Source, TileRecord, list_tiles, open_source
from satdifuser.extract.sources.geobench_files import parse_partition


@pytest.fixture
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What makes instances of the benchmark's classes; a test may ask for its package's former names."""
    return fake_geobench(monkeypatch, getattr(request, "param", "geobench"))


@pytest.fixture
def bench(tmp_path: Path, make: Callable[..., Any]) -> Bench:
    return Bench(tmp_path, make)


def raised(bench: Bench, kind: type[Exception] = SourceError, **settings: Any) -> str:
    """Return the message of listing and reading a data set."""
    with pytest.raises(kind) as info:
        for _ in read_all(bench.open(**settings)):
            pass
    return str(info.value)


def read_all(source: Source) -> Iterator[Any]:
    for record in list_tiles(source):
        yield source.read(record)


def by_id(source: Source) -> dict[str, TileRecord]:
    return {record.tile_id: record for record in list_tiles(source)}


@pytest.mark.parametrize("make", ["geobench", "geobench.io", "ccb.io"], indirect=True)
def test_samples_carry_label_place_date_and_the_splits_of_every_partition(bench: Bench) -> None:
    source = bench.open()
    records = list_tiles(source)
    assert (source.task, source.classes, source.splits) == (
        "classification",
        tuple(CLASSES),
        ("train", "val", "test"),
    )
    assert [record.tile_id for record in records] == list("abcd")
    assert [record.label for record in records] == [0, 1, 2, 0]
    assert [record.split for record in records] == ["train", "train", "val", "test"]
    first = records[0]
    assert first.partitions == {"default": "train", "0.50x_train": "none"}
    assert (first.size, first.date) == ((6, 8), "2018-06-01T00:00:00")
    assert first.georeference is not None
    assert first.georeference.crs == "EPSG:32632"
    assert first.georeference.bounds(*first.size) == (500000, 5199940, 500080, 5200000)


@pytest.mark.parametrize(
    ("corner", "crs"), [((5, 52), "EPSG:4326"), ((-2390, 2490), None)], ids=["in degrees", "off the globe"]
)
def test_a_crs_given_as_text_counts_where_its_degrees_lie_on_the_globe(
    bench: Bench, corner: tuple[float, float], crs: str | None
) -> None:
    transform = Affine(0.1, 0, corner[0], 0, -0.1, corner[1])
    bench.sample("a", label=0, place={"transform": transform, "crs": "EPSG:4326"})
    place = list_tiles(bench.open())[0].georeference
    assert (place.crs if place else None) == crs


def test_another_partition_changes_the_splits_only(bench: Bench) -> None:
    chosen, default = list_tiles(bench.open(partition="0.50x_train")), list_tiles(bench.open())
    assert [record.split for record in chosen] == ["none", "train", "val", "test"]
    assert [record.tile_id for record in chosen] == [record.tile_id for record in default]
    assert [record.partitions for record in chosen] == [record.partitions for record in default]


def test_pixels_are_raw_and_red_green_blue_are_found_and_scaled(bench: Bench) -> None:
    pixels = bench.sample("a", label=0)
    source = bench.open()
    tile = source.read(by_id(source)["a"])
    np.testing.assert_array_equal(tile.image, pixels)
    assert tile.image.dtype == np.int16
    assert tile.band_names == tuple(S2)
    rgb = to_rgb(tile, image_settings(bench.settings())).rgb
    np.testing.assert_allclose(rgb, pixels[[3, 2, 1]] / 4095, rtol=1e-6)
    chosen = image_settings(bench.settings(bands=["08 - NIR", "red", 3], scale=1 / 3000))
    np.testing.assert_allclose(to_rgb(tile, chosen).rgb, pixels[[5, 3, 2]] / 3000, rtol=1e-6)


@pytest.mark.parametrize(
    ("dataset", "scale"),
    [("m-so2sat", 1 / 0.4095), ("m-forestnet", 1 / 255), ("m-chesapeake", 1.0), ("another", None)],
)
def test_scales_by_data_set(bench: Bench, dataset: str, scale: float | None) -> None:
    assert image_settings(bench.settings(dataset=dataset)).scale == scale
    assert image_settings(bench.settings(dataset=dataset, scale=0.5)).scale == 0.5


def test_a_scale_nobody_knows_must_be_set(bench: Bench) -> None:
    bench.folder.rename(bench.folder.parent / "m-cashew-plant")
    message = raised(bench, SettingsError, dataset="m-cashew-plant")
    assert "source.scale: the scale of m-cashew-plant is not known" in message
    assert "the values of a.hdf5 run from " in message
    assert len(list_tiles(bench.open(dataset="m-cashew-plant", scale=1 / 4095))) == 4


def test_multi_label(bench: Bench) -> None:
    bench.task("label.MultiLabelClassification", n_classes=3, class_name=None)
    for name, label in {"a": [1, 0, 1], "b": list(np.array([1, 0, 1])), "c": np.array([1, 0, 1.0])}.items():
        bench.sample(name, label=label)
    bench.sample("d", label=np.array([True, False, True]))
    source = bench.open()
    assert (source.task, source.classes) == ("multilabel", ("0", "1", "2"))
    assert {record.label for record in list_tiles(source)} == {(1, 0, 1)}


def test_segmentation(bench: Bench) -> None:
    bench.task("dataset.SegmentationClasses", name="label", n_classes=3, _class_names=CLASSES)
    mask = np.arange(48).reshape(6, 8) % 3
    for name in "abcd":
        bench.sample(name, AERIAL, mask=np.where(mask == 2, 255, mask))
    source = bench.open()
    record = by_id(source)["a"]
    assert (source.task, record.label) == ("segmentation", None)
    tile = source.read(record)
    assert tile.band_names == ("Red", "Green", "Blue")
    assert tile.mask is not None
    np.testing.assert_array_equal(tile.mask, np.where(mask == 2, source.ignore_value, mask))
    with h5py.File(bench.path("b"), "a") as file:
        del file["Red_2018-06-01"]
        file["Red_2018-06-01"] = np.where(mask == 0, np.nan, 1.0)
    tile = source.read(by_id(source)["b"])
    assert tile.mask is not None
    assert set(tile.mask[mask == 0]) == {source.ignore_value}
    bench.sample("a", AERIAL, mask=mask[:3])
    assert "a.hdf5: its mask is of shape (3, 8), but its bands are of (6, 8)" in raised(bench)
    bench.sample("a", AERIAL, mask=mask + 1)
    assert "a.hdf5: mask holds 3; allowed are the class ids 0, 1, 2 and 255" in raised(bench)


def test_bands_of_another_size_are_left_aside_and_pixels_without_data_are_invalid(bench: Bench) -> None:
    arrays = {name: np.ones((6, 8), np.float32) for name in AERIAL}
    arrays["Red"][0, 0] = np.nan
    arrays |= {"Height": np.ones((3, 4)), "Neon": np.ones((6, 8, 5))}
    notes = {name: bench.band(name) for name in arrays}
    bench.write("a", arrays, {"label": np.int64(1), **notes, "bands_order": list(arrays)})
    source = bench.open()
    tile = source.read(by_id(source)["a"])
    assert tile.band_names == ("Red", "Green", "Blue")
    assert np.argwhere(~tile.valid).tolist() == [[0, 0]]


def test_several_dates_keep_their_full_names(bench: Bench) -> None:
    keys = [f"04 - Red_{year}-06-01" for year in (2018, 2019)]
    arrays = {key: np.ones((6, 8), np.int16) for key in keys}
    bench.write(
        "a", arrays, {"label": 1, **{key: bench.band("04 - Red") for key in keys}, "bands_order": keys}
    )
    source = bench.open()
    tile = source.read(by_id(source)["a"])
    assert tile.band_names == tuple(keys)
    with pytest.raises(
        ImageError, match=r"no band 'red' in source.bands; it has 2 bands \(04 - Red_2018-06-01"
    ):
        to_rgb(tile, image_settings(bench.settings()))


def test_errors_of_root_dataset_and_partition(bench: Bench) -> None:
    nowhere = bench.root / "nowhere"
    assert f"source.root: {nowhere} is not a folder" in raised(bench, SettingsError, root=nowhere)
    message = raised(bench, SettingsError, dataset="m-eurosaat")
    assert (
        "holds no data set 'm-eurosaat' with a task_specs.pkl; it holds m-eurosat; did you mean m-eurosat?"
        in message
    )
    message = raised(bench, SettingsError, partition="0.5x_train")
    assert "has no partition '0.5x_train'; it has default, 0.50x_train; did you mean 0.50x_train?" in message
    twin = bench.root / "segmentation_v1.0" / "m-eurosat"
    twin.mkdir(parents=True)
    (twin / "task_specs.pkl").write_bytes(b"")
    assert "set source.root to one of them" in raised(bench, SettingsError)
    assert len(list_tiles(bench.open(root=bench.folder.parent))) == 4


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": ["a", "b", "e"], "test": ["d"]}, "1 of its 4 samples are not there, e.g. "),
        ({"train": ["a", "../../secret"]}, "1 of its 2 samples are not there"),
        ({"train": ["a", "b"], "valid": ["b"]}, "sample 'b' is in train and again in val; list each"),
        ({"train": ["a", "a"]}, "sample 'a' is in train and again in train"),
        ({"training": ["a"]}, "not a partition (it holds training); expected"),
        ({"train": "ab"}, "not a partition (train is not a list of names)"),
        (["a"], "not a partition (it holds no splits)"),
    ],
)  # fmt: skip
def test_errors_of_any_partition(bench: Bench, splits: Any, expected: str) -> None:
    path = bench.folder / "0.50x_train_partition.json"
    path.write_text(json.dumps(splits))
    message = raised(bench)
    assert message.startswith(f"{path}: ")
    assert expected in message
    path.write_text("{")
    assert f"{path}: not a partition (Expecting" in raised(bench)


def test_valid_is_val() -> None:
    assert parse_partition({"valid": ["x"]}) == {"val": ["x"]}


def unreadable(source: Source) -> dict[str, str]:
    """Return the ids of tiles that are listed but fail when they are read, and why."""
    failed = {}
    for record in list_tiles(source):
        try:
            source.read(record)
        except ImageError as error:
            failed[record.tile_id] = str(error)
    return failed


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "a.hdf5: has no label, expected one in its pickle"),
        ({"label": 3}, "a.hdf5: label is 3, expected 0 to 2"),
        ({"label": np.float64(0.5)}, "a.hdf5: label is 0.5, expected 0 to 2"),
        ({"label": np.array([1, 0, 0])}, "a.hdf5: label is [1, 0, 0], expected 0 to 2"),
        ({"label": Affine.identity()}, "a.hdf5: label cannot be read (Affine is not a number or an array)"),
        ({"label": np.array(["x"])}, "a.hdf5: label cannot be read (array of dtype <U1, expected numbers)"),
    ],
)
def test_a_sample_without_a_usable_label_is_named_or_skipped(
    bench: Bench, content: Any, expected: str
) -> None:
    bench.sample("a", **content)
    message = raised(bench)
    assert expected in message
    assert "source.on_error: skip" in message
    assert unreadable(bench.open(on_error="skip")) == {"a": message}


def test_errors_of_multi_label_and_mask(bench: Bench) -> None:
    bench.task("label.MultiLabelClassification", n_classes=3)
    assert "a.hdf5: label is 0, expected 3 numbers that are 0 or 1" in raised(bench)
    bench.sample("a", label=[1, 0, 2])
    assert "a.hdf5: label is [1, 0, 2], expected 3 numbers that are 0 or 1" in raised(bench)
    bench.task("dataset.SegmentationClasses", n_classes=3)
    assert "a.hdf5: has no label, expected a band named label" in raised(bench)


def test_errors_of_the_task(bench: Bench) -> None:
    path = bench.folder / "task_specs.pkl"
    bench.task("label.Regression")
    assert f"{path}: labels are of type Regression, expected one of Classification, Multi" in raised(bench)
    bench.task("label.Classification")
    assert f"{path}: not readable as the specifications of a GEO-Bench task ('n_classes')" in raised(bench)
    bench.task("label.Classification", n_classes=10**12)
    assert "(1000000000000 classes, expected 1 to 255); get the file anew" in raised(bench)
    path.write_bytes(path.read_bytes()[:40])
    assert f"{path}: not readable as the specifications of a GEO-Bench task (its pickle is" in raised(bench)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_pickle_that_would_run_a_command_is_refused_by_name(bench: Bench, on_error: str) -> None:
    mark = bench.root / "ran"
    bench.sample("b", label=Command(mark))
    expected = f"{bench.path('b')}: refused, its pickle asks for {os.system.__module__}.system, which no GEO-"
    assert expected in raised(bench, on_error=on_error)
    path = bench.folder / "task_specs.pkl"
    path.write_bytes(pickle.dumps(Command(mark)))
    assert f"{path}: refused, its pickle asks for {os.system.__module__}.system" in raised(bench)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # so the test can tell


def test_truncated_and_foreign_files_are_named_or_skipped(bench: Bench) -> None:
    path = bench.path("b")
    whole = path.read_bytes()
    for length in (0, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        message = raised(bench)
        assert f"{path}: cannot be read as a GEO-Bench sample (" in message
        assert "source.on_error: skip" in message
        assert unreadable(bench.open(on_error="skip")).keys() == {"b"}
    for name in "abcd":
        bench.path(name).write_bytes(b"")
    assert "a.hdf5: cannot be read" in raised(bench, on_error="skip")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "'list' object has no attribute 'get'"),
        ({"bands_order": ["cube"]}, "it holds no band of two dimensions"),
        ({"bands_order": ["Blue"]}, "band 'Blue' is missing"),
        ({"bands_order": ["link"]}, "band 'link' is missing, or not an array of numbers in this file"),
        ({"bands_order": ["elsewhere"]}, "band 'elsewhere' is missing, or not an array of numbers"),
        ({"bands_order": ["text"]}, "band 'text' is missing, or not an array of numbers"),
        ({"bands_order": ["Red"]}, "'Red'"),
    ],
)
def test_samples_of_another_form(bench: Bench, content: Any, expected: str) -> None:
    secret = bench.root / "secret"
    secret.write_bytes(bytes(48))
    bench.write("a", {"Red": np.ones((6, 8)), "text": ["x"], "cube": np.ones((6, 8, 3))}, content)
    with h5py.File(bench.path("a"), "a") as file:
        file["link"] = h5py.ExternalLink(bench.path("b"), "04 - Red_2018-06-01")
        file.create_dataset("elsewhere", (6, 8), "u1", external=[(str(secret), 0, 48)])
    message = raised(bench)
    assert f"{bench.path('a')}: cannot be read as a GEO-Bench sample ({expected}" in message


def test_tiles_prints_names_splits_labels_and_raw_means(bench: Bench) -> None:
    pixels = bench.sample("a", label=0)
    words = ["tiles", "--json", "--set", "source.kind=geobench", "--set", f"source.root={bench.root}"]
    result = CliRunner().invoke(cli, [*words, "--set", "source.dataset=m-eurosat"])
    assert result.exit_code == 0, result.output
    line = json.loads(result.stdout.splitlines()[0])
    assert (line["tile_id"], line["split"], line["label"], line["target"]) == ("a", "train", 0, "wood")
    assert line["partitions"] == {"default": "train", "0.50x_train": "none"}
    assert line["band_names"] == S2
    np.testing.assert_allclose(line["raw_means"], pixels.mean(axis=(1, 2)))
    np.testing.assert_allclose(line["prepared_means"], pixels[[3, 2, 1]].mean(axis=(1, 2)) / 4095, rtol=1e-5)


@pytest.mark.parametrize("dataset", ["m-eurosat", "m-bigearthnet", "m-forestnet", "m-nz-cattle"])
def test_agreement_with_the_benchmarks_own_package(shared: Path, dataset: str) -> None:
    root = shared / "data" / "geobench"
    source = open_source(GeobenchSettings(kind="geobench", root=root, dataset=dataset))
    expected = {
        key: value
        for key, value in json.loads((root / "expected.json").read_text()).items()
        if dataset in key
    }
    records = list_tiles(source)
    assert len(records) == len(expected)
    places: dict[str, int] = dict.fromkeys(["train", "val", "test"], 0)
    for record in records:
        split = {"val": "valid"}.get(record.split, record.split)
        (key,) = [key for key in expected if key.endswith(f"/{dataset}/{split}/{places[record.split]}")]
        places[record.split] += 1
        agree(source, record, expected[key])


def agree(source: Source, record: TileRecord, expected: dict[str, Any]) -> None:
    """Compare one tile with what the benchmark's package reads."""
    tile = source.read(record)
    positions = [tile.band_aliases[name] for name in ("red", "green", "blue")]
    assert record.tile_id == expected["name"]
    assert [*tile.image.shape[1:], len(positions)] == expected["shape"]
    np.testing.assert_allclose(np.array(raw_means(tile))[positions], expected["mean"], rtol=1e-9)
    if tile.mask is not None:
        assert {"sum": int(tile.mask.sum()), "shape": list(tile.mask.shape)} == expected["label"]
    else:
        assert np.array_equal(np.array(record.label), expected["label"])
