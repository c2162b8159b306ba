"""Composes the rooms' settings into one pipeline file, and reads such files, presets and overrides."""

from __future__ import annotations

import copy
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
    from satdifuser.extract.job import Job
    from satdifuser.fuse.predictor import Predictor


PACKAGED = "pipeline.yaml"
PACKAGE = Path(str(files("satdifuser")))
ANY_PIXEL = 1e-9  # least share of valid pixels of a tile that is mapped


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

    def job(self) -> Job:
        """The extraction that these settings ask for."""
        from satdifuser.extract.job import Job

        return Job(self.source, self.backbone, self.extract, self.store)


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
