"""The distillation losses: pure functions of (student, target), one value a sample, always in float32.

Targets of rows that could not be recorded are NaN. They must be masked on the way in (`zero_invalid`) and on
the way out (`mean_over_valid`): a NaN that enters a loss leaves it through the gradient even where the value
is discarded, for 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Magnitude = Literal["smooth_l1", "l1", "mse"]


def terms_of(teachers: Iterable[str]) -> list[str]:
    """Names of the terms of the loss: teacher/summary and teacher/spatial of each."""
    return [f"{teacher}/{kind}" for teacher in teachers for kind in ("summary", "spatial")]


def teacher_of(term: str) -> str:
    """The teacher of a term."""
    return term.split("/")[0]


def cosine_distance(student: Tensor, target: Tensor) -> Tensor:
    """1 - cos of the vectors along the last axis, ... d -> ...: L_cos, equation 1 of AM-RADIO.

    A target of norm zero has no direction: it counts as exactly 0, and so does its gradient. A student vector
    of norm zero is at distance 1, with a finite gradient.
    """
    student, target = student.float(), target.float()
    distance = 1 - (_unit(student) * _unit(target)).sum(-1)
    return torch.where(target.square().sum(-1) > 0, distance, 0.0)


def magnitude_distance(student: Tensor, target: Tensor, kind: Magnitude, transition: float = 1.0) -> Tensor:
    """Mean over channels of smooth-L1, L1 or squared error, ... d -> ...; `transition` is smooth-L1's."""
    student, target = student.float(), target.float()
    if kind == "smooth_l1":
        return F.smooth_l1_loss(student, target, reduction="none", beta=transition).mean(-1)
    if kind == "l1":
        return F.l1_loss(student, target, reduction="none").mean(-1)
    return F.mse_loss(student, target, reduction="none").mean(-1)


def summary_loss(
    student: Tensor,
    target: Tensor,
    kind: Literal["cosine"] | Magnitude = "cosine",
    transition: float = 1.0,
) -> Tensor:
    """Distance of summaries, b d -> b: a term of L_summary, equation 2 of AM-RADIO (cosine)."""
    assert student.shape == target.shape, (student.shape, target.shape)
    if kind == "cosine":
        return cosine_distance(student, target)
    return magnitude_distance(student, target, kind, transition)


def spatial_loss(
    student: Tensor,
    target: Tensor,
    alpha: float = 0.9,
    beta: float = 0.1,
    transition: float = 1.0,
    kind: Magnitude = "smooth_l1",
) -> Tensor:
    """Mean over positions of alpha * cosine + beta * magnitude, b h w d -> b: a term of L_spatial, eq. 3.

    The paper's `kind` is smooth-L1 with alpha 0.9 and beta 0.1, on targets that are not normalised; it does
    not state the transition point. alpha = 0 leaves the magnitude alone, beta = 0 the cosine.
    """
    assert student.shape == target.shape, (student.shape, target.shape)
    cosine = cosine_distance(student, target)  # b h w
    magnitude = magnitude_distance(student, target, kind, transition)  # b h w
    return (alpha * cosine + beta * magnitude).mean((1, 2))


def zero_invalid(target: Tensor, valid: Tensor) -> Tensor:
    """`target`, b ..., with zeros in place of every row that is not `valid`, b: what a loss may be given."""
    return torch.where(valid.view(-1, *[1] * (target.ndim - 1)), target, 0.0)


def mean_over_valid(values: Tensor, valid: Tensor, total_valid: float) -> Tensor:
    """Sum of `values` over `valid`, both b, divided by `total_valid`; 0 where that is 0.

    DDP averages gradients over ranks. So that their average is the gradient of the mean over the global
    batch, each rank divides by the valid rows of all ranks over the number of ranks, whatever its own share
    of them.
    """
    return torch.where(valid, values, 0.0).sum() / (float(total_valid) or 1.0)


def _unit(x: Tensor) -> Tensor:
    """x / |x|, and 0 for a zero vector; the inner `where` keeps its gradient finite."""
    square = x.square().sum(-1, keepdim=True)
    return x * torch.where(square > 0, square, 1.0).rsqrt()
