"""Heads that carry a student's features to a teacher's widths, and the resize that carries them to its grid.

The head comes first, then the resize: AM-RADIO resizes the student's outputs, which are the head's, to the
teacher's grid. A head holds a LayerNorm and a GELU, so the other order would be another loss.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from storage_schemas.features import TeacherOutput
from trainer.students.base import StudentOutput


class Adaptor(nn.Module):
    """One teacher's summary head and spatial head of AM-RADIO, each Linear, LayerNorm, GELU, Linear.

    hidden_dim: width between the Linears of both heads; by default, for each head, the wider of its two ends.
    """

    def __init__(
        self,
        student_summary_dim: int,
        student_spatial_dim: int,
        summary_dim: int,
        spatial_dim: int,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.summary = _head(student_summary_dim, summary_dim, hidden_dim)
        self.spatial = _head(student_spatial_dim, spatial_dim, hidden_dim)

    def forward(self, features: StudentOutput) -> TeacherOutput:
        """The teacher's features as predicted, `spatial` still on the student's grid."""
        return TeacherOutput(summary=self.summary(features.summary), spatial=self.spatial(features.spatial))


def _head(width: int, out: int, hidden: int | None) -> nn.Sequential:
    hidden = hidden or max(width, out)
    return nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out))


def align(spatial: Tensor, grid: tuple[int, int]) -> Tensor:
    """`spatial`, b h w d, resized bilinearly to `grid`, rows and columns; itself where that is its grid."""
    if tuple(spatial.shape[1:3]) == tuple(grid):
        return spatial
    x = spatial.permute(0, 3, 1, 2)  # b d h w
    x = F.interpolate(x, grid, mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1)  # b h w d
