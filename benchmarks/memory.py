"""Does memory grow with the number of source shards? Resident bytes of the driver and of a Ray actor.

`python benchmarks/memory.py` records 200 tiny shards inline, and again by one actor, and prints the resident
set of the driver, and of the actor beside it, after 20, 100 and 200 of them.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.config import ExtractConfig
from pipeline.extract import extract

MARKS = (20, 100, 200)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=max(MARKS))
    parser.add_argument("--images", type=int, default=2, help="in each shard")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder), arguments.shards, arguments.images)
        for executor in ("inline", "ray"):
            measure(Path(folder), executor, arguments.shards)


def make_shards(folder: Path, shards: int, images: int) -> None:
    """Tars of random 64x64 JPEGs."""
    random = np.random.default_rng(0)
    for number in range(shards):
        with tarfile.open(folder / f"{number:04}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for image in range(images):
                sink = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(sink, "JPEG")
                member = tarfile.TarInfo(f"{image}.jpg")
                member.size = sink.tell()
                sink.seek(0)
                tar.addfile(member, sink)


def measure(folder: Path, executor: str, shards: int) -> None:
    """Record all shards, and print the memory at each mark."""
    teacher = {
        "family": "timm",
        "model": "test_efficientnet",
        "weights": "random",
        "seed": 0,
        "resolution": 64,
    }
    recipe = {
        "store": {"url": str(folder / executor)},
        "data": {"train": f"{folder}/*.tar"},
        "teachers": {"cnn": teacher, "int8": {**teacher, "codec": "int8"}},
        "extract": {"executor": executor, "device": "cpu"},
    }
    commits = folder / executor / "teachers" / "int8" / "commits"
    extract(ExtractConfig.from_recipe(recipe), on_views=printer(executor, commits))
    assert len(list(commits.iterdir())) == shards


def printer(executor: str, commits: Path) -> Callable[[int], None]:
    """Called as views are recorded: prints at each mark that the commits have reached."""
    left = list(MARKS)

    def show(_: int) -> None:
        done = len(list(commits.iterdir())) if commits.exists() else 0
        # Inline, a shard's views are counted before its commit.
        if left and done + (executor == "inline") >= left[0]:
            sizes = [f"driver {resident(os.getpid())} MiB"]
            sizes += [f"actor {resident(pid)} MiB" for pid in actors(os.getpid())]
            print(f"{executor}, after {left.pop(0):3} shards: {', '.join(sizes)}", flush=True)

    return show


def resident(pid: int) -> int:
    """MiB of memory that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20


def actors(pid: int) -> list[int]:
    """Ray's actors among the processes below one."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += actors(child)
            if Path(f"/proc/{child}/cmdline").read_text().startswith("ray::_Worker"):
                found.append(child)
    return found


if __name__ == "__main__":
    main()
