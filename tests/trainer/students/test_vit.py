from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from storage_schemas.errors import UserError
from trainer.students import Student, create_student
from trainer.students.vit import fold, from_windows, to_windows, unfold

SMALL = {"width": 32, "depth": 4, "heads": 2, "max_size": 96}


def _small(**settings: Any) -> Student:
    torch.manual_seed(0)
    return create_student("radio_vit_ti16", **(SMALL | settings))


@pytest.mark.parametrize(("height", "width"), [(224, 224), (64, 96), (16, 16)])
@pytest.mark.parametrize("summary", ["cls", "mean"])
def test_gives_what_it_announces(height: int, width: int, summary: str) -> None:
    student = _small(summary=summary, class_tokens=2, registers=3)
    assert student.summary_dim == (64 if summary == "cls" else 32)
    for training in (True, False):
        output = student.train(training)(torch.rand(2, 3, height, width))
        assert output.summary.shape == (2, student.summary_dim)
        assert output.spatial.shape == (2, *student.grid(height, width), student.spatial_dim)


def test_keeps_rows_and_columns_apart() -> None:
    """With no blocks, a cell of the map depends on its own patch and no other."""
    student = _small(depth=0).eval()
    images = torch.rand(1, 3, 48, 80)
    changed = images.clone()
    changed[:, :, 16:32, 64:80] = 0
    moved = (student(images).spatial != student(changed).spatial).any(-1)[0]  # h w
    assert moved.nonzero().tolist() == [[1, 4]]


def test_the_mean_summary_is_the_mean_of_the_map() -> None:
    output = _small(summary="mean", class_tokens=0).eval()(torch.rand(2, 3, 64, 96))
    torch.testing.assert_close(output.summary, output.spatial.mean((1, 2)))


@pytest.mark.parametrize(("grid", "window"), [((4, 6), 2), ((6, 3), 3), ((8, 8), 8), ((5, 7), 1)])
def test_the_order_of_windows_is_a_permutation_there_and_back(grid: tuple[int, int], window: int) -> None:
    x = torch.randn(2, grid[0] * grid[1], 3)
    ordered = to_windows(x, grid, window)
    assert torch.equal(from_windows(ordered, grid, window), x)
    first = x.reshape(2, *grid, 3)[:, :window, :window].flatten(1, 2)
    assert torch.equal(ordered[:, : window**2], first)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_folding_there_and_back_changes_nothing(tokens: int) -> None:
    x = torch.randn(2, tokens + 12, 5)
    folded = fold(x, tokens, 4)
    assert folded.shape == (8, tokens + 3, 5)
    torch.testing.assert_close(unfold(folded, tokens, 4), x)


def test_a_window_as_large_as_the_grid_is_global_attention() -> None:
    images, student = torch.rand(2, 3, 64, 64), _small(registers=2).eval()
    windowed = _small(registers=2, window=4).eval()
    windowed.load_state_dict(student.state_dict())
    expected, found = student(images), windowed(images)
    torch.testing.assert_close(found.summary, expected.summary)
    torch.testing.assert_close(found.spatial, expected.spatial)
    torch.testing.assert_close(found.spatial.shape, expected.spatial.shape)


def test_windows_do_not_see_each_other_before_the_first_global_block() -> None:
    """Three windowed blocks, then a global one that is made to pass its input through."""
    student = _small(window=2, class_tokens=0, summary="mean", global_every=4).eval()
    for parameter in student.backbone.blocks[3].parameters():  # type: ignore[attr-defined]
        torch.nn.init.zeros_(parameter)
    images = torch.rand(1, 3, 64, 96)
    changed = images.clone()
    changed[:, :, 32:48, 0:16] = 0  # cell 2, 0: of the window of rows 2 and 3, columns 0 and 1
    moved = (student(images).spatial - student(changed).spatial).abs().amax(-1)[0] > 1e-6  # h w
    assert sorted(map(tuple, moved.nonzero().tolist())) == [*itertools.product((2, 3), (0, 1))]


@pytest.mark.parametrize(
    ("depth", "expected"), [(12, (2, 5, 8, 11)), (24, (5, 11, 17, 23)), (32, (7, 15, 23, 31))]
)
def test_global_blocks_end_each_quarter(depth: int, expected: tuple[int, ...]) -> None:
    student = _small(depth=depth, width=2, heads=1)
    runs = student.backbone.runs  # type: ignore[attr-defined]
    assert tuple(i for first, last, everywhere in runs if everywhere for i in range(first, last)) == expected
    assert [i for first, last, _ in runs for i in range(first, last)] == [*range(depth)]


def test_windows_are_drawn_in_training_and_fixed_in_evaluation() -> None:
    student = _small(train_windows=[1, 2, 5], window=4)
    windows = set()
    for _ in range(40):
        windows.add(student.backbone._choose_window((4, 8)))  # type: ignore[attr-defined]
    assert windows == {1, 2}
    student.eval()
    assert student.backbone._choose_window((4, 8)) == 4  # type: ignore[attr-defined]


def test_windows_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(UserError, match=r"window 5 .* 4 x 8 patches; 1, 2, 4 do"):
        _small(window=5)(torch.rand(1, 3, 64, 128))
    with pytest.raises(UserError, match="at least 1"):
        _small(train_windows=[0])


def test_checkpointing_changes_memory_and_not_gradients() -> None:
    images, gradients = torch.rand(2, 3, 96, 96), []
    for checkpointing in (False, True):
        student = _small(checkpointing=checkpointing, window=2)
        student(images).spatial.square().sum().backward()
        gradients.append([parameter.grad for parameter in student.parameters()])
    for plain, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, kept)


def test_refuses_a_size_its_patches_do_not_divide_and_names_one_they_do() -> None:
    student = _small()
    with pytest.raises(UserError, match=r"100 x 64 .* 16; 96 x 64"):
        student(torch.rand(1, 3, 100, 64))
    with pytest.raises(UserError, match="0 x 64"):
        student.grid(0, 64)


def test_impossible_settings_are_named() -> None:
    with pytest.raises(UserError, match="heads 5"):
        _small(heads=5)
    with pytest.raises(UserError, match="summary 'max'"):
        _small(summary="max")
    with pytest.raises(UserError, match="class_tokens 0"):
        _small(class_tokens=0)
