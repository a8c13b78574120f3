from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from storage_schemas.errors import UserError
from trainer.balancing import BALANCINGS, Balancing, create_balancing
from trainer.config import BalancingConfig, TrainConfig
from trainer.metrics import read_metrics
from trainer.train import train

TERMS = ["clip/summary", "clip/spatial", "dino/summary", "dino/spatial"]
WIDTH = 6


def make(kind: str, **settings: Any) -> Balancing:
    return create_balancing(BalancingConfig(kind=kind, **settings), TERMS, WIDTH)  # type: ignore[arg-type]


def summary(b: int = 5) -> torch.Tensor:
    return torch.randn(b, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", BALANCINGS)
def test_every_method_starts_as_the_naive_one(kind: str) -> None:
    weights = make(kind).weigh(TERMS, summary())
    for term in TERMS:
        factor = torch.as_tensor(weights.factors.get(term, 1.0))
        torch.testing.assert_close(factor, torch.ones_like(factor))


@pytest.mark.parametrize("kind", BALANCINGS)
def test_only_terms_that_are_there_and_weigh_anything_have_weights(kind: str) -> None:
    found = make(kind).weigh([*TERMS[:2], "sam/summary"], summary()).factors
    assert set(found) <= set(TERMS[:2])
    assert (kind == "naive") == (not found)


def minimise(balancing: Balancing, losses: dict[str, float], steps: int = 400) -> dict[str, float]:
    """The weights that a method ends with, where the terms stay as they are."""
    optimizer = torch.optim.Adam(balancing.parameters(), lr=0.05)
    for _ in range(steps):
        weights = balancing.weigh([*losses], summary())
        total = sum((weights.factors[term] * loss).mean() for term, loss in losses.items()) + weights.penalty
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    with torch.no_grad():
        factors = balancing.weigh([*losses], summary()).factors
    return {term: float(factor.mean()) for term, factor in factors.items()}


@pytest.mark.parametrize("penalty", [0.5, 1.0])
def test_uncertainty_ends_where_its_objective_is_least(penalty: float) -> None:
    """d/db [exp(-b) L + c softplus(b)] = 0: exp(-b) L = c sigmoid(b), so w L = c / (1 + w)."""
    losses = {"clip/summary": 0.1, "clip/spatial": 0.4, "dino/summary": 2.0}
    found = minimise(make("uncertainty", penalty=penalty), losses)
    for term, weight in found.items():
        assert weight * losses[term] * (1 + weight) == pytest.approx(penalty, rel=0.02)
    assert found["clip/summary"] > found["clip/spatial"] > found["dino/summary"]


def test_adaloss_makes_every_term_count_one() -> None:
    balancing = make("adaloss")
    losses = {"clip/summary": 0.01, "clip/spatial": 3.0}
    means = {term: torch.tensor(loss) for term, loss in losses.items()}
    balancing.observe(means)
    for _ in range(3):
        factors = balancing.weigh([*losses], summary()).factors
        for term, loss in losses.items():
            assert float(factors[term]) * loss == pytest.approx(1.0)
        assert not any(factor.requires_grad for factor in factors.values())
        balancing.observe(means)


def test_adaloss_averages_with_its_momentum_over_the_steps_that_had_the_term() -> None:
    balancing = make("adaloss", momentum=0.9)
    balancing.observe({"clip/summary": torch.tensor(1.0)})
    balancing.observe({"dino/summary": torch.tensor(5.0)})
    balancing.observe({"clip/summary": torch.tensor(2.0)})
    factors = balancing.weigh(TERMS, summary()).factors
    assert float(factors["clip/summary"]) == pytest.approx(1 / 1.1)
    assert float(factors["dino/summary"]) == pytest.approx(1 / 5)
    assert float(factors["clip/spatial"]) == 1


def test_amtml_kd_weighs_teachers_by_image_and_collapses_onto_the_easy_one() -> None:
    balancing = make("amtml_kd")
    losses = {"clip/summary": 0.1, "clip/spatial": 0.1, "dino/summary": 1.0, "dino/spatial": 1.0}
    found = minimise(balancing, losses)
    assert found["clip/summary"] == found["clip/spatial"] > 1.9
    assert found["dino/summary"] == found["dino/spatial"] < 0.1
    factors = balancing.weigh(TERMS, summary()).factors
    assert factors["clip/summary"].shape == (5,)
    torch.testing.assert_close(factors["clip/summary"] + factors["dino/summary"], torch.full((5,), 2.0))


@pytest.mark.parametrize("kind", BALANCINGS)
def test_training_resumes_with_what_the_method_knew_and_logs_its_weights(
    recorded: Any, tmp_path: Path, kind: str
) -> None:
    def stop(metrics: Any) -> None:
        if metrics.step == 3:
            raise KeyboardInterrupt

    whole = train(recorded.recipe(tmp_path / "whole", balancing=kind))
    recipe = recorded.recipe(tmp_path / "run", balancing={"kind": kind})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, on_metrics=stop)
    resumed = train(recipe, resume=True)
    one, other = read_metrics(whole.parent), read_metrics(resumed.parent)
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    assert [line["weights"] for line in one] == [line["weights"] for line in other]
    assert set(one[-1]["weights"]) == (set() if kind == "naive" else set(one[-1]["terms"]))
    if kind != "naive":
        assert one[0]["weights"] != one[-1]["weights"]


def test_a_term_of_weight_zero_is_not_balanced(recorded: Any, tmp_path: Path) -> None:
    loss = {"summary_weight": {"cnn": 0}}
    path = train(recorded.recipe(tmp_path, steps=2, balancing="uncertainty", loss=loss))
    terms = {"cnn/spatial", "vit/summary", "vit/spatial"}
    assert set(read_metrics(path.parent)[-1]["weights"]) == terms


def test_an_unknown_method_is_named(recorded: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.balancing\.kind: 'gradnorm'.*'amtml_kd'"):
        TrainConfig.from_recipe(recorded.recipe(tmp_path, balancing="gradnorm"))
