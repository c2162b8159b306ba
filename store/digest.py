"""Digests that tell data apart: BLAKE3, or SHA-256 in stores that were made before.

SHA-256 takes most of the time of writing where a processor has no instructions for it. Metadata and labels
are small, weights are read once: their digests are SHA-256 everywhere.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, Protocol

from blake3 import blake3

DigestAlgorithm = Literal["sha256", "blake3"]
CURRENT: DigestAlgorithm = "blake3"  # of new stores


class Hasher(Protocol):
    """What takes bytes, piece by piece, and tells their digest."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take some bytes, a view of them one-dimensional and of unsigned bytes."""

    def hexdigest(self) -> str:
        """The digest of all bytes so far, 64 hexadecimal digits."""


def new_hasher(algorithm: DigestAlgorithm) -> Hasher:
    """Begin a digest."""
    return blake3() if algorithm == "blake3" else hashlib.sha256()


def digest_of(data: bytes, algorithm: DigestAlgorithm) -> str:
    """The digest of some bytes."""
    hasher = new_hasher(algorithm)
    hasher.update(data)
    return hasher.hexdigest()


def file_digest(path: Path, algorithm: DigestAlgorithm = "sha256") -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        hasher: Any = new_hasher(algorithm)
        return hashlib.file_digest(file, lambda: hasher).hexdigest()
