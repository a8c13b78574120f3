"""The demo's figures and pictures, gathered into a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage_schemas.features import TeacherOutput
from storage_schemas.store import FeatureStore
from trainer.config import TrainConfig
from trainer.distillation import Distillation, load_distillation, untrained
from trainer.evaluation.feature_distance import Predict, feature_distances, mean_predictor
from trainer.evaluation.figures import pca_rgb
from trainer.evaluation.knn import nearest
from trainer.evaluation.report import (
    Costs,
    DemoReport,
    Distance,
    FeatureMaps,
    Neighbour,
    Neighbours,
    Panel,
    Picture,
)
from trainer.metrics import read_metrics
from trainer.reader import Batch, TargetReader
from trainer.train import make_reader

CPU = torch.device("cpu")
PANELS = 4  # held-out photographs that are shown
NEIGHBOURS = 4
BATCH = 32


def make_showcase(
    recipe: dict[str, Any], checkpoint: Path, seconds: Mapping[str, float], extract_rate: float
) -> DemoReport:
    """Evaluate a trained student of the recipe against its store, for the page that `report` renders."""
    config = TrainConfig.from_recipe(recipe)
    model = load_distillation(checkpoint)[0]
    train, held_out = make_reader(config), make_reader(config, held_out=True)
    metrics = read_metrics(Path(config.training.output))
    first_views = _View0.of(model, held_out)
    store = train.store
    return DemoReport(
        photographs=len(train) // store.manifest.views_per_image,
        held_out_photographs=len(held_out) // store.manifest.views_per_image,
        views=len(train),
        held_out_views=len(held_out),
        teachers=list(train.specs.values()),
        student=config.student.name,
        curves=_curves(metrics),
        distances=_distances(config, model, train, held_out),
        panels=first_views.panels(),
        neighbours=first_views.neighbours(_View0.of(model, train)),
        costs=Costs(
            stored_bytes={name: _stored_bytes(store, name) for name in train.teachers},
            seconds=seconds,
            extract_rate=extract_rate,
            train_rate=float(np.median([line["images_per_second"] for line in metrics])),
            trained_views=config.training.steps * config.training.batch_size,
            student_parameters=sum(p.numel() for p in model.student.parameters()),
        ),
    )


def _curves(metrics: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    curves = {"total": [(line["step"], line["loss"]) for line in metrics]}
    return curves | {
        name: [(line["step"], line["terms"][name]) for line in metrics] for name in metrics[0]["terms"]
    }


def _distances(
    config: TrainConfig, model: Distillation, train: TargetReader, held_out: TargetReader
) -> list[Distance]:
    predictors: dict[str, Predict] = {
        "before": untrained(config, train.specs).eval(),
        "after": model,
        "mean_predictor": mean_predictor(train.store, train.teachers, train.shards, CPU),
    }
    found = feature_distances(predictors, held_out, BATCH, CPU, config.training.loss)
    return [
        Distance(teacher, **{who: by_teacher[teacher].spatial for who, by_teacher in found.items()})
        for teacher in held_out.teachers
    ]


def _stored_bytes(store: FeatureStore, teacher: str) -> int:
    return sum(store.commit(teacher, shard).bytes for shard in store.shards(teacher))


class _View0:
    """View 0 of every photograph of a reader: as the student sees it, as recorded, and as predicted."""

    def __init__(self, names: list[str], batch: Batch, predicted: dict[str, TeacherOutput]) -> None:
        self.names = names
        self.batch = batch
        self.predicted = predicted

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Distillation, reader: TargetReader) -> _View0:
        captions = {shard: reader.store.views(shard)["caption"].to_pylist() for shard in reader.shards}
        [batch] = reader.in_order(10_000, view=0)
        names = [captions[reader.shards[shard]][row] for shard, row in batch.views.tolist()]
        return cls(names, batch, model(batch.images))

    def picture(self, place: int) -> Picture:
        return Picture(self.names[place], self.batch.images[place].permute(1, 2, 0).contiguous().numpy())

    def panels(self) -> list[Panel]:
        """Colours are fitted on all the shown views of a teacher together, so they can be compared."""
        count = min(PANELS, len(self.names))
        maps = {
            name: pca_rgb(target.spatial[:count].float(), self.predicted[name].spatial[:count])
            for name, target in self.batch.targets.items()
        }
        return [
            Panel(self.picture(i), [FeatureMaps(name, both[0][i], both[1][i]) for name, both in maps.items()])
            for i in range(count)
        ]

    def neighbours(self, bank: _View0) -> list[Neighbours]:
        """For each photograph, those of `bank` nearest by the first teacher's summary and as predicted."""
        teacher = next(iter(self.predicted))
        by_teacher = _similar(bank.batch.targets[teacher], self.batch.targets[teacher])
        by_student = _similar(bank.predicted[teacher], self.predicted[teacher])

        def found(similarity: torch.Tensor, index: torch.Tensor) -> list[Neighbour]:
            return [
                Neighbour(bank.picture(i), s)
                for s, i in zip(similarity.tolist(), index.tolist(), strict=True)
            ]

        return [
            Neighbours(
                self.picture(i),
                teacher,
                len(bank.names),
                found(by_teacher[0][i], by_teacher[1][i]),
                found(by_student[0][i], by_student[1][i]),
            )
            for i in range(min(PANELS, len(self.names)))
        ]


def _similar(bank: TeacherOutput, queries: TeacherOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """(similarity, index), each m k, nearest first."""
    a, b = bank.summary.float(), queries.summary.float()
    index = nearest(a, b, min(NEIGHBOURS, len(a)))  # m k
    similarity = torch.nn.functional.cosine_similarity(b[:, None], a[index], dim=-1)
    return similarity, index
