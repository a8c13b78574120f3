"""Teachers by family: `create_teacher("timm", "vit_large_patch14_dinov2", weights="hub")`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.teachers.base import Teacher, TeacherOutput
from pipeline.teachers.open_clip import create_open_clip_teacher
from pipeline.teachers.sam import create_sam_teacher
from pipeline.teachers.timm import create_timm_teacher
from pipeline.teachers.weights import OUTLINE
from storage_schemas.errors import UserError
from storage_schemas.manifest import TeacherSpec

__all__ = ["FAMILIES", "Teacher", "TeacherOutput", "create_teacher", "outline_teacher", "recreate_teacher"]

FAMILIES: dict[str, Callable[..., Teacher]] = {
    "open_clip": create_open_clip_teacher,
    "timm": create_timm_teacher,
    "sam": create_sam_teacher,
}


def create_teacher(family: str, model: str, *, weights: str, **settings: Any) -> Teacher:
    """A frozen teacher, ready to be called.

    weights: `random` (with a `seed`), `hub` or `hub:TAG`, `package:NAME`, `package:NAME/FILE`, `file:PATH` or
    a path. settings: `TeacherSettings` and what the family adds. UserError names what is unknown or does not
    fit.
    """
    if family not in FAMILIES:
        raise UserError(f"family: {family!r} is unknown; there are {', '.join(FAMILIES)}")
    return FAMILIES[family](model, weights, settings)


def outline_teacher(family: str, model: str, **settings: Any) -> Teacher:
    """The teacher without weights, made in no time: its features are shapes (tensors on device `meta`).

    Of its spec, what depends on the weights is not to be relied on: their digest, and for some models of
    open_clip the pixel statistics.
    """
    known = {key: value for key, value in settings.items() if key != "seed"}
    return create_teacher(family, model, weights=OUTLINE, **known)


def recreate_teacher(spec: TeacherSpec) -> Teacher:
    """The teacher that a spec describes; UserError, naming the fields, if it is no longer the same."""
    weights, _, seed = spec.weights.partition(":seed=")
    optional = {"seed": int(seed) if seed else None, "blocks": spec.blocks, "spatial": spec.spatial}
    again = create_teacher(
        spec.family,
        spec.model,
        weights=weights,
        name=spec.name,
        resolution=(spec.height, spec.width),
        pixel_mean=spec.pixel_mean,
        pixel_std=spec.pixel_std,
        summary=spec.summary,
        compute_dtype=spec.compute_dtype,
        codec=spec.codec,
        **{key: value for key, value in optional.items() if value is not None},
    )
    if again.spec.fingerprint != spec.fingerprint:
        before, now = spec.model_dump(), again.spec.model_dump()
        differing = [key for key in now if before[key] != now[key]]
        pairs = "; ".join(f"{key}: stored {before[key]!r}, now {now[key]!r}" for key in differing)
        raise UserError(f"teacher: {spec.name!r} cannot be made again: {pairs}")
    return again
