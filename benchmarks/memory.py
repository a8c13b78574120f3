"""Does memory grow with the number of source shards, and is the reader's what its settings say?

`python benchmarks/memory.py` records 200 tiny shards inline, and again by one actor, and prints the resident
set of the driver, and of the actor beside it, after 20, 100 and 200 of them. Then it reads the store for 200
batches with a slow consumer, so that as much is read ahead as may be, and prints the reader's peak beside its
bound: `threads + prefetch` batches, and the one in use.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.config import ExtractConfig
from pipeline.extract import extract
from storage_schemas.store import FeatureStore
from trainer.groups import Group, Schedule, batches
from trainer.reader import TargetReader

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
        for prefetch in (0, 4, 16):
            read(Path(folder), prefetch)


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


def read(folder: Path, prefetch: int, threads: int = 2, batch_size: int = 64) -> None:
    """Read 200 batches of the inline store, in a process of its own, and print how much memory that took."""
    arguments = (folder, prefetch, threads, batch_size)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        grew, batch = pool.submit(peak_of_reading, *arguments).result()
    bound = (threads + prefetch + 1) * batch / 2**20
    print(
        f"reader, {threads} threads, prefetch {prefetch:2}: {grew:4.0f} MiB at most; "
        f"of batches {bound:4.0f} MiB, {batch / 2**20:.1f} a batch of {batch_size}",
        flush=True,
    )


def peak_of_reading(folder: Path, prefetch: int, threads: int, batch_size: int) -> tuple[float, int]:
    """(MiB that the process grew by at most while it read, bytes of a batch)."""
    store = FeatureStore.open(str(folder / "inline"))
    sources = {path.stem: str(path) for path in sorted(folder.glob("*.tar"))}
    reader = TargetReader(store, sources, store.teachers(), (256, 256), threads, prefetch)
    group = Group("all", reader, reader.order(0, 256, 16), batch_size, share=1)
    first = reader.load(group.order.take(0, batch_size))  # now code, tables and one batch's memory are there
    tensors = [first.images, *(x for t in first.targets.values() for x in (t.summary, t.spatial))]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    del first, tensors
    before, peak = resident(os.getpid()), 0
    with closing(batches([group], Schedule([1], ranks=1))) as stream:
        for _ in islice(stream, 200):
            time.sleep(0.02)
            peak = max(peak, resident(os.getpid()))
    return peak - before + nbytes / 2**20, nbytes


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
