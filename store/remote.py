"""Stores that are no local folders: in a bucket (``s3://``, ``gs://``), on a web server, in a .zip file.

They are read through a local cache: a file is fetched when it is first needed, checked against the size and
digest that the store recorded for it, and kept. So training reads them at the speed of the disk once the
cache is warm. `upload` writes a bucket; what tells the whole from a part, the root's zarr.json, goes last.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

from satdifuser.errors import StoreError, UnreachableError
from satdifuser.store.digest import DigestAlgorithm, file_digest, new_hasher
from satdifuser.store.files import CARD, PARTIAL_SUFFIX
from satdifuser.store.location import Location
from satdifuser.store.metadata import MAX_METADATA_BYTES, ROOT, SEAL_KEY

if TYPE_CHECKING:
    from satdifuser.store.reader import FeatureStore

LOOPBACK = ("localhost", "127.0.0.1", "::1")
RETRY: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
ATTEMPTS = 3  # to fetch a file whole
WORKERS = 8  # files at once
MARKER = ".uploading"  # holds the SHA-256 of the root's zarr.json while a store is being uploaded


class Place(Protocol):
    """Where the files of a store are."""

    def read(self, key: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece; FileNotFoundError where there is none."""

    def sizes(self, keys: Iterable[str]) -> dict[str, int]:
        """The sizes of those of some files that are there."""


@dataclass(frozen=True)
class Recorded:
    """What a store recorded of a file: bytes, and a digest; None where there is no record."""

    size: int | None = None
    digest: str | None = None
    algorithm: DigestAlgorithm = "sha256"

    @property
    def most_bytes(self) -> int:
        """How many bytes it may have."""
        return MAX_METADATA_BYTES if self.size is None else self.size

    def fits(self, file: Path) -> bool:
        """Whether a file is as recorded."""
        whole = self.size in (None, file.stat().st_size)
        return whole and self.digest in (None, file_digest(file, self.algorithm))


UNRECORDED = Recorded()


class Mirror:
    """The local copies of a store's files.

    Args:
        address: Where the store is.
    """

    def __init__(self, address: Location) -> None:
        self.address = address
        self.place: Place = Bucket(address) if isinstance(address, str) else Archive(address)
        self.folder = cache_folder(address)
        self._fetch_metadata()

    def fetch(self, key: str, expected: Recorded = UNRECORDED) -> Path:
        """The local copy of a file, fetched and checked where it is not there yet.

        Args:
            key: Its path in the store.
            expected: What is recorded of it; metadata without a record may be of any reasonable size.

        Raises:
            StoreError: it is missing, other than recorded, or cannot be fetched.
        """
        if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts or "\\" in key:
            raise StoreError(f"{self.address}: names a file outside of the store: {key!r}; do not use it")
        path = self.folder / key
        for attempt in range(1, ATTEMPTS + 1):
            if path.is_file():
                break
            self._try(path, key, expected, last=attempt == ATTEMPTS)
        return path

    def read_text(self, key: str) -> str | None:
        """The text of a small file that no record names; None where there is none."""
        try:
            return b"".join(_at_most(self.place.read(key), MAX_METADATA_BYTES)).decode(errors="replace")
        except (FileNotFoundError, _OtherBytesError):
            return None

    def digest_of(self, key: str, algorithm: DigestAlgorithm) -> str:
        """Digest of a file where the store is, whatever is cached of it."""
        hasher = new_hasher(algorithm)
        for piece in self._pieces(key):
            hasher.update(piece)
        return hasher.hexdigest()

    def fetch_all(self, keys: Iterable[str], fetch: Callable[[str], object]) -> None:
        """Fetch several files at once."""
        with ThreadPoolExecutor(WORKERS, "fetch") as pool:
            for _ in pool.map(fetch, keys):
                pass

    def _try(self, path: Path, key: str, expected: Recorded, last: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
        try:
            with partial.open("wb") as file:
                for piece in _at_most(self._pieces(key), expected.most_bytes):
                    file.write(piece)
            found = partial.stat().st_size
            if not expected.fits(partial):
                raise _OtherBytesError(f"{found} bytes came, of {expected.size or 'any'}; the digest differs")
            partial.replace(path)
        except _OtherBytesError as error:
            if last:
                raise StoreError(
                    f"{self.address}: {key} is not what the store recorded ({error}); it was altered or is "
                    "damaged there: put the store there anew"
                ) from error
        finally:
            partial.unlink(missing_ok=True)

    def _pieces(self, key: str) -> Iterator[bytes]:
        try:
            yield from self.place.read(key)
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.address}: {key} is missing; no store is there, or a part of it was deleted"
            ) from error

    def _fetch_metadata(self) -> None:
        """Make all metadata local; what is cached of another store that was there before is deleted."""
        try:
            text = b"".join(_at_most(self._pieces(ROOT), MAX_METADATA_BYTES))
        except _OtherBytesError as error:
            raise StoreError(f"{self.address}: {ROOT} is {error}; do not use it") from error
        cached = self.folder / ROOT
        if cached.is_file() and cached.read_bytes() != text:
            shutil.rmtree(self.folder)
        self.fetch(ROOT, Recorded(len(text)))
        try:
            sealed = json.loads(text)["attributes"][SEAL_KEY]
            others = {str(key): str(digest) for key, digest in sealed.items() if key != ROOT}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return  # not a store: whoever opens it says what is wrong
        self.fetch_all(others, lambda key: self.fetch(key, Recorded(digest=others[key])))


class _OtherBytesError(Exception):
    """What came is not what is recorded."""


def _at_most(pieces: Iterator[bytes], limit: int) -> Iterator[bytes]:
    count = 0
    for piece in pieces:
        count += len(piece)
        if count > limit:
            raise _OtherBytesError(f"more than {limit} bytes")
        yield piece


def cache_folder(address: Location) -> Path:
    """Where the local copies of a store are: ``$SATDIFUSER_CACHE``, or below ``~/.cache``."""
    root = Path(os.environ.get("SATDIFUSER_CACHE") or Path.home() / ".cache/satdifuser")
    if isinstance(address, Path):
        return root / "zip" / address.resolve().relative_to("/")
    parts = urlsplit(address)
    if ".." in address.split("/"):
        raise StoreError(f"{address}: got '..' in an address, expected the plain one")
    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", "")).netloc if parts.scheme == "s3" else ""
    return root / parts.scheme / endpoint / parts.netloc / parts.path.strip("/")


# --- places


class Bucket:
    """A folder of an object store or a web server, through the obstore library.

    Credentials come from the usual environment variables (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL`` …).
    Server errors, time-outs and lost connections are tried again with growing pauses.
    """

    def __init__(self, address: str) -> None:
        from obstore.store import from_url

        self.address = address
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "") if address.startswith("s3:") else address
        plain = address.startswith("http:") or urlsplit(endpoint).hostname in LOOPBACK
        with self._explained("its address"):
            self.store: Any = from_url(
                address,
                client_options={"allow_http": plain, "timeout": "60s", "connect_timeout": "10s"},
                retry_config=RETRY,
            )

    def read(self, key: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece."""
        import obstore

        with self._explained(key):
            for piece in obstore.get(self.store, key):
                yield bytes(piece)

    def write(self, key: str, source: Path | bytes) -> None:
        """Put a file there."""
        import obstore

        with self._explained(key):
            obstore.put(self.store, key, source)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete files."""
        import obstore

        with self._explained("its files"):
            obstore.delete(self.store, list(keys))

    def sizes(self, keys: Iterable[str]) -> dict[str, int]:
        """The sizes of those of some files that are there; a web server is asked for each."""
        if urlsplit(self.address).scheme not in ("http", "https"):
            return self.all_sizes()
        asked = list(keys)
        with ThreadPoolExecutor(WORKERS, "size") as pool:
            pairs = zip(asked, pool.map(self._size, asked), strict=True)
            return {key: size for key, size in pairs if size is not None}

    def _size(self, key: str) -> int | None:
        import obstore

        try:
            with self._explained(key):
                return int(obstore.head(self.store, key)["size"])
        except FileNotFoundError:
            return None

    def all_sizes(self) -> dict[str, int]:
        """Every file's size in a bucket."""
        import obstore

        with self._explained("its list of files"):
            return {entry["path"]: entry["size"] for page in obstore.list(self.store) for entry in page}

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        from obstore.exceptions import BaseError, NotFoundError

        try:
            yield
        except (NotFoundError, FileNotFoundError) as error:
            raise FileNotFoundError(what) from error
        except (BaseError, OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise UnreachableError(
                f"{self.address}: {what} cannot be reached ({reason}); check the address, the credentials in "
                "the environment and the connection, then run the same command again"
            ) from error


BAD_MEMBER = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)


class Archive:
    """A .zip file that holds a store, at its top or in its one folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._members = {info.filename: info for info in zipfile.ZipFile(path).infolist()}
        except (zipfile.BadZipFile, OSError) as error:
            raise StoreError(f"{path}: not a readable .zip file ({error})") from error
        tops = [name.removesuffix(ROOT) for name in self._members if PurePosixPath(name).name == ROOT]
        self._top = min(tops, key=len, default="")

    def read(self, key: str) -> Iterator[bytes]:
        """The bytes of a member, piece by piece."""
        name = self._top + key
        if name not in self._members:
            raise FileNotFoundError(key)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(name) as member:
                while piece := member.read(1 << 20):
                    yield piece
        except (*BAD_MEMBER, OSError) as error:
            raise StoreError(f"{self.path}: {name} cannot be read ({error}); copy the file anew") from error

    def sizes(self, keys: Iterable[str]) -> dict[str, int]:
        """Every member's size."""
        return {name.removeprefix(self._top): info.file_size for name, info in self._members.items()}


# --- writing


def upload(store: FeatureStore, address: str, overwrite: bool = False) -> None:
    """Copy a complete local store as it is to a bucket; goes on where it was interrupted.

    Raises:
        StoreError: the store is incomplete or damaged, another one is there, or the place takes no files.
    """
    if urlsplit(address).scheme in ("http", "https"):
        raise StoreError(f"{address}: web servers are read only; upload to s3:// or gs://")
    store.require_complete()
    bucket = Bucket(address)
    there = bucket.all_sizes()
    identity = file_digest(store.folder / ROOT)
    if not _same_store(bucket, there, identity):
        if there and not overwrite:
            raise StoreError(
                f"{address}: holds something else; choose another address, or replace it with --overwrite"
            )
        if there:
            bucket.delete(sorted(there, key=lambda key: key != ROOT))  # from here on it is no store any more
            there = {}
        bucket.write(MARKER, identity.encode())
    _put_files(store, bucket, there)
    bucket.write(ROOT, store.folder / ROOT)
    bucket.delete([MARKER])


def _same_store(bucket: Bucket, there: dict[str, int], identity: str) -> bool:
    """Whether this very store is there, or the part of it that an interrupted upload left."""
    if ROOT in there:
        return hashlib.sha256(b"".join(bucket.read(ROOT))).hexdigest() == identity
    return MARKER in there and b"".join(bucket.read(MARKER)) == identity.encode()


def _put_files(store: FeatureStore, bucket: Bucket, there: dict[str, int]) -> None:
    """Put all files but the root's: data, then commit records and metadata."""
    recorded = store.recorded_files()
    others = [path.relative_to(store.folder).as_posix() for path in store.folder.rglob("zarr.json")]
    others += [CARD] if (store.folder / CARD).is_file() else []
    commits = [f"commits/c/{shard}" for shard in range(store.attributes.shards)]
    keys = [*recorded, *commits, *(key for key in others if key != ROOT)]
    todo = [key for key in keys if there.get(key) != (store.folder / key).stat().st_size]

    def put(key: str) -> None:
        path = store.folder / key
        if key in recorded and store.digest_of(key) != recorded[key][1]:
            raise StoreError(
                f"{store.path}: {key} was altered (its digest differs); see `satdifuser store verify --deep`"
            )
        bucket.write(key, path)

    with ThreadPoolExecutor(WORKERS, "upload") as pool:
        for _ in tqdm(pool.map(put, todo), total=len(todo), desc="upload", unit="file", disable=None):
            pass
