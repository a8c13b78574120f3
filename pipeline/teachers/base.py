"""What every teacher is: uint8 pixels in, features out, and a spec that says everything about itself."""

from __future__ import annotations

from typing import Protocol

import torch

from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import TeacherSpec

__all__ = ["Teacher", "TeacherOutput", "choose_device", "normalize_pixels"]


class Teacher(Protocol):
    """A frozen model. `teacher(images)` is deterministic and needs no gradient."""

    @property
    def spec(self) -> TeacherSpec:
        """Every fact about the teacher."""

    def __call__(self, images: torch.Tensor) -> TeacherOutput:
        """Features, float32 on the teacher's device, of uint8 images `b 3 height width` at its resolution."""


def choose_device(device: str) -> torch.device:
    """The named device; `auto` is a GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def normalize_pixels(
    images: torch.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device,
) -> torch.Tensor:
    """(images / 255 - mean) / std in float32 on the device: uint8 is what travels. b 3 height width."""
    pixels = images.to(device, memory_format=torch.channels_last).float() / 255
    shift, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - shift) / scale
