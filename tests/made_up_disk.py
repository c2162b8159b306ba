"""A disk that remembers what was done to it, to show what a power cut at any moment may leave.

What a file system promises, and no more: a file's bytes are kept once it is synced, a change of a name
(created, renamed, deleted) once the folder is. Anything else may be lost on its own, in any order.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LOSSES = ("names", "bytes", "some")
Event = tuple[str, Path, Any]  # what, where below the root, bytes or the new name


class Recorder:
    """Takes the place of what changes names, and of fsync; ``events`` lists in order what was done.

    One thread at a time does something and notes it, so that several do not note in another order.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[Event] = []
        self._alone = threading.Lock()

    def note(self, what: str, path: Path, detail: Any = None) -> None:
        if path.is_relative_to(self.root):
            self.events.append((what, path.relative_to(self.root), detail))

    def note_bytes(self, path: Path) -> None:
        """What a file holds, where that is not known yet."""
        if path.is_file() and path.is_relative_to(self.root):
            known = [e[2] for e in self.events if e[:2] == ("file", path.relative_to(self.root))]
            if known[-1:] != [path.read_bytes()]:
                self.note("file", path, path.read_bytes())

    def fsync(self, descriptor: int) -> None:
        path = place_of(descriptor)
        with self._alone:
            self.note_bytes(path)
            self.note("sync", path)

    def renaming(self, do: Callable[..., None]) -> Callable[[Any, Any], None]:
        def noted(old: Any, new: Any) -> None:
            with self._alone:
                self.note_bytes(Path(old))
                do(old, new)
                self.note("rename", Path(old), Path(new).relative_to(self.root))

        return noted

    def noting(self, do: Callable[..., None]) -> Callable[..., None]:
        def noted(path: Any, *rest: Any, dir_fd: int | None = None) -> None:
            above = Path() if dir_fd is None else place_of(dir_fd)
            with self._alone:
                do(path, *rest, dir_fd=dir_fd)
                self.note(do.__name__, above / path)

        return noted


def place_of(descriptor: int) -> Path:
    return Path(f"/proc/self/fd/{descriptor}").readlink()


def record(root: Path, patch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[Event]:
    """Do something below `root` and list, in order, what it did to files and folders."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("/proc/self/fd is not here: the synced files cannot be named")
    recorder = Recorder(root)
    with patch.context() as inside:
        inside.setattr(os, "fsync", recorder.fsync)
        for name in ("rename", "replace"):
            inside.setattr(os, name, recorder.renaming(getattr(os, name)))
        for name in ("mkdir", "unlink", "rmdir"):
            inside.setattr(os, name, recorder.noting(getattr(os, name)))
        act()
    return recorder.events


def replay(events: list[Event], root: Path, lost: Callable[[], bool], left: Callable[[bytes], bytes]) -> None:
    """Do to `root` what was recorded, and cut the power.

    Args:
        events: The recording, or its beginning.
        root: A folder in the state in which the recorded one was before.
        lost: Asked for each change of a name whose folder was not synced afterwards.
        left: What is left of the bytes of a file that was not synced.
    """
    synced = {path: when for when, (what, path, _) in enumerate(events) if what == "sync"}
    still: dict[Path, Path] = {}  # new name of a folder to the one it still has
    for when, (what, path, detail) in enumerate(events):
        target = root / _real(path, still)
        if synced.get(path.parent, -1) < when and what != "sync" and lost():
            if what == "rename" and target.is_dir():
                still[detail] = path
            continue
        if what == "file" and synced.get(path, -1) < when:
            detail = left(detail)
        with contextlib.suppress(OSError):  # what it would have changed was lost before
            _do(what, target, root / _real(detail, still) if what == "rename" else detail)


def _real(path: Path, still: dict[Path, Path]) -> Path:
    """Where something is, if the folder above it still has its former name."""
    for new, old in still.items():
        if path.is_relative_to(new):
            return old / path.relative_to(new)
    return path


def _do(what: str, path: Path, detail: Any) -> None:
    if what == "file":
        path.write_bytes(detail)
    elif what == "rename":
        path.replace(detail)
    elif what == "mkdir":
        path.mkdir()
    elif what == "unlink":
        path.unlink()
    elif what == "rmdir":
        shutil.rmtree(path)  # names below it whose loss would keep it


def power_cut(kind: str, seed: int) -> tuple[Callable[[], bool], Callable[[bytes], bytes]]:
    """How much is lost of what may be: all ``names``, all ``bytes``, or ``some`` of both."""
    random = np.random.default_rng(seed)
    if kind == "names":
        return lambda: True, lambda data: data
    if kind == "bytes":
        return lambda: False, lambda data: b""
    return lambda: bool(random.integers(2)), lambda data: data[: int(random.integers(len(data) + 1))]
