"""The report page, from made-up run folders."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from made_up import run_record
from numpy.typing import NDArray
from PIL import Image

from satdifuser.errors import ImageError, RunError
from satdifuser.evaluate.metrics import (
    classification_metrics,
    confusion_matrix,
    multilabel_metrics,
    segmentation_metrics,
)
from satdifuser.evaluate.pictures import (
    colour_distance,
    colour_mask,
    heat_map_svg,
    line_chart_svg,
    palette,
    png_data_uri,
    ticks,
)
from satdifuser.evaluate.report import ReportStore, write_report
from satdifuser.evaluate.results import format_table, results_table
from satdifuser.fuse.train import MAIN_METRIC

CLASSES = ["forest", "river & lake", "<b>city</b>", "bare soil"]
LAYERS = [f"up_blocks.{i}.{part}" for i in (1, 2) for part in ("attentions.0.attn1", "resnets.0.conv2")]
TILES = 40


def fake_run(folder: Path, **changes: Any) -> Path:
    """Write a run folder as `fit` and `evaluate` do; `skill` is how often it is right on `split`."""
    skill, seed, split = changes.pop("skill", 0.8), changes.get("seed", 0), changes.pop("split", "test")
    info = run_record(
        name=folder.name,
        classes=CLASSES,
        timesteps=[21, 61, 161],
        layers=[{"name": name, "channels": 64, "stride": 8} for name in LAYERS],
        history=[
            {"epoch": e, "train_loss": 2 / e, "val": dict.fromkeys(MAIN_METRIC.values(), skill - 0.3 / e)}
            for e in range(1, 9)
        ],
    )
    info |= changes
    predict = {
        "classification": fake_classification,
        "multilabel": fake_multilabel,
        "segmentation": fake_segmentation,
    }[info["task"]]
    folder.mkdir(parents=True)
    table, reported = predict(folder, np.random.default_rng(seed), skill)
    table.assign(split=split).to_parquet(folder / "predictions.parquet")
    interval = {name: [value - 0.05, value + 0.05] for name, value in reported.items()}
    metrics = {"evaluate": {"split": split, "bootstrap": 1000, "level": 0.95}}
    metrics |= {"val": dict.fromkeys(reported, skill), split: {**reported, "interval": interval}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def fake_classification(
    folder: Path, generator: np.random.Generator, skill: float
) -> tuple[pd.DataFrame, dict[str, float]]:
    target = generator.integers(0, 4, TILES)
    known = (generator.random(TILES) < skill)[:, None] & (target[:, None] == np.arange(4))
    raw = generator.random((TILES, 4)) + 2 * known
    probabilities = (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
    table = pd.DataFrame({"tile_id": [f"tile_{i:03}" for i in range(TILES)], "target": target})
    table["predicted"] = probabilities.argmax(axis=1)
    table["probabilities"] = list(probabilities)
    return table, classification_metrics(target, probabilities)


def fake_multilabel(
    folder: Path, generator: np.random.Generator, skill: float
) -> tuple[pd.DataFrame, dict[str, float]]:
    target = generator.integers(0, 2, (TILES, 4))
    target[0] = 0
    probabilities = np.where(generator.random((TILES, 4)) < skill, target, 1 - target).astype(np.float32)
    table = pd.DataFrame({"tile_id": [f"tile_{i:03}" for i in range(TILES)], "target": list(target)})
    table["predicted"], table["probabilities"] = list(probabilities.astype(np.int64)), list(probabilities)
    return table, multilabel_metrics(target, probabilities)


def fake_segmentation(
    folder: Path, generator: np.random.Generator, skill: float
) -> tuple[pd.DataFrame, dict[str, float]]:
    coarse = generator.integers(0, 4, (TILES, 4, 4)).astype(np.uint8)
    target = coarse.repeat(8, axis=1).repeat(8, axis=2)
    noise = generator.integers(0, 4, target.shape).astype(np.uint8)
    blur = generator.random(target.shape) < np.linspace(0.1, 1.5 - skill, TILES)[:, None, None]
    predicted = np.where(blur, noise, target)
    target[:, :4, :4] = 255
    confusions = [confusion_matrix(t, p, 4, 255) for t, p in zip(target, predicted, strict=True)]
    names = [f"tile_{i:03}" for i in range(TILES)]
    np.savez(folder / "masks.npz", tile_id=np.array(names[::4]), target=target[::4], predicted=predicted[::4])
    table = pd.DataFrame({"tile_id": names, "confusion": [c.ravel() for c in confusions]})
    table["miou"] = [segmentation_metrics(c)["miou"] for c in confusions]
    return table, segmentation_metrics(np.sum(confusions, axis=0))


def fake_weights() -> dict[str, Any]:
    values = np.random.default_rng(0).dirichlet(np.ones(12)).reshape(3, 4)
    return {"timesteps": [21, 61, 161], "layers": LAYERS, "values": values.tolist()}


def fake_preview(tile_id: str) -> NDArray[np.uint8] | None:
    """Random pictures; one tile has none."""
    number = int(tile_id[-3:])
    if number == 5:
        return None
    coarse = np.random.default_rng(number).integers(40, 200, (8, 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC))


def fake_store() -> ReportStore:
    facts = {"tiles": "120 (train 60, val 20, test 40)", "backbone": "embedded <script>alert(1)</script>"}
    return ReportStore(
        facts | {"noising": "forward", "layers": "4", "timesteps": "21, 61, 161"}, fake_preview
    )


@pytest.fixture
def classification_runs(tmp_path: Path) -> list[Path]:
    return [
        fake_run(tmp_path / "global_0", skill=0.8, seed=0, weights=fake_weights()),
        fake_run(tmp_path / "global_1", skill=0.9, seed=1, weights=fake_weights()),
        fake_run(tmp_path / "moe_0", skill=0.7, fusion="moe", parameters=999),
        fake_run(tmp_path / "colour", skill=0.75, kind="baseline", history=[], fusion=None, head=None),
    ]


@pytest.fixture
def segmentation_runs(tmp_path: Path) -> list[Path]:
    shared: dict[str, Any] = {"task": "segmentation", "head": "upernet"}
    return [
        fake_run(tmp_path / "localized_0", skill=0.8, fusion="localized", **shared),
        fake_run(tmp_path / "single", skill=0.6, kind="baseline", history=[], fusion=None, **shared),
    ]


class Page(HTMLParser):
    """What the tests ask of a page: tags with attributes, and visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_classification_page(classification_runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    assert write_report(classification_runs, out, "Land & water", fake_store(), "satdifuser run") == out
    page = Page(out)
    assert "Land & water" in page.words
    assert re.search(r"Chosen: global \+ linear, test accuracy 0\.\d+ ± 0\.\d+ \(95% interval 0", page.words)
    assert "Best on val among the baselines: colour (baseline), test accuracy 0." in page.words
    assert "The chosen run: global_1" in page.words
    assert "Of its 2 seeds" in page.words
    assert "The test split had no part in the choice." in page.words
    assert "noise levels (timesteps 21, 61, 161" in page.words
    for cells in format_table(results_table(classification_runs)).splitlines()[2:-1]:
        for cell in re.split(r" {2,}", cells):
            assert cell in page.words
    assert len(page.all("svg")) == 4  # confusion, weights, two curves
    assert "The most confident mistakes" in page.words
    assert "satdifuser run" in page.words


def test_segmentation_page_shows_the_worst_tiles_first(segmentation_runs: list[Path], tmp_path: Path) -> None:
    page = Page(write_report(segmentation_runs, tmp_path / "r.html", "Masks", fake_store()))
    shown = [float(value) for value in re.findall(r"mIoU (0\.\d+)", page.words)]
    quality = pd.read_parquet(segmentation_runs[0] / "predictions.parquet")["miou"]
    assert shown[:3] == pytest.approx(sorted(quality[::4])[:3], abs=5e-4)
    assert len(shown) == 6
    assert len(page.all("img")) == 18
    assert "not labelled" in page.words
    assert "The command that made it" not in page.words


def test_multilabel_page_tables_each_class_and_names_classes(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "moe_0", task="multilabel", fusion="moe")
    page = Page(write_report([run], tmp_path / "r.html", "Labels", fake_store()))
    assert len(page.all("svg")) == 2  # two curves: no confusion matrix
    assert "Confusion matrix" not in page.words
    assert "say which classes each tile holds" in page.words
    assert "f1_micro: over all tiles and classes together" in page.words
    assert "Support is the number of test tiles of the class." in page.words
    assert re.search(r"class\s*support\s*precision\s*recall\s*f1\s*forest\s*\d+\s*0\.\d+", page.words)
    mistakes, right = page.words.split("Some with every class right")
    cards = re.findall(r"truth: (.+)\s+predicted: (.+)\s+(tile_\d+)", mistakes)
    table = pd.read_parquet(run / "predictions.parquet").set_index("tile_id")
    wrong = [(table["target"][name] != table["predicted"][name]).sum() for _, _, name in cards]
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[-1] > 0
    names = np.array(CLASSES)
    for truth, guess, name in cards:
        assert truth == (", ".join(names[table["target"][name] == 1]) or "none")
        assert guess == (", ".join(names[table["predicted"][name] == 1]) or "none")
    pairs = re.findall(r"truth: (.+)\s+predicted: (.+)", right)
    assert pairs
    assert all(truth == guess for truth, guess in pairs)


def test_mistakes_come_first_and_most_confident_first(
    classification_runs: list[Path], tmp_path: Path
) -> None:
    page = Page(write_report(classification_runs[2:3], tmp_path / "r.html", "t", fake_store()))
    mistakes, right = page.words.split("Some right answers")
    confidence = [int(value) for value in re.findall(r"\((\d+)%\)", mistakes)]
    assert confidence == sorted(confidence, reverse=True)
    assert len(confidence) >= 2
    truths = re.findall(r"truth: (.+)", right)
    assert truths == re.findall(r"predicted: (.+) \(", right)
    assert set(truths[:4]) == set(CLASSES)
    assert "tile_005" not in page.words


def test_page_without_a_store_has_no_tile_images(
    classification_runs: list[Path], segmentation_runs: list[Path], tmp_path: Path
) -> None:
    page = Page(write_report(classification_runs, tmp_path / "c.html", "t"))
    assert page.all("img") == []
    page = Page(write_report(segmentation_runs, tmp_path / "s.html", "t"))
    assert len(page.all("img")) == 12  # truth and prediction only
    (segmentation_runs[0] / "masks.npz").unlink()
    page = Page(write_report(segmentation_runs, tmp_path / "s.html", "t"))
    assert "Tiles of the test split" not in page.words


def test_page_of_another_split_than_test(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / name, split="train", fusion=name) for name in ("global", "moe")]
    page = Page(write_report(runs, tmp_path / "r.html", "t", fake_store()))
    assert re.search(r"Chosen: global, train accuracy 0\.\d+ \(95% interval", page.words)
    assert "Tiles of the train split" in page.words
    assert "Confusion matrix on train, in percent" in page.words
    assert not re.search(r"test (accuracy|tiles|figure)|on test", page.words)


def test_page_is_self_contained_and_escaped(classification_runs: list[Path], tmp_path: Path) -> None:
    page = Page(write_report(classification_runs, tmp_path / "r.html", "<i>t</i>", fake_store(), "a < b"))
    references = [a.get("src") or a.get("href") for _, a in page.tags if a.get("src") or a.get("href")]
    assert references
    assert all(reference and reference.startswith("data:image/png;base64,") for reference in references)
    assert page.all("b") == page.all("i") == []
    assert len(page.all("script")) == 1
    assert "<b>city</b>" in page.words  # as text
    assert all(image["alt"] for image in page.all("img"))
    assert all(chart["aria-label"] for chart in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_page_warns_of_different_labels(tmp_path: Path) -> None:
    hashes = {"feature": "f1", "contents": "c1", "labels": "other"}
    runs = [fake_run(tmp_path / "a"), fake_run(tmp_path / "b", store={"path": "", "hashes": hashes})]
    page = Page(write_report(runs, tmp_path / "r.html", "t"))
    assert "fitted on 2 different sets of labels or splits" in page.words


def test_broken_runs_are_named(
    classification_runs: list[Path], segmentation_runs: list[Path], tmp_path: Path
) -> None:
    run, out = classification_runs[0], tmp_path / "r.html"
    with pytest.raises(RunError, match=r"runs of one task, got: .*global_0 \(class.*, .*localized_0 \(seg"):
        write_report([run, segmentation_runs[0]], out, "t")
    table = pd.read_parquet(run / "predictions.parquet").drop(columns="predicted")
    table.to_parquet(run / "predictions.parquet")
    with pytest.raises(
        RunError, match=r"global_0/predictions.parquet has no predicted; measure the run again"
    ):
        write_report([run], out, "t")
    (run / "predictions.parquet").unlink()
    with pytest.raises(RunError, match=r"global_0/predictions.parquet is missing; measure the run again"):
        write_report([run], out, "t")
    assert not out.exists()


def test_palette_is_distinct_also_for_a_deuteranope() -> None:
    colours = palette(16).astype(int)
    apart = colour_distance(colours, colours) + 1000 * np.eye(16)
    assert apart.min() > 55
    assert (palette(5) == palette(16)[:5]).all()
    assert palette(0).shape == (0, 3)


def test_png_keeps_every_pixel(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    kind, data = png_data_uri(rgb, scale=2).split(",")
    assert kind == "data:image/png;base64"
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert (decoded == rgb.repeat(2, axis=0).repeat(2, axis=1)).all()


def test_colour_mask_by_hand() -> None:
    painted = colour_mask(np.array([[0, 1, 255]], np.uint8), palette(2), ignore_value=255)
    assert painted.tolist() == [[*palette(2).tolist(), [128, 128, 128]]]


def test_picture_errors() -> None:
    with pytest.raises(ImageError, match=r"must be \(H, W, 3\) uint8, got \(4, 4\) float64"):
        png_data_uri(np.zeros((4, 4)))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="the mask holds the class 3, but there are 2 classes"):
        colour_mask(np.array([[0, 3]]), palette(2))


def test_charts_are_well_formed_and_escaped() -> None:
    points = [(1.0, 0.5), (2.0, math.nan), (3.0, 0.25)]
    chart = ElementTree.fromstring(line_chart_svg([("a <&> b", points)], 'loss "x"', "epoch", "loss"))
    circles = chart.findall("{*}circle")
    assert [circle.findtext("{*}title") for circle in circles] == ["a <&> b: 0.5 at 1", "a <&> b: 0.25 at 3"]
    assert chart.attrib["aria-label"] == 'loss "x"'
    shades = np.array([[0.0, 2.0], [1.0, np.nan]])
    heat = ElementTree.fromstring(
        heat_map_svg(shades, ["<r>", "s"], ["t", "u"], "h", [["1", "2"], ["3", "–"]])
    )
    fills = [rect.attrib["fill"] for rect in heat.iter("{http://www.w3.org/2000/svg}rect")]
    assert fills == ["rgb(235,243,251)", "rgb(8,48,107)", "rgb(121,145,179)", "rgb(235,243,251)"]
    assert heat.findtext(".//{*}title") == "<r> → t: 1"
    ElementTree.fromstring(line_chart_svg([("empty", [])], "t", "x", "y"))


@pytest.mark.parametrize(
    ("values", "whole", "expected"),
    [
        ([1, 8], True, [0, 2, 4, 6, 8]),
        ([1, 2], True, [1, 2]),
        ([3], True, [3, 4]),
        ([0.31, 0.62], False, [0.3, 0.4, 0.5, 0.6, 0.7]),
        ([], False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_values(values: list[float], whole: bool, expected: list[float]) -> None:
    assert ticks(values, whole) == pytest.approx(expected)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_page_in_a_browser(classification_runs: list[Path], tmp_path: Path, width: int) -> None:
    """The page renders, and the console stays clean."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium is installed: the page cannot be looked at")
    page, shot = tmp_path / "r.html", tmp_path / "r.png"
    write_report(classification_runs, page, "Land cover", fake_store(), "satdifuser run")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [
        f"--screenshot={shot}",
        f"--window-size={width},3000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert len(np.unique(np.asarray(Image.open(shot).convert("L")))) > 50
