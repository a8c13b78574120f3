"""Pixels as a summary: what a student's summary is held against."""

from __future__ import annotations

import torch

from trainer.evaluation.knn import knn_accuracy
from trainer.evaluation.summaries import PIXELS_SIDE, pixel_summary


def _images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)


def test_small_images_keep_every_pixel_and_large_ones_the_means_of_areas() -> None:
    small = _images(2, PIXELS_SIDE, PIXELS_SIDE)
    assert pixel_summary(small).shape == (2, 3 * PIXELS_SIDE**2)
    assert pixel_summary(small[..., :20]).shape == (2, 3 * PIXELS_SIDE * 20)
    enlarged = small.repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(pixel_summary(enlarged), pixel_summary(small))


def test_a_picture_at_half_its_contrast_is_its_own_nearest() -> None:
    """A cosine of colours that keep their mean would find the brightest ones."""
    images, labels = _images(40, 16, 16), torch.arange(40)
    paler = images // 2 + 62  # towards the middle grey
    assert knn_accuracy(pixel_summary(images), labels, pixel_summary(paler), labels, k=1) == 1
