"""In which order views are seen: a pure function of (rows of each shard, seed, position), never stored.

A block shuffle. Every shard is cut into blocks of contiguous rows; an epoch permutes all blocks, takes them a
window at a time, and permutes the rows within each window. Reads thus stay within a few runs of contiguous
rows, and no list of all rows is ever built. The stream of views goes on over epochs, and a position in it is
one integer, so any number of ranks or a resumed run sees the same global batches.

Permutations sort raw Philox words, a stream that NumPy promises to keep; for `permutation` it makes no such
promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from storage_schemas.errors import UserError

Integers = npt.NDArray[np.int64]


class _Epoch(NamedTuple):
    blocks: Integers  # the permuted blocks
    window_starts: Integers  # position within the epoch at which each window starts


class ViewOrder:
    """The order of views over all epochs; `len` is one epoch.

    rows_per_shard: views of each shard, in the order of the shards.
    block_rows: contiguous rows of a shard that stay together in one window; a shard's last block may be
    shorter.
    window_blocks: blocks whose rows are mixed.
    """

    def __init__(
        self, rows_per_shard: Sequence[int], seed: int, block_rows: int = 256, window_blocks: int = 16
    ) -> None:
        if block_rows < 1 or window_blocks < 1:
            raise UserError(f"block_rows {block_rows} and window_blocks {window_blocks} must be at least 1")
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed} must be at least 0 and less than 2**64")
        rows = np.asarray(rows_per_shard, dtype=np.int64)
        if not rows.sum():
            raise UserError("rows_per_shard holds no views: nothing to order")
        assert (rows >= 0).all()
        blocks = -(-rows // block_rows)
        self._rows, self._seed, self._block_rows, self._window_blocks = rows, seed, block_rows, window_blocks
        self._block_shard = np.repeat(np.arange(len(rows)), blocks)
        self._first_block = np.cumsum(blocks) - blocks  # of each shard
        self._length = int(rows.sum())
        self._epoch = lru_cache(maxsize=2)(self._shuffle_blocks)
        self._window = lru_cache(maxsize=4)(self._shuffle_rows)

    def __len__(self) -> int:
        return self._length

    def at(self, position: int) -> tuple[int, int]:
        """(shard index, row) at `position` of the stream; epoch position // len."""
        shard, row = self.take(position, 1)[0]
        return int(shard), int(row)

    def take(self, start: int, count: int) -> Integers:
        """Positions [start, start + count) of the stream: (count, 2), shard index and row."""
        assert start >= 0
        pieces = [np.empty((0, 2), np.int64)]
        position, end = start, start + count
        while position < end:
            epoch, offset = divmod(position, len(self))
            starts = self._epoch(epoch).window_starts
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            skip = offset - int(starts[window])
            pieces.append(self._window(epoch, window)[skip : skip + end - position])
            position += len(pieces[-1])
        return np.concatenate(pieces)

    def _shuffle_blocks(self, epoch: int) -> _Epoch:
        blocks = _permutation(len(self._block_shard), self._seed, epoch, stream=0)
        _, sizes = self._bounds(blocks)
        window_sizes = np.add.reduceat(sizes, np.arange(0, len(sizes), self._window_blocks))
        return _Epoch(blocks, np.cumsum(window_sizes) - window_sizes)

    def _shuffle_rows(self, epoch: int, window: int) -> Integers:
        first = window * self._window_blocks
        blocks = self._epoch(epoch).blocks[first : first + self._window_blocks]
        starts, sizes = self._bounds(blocks)
        rows = np.concatenate(
            [np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        )
        views = np.stack([np.repeat(self._block_shard[blocks], sizes), rows], axis=1)  # rows 2
        return views[_permutation(len(views), self._seed, epoch, stream=1 + window)]

    def _bounds(self, blocks: Integers) -> tuple[Integers, Integers]:
        """First row and number of rows of each block."""
        shards = self._block_shard[blocks]
        starts = (blocks - self._first_block[shards]) * self._block_rows
        return starts, np.minimum(self._block_rows, self._rows[shards] - starts)


def global_batch(order: ViewOrder, step: int, batch_size: int) -> Integers:
    """The views of step `step` over all ranks: (batch_size, 2)."""
    return order.take(step * batch_size, batch_size)


def rank_slice(order: ViewOrder, step: int, batch_size: int, rank: int, world_size: int) -> Integers:
    """One rank's equal share of `global_batch`; the shares in order of rank are the batch."""
    if batch_size % world_size:
        raise UserError(f"batch_size {batch_size} must be a multiple of the {world_size} ranks")
    share = batch_size // world_size
    return order.take(step * batch_size + rank * share, share)


def _permutation(n: int, seed: int, epoch: int, stream: int) -> Integers:
    """A permutation of n, keyed by the seed; each (epoch, stream) has its own stretch of the counter."""
    philox = np.random.Philox(
        key=np.array([seed, 0], np.uint64), counter=np.array([0, stream, epoch, 0], np.uint64)
    )
    return np.argsort(philox.random_raw(n), kind="stable")
