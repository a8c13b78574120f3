from __future__ import annotations

import numpy as np
import pytest
import torch

from storage_schemas.features import Moments
from trainer.adaptors import Adaptor, align
from trainer.students import StudentOutput

GRIDS = [(1, 1), (2, 5), (7, 7), (16, 9)]


def _features() -> StudentOutput:
    return StudentOutput(summary=torch.randn(3, 12), spatial=torch.randn(3, 4, 5, 8))


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("hidden_dim", [None, 6])
def test_heads_give_the_teachers_widths_on_the_students_grid(hidden_dim: int | None, blocks: int) -> None:
    predicted = Adaptor(12, 8, summary_dim=20, spatial_dim=30, hidden_dim=hidden_dim, blocks=blocks)(
        _features()
    )
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


@pytest.mark.parametrize("blocks", [0, 2])
def test_matched_heads_begin_at_the_targets_scale(blocks: int) -> None:
    torch.manual_seed(0)
    adaptor = Adaptor(12, 8, summary_dim=20, spatial_dim=30, hidden_dim=512, blocks=blocks)
    generator = np.random.default_rng(0)
    targets = {
        name: generator.normal(generator.normal(0, 5, d), generator.uniform(0.1, 30, d), (4000, d))
        for name, d in (("summary", 20), ("spatial", 30))
    }
    adaptor.match({name: Moments.of(values) for name, values in targets.items()})
    predicted = adaptor(StudentOutput(torch.randn(256, 12), torch.randn(16, 4, 4, 8)))
    for name, values in targets.items():
        power = getattr(predicted, name).square().mean().item()
        assert power == pytest.approx((values**2).mean(), rel=0.5)


def test_heads_of_unknown_targets_stay_as_they_are() -> None:
    adaptor = Adaptor(12, 8, 20, 30)
    before = {name: value.clone() for name, value in adaptor.state_dict().items()}
    adaptor.match({"summary": Moments.of(np.zeros((0, 20))), "spatial": Moments.of(np.zeros((0, 30)))})
    assert all(torch.equal(value, before[name]) for name, value in adaptor.state_dict().items())
