"""Linear models on features: logistic regressions (scikit-learn) on standardised inputs."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from satdifuser.store.encoding import Floats


class LinearProbe:
    """Logistic regression on standardised features."""

    def __init__(self, features: Floats, labels: NDArray[np.int64], classes: int, strength: float) -> None:
        self.classes = classes
        self.scaler = StandardScaler().fit(features)
        self.model, self.converged = fit_logistic(self.scaler.transform(features), labels, strength)
        self.parameters = int(self.model.coef_.size + self.model.intercept_.size)

    def probabilities(self, features: Floats) -> NDArray[np.float32]:
        """(N, C) features to (N, classes) probabilities; 0 for classes never seen in training."""
        full = np.zeros((len(features), self.classes), np.float32)
        full[:, self.model.classes_] = self.model.predict_proba(self.scaler.transform(features))
        return full

    def affine(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The same model as logits = features @ weight + bias: (C, classes) and (classes,)."""
        weight = np.zeros((self.model.n_features_in_, self.classes), np.float32)
        bias = np.full(self.classes, -np.inf, np.float32)
        coefficients, intercept = self.model.coef_, self.model.intercept_
        if len(self.model.classes_) == 2:  # one row stands for the second class
            coefficients = np.vstack([-coefficients, coefficients]) / 2
            intercept = np.array([-1, 1]) * intercept / 2
        scaled = coefficients / self.scaler.scale_
        weight[:, self.model.classes_] = scaled.T
        bias[self.model.classes_] = intercept - scaled @ self.scaler.mean_
        return weight, bias


class MultilabelProbe:
    """One logistic regression per class on standardised features.

    A class that all training tiles have, or none, keeps that share as its probability.
    """

    def __init__(self, features: Floats, labels: NDArray[np.int64], classes: int, strength: float) -> None:
        self.scaler = StandardScaler().fit(features)
        self.shares = labels.mean(axis=0, dtype=np.float32)
        scaled = self.scaler.transform(features)
        varying = np.flatnonzero((self.shares > 0) & (self.shares < 1))
        fitted = {int(c): fit_logistic(scaled, labels[:, c], strength) for c in varying}
        self.models = {c: model for c, (model, _) in fitted.items()}
        self.converged = all(converged for _, converged in fitted.values())
        self.parameters = len(fitted) * (features.shape[1] + 1)

    def probabilities(self, features: Floats) -> NDArray[np.float32]:
        """(N, C) features to (N, classes) probabilities."""
        full = np.tile(self.shares, (len(features), 1))
        scaled = self.scaler.transform(features)
        for c, model in self.models.items():
            full[:, c] = model.predict_proba(scaled)[:, 1]
        return full


def fit_logistic(
    features: Floats, labels: NDArray[np.int64], strength: float
) -> tuple[LogisticRegression, bool]:
    """A logistic regression on (N, C) features and (N,) labels, and whether it converged."""
    model = LogisticRegression(C=strength, max_iter=1000, tol=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    return model, not caught


Probe = LinearProbe | MultilabelProbe
