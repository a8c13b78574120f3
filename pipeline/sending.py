"""Rows of one array of a part -> its objects, read back.

Rows are summed and written straight from the memory that they come in, by one thread, digested by a second
behind it, and each object is made to last and read back by a third while the next one fills.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from storage_schemas.commits import ObjectDigest
from storage_schemas.errors import DataDamage
from storage_schemas.layout import (
    RowArray,
    checksum_object,
    crc32c,
    join_crc32c,
    row_checksum,
    shard_index,
)
from storage_schemas.objects import Bytes, Objects

STEP_BYTES = 1 << 20  # of rows, so that what was summed is still in a cache when it is written and digested
AHEAD = 2  # calls of `add` whose rows may wait for the threads


class SendingThreads:
    """One of each, so that bytes stay in order."""

    def __init__(self) -> None:
        self.write = ThreadPoolExecutor(1, thread_name_prefix="put")
        self.digest = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self.check = ThreadPoolExecutor(1, thread_name_prefix="check")

    def close(self) -> None:
        """Wait for what is under way, and drop the rest."""
        for pool in (self.write, self.digest, self.check):
            pool.shutdown(wait=True, cancel_futures=True)


class ArraySender:
    """Takes an array's rows in order. `objects` are the objects sent so far, each done when it is read back
    and found to be what was sent; then `checksums` has those of its rows.
    """

    def __init__(self, store: Objects, folder: str, array: RowArray, threads: SendingThreads) -> None:
        self.objects: list[Future[ObjectDigest]] = []
        self.checksums: list[int] = []
        self._store, self._folder, self._array, self._threads = store, folder, array, threads
        self._sent: list[_SentObject] = []
        self._room = 0  # rows that the last of them still takes
        self._waiting: deque[list[Future[None]]] = deque()

    def add(self, values: NDArray[Any]) -> None:
        """The next rows, n ..., which nobody may change from now on; what went wrong with earlier ones is
        raised here or by `objects`.
        """
        dtype = np.dtype(self._array.dtype).newbyteorder("<")
        rows = np.ascontiguousarray(values, dtype=dtype).reshape(len(values), -1).view(np.uint8)
        step = max(1, STEP_BYTES // self._array.row_bytes)
        steps: list[Future[None]] = []
        while len(rows):
            if self._room == 0:
                shard = len(self._sent)
                self._sent.append(_SentObject(self._store, self._folder, self._array, shard, self.checksums))
                self._room = self._array.rows_in(shard)
            count = min(step, self._room, len(rows))
            steps.append(self._sent[-1].add(rows[:count], self._threads))
            rows, self._room = rows[count:], self._room - count
            if self._room == 0:
                self.objects.append(self._sent[-1].end(self._threads))
        self._waiting.append(steps)
        if len(self._waiting) > AHEAD:
            for done in self._waiting.popleft():
                done.result()

    def abort(self) -> None:
        """After the threads are closed: leave nothing of an object that is not complete."""
        for sent in self._sent:
            sent.writer.abort()


class _SentObject:
    """One object of an array on its way; adds the checksums of its rows to `checksums`."""

    def __init__(
        self, store: Objects, folder: str, array: RowArray, shard: int, checksums: list[int]
    ) -> None:
        self.writer = store.open_writer(f"{folder}/{array.object_path(shard)}")
        self._store, self._folder = store, folder
        self._path, self._size = array.object_path(shard), array.object_bytes(shard)
        self._index = shard_index(array, shard)
        self._checksums = checksums
        self._crc = 0  # of all of it, put together from those of its rows
        self._digest = blake3()
        self._steps: list[Future[None]] = []

    def add(self, rows: Bytes, threads: SendingThreads) -> Future[None]:
        """The next rows, n bytes; done when their memory is free."""
        return self._send(lambda: [piece for row in rows for piece in self._sum(row)], threads)

    def end(self, threads: SendingThreads) -> Future[ObjectDigest]:
        """After the last row."""
        self._send(self._sum_index, threads)
        return threads.check.submit(self._finish)

    def _sum(self, row: Bytes) -> tuple[Bytes, Bytes]:
        self._checksums.append(row_checksum(row))
        found = crc32c(row)
        trailer = np.array([found], dtype="<u4").view(np.uint8)
        self._crc = crc32c(trailer, join_crc32c(self._crc, found, len(row)))
        return row, trailer

    def _sum_index(self) -> list[Bytes]:
        self._crc = crc32c(self._index, self._crc)
        return [self._index]

    def _send(self, sum_up: Callable[[], list[Bytes]], threads: SendingThreads) -> Future[None]:
        def write() -> list[Bytes]:
            pieces = sum_up()
            self.writer.write(pieces)
            return pieces

        def update(written: Future[list[Bytes]]) -> None:
            for piece in written.result():
                self._digest.update(piece)  # type: ignore[arg-type]

        self._steps.append(threads.digest.submit(update, threads.write.submit(write)))
        return self._steps[-1]

    def _finish(self) -> ObjectDigest:
        for step in self._steps:
            step.result()
        self.writer.finish()
        path = f"{self._folder}/{self._path}"
        found = checksum_object(self._store, path)
        if found != (self._size, self._crc):
            raise DataDamage(
                f"object {path!r} read back with {found[0]} bytes, crc32c {found[1]:08x}; "
                f"sent {self._size}, {self._crc:08x}"
            )
        return ObjectDigest(path=self._path, size=self._size, blake3=self._digest.hexdigest())
