"""The students by name: builders of backbones in `STUDENTS`, and every timm model as `timm/NAME`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial

import timm

from storage_schemas.errors import UserError
from trainer.students.base import Backbone, Student
from trainer.students.timm import TimmBackbone
from trainer.students.vit import VisionTransformer

STUDENTS: dict[str, Callable[..., Backbone]] = {
    "vit_ti16": partial(VisionTransformer, width=192, depth=12, heads=3),
    "vit_s16": partial(VisionTransformer, width=384, depth=12, heads=6),
    "vit_b16": partial(VisionTransformer, width=768, depth=12, heads=12),
}

TIMM = "timm/"


def list_students() -> list[str]:
    """Every name that `create_student` takes."""
    return [*STUDENTS, *(TIMM + model for model in timm.list_models())]


def create_student(
    name: str,
    *,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    **settings: object,
) -> Student:
    """The student `name` with random weights, unless a setting such as timm's `pretrained` says otherwise.

    `settings` are the builder's own. UserError for a name or a setting that does not exist.
    """
    return Student(_builder(name, settings)(**settings), pixel_mean, pixel_std)


def _builder(name: str, settings: dict[str, object]) -> Callable[..., Backbone]:
    model = name.removeprefix(TIMM)
    if name.startswith(TIMM) and timm.is_model(model):
        return partial(TimmBackbone, model)
    if name not in STUDENTS:
        close = get_close_matches(name, list_students(), n=3)
        hint = (
            f"the closest are {', '.join(close)}"
            if close
            else f"there are {', '.join(STUDENTS)} and {TIMM}NAME"
        )
        raise UserError(f"student name {name!r} is unknown: {hint}")
    known = inspect.signature(STUDENTS[name]).parameters
    for setting in settings:
        if setting not in known:
            raise UserError(
                f"student {name!r} does not take the setting {setting!r}: it takes {', '.join(known)}"
            )
    return STUDENTS[name]
