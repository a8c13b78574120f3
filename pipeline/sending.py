"""Rows of one array of a part -> its objects, read back.

Each byte is handled while it is in a core's cache: rows are copied into a piece of memory that is used again,
summed as they are laid, digested, and written on by a thread while the next piece fills. So nothing as large
as an object is ever in memory.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from storage_schemas.commits import ObjectDigest
from storage_schemas.errors import DataDamage
from storage_schemas.layout import RowArray, ShardStream, checksum_object
from storage_schemas.objects import Bytes, Objects, ObjectWriter

PIECE_BYTES = 4 << 20
PIECES = 3  # one that fills, one that is written, one between them


class SendingThreads:
    """One thread writes, so that pieces stay in order; one reads back."""

    def __init__(self) -> None:
        self.write = ThreadPoolExecutor(1, thread_name_prefix="put")
        self.check = ThreadPoolExecutor(1, thread_name_prefix="check")

    def close(self) -> None:
        """Wait for what is under way, and drop the rest."""
        for pool in (self.write, self.check):
            pool.shutdown(wait=True, cancel_futures=True)


class ArraySender:
    """Takes an array's rows in order. `objects` are the objects sent so far, each done when it is read back
    and found to be what was sent.
    """

    def __init__(self, store: Objects, folder: str, array: RowArray, threads: SendingThreads) -> None:
        self.objects: list[Future[ObjectDigest]] = []
        self._store, self._folder, self._array, self._threads = store, folder, array, threads
        size = min(PIECE_BYTES, array.object_bytes(0))
        self._memory: deque[Bytes] = deque(np.empty(size, dtype=np.uint8) for _ in range(PIECES))
        self._writes: deque[Future[None]] = deque()
        self._shard = 0
        self._open: ObjectWriter | None = None

    def add(self, values: NDArray[Any]) -> None:
        """The next rows, n ...; what went wrong with earlier ones is raised here or by `objects`."""
        while len(values):
            if self._open is None:
                self._begin()
            count = min(len(values), self._stream.room)
            self._stream.add(values[:count])
            values = values[count:]
            if self._stream.room == 0:
                self._end()

    def _begin(self) -> None:
        self._stream = ShardStream(self._array, self._shard, self._memory[0], self._send)
        self._digest = blake3()
        self._open = self._store.open_writer(f"{self._folder}/{self._stream.path}", self._stream.nbytes)
        self._shard += 1

    def _send(self, piece: Bytes) -> Bytes:
        assert self._open is not None
        self._writes.append(self._threads.write.submit(_write, self._open, self._digest, piece))
        if len(self._writes) == PIECES:
            self._writes.popleft().result()
        self._memory.rotate(-1)
        return self._memory[0]

    def _end(self) -> None:
        writer, self._open = self._open, None
        assert writer is not None
        stream, digest, writes = self._stream, self._digest, tuple(self._writes)

        def finish() -> ObjectDigest:
            try:
                for write in writes:
                    write.result()
                writer.finish()
            finally:
                writer.abort()
            return ObjectDigest(path=stream.path, size=stream.nbytes, blake3=digest.hexdigest())

        finished = self._threads.write.submit(finish)
        self.objects.append(self._threads.check.submit(self._check, finished, stream.checksum))

    def _check(self, finished: Future[ObjectDigest], checksum: int) -> ObjectDigest:
        entry = finished.result()
        path = f"{self._folder}/{entry.path}"
        found = checksum_object(self._store, path)
        if found != (entry.size, checksum):
            raise DataDamage(
                f"object {path!r} read back with {found[0]} bytes, crc32c {found[1]:08x}; "
                f"sent {entry.size}, {checksum:08x}"
            )
        return entry

    def abort(self) -> None:
        """After the threads are closed: leave nothing of an object that is not complete."""
        if self._open is not None:
            self._open.abort()


def _write(writer: ObjectWriter, digest: blake3, piece: Bytes) -> None:
    """In the thread that writes: what fills the pieces has its core to itself."""
    writer.write(piece)
    digest.update(piece)  # type: ignore[arg-type]
