"""Reading and writing a part beside its rivals, on the same rows in one run.

    python benchmarks/store.py [--rows 1024] [--runs 7] [--folder DIR]

Reading: batches of 32 rows of 256 × 1280 fp16 in the trainer's own order (block shuffle), into memory of
batches that are done with, which the trainer's reader uses again, and so does every rival here; page cache
warm, as each file's writing left it; every rival on as many threads as ours, each thread reading whole
batches, as the reader does. Ours checks every row's XXH3, the rivals check nothing. Writing: the same rows
through PartWriter (checksums, a digest of every object, fsync, read back, commit) beside `np.save` with fsync
and without. Rivals take turns within a run; figures are medians over the runs and ratios are medians of the
runs' own ratios.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import webdataset
from numpy.typing import NDArray

from pipeline.writer import PartWriter
from storage_schemas.commits import SourceTar
from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import PatchGrid, StoreManifest, TeacherSpec
from storage_schemas.store import FeatureStore
from trainer.memory import RecycledMemory
from trainer.order import ViewOrder

GRID, WIDTH, BATCH = 16, 1280, 32
ROW = (GRID, GRID, WIDTH)
ROW_BYTES = GRID * GRID * WIDTH * 2

MEMORY = RecycledMemory()

Features = NDArray[np.float16]
ReadBatch = Callable[[list[int]], Features]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the files go; a temporary folder if not given"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="webdataset")
    rows = np.random.default_rng(0).standard_normal((options.rows, *ROW), dtype=np.float32).astype(np.float16)
    print(
        f"{options.rows} rows of {GRID * GRID} × {WIDTH} fp16, {rows.nbytes / 1e9:.2f} GB, "
        f"{os.cpu_count()} cores, {options.runs} runs"
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _compare_writing(rows, Path(folder), options.runs)
        _compare_reading(rows, Path(folder), options.runs)


def _compare_reading(rows: Features, folder: Path, runs: int) -> None:
    store = FeatureStore.create(str(folder / "store"), StoreManifest())
    write_part(store, rows, "s")
    np.save(folder / "rows.npy", rows)
    rows.tofile(folder / "rows.bin")
    _write_tar(rows, folder / "rows.tar")
    order = ViewOrder([len(rows)], seed=0)
    batches = [order.take(start, BATCH)[:, 1].tolist() for start in range(0, len(rows) - BATCH + 1, BATCH)]
    for threads in (1, 2):
        rivals = {
            "this store": _by_batches(_part_reader(store), batches, threads),
            "memory-mapped .npy, row by row": _by_batches(
                _mapped_reader(folder / "rows.npy"), batches, threads
            ),
            "fixed records, seek and read": _by_batches(_seek_reader(folder / "rows.bin"), batches, threads),
            "webdataset tar of safetensors": lambda: _read_tar(folder / "rows.tar", len(batches) * BATCH),
        }
        if threads == 1:
            rivals["the same part by zarr-python, row by row"] = _by_batches(
                _zarr_reader(store), batches[:4], 1
            )
        sizes = {name: len(batches) * BATCH * ROW_BYTES for name in rivals}
        sizes["the same part by zarr-python, row by row"] = 4 * BATCH * ROW_BYTES
        _report(
            f"reading, {threads} thread{'s' * (threads > 1)} (the tar: 1, in its own order)",
            rivals,
            sizes,
            runs,
        )


def _compare_writing(rows: Features, folder: Path, runs: int) -> None:
    store = FeatureStore.create(str(folder / "written"), StoreManifest())
    counter = iter(range(1_000_000))

    def ours() -> None:
        shard = f"w{next(counter)}"
        commit = write_part(store, rows, shard)
        _discard(folder / "written" / store.part_path("t", shard, commit))

    def saved(sync: bool) -> None:
        path = folder / f"saved{next(counter)}"
        path.mkdir()
        np.save(path / "rows.npy", rows)
        if sync:
            for place in (path / "rows.npy", path, folder):
                _sync(place)
        _discard(path)

    rivals = {
        "this store": ours,
        "np.save, then fsync": lambda: saved(True),
        "np.save into the page cache": lambda: saved(False),
    }
    _report("writing", rivals, dict.fromkeys(rivals, rows.nbytes), runs)


def write_part(store: FeatureStore, rows: Features, shard: str) -> str:
    """One committed part with these rows as `spatial`, in batches of 32; the attempt's id."""
    spec = TeacherSpec(
        name="t",
        family="none",
        model="none",
        weights="none",
        weights_sha256="0" * 64,
        height=224,
        width=224,
        patch_size=14,
        grid=PatchGrid(height=GRID, width=GRID),
        summary_dim=8,
        spatial_dim=WIDTH,
        summary="mean",
        pixel_mean=(0, 0, 0),
        pixel_std=(1, 1, 1),
    )
    store.add_teacher(spec)
    writer = PartWriter(store, spec, shard, len(rows))
    summary = torch.zeros(BATCH, 8)
    for start in range(0, len(rows), BATCH):
        batch = torch.from_numpy(rows[start : start + BATCH])
        writer.append(TeacherOutput(summary[: len(batch)], batch))
    writer.commit(SourceTar(url="none.tar", size=0, sha256="0" * 64), "0" * 64)
    writer.close()
    return writer.attempt


def new_batch(rows: int) -> Features:
    """Memory as the trainer's reader gives it to a batch: that of a batch that is done with."""
    batch: Features = MEMORY.empty((rows, *ROW), torch.float16).numpy()
    return batch


def _part_reader(store: FeatureStore) -> ReadBatch:
    part = store.part("t", "s")

    def read(rows: list[int]) -> Features:
        out = new_batch(len(rows))
        part.read_spatial(rows, out)
        return out

    return read


def _zarr_reader(store: FeatureStore) -> ReadBatch:
    spatial = store.part("t", "s").spatial

    def read(rows: list[int]) -> Features:
        out = new_batch(len(rows))
        for place, row in enumerate(rows):
            out[place] = spatial[row]
        return out

    return read


def _mapped_reader(path: Path) -> ReadBatch:
    mapped = np.load(path, mmap_mode="r")

    def read(rows: list[int]) -> Features:
        out = new_batch(len(rows))
        for place, row in enumerate(rows):
            out[place] = mapped[row]
        return out

    return read


def _seek_reader(path: Path) -> ReadBatch:
    def read(rows: list[int]) -> Features:
        out = new_batch(len(rows))
        with path.open("rb") as file:  # opened for each batch: threads must not share a position
            for place, row in enumerate(rows):
                file.seek(row * ROW_BYTES)
                out[place] = np.frombuffer(file.read(ROW_BYTES), np.float16).reshape(ROW)
        return out

    return read


def _read_tar(path: Path, rows: int) -> None:
    samples = iter(webdataset.WebDataset(str(path), shardshuffle=False))
    for _ in range(0, rows, BATCH):
        out = new_batch(BATCH)
        for place in range(BATCH):
            out[place] = safetensors.numpy.load(next(samples)["safetensors"])["spatial"]


def _write_tar(rows: Features, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for row, values in enumerate(rows):
            data = safetensors.numpy.save({"spatial": values})
            member = tarfile.TarInfo(f"{row:09d}.safetensors")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _by_batches(read: ReadBatch, batches: list[list[int]], threads: int) -> Callable[[], None]:
    def run() -> None:
        if threads == 1:
            for batch in batches:
                read(batch)
            return
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(read, batches):
                pass

    return run


def _report(title: str, rivals: dict[str, Callable[[], None]], sizes: dict[str, int], runs: int) -> None:
    """GB a second of each, and how many times as fast as it ours is."""
    for run in rivals.values():
        run()  # warms the page cache and the code
    rates: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(runs):
        for name, run in rivals.items():
            began = time.perf_counter()
            run()
            rates[name].append(sizes[name] / (time.perf_counter() - began) / 1e9)
    print(f"\n{title}")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(rates["this store"], found, strict=True))
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"  {name:42} {statistics.median(found):6.2f} GB/s ({spread})   this store is {ratio:.2f} × it")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _discard(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


if __name__ == "__main__":
    main()
