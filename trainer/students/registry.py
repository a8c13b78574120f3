"""The students by name: builders of backbones in `STUDENTS`, and every timm model as `timm/NAME`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial

import timm

from storage_schemas.errors import UserError
from trainer.students.base import Backbone, Student
from trainer.students.eradio import ERadio
from trainer.students.timm import TimmBackbone
from trainer.students.vit import RadioViT

STUDENTS: dict[str, Callable[..., Backbone]] = {
    "radio_vit_ti16": partial(RadioViT, width=192, depth=12, heads=3, max_size=512),
    "radio_vit_s16": partial(RadioViT, width=384, depth=12, heads=6, max_size=512),
    "radio_vit_b32": partial(RadioViT, width=768, depth=12, heads=12, patch_size=32),
    "radio_vit_b16": partial(RadioViT, width=768, depth=12, heads=12),
    "radio_vit_b14": partial(RadioViT, width=768, depth=12, heads=12, patch_size=14, max_size=1050),
    "radio_vit_l16": partial(RadioViT, width=1024, depth=24, heads=16),
    "radio_vit_l14": partial(RadioViT, width=1024, depth=24, heads=16, patch_size=14, max_size=1050),
    "radio_vit_h16": partial(RadioViT, width=1280, depth=32, heads=16),
    "radio_vit_h14": partial(RadioViT, width=1280, depth=32, heads=16, patch_size=14, max_size=1050),
    "eradio_xt": partial(ERadio, width=64, layers=(1, 3, 4, 5)),
    "eradio_t": partial(ERadio, width=80, layers=(1, 3, 4, 5)),
    "eradio_s": partial(ERadio, width=96),
    "eradio_b": partial(ERadio, width=128),
    "eradio_l": partial(ERadio, width=192),
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
