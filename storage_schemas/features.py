"""Features in memory: what a teacher gives, how numbers are packed for the store, and their moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """One teacher's features of a batch: `summary` is b d, `spatial` is b h w d (row before column)."""

    summary: torch.Tensor
    spatial: torch.Tensor
