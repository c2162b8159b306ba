"""The page of a store or map: which layers it has, that they lie on each other, and what is refused."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from browser import ask
from command_line import refuse, succeed
from made_up import image_folder
from made_up_maps import CLASSES, ONE_THREAD, PLACE, Mapped, land_cover, photograph, settings, write_scene
from numpy.typing import NDArray
from PIL import Image
from rasterio.warp import reproject, transform_bounds

from satdifuser.evaluate.report.colours import palette
from satdifuser.store.reader import open_store

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def view(*words: object, out: Path) -> str:
    assert succeed("view", *words, "-o", out).strip() == str(out)
    return out.read_text()


def names(page: str) -> list[str]:
    """The layers on offer."""
    return [unescape(name) for name in re.findall(r"<option[^>]*>(.*?)</option>", page.split("</select>")[0])]


def picture(page: str, index: int) -> NDArray[np.uint8]:
    """A layer's picture, (h, w, 4)."""
    data = re.findall(r'<img src="data:image/\w+;base64,([^"]*)"', page)[index]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA"))


@pytest.fixture(scope="module")
def folder(mapped: Mapped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A map of the scene, with confidence."""
    made = tmp_path_factory.mktemp("view")
    words = ("predict", mapped.run, mapped.scene, "-o", made / "map.tif", "--confidence")
    succeed(*words, *settings(ONE_THREAD))
    return made


@pytest.fixture(scope="module")
def page(mapped: Mapped, folder: Path) -> str:
    words = (mapped.store, folder / "map.tif", mapped.scene, "--run", mapped.run)
    return view(*words, out=folder / "all.html")


def test_a_page_has_all_layers_of_all_that_is_named(page: str) -> None:
    strides = [f"features, {stride} px per cell" for stride in (4, 8, 16)]
    assert names(page) == [
        *(f"{name} (masks.zarr)" for name in ("scene", *strides, "labels", "prediction")),
        "prediction (map.tif)",
        "confidence (map.tif)",
        "scene (scene.tif)",
    ]
    for name in CLASSES:
        assert page.count(f"</span>{name}</li>") == 3  # beside labels and both predictions
    assert "satdifuser view" not in page or "Made by" in page


def test_layers_lie_on_each_other(mapped: Mapped, folder: Path, page: str) -> None:
    """The store covers 80 x 96 px, tiles padded; its labels and the map are where they are on the scene."""
    colours, cover = palette(len(CLASSES)), land_cover((70, 90))
    with rasterio.open(mapped.scene) as scene:
        there = scene.dataset_mask() > 0
    labels, mapped_classes = picture(page, 4), picture(page, 6)
    assert labels.shape == mapped_classes.shape == (80, 96, 4)
    np.testing.assert_array_equal(labels[:70, :90, 3] > 0, there)
    np.testing.assert_array_equal(labels[:70, :90][there][:, :3], colours[cover[there]])
    assert not labels[70:, :, 3].any()
    with rasterio.open(folder / "map.tif") as dataset:
        classes = dataset.read(1)
    np.testing.assert_array_equal(mapped_classes[:70, :90][there][:, :3], colours[classes[there]])
    photos = [picture(page, index)[:70, :90, :3][there].astype(int) for index in (0, 8)]
    assert np.corrcoef(photos[0].ravel(), photos[1].ravel())[0, 1] > 0.9  # the second is stretched


def test_a_page_needs_nothing_else(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "://" not in re.sub(r"data:image[^\"]*", "", page)


def test_a_coarser_page_shows_all_of_a_scene(mapped: Mapped, folder: Path) -> None:
    page = view(mapped.store, "--size", 64, out=folder / "small.html")
    assert picture(page, 0).shape[:2] == (53, 64)
    assert (picture(page, 0)[..., 3] > 0).mean() > 0.7


def test_tiles_on_the_ground_with_one_class_each(mapped: Mapped, folder: Path) -> None:
    page = view(mapped.tile_store, "--run", mapped.tile_run, out=folder / "tiles.html")
    store = open_store(mapped.tile_store)
    labels = picture(page, names(page).index("labels"))
    assert labels.shape == (32, 960, 4)
    colours = palette(10)[store.tiles.label.to_numpy()]
    np.testing.assert_array_equal(labels[16, 16::32, :3], colours)
    assert names(page)[-1] == "prediction"


def test_tiles_without_a_place_are_laid_side_by_side(mapped: Mapped, folder: Path) -> None:
    image_folder(folder / "images", {"<b>": 3, "a&b": 3})
    words = settings("source.kind=folder", f"source.root={folder / 'images'}", "source.tile_size=16")
    words += settings("extract.image_size=32", "extract.timesteps=[21]", ONE_THREAD)
    succeed("extract", *words, "-o", folder / "f.zarr")
    page = view(folder / "f.zarr", out=folder / "f.html")
    assert picture(page, 0).shape == (2 * 18 - 2, 3 * 18 - 2, 4)
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    message = "tiles have no places on one grid; view it by itself"
    assert message in refuse("view", mapped.store, folder / "f.zarr", "-o", folder / "x.html")
    message = "tiles without places on one grid cannot be laid beside a raster; name them alone"
    assert message in refuse("view", folder / "f.zarr", mapped.store, "-o", folder / "x.html")


def test_rasters_on_other_grids_are_brought_to_the_first(mapped: Mapped, folder: Path) -> None:
    left, bottom, right, top = transform_bounds("EPSG:32632", "EPSG:4326", 500000, 4999300, 500900, 5000000)
    place = Affine((right - left) / 100, 0, left, 0, (bottom - top) / 80, top)
    degrees = np.zeros((3, 80, 100), np.uint8)
    reproject(
        photograph(land_cover((70, 90))),
        degrees,
        src_crs="EPSG:32632",
        src_transform=PLACE["transform"],
        dst_crs="EPSG:4326",
        dst_transform=place,
    )
    other = write_scene(folder / "degrees.tif", degrees, crs="EPSG:4326", transform=place, nodata=0)
    page = view(mapped.scene, other, out=folder / "degrees.html")
    first, second = (picture(page, i) for i in (0, 1))
    there = (first[..., 3] > 0) & (second[..., 3] > 0)
    assert there.mean() > 0.9
    assert np.corrcoef(first[there][:, :3].ravel(), second[there][:, :3].ravel())[0, 1] > 0.8


# --- refusals


def test_what_lies_elsewhere(mapped: Mapped, folder: Path) -> None:
    far = write_scene(
        folder / "far.tif", photograph(land_cover((20, 20))), transform=Affine(10, 0, 6e5, 0, -10, 4e6)
    )
    message = refuse("view", mapped.scene, far, "-o", folder / "x.html")
    assert "far.tif: does not lie on the ground of the first that is named" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--timestep", "61"), "--timestep: 61 is not in"),
        (("--layers", "nothing*"), "layer 'nothing*' is not in"),
        (("--bands", "1,2"), "--bands 1,2: expected red, green and blue, e.g. 4,3,2 or B04,B03,B02"),
        (("--run", "missing"), "missing: no such run folder"),
    ],
)
def test_bad_requests(mapped: Mapped, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    assert message in refuse("view", mapped.store, "-o", tmp_path / "x.html", *words)
    assert not (tmp_path / "x.html").exists()


def test_what_is_for_stores_is_refused_for_scenes(mapped: Mapped, tmp_path: Path) -> None:
    for words in (("--timestep", "61"), ("--layers", "up*"), ("--run", mapped.run)):
        message = refuse("view", mapped.scene, "-o", tmp_path / "x.html", *words)
        assert "--run, --timestep, --layers: are for stores, but none is named" in message


def test_scenes_that_cannot_be_shown(mapped: Mapped, tmp_path: Path) -> None:
    message = refuse("view", mapped.scene, "--bands", "1,2,9", "-o", tmp_path / "x.html")
    assert "no band 9 of --bands; it has 3 bands" in message
    plain = write_scene(tmp_path / "plain.tif", photograph(land_cover((20, 20))), crs=None)
    assert "no CRS or transform, so nothing can be laid on it" in refuse(
        "view", plain, "-o", tmp_path / "x.html"
    )
    assert "missing.tif: cannot be read" in refuse(
        "view", tmp_path / "missing.tif", "-o", tmp_path / "x.html"
    )


def test_a_run_of_other_features(mapped: Mapped, tmp_path: Path) -> None:
    run = shutil.copytree(mapped.run, tmp_path / "run")
    record = run / "run.json"
    record.write_text(record.read_text().replace('"noising": "forward"', '"noising": "inversion"'))
    message = refuse("view", mapped.store, "--run", run, "-o", tmp_path / "x.html")
    assert "noising: the run expects 'inversion', here it is 'forward'" in message


# --- in a browser

QUESTIONS = """
<script>
const refused = [];
document.addEventListener("securitypolicyviolation", (event) => refused.push(event.violatedDirective));
addEventListener("load", () => {
  const set = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("input")); };
  const seen = () => images.map((image) => getComputedStyle(image).visibility === "visible");
  const cuts = () => images.map((image) => getComputedStyle(image).clipPath);
  const wide = (part) => part.getBoundingClientRect().width;
  const answers = {refused, width: wide(stage), content: document.documentElement.scrollWidth};
  answers.blank = images.filter((image) => !image.naturalWidth).length;
  answers.first = seen();
  set("left", 4); set("right", 6); set("swipe", 250);
  answers.chosen = seen();
  answers.cut = cuts()[6];
  answers.line = line.offsetLeft;
  answers.about = abouts.map((about) => !about.hidden);
  set("swipe", 0);
  answers.uncut = cuts()[6];
  set("opacity", 40);
  answers.opacity = images[6].style.opacity;
  get("in").click(); get("in").click();
  answers.zoomed = wide(sheet) / wide(stage);
  get("fit").click();
  answers.fitted = wide(sheet) / wide(stage);
  stage.dispatchEvent(new WheelEvent("wheel", {deltaY: -1, clientX: 50, clientY: 150, cancelable: true}));
  answers.wheeled = wide(sheet) / wide(stage);
  parent.postMessage(answers, "*");
});
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.usefixtures("page")
def test_layers_in_a_browser(chromium: str, folder: Path, tmp_path: Path, width: int) -> None:
    found = ask(chromium, folder / "all.html", QUESTIONS, tmp_path, width)
    assert found["refused"] == []
    assert found["blank"] == 0
    assert found["content"] <= width
    assert [i for i, seen in enumerate(found["first"]) if seen] == [0, 6]  # the scene and the map
    assert [i for i, seen in enumerate(found["chosen"]) if seen] == [4, 6]
    assert [i for i, seen in enumerate(found["about"]) if seen] == [4, 6]
    cut = re.fullmatch(r"inset\(0px 0px 0px ([\d.]+)px\)", found["cut"])
    assert cut
    assert float(cut[1]) == pytest.approx(found["width"] / 4, abs=1)
    assert found["line"] == pytest.approx(found["width"] / 4, abs=2)
    assert found["uncut"] == "none"
    assert float(found["opacity"]) == 0.4
    assert found["zoomed"] == pytest.approx(2.25)
    assert found["fitted"] == 1
    assert found["wheeled"] == pytest.approx(1.25)
