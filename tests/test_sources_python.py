"""The python source: samples of all forms, splits and classes, wrong targets, and where its code may run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from satdifuser.cli import cli
from satdifuser.errors import ImageError, SettingsError, SourceError
from satdifuser.extract.images import to_rgb
from satdifuser.extract.settings import ImageSettings, PythonSettings
from satdifuser.extract.sources import Source, list_tiles, open_source
from satdifuser.extract.sources.python_sample import parse_sample
from satdifuser.labels.settings import SplitShares
from satdifuser.pipeline import load_pipeline

TARGET = "made_data:make"
# A module of the user's: twelve tiles of two classes that differ in brightness.
MODULE = """
import wave

import torch

class Tiles:
    classes = ["dark", "bright"]

    def __init__(self, split=None, count=12):
        self.split, self.count = split, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"image": noise * (index % 2 + 1) / 2, "label": torch.tensor(index % 2)}
"""


class Data:
    """Samples in a list, as a data set of the mapping style; attributes are for the test to set."""

    def __init__(self, samples: list[Any], **attributes: Any) -> None:
        self.samples = samples
        self.reads = 0
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        sample = self.samples[index]
        if isinstance(sample, Exception):
            raise sample
        return sample


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("made_data")
    monkeypatch.setitem(sys.modules, "made_data", made)
    return made


@pytest.fixture
def source(module: ModuleType) -> Callable[..., Source]:
    """Open a source whose target returns a data set of these samples."""

    def opened(dataset: Any, **settings: Any) -> Source:
        held = dataset if callable(dataset) else lambda **kwargs: dataset
        module.make = held  # type: ignore[attr-defined]
        return open_source(PythonSettings(kind="python", **({"target": TARGET} | settings)))

    return opened


def picture(seed: int = 0, shape: tuple[int, ...] = (3, 4, 6)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labelled(*labels: Any, **attributes: Any) -> Data:
    samples = [{"image": picture(i), "label": label} for i, label in enumerate(labels)]
    return Data(samples, **attributes)


def masked(*masks: Any, **attributes: Any) -> Data:
    return Data([{"image": picture(i), "mask": mask} for i, mask in enumerate(masks)], **attributes)


def message(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


def read_all(source: Source) -> list[Any]:
    return [source.read(record) for record in list_tiles(source)]


# --- samples


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(lambda a: a, id="array"),
        pytest.param(torch.from_numpy, id="tensor"),
        pytest.param(lambda a: torch.from_numpy(a).float().requires_grad_(), id="float tensor with gradient"),
        pytest.param(lambda a: a.astype(np.int64), id="int64"),
        pytest.param(lambda a: Image.fromarray(np.moveaxis(a, 0, -1)), id="Pillow"),
        pytest.param(lambda a: a.tolist(), id="lists"),
    ],
)
@pytest.mark.parametrize("pair", [False, True])
def test_images_of_all_forms_are_the_same(image: Callable[[Any], Any], pair: bool) -> None:
    raw: Any = (image(picture()), 1) if pair else {"image": image(picture()), "label": 1, "path": "x"}
    sample = parse_sample(raw, "here")
    np.testing.assert_array_equal(sample.image, picture())
    assert (sample.size, sample.label, sample.mask, sample.task) == ((4, 6), 1, None, "classification")


@pytest.mark.parametrize(
    ("label", "expected", "task"),
    [
        (3, 3, "classification"),
        (True, 1, "classification"),
        (np.int16(3), 3, "classification"),
        (torch.tensor(3), 3, "classification"),
        (torch.tensor([3]), 3, "classification"),
        ([0, 1, 1], (0, 1, 1), "multilabel"),
        (torch.tensor([0.0, 1.0]), (0, 1), "multilabel"),
        (np.array([True, False]), (1, 0), "multilabel"),
        (None, None, None),
    ],
)
def test_labels_of_all_forms(label: Any, expected: Any, task: str | None) -> None:
    for raw in ({"image": picture(), "label": label}, (picture(), label), [picture(), label]):
        sample = parse_sample(raw, "here")
        assert (sample.label, sample.task) == (expected, task)
        assert type(sample.label) is type(expected)


@given(st.integers(), st.lists(st.integers(-1, 2), min_size=2, max_size=5))
def test_a_label_is_an_index_or_zeros_and_ones(number: int, several: list[int]) -> None:
    for label, fits in [(number, 0 <= number < 255), (several, set(several) <= {0, 1})]:
        try:
            parsed = parse_sample((picture(), label), "here").label
        except ImageError:
            assert not fits
        else:
            assert fits
            assert parsed == (label if isinstance(label, int) else tuple(label))


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(lambda a: a, id="array"),
        pytest.param(lambda a: torch.from_numpy(a)[None].long(), id="tensor of one band"),
        pytest.param(Image.fromarray, id="Pillow"),
        pytest.param(lambda a: torch.from_numpy(a).float(), id="float"),
    ],
)
def test_masks_of_all_forms_become_class_indices(mask: Callable[[Any], Any], source: Any) -> None:
    values = np.array([[0, 1, 2, 2, 1, 255]] * 4, np.uint8)
    for sample in ({"image": picture(), "mask": mask(values)}, (picture(), mask(values))):
        opened = source(Data([sample]), classes=["a", "b", "c"], split={"train": 1, "val": 0, "test": 0})
        (tile,) = read_all(opened)
        assert (opened.task, opened.classes, opened.splits) == ("segmentation", ("a", "b", "c"), ("train",))
        assert tile.mask.dtype == np.uint8
        np.testing.assert_array_equal(tile.mask, values)


def test_an_ignored_class_is_left_out(source: Any) -> None:
    mask = np.array([[0, 1, 2, 2, 1, 0]] * 4)
    opened = source(masked(mask, classes=["none", "a", "b"]), ignore_index=0, splits={"none": {}})
    (tile,) = read_all(opened)
    assert opened.classes == ("a", "b")
    assert tile.mask[0].tolist() == [255, 0, 1, 1, 0, 255]


def test_pixels_that_are_not_finite_hold_no_data(source: Any) -> None:
    image = picture().astype(np.float32)
    image[1, 0, 0] = np.nan
    opened = source(Data([(image, np.zeros((4, 6), int))]), classes=["a", "b"], splits={"none": {}})
    (tile,) = read_all(opened)
    assert np.argwhere(~tile.valid).tolist() == [[0, 0]]
    assert tile.mask[0].tolist() == [255, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (7, "is of an unknown form (int); expected a dict with 'image' and 'label' or 'mask', or a pair"),
        ((1, 2, 3), "is of an unknown form (tuple of 3); expected a dict"),
        ({"img": 1, "label": 2}, "has no 'image', it has img, label"),
        ({}, "has no 'image', it has nothing"),
        ({"image": picture(), "label": 0, "mask": picture()}, "has both 'label' and 'mask', expected one;"),
        ({"image": "a.png"}, "its image is of type str (<U5); expected numbers in a tensor, a numpy array"),
        ({"image": [[1], [1, 2]]}, "its image cannot be read as an array ("),
        ({"image": torch.zeros(3, 4, 6, dtype=torch.bfloat16)}, "its image cannot be read as an array ("),
        ({"image": picture(0, (4, 6))}, "its image is of shape (4, 6), expected (bands, height, width)"),
        ({"image": picture(0, (3, 0, 6))}, "its image is of shape (3, 0, 6), expected (bands,"),
        (
            {"image": picture(0, (8, 6, 3))},
            "its image is of shape (8, 6, 3), which looks like (height, width, bands); expected (bands, ",
        ),
        (
            {"image": picture(), "mask": picture(0, (2, 4, 6))},
            "its mask is of shape (2, 4, 6), but its image is of (3, 4, 6); expected (4, 6) or (1, 4, 6)",
        ),
        ((picture(), -1), "its label is -1; expected a whole number of 0 to 254, or 0 or 1 for each of at"),
        ((picture(), 255), "its label is 255; expected a whole number"),
        ((picture(), 1.5), "its label is 1.5; expected a whole number"),
        ((picture(), [0, 2]), "its label is [0, 2]; expected a whole number"),
        ((picture(), "wood"), "its target is of type str (<U4); expected numbers"),
    ],
)
def test_a_sample_of_another_form_is_refused(raw: Any, text: str) -> None:
    found = message(ImageError, lambda: parse_sample(raw, "source.target a:b, sample 7"))
    assert found.startswith(f"source.target a:b, sample 7: {text}")


# --- the source


def test_one_data_set_is_split_by_class(source: Any) -> None:
    opened = source(labelled(*[0, 1] * 10), split={"train": 0.5, "val": 0.3, "test": 0.2})
    records = list_tiles(opened)
    assert (opened.task, opened.classes) == ("classification", ("0", "1"))
    assert opened.splits == ("train", "val", "test")
    assert [record.tile_id for record in records[:2]] == ["000000", "000001"]
    assert {record.path for record in records} == {""}
    for label in (0, 1):
        drawn = [record.split for record in records if record.label == label]
        assert [drawn.count(split) for split in opened.splits] == [5, 3, 2]
    again = source(labelled(*[0, 1] * 10), split={"train": 0.5, "val": 0.3, "test": 0.2, "seed": 1})
    assert [record.split for record in list_tiles(again)] != [record.split for record in records]


def test_splits_add_arguments(source: Any) -> None:
    calls: list[dict[str, Any]] = []

    def make(**kwargs: Any) -> Data:
        calls.append(kwargs)
        return labelled(0, 1, *[0] * (kwargs["part"] == 1))

    opened = source(make, kwargs={"root": "r", "part": 0}, splits={"test": {"part": 1}, "train": {}})
    assert calls == [{"root": "r", "part": 1}, {"root": "r", "part": 0}]
    records = list_tiles(opened)
    assert [record.tile_id for record in records] == [
        *("test/000000", "test/000001", "test/000002"),
        *("train/000000", "train/000001"),
    ]
    assert [record.split for record in records] == ["test"] * 3 + ["train"] * 2
    assert opened.splits == ("train", "test")
    np.testing.assert_array_equal(opened.read(records[4]).image, picture(1))


def test_samples_without_targets_have_no_split(source: Any) -> None:
    opened = source(Data([{"image": picture()}, {"image": picture(), "label": None}]))
    assert {(record.split, record.label) for record in list_tiles(opened)} == {("none", None)}
    assert (opened.task, opened.classes, opened.splits) == (None, (), ())


def test_classes_are_those_of_the_settings_then_of_the_data_set(source: Any) -> None:
    named = labelled(0, 1, classes=("a", "b", "c"))
    keep = {"splits": {"none": {}}}
    assert source(named, **keep).classes == ("a", "b", "c")
    assert source(named, classes=["x", "y"], **keep).classes == ("x", "y")
    assert source(labelled(0, 4, classes={"a": 0}), **keep).classes == ("0", "1", "2", "3", "4")
    assert source(labelled([0, 1, 0], [1, 1, 0]), **keep).classes == ("0", "1", "2")


def test_listed_labels_spare_the_samples(source: Any) -> None:
    data = labelled(*range(20), targets=torch.arange(20))
    assert [record.label for record in list_tiles(source(data))] == list(range(20))
    assert data.reads == 1
    data = labelled([0, 1], [1, 1], labels=[[0, 1], [1, 1]])
    assert [record.label for record in list_tiles(source(data, splits={"train": {}}))] == [(0, 1), (1, 1)]
    assert data.reads == 1


@pytest.mark.parametrize(
    "listed",
    [["wood", "field"], [0], [0, -1], [[0, 1], [1, 0]], {0: "a", 1: "b"}, 7],
)
def test_lists_that_are_not_labels_are_left_aside(source: Any, listed: Any) -> None:
    data = labelled(0, 1, targets=listed)
    assert [record.label for record in list_tiles(source(data, splits={"train": {}}))] == [0, 1]
    assert data.reads == 3  # the first, then all


def test_masks_are_not_read_to_list_tiles(source: Any) -> None:
    data = masked(*[np.zeros((4, 6), int)] * 9, classes=["a", "b"])
    assert len(list_tiles(source(data))) == 9
    assert data.reads == 1


def test_bands_are_named_by_the_data_set(source: Any) -> None:
    image = picture(0, (4, 4, 6))
    data = Data([{"image": image}], bands=["B02", "B03", "B04", "B08"])
    (tile,) = read_all(source(data))
    assert tile.band_names == ("B02", "B03", "B04", "B08")
    rgb = to_rgb(tile, ImageSettings(bands=["B04", 2, 1])).rgb
    np.testing.assert_allclose(rgb, image[[2, 1, 0]] / 255, rtol=1e-6)
    assert read_all(source(Data([{"image": image}], bands="all")))[0].band_names == ()
    text = message(ImageError, lambda: to_rgb(tile, ImageSettings()))
    assert text.startswith("tile 000000: it has 4 bands (B02, B03, B04, B08), expected 3; name red, green")


def test_a_float_image_needs_a_scale(source: Any) -> None:
    (tile,) = read_all(source(Data([{"image": torch.linspace(0, 1, 72).reshape(3, 4, 6)}])))
    assert to_rgb(tile, ImageSettings(scale=1)).rgb.max() == 1
    text = message(ImageError, lambda: to_rgb(tile, ImageSettings()))
    assert "float32 pixels without a declared scale (values 0 to 1); set source.scale" in text


# --- samples that do not fit


SMALL = {"image": picture(0, (3, 4, 5)), "label": 0}


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (
            SMALL,
            "sample 1 of train: its image is 4x5 px (height x width), expected 4x6 px as in the first sample",
        ),
        (
            (picture(), None),
            "sample 1 of train: its target is for nothing, that of the first sample for classification;",
        ),
        (
            (picture(), [0, 1]),
            "sample 1 of train: its target is for multilabel, that of the first sample for classification;",
        ),
        (
            (picture(), 2),
            "sample 1 of train: its label is 2, but there are 2 classes; correct it, or name all classes in",
        ),
        (ValueError("disk on fire"), "sample 1 of train: reading it raised ValueError: disk on fire ("),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_bad_sample_stops_or_is_skipped(source: Any, bad: Any, text: str, listed: bool) -> None:
    first, last = ({"image": picture(i), "label": i} for i in (0, 1))
    settings = {"splits": {"train": {}}, "classes": ["a", "b"]}
    attributes = {"targets": [0, 0, 1]} if listed else {}
    data = Data([first, bad, last], **attributes)
    found = message(ImageError, lambda: read_all(source(data, **settings)))
    assert found.startswith(f"source.target {TARGET}, {text}")
    assert found.endswith("; source.on_error: skip leaves such tiles out")
    opened = source(data, **settings, on_error="skip")
    records = list_tiles(opened)
    assert len(records) == 3
    skipped = message(ImageError, lambda: opened.read(records[1]))
    assert skipped.startswith(f"source.target {TARGET}, {text}")
    assert "source.on_error" not in skipped
    for record in (records[0], records[2]):
        assert opened.read(record).record.label == record.label


def test_another_count_of_labels(source: Any) -> None:
    found = message(ImageError, lambda: source(labelled([0, 1], [0, 1, 1])))
    assert "sample 1: its label is 3 numbers, but there are 2 classes; correct it" in found


def test_where_a_data_set_raises_is_told(source: Any) -> None:
    found = message(ImageError, lambda: source(Data([KeyError("x")])))
    assert f"sample 0: reading it raised KeyError: 'x' ({__file__}, line " in found


def test_the_first_sample_may_be_skipped(source: Any) -> None:
    opened = source(Data([OSError("gone"), (picture(), 1)]), on_error="skip", splits={"none": {}})
    assert [record.label for record in list_tiles(opened)] == [None, 1]
    found = message(SourceError, lambda: source(Data([OSError("gone")] * 2), on_error="skip"))
    assert found.startswith("source: none of the 2 samples can be read; the first: source.target made_data")


def test_targets_that_contradict_the_samples(source: Any) -> None:
    opened = source(labelled(0, 1, targets=[0, 0]), splits={"train": {}})
    found = message(ImageError, lambda: read_all(opened))
    assert "sample 1 of train: its label is 1, but 0 was listed; let the data set return the same" in found
    assert "the same as its targets or labels" in found


def test_unknown_mask_values(source: Any) -> None:
    opened = source(masked(np.full((4, 6), 7), classes=["a", "b"]))
    found = message(ImageError, lambda: opened.read(opened.records()[0]))
    assert f"{TARGET}, sample 0: mask holds 7; allowed are the class ids 0, 1 and 255" in found


def test_masks_need_class_names(source: Any) -> None:
    found = message(SettingsError, lambda: source(masked(np.zeros((4, 6)))))
    assert found.startswith(f"source.classes: {TARGET} yields masks and has no list 'classes' of names; name")


def test_splits_of_different_classes(source: Any) -> None:
    def make(classes: list[str]) -> Data:
        return labelled(0, 1, classes=classes)

    splits = {"train": {"classes": ["a", "b", "c"]}, "val": {"classes": ["b", "c"]}}
    found = message(SourceError, lambda: source(make, splits=splits))
    assert "its splits have different classes: train (a, b, c), val (b, c), so that equal labels may" in found
    assert source(make, splits=splits, classes=["x", "y"]).classes == ("x", "y")


def test_equal_class_names(source: Any) -> None:
    found = message(SourceError, lambda: source(labelled(0, 1), classes=["a", "a"]))
    assert found == "source.classes: class name a appears twice; make each unique"


# --- the target


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (
            "nowhere_to_be_found:make",
            "cannot import nowhere_to_be_found: ModuleNotFoundError: No module named",
        ),
        ("made_data:mak", "made_data has no 'mak'; did you mean make?"),
        ("made_data:constant", "is of type int; expected a class or a function that returns a data set"),
        ("made_data:make.nothing", "made_data has no 'make.nothing'"),
    ],
)
def test_a_wrong_target(source: Any, module: ModuleType, target: str, text: str) -> None:
    module.constant = 7  # type: ignore[attr-defined]
    found = message(SettingsError, lambda: source(labelled(0), target=target))
    assert found.startswith(f"source.target: {target}")
    assert text in found


def fail(root: str = "") -> None:
    raise FileNotFoundError(f"no data in {root}")


def leave() -> None:
    sys.exit("usage: …")


@pytest.mark.parametrize(
    ("make", "kwargs", "text"),
    [
        (fail, {"root": "here"}, "make(root='here') raised FileNotFoundError: no data in here ("),
        (fail, {"rot": 1}, "make(rot=1) raised TypeError: fail() got an unexpected keyword argument 'rot'"),
        (leave, {}, "make() raised SystemExit: usage: … ("),
        (lambda: None, {}, "make() returned a NoneType; expected one data set with a length and samples 0,"),
        (lambda: {"train": labelled(0)}, {}, "make() returned a dict; expected one data set"),
        (lambda: {1, 2}, {}, "make() returned a set; expected one data set"),
        (lambda: iter([1]), {}, "make() returned a list_iterator; expected one data set"),
        (list, {}, "make() returned a data set of 0 samples, expected at least one"),
    ],
)
def test_a_target_that_makes_no_data_set(source: Any, make: Any, kwargs: dict[str, Any], text: str) -> None:
    found = message(SettingsError, lambda: source(make, kwargs=kwargs))
    assert found.startswith(f"source.target: made_data:{text}")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("source.target=mydata", "source.target = 'mydata': expected package.module:name, the name of a"),
        ("source.target=my-data:x", "source.target = 'my-data:x': expected package.module:name"),
        ("source.splits={}", "source.splits: "),
        ("source.splits.trian.a=1", "expected 'train', 'val', 'test' or 'none'"),
        ("source.kwargs.day=2020-01-01", "source.kwargs.day = datetime.date(2020, 1, 1): input was not a"),
    ],
)
def test_wrong_settings(override: str, text: str) -> None:
    base = ["source.kind=python", "source.target=a:b"]
    assert text in message(SettingsError, lambda: load_pipeline(None, [*base, override]))


def test_settings_by_override() -> None:
    texts = ["kind=python", "target=a.b:c", "kwargs.root=data", "splits.train.split=train", "scale=1/4"]
    source = load_pipeline(None, [f"source.{text}" for text in texts]).source
    assert source == PythonSettings(
        kind="python",
        target="a.b:c",
        kwargs={"root": "data"},
        splits={"train": {"split": "train"}},
        split=SplitShares(),
        scale=0.25,
    )


# --- where its code is found, and where it may run


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds the user's module, as the command line finds it."""
    (tmp_path / "user_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "user_data", raising=False)
    importlib.invalidate_caches()
    return tmp_path


def run(*words: str) -> str:
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    return result.output


FROM_FOLDER = (
    "--set",
    "source.kind=python",
    "--set",
    "source.target=user_data:Tiles",
    "--set",
    "source.scale=1",
)


def test_modules_of_the_working_folder_are_found_last(working_folder: Path) -> None:
    (working_folder / "wave.py").write_text("raise ImportError('hides the standard library')")
    command = [sys.executable, "-c", "from satdifuser.cli import main; main()", "tiles", *FROM_FOLDER]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("12 tiles (7 train, 3 val, 2 test)")
    assert done.stdout.splitlines()[1].split()[0] == "000001"
    assert done.stdout.splitlines()[1].endswith("bright")


def test_an_import_that_fails_is_placed(working_folder: Path) -> None:
    (working_folder / "broken_data.py").write_text("import nothing_like_it\n")
    before = [*sys.path]
    settings = PythonSettings(kind="python", target="broken_data:Tiles")
    found = message(SettingsError, lambda: open_source(settings))
    assert "cannot import broken_data: ModuleNotFoundError: No module named 'nothing_like_it' (" in found
    assert (
        f"{working_folder / 'broken_data.py'}, line 1); expected a module that is installed, lies in" in found
    )
    assert sys.path == before


def test_extracted_and_fitted_without_importing_it_again(
    working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = ("--set", "extract.batch_size=4", "--set", "extract.threads=1", "--set", "backbone.device=cpu")
    small = ("--set", "extract.layers=[up_blocks.0.*conv2]", "--set", "extract.timesteps=[21]")
    run("extract", *FROM_FOLDER, *size, *small, "-o", "mine.zarr")
    run("extract", *FROM_FOLDER, *size, *small, "-o", "mine.zarr")  # goes on, with nothing left to do
    kwargs = ("--set", "source.kwargs.split=x")
    result = CliRunner().invoke(cli, ["extract", *FROM_FOLDER, *kwargs, *size, *small, "-o", "mine.zarr"])
    assert (result.exit_code, "source.kwargs" in result.output) == (1, True)

    monkeypatch.delitem(sys.modules, "user_data")
    (working_folder / "user_data.py").write_text("raise SystemExit('ran')")
    monkeypatch.setattr(
        "satdifuser.extract.sources.python_target.importlib",
        SimpleNamespace(import_module=lambda name: pytest.fail(f"imported {name}")),
    )
    run("store", "info", "mine.zarr")
    run("store", "verify", "mine.zarr", "--deep")
    fit = ("--set", "fit.fusion=[global]", "--set", "fit.epochs=1", "--set", "fit.projection=16")
    run("fit", "mine.zarr", *fit, "--set", "fit.norm_groups=4", "--set", "evaluate.bootstrap=5", "-o", "runs")
    run("evaluate", "runs/global-seed0", "--set", "evaluate.bootstrap=5")
    run("evaluate", "runs/global-seed0", "mine.zarr", "--set", "evaluate.bootstrap=5")
    run("report", "runs", "-o", "report.html")
    assert "user_data" not in sys.modules
    result = CliRunner().invoke(cli, ["extract", *size, *small, "-o", "mine.zarr"])  # the default source
    assert (result.exit_code, "other settings" in result.output) == (1, True)


def test_no_packaged_file_names_it() -> None:
    package = Path(str(files("satdifuser")))
    packaged = [package / "pipeline.yaml", *(package / "presets").rglob("*.yaml")]
    assert len(packaged) > 1
    for file in packaged:
        assert yaml.safe_load(file.read_text()).get("source", {}).get("kind") != "python", file
