"""A plain vision transformer: class token, learned position embedding, pre-norm blocks, final norm.

The smallest student that can be read whole. Its position embedding is resampled to the grid of whatever it is
given, so it takes any resolution that its patches divide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage_schemas.errors import UserError
from trainer.students.base import IMAGENET_MEAN, IMAGENET_STD, StudentOutput


class VisionTransformer(nn.Module):
    """width: channels of a token. positions: side of the learned grid of position embeddings, in patches."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch_size: int = 16,
        positions: int = 14,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} must be a multiple of heads {heads}")
        self.patch_size = patch_size
        self.summary_dim = self.spatial_dim = width
        self.pixel_mean: Sequence[float] = IMAGENET_MEAN
        self.pixel_std: Sequence[float] = IMAGENET_STD
        self.embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.position = nn.Parameter(torch.empty(1, width, positions, positions))
        self.blocks = nn.Sequential(*(Block(width, heads, round(width * mlp_ratio)) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch_size or width % self.patch_size or not height * width:
            raise UserError(
                f"image size {height} x {width} must be a multiple of the patch size {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def forward(self, images: Tensor) -> StudentOutput:
        grid = self.grid(images.shape[-2], images.shape[-1])
        x = self.embed(images) + self._positions(grid)  # b d h w
        x = x.flatten(2).transpose(1, 2)  # b (h w) d
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)  # b (1 + h w) d
        x = self.norm(self.blocks(x))
        return StudentOutput(summary=x[:, 0], spatial=x[:, 1:].unflatten(1, grid))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == tuple(self.position.shape[-2:]):
            return self.position
        return F.interpolate(self.position, grid, mode="bilinear", align_corners=False)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); tokens are b n d."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Attention(nn.Module):
    """Multi-head self-attention over tokens, b n d."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # b n 3 heads d/heads
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 b heads n d/heads
        x = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.project(x.transpose(1, 2).flatten(2))  # b n d
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
