"""Processes that read images, so that they do not share an interpreter with what launches work on a GPU.

Python computes for one thread of a process at a time. A GPU is handed some thousand small operations a batch,
and each of them would wait for the threads that prepare images; so these have processes do it.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from satdifuser.errors import SatDiFuserError, SourceError
from satdifuser.extract.read_tile import Preparation, ReadTile, read_tiles
from satdifuser.extract.settings import SourceSettings
from satdifuser.extract.sources import open_source
from satdifuser.extract.sources.tile import Source, TileRecord
from satdifuser.store.device import cores

if TYPE_CHECKING:
    from satdifuser.extract.job import Job
    from satdifuser.extract.plan import Plan

Process = subprocess.Popen[bytes]
MOST_PROCESSES = 8
CORES_EACH = 2  # one to read; one is for the threads that hash and write
PIPE_BYTES = 256 * 1024  # in fewer turns than by default; users other than root may have 1 MB
PROGRAM = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import serve; serve()"


class Readers:
    """Some processes that read tiles, each for one thread at a time.

    They end when it is closed or nobody holds it any more, and when the process that began them ends.

    Args:
        count: How many.
        source: What each of them opens.
        preparation: How they prepare the tiles.
    """

    def __init__(self, count: int, source: SourceSettings, preparation: Preparation) -> None:
        self.count = count
        self._processes: list[Process] = []
        self._end = weakref.finalize(self, _end, self._processes)  # by itself a Popen keeps its process
        self._idle = SimpleQueue[Process]()
        for _ in range(count):
            process = _start()
            self._processes.append(process)
            _send_to(process, (source, preparation))
            self._idle.put(process)

    def read(self, records: Sequence[TileRecord]) -> list[ReadTile | Exception]:
        """Read some tiles, as `read_tiles` does, in a process that is idle.

        Raises:
            SourceError: the process has ended.
        """
        process = self._idle.get()
        try:
            return _ask(process, records)
        finally:
            self._idle.put(process)  # one that has ended says so again

    def close(self) -> None:
        """End the processes."""
        self._end()


@contextmanager
def started_readers(plan: Plan) -> Iterator[Readers | None]:
    """Start the processes that read for an extraction, and end them; None where threads are to read.

    Starting takes each some seconds; reading waits for that.
    """
    count = processes_wanted(plan.job, plan.source, cores()) if plan.left else 0
    readers = Readers(count, plan.job.source_settings, plan.preparation) if count else None
    try:
        yield readers
    finally:
        if readers:
            readers.close()


def processes_wanted(job: Job, source: Source, cores: int) -> int:
    """How many processes should read for an extraction that has so many CPU cores; 0 where threads should."""
    wanted = job.settings.read_processes
    if wanted == "auto":
        wanted = job.backbone_settings.device.startswith("cuda")
    if not (wanted and source.thread_safe):
        return 0
    if job.settings.read_threads != "auto":
        return job.settings.read_threads
    return max(1, min(MOST_PROCESSES, cores // CORES_EACH))


def _start() -> Process:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, json.dumps(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        process_group=0,  # Ctrl-C is for the process that began it
    )
    assert process.stdout
    with suppress(OSError, AttributeError):  # the user's pipes hold all that they may, or this is no Linux
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return process


def _end(processes: Sequence[Process]) -> None:
    for process in processes:
        process.kill()  # it keeps nothing
        process.communicate()


def _ask(process: Process, records: Sequence[TileRecord]) -> list[ReadTile | Exception]:
    assert process.stdout
    try:
        _send_to(process, records)
        found: list[ReadTile | Exception] = receive(process.stdout)
        return found
    except (EOFError, BrokenPipeError) as error:
        raise SourceError(
            f"tiles {records[0].tile_id} to {records[-1].tile_id}: a process that reads images has ended "
            f"({_ending(process.wait())}); what is committed is kept: run the same command again, if memory "
            "was short with a smaller extract.read_threads, or with extract.read_processes=false"
        ) from error
    except BaseException:
        process.kill()  # the rest of its answer would be taken for the next one
        process.wait()
        raise


def _send_to(process: Process, value: Any) -> None:
    assert process.stdin
    send(process.stdin, value)


def _ending(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}; what it said stands above"


# --- in the process


def serve() -> None:
    """Answer requests on stdin until it ends; what else is printed goes to stderr."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end without a word where nobody waits for the answer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    with suppress(EOFError):
        settings, preparation = receive(requests)
        source = open_source(settings)
        while True:
            found = read_tiles(preparation, source, receive(requests))
            for error in found:
                if isinstance(error, Exception) and not isinstance(error, SatDiFuserError):
                    error.add_note("".join(traceback.format_exception(error)))  # which is not sent with it
            send(answers, found)


# --- between both


def send(pipe: IO[bytes], value: Any) -> None:
    """Send a value; its arrays go as they are, behind their sizes."""
    arrays: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    parts = [memoryview(head), *(array.raw() for array in arrays)]
    pipe.write(struct.pack(f"<{1 + len(parts)}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """Wait for a value that `send` sent.

    Raises:
        EOFError: whoever sends has ended.
    """
    (count,) = struct.unpack("<Q", _receive_bytes(pipe, 8))
    sizes = struct.unpack(f"<{count}Q", _receive_bytes(pipe, 8 * count))
    head, *arrays = [_receive_bytes(pipe, size) for size in sizes]
    return pickle.loads(head, buffers=arrays)


def _receive_bytes(pipe: IO[bytes], size: int) -> memoryview:
    part = np.empty(size, np.uint8)
    if pipe.readinto(part.data) < size:  # type: ignore[attr-defined]
        raise EOFError
    return part.data
