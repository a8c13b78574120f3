"""The student with its adaptors, and the weighted sum of the losses: what a training step differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from storage_schemas.errors import UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import TeacherSpec
from trainer.adaptors import Adaptor, align
from trainer.checkpoint import find_checkpoint, load_checkpoint
from trainer.config import LossConfig, TrainConfig
from trainer.losses import mean_over_valid, spatial_loss, summary_loss, zero_invalid
from trainer.students import Student, create_student


class Distillation(nn.Module):
    """A student and an adaptor for each teacher."""

    def __init__(
        self,
        student: Student,
        specs: Mapping[str, TeacherSpec],
        adaptor_hidden: int | None = None,
        adaptor_blocks: int = 0,
        normalizer: str = "none",
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
        self.specs = dict(specs)
        self._grids = {name: (spec.grid.height, spec.grid.width) for name, spec in specs.items()}

    def forward(self, images: Tensor) -> dict[str, TeacherOutput]:
        """Each teacher's features as the student predicts them, on its grid, from uint8 b 3 height width."""
        features = self.student(images.float() / 255)
        predicted = {}
        for name, adaptor in self.adaptors.items():
            output = adaptor(features)
            predicted[name] = TeacherOutput(output.summary, align(output.spatial, self._grids[name]))
        return predicted

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
        model = Distillation(
            student, specs, training.adaptor_hidden, training.adaptor_blocks, training.normalizer
        )
    student.grid(*config.training.resolution)  # UserError where they do not fit
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
    model.student.load_state_dict(checkpoint.student)
    model.adaptors.load_state_dict(checkpoint.adaptors)
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
    weights = {key: value for key, value in checkpoint.adaptors.items() if key.split(".")[0] in known}
    for module, tensors in ((model.student, checkpoint.student), (heads, weights)):
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
    """`total` is what is minimised; `terms`, named teacher/summary and teacher/spatial, are unweighted."""

    total: Tensor
    terms: dict[str, Tensor]

    def detach(self) -> Losses:
        """The same values, without the graph behind them."""
        return Losses(self.total.detach(), {name: term.detach() for name, term in self.terms.items()})


def distillation_losses(
    predicted: Mapping[str, TeacherOutput],
    targets: Mapping[str, TeacherOutput],
    valid: Mapping[str, Tensor],
    config: LossConfig,
    share_of_valid: Callable[[Tensor], Tensor] = lambda valid: valid.sum(),
) -> Losses:
    """L_summary + L_spatial of AM-RADIO, equations 2 and 3, averaged over the valid rows.

    share_of_valid: what each sum over this rank's valid rows is divided by; see `losses.mean_over_valid`.
    """
    terms: dict[str, Tensor] = {}
    total = torch.zeros((), device=next(iter(valid.values())).device)
    for name, output in predicted.items():
        mask, count = valid[name], share_of_valid(valid[name])
        summary = summary_loss(output.summary, zero_invalid(targets[name].summary, mask))  # b
        spatial = spatial_loss(
            output.spatial,
            zero_invalid(targets[name].spatial, mask),
            config.cosine,
            config.smooth_l1,
            config.transition,
        )  # b
        terms[f"{name}/summary"] = mean_over_valid(summary, mask, count)
        terms[f"{name}/spatial"] = mean_over_valid(spatial, mask, count)
        total = (
            total
            + config.summary_weight.get(name, 1.0) * terms[f"{name}/summary"]
            + config.spatial_weight.get(name, 1.0) * terms[f"{name}/spatial"]
        )
    return Losses(total, terms)
