"""What `eval` is asked about: a recipe, with its newest checkpoint if there is one, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from storage_schemas.errors import UserError
from storage_schemas.recipe import override_recipe, read_recipe
from storage_schemas.store import FeatureStore
from trainer.checkpoint import find_checkpoint, newest_checkpoint
from trainer.config import TrainConfig, require_same_run
from trainer.distillation import Distillation, load_distillation
from trainer.distributed import choose_device
from trainer.evaluation.feature_distance import FeatureDistance, Predict, feature_distances, mean_predictor
from trainer.evaluation.knn import knn_accuracy
from trainer.evaluation.summaries import (
    Summaries,
    Summarise,
    image_summaries,
    pixel_summary,
    student_summary,
    teacher_summaries,
)
from trainer.evaluation.throughput import Throughput, measure_throughput
from trainer.groups import open_groups
from trainer.reader import TargetReader

OnViews = Callable[[int], None]


@dataclass(frozen=True)
class Subject:
    """A recipe and, once it is trained, its model in evaluation mode."""

    config: TrainConfig
    model: Distillation | None

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Subject:
        """From a recipe file; from a checkpoint, whose own recipe then counts; or from a folder of them.

        UserError where a recipe's newest checkpoint was trained with other settings.
        """
        if path.is_dir():
            checkpoint = find_checkpoint(path)
            if checkpoint is None:
                raise UserError(f"checkpoint: {str(path)!r} holds none; give the training.output of a recipe")
            model, recipe = load_distillation(checkpoint)
            return cls(TrainConfig.from_recipe(override_recipe(recipe, overrides)), model)
        config = TrainConfig.from_recipe(read_recipe(path, overrides))
        newest = newest_checkpoint(Path(config.training.output))
        if newest is None:
            return cls(config, None)
        model, recipe = load_distillation(newest)
        require_same_run(TrainConfig.from_recipe(recipe), config, f"checkpoint {str(newest)!r}")
        return cls(config, model)

    @property
    def device(self) -> torch.device:
        """Where the student runs."""
        return choose_device(self.config.training.device)

    def knn(self, on_views: OnViews = lambda count: None) -> dict[str, float]:
        """Top-1 of k-NN for each teacher, the raw pixels and the student: bank `data.train`, queries
        `data.held_out`.
        """
        config = self.config
        bank, queries = config.train_shards(), config.held_out_shards()
        store = FeatureStore.open(config.store.url)
        result = {
            name: self._top1(teacher_summaries(store, name, bank), teacher_summaries(store, name, queries))
            for group in config.training.teacher_groups(store.teachers()).values()
            for name in group.teachers
        }
        return result | self._knn_of_images({"raw pixels": pixel_summary, **self._student()}, on_views)

    def student_knn(self) -> float:
        """Top-1 of the student alone."""
        return self._knn_of_images(self._student())["student"]

    def _student(self) -> dict[str, Summarise]:
        """How the student summarises images, by its name; nothing before it is trained."""
        if self.model is None:
            return {}
        return {"student": student_summary(self.model.student.to(self.device), self.device)}

    def _knn_of_images(
        self, summarise: Mapping[str, Summarise], on_views: OnViews = lambda count: None
    ) -> dict[str, float]:
        of_bank, of_queries = (
            image_summaries(summarise, self._images(held_out), self.config.evaluation.batch_size, on_views)
            for held_out in (False, True)
        )
        return {name: self._top1(of_bank[name], of_queries[name]) for name in summarise}

    def _images(self, held_out: bool) -> TargetReader:
        """A reader of the views of all groups, at the resolution of `training`."""
        training = self.config.training
        names = tuple(name for group in training.groups.values() for name in group.teachers)
        if names:
            training = training.model_copy(update={"groups": {}, "teachers": names})
        [group] = open_groups(self.config.model_copy(update={"training": training}), held_out)
        return group.reader

    def is_labelled(self) -> bool:
        """Whether k-NN can be counted: some images have labels, of `data.train` and of `data.held_out`."""
        store = FeatureStore.open(self.config.store.url)
        return all(
            any(store.views(shard)["label"].is_valid().to_numpy().any() for shard in shards)
            for shards in (self.config.train_shards(), self.config.held_out_shards())
        )

    def _top1(self, bank: Summaries, queries: Summaries) -> float:
        settings = self.config.evaluation
        bank, queries = bank.labelled("data.train"), queries.labelled("data.held_out")
        if (images := len(bank.labels)) < settings.k:
            raise UserError(f"evaluation.k: {settings.k} is more than the {images} labels of data.train")
        return knn_accuracy(
            bank.features, bank.labels, queries.features, queries.labels, settings.k, settings.temperature
        )

    def distance(self, on_views: OnViews = lambda count: None) -> dict[str, dict[str, FeatureDistance]]:
        """To each teacher on the held-out views, of the student and of a constant: the teacher's mean."""
        shards = [*self.config.train_shards()]

        def predictors(reader: TargetReader) -> dict[str, Predict]:
            constant = mean_predictor(reader.store, reader.teachers, shards, self.device)
            model = {} if self.model is None else {"student": self.model.to(self.device).predict}
            return {"constant": constant, **model}

        return self._distances(predictors, on_views)

    def student_distance(self) -> dict[str, FeatureDistance]:
        """To each teacher on the held-out views, of the student alone: no moments are read."""
        assert self.model is not None
        predict: Predict = self.model.to(self.device).predict
        return self._distances(lambda reader: {"student": predict})["student"]

    def _distances(
        self,
        predictors: Callable[[TargetReader], dict[str, Predict]],
        on_views: OnViews = lambda count: None,
    ) -> dict[str, dict[str, FeatureDistance]]:
        size, loss = self.config.evaluation.batch_size, self.config.training.loss
        found: dict[str, dict[str, FeatureDistance]] = {}
        for reader in (group.reader for group in open_groups(self.config, held_out=True)):
            compared = feature_distances(predictors(reader), reader, size, self.device, loss, on_views)
            for who, by_teacher in compared.items():
                found.setdefault(who, {}).update(by_teacher)
        return found

    def throughput(self, batch_size: int) -> Throughput:
        """Of the student's forward pass at the training resolution."""
        if self.model is None:
            raise UserError("RECIPE_OR_CHECKPOINT: the recipe has no checkpoint yet; run `rebroadcast train`")
        height, width = self.config.training.resolution
        return measure_throughput(self.model.student, height, width, batch_size, self.device)
