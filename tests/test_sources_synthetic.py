"""The synthetic source: the same bits for the same seed, and no shortcut through colour."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from satdifuser.errors import SourceError
from satdifuser.extract.settings import SyntheticSettings
from satdifuser.extract.sources import list_tiles, open_source
from satdifuser.extract.sources.canvas import BUILT, COVERS, ROAD, TREES, WATER, Canvas, combine
from satdifuser.extract.sources.landcover import PAINTERS, paint
from satdifuser.labels.settings import SplitShares

SMALL = SyntheticSettings(tiles=20, split=SplitShares(train=0.5, val=0.25, test=0.25))


def test_tiles_are_balanced_placed_and_split() -> None:
    source = open_source(SyntheticSettings(tiles=900))
    records = list_tiles(source)
    assert source.classes == tuple(PAINTERS)
    assert np.bincount([record.label for record in records if record.label is not None]).tolist() == [90] * 10
    assert [sum(r.split == s for r in records) for s in ("train", "val", "test")] == [540, 180, 180]
    boxes = {record.georeference.bounds(*record.size) for record in records if record.georeference}
    assert len(boxes) == 900
    assert {record.georeference.crs for record in records if record.georeference} == {"EPSG:32632"}
    assert all((right - left, top - bottom) == (640, 640) for left, bottom, right, top in boxes)


def test_every_read_gives_the_same_bits_and_every_seed_others() -> None:
    records = list_tiles(open_source(SMALL))
    first, again = (open_source(SMALL).read(records[4]) for _ in range(2))
    other = open_source(SMALL.model_copy(update={"seed": 1})).read(records[4])
    np.testing.assert_array_equal(first.image, again.image)
    assert not np.array_equal(first.image, other.image)
    assert (first.image.dtype, first.image.shape) == (np.uint8, (3, 64, 64))
    assert first.valid.all()
    assert first.mask is None


def test_segmentation_yields_masks_of_any_shape() -> None:
    settings = SMALL.model_copy(update={"task": "segmentation", "tile_size": (40, 72)})
    source = open_source(settings)
    assert source.classes == COVERS
    tiles = [source.read(record) for record in list_tiles(source)]
    assert {tile.image.shape for tile in tiles} == {(3, 40, 72)}
    masks = np.stack([tile.mask for tile in tiles if tile.mask is not None])
    assert masks.shape == (20, 40, 72)
    assert set(np.unique(masks)) == set(range(len(COVERS)))


@pytest.mark.parametrize(
    ("kind", "cover", "low", "high"),
    [
        ("forest", TREES, 0.2, 0.8),
        ("orchard", TREES, 0.05, 0.6),
        ("town", BUILT, 0.2, 0.7),
        ("town", ROAD, 0.1, 0.5),
        ("river", WATER, 0.04, 0.5),
        ("lake", WATER, 0.04, 0.5),
    ],
)
def test_scenes_hold_what_their_name_says(kind: str, cover: int, low: float, high: float) -> None:
    masks = [paint(kind, np.random.default_rng(seed), (64, 64))[1] for seed in range(8)]
    share = np.mean([mask == cover for mask in masks])
    assert low < share < high


def test_light_and_colour_cast_differ_within_a_kind() -> None:
    images = np.stack([paint("lake", np.random.default_rng(seed), (64, 64))[0] for seed in range(12)])
    means = images.mean(axis=(2, 3))
    assert means.mean(axis=1).std() > 10
    assert (means[:, 0] - means[:, 2]).std() > 5


def test_combine_numbers_distinct_pairs() -> None:
    first, second = np.array([[1.5, 1.5], [-2.0, 1.5]]), np.array([[3, 4], [3, 3]])
    numbers = combine(first, second)
    assert sorted(np.unique(numbers)) == [0, 1, 2]
    assert numbers[0, 0] == numbers[1, 1]


def test_noise_has_zero_mean_and_unit_deviation() -> None:
    noise = Canvas(np.random.default_rng(0), (48, 32)).noise(3)
    assert noise.shape == (48, 32)
    assert abs(noise.mean()) < 1e-9
    assert abs(noise.std() - 1) < 1e-6


def colour_statistics(images: np.ndarray) -> np.ndarray:
    """Mean, deviation and percentiles of each band, and the mean gradients of brightness: (tile, 23)."""
    percentiles = np.percentile(images, [5, 25, 50, 75, 95], axis=(2, 3))
    grey = images.mean(axis=1)
    gradients = [np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2))[:, None] for axis in (1, 2)]
    return np.concatenate([images.mean((2, 3)), images.std((2, 3)), *percentiles, *gradients], axis=1)


def texture_statistics(images: np.ndarray) -> np.ndarray:
    """Power spectrum of standardised brightness: its mean and peak at 15 wavelengths, (tile, 30)."""
    grey = images.mean(axis=1)
    grey = (grey - grey.mean((1, 2), keepdims=True)) / grey.std((1, 2), keepdims=True)
    power = np.log(np.abs(np.fft.fft2(grey)) ** 2 + 1)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64))) * 64
    rings = [power[:, (frequency >= low) & (frequency < low + 2)] for low in range(1, 31, 2)]
    return np.stack([statistic for ring in rings for statistic in (ring.mean(1), ring.max(1))], axis=1)


def test_texture_tells_scenes_apart_better_than_colour() -> None:
    settings = SyntheticSettings(tiles=500)
    source = open_source(settings)
    records = list_tiles(source)
    images = np.stack([source.read(record).image for record in records]).astype(np.float64)
    labels = np.array([record.label for record in records])
    train = np.array([record.split != "test" for record in records])
    scores = []
    for statistics in (colour_statistics, texture_statistics):
        features = statistics(images)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000))
        scores.append(model.fit(features[train], labels[train]).score(features[~train], labels[~train]))
    assert scores[0] < 0.5
    assert scores[1] > scores[0] + 0.1


def test_error_empty_split() -> None:
    with pytest.raises(SourceError, match="no tile in split val, test"):
        list_tiles(open_source(SyntheticSettings(tiles=1)))
