"""Rows of one array of a part -> its objects, read back.

Rows are summed, digested and written straight from the memory that they come in, by one thread; another makes
each object last and reads it back while the next one fills.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from storage_schemas.commits import ObjectDigest, digest_object
from storage_schemas.errors import DataDamage
from storage_schemas.layout import RowArray, crc32c, row_checksum, shard_index
from storage_schemas.objects import Bytes, Objects

# Of rows, written by one call: few enough that what was summed is still in a cache, and many enough that the
# page cache keeps them in large pieces, which are read faster.
STEP_BYTES = 4 << 20
AHEAD = 2  # calls of `add` whose rows may wait for the threads


class SendingThreads:
    """One writes, so that bytes stay in order; one checks."""

    def __init__(self) -> None:
        self.write = ThreadPoolExecutor(1, thread_name_prefix="put")
        self.check = ThreadPoolExecutor(1, thread_name_prefix="check")

    def close(self) -> None:
        """Wait for what is under way, and drop the rest."""
        for pool in (self.write, self.check):
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
        self._digest = xxh3_128()
        self._steps: list[Future[None]] = []

    def add(self, rows: Bytes, threads: SendingThreads) -> Future[None]:
        """The next rows, n bytes; done when their memory is free."""
        self._steps.append(threads.write.submit(self._write_rows, rows))
        return self._steps[-1]

    def end(self, threads: SendingThreads) -> Future[ObjectDigest]:
        """After the last row."""
        self._steps.append(threads.write.submit(self._write, [self._index]))
        return threads.check.submit(self._finish)

    def _write_rows(self, rows: Bytes) -> None:
        pieces = []
        for row in rows:
            self._checksums.append(row_checksum(row))
            pieces += [row, np.array([crc32c(row)], dtype="<u4").view(np.uint8)]
        self._write(pieces)

    def _write(self, pieces: list[Bytes]) -> None:
        for piece in pieces:
            self._digest.update(piece)  # type: ignore[arg-type]
        self.writer.write(pieces)

    def _finish(self) -> ObjectDigest:
        for step in self._steps:
            step.result()
        self.writer.finish()
        path = f"{self._folder}/{self._path}"
        sent, found = (self._size, self._digest.hexdigest()), digest_object(self._store, path)
        if found != sent:
            raise DataDamage(
                f"object {path!r} read back with {found[0]} bytes, xxh3_128 {found[1]}; "
                f"sent {sent[0]}, {sent[1]}"
            )
        return ObjectDigest(path=self._path, size=self._size, xxh3_128=sent[1])
