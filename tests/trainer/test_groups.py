from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage_schemas.errors import UserError
from tests.trainer.ranks import run_ranks
from tests.trainer.runs import take_step
from trainer.config import TrainConfig
from trainer.distributed import World, launch
from trainer.groups import (
    Schedule,
    batches,
    open_groups,
    schedule_of,
    specs_of,
    views_in,
    views_of,
)
from trainer.learner import Learner
from trainer.train import first_model, seed_step

SHARES = st.lists(st.integers(1, 5), min_size=1, max_size=4)
GROUPS = {
    "small": {"teachers": ["vit"], "resolution": 16, "batch_size": 8},
    "large": {"teachers": ["cnn"], "resolution": 32, "batch_size": 4},
}
CPU = World(0, 1, 0, torch.device("cpu"))


@given(SHARES, st.integers(1, 3), st.integers(0, 50))
def test_over_steps_each_group_has_its_share_of_every_cycle(
    shares: list[int], ranks: int, first: int
) -> None:
    schedule = Schedule(shares, ranks, "steps")
    cycle = sum(shares) // np.gcd.reduce(shares)
    seen = Counter(schedule.work(step, 0).group for step in range(first, first + cycle))
    assert [seen[group] * sum(shares) for group in range(len(shares))] == [share * cycle for share in shares]
    for step in range(first, first + cycle):
        works = [schedule.work(step, rank) for rank in range(ranks)]
        assert {work.group for work in works} == set(schedule.served(step))
        assert [(work.rank, work.ranks) for work in works] == [(rank, ranks) for rank in range(ranks)]


@given(SHARES, st.integers(1, 60))
def test_a_group_takes_its_batches_one_after_the_other(shares: list[int], steps: int) -> None:
    over_steps = Schedule(shares, 1, "steps")
    over_ranks = Schedule(shares, sum(shares), "ranks")
    for schedule, ranks in ((over_steps, 1), (over_ranks, sum(shares))):
        indices: dict[int, list[int]] = {}
        for step in range(steps):
            found = {(w.group, w.index) for w in (schedule.work(step, rank) for rank in range(ranks))}
            for group, index in found:
                indices.setdefault(group, []).append(index)
        assert all(taken == list(range(len(taken))) for taken in indices.values())


@given(SHARES, st.integers(1, 3))
def test_over_ranks_each_group_has_its_share_of_the_ranks(shares: list[int], times: int) -> None:
    ranks = times * sum(shares)
    schedule = Schedule(shares, ranks)
    works = [schedule.work(7, rank) for rank in range(ranks)]
    for group, share in enumerate(shares):
        own = [work for work in works if work.group == group]
        assert len(own) == schedule.ranks_of(group) == ranks * share // sum(shares)
        assert [work.rank for work in own] == list(range(len(own)))
        assert {work.ranks for work in own} == {len(own)}


@pytest.mark.parametrize(
    ("shares", "ranks", "remedy"),
    [
        ([1, 1], 3, "shares 1:1 do not fit 3 ranks; 2 or 4 ranks do, shares 2:1 do, and training.split"),
        ([2, 1], 4, "shares 2:1 do not fit 4 ranks; 3 or 6 ranks do, shares 3:1 do, and training.split"),
        ([3, 2, 1], 2, "shares 3:2:1 do not fit 2 ranks; 6 ranks do, and training.split: steps takes any"),
    ],
)
def test_shares_that_do_not_fit_are_told_the_nearest_that_do(
    shares: list[int], ranks: int, remedy: str
) -> None:
    with pytest.raises(UserError, match=remedy):
        Schedule(shares, ranks)
    Schedule(shares, ranks, "steps")


def test_each_group_has_its_own_resolution_batch_size_and_order(recorded: Any, tmp_path: Path) -> None:
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, groups=GROUPS))
    groups = open_groups(config)
    schedule = schedule_of(groups, 1, config)
    assert [*specs_of(groups)] == ["vit", "cnn"]
    for step, batch in enumerate(islice(batches(groups, schedule), 6)):
        [(name, views)] = views_of(groups, schedule, step).items()
        settings = GROUPS[name]
        assert [*batch.targets] == settings["teachers"]
        assert tuple(batch.images.shape[2:]) == (settings["resolution"],) * 2
        assert len(views) == len(batch.images) == settings["batch_size"] == views_in(groups, schedule, step)
        shards = groups[0].reader.shards
        assert [(shards[shard], row) for shard, row in batch.views.tolist()] == views


def test_a_group_that_is_through_starts_anew_while_the_other_goes_on(recorded: Any, tmp_path: Path) -> None:
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, groups=GROUPS))
    groups = open_groups(config)
    epochs = [len(group.order) / group.batch_size for group in groups]
    assert epochs[0] < epochs[1] - 1, "the first group must be through earlier"
    schedule = schedule_of(groups, 1, config)
    steps = 2 * int(epochs[1])
    seen: dict[str, list[tuple[int, ...]]] = {"vit": [], "cnn": []}
    for batch in islice(batches(groups, schedule), steps):
        seen[next(iter(batch.targets))] += map(tuple, batch.views.tolist())
    first, second = (seen[next(iter(group.reader.teachers))] for group in groups)
    assert len(set(first[: len(groups[0].order)])) == len(groups[0].order) < len(first)
    assert len(set(second)) == len(second)


def grouped_step(rank: int, ranks: int, recipe: dict[str, Any], out: str, split: str, step: int) -> None:
    """The gradients of one step from the first weights."""
    recipe = {**recipe, "training": {**recipe["training"], "split": split}}
    config = TrainConfig.from_recipe(recipe)
    with launch("cpu") as world:
        groups = open_groups(config)
        schedule = schedule_of(groups, ranks, config)
        learner = Learner(first_model(config, groups), config.training, world)
        batch = next(batches(groups, schedule, step, rank))
        seed_step(0, step, rank)
        losses = take_step(learner, groups, schedule, step, batch, 1e-3)
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in learner.model.named_parameters()
        }
    torch.save(
        {"gradients": gradients, "loss": losses.total, "terms": losses.terms},
        f"{out}/{split}-{step}-{rank}.pt",
    )


def test_a_step_over_ranks_is_the_mean_of_a_cycle_over_steps(recorded: Any, tmp_path: Path) -> None:
    """To rounding, in every parameter: with two ranks for one group and one for the other."""
    # At the size of its grid the student draws no positions: ranks differ in their views alone.
    groups = {**GROUPS, "small": {**GROUPS["small"], "share": 2, "resolution": 32}}
    recipe = recorded.recipe(tmp_path / "run", groups=groups, clip=None)
    run_ranks(grouped_step, 3, recipe, str(tmp_path), "ranks", 0)
    over_ranks = torch.load(tmp_path / "ranks-0-2.pt")
    cycle = {"small": 0, "large": 1}  # the first step of each
    over_steps = {}
    for name, step in cycle.items():
        grouped_step(0, 1, recipe, str(tmp_path), "steps", step)
        over_steps[name] = torch.load(tmp_path / f"steps-{step}-0.pt")
    for name, gradient in over_ranks["gradients"].items():
        mixed = (2 * over_steps["small"]["gradients"][name] + over_steps["large"]["gradients"][name]) / 3
        torch.testing.assert_close(gradient, mixed, rtol=1e-4, atol=1e-6)
    mixed_loss = (2 * over_steps["small"]["loss"] + over_steps["large"]["loss"]) / 3
    torch.testing.assert_close(over_ranks["loss"], mixed_loss)
    for alone in over_steps.values():
        for term, value in alone["terms"].items():
            torch.testing.assert_close(over_ranks["terms"][term], value)


def test_heads_of_other_groups_rest(recorded: Any, tmp_path: Path) -> None:
    """Nor do their momentum and their decay move them."""
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, groups=GROUPS, weight_decay=0.5))
    groups = open_groups(config)
    schedule = schedule_of(groups, 1, config)
    learner = Learner(first_model(config, groups), config.training, CPU)
    for step, batch in enumerate(islice(batches(groups, schedule), 4)):
        before = {name: p.detach().clone() for name, p in learner.model.adaptors.named_parameters()}
        take_step(learner, groups, schedule, step, batch, 1e-2)
        for name, parameter in learner.model.adaptors.named_parameters():
            assert torch.equal(parameter, before[name]) == (name.split(".")[0] not in batch.targets)


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({"groups": {"a": {"teachers": ["sam"]}}}, r"teacher: 'sam' is not in store .* there: cnn, vit"),
        ({"groups": GROUPS, "teachers": ["vit"]}, r"training\.groups: .*remove training\.teachers"),
        (
            {"groups": {"a": {"teachers": ["vit"]}, "b": {"teachers": ["vit", "cnn"]}}},
            r"training\.groups: .*name teacher 'vit' twice",
        ),
        ({"groups": {"a": {"teachers": []}}}, r"training\.groups\.a\.teachers"),
        ({"groups": {"a": {"teachers": ["vit"], "share": 0}}}, r"training\.groups\.a\.share: 0"),
        (
            {"groups": {"a": {"teachers": ["vit"], "rate": 1}}},
            r"training\.groups\.a\.rate: unknown key .*there are: teachers, ",
        ),
    ],
)
def test_wrong_groups_are_named(recorded: Any, tmp_path: Path, training: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        open_groups(TrainConfig.from_recipe(recorded.recipe(tmp_path, **training)))


def test_a_batch_that_cannot_be_cut_names_its_group_and_sizes(recorded: Any, tmp_path: Path) -> None:
    recipe = recorded.recipe(tmp_path, groups=GROUPS, accumulate=3)
    config = TrainConfig.from_recipe(recipe)
    with pytest.raises(
        UserError, match=r"training\.groups\.small\.batch_size: 8 must .*accumulate 3; give 6 or 9"
    ):
        schedule_of(open_groups(config), 1, config)


def weightless_step(rank: int, ranks: int, recipe: dict[str, Any], out: str) -> None:
    config = TrainConfig.from_recipe(recipe)
    with launch("cpu") as world:
        groups = open_groups(config)
        schedule = schedule_of(groups, ranks, config)
        learner = Learner(first_model(config, groups), config.training, world)
        for step, batch in enumerate(islice(batches(groups, schedule, 0, rank), 2)):
            take_step(learner, groups, schedule, step, batch, 1e-3)
        torch.save(learner.model.state_dict(), f"{out}/{rank}.pt")


@pytest.mark.parametrize("balancing", ["uncertainty", "amtml_kd"])
def test_ranks_whose_terms_balancing_leaves_alone_do_not_part(
    recorded: Any, tmp_path: Path, balancing: str
) -> None:
    """A group of one summary alone beside another: what balancing learns is on both ranks the same."""
    groups = {name: {**group, "resolution": 32, "batch_size": 4} for name, group in GROUPS.items()}
    loss = {"summary_weight": {"cnn": 0}}
    recipe = recorded.recipe(tmp_path / "run", groups=groups, balancing=balancing, loss=loss)
    run_ranks(weightless_step, 2, recipe, str(tmp_path))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("balancing", ["uncertainty", "amtml_kd"])
def test_what_balancing_knows_of_other_groups_rests(recorded: Any, tmp_path: Path, balancing: str) -> None:
    recipe = recorded.recipe(tmp_path, groups=GROUPS, balancing=balancing)
    config = TrainConfig.from_recipe(recipe)
    groups = open_groups(config)
    schedule = schedule_of(groups, 1, config)
    learner = Learner(first_model(config, groups), config.training, CPU)
    for step, batch in enumerate(islice(batches(groups, schedule), 4)):
        resting = learner.model.balancing.parameters_beside(batch.targets)
        before = [parameter.detach().clone() for parameter in resting]
        take_step(learner, groups, schedule, step, batch, 1e-2)
        assert resting
        assert all(torch.equal(a, b) for a, b in zip(before, resting, strict=True))


def test_a_group_that_would_teach_nothing_is_refused(recorded: Any, tmp_path: Path) -> None:
    loss = {"summary_weight": {"cnn": 0}, "spatial_weight": {"cnn": 0}}
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, groups=GROUPS, loss=loss))
    with pytest.raises(UserError, match=r"training\.loss: every weight of cnn is 0, .* group 'large'"):
        open_groups(config)
