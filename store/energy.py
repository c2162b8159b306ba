"""What a piece of work cost in energy, where the machine shows it.

A GPU counts its own (NVML, through the package nvidia-ml-py if it is installed); Intel and AMD CPUs count
that of each package (RAPL in Linux's powercap, on most systems for root alone).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
EnergyCounter = Callable[[], float]  # joules, ever growing


class EnergyMeter:
    """Joules used since it was made.

    Args:
        gpu: The UUID of the GPU that does the work; None for the CPU.
    """

    def __init__(self, gpu: str | None = None) -> None:
        self._counters = gpu_counters(gpu) if gpu else cpu_counters()
        self._begun = [counter() for counter in self._counters]

    def joules(self) -> float | None:
        """What the counters show; None where there are none."""
        if not self._counters:
            return None
        return sum(counter() - begun for counter, begun in zip(self._counters, self._begun, strict=True))


def gpu_counters(uuid: str) -> list[EnergyCounter]:
    """The energy counter of a GPU; none where NVML is not installed or the GPU has none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # NVML's own errors are of a class of the package that may be missing
        return []
    return [lambda: float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000]


def cpu_counters(root: Path = POWERCAP) -> list[EnergyCounter]:
    """The energy counters of the CPU's packages; none where they cannot be read."""
    counters: list[EnergyCounter] = []
    for zone in sorted(root.glob("intel-rapl:*")):
        if zone.name.count(":") > 1:  # part of a package
            continue
        try:
            counters.append(_Package(zone).joules)
        except (OSError, ValueError):
            return []
    return counters


class _Package:
    """A CPU package's counter, which starts anew whenever it is full."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last, self._total = self._read(), 0

    def _read(self) -> int:
        return int(self._file.read_text())

    def joules(self) -> float:
        """Microjoules since it was opened, added up, in joules."""
        now = self._read()
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / 1e6


def total_cost(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What all shards of a store cost together, from their commit records.

    Returns:
        ``device_seconds`` and ``joules`` (each None unless every shard tells), ``devices``: shards by device.
    """
    told = [record for record in records if record]
    return {
        "device_seconds": sum_if_all_tell([record.get("device_seconds") for record in told]),
        "joules": sum_if_all_tell([record.get("joules") for record in told]),
        "devices": dict(Counter(str(record.get("device", "unknown")) for record in told)),
    }


def sum_if_all_tell(values: Sequence[float | None]) -> float | None:
    """A sum that does not pass for the whole where a part is unknown; None then, and for nothing."""
    known = [value for value in values if value is not None]
    return round(sum(known), 3) if known and len(known) == len(values) else None


def cost_text(cost: Mapping[str, Any]) -> str:
    """What `total_cost` found, in words."""
    if cost["device_seconds"] is None:
        return "not recorded of every shard (copied, merged, grown, or of an older version)"
    joules = cost["joules"]
    energy = "energy not shown there" if joules is None else f"{joules:,.1f} J"
    return f"{cost['device_seconds']:,.1f} device seconds on {', '.join(cost['devices'])}; {energy}"
