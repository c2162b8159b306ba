"""Where a store may be: in a local folder, in a .zip file, or at an address."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

Location = Path | str  # a local folder or .zip file, or an address
SCHEMES = ("s3", "gs", "http", "https")


def location(text: str) -> Location:
    """What a user's text stands for: an address as it is, else a path."""
    return text.rstrip("/") if urlsplit(text).scheme in SCHEMES else Path(text)


def is_remote(place: Location) -> bool:
    """Whether a store there is read through the local cache."""
    return isinstance(place, str) or (place.suffix == ".zip" and place.is_file())
