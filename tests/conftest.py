"""Fixtures that several test files use: a fixed seed, photo-like images, webdataset shards."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

WriteTar = Callable[[Path, Iterable[Mapping[str, Any]]], Path]
MakeJpeg = Callable[[int, int, int], bytes]


# They start clusters, ranks and processes to kill, and take a third of the time: begun first, they are what
# the others are done beside, and not what is waited for at the end.
LONG = ("test_launchers.py", "test_ranks.py", "test_executors.py", "test_crashes.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_disks() -> Iterator[None]:
    """No test loses power. What processes that tests start put is synced as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def write_tar() -> WriteTar:
    """`write_tar(path, [{"__key__": "a", "jpg": b"...", "txt": "cat", "cls": 3}])` writes a shard."""
    return _write_tar


@pytest.fixture
def jpeg() -> MakeJpeg:
    """`jpeg(seed, height, width)` is a smooth random image, a function of its seed and size."""
    return _jpeg


def _write_tar(path: Path, samples: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for extension, value in sample.items():
                if extension == "__key__":
                    continue
                data = value if isinstance(value, bytes) else str(value).encode()
                member = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def _jpeg(seed: int, height: int, width: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()
