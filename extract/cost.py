"""What a shard cost, for its commit record."""

from __future__ import annotations

import time
from threading import Lock
from typing import Any, NamedTuple

from satdifuser.extract.compute import Work
from satdifuser.store.device import device_name, gpu_uuid
from satdifuser.store.energy import EnergyMeter


class Reading(NamedTuple):
    """What clock and energy counter show; neither ever goes back."""

    seconds: float
    joules: float  # 0 where the machine does not tell


class ShardCost:
    """Wall seconds and energy since it was made, or since the last note: no two shards share any.

    Args:
        work: Says on which device.
        metered: Whether its device works for nobody else, so that the device's counters tell of this work.
    """

    def __init__(self, work: Work, metered: bool = True) -> None:
        device, self._batch = work.extractor.backbone.device, work.batch_size
        self._device_name = device_name(device)
        self._meter = EnergyMeter(gpu_uuid(device)) if metered else None
        self._tells_energy = self._meter is not None and self._meter.joules() is not None
        self._last, self._lock = self.read(), Lock()

    def read(self) -> Reading:
        """What clock and counter show now."""
        return Reading(time.monotonic(), (self._meter and self._meter.joules()) or 0.0)

    def note(self, begun: Reading | None = None) -> dict[str, Any]:
        """Facts for the commit record; begins anew.

        Args:
            begun: When work on the shard began, if nothing was done between the last note and that.
        """
        with self._lock:
            now, last = self.read(), self._last
            self._last = now
        since = last if begun is None else Reading(*map(max, begun, last))
        note: dict[str, Any] = {
            "seconds": round(now.seconds - since.seconds, 3),
            "batch_size": self._batch,
            "device": self._device_name,
        }
        if self._tells_energy:
            note["joules"] = round(now.joules - since.joules, 3)
        return note
