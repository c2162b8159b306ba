"""A fitted network at work: the stored arrays of some tiles in, logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from satdifuser.errors import RunError
from satdifuser.fuse.data import Standard, as_feature_maps, decode, to_tensors
from satdifuser.fuse.inputs import Statistics, whole_inputs
from satdifuser.fuse.run_folder import Run
from satdifuser.fuse.run_network import load_network
from satdifuser.store.reader import Stored
from satdifuser.store.schema import LayerInfo, differing_fields, group_layers

# What of a feature's identity shapes no more than its last bits
LAST_BITS = ("device", "batch_size", "threads", "compile", "overflow", "encoded_from")
OWN_TO_IMAGES = ("bands", "scale", "offset")  # how the values of other images become RGB


class Predictor:
    """The network of a run.

    Args:
        run: A fitted fusion.

    Raises:
        RunError: the run is a baseline or waits for a store, or its weights are damaged.
    """

    def __init__(self, run: Run) -> None:
        if run.info["kind"] != "fusion":
            raise RunError(
                f"{run.path}: holds no fitted fusion (its kind is {run.info['kind']}); name a run of "
                "`satdifuser fit`, or first `satdifuser evaluate` an imported one on a store"
            )
        self.run, self.layers = run, run.layers
        self._inputs = whole_inputs(run.info["timesteps"], self.layers)
        self.classes: list[str] = run.info["classes"]
        self.task: str = run.info["task"]
        self.network, statistics, _ = load_network(run)
        self.device = next(self.network.parameters()).device
        self._standard = Standard(_renamed(statistics, self.layers), self.device) if statistics else None

    @property
    def identity(self) -> dict[str, Any]:
        """All that shaped the features that the network was fitted on.

        Raises:
            RunError: the run does not tell.
        """
        if "feature_identity" not in self.run.info:
            raise RunError(
                f"{self.run.path}: an older satdifuser made it, and it does not say how its features were "
                "made; fit it again"
            )
        return dict(self.run.info["feature_identity"])

    @property
    def tile_size(self) -> tuple[int, int]:
        """(H, W) px of the tiles that the network was fitted on."""
        height, width = self.identity["images"]["tile_size"]
        return int(height), int(width)

    def require_features(self, identity: Mapping[str, Any], where: str) -> None:
        """Refuse features that are made in another way than those that the network was fitted on.

        Args:
            identity: All that shapes them, see `satdifuser.extract.job.feature_identity`.
            where: What holds or makes them, for the message.

        Raises:
            RunError: naming what differs.
        """
        fields = differing_fields(
            _shaping(identity), _shaping(self.identity), "the run expects", "here it is"
        )
        if fields:
            raise RunError(
                f"{where}: its features are not made as those that {self.run.path} was fitted on:\n  "
                + "\n  ".join(fields)
            )

    @torch.no_grad()
    def logits(self, stored: Stored, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
        """Logits of some tiles.

        Args:
            stored: Their features as a store of just the run's timesteps and layers keeps them: group to
                array to (B, T, L, …).
            size: (H, W) px of the tiles, where every pixel has a class.

        Returns:
            (B, classes) or (B, classes, H, W) float32.
        """
        maps = decode(self.layers, to_tensors(stored, self.device))
        laid_out = as_feature_maps(self.layers, maps, self._standard, self._inputs)
        logits, _ = self.network(laid_out, size)
        found: NDArray[np.float32] = logits.float().cpu().numpy()
        return found

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities of logits (classes along the second axis): each by itself in a multilabel task."""
        if self.task == "multilabel":
            return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), np.float32)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def _shaping(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What of a feature's identity must be the same wherever a network is used."""
    kept = {name: value for name, value in identity.items() if name not in LAST_BITS}
    images = {name: value for name, value in identity["images"].items() if name not in OWN_TO_IMAGES}
    return kept | {"images": images}


def _renamed(statistics: Statistics, layers: Sequence[LayerInfo]) -> Statistics:
    """Statistics by the names that groups have among these layers alone; a store of more may name others."""
    found = {(name.split("_c")[0], pair[0].shape[-1]): pair for name, pair in statistics.items()}
    own = {name: layers[held[0]] for name, held in group_layers(layers).items()}
    return {name: found[f"stride_{layer.stride:02d}", layer.channels] for name, layer in own.items()}
