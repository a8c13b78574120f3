"""Recipes: one YAML file an experiment, a section a stage; and the sections that both halves read."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from storage_schemas.crops import CropPolicy
from storage_schemas.errors import UserError
from storage_schemas.manifest import Frozen, Integer, Positive, Seed, StoreManifest

SECTIONS = ("store", "data", "teachers", "extract", "student", "training", "evaluation")

Model = TypeVar("Model", bound=BaseModel)
Text = Annotated[str, Field(min_length=1)]
Patterns = Annotated[
    tuple[Text, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
]


class StoreConfig(Frozen):
    """Section `store`: where it is, and what its rows have in common."""

    url: Text
    crops: CropPolicy = CropPolicy()
    views_per_image: Integer = Field(1, ge=1, le=10_000)
    seed: Seed = 0
    max_pixels: Positive = 2**26

    def manifest(self) -> StoreManifest:
        """What the store says of itself."""
        return StoreManifest(**{name: value for name, value in self if name != "url"})


class DataConfig(Frozen):
    """Section `data`: source shards, as URLs with globs and braces. `held_out` is never trained on."""

    train: Patterns = Field(min_length=1)
    held_out: Patterns = ()


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The sections of a recipe, with `key.key=value` overrides (values in YAML) applied."""
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError as error:
        raise UserError(f"recipe: {str(path)!r} does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe: {str(path)!r}: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UserError(
            f"recipe: {str(path)!r} holds {type(recipe).__name__}, not sections: {', '.join(SECTIONS)}"
        )
    return override_recipe(recipe, overrides)


def override_recipe(recipe: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The recipe with `key.key=value` overrides (values in YAML); UserError for a section that is none."""
    recipe = deepcopy(recipe)
    for override in overrides:
        _apply(recipe, override)
    unknown = [str(key) for key in recipe if key not in SECTIONS]
    if unknown:
        raise UserError(f"recipe: unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return recipe


def parse(model: type[Model], value: object, where: str) -> Model:
    """A section as its config; UserError with the first field that does not hold, its value, and why."""
    try:
        return model.model_validate({} if value is None else value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join([where, *(str(key) for key in first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(_fields(model, first["loc"][:-1]))
            raise UserError(f"{field}: unknown key (value {first['input']!r}); there are: {known}") from error
        if first["type"] == "missing":
            raise UserError(f"{field}: is missing from the recipe") from error
        raise UserError(f"{field}: {first['input']!r}: {first['msg']}") from error


def _fields(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the model at a place within a model; none where that is no model."""
    found: Any = model
    for key in place:
        if get_origin(found) is dict:
            found = get_args(found)[1]
        elif isinstance(found, type) and issubclass(found, BaseModel) and str(key) in found.model_fields:
            found = found.model_fields[str(key)].annotation
        else:
            return []
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []


def _apply(recipe: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    *sections, last = key.split(".")
    if not separator or not sections:
        raise UserError(f"--set: {override!r} is not section.key=value")
    target: Any = recipe
    for section in sections:
        target = target.setdefault(section, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise UserError(f"--set: {key!r} goes through a value that has no keys")
    try:
        target[last] = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--set: {override!r} is not YAML: {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in given]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice[0]!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)
