"""Several students, or several values of one key of a recipe, trained on the same views and measured alike.

Each is a run of its own in a folder below the recipe's output, so a comparison that is started again goes on
with what is there. Distances are all counted by the loss of the recipe itself, or they could not be compared
where the loss is what varies.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from storage_schemas.errors import DataDamage, UserError
from storage_schemas.recipe import override_recipe
from trainer.config import TrainConfig
from trainer.distillation import load_distillation
from trainer.evaluation.comparison import Comparison, Result, with_page
from trainer.evaluation.feature_distance import FeatureDistance
from trainer.evaluation.subject import Subject
from trainer.groups import open_groups
from trainer.metrics import StepMetrics, read_metrics
from trainer.students.registry import require_student
from trainer.train import train

FOLDER = "compare"
Advance = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """One of what is compared: its own recipe, and the same with the loss that distances are counted by."""

    name: str
    recipe: dict[str, Any]
    measured_by: dict[str, Any]

    @property
    def config(self) -> TrainConfig:
        """What it is trained with."""
        return TrainConfig.from_recipe(self.recipe)


def of_students(recipe: dict[str, Any], names: Sequence[str]) -> list[Variant]:
    """The recipe with each of these students, with default settings but for the recipe's own student.

    UserError for an unknown student, or one named twice.
    """
    own = recipe.get("student") or {}
    for name in names:
        try:
            require_student(name)
        except UserError as error:
            raise UserError(f"--students: {error}") from error
    found = {
        name: {**recipe, "student": own if own.get("name") == name else {"name": name}} for name in names
    }
    if len(found) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"--students: {twice!r} is named twice; name each once")
    return _variants("--students", recipe, found)


def of_values(recipe: dict[str, Any], vary: str) -> tuple[str, list[Variant]]:
    """(key, the recipe with each of the values) of `section.key=value,value`; the values are YAML.

    UserError for a value that the key does not take, and for two that mean the same.
    """
    key, separator, text = vary.partition("=")
    if not separator or "." not in key:
        raise UserError(f"--vary: {vary!r} is not section.key=value,value")
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise UserError(f"--vary: {text!r} is no list of YAML values") from error
    found = {}
    for value in values:
        name = value if isinstance(value, str) else json.dumps(value, default=str)
        if name in found:
            raise UserError(f"--vary: {key}={name} is given twice; give each value once")
        found[name] = override_recipe(recipe, [f"{key}={json.dumps(value, default=str)}"])
    return key, _variants("--vary", recipe, found, f"{key}=")


def _variants(
    option: str, base: dict[str, Any], recipes: dict[str, dict[str, Any]], prefix: str = ""
) -> list[Variant]:
    """With folders of their own; UserError unless each is a recipe of its own."""
    if len(recipes) < 2:
        raise UserError(f"{option}: {', '.join(recipes) or 'nothing'} has nothing to be compared with")
    output = TrainConfig.from_recipe(base).training.output
    loss = base["training"].get("loss") or {}
    found: list[Variant] = []
    for name, recipe in recipes.items():
        folder = Path(output, FOLDER, re.sub(r"[^\w.=+-]+", "-", prefix + name))
        training = {**(recipe.get("training") or {}), "output": str(folder)}
        own = {**recipe, "training": training}
        found.append(Variant(name, own, {**own, "training": {**training, "loss": loss}}))
    for i, later in enumerate(found):
        for earlier in found[:i]:
            _require_different(option, earlier, later)
    return found


def _require_different(option: str, one: Variant, other: Variant) -> None:
    a, b = one.config, other.config
    if a.training.output == b.training.output:
        raise UserError(f"{option}: {one.name!r} and {other.name!r} would share {a.training.output!r}")
    training = a.training.model_copy(update={"output": b.training.output})
    if a.model_copy(update={"training": training}) == b:
        raise UserError(
            f"{option}: {one.name!r} and {other.name!r} mean the same; give values that training tells apart"
        )


def compare(
    key: str,
    variants: Sequence[Variant],
    batch_size: int,
    on_start: Callable[[int], None] = lambda steps: None,
    advance: Advance = lambda steps, text: None,
    on_failure: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Train each variant, or go on with it, then measure all of them, and write the page.

    One that fails is listed and the others go on. UserError before anything is trained where the store or
    the held-out shards are not there. batch_size: of the images that are counted a second.
    """
    configs = [variant.config for variant in variants]
    for config in configs:
        require_student(config.student.name)
    open_groups(configs[0], held_out=True)
    on_start(sum(config.training.steps for config in configs))
    failed: dict[str, str] = {}

    def fail(variant: Variant, error: Exception) -> None:
        reason = " ".join(str(error).split())
        said = reason if isinstance(error, UserError | DataDamage) else f"{type(error).__name__}: {reason}"
        failed[variant.name] = said
        on_failure(f"{variant.name}: {said}")

    checkpoints = {}
    for variant in variants:
        try:
            checkpoints[variant.name] = _train(variant, advance)
        except Exception as error:  # whatever a student meets: the others are not to wait for it
            fail(variant, error)
    found = []
    for variant in (variant for variant in variants if variant.name in checkpoints):
        advance(0, f"{variant.name}: measuring")
        try:
            found.append(_measure(variant, checkpoints[variant.name], batch_size))
        except Exception as error:  # as above
            fail(variant, error)
    constant = {name: d for _, others, _ in found for name, d in others.items()}
    beside = {name: top1 for *_, others in found for name, top1 in others.items()}
    done = Comparison(key, [result for result, *_ in found], constant, beside, failed, None)
    return with_page(done, Path(configs[0].training.output).parent / f"{key}.html") if found else done


def _train(variant: Variant, advance: Advance) -> Path:
    steps, done = variant.config.training.steps, 0

    def show(metrics: StepMetrics) -> None:
        nonlocal done
        advance(metrics.step - done, f"{variant.name}: loss {metrics.loss:.4f}")
        done = metrics.step

    checkpoint = train(variant.recipe, True, show)
    if int(checkpoint.name.removeprefix("step-")) < steps:
        raise KeyboardInterrupt  # SIGTERM ended this run with a checkpoint: it is meant for all of them
    advance(steps - done, variant.name)
    return checkpoint


def _measure(
    variant: Variant, checkpoint: Path, batch_size: int
) -> tuple[Result, dict[str, FeatureDistance], dict[str, float]]:
    """(the variant's result, a constant's distances, k-NN of the teachers and of raw pixels)."""
    model, _ = load_distillation(checkpoint)
    subject = Subject(TrainConfig.from_recipe(variant.measured_by), model)
    distance = subject.distance()
    knn = subject.knn() if subject.is_labelled() else {}
    rates = [rate for line in read_metrics(checkpoint.parent) if (rate := line.get("images_per_second"))]
    result = Result(
        variant.name,
        str(checkpoint),
        sum(parameter.numel() for parameter in model.student.parameters()),
        subject.throughput(batch_size),
        statistics.median(rates),
        distance["student"],
        knn.pop("student", None),
    )
    return result, distance["constant"], knn
