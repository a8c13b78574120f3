"""Teachers by family: `create_teacher("timm", "vit_large_patch14_dinov2", weights="hub")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.teachers.base import Teacher, TeacherOutput
from pipeline.teachers.timm import create_timm_teacher
from storage_schemas.errors import UserError

__all__ = ["FAMILIES", "Teacher", "TeacherOutput", "create_teacher"]

FAMILIES: dict[str, Callable[..., Teacher]] = {"timm": create_timm_teacher}


def create_teacher(family: str, model: str, *, weights: str, **settings: Any) -> Teacher:
    """A frozen teacher, ready to be called.

    weights: `random` (with a `seed`), `hub`, `package:NAME`, `package:NAME/FILE`, `file:PATH` or a path.
    settings: of the family; timm's are in `TimmSettings`. UserError names what is unknown or does not fit.
    """
    if family not in FAMILIES:
        raise UserError(f"family: {family!r} is unknown; there are {', '.join(FAMILIES)}")
    return FAMILIES[family](model, weights, settings)
