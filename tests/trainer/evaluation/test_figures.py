"""PCA colours are the teacher's own axes; a picture survives its data URI; ticks are round numbers."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainer.evaluation.figures import _ticks, data_uri, pca_rgb


@pytest.fixture
def teacher() -> torch.Tensor:
    return torch.randn(2, 7, 7, 16, generator=torch.Generator().manual_seed(1))


def test_equal_features_have_equal_colours(teacher: torch.Tensor) -> None:
    recorded, predicted = pca_rgb(teacher, teacher.clone())
    assert recorded.shape == (2, 7, 7, 3)
    np.testing.assert_array_equal(recorded, predicted)


def test_the_students_features_do_not_move_the_teachers_colours(teacher: torch.Tensor) -> None:
    alone, _ = pca_rgb(teacher, teacher)
    beside, _ = pca_rgb(teacher, 100 * torch.randn(2, 4, 5, 16))
    np.testing.assert_array_equal(alone, beside)


def test_colours_do_not_depend_on_a_rotation_or_shift_of_the_features(teacher: torch.Tensor) -> None:
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    turned, _ = pca_rgb(teacher.double() @ rotation + 3, teacher.double() @ rotation + 3)
    recorded, _ = pca_rgb(teacher, teacher)
    for channel in range(3):  # a component's sign depends on the basis, and flips its channel
        ours, theirs = recorded[..., channel].astype(int), turned[..., channel].astype(int)
        assert min(abs(ours - theirs).max(), abs(ours - (255 - theirs)).max()) <= 1


def test_a_constant_prediction_has_one_colour(teacher: torch.Tensor) -> None:
    _, predicted = pca_rgb(teacher, teacher.mean((0, 1, 2)).expand(7, 7, 16))
    assert np.unique(predicted.reshape(-1, 3), axis=0).shape == (1, 3)


def test_a_small_map_survives_its_uri_exactly(teacher: torch.Tensor) -> None:
    pixels = pca_rgb(teacher[0], teacher[0])[0]
    head, data = data_uri(pixels).split(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)


@given(top=st.floats(1e-6, 1e9), count=st.integers(3, 8))
def test_ticks_are_few_and_within_the_axis(top: float, count: int) -> None:
    ticks = _ticks(top, count)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= count + 1
    assert ticks[-1] <= top * 1.001
