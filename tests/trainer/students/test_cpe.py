from __future__ import annotations

import pytest
import torch

from trainer.students.cpe import LARGEST_ASPECT, LEAST_SCALE, CroppedPositions, draw_windows

GRIDS = [(1, 1), (3, 5), (7, 7), (5, 3), (12, 9)]


def _positions(side: int = 7, width: int = 6) -> CroppedPositions:
    return CroppedPositions(side, width)


@pytest.mark.parametrize("training", [True, False])
def test_a_grid_as_large_as_the_learned_one_gets_it_as_it_is(training: bool) -> None:
    positions = _positions().train(training)
    torch.testing.assert_close(positions(3, (7, 7))[0], positions.position.flatten(0, 1), rtol=0, atol=0)


def test_windows_stay_inside_and_differ_between_samples() -> None:
    windows = draw_windows(10_000, torch.device("cpu"))
    start, length = windows[:, :2], windows[:, 2:]
    assert (start >= 0).all()
    assert (length > 0).all()
    assert (length <= 1).all()
    assert (start + length <= 1 + 1e-6).all()
    assert len(windows.unique(dim=0)) > 9_000
    unclamped = (length < 1).all(1)
    height, width = length[unclamped].unbind(1)
    assert (height * width).sqrt().min() >= LEAST_SCALE - 1e-6
    assert (width / height).sqrt().max() <= LARGEST_ASPECT + 1e-6
    assert (height / width).sqrt().max() <= LARGEST_ASPECT + 1e-6


@pytest.mark.parametrize("grid", GRIDS)
def test_the_whole_window_of_a_square_is_what_evaluation_sees(grid: tuple[int, int]) -> None:
    positions, longer = _positions().eval(), max(grid)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    sampled = positions.sample(whole, (longer, longer)).reshape(longer, longer, -1)[: grid[0], : grid[1]]
    torch.testing.assert_close(positions(1, grid)[0], sampled.flatten(0, 1))


def test_sampling_is_exact_on_a_plane() -> None:
    """Bilinear interpolation of a linear function of place gives that function."""
    positions = _positions(9, 2)
    along = torch.linspace(0, 1, 9)
    with torch.no_grad():
        positions.position.copy_(torch.stack(torch.meshgrid(along, along, indexing="ij"), -1))
    windows = draw_windows(4, torch.device("cpu"))
    sampled = positions.sample(windows, (5, 3)).reshape(4, 5, 3, 2)
    for window, found in zip(windows, sampled, strict=True):
        top, left, height, width = window
        rows, columns = torch.linspace(0, 1, 5) * height + top, torch.linspace(0, 1, 3) * width + left
        expected = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_evaluation_is_deterministic_and_training_draws() -> None:
    positions = _positions()
    for grid in ((3, 5), (12, 9)):
        assert torch.equal(positions.eval()(2, grid), positions(2, grid))
        assert not torch.equal(positions.train()(2, grid), positions(2, grid))
        torch.manual_seed(1)
        first = positions(2, grid)
        torch.manual_seed(1)
        assert torch.equal(positions(2, grid), first)
        assert not torch.equal(first[0], first[1])


def test_one_learned_position_serves_every_grid() -> None:
    positions = _positions(1)
    for training in (True, False):
        found = positions.train(training)(2, (3, 2))
        torch.testing.assert_close(found, positions.position.reshape(1, 1, -1).expand(found.shape))
