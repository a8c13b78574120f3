"""Images a second, never without the conditions under which they were counted."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from storage_schemas.errors import UserError


@dataclass(frozen=True, slots=True)
class Throughput:
    """`images_per_second` is of the median step; the rest says of what, on what, and how."""

    images_per_second: float
    batch_size: int
    height: int
    width: int
    dtype: str
    device: str
    threads: int
    compiled: bool
    steps: int


def measure_throughput(
    module: nn.Module,
    height: int,
    width: int,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    steps: int = 20,
    warmup: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Throughput:
    """Time `module`'s forward on random images, b 3 height width, in evaluation mode, without gradients.

    The module is moved to `device`. A `dtype` other than float32 is what autocast computes in.
    """
    if steps < 1 or batch_size < 1:
        raise UserError(f"steps {steps} and batch_size {batch_size} must be at least 1")
    device = torch.device(device)
    module = module.to(device)
    images = torch.rand(batch_size, 3, height, width, device=device)
    training = module.training
    module.eval()
    try:
        with torch.inference_mode(), _precision(device, dtype):
            seconds = [_time(module, images) for _ in range(warmup + steps)][warmup:]
    finally:
        module.train(training)
    return Throughput(
        images_per_second=batch_size / statistics.median(seconds),
        batch_size=batch_size,
        height=height,
        width=width,
        dtype=str(dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        threads=torch.get_num_threads(),
        compiled=_is_compiled(module),
        steps=steps,
    )


def _time(module: nn.Module, images: Tensor) -> float:
    _wait(images.device)
    start = time.perf_counter()
    module(images)
    _wait(images.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _precision(device: torch.device, dtype: torch.dtype) -> torch.autocast | nullcontext[None]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)`, which wraps it, or by `module.compile()`, which does not."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
