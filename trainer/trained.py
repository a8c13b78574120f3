"""A trained student in a folder of its own: two files of weights and a card that says what they are.

`load_student` reads it from a local folder or an object store, and needs neither the store of targets nor the
recipe.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from torch import Tensor, nn

from storage_schemas.errors import DataDamage, UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import Frozen, TeacherSpec
from storage_schemas.objects import Objects, open_objects
from trainer.adaptors import Adaptor
from trainer.checkpoint import ADAPTORS, RECORD, STUDENT, find_checkpoint, load_checkpoint
from trainer.config import TrainConfig
from trainer.distillation import Distillation
from trainer.metrics import read_metrics
from trainer.students import Student, create_student

CARD = "card.json"


class Card(Frozen):
    """What a trained student is.

    name, settings: what `create_student` takes. resolution: height and width of its training images. targets:
    digest of the recordings it learned from. metrics: of its last step. files: SHA-256 of each by name.
    """

    version: int = 1
    name: str
    settings: dict[str, Any]
    resolution: tuple[int, int]
    adaptor_hidden: int | None
    adaptor_blocks: int
    teachers: dict[str, TeacherSpec]
    targets: str
    steps: int
    metrics: dict[str, Any]
    files: dict[str, str]


class Adapted(nn.Module):
    """A student under one teacher's heads: float images in [0, 1] to that teacher's features, as predicted.

    `spatial` is on the student's grid.
    """

    def __init__(self, student: Student, adaptor: Adaptor) -> None:
        super().__init__()
        self.student = student
        self.adaptor = adaptor

    def forward(self, images: Tensor) -> TeacherOutput:
        out: TeacherOutput = self.adaptor(self.student(images))
        return out


class TrainedStudent(Student):
    """A student with the heads it was trained with, and its card."""

    def __init__(self, student: Student, adaptors: nn.ModuleDict, card: Card) -> None:
        mean, std = (buffer.flatten().tolist() for buffer in (student.pixel_mean, student.pixel_std))
        super().__init__(student.backbone, mean, std)
        self.adaptors = adaptors
        self.card = card

    def adapt(self, teacher: str) -> Adapted:
        """The student as `teacher`; UserError if it did not learn from it."""
        if teacher not in self.adaptors:
            raise UserError(f"teacher {teacher!r} has no heads here; there: {', '.join(self.adaptors)}")
        adaptor = self.adaptors[teacher]
        assert isinstance(adaptor, Adaptor)
        return Adapted(self, adaptor)


def read_checkpoint(path: Path) -> TrainedStudent:
    """The student of a checkpoint's folder, or of the newest of a folder of them, in evaluation mode, its
    heads at the teachers' own scale.
    """
    found = find_checkpoint(path)
    if found is None:
        raise UserError(f"checkpoint: {str(path)!r} holds none; give the training.output of a recipe")
    path, checkpoint = found, load_checkpoint(found)
    config = TrainConfig.from_recipe(checkpoint.meta["recipe"])
    metrics = [line for line in read_metrics(path.parent) if line["step"] == checkpoint.step]
    card = Card(
        name=config.student.name,
        settings={key: value for key, value in config.student.settings.items() if key != "pretrained"},
        resolution=config.training.resolution,
        adaptor_hidden=config.training.adaptor_hidden,
        adaptor_blocks=config.training.adaptor_blocks,
        teachers=checkpoint.meta["teachers"],
        targets=checkpoint.meta["targets"],
        steps=checkpoint.step,
        metrics=metrics[-1] if metrics else {},
        files={},
    )
    return _restore(card, *checkpoint.evaluated(), config.training.normalizer)


def write_student(student: TrainedStudent, url: str) -> None:
    """Write the folder that `load_student` reads, the card last."""
    objects = open_objects(url, create=True, field="--out")
    weights = Student.state_dict(student)
    heads = {key: value for key, value in weights.items() if key.startswith("adaptors.")}
    own = {key: value for key, value in weights.items() if key not in heads}
    heads = {key.removeprefix("adaptors."): value for key, value in heads.items()}
    files = {}
    for name, tensors in ((STUDENT, own), (ADAPTORS, heads)):
        data = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})
        objects.put(name, data)
        files[name] = sha256(data).hexdigest()
    card = student.card.model_copy(update={"files": files})
    objects.put(CARD, card.model_dump_json(indent=2).encode())


def load_student(url: str) -> TrainedStudent:
    """The student in a folder or URL that `rebroadcast export --to safetensors` wrote, in evaluation mode.

    UserError if there is none; DataDamage names the file that is not what was written.
    """
    objects = open_objects(url, field="student")
    try:
        card = Card.model_validate_json(objects.get(CARD))
    except FileNotFoundError as error:
        hint = " (`rebroadcast export` makes one of a checkpoint)" if _has(objects, RECORD) else ""
        raise UserError(f"student: {url!r} holds no {CARD}{hint}") from error
    except ValidationError as error:
        raise DataDamage(f"student {url!r}: {CARD} cannot be read ({error})") from error
    weights = {name: _read(objects, name, card.files.get(name)) for name in (STUDENT, ADAPTORS)}
    return _restore(card, weights[STUDENT], weights[ADAPTORS])


def _restore(
    card: Card, student: dict[str, Tensor], adaptors: dict[str, Tensor], normalizer: str = "none"
) -> TrainedStudent:
    backbone = create_student(card.name, resolution=card.resolution, **card.settings)
    model = Distillation(backbone, card.teachers, card.adaptor_hidden, card.adaptor_blocks, normalizer)
    try:
        model.student.load_state_dict(student)
        model.adaptors.load_state_dict(adaptors)
    except RuntimeError as error:
        raise DataDamage(f"student: the weights are not those of a {card.name!r} ({error})") from error
    return TrainedStudent(model.student, model.fold().adaptors, card).eval()


def _read(objects: Objects, name: str, expected: str | None) -> dict[str, Tensor]:
    try:
        data = objects.get(name)
    except FileNotFoundError as error:
        raise DataDamage(f"student {objects.url!r}: {name} is missing") from error
    if (found := sha256(data).hexdigest()) != expected:
        raise DataDamage(f"student {objects.url!r}: {name} has digest {found}, recorded {expected}")
    return safetensors.torch.load(data)


def _has(objects: Objects, name: str) -> bool:
    return objects.size(name) is not None
