"""Processes that a process began, as Linux lists them."""

from __future__ import annotations

from pathlib import Path


def children_of(process: int) -> list[int]:
    """Their ids."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(word) for task in tasks for word in task.read_text().split()]


def is_alive(process: int) -> bool:
    """Whether it still runs; one that only waits to be buried does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
