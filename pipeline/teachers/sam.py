"""segment_anything's image encoders as teachers, and the rest of a checkpoint by itself.

Spatial features are the encoder's vectors before its neck, or after it; the summary is their mean. At another
resolution than 1024 the absolute position embeddings are resampled here and the relative ones by the encoder
itself, at each call.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from timm.layers.pos_embed import resample_abs_pos_embed_nhwc
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
from pipeline.teachers.weights import first_difference, load_network, load_state
from storage_schemas.errors import UserError
from storage_schemas.recipe import parse

_URL = "https://dl.fbaipublicfiles.com/segment_anything"
_FILES = {
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}


class SamSettings(TeacherSettings):
    """How a SAM is shown images and read.

    spatial: `backbone` is before the neck, as wide as the encoder; `neck` after it, 256 wide, which is what
    the mask decoder takes.
    """

    summary: Literal["mean"] = "mean"
    spatial: Literal["backbone", "neck"] = "backbone"


@dataclass(frozen=True)
class SamDecoder:
    """What of a SAM comes after its image encoder's blocks.

    neck: b d h w to b 256 h w. prompt_encoder, mask_decoder: as in segment_anything.
    """

    neck: nn.Module
    prompt_encoder: nn.Module
    mask_decoder: nn.Module


def create_sam_teacher(model: str, weights: str, settings: dict[str, Any]) -> FrozenTeacher:
    """The teacher of the family `sam`; see `create_teacher`. weights `hub` are its authors' checkpoint."""
    _require_known(model)
    with torch.device("meta"):
        outline: Any = _build(model, None)
    given = parse(SamSettings, settings, f"teachers.{settings.get('name') or model}")
    side = outline.image_encoder.img_size
    height, width = given.size((side, side))
    require_divisible(model, height, width, outline.image_encoder.patch_embed.proj.stride[0])
    design = Design(
        family="sam",
        model=model,
        given=given,
        height=height,
        width=width,
        pixel_mean=given.pixel_mean or (123.675 / 255, 116.28 / 255, 103.53 / 255),
        pixel_std=given.pixel_std or (58.395 / 255, 57.12 / 255, 57.375 / 255),
        summary=given.summary,
        spatial=given.spatial,
        build=partial(_build, model),
        trim=partial(_trim, model, given, height, width),
        extract=extract_features,
        fetch=partial(_fetch, model),
        pixel_range=255,
        channels_last=False,  # its neck would differ from segment_anything's by more than 1e-5
    )
    return assemble(design, weights)


def load_sam_decoder(model: str, weights: str, seed: int | None = None) -> SamDecoder:
    """Neck, prompt encoder and mask decoder of a checkpoint, frozen, on the CPU.

    weights, seed: as of the teacher. UserError names what is unknown or does not fit.
    """

    _require_known(model)
    sam: Any = load_network(weights, seed, partial(_build, model), partial(_fetch, model))[0]
    sam.eval().requires_grad_(False)
    return SamDecoder(sam.image_encoder.neck, sam.prompt_encoder, sam.mask_decoder)


def find_cached(model: str, tag: str) -> Path | None:
    """The file of weights `hub`, if it has been downloaded or put there."""
    place = _place(model)
    return place if place.is_file() else None


def extract_features(encoder: nn.Module, pixels: torch.Tensor) -> TeacherOutput:
    """Features of normalised pixels `b 3 height width`, by the encoder's own forward."""
    spatial = encoder(pixels).permute(0, 2, 3, 1)  # b d h w -> b h w d
    return TeacherOutput(spatial.float().mean((1, 2)), spatial)


def _import() -> ModuleType:
    try:
        import segment_anything
    except ImportError as error:
        raise UserError("family: 'sam' needs a package: pip install 'rebroadcast[sam]'") from error
    return segment_anything  # type: ignore[no-any-return]


def _require_known(model: str) -> None:
    if model not in _FILES:
        near = ", ".join(difflib.get_close_matches(model, _FILES, 3, cutoff=0.3)) or ", ".join(_FILES)
        raise UserError(f"model: segment_anything has no {model!r}; close names: {near}")


def _build(model: str, path: Path | None) -> nn.Module:
    """The whole SAM, with the weights of a checkpoint, or random ones."""
    make: Callable[[], nn.Module] = _import().sam_model_registry[model]
    if path is None:
        return make()
    with torch.device("meta"):
        sam = make()
    state = load_state(path)
    if difference := first_difference(state, sam.state_dict()):
        raise UserError(f"weights: {path.name!r} is not of {model!r}: {difference}")
    sam.load_state_dict(state, assign=True)
    return sam.float()


def _trim(model: str, given: SamSettings, height: int, width: int, sam: Any) -> nn.Module:
    """The image encoder for images of a size, ended before its neck unless that is asked for."""
    encoder = sam.image_encoder
    keep_blocks(model, encoder, "blocks", given.blocks)
    patch = encoder.patch_embed.proj.stride[0]
    encoder.img_size = height
    encoder.pos_embed = nn.Parameter(
        resample_abs_pos_embed_nhwc(encoder.pos_embed.detach(), [height // patch, width // patch])
    )
    if given.spatial == "backbone":
        encoder.neck = nn.Identity()
    assert isinstance(encoder, nn.Module)
    return encoder


def _place(model: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _FILES[model]


def _fetch(model: str, tag: str) -> tuple[Path, str]:
    """The authors' checkpoint, from where PyTorch keeps downloads, or by download."""
    place, name = _place(model), _FILES[model]
    if tag not in ("", name):
        raise UserError(f"weights: 'hub:{tag}' is not of {model!r}, whose own are 'hub:{name}'")
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            digest = Path(name).stem.rsplit("_", 1)[-1]
            torch.hub.download_url_to_file(f"{_URL}/{name}", str(place), hash_prefix=digest, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"weights: 'hub' cannot be reached ({type(error).__name__}): "
                f"fetch {_URL}/{name} elsewhere and put it at {place}, or give weights: file:PATH"
            ) from error
    return place, name
