"""Deep verification: run a recorded teacher again on a sample of views and compare with what is stored."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.teachers import Teacher, recreate_teacher
from storage_schemas.commits import Commit
from storage_schemas.replay import CropReplay
from storage_schemas.store import FeatureStore

# |stored - again| / |again| of a view, which differs by rounding and by the batch it was computed in; a wrong
# crop or a wrong image gives 0.3 and more.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.05, "float16": 0.05}
INT8_TOLERANCE = 0.05


def verify_deep(store: FeatureStore, teacher: str, views: int) -> list[str]:
    """Compare `views` valid views of a teacher (all, if it has fewer), evenly spread over its shards; a line
    for each that differs.

    UserError if the weights or a source tar cannot be found where they were when the store was recorded.
    """
    again = recreate_teacher(store.spec(teacher))
    commits = [store.commit(teacher, shard) for shard in store.shards(teacher)]
    ends = np.cumsum([commit.valid_rows for commit in commits], dtype=np.int64)
    total = int(ends[-1]) if commits else 0
    count = min(views, total)
    chosen = np.arange(count) * total // max(1, count)  # places among the valid views of all shards
    problems: list[str] = []
    for commit, end in zip(commits, ends.tolist(), strict=True):
        places = chosen[(chosen >= end - commit.valid_rows) & (chosen < end)] - (end - commit.valid_rows)
        if len(places):
            valid = np.setdiff1d(np.arange(commit.rows), commit.invalid_rows)
            problems += _compare(store, again, commit, valid[places].tolist())
    return problems


def _compare(store: FeatureStore, teacher: Teacher, commit: Commit, rows: list[int]) -> Iterator[str]:
    spec, part = teacher.spec, store.part(commit.teacher, commit.shard)
    views = store.committed_views(commit)
    replay = CropReplay(commit.shard, commit.source.url, views, store.manifest.max_pixels)
    tolerance = max(TOLERANCE[spec.compute_dtype], INT8_TOLERANCE if spec.codec == "int8" else 0.0)
    summary = np.empty((1, spec.summary_dim), np.float16)
    spatial = np.empty((1, spec.grid.height, spec.grid.width, spec.spatial_dim), np.float16)
    for row in rows:
        output = teacher(replay.crop(row, (spec.height, spec.width))[None])
        part.read_summary([row], summary)
        part.read_spatial([row], spatial)
        for kind, stored, again in (
            ("summary", summary, output.summary),
            ("spatial", spatial, output.spatial),
        ):
            error = _relative_error(torch.from_numpy(stored), again)
            if not error <= tolerance:
                where = f"shard {commit.shard!r}, teacher {spec.name!r}, row {row}"
                yield f"{where}: {kind} differs by {error:.3f} of its norm when run again (limit {tolerance})"


def _relative_error(stored: torch.Tensor, again: torch.Tensor) -> float:
    again = again.double().cpu()
    return float((stored.double() - again).norm() / again.norm().clamp(min=1e-12))
