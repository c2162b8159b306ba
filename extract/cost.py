"""What a shard cost, for its commit record."""

from __future__ import annotations

import time
from typing import Any

from satdifuser.extract.compute import Work
from satdifuser.store.device import device_name, gpu_uuid
from satdifuser.store.energy import EnergyMeter


class ShardCost:
    """Wall seconds and energy since it was made, or since the last note.

    Args:
        work: Says on which device.
        metered: Whether its device works for nobody else, so that the device's counters tell of this work.
    """

    def __init__(self, work: Work, metered: bool = True) -> None:
        device, self._batch = work.extractor.backbone.device, work.batch_size
        self._device_name = device_name(device)
        self._meter = EnergyMeter(gpu_uuid(device)) if metered else None
        self._seconds, self._joules = time.monotonic(), 0.0

    def note(self) -> dict[str, Any]:
        """Facts for the commit record; begins anew."""
        now, joules = time.monotonic(), self._meter.joules() if self._meter else None
        note: dict[str, Any] = {
            "seconds": round(now - self._seconds, 3),
            "batch_size": self._batch,
            "device": self._device_name,
        }
        if joules is not None:
            note["joules"], self._joules = round(joules - self._joules, 3), joules
        self._seconds = now
        return note
