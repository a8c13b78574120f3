from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.memory import RecycledMemory
from trainer.reader import TargetReader

SHAPE = (4, 3, 5)
KEPT: dict[str, Callable[[Tensor], Any]] = {
    "the tensor": lambda x: x,
    "a slice": lambda x: x[1],
    "a permuted view": lambda x: x.permute(2, 0, 1),
    "its bytes": lambda x: x.view(torch.uint8),
    "a NumPy view": lambda x: x.numpy(),
    "a view of that": lambda x: x.numpy()[1:].T,
    "its storage": lambda x: x.untyped_storage(),
}


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_nobody_holds_is_lent_again_and_no_more_is_made() -> None:
    memory = RecycledMemory()
    first = {address(memory.empty(SHAPE, torch.float16)) for _ in range(5)}
    assert len(first) == 1
    held = [memory.empty(SHAPE, torch.float16) for _ in range(3)]
    three = {address(tensor) for tensor in held}
    assert len(three) == 3
    assert first <= three
    held.clear()
    again = [memory.empty(SHAPE, torch.float16) for _ in range(3)]
    assert {address(tensor) for tensor in again} == three


@pytest.mark.parametrize("keep", KEPT.values(), ids=list(KEPT))
def test_what_somebody_holds_is_not_lent(keep: Callable[[Tensor], Any]) -> None:
    memory = RecycledMemory()
    tensor = memory.empty(SHAPE, torch.float16)
    taken, kept = address(tensor), keep(tensor)
    del tensor
    assert address(memory.empty(SHAPE, torch.float16)) != taken
    del kept
    assert address(memory.empty(SHAPE, torch.float16)) in {taken, address(memory.empty(SHAPE, torch.float16))}


def test_sizes_and_types_are_what_was_asked_for() -> None:
    memory = RecycledMemory()
    for shape, dtype in (
        (SHAPE, torch.float16),
        ((2, 60), torch.uint8),
        ((), torch.float32),
        ((0, 3), torch.int8),
    ):
        for _ in range(2):
            tensor = memory.empty(shape, dtype)
            assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)


def test_a_lender_that_is_gone_leaves_what_it_lent() -> None:
    tensor = RecycledMemory().empty(SHAPE, torch.float32).fill_(7)
    assert (tensor == 7).all()


def test_threads_never_get_the_same_memory() -> None:
    memory = RecycledMemory()

    def use(value: int) -> bool:
        tensor = memory.empty((1000,), torch.int64).fill_(value)
        return bool((tensor == value).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(2000)))


def test_batches_that_are_kept_stay_as_they_were(recorded: Any) -> None:
    reader = TargetReader(recorded.store, recorded.sources(), ["cnn", "vit"], (32, 32))
    kept = list(reader.in_order(4))
    copies = [(batch.images.clone(), batch.targets["cnn"].spatial.clone()) for batch in kept]
    for _ in reader.in_order(4):
        pass
    for batch, (images, spatial) in zip(kept, copies, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.targets["cnn"].spatial, spatial)


def test_batches_that_are_done_with_share_memory(recorded: Any) -> None:
    reader = TargetReader(recorded.store, recorded.sources(), ["cnn"], (32, 32), threads=1, prefetch=1)
    addresses = [address(batch.targets["cnn"].spatial) for batch in reader.in_order(3)]
    assert len(set(addresses)) <= 3 < len(addresses)  # one in use, two ahead
