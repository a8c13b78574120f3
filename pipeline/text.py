"""The text side of a CLIP teacher: embeddings of class names, for zero-shot classification."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import ExtractConfig
from pipeline.teachers.base import choose_device
from pipeline.teachers.open_clip import import_open_clip, load_clip
from pipeline.teachers.weights import first_line
from storage_schemas.errors import UserError
from storage_schemas.store import FeatureStore
from storage_schemas.text import ClassEmbeddings, TextProvenance

BUILT_IN = "imagenet"


def record_text(
    config: ExtractConfig, teacher: str, classes: str, templates: str = BUILT_IN, name: str | None = None
) -> ClassEmbeddings:
    """Record embeddings of class names beside a teacher that the store knows; those that there are now.

    classes, templates: `imagenet`, or a text file of one class name, or one template with `{}`, a line. name:
    of the list; by default that of the file. UserError if the list is there already, made otherwise.
    """
    entry = config.select([teacher]).teachers[teacher]
    store = FeatureStore.open(config.store.url)
    spec = store.spec(teacher)
    if entry.family != "open_clip" or spec.summary != "projected":
        raise UserError(
            f"--teacher: {teacher!r} has no text side: it must be of open_clip, with summary 'projected'"
        )
    settings = {"device": config.extract.device, **entry.settings, "name": teacher}
    names, texts = read_classes(classes), read_templates(templates)
    found = embed_classes(entry.model, entry.weights, settings, names, texts)
    if found.provenance.weights_sha256 != spec.weights_sha256:
        raise UserError(
            f"weights: {entry.weights!r} have sha256 {found.provenance.weights_sha256}; "
            f"teacher {teacher!r} was recorded with {spec.weights_sha256}"
        )
    return store.put_text(teacher, name or Path(classes).stem, found)


def embed_classes(
    model: str, weights: str, settings: dict[str, Any], names: Sequence[str], templates: Sequence[str]
) -> ClassEmbeddings:
    """Embed each class in each template, normalise, average, normalise: open_clip's own code does."""
    open_clip = import_open_clip()
    clip, source, sha256 = load_clip(model, weights, settings)
    try:
        tokenizer = open_clip.get_tokenizer(model)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"model: the tokenizer of {model!r} cannot be had: {first_line(error)}") from error
    device = choose_device(settings.get("device", "auto"))
    vectors = open_clip.build_zero_shot_classifier(
        clip.eval().to(device), tokenizer, list(names), list(templates), device=device
    )  # d c
    provenance = TextProvenance(
        model=model,
        weights=source,
        weights_sha256=sha256,
        tokenizer=f"open_clip {open_clip.__version__} {type(tokenizer).__name__}",
        templates=tuple(templates),
    )
    return ClassEmbeddings(tuple(names), vectors.T.float().cpu().contiguous().numpy(), provenance)


def read_classes(classes: str) -> tuple[str, ...]:
    """Class names of a file, or open_clip's names of ImageNet's 1000."""
    if classes == BUILT_IN:
        return tuple(import_open_clip().IMAGENET_CLASSNAMES)
    return _read_lines(classes, "--classes")


def read_templates(templates: str) -> tuple[str, ...]:
    """Templates of a file, or the 80 of CLIP's authors for ImageNet."""
    if templates == BUILT_IN:
        return tuple(template("{}") for template in import_open_clip().OPENAI_IMAGENET_TEMPLATES)
    found = _read_lines(templates, "--templates")
    wrong = [line for line in found if line.count("{}") != 1 or line.count("{") + line.count("}") != 2]
    if wrong:
        raise UserError(f"--templates: {wrong[0]!r} must hold {{}} once, where the class name goes")
    return found


def _read_lines(path: str, option: str) -> tuple[str, ...]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {path!r} cannot be read: {first_line(error)}") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise UserError(f"{option}: {path!r} holds no line")
    return found
