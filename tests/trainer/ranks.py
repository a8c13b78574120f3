"""Ranks of gloo on this machine, for the tests of what several do together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(function: Callable[..., None], ranks: int, *arguments: Any) -> None:
    """`function(rank, ranks, *arguments)` in so many processes, under torchrun's environment."""
    torch.multiprocessing.spawn(_run, (function, ranks, free_port(), arguments), nprocs=ranks)


def _run(rank: int, function: Callable[..., None], ranks: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torchrun = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in torchrun.items()} | {"MASTER_ADDR": "127.0.0.1"})
    function(rank, ranks, *arguments)
