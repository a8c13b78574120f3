"""How far predicted features are from stored ones: the paper's losses on held-out views, for each teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from storage_schemas.features import TeacherOutput
from storage_schemas.store import FeatureStore
from trainer.config import LossConfig
from trainer.distillation import distillation_losses
from trainer.reader import TargetReader

Predict = Callable[[torch.Tensor], dict[str, TeacherOutput]]


@dataclass(frozen=True, slots=True)
class FeatureDistance:
    """Mean summary and spatial loss to one teacher over `views` views."""

    teacher: str
    summary: float
    spatial: float
    views: int


def feature_distance(
    predict: Predict,
    reader: TargetReader,
    batch_size: int,
    device: torch.device,
    loss: LossConfig,
    on_views: Callable[[int], None] = lambda count: None,
) -> list[FeatureDistance]:
    """Over all the reader's views; `predict` takes uint8 b 3 height width."""
    sums = {f"{name}/{kind}": 0.0 for name in reader.teachers for kind in ("summary", "spatial")}
    views = dict.fromkeys(reader.teachers, 0)
    with torch.inference_mode():
        for batch in reader.in_order(batch_size):
            batch = batch.to(device)
            losses = distillation_losses(predict(batch.images), batch.targets, batch.valid, loss, _sum)
            for name, value in losses.terms.items():
                sums[name] += float(value)
            for name in views:
                views[name] += int(batch.valid[name].sum())
            on_views(len(batch.views))
    return [
        FeatureDistance(name, sums[f"{name}/summary"] / max(1, n), sums[f"{name}/spatial"] / max(1, n), n)
        for name, n in views.items()
    ]


def _sum(valid: torch.Tensor) -> torch.Tensor:
    """Divides by one: sums can be added over batches that differ in size, means cannot."""
    return torch.ones((), device=valid.device)


def mean_predictor(
    store: FeatureStore, teachers: Sequence[str], shards: Sequence[str], device: torch.device
) -> Predict:
    """Answers every view, and every place in it, with the teacher's mean over some shards.

    What a student must beat to have learned anything about pictures.
    """
    means = {name: {kind: m.mean for kind, m in store.moments(name, shards).items()} for name in teachers}
    grids = {name: store.spec(name).grid for name in teachers}

    def predict(images: torch.Tensor) -> dict[str, TeacherOutput]:
        answers = {}
        for name, mean in means.items():
            summary = torch.tensor(mean["summary"], dtype=torch.float32, device=device)
            spatial = torch.tensor(mean["spatial"], dtype=torch.float32, device=device)
            shape = (len(images), grids[name].height, grids[name].width, len(spatial))
            answers[name] = TeacherOutput(summary.expand(len(images), -1), spatial.expand(shape))
        return answers

    return predict
