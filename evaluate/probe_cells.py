"""The cells of a sweep: every set of inputs, with every amount of labels and every draw of them.

The probes of a cell learn from training tiles and are scored on val, one row for each strength. Nothing here
reads the test split.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from satdifuser.errors import RunError, SettingsError
from satdifuser.evaluate.axes import Axes
from satdifuser.evaluate.probes import Probes, fit_probes
from satdifuser.evaluate.samples import Input, Samples, gather_samples, score_samples
from satdifuser.evaluate.settings import InputKind, ProbeKind, ProbeSettings
from satdifuser.fuse.data import labelled
from satdifuser.store.device import choose_device
from satdifuser.store.encoding import Floats
from satdifuser.store.few_labels import (
    Budget,
    check_classes_differ,
    check_classes_known,
    class_presence,
    draw_labelled,
    parse_budgets,
)
from satdifuser.store.reader import FeatureStore, Indices

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What probes are fitted on."""

    labels: str  # how many, such as 1% or 5 shots
    draw: int
    inputs: InputKind
    timestep: int | None
    layer: str | None

    def __str__(self) -> str:
        """The cell in one line: ``100%, draw 0, single: t = 61, up_blocks.1.resnets.0.conv2``."""
        held = [f"t = {self.timestep}" if self.timestep is not None else "", self.layer or ""]
        return f"{self.labels}, draw {self.draw}, {self.inputs}: {', '.join(filter(None, held)) or 'all'}"


def list_cells(store: FeatureStore, settings: ProbeSettings) -> list[Cell]:
    """All cells, in the order of the table."""
    return [
        Cell(str(budget), draw, kind, timestep, layer)
        for budget, draw in budgets_and_draws(settings)
        for kind in settings.inputs
        for timestep, layer in _inputs_of(store, kind)
    ]


def budgets_and_draws(settings: ProbeSettings) -> list[tuple[Budget, int]]:
    """Every amount of labels with the numbers of its draws."""
    budgets = parse_budgets(settings.labels, settings.shots)
    return [(budget, draw) for budget in budgets for draw in range(settings.draws if budget.is_drawn else 1)]


def _inputs_of(store: FeatureStore, kind: InputKind) -> list[tuple[int | None, str | None]]:
    timesteps = store.attributes.timesteps
    layers = [layer.name for layer in store.attributes.layers]
    along_steps: list[int | None] = [*timesteps] if kind in ("single", "timestep") else [None]
    along_layers: list[str | None] = [*layers] if kind in ("single", "layer") else [None]
    return [(timestep, layer) for timestep in along_steps for layer in along_layers]


class SweepData:
    """What the probes of a sweep learn from and are chosen by; each part is read when first asked for.

    Args:
        store: A complete store with targets.
        settings: Partition, labels, pixels, seed.

    Raises:
        SettingsError: a class has too few tiles for the labels asked for, or there is no such partition.
        StoreError: shards or targets are missing, a split is empty, or there is nothing to tell apart.
        RunError: no tile of a split has a label.
    """

    def __init__(self, store: FeatureStore, settings: ProbeSettings) -> None:
        self.store, self.settings = store, settings
        self.partition = store.choose_partition(settings.partition)
        self.device = choose_device(settings.device, "probe.device")
        self.kinds = probe_kinds(store, settings)
        self.train_rows = labelled(store, "train", self.partition)
        self.val_rows = labelled(store, "val", self.partition)
        present = class_presence(store, self.train_rows)
        check_classes_differ(store, present)
        check_classes_known(store, present, class_presence(store, self.val_rows))
        self.drawn: dict[tuple[str, int], Indices] = {
            (str(budget), draw): draw_labelled(store, self.train_rows, budget, settings.seed, draw, present)
            for budget, draw in budgets_and_draws(settings)
        }

    @cached_property
    def train(self) -> Samples:
        """All that can be learned from."""
        return gather_samples(self.store, self.train_rows, self.settings.seed, self.settings.pixels)

    @cached_property
    def val(self) -> Samples:
        """What strengths and inputs are chosen by."""
        samples = gather_samples(self.store, self.val_rows, self.settings.seed, self.settings.pixels)
        if not len(samples.labels):
            raise RunError(f"{self.store.path}: all pixels of the masks of split 'val' are ignored")
        return samples

    def load(self) -> None:
        """Read the features, before several threads ask for them."""
        _ = self.train, self.val

    def inputs(self, cell: Cell) -> list[Input]:
        """The maps whose features a cell's probes see side by side."""
        layers = [layer.name for layer in self.store.attributes.layers]
        timesteps = self.store.attributes.timesteps
        return [
            (t, layer)
            for t in (timesteps if cell.timestep is None else [cell.timestep])
            for layer in (layers if cell.layer is None else [cell.layer])
        ]

    def places(self, cell: Cell) -> Indices:
        """Where a cell's training tiles or their pixels are in `train`."""
        return self.train.places(self.drawn[cell.labels, cell.draw])

    def strengths(self, kind: ProbeKind, samples: int) -> list[float]:
        """The strengths of a probe on so many samples, which cannot have more neighbours."""
        grid = {
            "logistic": self.settings.logistic,
            "ridge": self.settings.ridge,
            "neighbours": [float(count) for count in self.settings.neighbours],
        }[kind]
        return [count for count in grid if kind != "neighbours" or count <= samples] or [min(grid)]


def probe_kinds(store: FeatureStore, settings: ProbeSettings) -> Sequence[ProbeKind]:
    """The probes asked for.

    Raises:
        SettingsError: neighbours are asked for on masks.
    """
    masks = store.attributes.task == "segmentation"
    if settings.probes == "auto":
        return ["logistic", "ridge"] if masks else ["logistic", "ridge", "neighbours"]
    if masks and "neighbours" in settings.probes:
        raise SettingsError(
            "probe.probes: neighbours are sought among tiles, but this store holds masks; use logistic, ridge"
        )
    return settings.probes


def fit_cell(data: SweepData, cell: Cell) -> list[Row]:
    """Fit all probes of a cell, with all strengths, and score them on val: one row each."""
    places, inputs = data.places(cell), data.inputs(cell)
    features, held_out = data.train.joined(inputs, places), data.val.joined(inputs)
    began, axes = time.perf_counter(), None
    if set(data.kinds) != {"neighbours"}:
        axes = Axes(features, data.device)
    decomposing = time.perf_counter() - began
    rows: list[Row] = []
    for kind in data.kinds:
        began = time.perf_counter()
        strengths = data.strengths(kind, len(places))
        probes = _fit(data, kind, features, places, strengths, axes)
        scores = _scores(data, probes, held_out)
        seconds = time.perf_counter() - began + (0 if kind == "neighbours" else decomposing)
        rows += _rows(kind, strengths, scores, probes, seconds)
    return rows


def _fit(
    data: SweepData,
    kind: ProbeKind,
    features: Floats,
    places: Indices,
    strengths: Sequence[float],
    axes: Axes | None,
) -> Probes:
    labels, classes = data.train.labels[places], len(data.store.attributes.classes)
    return fit_probes(kind, features, labels, classes, strengths, axes, data.settings.tolerance)


def _scores(data: SweepData, probes: Probes, features: Floats) -> list[float]:
    task = str(data.store.attributes.task)
    return [score_samples(task, data.val.labels, found) for found in probes.probabilities(features)]


def _rows(
    kind: ProbeKind, strengths: Sequence[float], scores: Sequence[float], probes: Probes, seconds: float
) -> list[Row]:
    """One row for each strength; `seconds` are those of all together."""
    return [
        {
            "probe": kind,
            "strength": float(strength),
            "value": score,
            "seconds": round(seconds, 4),
            "gradient_norm": float(norm),
            "converged": bool(converged),
        }
        for strength, score, norm, converged in zip(
            strengths, scores, probes.gradient_norms, probes.converged, strict=True
        )
    ]


def fit_again(data: SweepData, cell: Cell, chosen: Sequence[tuple[ProbeKind, float]]) -> list[Probes]:
    """Fit some probes of a cell again, each with one strength."""
    places = data.places(cell)
    features = data.train.joined(data.inputs(cell), places)
    axes = None if {kind for kind, _ in chosen} == {"neighbours"} else Axes(features, data.device)
    return [_fit(data, kind, features, places, [strength], axes) for kind, strength in chosen]
