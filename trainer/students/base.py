"""What a student is: a backbone behind its own pixel normalisation, and the two kinds of feature it gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from storage_schemas.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class StudentOutput:
    """A student's features of a batch: `summary` is b d, `spatial` is b h w d (row before column)."""

    summary: Tensor
    spatial: Tensor


class Backbone(Protocol):
    """An `nn.Module` from normalised images, b 3 height width, to a StudentOutput.

    `patch_size` is the number of input pixels a cell of the grid stands for; `pixel_mean` and `pixel_std`, in
    [0, 1], are what the backbone expects its input to be normalised with.
    """

    patch_size: int
    summary_dim: int
    spatial_dim: int
    pixel_mean: Sequence[float]
    pixel_std: Sequence[float]

    def grid(self, height: int, width: int) -> tuple[int, int]: ...

    def __call__(self, images: Tensor) -> StudentOutput: ...


class Student(nn.Module):
    """A backbone that takes float images in [0, 1], b 3 height width, and normalises them itself.

    pixel_mean, pixel_std: in [0, 1], a number a channel; the backbone's own where not given.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.patch_size = backbone.patch_size
        self.summary_dim = backbone.summary_dim
        self.spatial_dim = backbone.spatial_dim
        mean = _channels("pixel_mean", pixel_mean or backbone.pixel_mean)
        std = _channels("pixel_std", pixel_std or backbone.pixel_std, above=0)
        self.register_buffer("pixel_mean", mean)
        self.register_buffer("pixel_std", std)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of `spatial` for `height` by `width` pixels; UserError if they do not fit."""
        return self.backbone.grid(height, width)

    def forward(self, images: Tensor) -> StudentOutput:
        return self.backbone((images - self.pixel_mean) / self.pixel_std)


def _channels(name: str, values: Sequence[float], above: float = -math.inf) -> Tensor:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3 or not all(above < number < math.inf for number in numbers):
        bound = f" above {above:g}" if above > -math.inf else ""
        raise UserError(f"student.{name}: {values!r} must hold three finite numbers{bound}, one a channel")
    return torch.tensor(numbers, dtype=torch.float32).view(3, 1, 1)
