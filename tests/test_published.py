"""Published figures beside ours: which are chosen, what is said of the setting, and what evaluate prints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from made_up import run_record, store_attributes

from satdifuser.cli import cli
from satdifuser.evaluate.evaluation import new_outcome
from satdifuser.evaluate.published import (
    METRICS,
    PROTOCOL,
    TABLES,
    TASKS,
    choose_figures,
    format_published,
    published_beside,
)
from satdifuser.evaluate.report.runs import score_cells
from satdifuser.extract.geobench_datasets import SCALES
from satdifuser.extract.noising import PRESETS
from satdifuser.fuse.fit import fit
from satdifuser.fuse.run_folder import Run, open_run
from satdifuser.fuse.settings import FitSettings
from satdifuser.pipeline import load_pipeline
from satdifuser.store.encoding import encode
from satdifuser.store.opening import open_or_create
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import Attributes, LayerInfo
from satdifuser.store.writer import TileRow

THEIRS = {
    "source": {"kind": "geobench", "dataset": "m-cashew-plant", "partition": "default"},
    "backbone": {"metadata": False},
    "extract": {
        "timesteps": [21, 61, 161],
        "noising": "inversion",
        "steps": 50,
        "latent": "sample",
        "prediction": "epsilon",
        "guidance": False,
        "image_size": [256, 256],
    },
}
FIT = {"epochs": 40, "lr": 0.01, "normalise": False}


@dataclass
class FakeStore:
    attributes: Attributes


def fake_store(settings: dict[str, Any] = THEIRS, **fields: Any) -> Any:
    common = {
        "task": "segmentation",
        "classes": ["a", "b"],
        "tiles": 1,
        "tile_size": (16, 16),
        "tiles_per_shard": 1,
        "timesteps": [21],
        "layers": [LayerInfo(name="up.attn1", channels=1280, stride=4, height=4, width=4)],
        "encoding": "float32",
        "previews": False,
        "colour_statistics": ["mean"],
        "backbone": {"model": "PRETRAINED/resolution256"},
    }
    return FakeStore(store_attributes(settings=settings, **(common | fields)))


def fake_run(**fields: Any) -> Run:
    fields = {"fusion": "moe", "fit": FIT, "resolved": {"projection": 384}} | fields
    return Run(Path("run"), run_record(**fields))


def beside(run: Run | None = None, store: Any = None, **reported: Any) -> Any:
    found = published_beside(run or fake_run(), store or fake_store(), "test", 9, {"miou": 0.5} | reported)
    return found.get("published")


def test_the_same_fusion_and_the_best_other_of_each_table() -> None:
    published = beside(fake_run(fusion="global"))
    assert (published["dataset"], published["metric"], published["ours"]) == ("m-cashew-plant", "miou", 0.5)
    figures = [(figure["model"], figure["value"]) for figure in published["figures"]]
    assert figures == [("SatDiFuser global", 0.665), ("CROMA", 0.622), ("concatenation", 0.591)]
    assert all("arXiv 2503.07890" in figure["source"] for figure in published["figures"])
    assert published["differs"] == []
    assert "ours_by_their_formula" not in published


def test_a_fusion_without_a_figure_stands_beside_moe() -> None:
    models = [figure.model for figure in choose_figures("m-nz-cattle", "localized")]
    assert models == ["SatDiFuser moe", "CROMA"]


def test_a_data_set_that_only_others_measured() -> None:
    (figure,) = choose_figures("m-bigearthnet", "moe")
    assert (figure.model, figure.value) == ("DINOv3-sat ViT-L, linear probe", 0.741)
    assert "which mean over the classes" in figure.doubt


def test_doubts_stay_with_their_figures() -> None:
    doubtful = {(f.model, name) for name in TASKS for t in TABLES for f in t.figures(name) if f.doubt}
    assert doubtful == {
        ("DOFA", "m-chesapeake"),
        ("SatDiFuser moe", "m-NeonTree"),
        ("SatDiFuser moe", "m-chesapeake"),
        ("DINOv3-sat ViT-L, linear probe", "m-bigearthnet"),
    }


@pytest.mark.parametrize(
    ("run", "store"),
    [
        (fake_run(), fake_store({"source": {"kind": "folder", "root": "m-cashew-plant"}})),
        (fake_run(), fake_store({"source": {"kind": "geobench", "dataset": "m-mine"}})),
        (fake_run(), fake_store(task="classification")),
        (fake_run(kind="baseline", fusion="concatenation"), fake_store()),
    ],
    ids=["another source", "another data set", "another task", "a baseline"],
)
def test_nothing_is_published_of(run: Run, store: Any) -> None:
    assert published_beside(run, store, "test", 9, {"miou": 0.5, "accuracy": 0.5}) == {}


def test_the_released_formula_is_compared_too() -> None:
    published = beside(reference={"mIoU": 0.4, "faults": {}})
    assert published["ours_by_their_formula"] == 0.4
    assert "    0.400  this run, by the released code's formula" in format_published(published)


def test_another_setting_is_named() -> None:
    settings = THEIRS | {"extract": THEIRS["extract"] | {"noising": "forward", "steps": 10}}
    store = fake_store(settings, backbone={"model": "embedded"})
    run = fake_run(fit=FIT | {"epochs": 8}, resolved={"projection": 96}, partition="0.01x_train")
    found = published_beside(run, store, "val", 9, {"miou": 0.5})["published"]["differs"]
    assert found == [
        "split val (theirs: test)",
        "backbone embedded (theirs: DiffusionSat)",
        "source.partition 0.01x_train (theirs: default or 1.00x_train)",
        "extract.noising forward (theirs: inversion)",
        "extract.steps 10 (theirs: 50)",
        "fit.projection 96 (theirs: 384)",
        "fit.epochs 8 (theirs: 40)",
    ]


def test_a_narrow_backbone_is_not_diffusionsat_by_its_name() -> None:
    layers = [LayerInfo(name="up.attn1", channels=16, stride=4, height=4, width=4)]
    assert beside(store=fake_store(layers=layers))["differs"] == [
        "backbone PRETRAINED/resolution256 (theirs: DiffusionSat)"
    ]


def test_every_data_set_has_figures_a_task_and_a_preset_of_the_protocol() -> None:
    assert TASKS.keys() == SCALES.keys()
    assert set(TASKS.values()) == METRICS.keys()
    for name in TASKS:
        assert choose_figures(name, "moe")
        pipeline = load_pipeline(Path(f"geobench/{name}"))
        for key, admitted in PROTOCOL.items():
            section, setting = key.split(".")
            value = getattr(getattr(pipeline, section), setting)
            if setting == "timesteps":
                value = PRESETS[value]
            assert ([value, value] if setting == "image_size" else value) in admitted, (name, key)


def test_the_documentation_shows_every_figure() -> None:
    text = (Path(__file__).parents[1] / "docs/fidelity.md").read_text()
    for table in TABLES:
        assert f"| | {' | '.join(table.datasets)} |" in text
        for model, row in table.rows.items():
            marks = ["?" if (model, name) in table.doubts else "" for name in table.datasets]
            cells = [f"{value:.1f}{mark}" for value, mark in zip(row, marks, strict=True)]
            assert f"| {model} | {' | '.join(cells)} |" in text


@pytest.fixture
def eurosat_run(tmp_path: Path) -> Path:
    """A run on a made-up store that says it was extracted from m-eurosat with the embedded backbone."""
    splits = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    layer = LayerInfo(name="up.attn1", channels=4, stride=4, height=4, width=4)
    settings = THEIRS | {"source": THEIRS["source"] | {"dataset": "m-eurosat"}}
    attributes = fake_store(
        settings,
        task="classification",
        tiles=len(splits),
        tiles_per_shard=len(splits),
        layers=[layer],
        backbone={"model": "embedded"},
    ).attributes
    random = np.random.default_rng(0)
    maps = random.normal(size=(len(splits), 1, 1, 4, 4, 4)).astype(np.float32)
    rows = [
        TileRow(f"t{i:02}", split, colour=np.zeros(1, np.float32), target=np.asarray(i % 2, np.int32))
        for i, split in enumerate(splits)
    ]
    writer = open_or_create(tmp_path / "s.zarr", attributes, overwrite=False)
    writer.write_shard(0, rows, [{"stride_04": encode(maps, "float32")}], {})
    quick = FitSettings(projection=8, norm_groups=1, epochs=1, warmup_epochs=0, device="cpu")
    return fit(FeatureStore(tmp_path / "s.zarr"), quick, "global", 0, tmp_path / "run", new_outcome).path


def evaluate(run: Path, *words: str) -> str:
    words = ("evaluate", str(run), "--set", "evaluate.bootstrap=5", *words)
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_evaluate_prints_published_figures_and_released_formulas(eurosat_run: Path) -> None:
    plain = json.loads(evaluate(eurosat_run, "--json"))
    assert "reference" not in plain["test"]
    assert "ours_by_their_formula" not in plain["published"]
    asked = ("--set", "evaluate.metrics=reference")
    metrics = json.loads(evaluate(eurosat_run, "--json", *asked))
    assert metrics == json.loads((eurosat_run / "metrics.json").read_text())
    reference, published = metrics["test"]["reference"], metrics["published"]
    assert list(reference) == ["Accuracy", "Precision", "Recall", "F1", "faults"]
    assert reference["Accuracy"] == published["ours_by_their_formula"] == published["ours"]
    assert "not macro F1" in reference["faults"]["F1"]
    printed = evaluate(eurosat_run, *asked).splitlines()
    accuracy = metrics["test"]["accuracy"]
    assert f"  test  reference Accuracy   {accuracy:.3f}" in printed
    assert printed[printed.index("  published for m-eurosat, accuracy") :] == [
        "  published for m-eurosat, accuracy",
        f"    {accuracy:.3f}  this run, on 3 test tiles",
        f"    {accuracy:.3f}  this run, by the released code's formula",
        "    0.977  SatDiFuser global (Jia et al., ICCV 2025, arXiv 2503.07890, comparison of fusions)",
        "    0.945  concatenation (Jia et al., ICCV 2025, arXiv 2503.07890, comparison of fusions)",
        "    0.969  DINOv3-sat ViT-L, linear probe (torchgeo-bench, linear probes on RGB)",
        "    this run is not in the paper's setting:",
        "      backbone embedded (theirs: DiffusionSat)",
        "      fit.projection 8 (theirs: 384)",
        "      fit.epochs 1 (theirs: 40)",
        "      fit.lr 0.004 (theirs: 0.01)",
        "      fit.normalise True (theirs: False)",
    ]


@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_the_report_shows_our_metrics_alone(eurosat_run: Path) -> None:
    evaluate(eurosat_run, "--set", "evaluate.metrics=reference")
    run = open_run(eurosat_run)
    assert [row["metric"] for row in score_cells(run)] == list(run.metrics["val"])
