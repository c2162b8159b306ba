"""A chapter of the page: all that is told of the runs and probes of one data set.

Runs and probes belong together that saw the same labels and splits, whatever features they learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from satdifuser.errors import SatDiFuserError
from satdifuser.evaluate.report import comparisons, features, fusions, probes, runs, stores, tiles
from satdifuser.evaluate.report.figure import Figure, Missing, Section, Table
from satdifuser.evaluate.report.probes import Probe
from satdifuser.evaluate.results import (
    best_on_val,
    check_comparable,
    choose,
    group_seeds,
    reported_split,
    tabulate,
)
from satdifuser.fuse.run_folder import Run
from satdifuser.store.reader import FeatureStore

Figures = list[Figure | Missing]


@dataclass(frozen=True)
class Chapter:
    """What the page says about one data set.

    Args:
        title: Name of the data set.
        answer: The outcome in a sentence or two; empty where nothing was fitted.
        sections: Figures under their headings.
        facts: What the features were made of: name and value of each fact, or why they cannot be told.
    """

    title: str
    answer: str
    sections: list[Section]
    facts: dict[str, str]


@dataclass(frozen=True)
class Request:
    """What the page was asked for.

    Args:
        stores: Opens the stores of runs and probes.
        layers: Names or patterns of the layers to paint; none for one of each stride.
        command: The command line that makes the page.
    """

    stores: stores.Stores
    layers: Sequence[str]
    command: str


def make_chapters(fitted: Sequence[Run], swept: Sequence[Probe], request: Request) -> list[Chapter]:
    """One chapter for each set of labels.

    Raises:
        RunError: a run or probe lacks what is shown of it.
        SettingsError: a pattern matches no layer.
    """
    by_labels: dict[str, tuple[list[Run], list[Probe]]] = {}
    for run in fitted:
        by_labels.setdefault(labels_of(run), ([], []))[0].append(run)
    for probe in swept:
        by_labels.setdefault(labels_of(probe), ([], []))[1].append(probe)
    plain = [title_of(members[0] or members[1]) for members in by_labels.values()]
    titles = [  # the same store may have been labelled anew in between
        f"{title}, labels {label[:8]}" if plain.count(title) > 1 else title
        for title, label in zip(plain, by_labels, strict=True)
    ]
    chapters = [
        make_chapter(title, *members, request)
        for title, members in zip(titles, by_labels.values(), strict=True)
    ]
    several = len({labels_of(run) for run in fitted}) > 1
    return [*chapters, across_chapter(fitted, request.command)] if several else chapters


def across_chapter(fitted: Sequence[Run], command: str) -> Chapter:
    """What the runs of several data sets say together."""
    title = "Across data sets"
    figures = attempt(title, lambda: comparisons.across_figures(fitted, command))
    return Chapter(title, "", [Section("Models over all data sets", figures)], {})


def labels_of(source: Run | Probe) -> str:
    """The hash of the labels that a run or probe saw."""
    return str(source.info["store"]["hashes"]["labels"])


def title_of(sources: Sequence[Run] | Sequence[Probe]) -> str:
    """The name of the store that runs or probes were fitted on, without its ending."""
    return PurePosixPath(str(sources[0].info["store"]["path"])).stem


def make_chapter(title: str, fitted: Sequence[Run], swept: Sequence[Probe], request: Request) -> Chapter:
    """The chapter of runs and probes that saw the same labels."""
    sections, answer = [], ""
    if fitted:
        check_comparable(fitted)
        groups = group_seeds(fitted)
        results = tabulate(groups)
        answer = runs.answer(results)
        task = str(fitted[0].info["task"])
        figures = [
            *runs.results_figures(results, task, request.command),
            *differences(groups, request.command),
            *runs.labels_figures(groups),
            *runs.board_figures(fitted),
        ]
        sections.append(Section("Results", figures))
    for probe in swept:
        sections.append(Section(f"Probe: {probe.path.name}", probes.probe_figures(probe), [probes.EXPLAINED]))
    if fitted:
        sections += about_runs(groups, request)
    sections.append(Section("What layers see", painted_layers(fitted, swept, request)))
    if fitted:
        sections += tiles_and_origin(groups, request)
    return Chapter(title, answer, [s for s in sections if s.figures], facts_of(fitted, swept, request))


def differences(groups: Sequence[list[Run]], command: str) -> Figures:
    """How sure the chosen fit's lead is, where there is another one."""
    if len(groups) < 2:
        return []
    title = "How sure the differences are"
    return attempt(title, lambda: [comparisons.differences_figure(groups, command)])


def about_runs(groups: Sequence[list[Run]], request: Request) -> list[Section]:
    """The chosen run in detail, what fusions rely on, and how training went."""
    seeds = choose(groups)
    chosen = best_on_val(seeds)
    words = [f"Of its {len(seeds)} seeds, the one that is best on val."] if len(seeds) > 1 else []
    best = [best_on_val(group) for group in groups]
    curves = runs.curves_figure(best)
    return [
        Section(f"The chosen run: {chosen.info['name']}", runs.run_figures(chosen), words),
        Section("What fusions rely on", [figure for run in best for figure in inside(run, request)]),
        Section("Training", [curves] if curves else []),
    ]


def inside(run: Run, request: Request) -> Figures:
    """What a fusion relies on, as far as its store is at hand."""
    if run.info["kind"] != "fusion":
        return []
    if run.info["fusion"] == "global":
        return [fusions.weights_figure(run)] if run.info["weights"] else []
    make = fusions.gate_figures if run.info["fusion"] == "localized" else fusions.expert_figures
    return attempt(
        f"Inside {run.info['name']}",
        lambda: make(run, request.stores.of(run.info["store"]), request.command),
    )


def attempt(title: str, make: Callable[[], Sequence[Figure]]) -> Figures:
    """Figures, or why they cannot be made."""
    try:
        return list(make())
    except SatDiFuserError as error:
        return [Missing(title, str(error))]


def painted_layers(fitted: Sequence[Run], swept: Sequence[Probe], request: Request) -> Figures:
    """Some layers in false colours: those asked for, or of each stride the one that tells most."""
    info = (swept or fitted)[0].info
    try:
        store = request.stores.of(info["store"])
    except SatDiFuserError as error:
        return [Missing("Layers in false colours", str(error))]
    if request.layers:
        names = [name for _, _, name in store.layer_positions(request.layers)]
        inputs = [(timestep, name) for name in names for timestep in store.attributes.timesteps]
    else:
        inputs = features.telling_inputs(store, scores(fitted, swept, store))
    partition = str(info.get("partition", store.attributes.partition))
    return attempt(
        "Layers in false colours",
        lambda: [features.pca_figure(store, partition, inputs, request.command)],
    )


def scores(
    fitted: Sequence[Run], swept: Sequence[Probe], store: FeatureStore
) -> Mapping[features.Input, float]:
    """How much each timestep and layer of a store tells: by a probe, else a global fusion."""
    feature = store.attributes.planned.feature
    for probe in swept:
        if probe.info["store"]["hashes"]["feature"] == feature:
            return probes.probe_scores(probe)
    for run in fitted:
        if run.info["weights"] and run.info["store"]["hashes"]["feature"] == feature:
            return fusions.weight_scores(run)
    return {}


def tiles_and_origin(groups: Sequence[list[Run]], request: Request) -> list[Section]:
    """Tiles that the chosen run was measured on, and where all runs lie."""
    chosen = best_on_val(choose(groups))
    figures = tiles.tile_figures(chosen, preview_of(chosen, request))
    origin = origin_figure([run for group in groups for run in group], request.command)
    return [
        Section(f"Tiles of the {reported_split(chosen)} split", figures),
        Section("Where the runs lie", [origin]),
    ]


def preview_of(run: Run, request: Request) -> tiles.Preview:
    """Gives the pictures of tiles by their ids, or None where there is none."""
    try:
        store = request.stores.of(run.info["store"])
    except SatDiFuserError:
        return lambda tile_id: None
    rows = dict(zip(store.tiles.tile_id.astype(str), store.tiles.index, strict=True))

    def picture(tile_id: str) -> NDArray[np.uint8] | None:
        held = store.attributes.previews and tile_id in rows
        return stores.preview(store, rows[tile_id]) if held else None

    return picture


def origin_figure(fitted: Sequence[Run], command: str) -> Figure:
    """Folder, features and reads of the test split of every run."""
    rows = [
        {
            "run": str(run.info["name"]),
            "folder": str(run.path),
            "store": str(run.info["store"]["path"]),
            "features": str(run.info["store"]["hashes"]["feature"])[:12],
            "chosen on": str(run.metrics.get("selected_on", "val")),
            "test split read": str(run.metrics.get("test_reads", "–")),
            "made again by": runs.command_of(run),
        }
        for run in fitted
    ]
    words = (
        "How often a run's test split was read is counted at every evaluation: a figure that was looked at "
        "often, and acted on, is no longer an honest one. Features are named by the start of their hash."
    )
    return Figure("All runs", Table(rows), words, command, pd.DataFrame(rows))


def facts_of(fitted: Sequence[Run], swept: Sequence[Probe], request: Request) -> dict[str, str]:
    """What the store of the first run or probe holds, or why that cannot be told."""
    info = (fitted or swept)[0].info
    try:
        store = request.stores.of(info["store"])
        return stores.facts(store, str(info.get("partition", store.attributes.partition)))
    except SatDiFuserError as error:
        return {"store": f"not at hand: {error}"}
