"""Where networks and their features are."""

from __future__ import annotations

import torch

from satdifuser.errors import SettingsError


def choose_device(device: str) -> torch.device:
    """``auto`` is a GPU where there is one.

    Raises:
        SettingsError: the device is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"fit.device: {device!r} is not available here: {error}; use auto or cpu"
        ) from error
    return chosen
