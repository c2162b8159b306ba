"""How busy a GPU is while something runs on it."""

from __future__ import annotations

import statistics
from threading import Event, Thread
from typing import Any

import torch

SAMPLE_SECONDS = 0.1  # between two looks at a GPU


class GpuWatch:
    """Looks at a GPU every now and then while a `with` block lasts; at nothing where there is none.

    Utilisation and power are told by NVML (package nvidia-ml-py), which is optional.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._nvml, self._handle = device, None, None
        self._problem = "no time to look"
        self.forget()
        if device.type == "cuda":
            self._open()

    def _open(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(self._device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
        except Exception as error:  # NVML's own errors are of a class of the package that may be missing
            self._problem = str(error)

    def forget(self) -> None:
        """Begin anew."""
        self._peak, self._samples = 0, list[tuple[float, float]]()  # bytes; (%, W)

    def __enter__(self) -> GpuWatch:
        self._over = Event()
        self._thread = Thread(target=self._look, name="gpu", daemon=True)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._over.set()
            self._thread.join()
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))

    def _look(self) -> None:
        nvml: Any = self._nvml
        try:
            while nvml and not self._over.wait(SAMPLE_SECONDS):
                used = nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
                self._samples.append((used, nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000))
        except Exception as error:  # as above
            self._nvml, self._problem = None, str(error)

    def describe(self) -> str:
        """Peak memory, and the means of what was seen."""
        peak = f"peak memory {self._peak / 1e9:.1f} GB"
        if not self._nvml or not self._samples:
            return f"{peak}; driver, utilisation and power unknown ({self._problem})"
        used, power = map(statistics.mean, zip(*self._samples, strict=True))
        driver = self._nvml.nvmlSystemGetDriverVersion()
        return f"{peak}, utilisation {used:.0f} %, power {power:.0f} W, driver {driver}"
