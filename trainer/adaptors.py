"""Heads that carry a student's features to a teacher's widths, and the resize that carries them to its grid.

The head comes first, then the resize: AM-RADIO resizes the student's outputs, which are the head's, to the
teacher's grid. A head holds a LayerNorm and a GELU, so the other order would be another loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage_schemas.features import Moments, TeacherOutput
from trainer.students.base import StudentOutput

# The mean square of GELU of a standard normal, which is what the last Linear of a new head sees.
GELU_POWER = 0.425


class Adaptor(nn.Module):
    """One teacher's summary head and spatial head of AM-RADIO, each Linear, LayerNorm, GELU, Linear (MLP).

    hidden_dim: width between the Linears of both heads; by default, for each head, the wider of its two ends.
    blocks: residual LayerNorm, GELU, Linear after the first Linear, which AM-RADIO's later MLP2 has.
    """

    def __init__(
        self,
        student_summary_dim: int,
        student_spatial_dim: int,
        summary_dim: int,
        spatial_dim: int,
        hidden_dim: int | None = None,
        blocks: int = 0,
    ) -> None:
        super().__init__()
        self.summary = _head(student_summary_dim, summary_dim, hidden_dim, blocks)
        self.spatial = _head(student_spatial_dim, spatial_dim, hidden_dim, blocks)

    def forward(self, features: StudentOutput) -> TeacherOutput:
        """The teacher's features as predicted, `spatial` still on the student's grid."""
        return TeacherOutput(summary=self.summary(features.summary), spatial=self.spatial(features.spatial))

    def match(self, moments: Mapping[str, Moments]) -> None:
        """Give the first outputs of new heads the mean and the variance of the targets, channel by channel.

        moments: of `summary` and of `spatial`; a head whose targets nothing is known of stays as it is.
        """
        for head, known in ((self.summary, moments["summary"]), (self.spatial, moments["spatial"])):
            if known.count:
                _match(head[-1], known)


class Residual(nn.Sequential):
    """x plus what the layers give of it."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]
        return out


def _head(width: int, out: int, hidden: int | None, blocks: int) -> nn.Sequential:
    hidden = hidden or max(width, out)
    residuals = [Residual(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(blocks)]
    last = (nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))
    return nn.Sequential(nn.Linear(width, hidden), *residuals, *last)


@torch.no_grad()
def _match(linear: nn.Module, moments: Moments) -> None:
    """Weights as PyTorch draws them are uniform within 1 / sqrt(in), so of variance 1 / (3 in)."""
    assert isinstance(linear, nn.Linear)
    std = torch.from_numpy(moments.covariance.diagonal().clip(min=0) ** 0.5)
    linear.weight.mul_(std[:, None].to(linear.weight) * math.sqrt(3 / GELU_POWER))
    linear.bias.copy_(torch.from_numpy(moments.mean))


def align(spatial: Tensor, grid: tuple[int, int]) -> Tensor:
    """`spatial`, b h w d, resized bilinearly to `grid`, rows and columns; itself where that is its grid."""
    if tuple(spatial.shape[1:3]) == tuple(grid):
        return spatial
    x = spatial.permute(0, 3, 1, 2)  # b d h w
    x = F.interpolate(x, grid, mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1)  # b h w d
