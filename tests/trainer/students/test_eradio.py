from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from storage_schemas.errors import UserError
from trainer.students import Student, create_student
from trainer.students.eradio import Blend, Block, WindowAttention

SMALL = {"width": 16, "layers": (1, 1, 1, 1), "heads": (2, 4)}


def _small(**settings: Any) -> Student:
    torch.manual_seed(0)
    return create_student("eradio_xt", **(SMALL | settings))


@pytest.mark.parametrize(
    ("name", "neck", "millions"),
    [("b", True, 117.4), ("b", False, 112.7), ("l", True, 263.9), ("l", False, 253.3)],
)
def test_parameters_are_the_papers(name: str, neck: bool, millions: float) -> None:
    with torch.device("meta"):
        student = create_student(f"eradio_{name}", neck=neck)
    count = sum(parameter.numel() for parameter in student.parameters())
    assert count == pytest.approx(millions * 1e6, rel=5e-3)


@pytest.mark.parametrize("neck", [True, False])
@pytest.mark.parametrize(
    "size", [(64, 64), (65, 97), (224, 224), (224, 320), (96, 432), (112, 112), (256, 200)]
)
def test_every_size_from_64_gives_what_is_announced(neck: bool, size: tuple[int, int]) -> None:
    student = _small(neck=neck)
    for training in (True, False):
        output = student.train(training)(torch.rand(2, 3, *size))
        assert output.summary.shape == (2, student.summary_dim)
        assert output.spatial.shape == (2, *student.grid(*size), student.spatial_dim)
        torch.testing.assert_close(output.summary, output.spatial.mean((1, 2)))
    assert student.grid(224, 224) == ((14, 14) if neck else (7, 7))


def test_smaller_sizes_are_refused_with_the_least() -> None:
    with pytest.raises(UserError, match="63 x 64 must be at least 64 x 64"):
        _small()(torch.rand(1, 3, 63, 64))


def test_a_window_as_large_as_the_grid_sees_all_of_it_and_a_smaller_one_its_own() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 8, 6, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, :, 0, 0] = torch.rand(8, dtype=torch.float64)
    for window, reach in ((8, (6, 8)), (4, (3, 4))):
        block = Block(8, 2, window).double().eval()
        moved = ((block(x) - block(changed)).abs().amax(1)[0] > 0).nonzero()  # cells h w
        assert tuple(moved.amax(0).add(1).tolist()) == reach
        assert len(moved) == reach[0] * reach[1]


def test_a_windows_bias_depends_on_the_offset_alone() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, 7)
    bias = attention._bias(3, 5)[0].reshape(2, 3, 5, 3, 5)
    assert bias.min() > 0
    assert bias.max() < 16
    torch.testing.assert_close(bias[:, 0, 0, 1, 2], bias[:, 1, 2, 2, 4])
    assert not torch.allclose(bias[:, 0, 0, 1, 2], bias[:, 0, 0, 2, 1])
    whole = attention._bias(7, 7)[0].reshape(2, 7, 7, 7, 7)
    torch.testing.assert_close(bias[:, 0, 0, 1, 2], whole[:, 3, 3, 4, 5])


def test_window_attention_is_softmax_attention_with_the_bias() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(8, 2, 4)
    x = torch.randn(3, 6, 8)
    q, k, v = attention.qkv(x).reshape(3, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    weights = F.softmax(q @ k.transpose(-1, -2) / 2 + attention._bias(2, 3), -1)
    torch.testing.assert_close(
        attention(x, 2, 3), attention.project((weights @ v).transpose(1, 2).flatten(2))
    )


def test_blend_is_half_and_half() -> None:
    x = torch.randn(2, 3)
    torch.testing.assert_close(Blend(torch.nn.ReLU())(x), (x + x.relu()) / 2)


def test_rows_and_columns_are_apart() -> None:
    """The cells under the corner of the image that changed change most."""
    student = _small().eval()
    images = torch.zeros(1, 3, 96, 160)
    changed = images.clone()
    changed[:, :, 0:16, 144:160] = torch.rand(3, 16, 16)
    with torch.no_grad():
        difference = (student(images).spatial - student(changed).spatial).norm(dim=-1)[0]  # h w
    row, column = divmod(int(difference.argmax()), difference.shape[1])
    assert row < 2
    assert column >= 8


def test_impossible_settings_are_named() -> None:
    with pytest.raises(UserError, match=r"heads \[3, 4\]"):
        _small(heads=(3, 4))
    with pytest.raises(UserError, match="four numbers"):
        _small(layers=(1, 1))
