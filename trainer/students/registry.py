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

# "Existing efficient models" of AM-RADIO's Table 6, by timm's names, with the table's parameters in millions
# and images a second.
TABLE_6 = {
    "timm/efficientnetv2_s": (21, 9017),
    "timm/resnetv2_101": (44, 7283),
    "timm/regnety_064": (30, 6573),
    "timm/efficientvit_l1": (38, 6048),
    "timm/convnext_base": (88, 1805),
    "timm/nfnet_f3": (254, 1777),
    "timm/swinv2_small_window8_256": (49, 1497),
    "timm/maxvit_base_tf_224": (119, 1486),
    "timm/poolformerv2_m36": (56, 1194),
    "timm/mvitv2_base": (51, 975),
}


def list_students() -> list[str]:
    """Every name that `create_student` takes."""
    return [*STUDENTS, *(TIMM + model for model in timm.list_models())]


def require_student(name: str) -> None:
    """UserError if there is no student of that name."""
    _builder(name, None, {})


def create_student(
    name: str,
    *,
    resolution: tuple[int, int] | None = None,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    **settings: object,
) -> Student:
    """The student `name` with random weights, unless a setting such as timm's `pretrained` says otherwise.

    resolution: height and width that will be seen; models of timm that have one size are made for it.
    `settings` are the builder's own. UserError for a name or a setting that does not exist, and for values
    that it cannot be built with.
    """
    builder = _builder(name, resolution, settings)
    try:
        backbone = builder(**settings)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"student.{setting}={value!r}" for setting, value in settings.items())
        reason = " ".join(str(error).split())
        raise UserError(
            f"student {name!r} cannot be built with {given or 'its defaults'}: {reason}"
        ) from error
    return Student(backbone, pixel_mean, pixel_std)


def _builder(
    name: str, resolution: tuple[int, int] | None, settings: dict[str, object]
) -> Callable[..., Backbone]:
    model = name.removeprefix(TIMM)
    if name.startswith(TIMM) and timm.is_model(model):
        return partial(TimmBackbone, model, resolution)
    if name not in STUDENTS:
        close = get_close_matches(_spelt(name), list_students(), n=3)
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


def _spelt(name: str) -> str:
    """A name as the registry spells it: the paper has E-RADIO-B and RADIO-ViT-B/16."""
    plain = name.lower().replace("e-radio", "eradio").replace("-", "_")
    return plain if plain.startswith(TIMM) else plain.replace("/", "")
