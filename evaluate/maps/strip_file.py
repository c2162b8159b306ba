"""What is done of a long result, in a file beside the output: an interrupted run goes on after it.

The result comes in strips of known sizes, in order. A strip counts once all its bytes are there, so whatever
is left of a strip that was being written when the process died is cut off.
"""

from __future__ import annotations

import errno
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from satdifuser.errors import MapError
from satdifuser.store.files import write_durably
from satdifuser.store.schema import canonical_hash


class StripFile:
    """The strips of one output that are done.

    Args:
        out: The output.
        identity: All that shapes the strips; those of another one are deleted.
        sizes: Bytes of each strip.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], sizes: Sequence[int]) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.strips")
        self._note = out.with_name(f".{out.name}.strips.json")
        self._ends = list(accumulate(sizes))
        wanted = canonical_hash(dict(identity))
        try:
            if self._noted() != wanted:
                self.discard()
                write_durably(self._note, json.dumps({"identity": wanted}).encode())
            self._file = self.path.open("ab")
            self.done = bisect_right(self._ends, self._file.tell())
            self._file.truncate(self._ends[self.done - 1] if self.done else 0)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _noted(self) -> str:
        try:
            return str(json.loads(self._note.read_text())["identity"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""

    def append(self, data: bytes) -> None:
        """Add the next strip, durably.

        Raises:
            MapError: it cannot be written, such as on a full disk; those before it are kept.
        """
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.done += 1

    def close(self) -> None:
        """Let go of the file; what is done stays."""
        self._file.close()

    def discard(self) -> None:
        """Delete what is done, when it is in the output or of no use."""
        for file in (self.path, self._note):
            file.unlink(missing_ok=True)


def cannot_write(path: Path, error: Exception) -> MapError:
    """Explain a write that failed."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the disk is full" if full else f"cannot write: {error}"
    mend = "free some space" if full else "mend the cause"
    return MapError(
        f"{path}: {what}; {mend} and run the same command again, which goes on where it can, or choose "
        "another -o"
    )
