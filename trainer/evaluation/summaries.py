"""Summaries of view 0 of every image: a teacher's straight from the store, a student's by running it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from storage_schemas.errors import UserError
from storage_schemas.store import FeatureStore
from trainer.reader import TargetReader
from trainer.students import Student


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


def student_summaries(
    student: Student,
    reader: TargetReader,
    batch_size: int,
    device: torch.device,
    on_views: Callable[[int], None] = lambda count: None,
) -> Summaries:
    """Of the backbone (AM-RADIO evaluates that, not the adaptors), at the reader's resolution."""
    found, views = [torch.empty(0, student.summary_dim)], []
    with torch.inference_mode():
        for batch in reader.in_order(batch_size, view=0, targets=False):
            found.append(student(batch.images.to(device).float() / 255).summary.float().cpu())
            views += [(reader.shards[shard], row) for shard, row in batch.views.tolist()]
            on_views(len(batch.views))
    return Summaries(torch.cat(found), _labels(reader.store, views), views)


def _labels(store: FeatureStore, views: Sequence[tuple[str, int]]) -> torch.Tensor:
    tables = {
        shard: store.views(shard)["label"].fill_null(-1).to_numpy() for shard in {shard for shard, _ in views}
    }
    return torch.tensor([int(tables[shard][row]) for shard, row in views], dtype=torch.int64)
