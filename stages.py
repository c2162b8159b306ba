"""Runs the stages of a pipeline, one after the other or each by itself.

They import torch and the rest when they run: the command line stays quick.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satdifuser.errors import SettingsError
from satdifuser.pipeline import Pipeline, load_run
from satdifuser.store.location import Location, is_tiff

if TYPE_CHECKING:
    from satdifuser.evaluate.maps.predict import Request
    from satdifuser.fuse.predictor import Predictor
    from satdifuser.store.reader import FeatureStore


def run_pipeline(pipeline: Pipeline, overwrite: bool = False, ignore_free_space: bool = False) -> str:
    """Run all stages: extract, fit every fusion and seed, measure the best of each on val, report.

    Each stage goes on where an earlier run stopped, and does nothing where it is done.

    Args:
        pipeline: The settings.
        overwrite: Replace what is in the output folder.
        ignore_free_space: Extract even if the disk looks too small for the features.

    Returns:
        The results table and the paths of what was written, for the terminal.
    """
    from satdifuser.evaluate.chosen import best_of_each, ensure_all_evaluated
    from satdifuser.evaluate.report.page import write_report
    from satdifuser.evaluate.results import format_table, results_table
    from satdifuser.extract.run import extract

    store = extract(pipeline.job(), pipeline.store_path, overwrite, ignore_free_space)
    fitted = fit_all(store, pipeline, pipeline.output / "runs", overwrite)
    runs = best_of_each(fitted)
    ensure_all_evaluated(runs, None, pipeline.evaluate)
    page = write_report(runs, pipeline.output / "report.html", command_line())
    paths = {"features": store.path, "runs": pipeline.output / "runs", "report": page}
    written = "\n".join(f"{name:9} {path}" for name, path in paths.items())
    return f"{format_table(results_table(runs))}\n\n{written}"


def fit_all(store: FeatureStore, pipeline: Pipeline, folder: Path, overwrite: bool = False) -> list[Path]:
    """Fit the baselines and every candidate of the sweep, and measure them on val; return their folders.

    What is already there, fitted with these settings, is kept. The test split is not read.
    """
    from satdifuser.evaluate.baselines import fit_baselines
    from satdifuser.evaluate.evaluation import ensure_measured_on_val, new_outcome
    from satdifuser.fuse.fit import check_candidates, check_task, fit_candidates
    from satdifuser.fuse.grid import expand
    from satdifuser.fuse.leaderboard import BOARD_FILE
    from satdifuser.fuse.processes import is_first
    from satdifuser.fuse.run_folder import RUN_FILE

    check_task(store, pipeline.fit)
    candidates, runs = expand(pipeline.fit, store), []
    left = [one for one in candidates if overwrite or not (folder / one.name / RUN_FILE).is_file()]
    check_candidates(store, left)
    if pipeline.evaluate.baselines and is_first():
        runs += fit_baselines(store, pipeline.evaluate, folder, overwrite, pipeline.fit.partition)
    board = folder / BOARD_FILE
    fitted = fit_candidates(store, candidates, folder, new_outcome, overwrite, board)
    for run in fitted if is_first() else ():
        ensure_measured_on_val(run, store, pipeline.evaluate)
    return [run.path for run in [*runs, *fitted]]


@dataclass(frozen=True)
class SceneRequest:
    """What is asked for of a scene, beside the map: how its tiles are cut, and whether features are kept."""

    overlap: int | None = (
        None  # px of the scene; None: a quarter of a tile where pixels are mapped, else none
    )
    resample: str | None = None  # metres per pixel at which the backbone sees it; "auto": those of the fit
    store: Path | None = None  # where its features are kept
    overrides: Sequence[str] = ()

    def named(self) -> dict[str, Any]:
        """What was given, by the command's options."""
        overlap = None if self.overlap is None else str(self.overlap)
        options = {"--overlap": overlap, "--resample": self.resample, "--store": self.store}
        return options | {"--set": self.overrides}


def run_prediction(folder: Path, place: Location, request: Request, how: SceneRequest) -> Path:
    """Map a scene or the tiles of a store with a fitted run, or go on where an earlier call stopped.

    Args:
        folder: The run.
        place: A GeoTIFF, or a store.
        request: What is asked for.
        how: For a scene only.

    Returns:
        What was written.

    Raises:
        SatDiFuserError: bad settings or input; what is done is kept.
    """
    from satdifuser.evaluate.maps.predict import check_request, predict_store
    from satdifuser.fuse.predictor import Predictor
    from satdifuser.fuse.run_folder import open_run
    from satdifuser.store.reader import open_store

    predictor = Predictor(open_run(folder))
    check_request(request, predictor)
    if is_tiff(place):
        if request.tiles != "*":
            raise SettingsError(
                f"--tiles: is for stores, but got the scene {place}; name a --window or --aoi"
            )
        return predict_scene(predictor, place, request, how)
    given = [name for name, value in how.named().items() if value]
    if given:
        raise SettingsError(f"{given[0]}: is for scenes, GeoTIFFs that end in .tif or .tiff, but got {place}")
    return predict_store(predictor, open_store(place), request)


def predict_scene(predictor: Predictor, path: Path, request: Request, how: SceneRequest) -> Path:
    """Map a scene with a fitted run, or go on where an earlier call stopped.

    Args:
        predictor: The run.
        path: The scene, a GeoTIFF.
        request: What is asked for.
        how: How its tiles are cut, and whether features are kept.

    Returns:
        The map, or the table of tiles.

    Raises:
        RunError: the backbone does not make the features that the run was fitted on.
        SatDiFuserError: bad settings or input; what is done is kept.
    """
    from satdifuser.evaluate.maps.area import Raster
    from satdifuser.evaluate.maps.predict import Scene, find_area, predict_features, predict_store
    from satdifuser.extract.run import extract
    from satdifuser.extract.scene import tile_id
    from satdifuser.extract.scene_job import open_scene, scene_features, scene_state, scenes_settings

    pipeline = load_run(predictor, path, how.overrides)
    settings = scenes_settings(pipeline.source)
    scene = open_scene(path, settings)
    factor = scene.pixels_per_pixel(predictor.run.info.get("pixel_size_m"), how.resample)
    tile = scene.tile(predictor.tile_size, factor)
    overlap = how.overlap
    if overlap is None:
        overlap = min(tile) // 4 if predictor.task == "segmentation" else 0
    grid = scene.grid(tile, overlap)
    raster = Raster(scene.header.size, scene.crs_wkt, scene.place.transform)
    facts = Scene(path.name, raster, scene.header.date)
    area = find_area(raster, request)
    if how.store is not None:
        if factor != 1:
            raise SettingsError("--store: keeps features of the scene's own pixels; leave out --resample")
        source = settings.model_copy(update={"overlap": overlap, "pad": True})
        store = extract(pipeline.model_copy(update={"source": source}).job(), how.store)
        return predict_store(predictor, store, request, facts)
    features, identity = scene_features(pipeline.job(), scene, grid.touching(area.window), request.out)
    predictor.require_features(identity, str(path))
    identity |= {"scene": str(path), "state": scene_state(scene), "tile": tile, "overlap": overlap}
    made = predict_features(predictor, features, area, request, facts, identity, partial(tile_id, path))
    if warning := features.values.warning():
        print(warning, file=sys.stderr)
    return made


def command_line() -> str:
    """The command that runs now, as it was typed."""
    return shlex.join(["satdifuser", *sys.argv[1:]])
