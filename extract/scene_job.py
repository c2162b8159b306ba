"""Opens a scene and a backbone to make the features that a fitted run expects."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satdifuser.errors import SettingsError
from satdifuser.extract.backbone import find_backbone
from satdifuser.extract.changes import file_state
from satdifuser.extract.job import Job, feature_identity, fix_automatic, plan_layers
from satdifuser.extract.loading import prepare_work
from satdifuser.extract.scene import SceneFeatures, find_bands, tile_record
from satdifuser.extract.settings import ScenesSettings, SourceSettings
from satdifuser.extract.sources.files import Header, read_header
from satdifuser.extract.sources.grid import offsets, parse_size
from satdifuser.extract.sources.scenes import check_placed, told_header
from satdifuser.extract.sources.tile import TileRecord
from satdifuser.store.georeference import Georeference, open_raster
from satdifuser.store.place import ground_distance
from satdifuser.store.schema import MAX_TILES_PER_SHARD
from satdifuser.store.tile_grid import TileGrid

LEAST_TILE = 8  # px of a scene that are seen as one tile; fewer would only be blown up
TOLERATED = 1.5  # ratio of pixel sizes beyond which people are warned


@dataclass(frozen=True)
class OpenScene:
    """A georeferenced raster, before its pixels are read."""

    path: Path
    header: Header
    place: Georeference
    crs_wkt: str  # as the file has it

    @property
    def pixel_size_m(self) -> float:
        """Metres per pixel at its centre."""
        return ground_distance(self.place, self.header.size)

    def pixels_per_pixel(self, fitted_m: float | None, resample: str | None) -> float:
        """Pixels of the scene along a pixel that the backbone sees; 1 unless it is to be resampled.

        Args:
            fitted_m: Pixel size in metres of the tiles that the run was fitted on; None where unknown.
            resample: ``auto`` for that size, or metres; None leaves the scene as it is, with a warning on
                stderr where the two are far apart.

        Raises:
            SettingsError: the size is unknown, or no number.
        """
        here = self.pixel_size_m
        if resample is not None:
            return _metres(resample, fitted_m) / here
        if fitted_m is not None and max(fitted_m / here, here / fitted_m) > TOLERATED:
            print(
                f"warning: {self.path}: its pixels are {here:.3g} m wide, those that the run was fitted on "
                f"{fitted_m:.3g} m: what it knows of sizes and textures may not hold here; --resample auto "
                "shows the backbone the scene at that pixel size",
                file=sys.stderr,
            )
        return 1.0

    def tile(self, fitted: tuple[int, int], factor: float) -> tuple[int, int]:
        """(H, W) px of the scene that the backbone sees as one tile of the fitted size.

        Raises:
            SettingsError: they are too few to tell anything.
        """
        height, width = max(1, round(fitted[0] * factor)), max(1, round(fitted[1] * factor))
        if factor < 1 and min(height, width) < LEAST_TILE:
            raise SettingsError(
                f"--resample: at this pixel size a tile of {fitted[0]} x {fitted[1]} px holds {height} x "
                f"{width} px of {self.path}, expected {LEAST_TILE} or more a side: its pixels are too coarse "
                "for this; leave out --resample, or fit a run on such pixels"
            )
        return height, width

    def grid(self, tile: tuple[int, int], overlap: int) -> TileGrid:
        """The tiles of (H, W) px that cover it, those at the bottom and right perhaps beyond it.

        Raises:
            SettingsError: the overlap is more than half of a tile.
        """
        if not 0 <= 2 * overlap <= min(tile):
            raise SettingsError(
                f"--overlap: got {overlap} px, expected 0 to {min(tile) // 2}, half of a tile of {tile[0]} x "
                f"{tile[1]} px"
            )
        tops, lefts = (
            offsets(length, side, overlap) for length, side in zip(self.header.size, tile, strict=True)
        )
        return TileGrid(tops, lefts, tile)


def open_scene(path: Path, settings: ScenesSettings) -> OpenScene:
    """Open a scene, with the date and cloud cover that the settings may say.

    Raises:
        ImageError: it cannot be read.
        SourceError: it has no CRS or transform, or reaches across the antimeridian.
    """
    header = read_header(path)
    place = check_placed(path, header)
    with open_raster(path) as dataset:
        wkt = dataset.crs.to_wkt()
    return OpenScene(path, told_header(header, settings), place, wkt)


def scene_features(
    job: Job, scene: OpenScene, grid: TileGrid, out: Path
) -> tuple[SceneFeatures, dict[str, Any]]:
    """Load the backbone that makes a scene's features, the cheap checks first.

    Args:
        job: Its source settings are of the scene, its tile size is that of the tiles the run was fitted on.
        scene: The scene.
        grid: Where its tiles lie; of another size than the job's where the scene is resampled.
        out: Where the result will be.

    Returns:
        The features, and all that shapes them.

    Raises:
        ImageError: the scene lacks a band.
        SettingsError, BackboneError: the backbone is not there, or its settings do not fit.
    """
    source = scenes_settings(job.source_settings)
    find_bands(scene.path, scene.header, job.images.bands)
    job = fix_automatic(job, out, overwrite=False)
    info = find_backbone(job.backbone_settings)
    size = parse_size(source.tile_size)
    image_size, layers = plan_layers(job, info, size)
    first = tile_record(scene.path, scene.header, grid, grid.tops[0], grid.lefts[0])
    work = prepare_work(job, info, image_size, layers, [first], MAX_TILES_PER_SHARD)
    features = SceneFeatures(work, scene.path, scene.header, grid, source.nodata)
    return features, feature_identity(work.job, info, work.extractor.backbone.loaded, image_size, size)


def scenes_settings(settings: SourceSettings) -> ScenesSettings:
    """The settings of a source, which must be of scenes.

    Raises:
        SettingsError: they are of another kind.
    """
    if not isinstance(settings, ScenesSettings):
        raise SettingsError(f"source.kind: got {settings.kind}, expected scenes")
    return settings


def scene_state(scene: OpenScene) -> str:
    """Size and time of change of a scene's file, to tell it from a later one."""
    return file_state(TileRecord("", str(scene.path), "none", scene.header.size))


def _metres(resample: str, fitted_m: float | None) -> float:
    if resample == "auto":
        if fitted_m is None:
            raise SettingsError(
                "--resample auto: the tiles that the run was fitted on had no place on the ground, so their "
                "pixel size is not known; name it in metres, e.g. --resample 10"
            )
        return fitted_m
    try:
        metres = float(resample)
    except ValueError:
        metres = math.nan
    if not 0 < metres < math.inf:
        raise SettingsError(f"--resample {resample}: expected auto, or metres per pixel such as 10")
    return metres
