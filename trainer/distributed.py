"""Ranks. The only module that imports torch.distributed; with one rank, everything here does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from storage_schemas.errors import UserError

PATIENCE = timedelta(hours=6)  # with ranks that wait while rank 0 evaluates


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size`: its `rank`, its `local_rank` on its machine, the `device` it uses."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


@contextmanager
def launch(device: str = "auto") -> Iterator[World]:
    """The world that torchrun describes in RANK, WORLD_SIZE and LOCAL_RANK, or that of one process.

    device: see `choose_device`. nccl joins tensors on cuda, gloo those on the CPU. Ray Train
    describes its workers as torchrun does, and has joined them already: they stay so.
    """
    rank, size, local_rank = (_from_torchrun(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    world = World(rank, max(size, 1), local_rank, choose_device(device, local_rank))
    if world.size == 1 or dist.is_initialized():
        yield world
        return
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise UserError(
            f"environment variable WORLD_SIZE is {size} without MASTER_ADDR and MASTER_PORT: unset it, or "
            f"start with torchrun"
        )
    if world.device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=world.device, timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def wrap(module: nn.Module, world: World) -> nn.Module:
    """`module` with gradients averaged over ranks, if several; every step must use every parameter."""
    if world.size == 1:
        return module
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)


def no_sync(replica: nn.Module) -> AbstractContextManager[None]:
    """In here, backward passes of what `wrap` gave add to the gradients of this rank alone."""
    return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over ranks, on every rank, outside of autograd."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def barrier() -> None:
    """Wait for every rank, on the CPU: others wait while rank 0 evaluates or saves."""
    all_sum(torch.zeros(()))


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device a recipe names: `auto` is cuda where there is one, else cpu; each local rank has its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"training.device: {name!r} is no device; give auto, cpu or cuda") from error
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UserError(f"training.device: {name!r} is not there; give auto or cpu")
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device


def _from_torchrun(name: str) -> int:
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise UserError(f"environment variable {name} is {value!r}: torchrun sets a number")
    return int(value)
