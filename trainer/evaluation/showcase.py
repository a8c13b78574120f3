"""The demo's figures and pictures, gathered into a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from storage_schemas.features import TeacherOutput
from storage_schemas.store import FeatureStore
from trainer.config import TrainConfig
from trainer.distillation import Distillation, load_distillation
from trainer.evaluation.feature_distance import Predict, feature_distances, mean_predictor
from trainer.evaluation.figures import pca_rgb
from trainer.evaluation.knn import nearest
from trainer.evaluation.report_values import (
    Costs,
    DemoReport,
    Distance,
    FeatureMaps,
    HeldOut,
    Neighbour,
    Neighbours,
    Panel,
    Picture,
)
from trainer.evaluation.report_words import HELD_OUT_TITLES
from trainer.groups import open_groups
from trainer.metrics import read_metrics
from trainer.reader import TargetReader
from trainer.train import first_model

CPU = torch.device("cpu")
PANELS = 3  # images shown of each held-out shard
NEIGHBOURS = 5
BATCH = 32


def make_showcase(
    recipe: dict[str, Any], checkpoint: Path, record_seconds: float, record_rate: float
) -> DemoReport:
    """Evaluate a trained student of the recipe against its store, for the page that `report` renders.

    record_rate: views a second through all the teachers, as measured while recording for `record_seconds`.
    """
    config = TrainConfig.from_recipe(recipe)
    model = load_distillation(checkpoint)[0]
    groups = open_groups(config)
    [train] = (group.reader for group in groups)
    metrics = read_metrics(Path(config.training.output))
    predictors: dict[str, Predict] = {
        "before": first_model(config, groups).fold().eval().predict,
        "after": model.predict,
        "mean_predictor": mean_predictor(train.store, train.teachers, train.shards, CPU),
    }
    bank = _first_views(model, train)
    return DemoReport(
        images=len(bank.names),
        views=len(train),
        teachers=list(train.specs.values()),
        student=config.student.name,
        curves=_curves(metrics),
        held_out=[
            _held_out(shard, config.with_held_out(url), model, predictors, bank)
            for shard, url in config.held_out_shards().items()
        ],
        costs=Costs(
            stored_bytes={name: _stored_bytes(train.store, name) for name in train.teachers},
            seconds={"record": record_seconds, "train": _train_seconds(metrics, config.training.batch_size)},
            extract_rate=record_rate,
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


def _train_seconds(metrics: list[dict[str, Any]], batch_size: int) -> float:
    """From the rate of each line, so that a run that was interrupted counts whole."""
    steps = np.diff([line["step"] for line in metrics], prepend=0)
    return float(sum(steps * batch_size / np.array([line["images_per_second"] for line in metrics])))


def _stored_bytes(store: FeatureStore, teacher: str) -> int:
    return sum(store.commit(teacher, shard).bytes for shard in store.shards(teacher))


def _held_out(
    shard: str, config: TrainConfig, model: Distillation, predictors: Mapping[str, Predict], bank: _Views
) -> HeldOut:
    [reader] = (group.reader for group in open_groups(config, held_out=True))
    found = feature_distances(predictors, reader, BATCH, CPU, config.training.loss)
    queries = _first_views(model, reader)
    shown = np.linspace(0, len(queries.names) - 1, min(PANELS, len(queries.names))).astype(int).tolist()
    return HeldOut(
        title=HELD_OUT_TITLES.get(shard, shard),
        images=len(queries.names),
        views=len(reader),
        distances=[
            Distance(teacher, **{who: by_teacher[teacher].spatial for who, by_teacher in found.items()})
            for teacher in reader.teachers
        ],
        panels=_panels(queries, shown),
        neighbours=_neighbours(bank, queries, shown),
    )


@dataclass(frozen=True, slots=True)
class _Views:
    """View 0 of some images: as the student sees it, as recorded, and as predicted."""

    names: list[str]
    images: torch.Tensor  # uint8 n 3 height width
    targets: dict[str, TeacherOutput]
    predicted: dict[str, TeacherOutput]

    def picture(self, place: int) -> Picture:
        return Picture(self.names[place], self.images[place].permute(1, 2, 0).contiguous().numpy())


def _first_views(model: Distillation, reader: TargetReader) -> _Views:
    captions = {shard: reader.store.views(shard)["caption"].to_pylist() for shard in reader.shards}
    names, images, targets, predicted = [], [], [], []
    for batch in reader.in_order(BATCH, view=0):
        names += [captions[reader.shards[shard]][row] for shard, row in batch.views.tolist()]
        images.append(batch.images)
        targets.append(batch.targets)
        with torch.inference_mode():
            predicted.append(model.predict(batch.images))
    return _Views(names, torch.cat(images), _joined(targets), _joined(predicted))


def _joined(outputs: list[dict[str, TeacherOutput]]) -> dict[str, TeacherOutput]:
    return {
        name: TeacherOutput(
            torch.cat([output[name].summary for output in outputs]).float(),
            torch.cat([output[name].spatial for output in outputs]).float(),
        )
        for name in outputs[0]
    }


def _panels(views: _Views, shown: list[int]) -> list[Panel]:
    """Colours are of directions, for the loss is mostly their cosine; they are fitted on all the shown views
    of a teacher together, so they can be compared.
    """

    def directions(output: TeacherOutput) -> torch.Tensor:
        return F.normalize(output.spatial[shown], dim=-1)

    maps = {
        name: pca_rgb(directions(target), directions(views.predicted[name]))
        for name, target in views.targets.items()
    }
    return [
        Panel(
            views.picture(place), [FeatureMaps(name, both[0][i], both[1][i]) for name, both in maps.items()]
        )
        for i, place in enumerate(shown)
    ]


def _neighbours(bank: _Views, queries: _Views, shown: list[int]) -> list[Neighbours]:
    """For each shown image, those of `bank` nearest by the first teacher's summary and as predicted."""
    teacher = next(iter(queries.targets))

    def found(kind: str, place: int) -> list[Neighbour]:
        candidates = getattr(bank, kind)[teacher].summary  # n d
        query = getattr(queries, kind)[teacher].summary[[place]]  # 1 d
        index = nearest(candidates, query, min(NEIGHBOURS, len(candidates)))[0]
        similarity = F.cosine_similarity(query, candidates[index])
        return [
            Neighbour(bank.picture(i), s) for i, s in zip(index.tolist(), similarity.tolist(), strict=True)
        ]

    return [
        Neighbours(
            queries.picture(place),
            teacher,
            len(bank.names),
            found("targets", place),
            found("predicted", place),
        )
        for place in shown
    ]
