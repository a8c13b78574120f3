"""Any timm model as a teacher: its final patch vectors or last map, and one vector an image.

DINOv2 and DINOv3 among them; the files of DINOv2's authors load as they are.
"""

from __future__ import annotations

import difflib
import inspect
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from torch import nn

from pipeline.teachers.base import (
    Design,
    FrozenTeacher,
    TeacherOutput,
    TeacherSettings,
    assemble,
    keep_blocks,
    require_divisible,
)
from pipeline.teachers.weights import first_difference, first_line, load_state, match_state
from storage_schemas.errors import UserError
from storage_schemas.recipe import parse


class TimmSettings(TeacherSettings):
    """How a timm model is shown images and read.

    summary: `cls` is the normed class token, `mean` the mean of the patch vectors, `pooled` what the model
    would give its classifier; if not given, `cls` where there is one, else `pooled`.
    """

    summary: Literal["cls", "mean", "pooled"] | None = None


def create_timm_teacher(model: str, weights: str, settings: dict[str, Any]) -> FrozenTeacher:
    """The teacher of the family `timm`; see `create_teacher`. weights `hub` are the model's own."""
    reference = _reference(model)
    given = parse(TimmSettings, settings, f"teachers.{settings.get('name') or model}")
    config: dict[str, Any] = reference.pretrained_cfg
    height, width = given.size(config["input_size"][1:])
    build: dict[str, Any] = {"num_classes": 0}
    if (height, width) != config["input_size"][1:] and _takes_image_size(reference):
        build["img_size"] = (height, width)
    if (height, width) != config["input_size"][1:]:  # some are made for a size with a remainder
        require_divisible(model, height, width, patch_size(reference))
    summary = given.summary or ("cls" if _has_class_token(reference) else "pooled")
    if summary == "cls" and not _has_class_token(reference):
        raise UserError(f"summary: {model!r} has no normed class token; take 'mean' or 'pooled'")

    def make(path: Path | None) -> nn.Module:
        if path is None:
            return timm.create_model(model, **build)
        return _load_file(model, path, build, reference)

    def trim(network: nn.Module) -> nn.Module:
        keep_blocks(model, network, "blocks", given.blocks)
        return network

    design = Design(
        family="timm",
        model=model,
        given=given,
        height=height,
        width=width,
        pixel_mean=given.pixel_mean or config["mean"],
        pixel_std=given.pixel_std or config["std"],
        summary=summary,
        build=make,
        trim=trim,
        extract=partial(extract_features, summary=summary),
        fetch=partial(_fetch, config),
    )
    return assemble(design, weights)


def extract_features(model: nn.Module, pixels: torch.Tensor, summary: str) -> TeacherOutput:
    """Features of normalised pixels `b 3 height width`, whatever layout the model has inside."""
    features = model.forward_features(pixels)  # type: ignore[operator]
    spatial = _to_grid(model, features, *pixels.shape[-2:])  # b h w d
    if summary == "cls":
        vector = features[:, 0]
    elif summary == "mean":
        vector = spatial.mean((1, 2))
    else:
        vector = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    return TeacherOutput(vector.flatten(1), spatial)


def patch_size(model: nn.Module) -> int:
    """Pixels along a patch; 1 of a model without."""
    found = getattr(getattr(model, "patch_embed", model), "patch_size", 1)
    return int(found[0] if isinstance(found, tuple) else found)


def find_cached(model: str, tag: str) -> Path | None:
    """The file of weights `hub`, if it has been downloaded before."""
    config = _reference(model).pretrained_cfg
    if not config.get("hf_hub_id"):
        return None
    found = try_to_load_from_cache(config["hf_hub_id"], config.get("hf_hub_filename") or "model.safetensors")
    return Path(found) if isinstance(found, str) else None


def _reference(model: str) -> Any:
    """The model with its classifier, without weights; UserError with the closest names if there is none."""
    if model not in timm.list_models() and model not in timm.list_pretrained():
        near = ", ".join(difflib.get_close_matches(model, timm.list_models(), 3)) or "none"
        raise UserError(f"model: timm has no {model!r}; close names: {near}")
    with torch.device("meta"):
        return timm.create_model(model)


def _to_grid(model: nn.Module, features: Any, height: int, width: int) -> torch.Tensor:
    """Patch vectors as b h w d, without class and register tokens."""
    if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
        raise UserError(f"model: {type(model).__name__} gives no single map of features")
    if features.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return features if channels_last else features.permute(0, 2, 3, 1)  # b h w d
    tokens = features[:, _prefix_tokens(model) :]  # b (h w) d
    rows = round((tokens.shape[1] * height / width) ** 0.5)
    if rows == 0 or tokens.shape[1] % rows:
        raise UserError(
            f"model: {type(model).__name__}'s {tokens.shape[1]} tokens are no grid of {height}x{width}"
        )
    return tokens.reshape(len(tokens), rows, -1, tokens.shape[2])  # b h w d


def _prefix_tokens(model: nn.Module) -> int:
    count = getattr(model, "num_prefix_tokens", None)
    return int(getattr(model, "cls_token", None) is not None) if count is None else int(count)


def _has_class_token(model: nn.Module) -> bool:
    """A class token that the model norms with its patches; some norm only what they pool from the patches."""
    norm = getattr(model, "norm", None)
    return getattr(model, "cls_token", None) is not None and not isinstance(norm, nn.Identity | None)


def _takes_image_size(model: nn.Module) -> bool:
    return "img_size" in inspect.signature(type(model).__init__).parameters


def _load_file(model: str, path: Path, build: dict[str, Any], reference: Any) -> nn.Module:
    """Through timm's own loading, which resamples position embeddings and knows the official checkpoints.

    The classifier, whatever it distinguishes, is left out: no feature passes through it.
    """
    expected = reference.state_dict()
    state = match_state(load_state(path), expected)
    classifiers = reference.pretrained_cfg["classifier"] or ()
    heads = tuple(f"{head}." for head in ([classifiers] if isinstance(classifiers, str) else classifiers))
    body = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    try:
        network: Any = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay={"state_dict": body, "num_classes": 0}, **build
        )
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        difference = first_difference(state, expected) or first_line(error)
        raise UserError(f"weights: {path.name!r} is not of {model!r}: {difference}") from error
    network.pretrained_cfg.pop("state_dict", None)  # else a second copy of the weights lives on
    return network  # type: ignore[no-any-return]


def _fetch(config: dict[str, Any], tag: str) -> tuple[Path, str]:
    """The model's published file, from the local cache of the hub or by download."""
    repository, name = config.get("hf_hub_id"), config.get("hf_hub_filename") or "model.safetensors"
    if not repository:
        raise UserError("weights: 'hub' has none for this model; give file:PATH")
    if tag not in ("", repository):
        raise UserError(f"weights: 'hub:{tag}' is not of this model, whose own are 'hub:{repository}'")
    try:
        return Path(hf_hub_download(repository, name)), repository
    except (OSError, ValueError) as error:
        raise UserError(
            f"weights: 'hub' cannot be reached ({type(error).__name__}): fetch "
            f"https://huggingface.co/{repository}/resolve/main/{name} elsewhere and give weights: file:PATH"
        ) from error
