"""Any timm model as a teacher: its final patch vectors or last map, and one vector an image."""

from __future__ import annotations

import difflib
import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from huggingface_hub import hf_hub_download
from pydantic import Field
from torch import nn

from pipeline.teachers.base import TeacherOutput, choose_device, normalize_pixels
from pipeline.teachers.weights import (
    file_sha256,
    find_weights,
    first_difference,
    first_line,
    load_state,
    match_state,
    tensors_sha256,
)
from storage_schemas.errors import UserError
from storage_schemas.manifest import TEACHER_NAME, Frozen, PatchGrid, Positive, TeacherSpec
from storage_schemas.recipe import parse

_MISFITS = (RuntimeError, AssertionError, ValueError)


class TimmSettings(Frozen):
    """How a timm model is shown images and read.

    What is not given is the model's own. name: in the store. resolution: a side, or height and width, in
    pixels. seed: of weights `random`. pixel_mean, pixel_std: in [0, 1]. summary: `cls` is the normed class
    token, `mean` the mean of the patch vectors, `pooled` what the model would give its classifier; if not
    given, `cls` where there is one, else `pooled`. device: `auto` is a GPU if there is one.
    """

    name: str | None = Field(None, pattern=TEACHER_NAME)
    resolution: Positive | tuple[Positive, Positive] | None = None
    seed: int | None = None
    pixel_mean: tuple[float, float, float] | None = None
    pixel_std: tuple[float, float, float] | None = None
    summary: Literal["cls", "mean", "pooled"] | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    codec: Literal["fp16", "int8"] = "fp16"
    device: str = "auto"


class TimmTeacher:
    """A frozen timm model in evaluation mode."""

    def __init__(self, model: nn.Module, spec: TeacherSpec, device: torch.device) -> None:
        self.spec = spec
        self._device = device
        # Twice as fast for convolutions on a CPU; a plain ViT does not care.
        self._model = model.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)

    # Not inference mode: its tensors could not be the targets of a loss.
    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> TeacherOutput:
        """Features of uint8 `b 3 height width`; summary b d, spatial b h w d."""
        spec = self.spec
        pixels = normalize_pixels(images, spec.pixel_mean, spec.pixel_std, self._device)  # b 3 height width
        dtype = getattr(torch, spec.compute_dtype)
        with nullcontext() if dtype == torch.float32 else torch.autocast(self._device.type, dtype):
            return extract_features(self._model, pixels, spec.summary)


def create_timm_teacher(model: str, weights: str, settings: dict[str, Any]) -> TimmTeacher:
    """The teacher of the family `timm`; see `create_teacher`."""
    if model not in timm.list_models() and model not in timm.list_pretrained():
        near = ", ".join(difflib.get_close_matches(model, timm.list_models(), 3)) or "none"
        raise UserError(f"model: timm has no {model!r}; close names: {near}")
    given = parse(TimmSettings, settings, f"teachers.{settings.get('name') or model}")
    with torch.device("meta"):
        reference: Any = timm.create_model(model)
    config: dict[str, Any] = reference.pretrained_cfg
    height, width = _resolution(given, config)
    build: dict[str, Any] = {"num_classes": 0}
    if (height, width) != config["input_size"][1:] and _takes_image_size(reference):
        build["img_size"] = (height, width)
    network, source, sha256 = _load(model, weights, given, build, reference)
    mean, std = given.pixel_mean or config["mean"], given.pixel_std or config["std"]
    summary = given.summary or ("cls" if _has_class_token(network) else "pooled")
    if summary == "cls" and not _has_class_token(network):
        raise UserError(f"summary: {model!r} has no normed class token; take 'mean' or 'pooled'")
    device = choose_device(given.device)
    output = _try(network.to(device), model, summary, height, width)
    _, rows, columns, spatial_dim = output.spatial.shape
    spec = TeacherSpec(
        name=given.name or model.replace(".", "-"),
        family="timm",
        model=model,
        weights=source,
        weights_sha256=sha256,
        height=height,
        width=width,
        patch_size=height // rows,
        grid=PatchGrid(height=rows, width=columns),
        summary_dim=output.summary.shape[-1],
        spatial_dim=spatial_dim,
        summary=summary,
        pixel_mean=mean,
        pixel_std=std,
        compute_dtype=given.compute_dtype,
        codec=given.codec,
    )
    return TimmTeacher(network, spec, device)


def extract_features(model: nn.Module, pixels: torch.Tensor, summary: str) -> TeacherOutput:
    """Float32 features of normalised pixels `b 3 height width`, whatever layout the model has inside."""
    features = model.forward_features(pixels)  # type: ignore[operator]
    spatial = _to_grid(model, features, *pixels.shape[-2:])  # b h w d
    if summary == "cls":
        vector = features[:, 0]
    elif summary == "mean":
        vector = spatial.mean((1, 2))
    else:
        vector = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    return TeacherOutput(vector.flatten(1).float(), spatial.float().contiguous())


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


def _resolution(given: TimmSettings, config: dict[str, Any]) -> tuple[int, int]:
    if given.resolution is None:
        _, height, width = config["input_size"]
        return height, width
    return (given.resolution, given.resolution) if isinstance(given.resolution, int) else given.resolution


def _load(
    model: str, weights: str, given: TimmSettings, build: dict[str, Any], reference: Any
) -> tuple[nn.Module, str, str]:
    """The model, where its weights came from, and their SHA-256."""
    if weights == "random":
        if given.seed is None:
            raise UserError("seed: is missing; weights 'random' need one")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(given.seed)
            network = timm.create_model(model, **build)
        return network, f"random:seed={given.seed}", tensors_sha256(network.state_dict())
    if given.seed is not None:
        raise UserError(f"seed: {given.seed} is for weights 'random', and these are {weights!r}")
    if weights == "hub":
        path, source = _fetch(reference.pretrained_cfg), f"hub:{reference.pretrained_cfg['hf_hub_id']}"
    else:
        path = find_weights(weights)
        source = weights if weights.startswith(("package:", "file:")) else f"file:{weights}"
    return _load_file(model, path, build, reference), source, file_sha256(path)


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


def _fetch(config: dict[str, Any]) -> Path:
    """The model's published file, from the local cache of the hub or by download."""
    repository, name = config.get("hf_hub_id"), config.get("hf_hub_filename") or "model.safetensors"
    if not repository:
        raise UserError("weights: 'hub' has none for this model; give file:PATH")
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"weights: 'hub' cannot be reached ({type(error).__name__}): fetch "
            f"https://huggingface.co/{repository}/resolve/main/{name} elsewhere and give weights: file:PATH"
        ) from error


def _try(network: Any, model: str, summary: str, height: int, width: int) -> TeacherOutput:
    """One forward of a blank image, which measures grid and widths and finds what does not fit."""
    try:
        with torch.no_grad():
            blank = torch.zeros(1, 3, height, width, device=next(network.parameters()).device)
            return extract_features(network.eval(), blank, summary)
    except UserError:
        raise
    except _MISFITS as error:
        reason = first_line(error)
        raise UserError(f"resolution: {model!r} takes no {height}x{width} images: {reason}") from error
