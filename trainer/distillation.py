"""The student with its adaptors, and the weighted sum of the losses: what a training step differentiates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from storage_schemas.errors import UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import TeacherSpec
from trainer.adaptors import Adaptor, align
from trainer.balancing import Balancing, Naive, Weights, create_balancing
from trainer.checkpoint import find_checkpoint, load_checkpoint
from trainer.config import LossConfig, TrainConfig
from trainer.losses import mean_over_valid, spatial_loss, summary_loss, teacher_of, terms_of, zero_invalid
from trainer.students import Student, create_student


@dataclass(frozen=True, slots=True)
class Predictions:
    """`by_teacher`: each teacher's features as the student predicts them, `spatial` on the teacher's grid.

    `summary` is the student's own, b d.
    """

    summary: Tensor
    by_teacher: dict[str, TeacherOutput]


class Distillation(nn.Module):
    """A student, an adaptor for each teacher, and how their losses are weighed (naively if not given)."""

    def __init__(
        self,
        student: Student,
        specs: Mapping[str, TeacherSpec],
        adaptor_hidden: int | None = None,
        adaptor_blocks: int = 0,
        normalizer: str = "none",
        balancing: Balancing | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.adaptors = nn.ModuleDict(
            {
                name: Adaptor(
                    student.summary_dim,
                    student.spatial_dim,
                    spec.summary_dim,
                    spec.spatial_dim,
                    adaptor_hidden,
                    adaptor_blocks,
                    normalizer,
                )
                for name, spec in specs.items()
            }
        )
        self.balancing = balancing or Naive()
        self.specs = dict(specs)
        self._grids = {name: (spec.grid.height, spec.grid.width) for name, spec in specs.items()}

    def forward(self, images: Tensor, teachers: Collection[str] | None = None) -> Predictions:
        """Features of some teachers, of all if none are named, from uint8 b 3 height width."""
        features = self.student(images.float() / 255)
        by_teacher = {}
        for name in self.specs if teachers is None else teachers:
            output = self.adaptors[name](features)
            by_teacher[name] = TeacherOutput(output.summary, align(output.spatial, self._grids[name]))
        return Predictions(features.summary, by_teacher)

    def predict(self, images: Tensor, teachers: Collection[str] | None = None) -> dict[str, TeacherOutput]:
        """`by_teacher` alone."""
        predictions: Predictions = self(images, teachers)
        return predictions.by_teacher

    def parameters_beside(self, teachers: Collection[str]) -> list[nn.Parameter]:
        """Of all other teachers' heads and balancing: they take no part where only these are served."""
        others = (head for name, head in self.adaptors.items() if name not in teachers)
        heads = [parameter for head in others for parameter in head.parameters()]
        return heads + self.balancing.parameters_beside(teachers)

    def normalize(self, targets: Mapping[str, TeacherOutput]) -> dict[str, TeacherOutput]:
        """Some teachers' features as the adaptors predict them in training, which is what losses compare."""
        normalized = {}
        for name, target in targets.items():
            adaptor = self.adaptors[name]
            assert isinstance(adaptor, Adaptor)
            normalized[name] = adaptor.normalize(target)
        return normalized

    def fold(self) -> Distillation:
        """The same model, its adaptors from now on at the teachers' own scale: what evaluation takes."""
        for adaptor in self.adaptors.values():
            assert isinstance(adaptor, Adaptor)
            adaptor.fold()
        return self


def untrained(config: TrainConfig, specs: Mapping[str, TeacherSpec]) -> Distillation:
    """The recipe's student and its adaptors, with weights from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        settings, training = config.student.settings, config.training
        student = create_student(config.student.name, resolution=training.resolution, **settings)
        weighed = [term for term in terms_of(specs) if training.loss.weight(term)]
        balancing = create_balancing(training.balancing, weighed, student.summary_dim)
        heads = (training.adaptor_hidden, training.adaptor_blocks, training.normalizer)
        model = Distillation(student, specs, *heads, balancing)
    fields = {f"groups.{name}.resolution": group.resolution for name, group in training.groups.items()}
    for field, resolution in {"resolution": training.resolution, **fields}.items():
        try:
            student.grid(*(resolution or training.resolution))
        except UserError as error:
            raise UserError(f"training.{field}: {error}") from error
    return model


def load_distillation(path: Path) -> tuple[Distillation, dict[str, Any]]:
    """The trained student and adaptors of a checkpoint's folder, in evaluation mode and folded, and the
    recipe they are of.
    """
    checkpoint = load_checkpoint(path)
    recipe = checkpoint.meta["recipe"]
    specs = {name: TeacherSpec.model_validate(spec) for name, spec in checkpoint.meta["teachers"].items()}
    settings = {key: value for key, value in recipe["student"].items() if key != "pretrained"}  # no download
    model = untrained(TrainConfig.from_recipe({**recipe, "student": settings}), specs)
    student, adaptors = checkpoint.evaluated()
    model.student.load_state_dict(student)
    model.adaptors.load_state_dict(adaptors)
    return model.fold().eval(), recipe


def start_from(model: Distillation, path: Path, config: TrainConfig) -> None:
    """Give `model` the student of a checkpoint, and its adaptors, normalizers and all, for the teachers that
    both have.

    UserError where there is none at `path`, or it is of another student, or its heads are of other shapes or
    learned from targets that were normalised otherwise.
    """
    found = find_checkpoint(path)
    if found is None:
        raise UserError(f"training.start_from: {str(path)!r} holds no checkpoint; give the folder of one")
    checkpoint = load_checkpoint(found)
    before = TrainConfig.from_recipe(checkpoint.meta["recipe"])
    theirs = before.student
    if theirs != config.student:
        ours = config.student
        raise UserError(
            f"training.start_from: {str(path)!r} is of the student {theirs.name!r} with {theirs.settings}; "
            f"the recipe has {ours.name!r} with {ours.settings}"
        )
    known = {name: head for name, head in model.adaptors.items() if name in checkpoint.meta["teachers"]}
    if known and before.training.normalizer != config.training.normalizer:
        raise UserError(
            f"training.normalizer: {str(path)!r} of training.start_from has {before.training.normalizer!r}, "
            f"the recipe has {config.training.normalizer!r}; heads for {', '.join(known)} fit only the former"
        )
    heads = nn.ModuleDict(known)
    student, adaptors = checkpoint.evaluated()
    weights = {key: value for key, value in adaptors.items() if key.split(".")[0] in known}
    for module, tensors in ((model.student, student), (heads, weights)):
        _require_same_shapes(module.state_dict(), tensors, path)
        module.load_state_dict(tensors)


def _require_same_shapes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], path: Path) -> None:
    for name in {**ours, **theirs}:
        here, there = (list(side[name].shape) if name in side else "none" for side in (ours, theirs))
        if here != there:
            raise UserError(
                f"training.start_from: {str(path)!r} does not fit the recipe: its {name} is {there}, the "
                f"recipe's {here}"
            )


@dataclass(frozen=True, slots=True)
class Losses:
    """`total` is what is minimised; `terms`, named teacher/summary and teacher/spatial, are unweighted means.

    `weights`: what balancing gave the terms, on average over the samples; those it leaves at 1 are not there.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, Tensor]

    def detach(self) -> Losses:
        """The same values, without the graph behind them."""
        return Losses(
            self.total.detach(),
            {name: term.detach() for name, term in self.terms.items()},
            {name: weight.detach() for name, weight in self.weights.items()},
        )


def loss_terms(
    predicted: Mapping[str, TeacherOutput],
    targets: Mapping[str, TeacherOutput],
    valid: Mapping[str, Tensor],
    config: LossConfig,
) -> dict[str, Tensor]:
    """The terms of L_summary and L_spatial of AM-RADIO, equations 2 and 3, for each sample, b.

    What a row that is not valid gives is finite, and means nothing.
    """
    terms: dict[str, Tensor] = {}
    for name, output in predicted.items():
        summary = zero_invalid(targets[name].summary, valid[name])
        spatial = zero_invalid(targets[name].spatial, valid[name])
        terms[f"{name}/summary"] = summary_loss(output.summary, summary, config.summary, config.transition)
        terms[f"{name}/spatial"] = spatial_loss(
            output.spatial, spatial, config.cosine, config.smooth_l1, config.transition, config.magnitude
        )
    return terms


def weighted_sum(
    terms: Mapping[str, Tensor],
    valid: Mapping[str, Tensor],
    counts: Mapping[str, float],
    config: LossConfig,
    balance: Weights,
) -> Losses:
    """L_summary + L_spatial (AM-RADIO section 3.4) of terms, each b, as recipe and balancing weigh them.

    counts: what each teacher's sums over this rank's valid rows are divided by; see `losses.mean_over_valid`.
    """
    means: dict[str, Tensor] = {}
    total = torch.zeros((), device=next(iter(valid.values())).device) + balance.penalty
    for term, values in terms.items():
        mask, count = valid[teacher_of(term)], counts[teacher_of(term)]
        means[term] = mean = mean_over_valid(values, mask, count)
        if term in balance.factors:
            mean = mean_over_valid(values * balance.factors[term], mask, count)
        total = total + config.weight(term) * mean
    return Losses(total, means, {term: factor.mean() for term, factor in balance.factors.items()})
