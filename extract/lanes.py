"""Two batches at once on a CPU, each with half of the threads.

Threads that share a batch wait for each other at every operation, and for Python between two of them; two
batches do not wait for each other (measured in docs/scale.md). A GPU has its queue for that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from queue import SimpleQueue
from threading import Event
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from satdifuser.extract.features import FeatureExtractor

BLOCKS = (ResnetBlock2D, Transformer2DModel)  # before which U-Net and autoencoder can be stopped


class StoppedError(Exception):
    """Nobody waits for the batch any more."""


class Lanes:
    """Copies of an extractor that share its weights, each for one thread at a time.

    Args:
        extractor: What to copy.
        count: How many.
    """

    def __init__(self, extractor: FeatureExtractor, count: int) -> None:
        self._idle = SimpleQueue[_Lane]()
        for _ in range(count):
            self._idle.put(_Lane(extractor))

    @contextmanager
    def one(self, stop: Event) -> Iterator[FeatureExtractor]:
        """An idle copy, for the length of a `with` block.

        Args:
            stop: Once it is set, the copy goes no further.

        Raises:
            StoppedError: it is set.
        """
        lane = self._idle.get()
        lane.stop = stop
        try:
            lane.check()
            yield lane.extractor
        finally:
            self._idle.put(lane)


class _Lane:
    """One copy, and what stops it."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.stop = Event()
        unet, vae = (_sharing_copy(network) for network in (extractor.backbone.unet, extractor.backbone.vae))
        for module in chain(unet.modules(), vae.modules()):
            if isinstance(module, BLOCKS):
                module.register_forward_pre_hook(self.check)
        backbone = replace(extractor.backbone, unet=unet, vae=vae)
        self.extractor = FeatureExtractor(backbone, extractor.settings, extractor.layers)

    def check(self, *_: Any) -> None:
        if self.stop.is_set():
            raise StoppedError


def _sharing_copy(network: nn.Module) -> nn.Module:
    """A copy with hooks of its own, which holds the same weights."""
    weights = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in weights})
