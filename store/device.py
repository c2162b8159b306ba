"""The device that a setting names; torch is loaded when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from satdifuser.errors import SettingsError

if TYPE_CHECKING:
    import torch


def choose_device(device: str, setting: str) -> torch.device:
    """Choose the device: ``auto`` is a GPU where there is one.

    Args:
        device: ``auto``, or one of torch's names.
        setting: What names it, for the message.

    Raises:
        SettingsError: the device is not there.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        problem = f"{setting}: {device!r} is not available here: {error}; use auto or cpu"
        raise SettingsError(problem) from error
    return chosen
