"""What every teacher is: uint8 pixels in, features out, and a spec that says everything about itself.

A family settles a `Design` (how its model is built, shown images and read) and `assemble` makes the teacher
of it: shapes first, from a model without weights, so that what does not fit is refused before any weights are
read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field, FiniteFloat
from torch import nn

from pipeline.teachers.weights import OUTLINE, first_line, load_network
from storage_schemas.errors import UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import TEACHER_NAME, Frozen, PatchGrid, Positive, Seed, TeacherSpec

__all__ = ["Design", "FrozenTeacher", "Teacher", "TeacherOutput", "TeacherSettings", "assemble"]

_MISFITS = (RuntimeError, AssertionError, ValueError, NotImplementedError)

Triple = tuple[float, float, float]
Spread = Annotated[FiniteFloat, Field(gt=0)]


class Teacher(Protocol):
    """A frozen model. `teacher(images)` is deterministic and needs no gradient."""

    @property
    def spec(self) -> TeacherSpec:
        """Every fact about the teacher."""

    def __call__(self, images: torch.Tensor) -> TeacherOutput:
        """Features, float32 on the teacher's device, of uint8 images `b 3 height width` at its resolution."""


class TeacherSettings(Frozen):
    """What every family can be told.

    What is not given is the model's own. name: in the store. resolution: a side, or height and width, in
    pixels. seed: of weights `random`. blocks: only the first so many transformer blocks, a small stand-in for
    the model. pixel_mean, pixel_std: in [0, 1]. compute_dtype: other than float32, by autocast. compile: with
    `torch.compile`, minutes for the first batch. device: `auto` is a GPU if there is one.
    """

    name: str | None = Field(None, pattern=TEACHER_NAME)
    resolution: Positive | tuple[Positive, Positive] | None = None
    seed: Seed | None = None
    blocks: Positive | None = None
    pixel_mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    pixel_std: tuple[Spread, Spread, Spread] | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    codec: Literal["fp16", "int8"] = "fp16"
    compile: bool = False
    device: str = "auto"

    def size(self, own: tuple[int, int]) -> tuple[int, int]:
        """Height and width in pixels; `own` are the model's."""
        if self.resolution is None:
            return own
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else self.resolution


@dataclass(frozen=True)
class Design:
    """A model of a family before its weights.

    build: the model with the weights of a file, or random ones. trim: what of it is needed for features.
    extract: TeacherOutput of the trimmed model and normalised pixels `b 3 height width`. fetch: the file that
    `hub:TAG` means, from a local cache or by download, and the whole TAG. channels_last: for convolutions.
    pixel_range: what white is where the model's own code normalises, 1 or 255, so that rounding is the same.
    """

    family: str
    model: str
    given: TeacherSettings
    height: int
    width: int
    pixel_mean: Triple
    pixel_std: Triple
    summary: str
    build: Callable[[Path | None], nn.Module]
    trim: Callable[[nn.Module], nn.Module]
    extract: Callable[[nn.Module, torch.Tensor], TeacherOutput]
    fetch: Callable[[str], tuple[Path, str]]
    spatial: str | None = None
    channels_last: bool = True
    pixel_range: int = 1


class FrozenTeacher:
    """A frozen model in evaluation mode."""

    def __init__(self, design: Design, network: nn.Module, spec: TeacherSpec, device: torch.device) -> None:
        self.spec = spec
        self._device = device
        # Twice as fast for convolutions on a CPU; a plain ViT does not care.
        self._format = torch.channels_last if design.channels_last else torch.contiguous_format
        self._network = network.eval().requires_grad_(False).to(device).to(memory_format=self._format)
        self._extract = torch.compile(design.extract) if design.given.compile else design.extract
        self._unit = 255 / design.pixel_range
        self._mean, self._std = (
            torch.tensor([design.pixel_range * value for value in values], device=device).view(1, 3, 1, 1)
            for values in (spec.pixel_mean, spec.pixel_std)
        )

    # Not inference mode: its tensors could not be the targets of a loss.
    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> TeacherOutput:
        """Features of uint8 `b 3 height width`; summary b d, spatial b h w d."""
        dtype = getattr(torch, self.spec.compute_dtype)
        if self._device.type == "cuda" and images.device.type == "cpu":
            images = images.pin_memory()
        pixels = images.to(self._device, non_blocking=True, memory_format=self._format)
        pixels = (pixels.float() / self._unit - self._mean) / self._std  # b 3 height width
        with nullcontext() if dtype == torch.float32 else torch.autocast(self._device.type, dtype):
            output = self._extract(self._network, pixels)
        return TeacherOutput(output.summary.float(), output.spatial.float().contiguous())


def assemble(design: Design, weights: str) -> FrozenTeacher:
    """The teacher with its weights. With weights OUTLINE it has none, and its features are shapes alone."""
    given = design.given
    with torch.device("meta"):
        outline = design.trim(design.build(None)).eval()
    shapes = _shapes(design, outline)
    network, source, sha256 = load_network(weights, given.seed, design.build, design.fetch)
    _, rows, columns, spatial_dim = shapes.spatial.shape
    facts: dict[str, Any] = {"summary": design.summary, "spatial": design.spatial}
    spec = TeacherSpec(
        name=given.name or design.model.replace(".", "-"),
        family=design.family,
        model=design.model,
        weights=source,
        weights_sha256=sha256,
        height=design.height,
        width=design.width,
        patch_size=design.height // rows,
        grid=PatchGrid(height=rows, width=columns),
        summary_dim=shapes.summary.shape[-1],
        spatial_dim=spatial_dim,
        pixel_mean=design.pixel_mean,
        pixel_std=design.pixel_std,
        compute_dtype=given.compute_dtype,
        codec=given.codec,
        blocks=given.blocks,
        **facts,
    )
    device = torch.device("meta") if weights == OUTLINE else choose_device(given.device)
    return FrozenTeacher(design, design.trim(network), spec, device)


def _shapes(design: Design, outline: nn.Module) -> TeacherOutput:
    """Features of one image, as shapes."""
    try:
        with torch.no_grad(), torch.device("meta"):
            return design.extract(outline, torch.zeros(1, 3, design.height, design.width))
    except UserError:
        raise
    except _MISFITS as error:
        size = f"{design.height}x{design.width}"
        raise UserError(
            f"resolution: {design.model!r} takes no {size} images: {first_line(error)}"
        ) from error


def require_divisible(model: str, height: int, width: int, patch: int) -> None:
    """UserError unless the patch size divides both sides: the rest of an image would be dropped unseen."""
    if height % patch or width % patch:
        raise UserError(
            f"resolution: {height}x{width} is no multiple of {patch}, the patch size of {model!r}"
        )


def keep_blocks(model: str, owner: Any, name: str, count: int | None) -> None:
    """Cut a list of blocks to its first `count`; UserError if there is no such list, or if it is shorter."""
    if count is None:
        return
    blocks = getattr(owner, name, None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList):
        raise UserError(f"blocks: {count}: {model!r} has no list of transformer blocks")
    if count > len(blocks):
        raise UserError(f"blocks: {count}: {model!r} has {len(blocks)}")
    setattr(owner, name, blocks[:count])


def choose_device(device: str) -> torch.device:
    """The named device; `auto` is a GPU if there is one. UserError for one that is unknown or not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {device!r} cannot be used here: {first_line(error)}") from error
