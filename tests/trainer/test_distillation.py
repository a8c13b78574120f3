from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from storage_schemas.features import TeacherOutput
from trainer.balancing import Weights
from trainer.config import LossConfig
from trainer.distillation import loss_terms, weighted_sum

B, GRID, WIDTH = 4, (3, 2), 5
ALL = torch.ones(B, dtype=torch.bool)


def features(seed: int) -> TeacherOutput:
    generator = torch.Generator().manual_seed(seed)
    return TeacherOutput(
        torch.randn(B, WIDTH, generator=generator), torch.randn(B, *GRID, WIDTH, generator=generator)
    )


def terms(config: LossConfig, valid: torch.Tensor = ALL) -> dict[str, torch.Tensor]:
    return loss_terms({"t": features(0)}, {"t": features(1)}, {"t": valid}, config)


DISTANCES = {
    "l1": lambda a, b: F.l1_loss(a, b, reduction="none"),
    "mse": lambda a, b: F.mse_loss(a, b, reduction="none"),
    "smooth_l1": lambda a, b: F.smooth_l1_loss(a, b, reduction="none", beta=2.0),
}


@pytest.mark.parametrize("kind", DISTANCES)
def test_other_distances_stand_beside_the_cosine(kind: str) -> None:
    config = LossConfig(summary=kind, magnitude=kind, cosine=0, smooth_l1=3, transition=2)  # type: ignore[arg-type]
    found, (a, b) = terms(config), (features(0), features(1))
    torch.testing.assert_close(found["t/summary"], DISTANCES[kind](a.summary, b.summary).mean(-1))
    torch.testing.assert_close(found["t/spatial"], 3 * DISTANCES[kind](a.spatial, b.spatial).mean((1, 2, 3)))


def test_the_papers_terms_are_the_default() -> None:
    found, (a, b) = terms(LossConfig()), (features(0), features(1))
    torch.testing.assert_close(found["t/summary"], 1 - F.cosine_similarity(a.summary, b.summary))
    cosine = 1 - F.cosine_similarity(a.spatial, b.spatial, dim=-1)
    smooth = F.smooth_l1_loss(a.spatial, b.spatial, reduction="none").mean(-1)
    torch.testing.assert_close(found["t/spatial"], (0.9 * cosine + 0.1 * smooth).mean((1, 2)))


def test_the_sum_weighs_by_recipe_and_by_balancing_over_valid_rows() -> None:
    config = LossConfig(summary_weight={"t": 2.0}, spatial_weight={"t": 0.0})
    valid = torch.tensor([True, False, True, True])
    values, mask = terms(config, valid), {"t": valid}
    counts, factors = {"t": valid.sum()}, torch.tensor([1.0, 7.0, 0.5, 3.0])
    plain = weighted_sum(values, mask, counts, config, Weights())
    torch.testing.assert_close(plain.total, 2 * values["t/summary"][valid].mean())
    torch.testing.assert_close(plain.terms["t/spatial"], values["t/spatial"][valid].mean())
    found = weighted_sum(values, mask, counts, config, Weights({"t/summary": factors}, penalty=0.25))
    torch.testing.assert_close(found.total, 2 * (factors * values["t/summary"])[valid].mean() + 0.25)
    torch.testing.assert_close(found.terms, plain.terms)


def test_no_valid_row_gives_zero_and_no_nan() -> None:
    none = torch.zeros(B, dtype=torch.bool)
    prediction = features(0)
    prediction.summary.requires_grad_()
    target = TeacherOutput(torch.full((B, WIDTH), torch.nan), torch.full((B, *GRID, WIDTH), torch.nan))
    values = loss_terms({"t": prediction}, {"t": target}, {"t": none}, LossConfig())
    losses = weighted_sum(values, {"t": none}, {"t": none.sum()}, LossConfig(), Weights())
    losses.total.backward()
    assert losses.total.item() == 0
    assert prediction.summary.grad is not None
    assert not prediction.summary.grad.any()
