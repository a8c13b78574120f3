"""What recording will cost, before it starts: rows, bytes, objects, arithmetic, hours, and whether the space
is there.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import mean

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import ExtractConfig
from pipeline.executors import load_teachers
from pipeline.recorder import cut_views, split_views
from pipeline.shards import index_tar
from pipeline.teachers import Teacher, outline_teacher
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.layout import chunk_paths, metadata_paths, part_bytes
from storage_schemas.manifest import StoreManifest, TeacherSpec
from storage_schemas.objects import RangeReader, local_file, open_objects

# Tars are counted until there are so many, or so many bytes of them; rows of the others are estimated from
# their mean.
COUNTED_SHARDS, COUNTED_BYTES = 16, 1 << 30
VIEW_BYTES = 128  # of a row of the view table: more than it takes, unless captions are long


@dataclass(frozen=True)
class TeacherCost:
    """Of one teacher over all the rows to record. `gflops` is of one view, a multiply-add counted as two."""

    name: str
    bytes_a_view: int
    bytes: int
    objects: int
    gflops: float | None = None


@dataclass(frozen=True)
class Plan:
    """`rows` is exact if all shards were counted. `free_bytes` is None where the store has no such limit.

    images_per_second: views through all the teachers, as the user or a trial says; None if neither did.
    damaged: what is wrong with those of the tars counted that are.
    """

    shards: int
    rows: int
    exact: bool
    teachers: tuple[TeacherCost, ...]
    free_bytes: int | None
    images_per_second: float | None = None
    damaged: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all teachers' features and the view tables."""
        return sum(teacher.bytes for teacher in self.teachers) + self.rows * VIEW_BYTES

    @property
    def fits(self) -> bool:
        """Whether the free space suffices."""
        return self.free_bytes is None or self.bytes <= self.free_bytes

    @property
    def hours(self) -> float | None:
        """At `images_per_second`."""
        return self.rows / self.images_per_second / 3600 if self.images_per_second else None


def make_plan(config: ExtractConfig, images_per_second: float | None = None, trial: int = 0) -> Plan:
    """Of recording the recipe's shards from nothing; measures the rate over `trial` images if asked.

    Only the trial needs the teachers' weights.
    """
    sources = config.source_shards()
    manifest = config.store.manifest()
    if trial:
        images_per_second = _trial(
            next(iter(sources.values())), load_teachers(config), manifest, config.extract.batch_size, trial
        )
    counted, damaged = _count_rows(sources, manifest)
    outlines = [
        outline_teacher(entry.family, entry.model, name=name, **entry.settings)
        for name, entry in config.teachers.items()
    ]
    costs = tuple(_cost(teacher.spec, counted, len(sources), _gflops(teacher)) for teacher in outlines)
    return _plan(config, counted, damaged, len(sources), costs, images_per_second)


def require_space(
    config: ExtractConfig,
    specs: Sequence[TeacherSpec],
    sources: Mapping[str, str],
    committed: Mapping[str, Collection[str]],
) -> Plan:
    """The plan of what is missing; UserError with both figures if the store's file system has not the room
    for it.
    """
    counted, damaged = _count_rows(sources, config.store.manifest())
    missing = {spec.name: sum(name not in committed[spec.name] for name in sources) for spec in specs}
    costs = tuple(_cost(spec, counted, missing[spec.name]) for spec in specs)
    plan = _plan(config, counted, damaged, len(sources), costs)
    if not plan.fits:
        raise UserError(
            f"store.url: {config.store.url!r} has {plan.free_bytes:,} bytes free, recording needs about "
            f"{plan.bytes:,}; free some, or use fewer views, fewer shards or codec int8"
        )
    return plan


def _plan(
    config: ExtractConfig,
    counted: Sequence[int],
    damaged: Sequence[str],
    shards: int,
    costs: tuple[TeacherCost, ...],
    images_per_second: float | None = None,
) -> Plan:
    free = open_objects(config.store.url, create=True, field="store.url").free_bytes()
    rows = round(mean(counted) * shards)
    exact = len(counted) == shards and not damaged
    return Plan(shards, rows, exact, costs, free, images_per_second, tuple(damaged))


def _count_rows(sources: Mapping[str, str], manifest: StoreManifest) -> tuple[list[int], list[str]]:
    """Rows of each of some shards, evenly spread, or of all; and a line for each of them that is damaged,
    which has none.
    """
    step = max(1, len(sources) // COUNTED_SHARDS)
    rows: list[int] = []
    damaged: list[str] = []
    nbytes = 0
    for name, url in islice(sources.items(), 0, None, step):
        if nbytes < COUNTED_BYTES:
            try:
                count, size = _count_images(name, url)
            except DataDamage as error:
                count, size = 0, 0
                damaged.append(str(error))
            rows.append(count * manifest.views_per_image)
            nbytes += size
    return rows, damaged


def _count_images(name: str, url: str) -> tuple[int, int]:
    with local_file(url) as path:
        index = index_tar(path, name)
    return len(index.samples), index.size


def _cost(spec: TeacherSpec, counted: Sequence[int], shards: int, gflops: float | None = None) -> TeacherCost:
    """Of so many shards that have as many rows as those counted."""
    size = mean(part_bytes(spec, rows) if rows else 0 for rows in counted) * shards
    objects = mean(_part_objects(spec, rows) for rows in counted) * shards
    return TeacherCost(spec.name, spec.row_bytes, round(size), round(objects), gflops)


def _part_objects(spec: TeacherSpec, rows: int) -> int:
    return len(chunk_paths(spec, rows) | metadata_paths(spec, rows)) if rows else 0


def _gflops(teacher: Teacher) -> float:
    image = torch.zeros(1, 3, teacher.spec.height, teacher.spec.width, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        teacher(image)
    return float(counter.get_total_flops()) / 1e9


def _trial(url: str, teachers: list[Teacher], manifest: StoreManifest, batch_size: int, images: int) -> float:
    """Views a second of decode, crop and forward, one after the other, over the first images of a shard."""
    resolutions = sorted({(teacher.spec.height, teacher.spec.width) for teacher in teachers})
    with local_file(url) as path:
        tar = RangeReader(open_objects(str(path.parent)), path.name)
        samples = index_tar(path, path.name).samples[:images]
        for teacher in teachers:  # the first call of a model is slow
            teacher(torch.zeros(batch_size, 3, teacher.spec.height, teacher.spec.width, dtype=torch.uint8))
        started = time.perf_counter()
        chunks = split_views(samples, manifest.views_per_image, batch_size)
        cut = (cut_views(tar, *chunk, manifest, resolutions) for chunk in islice(chunks, images))
        views = [view for some in cut for view in some if view.crops]
        for start in range(0, len(views), batch_size):
            batch = views[start : start + batch_size]
            for teacher in teachers:
                teacher(torch.stack([view.crops[teacher.spec.height, teacher.spec.width] for view in batch]))
        return len(views) / (time.perf_counter() - started)
