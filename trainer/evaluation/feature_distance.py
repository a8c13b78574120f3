"""How far predicted features are from stored ones: the paper's losses on held-out views, for each teacher."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from storage_schemas.errors import UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.store import FeatureStore
from trainer.config import LossConfig
from trainer.distillation import loss_terms
from trainer.losses import mean_over_valid, teacher_of
from trainer.reader import TargetReader

Predict = Callable[[Tensor, Collection[str]], Mapping[str, TeacherOutput]]


@dataclass(frozen=True, slots=True)
class FeatureDistance:
    """Mean summary and spatial loss to one teacher over `views` views."""

    summary: float
    spatial: float
    views: int


def feature_distances(
    predictors: Mapping[str, Predict],
    reader: TargetReader,
    batch_size: int,
    device: torch.device,
    loss: LossConfig,
    on_views: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, FeatureDistance]]:
    """Of each predictor to each teacher, over all the reader's views, which are read once.

    A predictor takes uint8 b 3 height width and the names of teachers. UserError where no view has features
    of a teacher.
    """
    sums: dict[tuple[str, str], float] = {}
    views = dict.fromkeys(reader.teachers, 0)
    for batch in reader.in_order(batch_size):
        batch = batch.to(device)
        for who, predict in predictors.items():
            with torch.inference_mode():
                terms = loss_terms(predict(batch.images, reader.teachers), batch.targets, batch.valid, loss)
            for term, values in terms.items():
                total = mean_over_valid(values, batch.valid[teacher_of(term)], total_valid=1.0)
                sums[who, term] = sums.get((who, term), 0.0) + float(total)
        for teacher in views:
            views[teacher] += int(batch.valid[teacher].sum())
        on_views(len(batch.views))
    empty = [teacher for teacher, count in views.items() if not count]
    if empty:
        raise UserError(f"teacher: {empty[0]!r} has features of none of these views: nothing to compare with")
    return {
        who: {
            name: FeatureDistance(sums[who, f"{name}/summary"] / n, sums[who, f"{name}/spatial"] / n, n)
            for name, n in views.items()
        }
        for who in predictors
    }


def mean_predictor(
    store: FeatureStore, teachers: Sequence[str], shards: Sequence[str], device: torch.device
) -> Predict:
    """Answers every view, and every place in it, with the teacher's mean over some shards.

    What a student must beat to have learned anything about pictures.
    """
    answers = {}
    for name in teachers:
        spec, moments = store.spec(name), store.moments(name, shards)
        summary, spatial = (
            torch.tensor(moments[kind].mean, dtype=torch.float32, device=device)
            for kind in ("summary", "spatial")
        )
        grid = (1, spec.grid.height, spec.grid.width, -1)
        answers[name] = TeacherOutput(summary.expand(1, -1), spatial.expand(grid))

    def predict(images: Tensor, teachers: Collection[str]) -> dict[str, TeacherOutput]:
        b, known = len(images), {name: answers[name] for name in teachers}
        return {
            name: TeacherOutput(a.summary.expand(b, -1), a.spatial.expand(b, -1, -1, -1))
            for name, a in known.items()
        }

    return predict
