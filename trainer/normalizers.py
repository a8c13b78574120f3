"""Invertible affine maps that bring a teacher's features to mean 0 and variance 1 before they are compared.

Teachers differ in scale by orders of magnitude, and so do channels of one teacher. A loss that sees sizes
then serves the loudest. Fitted from the moments in the store, in float64: no pass over the features.

PHI-S (arXiv:2410.01680) is y = (1 / sqrt l) H U^T (x - mean): U the eigenvectors of the covariance, l its
mean eigenvalue, H a Hadamard matrix. H U^T only turns, so one scale serves all channels and distances keep
their proportions; H spreads each eigenvector over all channels, so they all have variance l. Hadamard
matrices are there for d = 1, 2 and multiples of 4 only, and not all are short to write. Here H is instead, at
any d, the Hartley matrix, cos + sin of 2 pi j k / d, over sqrt d, whose rows j and d - j are then turned in
their plane until their variances are equal. That is exact, needs no case for any d, is Hadamard at d = 2 and
4, and its entries are at most sqrt 2 times those of a Hadamard matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage_schemas.features import Moments

Array = NDArray[np.float64]

FP16_ROUNDING = 2.0**-11  # relative; features that vary less about their mean do not vary
LEAST_VARIANCE = 1e-6  # of a channel beside the mean over channels: less is noise, not to be amplified


class Normalizer(nn.Module):
    """y = A (x - mean), ... d -> ... d in float32. `matrix` is A, d d, or its diagonal, d."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Array, matrix: Array) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("matrix", torch.tensor(matrix, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """A vector that is not finite leaves the others as they are."""
        centered = x.float() - self.mean
        return centered * self.matrix if self.matrix.ndim == 1 else centered @ self.matrix.T

    def moments(self, known: Moments) -> Moments:
        """Those of y, from those of x."""
        matrix = self.matrix.double().cpu().numpy()
        matrix = np.diag(matrix) if matrix.ndim == 1 else matrix
        mean = matrix @ (known.mean - self.mean.double().cpu().numpy())
        return Moments(known.count, mean, matrix @ known.covariance @ matrix.T)

    @torch.no_grad()
    def fold_into(self, linear: nn.Linear) -> None:
        """Change a layer that predicts y into one that predicts x: W to A^-1 W, b to A^-1 b + mean."""
        affine = torch.cat([linear.weight, linear.bias[:, None]], dim=1).double()  # d (in 1)
        matrix = self.matrix.double()
        affine = affine / matrix[:, None] if matrix.ndim == 1 else torch.linalg.solve(matrix, affine)
        linear.weight.copy_(affine[:, :-1])
        linear.bias.copy_(affine[:, -1] + self.mean)


def standardize(moments: Moments) -> Normalizer:
    """Each channel to variance 1, on its own. One that hardly varies gets the scale of the mean variance."""
    mean_variance = _mean_variance(moments)
    variance = moments.covariance.diagonal()
    variance = np.where(variance > LEAST_VARIANCE * mean_variance, variance, mean_variance)
    return Normalizer(moments.mean, variance**-0.5)


def phi_s(moments: Moments) -> Normalizer:
    """All channels to variance 1 by a rotation and one scale, which any rank of the covariance admits."""
    return Normalizer(moments.mean, _rotation(moments.covariance) / sqrt(_mean_variance(moments)))


# The setting `training.normalizer`.
NORMALIZERS: dict[str, Callable[[Moments], Normalizer] | None] = {
    "none": None,
    "standardize": standardize,
    "phi_s": phi_s,
}


def _mean_variance(moments: Moments) -> float:
    """Over channels; 1 where nothing varies, or nothing is known."""
    variance = float(moments.covariance.diagonal().mean())
    rounding = FP16_ROUNDING**2 * float(np.square(moments.mean).mean())
    return variance if variance > rounding else 1.0


def _rotation(covariance: Array) -> Array:
    """An orthogonal R, d d, with the diagonal of R C R^T constant, each eigenvector of C spread over all.

    Signs of eigenvectors are fixed, for they hang on how sums were rounded, and runs on other numbers of
    threads must learn from the same targets.
    """
    d = len(covariance)
    if not covariance.any():
        return np.eye(d)
    eigenvectors = np.linalg.eigh(covariance)[1]
    eigenvectors *= np.where(np.cos(np.arange(d)) @ eigenvectors < 0, -1, 1)
    return _equalize(_hartley(d) @ eigenvectors.T, covariance)


def _hartley(d: int) -> Array:
    angle = 2 * np.pi / d * (np.outer(np.arange(d), np.arange(d)) % d)
    matrix: Array = (np.cos(angle) + np.sin(angle)) / sqrt(d)
    return matrix


def _equalize(rotation: Array, covariance: Array) -> Array:
    """Turn rows j and d - j of R = H U^T in their plane, by 45 degrees at most, to equal variances.

    Each variance is then the mean: squared entries of the rows j and d - j of H add up to 2 / d everywhere,
    those of row 0 and, if d is even, row d / 2 are 1 / d.
    """
    d = len(rotation)
    j = np.arange(1, (d + 1) // 2)
    product = rotation @ covariance
    one, other = rotation[j], rotation[d - j]
    difference = (one * product[j]).sum(axis=1) - (other * product[d - j]).sum(axis=1)
    twice_covariance = 2 * (one * product[d - j]).sum(axis=1)
    sign = np.copysign(1, twice_covariance)
    angle = np.arctan2(sign * difference, sign * twice_covariance)[:, None] / 2
    rotation[j] = np.cos(angle) * one - np.sin(angle) * other
    rotation[d - j] = np.sin(angle) * one + np.cos(angle) * other
    return rotation
