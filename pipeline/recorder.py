"""One worker's loop: one source shard, one group of teachers that share its reading and decoding.

Three stages overlap: threads read, decode and cut; this thread runs the teachers; another packs the features
and hands full objects to the writers' threads. Nothing is cached between shards, so memory does not grow with
their number. Of one shard there are in memory at most (2 · decode_threads + 1) · batch_size crops at each
resolution, the outputs of three batches, and what `PartWriter` says of each teacher.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import torch

from pipeline.shards import Sample, index_tar
from pipeline.teachers import Teacher
from pipeline.writer import PartWriter
from storage_schemas.commits import SourceTar
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import StoreManifest, TeacherSpec
from storage_schemas.objects import RangeReader, local_file, open_objects
from storage_schemas.pixels import ImageError, cut, decode
from storage_schemas.store import FeatureStore
from storage_schemas.threads import map_ahead
from storage_schemas.views import VIEW_SCHEMA, ViewStatus

Resolution = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Receipt:
    """What a worker says of a shard: small, whatever the shard's size.

    `committed` are the teachers whose part this attempt made count: none if another driver was faster.
    `statuses` counts views by ViewStatus, `invalid` rows without features by teacher. `error` is None, or why
    this attempt ended; with `retry`, another may succeed.
    """

    shard: str
    committed: tuple[str, ...] = ()
    views: int = 0
    bytes: int = 0
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    invalid: dict[str, int] = field(default_factory=dict)
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)
    error: str | None = None
    retry: bool = False


@dataclass(frozen=True, slots=True)
class _View:
    row: dict[str, Any]
    crops: dict[Resolution, torch.Tensor]  # 3 height width; empty if the image could not be read


class Recorder:
    """Records source shards into a store with teachers that are already loaded."""

    def __init__(
        self, store: FeatureStore, teachers: list[Teacher], batch_size: int, decode_threads: int
    ) -> None:
        self.store = store
        self.teachers = {teacher.spec.name: teacher for teacher in teachers}
        self.batch_size = batch_size
        self.decode_threads = decode_threads
        for teacher in teachers:
            store.add_teacher(teacher.spec)

    @property
    def specs(self) -> list[TeacherSpec]:
        """Of the loaded teachers."""
        return [teacher.spec for teacher in self.teachers.values()]

    def record(self, shard: str, url: str, on_views: Callable[[int], None] = lambda count: None) -> Receipt:
        """Record the shard for every teacher that has no commit for it; `on_views` hears of each batch.

        DataDamage if the tar is damaged or changes meanwhile, UserError if it is not the one the store knows;
        nothing is committed then.
        """
        started = time.monotonic()
        missing = [name for name in self.teachers if not self.store.has_commit(name, shard)]
        if not missing:
            return Receipt(shard)
        with local_file(url) as path, ExitStack() as stack:
            before = _identity(path)
            index = index_tar(path, shard)
            self.store.require_tar(shard, index.sha256)
            rows = len(index.samples) * self.store.manifest.views_per_image
            writers = [PartWriter(self.store, self.teachers[name].spec, shard, rows) for name in missing]
            for writer in writers:
                stack.callback(writer.close)
            table = self._run(path, index.samples, writers, on_views)
            if _identity(path) != before:
                raise DataDamage(f"shard {shard!r}: {url!r} was changed while it was read")
            statuses = Counter(table["status"].to_pylist())
            for writer in writers:
                if statuses[ViewStatus.OK] and not writer.valid_rows:
                    raise UserError(
                        f"teacher: {writer.spec.name!r} gives no finite features for any view of shard "
                        f"{shard!r}; check its pixel_std, weights and compute_dtype"
                    )
            digest = self.store.put_views(shard, table)
            place = url if urlsplit(url).scheme else str(path)  # one that holds in any folder
            source = SourceTar(url=place, size=index.size, sha256=index.sha256)
            commits = [commit for writer in writers if (commit := writer.commit(source, digest))]
        return Receipt(
            shard,
            committed=tuple(commit.teacher for commit in commits),
            views=rows,
            bytes=sum(commit.bytes for commit in commits),
            seconds=time.monotonic() - started,
            statuses=dict(statuses),
            invalid={commit.teacher: len(commit.invalid_rows) for commit in commits},
            fidelity={commit.teacher: commit.fidelity for commit in commits if commit.fidelity},
        )

    def _run(
        self, path: Path, samples: list[Sample], writers: list[PartWriter], on_views: Callable[[int], None]
    ) -> pa.Table:
        """Features of every view to the writers; the view table."""
        specs = [writer.spec for writer in writers]
        resolutions = sorted({(spec.height, spec.width) for spec in specs})
        rows: list[dict[str, Any]] = []
        with (
            RangeReader(open_objects(str(path.parent)), path.name) as tar,
            ThreadPoolExecutor(self.decode_threads, thread_name_prefix="decode") as decoders,
            ThreadPoolExecutor(1, thread_name_prefix="write") as write,
        ):
            cutting = map_ahead(
                decoders,
                lambda item: cut_views(tar, *item, self.store.manifest, resolutions),
                split_views(samples, self.store.manifest.views_per_image, self.batch_size),
                ahead=2 * self.decode_threads,
            )
            views = (view for some in cutting for view in some)
            outputs = (self._forward(batch, writers, rows) for batch in _batches(views, self.batch_size))
            for count in map_ahead(write, lambda outputs: _append(writers, outputs), outputs, ahead=2):
                on_views(count)
        return pa.Table.from_pylist(rows, schema=VIEW_SCHEMA)

    def _forward(
        self, batch: list[_View], writers: list[PartWriter], rows: list[dict[str, Any]]
    ) -> list[TeacherOutput]:
        rows += [view.row for view in batch]
        readable = [place for place, view in enumerate(batch) if view.crops]
        outputs = []
        for writer in writers:
            spec = writer.spec
            images = [batch[place].crops[spec.height, spec.width] for place in readable]
            output = self.teachers[spec.name](torch.stack(images)) if images else None
            outputs.append(_spread(output, readable, len(batch), spec))
        return outputs


def split_views(samples: list[Sample], views_per_image: int, most: int) -> Iterator[tuple[Sample, range]]:
    """Each sample with its views, at most `most` at a time: it is decoded again for each such run, and the
    crops in memory stay few.
    """
    for sample in samples:
        for first in range(0, views_per_image, most):
            yield sample, range(first, min(first + most, views_per_image))


def cut_views(
    tar: RangeReader, sample: Sample, views: range, manifest: StoreManifest, resolutions: list[Resolution]
) -> list[_View]:
    """Some views of one sample: their rows of the view table, and their crops at each resolution."""
    data = tar.read(sample.image.offset, sample.image.nbytes)
    digest = sha256(data).digest()[:16]
    row: dict[str, Any] = {
        "key": sample.key,
        "member": sample.image.name,
        "offset": sample.image.offset,
        "nbytes": sample.image.nbytes,
        "digest": digest,
        "status": str(ViewStatus.OK),
        "label": sample.label,
        "caption": sample.caption,
    }
    try:
        image = decode(data, manifest.max_pixels)  # 3 height width
    except ImageError as error:
        return [
            _View({**row, "view": view, "status": str(error.status), "error": str(error)}, {})
            for view in views
        ]
    height, width = image.shape[1:]
    made = []
    for view in views:
        box = manifest.crops.draw(manifest.seed, digest, view, height, width)
        place = {"top": box.top, "left": box.left, "crop_height": box.height, "crop_width": box.width}
        crops = {resolution: cut(image, box, *resolution) for resolution in resolutions}
        made.append(
            _View({**row, "view": view, "height": height, "width": width, **place, "hflip": box.hflip}, crops)
        )
    return made


def _identity(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _batches(views: Iterator[_View], size: int) -> Iterator[list[_View]]:
    while batch := list(islice(views, size)):
        yield batch


def _append(writers: list[PartWriter], outputs: list[TeacherOutput]) -> int:
    for writer, output in zip(writers, outputs, strict=True):
        writer.append(output)
    return len(outputs[0].summary)


def _spread(output: TeacherOutput | None, readable: list[int], rows: int, spec: TeacherSpec) -> TeacherOutput:
    """The output on the CPU with a row for each view; NaN where there was no image to show the teacher."""
    if output is not None and len(readable) == rows:
        return TeacherOutput(output.summary.cpu(), output.spatial.cpu())
    summary = torch.full((rows, spec.summary_dim), torch.nan)
    spatial = torch.full((rows, spec.grid.height, spec.grid.width, spec.spatial_dim), torch.nan)
    if output is not None:
        summary[readable] = output.summary.float().cpu()
        spatial[readable] = output.spatial.float().cpu()
    return TeacherOutput(summary, spatial)
