"""RADIO-ViT: AM-RADIO's vision transformer. Class tokens, registers, cropped position embedding, windows.

With windows (AM-RADIO appendix C, after ViTDet), patches are put in the order of their windows once, before
the first block. Then attention inside of windows is attention with the windows folded into the batch, and
global attention is attention with them unfolded; the order is restored at the end. Class tokens and registers
are copied into each window where a run of windowed blocks starts, and averaged over windows where it ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from storage_schemas.errors import UserError
from trainer.students.base import IMAGENET_MEAN, IMAGENET_STD, StudentOutput
from trainer.students.cpe import CroppedPositions


class RadioViT(nn.Module):
    """width: channels of a token. max_size: pixels that the learned grid of positions stands for, a side.

    summary: the class tokens, concatenated, or the mean of the patches. window: side in patches of attention
    windows, none if null. train_windows: in training, one of these that divides the grid is drawn each step
    instead. global_every: every so many-th block is global, a quarter of the depth if null; the last always
    is. checkpointing: keep only the blocks' inputs for the backward pass.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch_size: int = 16,
        max_size: int = 2048,
        class_tokens: int = 1,
        registers: int = 0,
        summary: Literal["cls", "mean"] = "cls",
        window: int | None = None,
        train_windows: Sequence[int] = (),
        global_every: int | None = None,
        final_norm: bool = False,
        mlp_ratio: float = 4.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check(width, heads, class_tokens, summary, [*train_windows, *([] if window is None else [window])])
        self.patch_size = patch_size
        self.spatial_dim = width
        self.summary_dim = width * class_tokens if summary == "cls" else width
        self.pixel_mean: Sequence[float] = IMAGENET_MEAN
        self.pixel_std: Sequence[float] = IMAGENET_STD
        self.class_tokens, self.tokens, self.summary = class_tokens, class_tokens + registers, summary
        self.window, self.train_windows = window, tuple(train_windows)
        self.checkpointing = checkpointing
        self.embed = nn.Linear(3 * patch_size**2, width, bias=False)
        self.positions = CroppedPositions(math.ceil(max_size / patch_size), width)
        self.token = nn.Parameter(torch.randn(1, self.tokens, width) * width**-0.5)
        self.blocks = nn.ModuleList(Block(width, heads, round(width * mlp_ratio)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6) if final_norm else nn.Identity()
        self.runs = _runs(depth, global_every or max(1, depth // 4))
        self.apply(_initialise)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        patch = self.patch_size
        if height % patch or width % patch or not height * width:
            fits = " x ".join(str(max(1, round(side / patch)) * patch) for side in (height, width))
            raise UserError(
                f"image size {height} x {width} must be a multiple of the patch size {patch}; {fits} is one"
            )
        return height // patch, width // patch

    def forward(self, images: Tensor) -> StudentOutput:
        grid, batch = self.grid(images.shape[-2], images.shape[-1]), images.shape[0]
        x = self.embed(_patches(images, self.patch_size)) + self.positions(batch, grid)  # b (h w) d
        window = self._choose_window(grid)
        x = x if window is None else to_windows(x, grid, window)
        tokens = self.token.expand(batch, -1, -1).to(x.dtype)
        x = self._transform(torch.cat([tokens, x], 1), grid, window)  # b (tokens h w) d
        x = self.norm(x)
        tokens, x = x[:, : self.class_tokens], x[:, self.tokens :]
        x = x if window is None else from_windows(x, grid, window)
        summary = tokens.flatten(1) if self.summary == "cls" else x.mean(1)
        return StudentOutput(summary, x.reshape(batch, *grid, -1))

    def _transform(self, x: Tensor, grid: tuple[int, int], window: int | None) -> Tensor:
        """All blocks; patches are in the order of their windows."""
        count = 1 if window is None else grid[0] * grid[1] // window**2
        for first, last, everywhere in self.runs:
            x = x if everywhere else fold(x, self.tokens, count)
            for block in self.blocks[first:last]:
                x = checkpoint(block, x, use_reentrant=False) if self._checkpoints() else block(x)
            x = x if everywhere else unfold(x, self.tokens, count)
        return x

    def _checkpoints(self) -> bool:
        return self.checkpointing and self.training

    def _choose_window(self, grid: tuple[int, int]) -> int | None:
        drawn = self.training and self.train_windows
        windows = self.train_windows if drawn else () if self.window is None else (self.window,)
        if not windows:
            return None
        fitting = [window for window in windows if not (grid[0] % window or grid[1] % window)]
        if not fitting:
            divisors = [str(n) for n in range(1, math.gcd(*grid) + 1) if not math.gcd(*grid) % n]
            raise UserError(
                f"window {' or '.join(map(str, windows))} does not divide the grid of {grid[0]} x {grid[1]} "
                f"patches; {', '.join(divisors)} do"
            )
        return fitting[_draw(len(fitting))] if drawn else fitting[0]


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); tokens are b n d."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
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


def to_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Patches, b (h w) d, row by row inside of each window, and the windows row by row."""
    rows, columns = grid[0] // window, grid[1] // window
    x = x.reshape(x.shape[0], rows, window, columns, window, -1)
    return x.transpose(2, 3).flatten(1, 4)


def from_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """What `to_windows` was given."""
    rows, columns = grid[0] // window, grid[1] // window
    x = x.reshape(x.shape[0], rows, columns, window, window, -1)
    return x.transpose(2, 3).flatten(1, 4)


def fold(x: Tensor, tokens: int, windows: int) -> Tensor:
    """b (tokens windows n) d to (b windows) (tokens n) d: every window has its copy of the tokens."""
    copies = x[:, None, :tokens].expand(-1, windows, -1, -1)
    patches = x[:, tokens:].reshape(x.shape[0], windows, -1, x.shape[-1])
    return torch.cat([copies, patches], 2).flatten(0, 1)


def unfold(x: Tensor, tokens: int, windows: int) -> Tensor:
    """What `fold` was given, with the mean of the copies of each token."""
    x = x.reshape(-1, windows, *x.shape[1:])  # b windows (tokens n) d
    return torch.cat([x[:, :, :tokens].mean(1), x[:, :, tokens:].flatten(1, 2)], 1)


def _patches(images: Tensor, patch: int) -> Tensor:
    """b 3 (h patch) (w patch) to b (h w) (3 patch patch)."""
    b, c, height, width = images.shape
    x = images.reshape(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _runs(depth: int, period: int) -> list[tuple[int, int, bool]]:
    """Runs of blocks, from `first` to before `last`, that all attend globally or all in windows."""
    is_global = [(i + 1) % period == 0 or i == depth - 1 for i in range(depth)]
    runs = [[*group] for _, group in groupby(range(depth), key=is_global.__getitem__)]
    return [(run[0], run[-1] + 1, is_global[run[0]]) for run in runs]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _draw(count: int) -> int:
    return int(torch.randint(count, ()))


def _check(width: int, heads: int, class_tokens: int, summary: str, windows: Sequence[int]) -> None:
    if width % heads:
        raise UserError(f"width {width} must be a multiple of heads {heads}")
    if summary not in ("cls", "mean"):
        raise UserError(f"summary {summary!r} must be 'cls' or 'mean'")
    if summary == "cls" and class_tokens < 1:
        raise UserError(f"class_tokens {class_tokens} must be at least 1 for the summary 'cls'")
    if any(window < 1 for window in windows):
        raise UserError(f"window and train_windows {[*windows]} must be at least 1")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
