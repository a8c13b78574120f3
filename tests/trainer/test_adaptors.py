from __future__ import annotations

import pytest
import torch

from trainer.adaptors import Adaptor, align
from trainer.students import StudentOutput

GRIDS = [(1, 1), (2, 5), (7, 7), (16, 9)]


def _features() -> StudentOutput:
    return StudentOutput(summary=torch.randn(3, 12), spatial=torch.randn(3, 4, 5, 8))


@pytest.mark.parametrize("hidden_dim", [None, 6])
def test_heads_give_the_teachers_widths_on_the_students_grid(hidden_dim: int | None) -> None:
    predicted = Adaptor(12, 8, summary_dim=20, spatial_dim=30, hidden_dim=hidden_dim)(_features())
    assert predicted.summary.shape == (3, 20)
    assert predicted.spatial.shape == (3, 4, 5, 30)


def test_spatial_head_treats_every_cell_alike() -> None:
    adaptor, features = Adaptor(12, 8, 20, 30), _features()
    mirrored = StudentOutput(features.summary, features.spatial.flip(1, 2))
    torch.testing.assert_close(adaptor(mirrored).spatial, adaptor(features).spatial.flip(1, 2))


def test_heads_share_nothing() -> None:
    adaptor, features = Adaptor(12, 8, 20, 30), _features()
    adaptor(features).summary.sum().backward()
    assert all(parameter.grad is None for parameter in adaptor.spatial.parameters())
    assert all(parameter.grad is not None for parameter in adaptor.summary.parameters())


@pytest.mark.parametrize("grid", GRIDS)
def test_align_to_the_same_grid_is_the_identity(grid: tuple[int, int]) -> None:
    spatial = torch.randn(2, *grid, 3)
    assert align(spatial, grid) is spatial


@pytest.mark.parametrize("grid", GRIDS)
def test_align_preserves_constant_maps(grid: tuple[int, int]) -> None:
    constant = torch.randn(2, 1, 1, 3).expand(2, 4, 6, 3)
    aligned = align(constant, grid)
    torch.testing.assert_close(aligned, constant[:, :1, :1].expand(2, *grid, 3))


@pytest.mark.parametrize("grid", GRIDS)
def test_align_commutes_with_a_flip_and_with_a_transpose(grid: tuple[int, int]) -> None:
    spatial, transposed = torch.randn(2, 4, 6, 3), (grid[1], grid[0])
    aligned = align(spatial, grid)
    torch.testing.assert_close(align(spatial.flip(2), grid), aligned.flip(2))
    torch.testing.assert_close(align(spatial.transpose(1, 2), transposed), aligned.transpose(1, 2))


def test_align_is_linear_in_its_input() -> None:
    a, b = torch.randn(2, 2, 4, 6, 3)
    torch.testing.assert_close(align(2 * a - b, (7, 7)), 2 * align(a, (7, 7)) - align(b, (7, 7)))
