"""Memory for batches, used again once nobody holds any of it.

New memory costs a pass of its own: the kernel zeroes every page that is touched for the first time, in the
middle of the read into it. That a batch may still be held is known from its tensors alone, so a batch that
somebody keeps is never overwritten.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict, deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class RecycledMemory:
    """Lends tensors. There are never more buffers of a size than were lent at once. Threads may share it."""

    def __init__(self) -> None:
        # No locks: what comes back may come in the middle of any line of any thread. A deque's methods are
        # atomic.
        self._free: defaultdict[int, deque[NDArray[np.uint8]]] = defaultdict(deque)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of anything. Its memory is lent again when it, and every view of it, is gone."""
        nbytes = math.prod(shape) * dtype.itemsize
        free = self._free[nbytes]
        try:
            buffer = free.pop()
        except IndexError:
            buffer = np.empty(nbytes, dtype=np.uint8)
        lent = buffer.view()  # what the tensor's storage holds, and nothing else does
        weakref.finalize(lent, free.append, buffer).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)
