"""One case recorded from the reference implementation, as `check_parity.py` and its parts read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WITH_WEIGHT = " and weight"  # ends the name of a bias that is compared together with its weight

Pairs = Iterator[tuple[str, Any]]
"""Names of recorded arrays, with our own value for each."""


class UnknownCaseError(Exception):
    """A case that this tool cannot rebuild."""


@dataclass(frozen=True)
class Case:
    """One recorded case."""

    root: Path
    path: Path
    info: dict[str, Any]
    arrays: dict[str, NDArray[Any]]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name]))

    def state(self) -> dict[str, Tensor]:
        return {key[6:]: self.tensor(key) for key in self.arrays if key.startswith("state/")}


def read_case(root: Path, path: Path) -> Case:
    info = json.loads(path.read_text()) if path.suffix == ".json" else {}
    npz = path.with_name(info["npz"]) if "npz" in info else path.with_suffix(".npz")
    arrays: dict[str, NDArray[Any]] = {}
    if npz.is_file():
        with np.load(npz) as held:  # NumPy's default refuses pickled arrays
            arrays = {name: held[name] for name in held.files}
    return Case(root, path, info, arrays)
