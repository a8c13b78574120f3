"""Heads that carry a student's features to a teacher's widths, and the resize that carries them to its grid.

The head comes first, then the resize: AM-RADIO resizes the student's outputs, which are the head's, to the
teacher's grid. A head holds a LayerNorm and a GELU, so the other order would be another loss.

Where targets are normalised, heads are trained to predict them so, and the inverse is folded into the heads
when they are used. The resize's weights add up to 1 in every place, so it makes no difference which of an
affine map of the channels and the resize comes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage_schemas.features import Moments, TeacherOutput
from trainer.normalizers import NORMALIZERS, Normalizer
from trainer.students.base import StudentOutput

# The mean square of GELU of a standard normal, which is what the last Linear of a new head sees.
GELU_POWER = 0.425


class Adaptor(nn.Module):
    """One teacher's summary head and spatial head of AM-RADIO, each Linear, LayerNorm, GELU, Linear (MLP).

    hidden_dim: width between the Linears of both heads; by default, for each head, the wider of its two ends.
    blocks: residual LayerNorm, GELU, Linear after the first Linear, which AM-RADIO's later MLP2 has.
    normalizer: how targets are normalised, see `trainer.normalizers`; not at all until `match` is called.
    """

    def __init__(
        self,
        student_summary_dim: int,
        student_spatial_dim: int,
        summary_dim: int,
        spatial_dim: int,
        hidden_dim: int | None = None,
        blocks: int = 0,
        normalizer: str = "none",
    ) -> None:
        super().__init__()
        self.summary = _head(student_summary_dim, summary_dim, hidden_dim, blocks)
        self.spatial = _head(student_spatial_dim, spatial_dim, hidden_dim, blocks)
        self.normalizers = nn.ModuleDict()
        self._fit = NORMALIZERS[normalizer]
        if self._fit is not None:
            for kind, d in (("summary", summary_dim), ("spatial", spatial_dim)):
                self.normalizers[kind] = self._fit(Moments(0, np.zeros(d), np.zeros((d, d))))

    def forward(self, features: StudentOutput) -> TeacherOutput:
        """The teacher's features as predicted, normalised if targets are, `spatial` on the student's grid."""
        return TeacherOutput(summary=self.summary(features.summary), spatial=self.spatial(features.spatial))

    def match(self, moments: Mapping[str, Moments]) -> None:
        """Fit the normalizers if there are any, and give the first outputs of new heads the mean and the
        variance of the targets as they are then, channel by channel.

        moments: of `summary` and of `spatial`; a head whose targets nothing is known of stays as it is.
        """
        for kind, head in (("summary", self.summary), ("spatial", self.spatial)):
            last, known = _last(head), moments[kind]
            if known.count and self._fit is not None:
                normalizer = self._fit(known)
                self.normalizers[kind] = normalizer.to(last.weight.device)
                known = normalizer.moments(known)
            if known.count:
                _match(last, known)

    def normalize(self, targets: TeacherOutput) -> TeacherOutput:
        """What the heads are to predict, in float32 if it is normalised. A row of NaN stays one, alone."""
        if not self.normalizers:
            return targets
        return TeacherOutput(
            summary=self.normalizers["summary"](targets.summary),
            spatial=self.normalizers["spatial"](targets.spatial),
        )

    def fold(self) -> None:
        """Make the heads predict at the teacher's own scale; from then on there is no normalizer."""
        for kind, head in (("summary", self.summary), ("spatial", self.spatial)):
            if kind in self.normalizers:
                normalizer = self.normalizers.pop(kind)
                assert isinstance(normalizer, Normalizer)
                normalizer.fold_into(_last(head))
        self._fit = None


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


def _last(head: nn.Sequential) -> nn.Linear:
    linear = head[-1]
    assert isinstance(linear, nn.Linear)
    return linear


@torch.no_grad()
def _match(linear: nn.Linear, moments: Moments) -> None:
    """Weights as PyTorch draws them are uniform within 1 / sqrt(in), so of variance 1 / (3 in)."""
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
