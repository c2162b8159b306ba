"""Checkpoints of a training run, and its log. What is written survives a kill at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any], device: torch.device) -> None:
    """Replace a checkpoint in one step; it says on what kind of device it was made."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state | {"device": device.type}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Read a checkpoint, or None where there is none; other kinds of device draw other random numbers."""
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    begun = state.get("device", "an earlier form of this tool")
    if begun != device.type:
        raise SystemExit(f"{path}: was begun on {begun}; go on there, or choose another --out")
    return state


class Log:
    """Lines of JSON, one per report; a resumed run drops those after its checkpoint."""

    def __init__(self, path: Path, model: str, first_step: int) -> None:
        self.path, self.model = path, model
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines]
        kept = [row for row in rows if row["model"] != model or row["step"] <= first_step]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, **values: float) -> None:
        """Append one line."""
        row = {"model": self.model, "step": step, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)
