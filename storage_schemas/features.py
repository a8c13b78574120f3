"""Features in memory: what a teacher gives, how numbers are packed for the store, and their moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

TOKENS_PER_VIEW = (
    4  # of each view's grid, for the moments: enough for a shard, and small beside a teacher's forward
)


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """One teacher's features of a batch: `summary` is b d, `spatial` is b h w d (row before column)."""

    summary: torch.Tensor
    spatial: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedFeatures:
    """Features as they are stored. `summary` is fp16 b d; `spatial` fp16 b h w d, or int8 with `scale` fp16 b
    h w.

    A row that is not finite in fp16 is not `valid` (b,), and holds NaN.
    """

    summary: NDArray[np.float16]
    spatial: NDArray[Any]
    scale: NDArray[np.float16] | None
    valid: NDArray[np.bool_]

    def restored(self) -> NDArray[np.float16]:
        """`spatial` as a reader will get it, fp16."""
        return self.spatial if self.scale is None else dequantize(self.spatial, self.scale)


def pack(output: TeacherOutput, codec: Literal["fp16", "int8"] = "fp16") -> PackedFeatures:
    """Round to fp16, or to int8 with one fp16 scale a token. What overflows (65504) makes its row invalid."""
    summary, spatial = output.summary.half().cpu(), output.spatial.half().cpu()
    valid = _is_finite(summary) & _is_finite(spatial)
    if not valid.all():
        summary[~valid], spatial[~valid] = torch.nan, torch.nan
    if codec == "fp16":
        return PackedFeatures(summary.numpy(), spatial.contiguous().numpy(), None, valid.numpy())
    levels, scale = _quantize(output.spatial.float().cpu())
    levels[~valid], scale[~valid] = 0, torch.nan
    return PackedFeatures(summary.numpy(), levels.numpy(), scale.numpy(), valid.numpy())


def _is_finite(half: torch.Tensor) -> torch.Tensor:
    """(b,) whether a row of b ... fp16 is finite: by its bits, for torch's own test is forty times slower.

    Infinity and NaN have all exponent bits set: 0x7C00 to 0x7FFF, and with a sign 0xFC00 to 0xFFFF. Those are
    the largest as signed and as unsigned integers, so two maxima find them without a copy.
    """
    rows = half.flatten(1).numpy()
    positive = rows.view(np.int16).max(axis=1) < 0x7C00
    return torch.from_numpy(positive & (rows.view(np.uint16).max(axis=1) < 0xFC00))


def _quantize(spatial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (spatial.abs().amax(dim=-1) / 127).half()  # b h w
    step = scale.float().unsqueeze(-1)
    levels = torch.where(step > 0, spatial / step, 0).nan_to_num().round().clamp(-127, 127)
    return levels.to(torch.int8), scale


def dequantize(levels: NDArray[np.int8], scale: NDArray[np.float16]) -> NDArray[np.float16]:
    """b h w d from int8 levels b h w d and their scale b h w."""
    wide = levels.astype(np.float32) * scale[..., None].astype(np.float32)
    return wide.astype(np.float16)


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean (d,) and population covariance (d, d) of vectors, in float64."""

    count: int
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @staticmethod
    def of(vectors: NDArray[np.floating]) -> Moments:
        """The moments of n d."""
        if len(vectors) == 0:
            d = vectors.shape[1]
            return Moments(0, np.zeros(d), np.zeros((d, d)))
        mean = vectors.mean(axis=0, dtype=np.float64)
        centered = (vectors - mean).astype(np.float32)  # n d
        return Moments(len(vectors), mean, (centered.T @ centered).astype(np.float64) / len(vectors))

    @staticmethod
    def merge(parts: Iterable[Moments]) -> Moments:
        """The moments of all the vectors together (Chan, Golub, LeVeque 1979)."""
        total: Moments | None = None
        for part in parts:
            total = part if total is None else total._join(part)
        assert total is not None, "nothing to merge"
        return total

    def _join(self, other: Moments) -> Moments:
        count = self.count + other.count
        if count == 0:
            return self
        a, b = self.count / count, other.count / count
        delta = other.mean - self.mean
        covariance = a * self.covariance + b * other.covariance + a * b * np.outer(delta, delta)
        return Moments(count, self.mean + b * delta, covariance)


def sample_tokens(spatial: NDArray[np.float16], first_row: int) -> NDArray[np.float16]:
    """TOKENS_PER_VIEW tokens (n d) of each grid of b h w d, at places that move on from row to row of the
    shard.
    """
    b, h, w, d = spatial.shape
    n = min(TOKENS_PER_VIEW, h * w)
    places = (np.arange(first_row, first_row + b)[:, None] * 7 + np.arange(n) * (h * w) // n) % (h * w)
    tokens: NDArray[np.float16] = spatial.reshape(b, h * w, d)[np.arange(b)[:, None], places].reshape(
        b * n, d
    )
    return tokens
