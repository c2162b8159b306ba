"""Probes of many strengths at once equal scikit-learn's, fitted one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from satdifuser.evaluate.axes import COLUMNS_AT_ONCE, Axes
from satdifuser.evaluate.lbfgs import Point, minimise
from satdifuser.evaluate.probes import LinearProbes, fit_probes
from satdifuser.evaluate.settings import ProbeSettings

STRENGTHS = ProbeSettings().logistic
Features = NDArray[np.float32]


def correlated(tiles: int, width: int, classes: int, seed: int = 0) -> tuple[Features, NDArray[np.int64]]:
    """Features that vary along few directions, as those of a network do, far from zero; and labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, tiles)
    hidden = random.normal(size=(tiles, 40)) + random.normal(size=(classes, 40))[labels]
    hidden *= np.arange(1, 41) ** -1.0
    features = hidden @ random.normal(size=(40, width)) + 0.01 * random.normal(size=(tiles, width)) + 20
    return features.astype(np.float32), labels


def standardised_weights(probes: LinearProbes, j: int, scaler: StandardScaler) -> NDArray[np.float64]:
    """Weights (K, D) of standardised features, and intercepts in a last column."""
    bias = probes.bias[j] + scaler.mean_ @ probes.weight[j]
    return np.column_stack([(probes.weight[j] * scaler.scale_[:, None]).T, bias])


def scale(features: Features) -> tuple[StandardScaler, NDArray[np.float64]]:
    """A scaler of features, and what it makes of them, in double precision."""
    wide = features.astype(np.float64)
    scaler = StandardScaler().fit(wide)
    return scaler, scaler.transform(wide)


def fit_linear(*args: object) -> LinearProbes:
    probes = fit_probes(*args)  # type: ignore[arg-type]
    assert isinstance(probes, LinearProbes)
    return probes


@pytest.mark.parametrize(("tiles", "width"), [(300, 40), (120, 300)])
@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_equals_scikit_learns(tiles: int, width: int, classes: int) -> None:
    features, labels = correlated(tiles + 500, width, classes)
    train, held_out = slice(tiles), slice(tiles, None)
    probes = fit_linear("logistic", features[train], labels[train], classes, STRENGTHS)
    assert probes.converged.all()
    scaler, scaled = scale(features[train])
    scaled_out = scaler.transform(features[held_out].astype(np.float64))
    scores = (probes.probabilities(features[held_out]).argmax(2) == labels[held_out]).mean(axis=1)
    for j, strength in enumerate(STRENGTHS):
        theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=100_000)
        theirs.fit(scaled, labels[train])
        found = standardised_weights(probes, j, scaler)
        if classes == 2:
            found = found[1:] - found[:1]
        else:  # which constant all classes share is not determined
            found -= found.mean(axis=0)
        expected = np.column_stack(
            [theirs.coef_, theirs.intercept_ - theirs.intercept_.mean() * (classes > 2)]
        )
        np.testing.assert_allclose(found, expected, atol=1e-3)
        accuracy = theirs.score(scaled_out, labels[held_out])
        assert scores[j] == pytest.approx(accuracy, abs=0.003)


def test_several_classes_a_tile_equal_scikit_learns_one_by_one() -> None:
    features, labels = correlated(800, 30, 8)
    several = np.stack([labels & 1 > 0, labels > 5, labels < 4, np.ones(800), np.zeros(800)], 1).astype(
        np.int64
    )
    train, held_out = slice(300), slice(300, None)
    probes = fit_linear("logistic", features[train], several[train], 5, STRENGTHS)
    assert probes.converged.all()
    scaler, scaled = scale(features[train])
    scaled_out = scaler.transform(features[held_out].astype(np.float64))
    found = probes.probabilities(features[held_out])
    assert (found[:, :, 3:] == [1, 0]).all()  # all training tiles have it, or none
    for j, strength in enumerate(STRENGTHS):
        weights = standardised_weights(probes, j, scaler)
        for c in range(3):
            theirs = LogisticRegression(C=strength, tol=1e-9, max_iter=100_000)
            theirs.fit(scaled, several[train, c])
            expected = np.append(theirs.coef_[0], theirs.intercept_)
            np.testing.assert_allclose(weights[c], expected, atol=1e-3)
            accuracy = theirs.score(scaled_out, several[held_out, c])
            assert ((found[j, :, c] >= 0.5) == several[held_out, c]).mean() == pytest.approx(
                accuracy, abs=0.003
            )


@pytest.mark.parametrize(("tiles", "width"), [(300, 40), (120, 300)])
@pytest.mark.parametrize("classes", [2, 4])
def test_ridge_equals_scikit_learns(tiles: int, width: int, classes: int) -> None:
    features, labels = correlated(tiles, width, classes)
    alphas = ProbeSettings().ridge
    probes = fit_linear("ridge", features, labels, classes, alphas)
    scaler, scaled = scale(features)
    for j, alpha in enumerate(alphas):
        theirs = RidgeClassifier(alpha=alpha).fit(scaled, labels)
        expected = np.column_stack([np.atleast_2d(theirs.coef_), theirs.intercept_])
        np.testing.assert_allclose(
            standardised_weights(probes, j, scaler)[-len(expected) :], expected, atol=1e-8
        )
        found = probes.probabilities(features)[j]
        np.testing.assert_array_equal(found.argmax(1), theirs.predict(scaled))
        assert ((found >= 0) & (found <= 1)).all()


def test_ridge_of_several_classes_a_tile_equals_scikit_learns() -> None:
    features, labels = correlated(300, 30, 8)
    several = np.stack([labels & 1 > 0, labels > 5], axis=1).astype(np.int64)
    probes = fit_probes("ridge", features, several, 2, [10.0])
    _, scaled = scale(features)
    theirs = RidgeClassifier(alpha=10.0).fit(scaled, several)
    np.testing.assert_array_equal(probes.probabilities(features)[0] >= 0.5, theirs.predict(scaled) == 1)


def test_neighbours_equal_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = correlated(400, COLUMNS_AT_ONCE + 10, 4)
    train, held_out = slice(200), slice(200, None)
    counts = [1, 3, 10, 500]
    monkeypatch.setattr("satdifuser.evaluate.probes.ROWS_AT_ONCE", 64)
    probes = fit_probes("neighbours", features[train], labels[train], 4, counts)
    found = probes.probabilities(features[held_out])
    scaler, scaled = scale(features[train])
    scaled_out = scaler.transform(features[held_out].astype(np.float64))
    for j, count in enumerate(counts):
        theirs = KNeighborsClassifier(min(count, 200))  # there are no more
        theirs.fit(scaled, labels[train])
        expected = theirs.predict_proba(scaled_out)
        np.testing.assert_allclose(found[j], expected, atol=1e-6)
    np.testing.assert_array_equal(probes.only(1).probabilities(features[held_out]), found[1:2])


def test_classes_that_no_training_tile_has_are_never_predicted() -> None:
    features, labels = correlated(200, 20, 3)
    for kind in ("logistic", "ridge", "neighbours"):
        found = fit_probes(kind, features, labels + 1, 5, [1.0]).probabilities(features)[0]
        assert (found[:, [0, 4]] == 0).all()
        assert (found.argmax(1) == labels + 1).mean() > 0.8
    only_one = fit_probes("logistic", features, np.full(200, 2), 5, [1.0]).probabilities(features)[0]
    assert (only_one == [0, 0, 1, 0, 0]).all()


def test_where_every_class_is_always_there_or_never_nothing_is_learned() -> None:
    features, _ = correlated(50, 5, 2)
    for kind in ("logistic", "ridge"):
        probes = fit_linear(kind, features, np.tile([1, 0], (50, 1)), 2, [0.1, 1.0])
        assert (probes.probabilities(features) == [1, 0]).all()
        assert probes.parameters == 0


def test_features_that_never_vary_or_repeat_are_harmless() -> None:
    features, labels = correlated(100, 10, 3)
    odd = np.hstack([features, np.full((100, 2), 7, np.float32), features[:, :3]])
    for kind in ("logistic", "ridge", "neighbours"):
        assert np.isfinite(fit_probes(kind, odd, labels, 3, [1.0]).probabilities(odd)).all()
        constant = fit_probes(kind, np.ones((100, 4), np.float32), labels, 3, [1.0])
        assert np.isfinite(constant.probabilities(np.ones((2, 4), np.float32))).all()


def test_a_probe_of_one_strength_is_that_of_the_grid() -> None:
    features, labels = correlated(200, 20, 3)
    probes = fit_linear("logistic", features, labels, 3, STRENGTHS)
    np.testing.assert_array_equal(probes.only(4).probabilities(features), probes.probabilities(features)[4:5])
    alone = fit_linear("logistic", features, labels, 3, STRENGTHS[4:5])
    np.testing.assert_allclose(alone.weight, probes.only(4).weight, atol=1e-5)
    assert probes.parameters == 3 * 21


def test_a_fit_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = correlated(200, 20, 3)
    monkeypatch.setattr("satdifuser.evaluate.logistic.STEPS", 3)
    probes = fit_linear("logistic", features, labels, 3, STRENGTHS)
    assert not probes.converged.all()
    assert probes.gradient_norms[~probes.converged].min() > 1e-6
    assert probes.gradient_norms[probes.converged].max(initial=0) <= 1e-6


@pytest.mark.parametrize(("tiles", "width"), [(50, 8), (8, 50), (30, COLUMNS_AT_ONCE * 2 + 1)])
def test_axes_are_the_features_turned(tiles: int, width: int) -> None:
    features, _ = correlated(tiles, width, 2)
    axes = Axes(features, torch.device("cpu"))
    _, scaled = scale(features)
    np.testing.assert_allclose(axes.scores @ axes.scores.T, scaled @ scaled.T, atol=1e-6 * width)
    np.testing.assert_allclose(axes.scores.square().sum(0), axes.values, rtol=1e-6, atol=1e-9 * width)
    along = torch.randn(len(axes.values), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = axes.turn_back(along)
    constant = axes.mean @ weights
    np.testing.assert_allclose(features @ weights - constant, axes.scores @ along, atol=1e-6)


def quadratics(curvatures: torch.Tensor, goals: torch.Tensor) -> object:
    """J quadratic functions, whose evaluations note how many were asked for."""
    asked: list[int] = []

    def function(x: torch.Tensor, which: torch.Tensor) -> Point:
        asked.append(len(which))
        away, bent = x - goals[which], curvatures[which]
        return Point(x, (bent * away**2).sum(1) / 2, bent * away, torch.ones_like(x))

    function.asked = asked  # type: ignore[attr-defined]
    return function


def test_minimise_reaches_each_minimum_and_lets_go_of_what_is_done() -> None:
    random = torch.Generator().manual_seed(0)
    goals = torch.randn(3, 20, dtype=torch.float64, generator=random)
    curvatures = torch.stack([torch.logspace(0, power, 20, dtype=torch.float64) for power in (0, 1, 3)])
    function = quadratics(curvatures, goals)
    found = minimise(function, torch.zeros_like(goals), 1e-8, 500)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.variables, goals, atol=1e-7)
    assert (found.gradient_norms <= 1e-8).all()
    asked = function.asked  # type: ignore[attr-defined]
    assert asked[0] == 3
    assert asked[-1] == 1
    assert asked == sorted(asked, reverse=True)


def test_minimise_gives_up_what_cannot_descend() -> None:
    def cliff(x: torch.Tensor, which: torch.Tensor) -> Point:
        values = torch.where((x == 0).all(1), 0.0, 1.0).to(x)
        return Point(x, values, torch.ones_like(x), torch.ones_like(x))

    found = minimise(cliff, torch.zeros(2, 3, dtype=torch.float64), 1e-8, 500)
    assert found.steps == 1
    assert (found.gradient_norms > 1e-8).all()
