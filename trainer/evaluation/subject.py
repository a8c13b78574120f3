"""What `eval` is asked about: a recipe, with its newest checkpoint if there is one, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from storage_schemas.errors import UserError
from storage_schemas.recipe import override_recipe, read_recipe
from storage_schemas.store import FeatureStore
from trainer.checkpoint import RECORD, load_checkpoint, newest_checkpoint
from trainer.config import TrainConfig
from trainer.distillation import Distillation, load_distillation
from trainer.evaluation.feature_distance import feature_distance, mean_predictor
from trainer.evaluation.knn import knn_accuracy
from trainer.evaluation.summaries import Summaries, student_summaries, teacher_summaries
from trainer.evaluation.throughput import measure_throughput
from trainer.train import make_reader

OnViews = Callable[[int], None]


@dataclass(frozen=True)
class Subject:
    """A recipe and, once it is trained, its model; `model` is on the CPU and in evaluation mode."""

    config: TrainConfig
    model: Distillation | None

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Subject:
        """From a recipe file, or from a checkpoint's folder, whose own recipe then counts."""
        if path.is_dir():
            if not (path / RECORD).is_file():
                raise UserError(f"checkpoint: {str(path)!r} holds no {RECORD}: give a folder step-…")
            sections = read_recipe_of(path, overrides)
            return cls(TrainConfig.from_recipe(sections), load_distillation(path)[0])
        config = TrainConfig.from_recipe(read_recipe(path, overrides))
        newest = newest_checkpoint(Path(config.training.output))
        return cls(config, load_distillation(newest)[0] if newest else None)

    @property
    def device(self) -> torch.device:
        """Where the student runs."""
        name = self.config.training.device
        return torch.device(
            "cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name
        )

    def knn(self, on_views: OnViews = lambda count: None) -> dict[str, float]:
        """Top-1 of k-NN for each teacher and the student: bank `data.train`, queries `data.held_out`."""
        config, settings = self.config, self.config.evaluation
        store = FeatureStore.open(config.store.url)
        shards = (list(config.train_shards()), list(config.held_out_shards()))

        def top1(bank: Summaries, queries: Summaries) -> float:
            bank, queries = bank.labelled("data.train"), queries.labelled("data.held_out")
            return knn_accuracy(
                bank.features, bank.labels, queries.features, queries.labels, settings.k, settings.temperature
            )

        result = {
            name: top1(*(teacher_summaries(store, name, part) for part in shards))
            for name in config.training.teachers or store.teachers()
        }
        if self.model is not None:
            student = self.model.student.to(self.device)
            readers = (make_reader(config), make_reader(config, held_out=True))
            found = [
                student_summaries(student, reader, settings.batch_size, self.device, on_views)
                for reader in readers
            ]
            result["student"] = top1(*found)
        return result

    def distance(self, on_views: OnViews = lambda count: None) -> dict[str, float]:
        """Summary and spatial loss to each teacher on the held-out views, of the student and of the mean."""
        reader = make_reader(self.config, held_out=True)
        teachers = list(reader.teachers)
        train_shards = list(self.config.train_shards())
        predictors = {"constant": mean_predictor(reader.store, teachers, train_shards, self.device)}
        if self.model is not None:
            predictors["student"] = self.model.to(self.device)
        result = {}
        for who, predict in predictors.items():
            size, loss = self.config.evaluation.batch_size, self.config.training.loss
            for found in feature_distance(predict, reader, size, self.device, loss, on_views):
                result[f"{who}: {found.teacher} summary"] = found.summary
                result[f"{who}: {found.teacher} spatial"] = found.spatial
        return result

    def throughput(self, batch_size: int) -> dict[str, Any]:
        """Of the student's forward pass at the training resolution."""
        if self.model is None:
            raise UserError("RECIPE_OR_CHECKPOINT: the recipe has no checkpoint yet; run `rebroadcast train`")
        height, width = self.config.training.resolution
        found = measure_throughput(self.model.student, height, width, batch_size, self.device)
        return asdict(found)


def read_recipe_of(checkpoint: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe that a checkpoint was trained by."""
    return override_recipe(load_checkpoint(checkpoint).meta["recipe"], overrides)
