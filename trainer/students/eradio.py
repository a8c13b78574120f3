"""E-RADIO: AM-RADIO's efficient hybrid (section 5.4, appendix B). Two convolutional stages, then two of
windowed attention, one of them at two resolutions; a neck brings the last stage to the third's grid.

Any size of at least 64 pixels fits: strided convolutions round grids up. Attention cuts a grid into as few
equal windows of at most `window` as cover it, so a grid that windows do not divide is padded by less than one
cell a window. Position biases are continuous functions of the offset, so windows of any size share them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storage_schemas.errors import UserError
from trainer.students.base import IMAGENET_MEAN, IMAGENET_STD, StudentOutput

LEAST_SIZE = 64


class ERadio(nn.Module):
    """width: channels of the first stage; each next stage doubles them. layers: C2f bottlenecks of the first
    two stages, pairs of blocks of the third, blocks of the fourth. neck: 1/16 of the resolution, not 1/32.
    window: of attention, in cells.
    """

    def __init__(
        self,
        width: int,
        layers: Sequence[int] = (3, 3, 5, 5),
        heads: Sequence[int] = (8, 16),
        neck: bool = True,
        window: int = 7,
    ) -> None:
        super().__init__()
        if len(layers) != 4 or len(heads) != 2:
            raise UserError(f"layers {[*layers]} must be four numbers, and heads {[*heads]} two")
        w1, w2, w3, w4 = (width * factor for factor in (1, 2, 4, 8))
        if w3 % heads[0] or w4 % heads[1]:
            raise UserError(f"width {width}: {w3} and {w4} must be multiples of heads {[*heads]}")
        self.patch_size = 16 if neck else 32
        self.summary_dim = self.spatial_dim = w4
        self.pixel_mean: Sequence[float] = IMAGENET_MEAN
        self.pixel_std: Sequence[float] = IMAGENET_STD
        self.stem = nn.Sequential(
            Convolution(3, 64, 3, stride=2, activation=nn.ReLU),
            Convolution(64, w1, 3, stride=2, activation=nn.ReLU),
        )
        self.stage1 = nn.Sequential(C2f(w1, layers[0]), Convolution(w1, w2, 3, stride=2, activation=None))
        self.stage2 = nn.Sequential(C2f(w2, layers[1]), Convolution(w2, w3, 3, stride=2, activation=None))
        pairs = (MultiResolution(w3, heads[0], window) for _ in range(layers[2]))
        self.stage3 = nn.Sequential(*pairs)
        self.down = Convolution(w3, w4, 3, stride=2, activation=None)
        self.stage4 = nn.Sequential(*(Blend(Block(w4, heads[1], window)) for _ in range(layers[3])))
        self.neck = Neck(w3, w4) if neck else None
        self.norm = nn.BatchNorm2d(w4)
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if min(height, width) < LEAST_SIZE:
            raise UserError(f"image size {height} x {width} must be at least {LEAST_SIZE} x {LEAST_SIZE}")
        return -(-height // self.patch_size), -(-width // self.patch_size)

    def forward(self, images: Tensor) -> StudentOutput:
        self.grid(images.shape[-2], images.shape[-1])
        x = self.stem(images.contiguous(memory_format=torch.channels_last))  # b d h/4 w/4
        third = self.stage3(self.stage2(self.stage1(x)))  # b 4d h/16 w/16
        x = self.stage4(self.down(third))  # b 8d h/32 w/32
        x = self.norm(x if self.neck is None else self.neck(third, x))
        return StudentOutput(summary=x.mean((2, 3)), spatial=x.permute(0, 2, 3, 1))


class Convolution(nn.Sequential):
    """Convolution without bias, BatchNorm, activation; a grid is divided by the stride and rounded up."""

    def __init__(
        self,
        width: int,
        out: int,
        kernel: int = 1,
        stride: int = 1,
        activation: type[nn.Module] | None = nn.SiLU,
    ) -> None:
        layers = [nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)]
        super().__init__(*layers, *([] if activation is None else [activation(inplace=True)]))


class C2f(nn.Module):
    """YOLOv8's block: a split, bottlenecks in a chain on one half, and all that they gave side by side."""

    def __init__(self, width: int, bottlenecks: int) -> None:
        super().__init__()
        half = width // 2
        self.enter = Convolution(width, width)
        self.bottlenecks = nn.ModuleList(
            nn.Sequential(Convolution(half, half, 3), Convolution(half, half, 3)) for _ in range(bottlenecks)
        )
        self.leave = Convolution((2 + bottlenecks) * half, width)

    def forward(self, x: Tensor) -> Tensor:
        maps = [*self.enter(x).chunk(2, 1)]
        for bottleneck in self.bottlenecks:
            maps.append(maps[-1] + bottleneck(maps[-1]))
        out: Tensor = self.leave(torch.cat(maps, 1))
        return out


class MultiResolution(nn.Module):
    """A block on a grid of half the rows and columns, which spans windows, then one on the grid itself."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.coarse = Blend(Subsampled(width, heads, window))
        self.fine = Blend(Block(width, heads, window))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fine(self.coarse(x))
        return out


class Blend(nn.Module):
    """Half of what `module` gives, half of what it was given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.module(x).to(x.dtype), 0.5)


class Subsampled(nn.Module):
    """A block between a convolution that halves the grid and one that restores it; maps are b d h w."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, width, 2, stride=2, bias=False)
        self.block = Block(width, heads, window)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = _pad(x, height % 2, width % 2)
        out: Tensor = self.up(self.block(self.down(x)))
        return out[:, :, :height, :width]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), inside of windows; maps are b d h w."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows, columns = -(-height // self.window), -(-width // self.window)  # of windows
        h, w = -(-height // rows), -(-width // columns)  # cells of one
        x = _pad(x, rows * h - height, columns * w - width).permute(0, 2, 3, 1)
        x = x.reshape(-1, rows, h, columns, w, x.shape[-1])  # b rows h columns w d
        x = x.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (b rows columns) (h w) d
        x = x + self.attention(self.norm1(x), h, w)
        x = x + self.mlp(self.norm2(x))
        x = x.reshape(-1, rows, columns, h, w, x.shape[-1]).transpose(2, 3)
        x = x.flatten(3, 4).flatten(1, 2)  # b (rows h) (columns w) d
        return x[:, :height, :width].permute(0, 3, 1, 2)


class WindowAttention(nn.Module):
    """Attention over the h w cells of a window, b (h w) d, with SwinV2's continuous position bias."""

    offsets: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.register_buffer("offsets", _log_offsets(window), persistent=False)
        self.bias = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, heads, bias=False))

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # b n 3 heads d/heads
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 b heads n d/heads
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(h, w).to(q.dtype))
        out: Tensor = self.project(x.transpose(1, 2).flatten(2))  # b n d
        return out

    def _bias(self, h: int, w: int) -> Tensor:
        """What each cell's logit for each other gains: 1 heads (h w) (h w), between 0 and 16."""
        zero = self.offsets.shape[0] // 2
        offsets = self.offsets[zero + 1 - h : zero + h, zero + 1 - w : zero + w]
        table = 16 * self.bias(offsets).sigmoid()  # 2h-1 2w-1 heads
        row, column = (torch.arange(n, device=table.device) for n in (h, w))
        i = row[:, None] - row + h - 1  # h h
        j = column[:, None] - column + w - 1  # w w
        bias: Tensor = table[i[:, None, :, None], j[None, :, None, :]]  # h w h w heads
        return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)[None]


def _log_offsets(window: int) -> Tensor:
    """SwinV2's log-spaced offsets between the cells of a window: rows columns 2, rows and columns from
    1 - window to window - 1.
    """
    along = torch.arange(1 - window, window) * (8 / max(window - 1, 1))
    along = along.sign() * (along.abs() + 1).log2() / math.log2(8)
    return torch.stack(torch.meshgrid(along, along, indexing="ij"), -1)


class Neck(nn.Module):
    """The last stage at twice its grid, plus the third stage at the last one's width."""

    def __init__(self, third: int, last: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(last, last, 2, stride=2, bias=False)
        self.project = nn.Conv2d(third, last, 1, bias=False)

    def forward(self, third: Tensor, last: Tensor) -> Tensor:
        out: Tensor = self.up(last)[:, :, : third.shape[-2], : third.shape[-1]] + self.project(third)
        return out


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and to the right of b d h w. (`F.pad` by nothing copies.)"""
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
