"""A store's metadata: written once when the store is created, sealed, and checked whenever it is opened.

The seal is a root attribute: the SHA-256 of every zarr.json, the root's own taken over its bytes with the
64 digits of that very hash set to zero. So one hash more in a file that is there anyway covers every byte
of metadata, and damaged metadata is refused before anything is read by it.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from satdifuser.errors import StoreError
from satdifuser.store.digest import file_digest
from satdifuser.store.files import write_durably
from satdifuser.store.schema import ATTRIBUTE_KEY, FORMAT_VERSION, Attributes

ROOT = "zarr.json"
SEAL_KEY = "sha256"
BLANK = "0" * 64
MAX_METADATA_BYTES = 2 * 1024 * 1024  # of one zarr.json; parsed, it may take twenty times as much
REPLACE = "copy the store anew, or extract it again with --overwrite"


def is_store(path: Path) -> bool:
    """Say whether `path` holds a feature store of any version."""
    try:
        _read_root(path)
    except StoreError:
        return False
    return True


def read_attributes(path: Path) -> Attributes:
    """Read what a store declares about itself.

    Raises:
        StoreError: there is no store, or one of a newer format, or a zarr.json is not as it was created.
    """
    text, attributes = _read_root(path)
    stored = attributes[ATTRIBUTE_KEY]
    version = stored.get("format_version") if isinstance(stored, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreError(
            f"{path}: format version {version} is newer than this software reads ({FORMAT_VERSION}); "
            "update satdifuser"
        )
    _check_seal(path, text, attributes.get(SEAL_KEY))
    try:
        return Attributes.model_validate(stored)
    except ValidationError as error:
        unknown = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
        if unknown:
            raise StoreError(
                f"{path}: declares {'.'.join(map(str, unknown[0]))}, of which this software knows nothing: "
                "it was made by a newer one; update satdifuser"
            ) from error
        places = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise StoreError(f"{path}: its attributes are damaged: {places}; {REPLACE}") from error


def require_current(path: Path, attributes: Attributes) -> None:
    """Refuse to write to a store of an older format.

    Raises:
        StoreError: the store is of another format than this software writes.
    """
    if attributes.format_version != FORMAT_VERSION:
        raise StoreError(
            f"{path}: is of format {attributes.format_version}, which this software reads but does not "
            f"change (it writes {FORMAT_VERSION}); bring it there: `satdifuser store copy {path} -o NEW`"
        )


def seal(path: Path) -> None:
    """Record the SHA-256 of every zarr.json of a store in its root's attributes; the last act of creation."""
    document = json.loads((path / ROOT).read_bytes())
    others = sorted(file for file in path.rglob(ROOT) if file.parent != path)
    digests = {file.relative_to(path).as_posix(): file_digest(file) for file in others}
    document["attributes"][SEAL_KEY] = {ROOT: BLANK} | digests
    blank = json.dumps(document, indent=2)
    write_durably(path / ROOT, blank.replace(BLANK, _digest(blank)).encode())


def _check_seal(path: Path, text: str, recorded: Any) -> None:
    own = recorded.get(ROOT) if isinstance(recorded, dict) else None
    own = own if isinstance(own, str) and re.fullmatch("[0-9a-f]{64}", own) else ""
    if not own or _digest(text.replace(own, BLANK)) != own:
        raise _altered(path, ROOT)
    real = path.resolve()
    for key, digest in recorded.items():
        if not str(key).endswith(ROOT) or not (path / key).resolve().is_relative_to(real):
            raise StoreError(f"{path}: its seal names {key!r}, which is outside of the store; do not use it")
        _check_size(path / key)
        if not (path / key).is_file():
            raise StoreError(f"{path}: {key} is missing; {REPLACE}")
        if key != ROOT and file_digest(path / key) != digest:
            raise _altered(path, key)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _altered(path: Path, key: str) -> StoreError:
    return StoreError(f"{path}: {key} was altered after the store was created (SHA-256 differs); {REPLACE}")


def _check_size(file: Path) -> None:
    """Refuse what would take long or much memory to read; what is not there is found later."""
    if file.exists() and not (file.is_file() and file.stat().st_size <= MAX_METADATA_BYTES):
        raise StoreError(
            f"{file}: is no plain file of at most {MAX_METADATA_BYTES} bytes, as a store's metadata is; "
            "do not use this store"
        )


def _read_root(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of the root's zarr.json, and its attributes with ours among them."""
    if not path.exists():
        raise StoreError(f"{path}: no such store")
    if path.is_file():
        raise StoreError(
            f"{path}: is a file and no feature store; expected the folder of one or a .zip, or, where scenes "
            "are taken, a GeoTIFF whose name ends in .tif or .tiff"
        )
    try:
        _check_size(path / ROOT)
        text = (path / ROOT).read_bytes().decode()
        document = json.loads(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{path}: not a feature store (no {ROOT}); if it was one, copy it anew") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: {ROOT} is damaged ({error}); copy the store anew") from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(attributes, dict) or ATTRIBUTE_KEY not in attributes:
        raise StoreError(
            f"{path}: not a feature store (no {ATTRIBUTE_KEY!r} attributes in its {ROOT}); if it was one, "
            "copy it anew"
        )
    return text, attributes
