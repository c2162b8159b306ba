"""Published figures on GEO-Bench's data sets, and what a run of ours shows beside them.

The figures were copied from notes on the sources that are named, and not yet compared with these; where the
notes contradict each other, the figure carries a doubt. docs/fidelity.md says more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from satdifuser.fuse.network import WIDE_LAYER
from satdifuser.fuse.run_folder import Run
from satdifuser.store.reader import FeatureStore

METRICS = {"classification": "accuracy", "multilabel": "average_precision", "segmentation": "miou"}
"""The metric whose figures are published, by task …"""
REFERENCE_METRICS = {"accuracy": "Accuracy", "miou": "mIoU"}
"""… and its name in the released code, where that has it."""

TASKS = {
    "m-eurosat": "classification",
    "m-so2sat": "classification",
    "m-brick-kiln": "classification",
    "m-forestnet": "classification",
    "m-pv4ger": "classification",
    "m-bigearthnet": "multilabel",
    "m-pv4ger-seg": "segmentation",
    "m-nz-cattle": "segmentation",
    "m-NeonTree": "segmentation",
    "m-cashew-plant": "segmentation",
    "m-SA-crop-type": "segmentation",
    "m-chesapeake": "segmentation",
}


@dataclass(frozen=True)
class Figure:
    """One published value, a share of 1, and why it may be wrong."""

    model: str
    value: float
    source: str
    doubt: str = ""


@dataclass(frozen=True)
class Table:
    """A published table: percentages by model, in the order of the data sets."""

    source: str
    datasets: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]
    doubts: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def figures(self, dataset: str) -> list[Figure]:
        """What each model reached on a data set."""
        if dataset not in self.datasets:
            return []
        column = self.datasets.index(dataset)
        return [
            Figure(model, round(row[column] / 100, 4), self.source, self.doubts.get((model, dataset), ""))
            for model, row in self.rows.items()
        ]


JIA = "Jia et al., ICCV 2025, arXiv 2503.07890"
CONFLICT = "our sources contradict each other"
AVERAGING = "which mean over the classes it is, our source does not tell"

TABLES = (
    Table(
        source=f"{JIA}, comparison with foundation models",
        datasets=(
            "m-pv4ger-seg", "m-nz-cattle", "m-NeonTree", "m-cashew-plant", "m-SA-crop-type", "m-chesapeake"
        ),
        rows={
            "Satlas": (92.3, 83.1, 52.0, 49.1, 31.6, 52.2),
            "CROMA": (92.5, 83.4, 56.3, 62.2, 32.3, 63.6),
            "DOFA": (94.8, 82.8, 58.1, 53.9, 26.6, 65.7),
            "SatDiFuser moe": (95.3, 83.7, 63.4, 66.1, 31.9, 71.6),
        },
        doubts={
            ("DOFA", "m-chesapeake"): CONFLICT,
            ("SatDiFuser moe", "m-NeonTree"): CONFLICT,
            ("SatDiFuser moe", "m-chesapeake"): CONFLICT,
        },
    ),
    Table(
        source=f"{JIA}, comparison of fusions",
        datasets=("m-so2sat", "m-eurosat", "m-cashew-plant", "m-pv4ger-seg"),
        rows={
            "t = 1, self-attention alone": (53.6, 94.3, 55.3, 92.5),
            "t = 100, ResNet alone": (50.5, 92.4, 57.9, 92.6),
            "concatenation": (55.4, 94.5, 59.1, 92.9),
            "SatDiFuser global": (59.3, 97.7, 66.5, 95.1),
            "SatDiFuser localized": (58.9, 96.8, 64.8, 95.0),
            "SatDiFuser moe": (58.8, 97.3, 66.1, 95.3),
        },
    ),
    Table(
        source="torchgeo-bench, linear probes on RGB",
        datasets=("m-eurosat", "m-so2sat", "m-forestnet", "m-brick-kiln", "m-pv4ger", "m-bigearthnet"),
        rows={"DINOv3-sat ViT-L, linear probe": (96.9, 65.0, 58.2, 97.5, 95.3, 74.1)},
        doubts={("DINOv3-sat ViT-L, linear probe", "m-bigearthnet"): AVERAGING},
    ),
)  # fmt: skip

PROTOCOL: dict[str, tuple[Any, ...]] = {
    "source.partition": ("default", "1.00x_train"),
    "backbone.metadata": (False,),
    "extract.timesteps": ([21, 61, 161], [1, 101, 201]),
    "extract.noising": ("inversion",),
    "extract.steps": (50,),
    "extract.latent": ("sample",),
    "extract.prediction": ("epsilon",),
    "extract.guidance": (False,),
    "extract.image_size": ([256, 256], [512, 512]),
    "fit.projection": (384,),
    "fit.epochs": (40,),
    "fit.lr": (0.01,),
    "fit.normalise": (False,),
}
"""The paper's protocol by our settings: what each may be."""


def published_beside(
    run: Run, store: FeatureStore, split: str, tiles: int, reported: Mapping[str, Any]
) -> dict[str, Any]:
    """What is published where a fusion was measured on a data set of GEO-Bench.

    Args:
        run: The run.
        store: The store that it was measured on.
        split: The split that was measured.
        tiles: How many tiles it has.
        reported: Its metrics on that split.

    Returns:
        Nothing, or `published`: dataset, metric, split, tiles, ours (and by the released code's formula,
        where that was asked for), figures, and in which settings the run differs from the paper's protocol.
    """
    source = store.attributes.settings.get("source", {})
    dataset = source.get("dataset", "")
    known = source.get("kind") == "geobench" and TASKS.get(dataset) == store.attributes.task
    if not known or run.info["kind"] != "fusion":
        return {}
    metric = METRICS[TASKS[dataset]]
    found: dict[str, Any] = {"dataset": dataset, "metric": metric, "split": split, "tiles": tiles}
    found["ours"] = reported[metric]
    theirs = reported.get("reference", {}).get(REFERENCE_METRICS.get(metric))
    if theirs is not None:
        found["ours_by_their_formula"] = theirs
    figures = [asdict(figure) for figure in choose_figures(dataset, run.info["fusion"])]
    return {"published": found | {"figures": figures, "differs": differences(run, store, split)}}


def choose_figures(dataset: str, fusion: str) -> list[Figure]:
    """The figure of the same fusion (else of moe), and the best other model of each table."""
    tables = [table.figures(dataset) for table in TABLES]
    by_model = {figure.model: figure for figures in tables for figure in figures}
    own = by_model.get(f"SatDiFuser {fusion}", by_model.get("SatDiFuser moe"))
    others = [[f for f in figures if not f.model.startswith("SatDiFuser")] for figures in tables]
    best = [max(figures, key=lambda figure: figure.value) for figures in others if figures]
    return [own, *best] if own else best


def differences(run: Run, store: FeatureStore, split: str) -> list[str]:
    """In which respects a run is not as the paper's protocol asks, in words."""
    attributes = store.attributes
    fit = run.info["fit"] | {"projection": run.info["resolved"]["projection"]}
    source = attributes.settings.get("source", {}) | {"partition": run.partition}
    sections = attributes.settings | {"source": source, "fit": fit}
    found = [] if split == "test" else [f"split {split} (theirs: test)"]
    if not may_be_diffusionsat(store):
        found.append(f"backbone {attributes.backbone['model']} (theirs: DiffusionSat)")
    for key, admitted in PROTOCOL.items():
        section, name = key.split(".")
        value = sections.get(section, {}).get(name)
        if value not in admitted:
            found.append(f"{key} {value} (theirs: {' or '.join(map(str, admitted))})")
    return found


def may_be_diffusionsat(store: FeatureStore) -> bool:
    """Whether a backbone has the name and width of DiffusionSat's; its weights are not compared."""
    wide = max(layer.channels for layer in store.attributes.layers) >= WIDE_LAYER
    return wide and re.search(r"resolution(256|512)", str(store.attributes.backbone["model"])) is not None


def format_published(published: Mapping[str, Any]) -> str:
    """Published figures for reading: ours, one line per figure, doubts, and how the settings differ."""
    lines = [f"  published for {published['dataset']}, {published['metric']}"]
    lines.append(f"    {published['ours']:.3f}  this run, on {published['tiles']} {published['split']} tiles")
    if "ours_by_their_formula" in published:
        lines.append(
            f"    {published['ours_by_their_formula']:.3f}  this run, by the released code's formula"
        )
    for figure in published["figures"]:
        doubt = f"; doubtful: {figure['doubt']}" if figure["doubt"] else ""
        lines.append(f"    {figure['value']:.3f}  {figure['model']} ({figure['source']}{doubt})")
    if published["differs"]:
        lines.append("    this run is not in the paper's setting:")
        lines += [f"      {difference}" for difference in published["differs"]]
    return "\n".join(lines)
