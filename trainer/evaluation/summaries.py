"""Summaries of view 0 of every image: a teacher's straight from the store, a student's by running it, and the
pixels themselves, which is what a summary must beat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from storage_schemas.errors import UserError
from storage_schemas.store import FeatureStore
from trainer.reader import TargetReader
from trainer.students import Student, StudentOutput
from trainer.students.base import IMAGENET_MEAN, IMAGENET_STD

PIXELS_SIDE = 32

Summarise = Callable[[torch.Tensor], torch.Tensor]
"""From images, uint8 b 3 height width, to summaries, b d, on the CPU."""


@dataclass(frozen=True, slots=True)
class Summaries:
    """`features` n d float32; `labels` n, -1 where there is none; `views` n (shard, row)."""

    features: torch.Tensor
    labels: torch.Tensor
    views: list[tuple[str, int]]

    def labelled(self, where: str) -> Summaries:
        """Only those with a label; UserError if none has one."""
        known = self.labels >= 0
        if not known.any():
            raise UserError(f"{where}: no image has a label (a `.cls` member beside it), k-NN needs them")
        views = [view for view, keep in zip(self.views, known.tolist(), strict=True) if keep]
        return Summaries(self.features[known], self.labels[known], views)


def teacher_summaries(store: FeatureStore, teacher: str, shards: Iterable[str]) -> Summaries:
    """Of the valid rows, read from the store; the teacher is not run."""
    dim = store.spec(teacher).summary_dim
    found, views = [torch.empty(0, dim)], []
    for shard in shards:
        part = store.part(teacher, shard)
        rows = np.arange(0, part.commit.rows, store.manifest.views_per_image)
        rows = np.setdiff1d(rows, part.commit.invalid_rows)
        summary = np.empty((len(rows), dim), dtype=np.float16)
        if len(rows):
            part.read_summary(rows.tolist(), summary)
        found.append(torch.from_numpy(summary).float())
        views += [(shard, int(row)) for row in rows]
    return Summaries(torch.cat(found), _labels(store, views), views)


def image_summaries(
    summarise: Mapping[str, Summarise],
    reader: TargetReader,
    batch_size: int,
    on_views: Callable[[int], None] = lambda count: None,
) -> dict[str, Summaries]:
    """By the names of `summarise`, of the images at the reader's resolution, which are read once."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in summarise}
    views: list[tuple[str, int]] = []
    for batch in reader.in_order(batch_size, view=0, targets=False):
        for name, function in summarise.items():
            found[name].append(function(batch.images))
        views += [(reader.shards[shard], row) for shard, row in batch.views.tolist()]
        on_views(len(batch.views))
    labels = _labels(reader.store, views)
    # A reader of no views gives no batch: one column stands for widths that nothing tells.
    return {
        name: Summaries(torch.cat(parts) if parts else torch.empty(0, 1), labels, views)
        for name, parts in found.items()
    }


def student_summary(student: Student, device: torch.device) -> Summarise:
    """Of the backbone (AM-RADIO evaluates that, not the adaptors), which is on `device`."""

    @torch.inference_mode()
    def summarise(images: torch.Tensor) -> torch.Tensor:
        output: StudentOutput = student(images.to(device).float() / 255)
        return output.summary.float().cpu()

    return summarise


def pixel_summary(images: torch.Tensor) -> torch.Tensor:
    """b 3 height width to b d: at most 32 pixels a side (CIFAR's own size, and a bound on what a bank holds),
    each the mean of an area, normalised as ImageNet's and flattened. Without the mean taken off, all images
    would point the same way, and a cosine would see little but brightness.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    height, width = (min(side, PIXELS_SIDE) for side in images.shape[-2:])
    return ((F.adaptive_avg_pool2d(images.float() / 255, (height, width)) - mean) / std).flatten(1)


def _labels(store: FeatureStore, views: Sequence[tuple[str, int]]) -> torch.Tensor:
    tables = {
        shard: store.views(shard)["label"].fill_null(-1).to_numpy() for shard in {shard for shard, _ in views}
    }
    return torch.tensor([int(tables[shard][row]) for shard, row in views], dtype=torch.int64)
