"""What `extract` reads from a recipe: sections `store`, `data`, `teachers` and `extract`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, field_validator

from storage_schemas.errors import UserError
from storage_schemas.manifest import TEACHER_NAME, Frozen, Positive
from storage_schemas.recipe import DataConfig, StoreConfig, parse
from storage_schemas.sources import expand_shards

Share = Annotated[FiniteFloat, Field(ge=0)]


class TeacherConfig(Frozen, extra="allow"):
    """One entry of section `teachers`. Keys beside these three are settings of the family; it refuses unknown
    ones.
    """

    family: str
    model: str
    weights: str

    @property
    def settings(self) -> dict[str, Any]:
        """What the family is given."""
        return dict(self.model_extra or {})


class RecordingConfig(Frozen):
    """Section `extract`.

    batch_size: views a forward. decode_threads: readers and decoders in each worker. attempts: how often a
    shard is tried before it is listed as failed. workers, ray_address, actor_cpus, actor_gpus: for executor
    `ray`; `auto` takes it where there are several workers or an address (here or in RAY_ADDRESS). actor_cpus:
    that Ray reserves for each actor, and threads of its teachers. device: `auto` is a GPU if there is one.
    """

    batch_size: Positive = 32
    decode_threads: Positive = 2
    attempts: Positive = 3
    executor: Literal["auto", "inline", "ray"] = "auto"
    workers: Positive = 1
    ray_address: str | None = None
    actor_cpus: Share = 1
    actor_gpus: Share = 0
    device: str = "auto"


class ExtractConfig(Frozen):
    """All that recording needs."""

    store: StoreConfig
    data: DataConfig
    teachers: dict[str, TeacherConfig] = Field(min_length=1)
    extract: RecordingConfig = RecordingConfig()

    @field_validator("teachers")
    @classmethod
    def _named(cls, teachers: dict[str, TeacherConfig]) -> dict[str, TeacherConfig]:
        for name, teacher in teachers.items():
            if not re.fullmatch(TEACHER_NAME, name):
                raise ValueError(f"teacher name {name!r} may hold only letters, digits, '_' and '-'")
            if "name" in teacher.settings:
                raise ValueError(f"teacher {name!r} has a key 'name'; the key of the entry is its name")
        return teachers

    @classmethod
    def from_recipe(cls, recipe: dict[str, Any]) -> ExtractConfig:
        """The sections of a recipe that recording reads."""
        return parse(cls, {name: recipe[name] for name in cls.model_fields if name in recipe}, "recipe")

    def select(self, teachers: Sequence[str]) -> ExtractConfig:
        """Only these of the teachers."""
        unknown = [name for name in teachers if name not in self.teachers]
        if unknown:
            raise UserError(
                f"--teachers: {unknown[0]!r} is not in the recipe; there: {', '.join(self.teachers)}"
            )
        return self.model_copy(update={"teachers": {name: self.teachers[name] for name in teachers}})

    def source_shards(self, glob: str = "*") -> dict[str, str]:
        """URLs of the source shards by name, of those whose name matches."""
        found = expand_shards((*self.data.train, *self.data.held_out))
        chosen = {name: url for name, url in found.items() if fnmatchcase(name, glob)}
        if not chosen:
            raise UserError(f"--shards: {glob!r} matches none of {len(found)} source shards")
        return chosen
