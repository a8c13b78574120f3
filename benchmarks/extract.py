"""`extract` in this process beside a bare loop that decodes, crops and runs the same teacher, and stores
nothing.

    python benchmarks/extract.py [--images 96] [--views 2] [--runs 5] [--teachers lite0 clip ...]

Random weights (they do not change the arithmetic), photograph-like JPEGs of 500 × 375 made here, page cache
warm. The bare loop uses the same decoder, crops and teacher object, batch after batch, in one thread beside
PyTorch's own. The two take turns within a run; figures are medians over the runs, the ratio the median of the
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
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from PIL import Image

from pipeline.recorder import Recorder
from pipeline.shards import index_tar
from pipeline.teachers import Teacher, create_teacher
from storage_schemas.crops import CropPolicy
from storage_schemas.manifest import StoreManifest
from storage_schemas.objects import RangeReader, open_objects
from storage_schemas.pixels import cut, decode
from storage_schemas.store import FeatureStore

# One a family at least, small enough that decoding and writing show beside their forward.
TEACHERS: dict[str, dict[str, Any]] = {
    "lite0": {"family": "timm", "model": "tf_efficientnet_lite0"},
    "vit_ti16": {"family": "timm", "model": "vit_tiny_patch16_224"},
    "dinov2": {
        "family": "timm",
        "model": "vit_small_patch14_reg4_dinov2",
        "blocks": 4,
        "resolution": 224,
    },
    "clip": {"family": "open_clip", "model": "ViT-S-32-alt"},
    "sam": {"family": "sam", "model": "vit_b", "blocks": 3, "resolution": 256},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--teachers", nargs="+", default=list(TEACHERS), choices=TEACHERS)
    options = parser.parse_args()
    print(
        f"{options.images} images × {options.views} views, batch {options.batch_size}, 2 decode threads, "
        f"{torch.get_num_threads()} PyTorch threads, {os.cpu_count()} cores, {options.runs} runs"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tar = _write_tar(folder / "bench.tar", options.images)
        manifest = StoreManifest(crops=CropPolicy(first_view="center"), views_per_image=options.views)
        for name in options.teachers:
            teacher = create_teacher(**TEACHERS[name], weights="random", seed=0, name=name)
            _compare(folder, tar, teacher, manifest, options.batch_size, options.runs)


def _compare(
    folder: Path, tar: Path, teacher: Teacher, manifest: StoreManifest, batch_size: int, runs: int
) -> None:
    rates: dict[str, list[float]] = {"bare loop": [], "extract": []}
    for run in range(runs + 1):
        bare = _bare_rate(tar, teacher, manifest, batch_size)
        recorded = _extract_rate(folder, tar, teacher, manifest, batch_size)
        if run:  # the first run warms caches and code
            rates["bare loop"].append(bare)
            rates["extract"].append(recorded)
    ratio = statistics.median(a / b for a, b in zip(rates["extract"], rates["bare loop"], strict=True))
    print(
        f"\n{teacher.spec.name}: {teacher.spec.family} {teacher.spec.model}, {teacher.spec.height} × "
        f"{teacher.spec.width}, {teacher.spec.row_bytes:,} bytes a view"
    )
    for name, found in rates.items():
        print(f"  {name:10} {statistics.median(found):7.1f} views/s ({min(found):.1f} to {max(found):.1f})")
    print(f"  extract is {ratio:.2f} × the bare loop")


def _bare_rate(tar: Path, teacher: Teacher, manifest: StoreManifest, batch_size: int) -> float:
    resolution = (teacher.spec.height, teacher.spec.width)
    began = time.perf_counter()
    samples = index_tar(tar, "bench").samples
    reader = RangeReader(open_objects(str(tar.parent)), tar.name)
    crops: list[torch.Tensor] = []
    views = 0
    for sample in samples:
        image = decode(reader.read(sample.image.offset, sample.image.nbytes), manifest.max_pixels)
        for view in range(manifest.views_per_image):
            box = manifest.crops.draw(0, sample.key.encode(), view, *image.shape[1:])
            crops.append(cut(image, box, *resolution))
        while len(crops) >= batch_size:
            teacher(torch.stack(crops[:batch_size]))
            views, crops = views + batch_size, crops[batch_size:]
    if crops:
        teacher(torch.stack(crops))
    return (views + len(crops)) / (time.perf_counter() - began)


def _extract_rate(
    folder: Path, tar: Path, teacher: Teacher, manifest: StoreManifest, batch_size: int
) -> float:
    store = FeatureStore.create(str(folder / uuid4().hex), manifest)
    recorder = Recorder(store, [teacher], batch_size, decode_threads=2)
    began = time.perf_counter()
    receipt = recorder.record("bench", str(tar))
    rate = receipt.views / (time.perf_counter() - began)
    store.objects.delete("teachers")
    return rate


def _write_tar(path: Path, images: int) -> Path:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(images):
            coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            sink = io.BytesIO()
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(
                sink, "JPEG", quality=90
            )
            member = tarfile.TarInfo(f"{index:06d}.jpg")
            member.size = sink.tell()
            tar.addfile(member, io.BytesIO(sink.getvalue()))
    return path


if __name__ == "__main__":
    main()
