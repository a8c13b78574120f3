"""Which rectangle of an image a view shows, in integers of source pixels.

A crop is drawn from a counter-based generator keyed by (store seed, digest of the image, view), so it does
not depend on order, worker or machine. What is stored is the drawn box itself; nothing ever redraws it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator


@dataclass(frozen=True, slots=True)
class CropBox:
    """Rows [top, top + height) and columns [left, left + width) of the source; then a mirror, if hflip."""

    top: int
    left: int
    height: int
    width: int
    hflip: bool = False


class CropPolicy(BaseModel):
    """How views are cut from an image.

    kind: `random_resized` is timm's RandomResizedCrop (AM-RADIO section 4.1: "random scale + cropping"),
    `center` the
        largest central square, `whole` the whole image, squashed to the model's resolution.
    scale: area of a random crop, as a fraction of the image's.
    ratio: width over height of a random crop, drawn log-uniformly.
    hflip: probability that a random crop is mirrored.
    first_view: cut view 0 of every image this way instead, unmirrored, for evaluation on the same store.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["random_resized", "center", "whole"] = "random_resized"
    scale: tuple[FiniteFloat, FiniteFloat] = (0.08, 1.0)
    ratio: tuple[FiniteFloat, FiniteFloat] = (3 / 4, 4 / 3)
    hflip: float = Field(0.5, ge=0, le=1)
    first_view: Literal["center", "whole"] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} must be 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {self.ratio} must be 0 < low <= high")
        return self

    def draw(self, seed: int, digest: bytes, view: int, height: int, width: int) -> CropBox:
        """The crop of one view of one image of `height` by `width` pixels; `digest` is the image's own."""
        kind = self.first_view if view == 0 and self.first_view else self.kind
        if kind == "whole":
            return CropBox(0, 0, height, width)
        if kind == "center":
            return _centered(height, width, min(height, width), min(height, width))
        return self._draw_random(_uniforms(seed, digest, view), height, width)

    def _draw_random(self, uniform: Iterator[float], height: int, width: int) -> CropBox:
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        hflip = next(uniform) < self.hflip
        for _ in range(10):
            area = height * width * (self.scale[0] + next(uniform) * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + next(uniform) * (high - low))
            crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                top = int(next(uniform) * (height - crop_height + 1))
                left = int(next(uniform) * (width - crop_width + 1))
                return CropBox(top, left, crop_height, crop_width, hflip)
        # An image too long and thin for the ratio: the largest central crop within it, as timm does.
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        crop_height = max(1, min(height, round(width / ratio)))
        crop_width = max(1, min(width, round(height * ratio)))
        box = _centered(height, width, crop_height, crop_width)
        return CropBox(box.top, box.left, box.height, box.width, hflip)


def _centered(height: int, width: int, crop_height: int, crop_width: int) -> CropBox:
    return CropBox((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def _uniforms(seed: int, digest: bytes, view: int) -> Iterator[float]:
    """Uniform numbers in [0, 1): BLAKE2b in counter mode, 53 bits of each 64-bit word."""
    key = seed.to_bytes(8, "little") + view.to_bytes(4, "little") + digest
    counter = 0
    while True:
        block = blake2b(counter.to_bytes(8, "little"), key=key, digest_size=64).digest()
        for start in range(0, 64, 8):
            yield (int.from_bytes(block[start : start + 8], "little") >> 11) * 2.0**-53
        counter += 1
