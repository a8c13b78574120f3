from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.losses import cosine_distance, mean_over_valid, spatial_loss, summary_loss, zero_invalid

KINDS: list[Any] = ["cosine", "smooth_l1", "l1", "mse"]
MAGNITUDES: list[Any] = KINDS[1:]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
def test_identity_costs_nothing_and_anything_else_something(kind: Any) -> None:
    summary = torch.randn(4, 16)
    assert summary_loss(summary, summary, kind).abs().max() < 1e-6
    assert (summary_loss(summary + torch.randn(4, 16), summary, kind) > 1e-3).all()


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_spatial_identity_costs_nothing(kind: Any) -> None:
    spatial = torch.randn(4, 3, 5, 16)
    assert spatial_loss(spatial, spatial, kind=kind).abs().max() < 1e-6
    assert (spatial_loss(-spatial, spatial, kind=kind) > 1.8).all()


def test_cosine_sees_direction_alone() -> None:
    student, target = torch.randn(2, 5, 16)
    distance = summary_loss(student, target)
    torch.testing.assert_close(summary_loss(7 * student, 0.01 * target), distance)
    torch.testing.assert_close(summary_loss(-student, target), 2 - distance)
    torch.testing.assert_close(summary_loss(target, student), distance)
    torch.testing.assert_close(distance, 1 - torch.cosine_similarity(student, target))


def test_values_are_of_each_sample_alone() -> None:
    student, target = torch.randn(2, 4, 3, 5, 16)
    together = spatial_loss(student, target)
    apart = torch.cat([spatial_loss(student[i : i + 1], target[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart)


def test_spatial_loss_is_the_papers_sum() -> None:
    student, target = torch.randn(2, 2, 3, 5, 16)
    cosine = (1 - torch.cosine_similarity(student, target, dim=-1)).mean((1, 2))
    smooth = torch.nn.functional.smooth_l1_loss(student, target, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(spatial_loss(student, target), 0.9 * cosine + 0.1 * smooth)
    torch.testing.assert_close(spatial_loss(student, target, alpha=1, beta=0), cosine)
    torch.testing.assert_close(spatial_loss(student, target, alpha=0, beta=1), smooth)


def test_transition_is_where_smooth_l1_turns_linear() -> None:
    target = torch.zeros(1, 1, 1, 1)
    at = torch.tensor([[[[2.0]]]])
    assert spatial_loss(at, target, alpha=0, beta=1, transition=2.0).item() == pytest.approx(1.0)
    assert spatial_loss(at, target, alpha=0, beta=1, transition=1.0).item() == pytest.approx(1.5)
    assert spatial_loss(at, target, alpha=0, beta=1, transition=0.0).item() == pytest.approx(2.0)


def test_a_zero_target_contributes_exactly_nothing_to_the_cosine() -> None:
    student = torch.randn(3, 16, requires_grad=True)
    target = torch.randn(3, 16)
    target[1] = 0
    distance = cosine_distance(student, target)
    distance.sum().backward()
    assert student.grad is not None
    assert distance[1].item() == 0
    assert not student.grad[1].any()
    assert student.grad[[0, 2]].isfinite().all()
    assert student.grad[[0, 2]].any(1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", ["student", "target", "both"])
def test_zeros_never_make_nan(kind: Any, zero: str) -> None:
    student = (torch.randn(2, 8) if zero == "target" else torch.zeros(2, 8)).requires_grad_()
    target = torch.randn(2, 8) if zero == "student" else torch.zeros(2, 8)
    loss = summary_loss(student, target, kind)
    loss.sum().backward()
    assert student.grad is not None
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


def test_a_zero_student_is_told_where_to_go() -> None:
    student, target = torch.zeros(1, 8, requires_grad=True), torch.randn(1, 8)
    loss = summary_loss(student, target)
    loss.sum().backward()
    assert student.grad is not None
    assert loss.item() == 1
    assert torch.cosine_similarity(-student.grad, target).item() == pytest.approx(1)


def _total(student: Tensor, target: Tensor, valid: Tensor, count: float) -> Tensor:
    values = spatial_loss(student, zero_invalid(target, valid))
    return mean_over_valid(values, valid, count)


def test_invalid_rows_do_not_leak() -> None:
    """The loss and the gradient of a batch with NaN rows are those of the batch without them."""
    student, target = torch.randn(2, 4, 3, 5, 16)
    valid = torch.tensor([True, False, True, False])
    target[~valid] = torch.nan
    with_nan = student.clone().requires_grad_()
    without = student[valid].clone().requires_grad_()
    loss = _total(with_nan, target, valid, 2)
    expected = spatial_loss(without, target[valid]).mean()
    loss.backward()
    expected.backward()
    assert with_nan.grad is not None
    assert without.grad is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(with_nan.grad[valid], without.grad)
    assert not with_nan.grad[~valid].any()


def test_values_that_are_not_valid_are_not_looked_at() -> None:
    values = torch.tensor([1.0, torch.nan, 3.0, torch.inf], requires_grad=True)
    mean = mean_over_valid(values, torch.tensor([True, False, True, False]), 2)
    mean.backward()
    assert values.grad is not None
    assert mean.item() == 2
    assert values.grad.tolist() == [0.5, 0, 0.5, 0]


def test_nothing_valid_costs_nothing_and_still_has_a_gradient() -> None:
    student = torch.randn(2, 3, 5, 16, requires_grad=True)
    target = torch.full((2, 3, 5, 16), torch.nan)
    loss = _total(student, target, torch.zeros(2, dtype=torch.bool), 0)
    loss.backward()
    assert student.grad is not None
    assert loss.item() == 0
    assert not student.grad.any()


def test_shares_of_a_batch_add_up_to_its_mean() -> None:
    """Two ranks with unequal valid rows: the average of what they compute is the mean over all valid rows."""
    values = torch.randn(6)
    valid = torch.tensor([True, True, True, False, True, False])
    each = valid.sum() / 2
    shares = [mean_over_valid(values[s], valid[s], each) for s in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(sum(shares) / 2, values[valid].mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_float32_under_autocast_and_for_halves(dtype: torch.dtype) -> None:
    student, target = torch.randn(2, 2, 3, 5, 16).to(dtype)
    exact = spatial_loss(student.float(), target.float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = spatial_loss(student, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
    large = torch.full((1, 1280), 60000.0, dtype=torch.float16)
    assert summary_loss(large, large).abs().item() < 1e-6


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(AssertionError):
        spatial_loss(torch.randn(2, 1, 1, 4), torch.randn(2, 3, 3, 4))
