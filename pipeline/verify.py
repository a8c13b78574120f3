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
    """Compare about `views` valid views of a teacher, spread over its shards; a line for each that differs.

    UserError if the weights or a source tar cannot be found where they were when the store was recorded.
    """
    spec = store.spec(teacher)
    again = recreate_teacher(spec)
    commits = [store.commit(teacher, shard) for shard in store.shards(teacher)]
    step = max(1, sum(commit.valid_rows for commit in commits) // views)
    return [problem for commit in commits for problem in _compare(store, again, commit, step)]


def _compare(store: FeatureStore, teacher: Teacher, commit: Commit, step: int) -> Iterator[str]:
    spec, part = teacher.spec, store.part(commit.teacher, commit.shard)
    views = store.committed_views(commit)
    replay = CropReplay(commit.shard, commit.source.url, views, store.manifest.max_pixels)
    tolerance = max(TOLERANCE[spec.compute_dtype], INT8_TOLERANCE if spec.codec == "int8" else 0.0)
    valid = np.setdiff1d(np.arange(commit.rows), commit.invalid_rows)
    summary = np.empty((1, spec.summary_dim), np.float16)
    spatial = np.empty((1, spec.grid.height, spec.grid.width, spec.spatial_dim), np.float16)
    for row in valid[::step].tolist():
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
