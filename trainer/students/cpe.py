"""Cropped position embedding: a learned grid, larger than most inputs, of which each input sees a part.

In training every sample gets its own window of the grid, resampled to its patches; so position means "where
in some larger picture", and every resolution finds the grid trained. Evaluation resamples the whole grid.
AM-RADIO section 4; the numbers are those of its public models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_SCALE = math.sqrt(0.1)
LARGEST_ASPECT = 4 / 3


class CroppedPositions(nn.Module):
    """A grid of `side` by `side` learned vectors of `width` channels."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.position = nn.Parameter(torch.randn(side, side, width) * width**-0.5)

    def forward(self, batch: int, grid: tuple[int, int]) -> Tensor:
        """The vectors of `grid`, as b (h w) d or, where all samples share them, 1 (h w) d."""
        if not _unknown(*grid) and grid == (self.side, self.side):
            return self.position.flatten(0, 1)[None]
        if self.training:
            return self.sample(draw_windows(batch, self.position.device), grid)
        return self._resample(grid)

    def sample(self, windows: Tensor, grid: tuple[int, int]) -> Tensor:
        """The learned grid in each of `windows` (b 4: top, left, height, width, in [0, 1]), as b (h w) d.

        Bilinear; the first and last rows and columns of `grid` lie on the edges of the window.
        """
        rows, row_weights = self._corners(windows[:, 0], windows[:, 2], grid[0])  # b h 2
        columns, column_weights = self._corners(windows[:, 1], windows[:, 3], grid[1])  # b w 2
        corners = rows[:, :, None, :, None] * self.side + columns[:, None, :, None, :]  # b h w 2 2
        weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
        table = self.position.flatten(0, 1)  # (side side) d
        x = F.embedding_bag(corners.reshape(-1, 4), table, per_sample_weights=weights.view(-1, 4), mode="sum")
        return x.reshape(len(windows), -1, x.shape[-1])  # b (h w) d

    def _corners(self, start: Tensor, length: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The two learned rows (or columns) beside each of `steps` places, b steps 2, and their weights."""
        along = torch.linspace(0, 1, steps, device=start.device)
        place = (start[:, None] + length[:, None] * along) * (self.side - 1)  # b steps
        before = place.floor().clamp(max=max(self.side - 2, 0))
        after = (before + 1).clamp(max=self.side - 1)
        weight = place - before
        return torch.stack([before, after], -1).long(), torch.stack([1 - weight, weight], -1)

    def _resample(self, grid: tuple[int, int]) -> Tensor:
        """The whole grid at the longer side of `grid`, of which the top left is taken: 1 (h w) d."""
        # `max` would fix the size of a dynamic export, and torch.jit's tracer does not know sym_max.
        longer: Any = torch.sym_max(*grid) if isinstance(grid[0], int | torch.SymInt) else max(grid)
        square = self.position.permute(2, 0, 1)[None]  # 1 d side side
        x = F.interpolate(square, (longer, longer), mode="bilinear", align_corners=True)
        return _crop(x, *grid).flatten(2).transpose(1, 2)


def _unknown(*sizes: int) -> bool:
    """Whether a dynamic export traces: a branch on a size would hold the export to that side of it."""
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of b d h w."""
    if _unknown(height, width):  # a slice asks whether it is the whole
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[:, :, :height, :width]


def draw_windows(batch: int, device: torch.device) -> Tensor:
    """A window for each sample, b 4: top, left, height, width as shares of the grid, inside of it."""
    scale, aspect, top, left = torch.rand(4, batch, device=device)
    scale = LEAST_SCALE + (1 - LEAST_SCALE) * scale
    aspect = LARGEST_ASPECT ** (2 * aspect - 1)
    width, height = (scale * aspect).clamp(max=1), (scale / aspect).clamp(max=1)
    return torch.stack([top * (1 - height), left * (1 - width), height, width], 1)
