"""Composes the rooms' settings into one pipeline file, and runs its stages one after the other.

The stages import torch and the rest when they run: reading settings stays quick.
"""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError, field_validator

from satdifuser.errors import SettingsError, explain_settings, suggest
from satdifuser.evaluate.settings import EvaluateSettings, ProbeSettings
from satdifuser.extract.settings import (
    BackboneSettings,
    ExtractSettings,
    SourceSettings,
    SyntheticSettings,
)
from satdifuser.fuse.settings import SweepSettings
from satdifuser.labels.settings import LabelSettings
from satdifuser.store.settings import Settings, StoreSettings

if TYPE_CHECKING:
    from satdifuser.evaluate.maps.predict import Request
    from satdifuser.fuse.predictor import Predictor
    from satdifuser.store.location import Location
    from satdifuser.store.reader import FeatureStore


PACKAGED = "pipeline.yaml"
PACKAGE = Path(str(files("satdifuser")))
ANY_PIXEL = 1e-9  # least share of valid pixels of a tile that is mapped
SCENE_SUFFIXES = (".tif", ".tiff")


@dataclass(frozen=True)
class Override:
    """One ``--set a.b=c``: its text, the keys a and b, the value c."""

    text: str
    path: list[str]
    value: Any


class Pipeline(Settings):
    """Everything a pipeline file can say."""

    source: SourceSettings = SyntheticSettings()
    backbone: BackboneSettings = BackboneSettings()
    extract: ExtractSettings = ExtractSettings()
    label: LabelSettings = LabelSettings()
    store: StoreSettings = StoreSettings()
    fit: SweepSettings = SweepSettings()
    probe: ProbeSettings = ProbeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    output: Path = Path("out")

    @field_validator("source", mode="before")
    @classmethod
    def default_kind(cls, source: Any) -> Any:
        """A source that names no kind is of the default one, as a file holds only what differs."""
        return {"kind": "synthetic", **source} if isinstance(source, dict) else source

    @property
    def store_path(self) -> Path:
        """The store's folder; a relative one lies in the output folder."""
        return self.output / self.store.path


def load_pipeline(file: Path | None = None, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and validate a pipeline file.

    Args:
        file: The file, or the name of a packaged preset; None for the packaged default.
        overrides: ``a.b=c`` texts that win over the file. Another ``source.kind`` than the file's starts
            the source block anew, since each kind has settings of its own.

    Raises:
        SettingsError: naming every wrong setting at once.
    """
    name = str(file) if file else f"packaged {PACKAGED}"
    raw = _read_yaml(file, name)
    changes = _renew_source(raw, [_parse_override(text) for text in overrides])
    for change in changes:
        _assign(raw, change.path, change.value)
    return validate_settings(raw, name, changes)


def load_run(predictor: Predictor, scene: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """The settings that a run's features were made with, for a scene that its tiles are to be cut from.

    Args:
        predictor: The run.
        scene: A GeoTIFF.
        overrides: ``a.b=c`` texts that win over them.

    Raises:
        SettingsError: naming every wrong setting at once.
        RunError: the run's settings cannot be read.
    """
    from satdifuser.extract.settings import image_settings
    from satdifuser.fuse.run_folder import read_settings

    run = predictor.run
    name = f"settings of {run.path}"
    held = validate_settings(read_settings(run), name)
    images = image_settings(held.source).model_dump(mode="json", include={"bands", "scale", "offset"})
    raw = held.model_dump(mode="json")
    raw["source"] = {
        "kind": "scenes",
        "root": str(scene),
        "tile_size": predictor.tile_size,
        "min_valid": ANY_PIXEL,
    } | images
    raw["backbone"] |= {"device": "auto"}  # a run made on a GPU is used on machines without one
    raw["extract"] |= {"timesteps": run.info["timesteps"], "layers": [layer.name for layer in run.layers]}
    raw["extract"] |= {"batch_size": "auto", "threads": "auto"}
    changes = [_parse_override(text) for text in overrides]
    for change in changes:
        _assign(raw, change.path, change.value)
    return validate_settings(raw, name, changes)


def load_stored(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """The settings that a store was made with, and overrides.

    Raises:
        StoreError: there is no store, or its metadata is damaged.
        SettingsError: naming every wrong setting at once.
    """
    from satdifuser.store.reader import open_store

    raw = copy.deepcopy(open_store(path).attributes.settings)
    changes = _renew_source(raw, [_parse_override(text) for text in overrides])
    for change in changes:
        _assign(raw, change.path, change.value)
    return validate_settings(raw, f"settings in {path}", changes)


def validate_settings(raw: Mapping[str, Any], name: str, overrides: Sequence[Override] = ()) -> Pipeline:
    """Validate nested settings.

    Args:
        raw: The settings by section.
        name: Says in errors where they come from …
        overrides: … but for these, already assigned.

    Raises:
        SettingsError: naming every wrong setting at once.
    """
    try:
        return Pipeline.model_validate(raw)
    except ValidationError as error:
        origin = partial(_origin, name, overrides)
        raise SettingsError(explain_settings(error, raw, origin, _known_keys)) from None


def _read_yaml(file: Path | None, name: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(_find(file, name).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise SettingsError(f"{name}: not a readable YAML file: {error}") from error
    if not isinstance(raw, dict | None):
        raise SettingsError(f"{name}: got a {type(raw).__name__}, expected sections such as 'source:'")
    return raw or {}


def _find(file: Path | None, name: str) -> Path:
    """The file itself, or else the packaged preset of that name."""
    if file is None:
        return PACKAGE / PACKAGED
    if file.is_dir():
        raise SettingsError(
            f"{name}: is a folder, expected a pipeline file (YAML); to extract the images in a folder use "
            f"`--set source.kind=folder --set source.root={file}`"
        )
    if file.exists():
        return file
    presets = packaged_presets()
    if name not in presets:
        raise SettingsError(
            f"{name}: no such pipeline file, and no such preset{suggest(name, presets)}; presets are "
            f"{', '.join(presets)}"
        )
    return presets[name]


def packaged_presets() -> dict[str, Path]:
    """Pipeline files that ship with the package, by name: ``geobench/m-eurosat``."""
    folder = PACKAGE / "presets"
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}


def _parse_override(text: str) -> Override:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {text}: expected section.key=value, e.g. --set extract.seed=1")
    try:
        return Override(text, key.strip().split("."), yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {text}: the value is not readable YAML: {error}") from error


def _renew_source(raw: Mapping[str, Any], changes: list[Override]) -> list[Override]:
    """Put the whole block before the changes where one names another source.kind than the file."""
    kinds = [change for change in changes if change.path == ["source", "kind"]]
    source = raw.get("source")
    held = source.get("kind", "synthetic") if isinstance(source, dict) else "synthetic"
    if not kinds or kinds[-1].value == held:
        return changes
    return [replace(kinds[-1], path=["source"], value={"kind": kinds[-1].value}), *changes]


def _assign(raw: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(raw.get(key), dict):
            raw[key] = {}
        raw = raw[key]
    raw[path[-1]] = value


def _origin(name: str, overrides: Sequence[Override], path: list[str]) -> str:
    """The last override of this setting, of a part of it or of a section around it; else the file."""
    for override in reversed(overrides):
        if all(ours == theirs for ours, theirs in zip(override.path, path, strict=False)):
            return f"--set {override.text}"
    return name


def _known_keys() -> set[str]:
    schema = Pipeline.model_json_schema()
    models = [schema, *schema["$defs"].values()]
    return {key for model in models for key in model.get("properties", {})}


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
    from satdifuser.extract.job import Job
    from satdifuser.extract.run import extract

    job = Job(pipeline.source, pipeline.backbone, pipeline.extract, pipeline.store)
    store = extract(job, pipeline.store_path, overwrite, ignore_free_space)
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
    from satdifuser.fuse.fit import check_task, fit_candidates
    from satdifuser.fuse.grid import expand
    from satdifuser.fuse.leaderboard import BOARD_FILE
    from satdifuser.fuse.log import check_log
    from satdifuser.fuse.processes import is_first

    check_task(store, pipeline.fit)
    check_log(pipeline.fit.log)
    candidates, runs = expand(pipeline.fit, store), []
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
    if isinstance(place, Path) and place.suffix.lower() in SCENE_SUFFIXES:
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
    from satdifuser.extract.job import Job
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
    if how.store is not None:
        if factor != 1:
            raise SettingsError("--store: keeps features of the scene's own pixels; leave out --resample")
        source = settings.model_copy(update={"overlap": overlap, "pad": True})
        store = extract(Job(source, pipeline.backbone, pipeline.extract, pipeline.store), how.store)
        return predict_store(predictor, store, request, facts)
    area = find_area(raster, request)
    job = Job(pipeline.source, pipeline.backbone, pipeline.extract, pipeline.store)
    features, identity = scene_features(job, scene, grid.touching(area.window), request.out)
    predictor.require_features(identity, str(path))
    identity |= {"scene": str(path), "state": scene_state(scene), "tile": tile, "overlap": overlap}
    made = predict_features(predictor, features, area, request, facts, identity, partial(tile_id, path))
    if warning := features.values.warning():
        print(warning, file=sys.stderr)
    return made


def command_line() -> str:
    """The command that runs now, as it was typed."""
    return shlex.join(["satdifuser", *sys.argv[1:]])
