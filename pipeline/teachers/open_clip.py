"""Any vision tower of open_clip as a teacher, and the whole model for its text side.

Spatial features are the last patch vectors after the final norm, or the last map of a convolutional tower,
never projected. The summary is what `encode_image` gives, so that the text tower's embeddings can be compared
with it, or the class token before its projection.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from pipeline.teachers.base import (
    Design,
    FrozenTeacher,
    TeacherOutput,
    TeacherSettings,
    Triple,
    assemble,
    keep_blocks,
    require_divisible,
)
from pipeline.teachers.timm import patch_size
from pipeline.teachers.weights import OUTLINE, first_difference, first_line, load_network, load_state
from storage_schemas.errors import UserError
from storage_schemas.recipe import parse


class ClipSettings(TeacherSettings):
    """How an open_clip model is shown images and read.

    summary: `projected` is what `encode_image` gives (of SigLIP, its attention pool's vector), `cls` the
    normed class token before the projection.
    """

    summary: Literal["projected", "cls"] = "projected"


def create_open_clip_teacher(model: str, weights: str, settings: dict[str, Any]) -> FrozenTeacher:
    """The teacher of the family `open_clip`; see `create_teacher`. weights `hub:TAG` is a pretrained tag."""
    return assemble(_design(model, weights, settings), weights)


def load_clip(model: str, weights: str, settings: dict[str, Any]) -> tuple[Any, str, str]:
    """Both towers, where their weights came from, and their SHA-256: those of the teacher so made."""
    design = _design(model, weights, settings)
    return load_network(weights, design.given.seed, design.build, design.fetch)


def import_open_clip() -> ModuleType:
    """The package, or UserError saying how to install it."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError("family: 'open_clip' needs a package: pip install 'rebroadcast[clip]'") from error
    return open_clip  # type: ignore[no-any-return]


def find_cached(model: str, tag: str) -> Path | None:
    """The file of weights `hub:TAG`, if it has been downloaded before."""
    config = import_open_clip().get_pretrained_cfg(model, tag)
    for repository, name in _published(config):
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def extract_features(visual: Any, pixels: torch.Tensor) -> TeacherOutput:
    """Features of normalised pixels `b 3 height width`, by open_clip's own forward."""
    settings = {}
    if hasattr(visual, "ln_post") or hasattr(visual, "trunk"):
        # The final norm of a tower that pools by attention comes after the pool, and has its width.
        settings["normalize_intermediates"] = getattr(visual, "attn_pool", None) is None
    found = visual.forward_intermediates(pixels, indices=1, **settings)
    spatial = found["image_intermediates"][-1]  # b d h w
    return TeacherOutput(found["image_features"], spatial.permute(0, 2, 3, 1))


def _design(model: str, weights: str, settings: dict[str, Any]) -> Design:
    open_clip = import_open_clip()
    if model not in open_clip.list_models():
        near = ", ".join(difflib.get_close_matches(model, open_clip.list_models(), 3)) or "none"
        raise UserError(f"model: open_clip has no {model!r}; close names: {near}")
    given = parse(ClipSettings, settings, f"teachers.{settings.get('name') or model}")
    config = open_clip.get_model_config(model)
    own = config["vision_cfg"]["image_size"]
    height, width = given.size((own, own) if isinstance(own, int) else tuple(own))
    size = height if height == width else (height, width)
    if isinstance(config["vision_cfg"].get("layers"), list) and size != own:
        raise UserError(f"resolution: {model!r} takes only {own}x{own}, for which its attention pool is made")
    mean, std = _pixel_statistics(model, weights, given)
    return Design(
        family="open_clip",
        model=model,
        given=given,
        height=height,
        width=width,
        pixel_mean=mean,
        pixel_std=std,
        summary=given.summary,
        build=partial(_build, model, None if size == own else size),
        trim=partial(_trim, model, given, None if size == own else (height, width)),
        extract=extract_features,
        fetch=partial(_fetch, model, bool(config.get("quick_gelu"))),
    )


def _pixel_statistics(model: str, weights: str, given: ClipSettings) -> tuple[Triple, Triple]:
    """Mean and std as given, else of the pretrained tag, else of all of the model's tags if they agree."""
    open_clip = import_open_clip()
    if given.pixel_mean and given.pixel_std:
        return given.pixel_mean, given.pixel_std
    tags = open_clip.list_pretrained_tags_by_model(model)
    kind, _, tag = weights.partition(":")
    if kind == "hub" and tag in tags:
        tags = [tag]
    configs = [open_clip.get_pretrained_cfg(model, tag) for tag in tags]
    known = {(tuple(config["mean"]), tuple(config["std"])) for config in configs}
    if len(known) > 1 and weights != OUTLINE:
        raise UserError(f"pixel_mean: weights of {model!r} differ in it; give pixel_mean and pixel_std")
    mean, std = next(iter(known), (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return given.pixel_mean or mean, given.pixel_std or std


def _build(model: str, image_size: int | tuple[int, int] | None, path: Path | None) -> nn.Module:
    """Both towers, with the weights of a file through open_clip's own loading, or random ones."""
    open_clip = import_open_clip()
    # Read twice: open_clip's own reading would also take formats that are not safe.
    state = load_state(path) if path else {}
    try:
        with _quiet():
            return open_clip.create_model(  # type: ignore[no-any-return]
                model,
                pretrained=str(path) if path else None,
                pretrained_text=False,
                force_image_size=image_size,
                device=torch.get_default_device(),
            )
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError, AssertionError) as error:
        if path is None:
            raise UserError(f"model: {model!r} cannot be made: {first_line(error)}") from error
        with torch.device("meta"):
            expected = _build(model, image_size, None).state_dict()
        difference = first_difference(state, expected) or first_line(error)
        raise UserError(f"weights: {path.name!r} is not of {model!r}: {difference}") from error


def _trim(model: str, given: ClipSettings, size: tuple[int, int] | None, network: Any) -> nn.Module:
    """The vision tower, ended before its projection if `cls` is asked for. size: if not its own."""
    visual = network.visual
    if size:
        require_divisible(model, *size, patch_size(getattr(visual, "trunk", visual)))
    if hasattr(visual, "transformer"):
        keep_blocks(model, visual.transformer, "resblocks", given.blocks)
    else:
        keep_blocks(model, getattr(visual, "trunk", visual), "blocks", given.blocks)
    if given.summary == "cls":
        if getattr(visual, "pool_type", None) != "tok" or visual.attn_pool is not None:
            raise UserError(f"summary: {model!r} has no class token of its own; take 'projected'")
        visual.proj = None
    assert isinstance(visual, nn.Module)
    return visual


def _fetch(model: str, quick_gelu: bool, tag: str) -> tuple[Path, str]:
    """The file of a pretrained tag, from the local cache of its hub or by download."""
    open_clip = import_open_clip()
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        there = ", ".join(tags) or "none"
        raise UserError(f"weights: 'hub:{tag}' is no pretrained tag of {model!r}; there are: {there}")
    config = open_clip.get_pretrained_cfg(model, tag)
    if config.get("quick_gelu", False) != quick_gelu:
        other = f"{model}-quickgelu" if config.get("quick_gelu") else model.removesuffix("-quickgelu")
        raise UserError(f"model: weights 'hub:{tag}' were trained with another activation: take {other!r}")
    try:
        return Path(open_clip.download_pretrained(config)), tag
    except (OSError, RuntimeError) as error:
        published = _published(config)
        repository, name = published[-1] if published else ("", "")
        url = f"https://huggingface.co/{repository}/resolve/main/{name}" if repository else config["url"]
        raise UserError(
            f"weights: 'hub:{tag}' cannot be reached ({type(error).__name__}): "
            f"fetch {url} elsewhere and give weights: file:PATH"
        ) from error


def _published(config: dict[str, Any]) -> list[tuple[str, str]]:
    """(repository, file) of a tag's weights, as open_clip tries them."""
    repository, _, name = config.get("hf_hub", "").rpartition("/")
    if not repository:
        return []
    if name:
        safe = str(Path(name).with_suffix(".safetensors"))
        return [(repository, file) for file in dict.fromkeys((safe, name))]
    return [(repository, "open_clip_model.safetensors"), (repository, "open_clip_pytorch_model.bin")]


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs a warning where weights are random on purpose, and errors that are reported anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
