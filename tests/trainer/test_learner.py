from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.ranks import run_ranks
from tests.trainer.runs import take_step
from trainer.checkpoint import load_checkpoint
from trainer.config import TrainConfig
from trainer.distillation import load_distillation
from trainer.distributed import World, launch
from trainer.groups import batches, open_groups, schedule_of
from trainer.learner import Learner
from trainer.metrics import read_metrics
from trainer.train import first_model, learning_rate, seed_step, train
from trainer.trained import read_checkpoint

CPU = World(0, 1, 0, torch.device("cpu"))


def weights_after(recipe: dict[str, Any], steps: int, world: World = CPU) -> list[dict[str, torch.Tensor]]:
    """The weights after each of so many steps, first the ones before."""
    config = TrainConfig.from_recipe(recipe)
    groups = open_groups(config)
    schedule = schedule_of(groups, world.size, config)
    learner = Learner(first_model(config, groups), config.training, world)
    found = [{name: value.clone() for name, value in learner.model.state_dict().items()}]
    for step, batch in enumerate(islice(batches(groups, schedule, 0, world.rank), steps)):
        seed_step(0, step, world.rank)
        take_step(learner, groups, schedule, step, batch, learning_rate(config.training, step))
        found.append({name: value.clone() for name, value in learner.model.state_dict().items()})
    return found


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("balancing", ["naive", "uncertainty", "amtml_kd"])
def test_a_batch_in_pieces_teaches_what_the_whole_does(recorded: Any, tmp_path: Path, balancing: str) -> None:
    """With rows that are not valid for one teacher spread unevenly over the pieces."""
    whole, pieces = (
        weights_after(recorded.recipe(tmp_path, accumulate=pieces, balancing=balancing), 4)[-1]
        for pieces in (1, 4)
    )
    assert_close(whole, pieces)


def _rank(rank: int, ranks: int, recipe: dict[str, Any], out: str) -> None:
    with launch("cpu") as world:
        torch.save(weights_after(recipe, 4, world)[-1], f"{out}/{rank}.pt")


@pytest.mark.parametrize("balancing", ["uncertainty", "adaloss", "amtml_kd"])
def test_two_ranks_in_pieces_teach_what_one_does(recorded: Any, tmp_path: Path, balancing: str) -> None:
    recipe = recorded.recipe(tmp_path, balancing=balancing)
    alone = weights_after(recipe, 4)[-1]
    in_pieces = {**recipe, "training": {**recipe["training"], "accumulate": 2}}
    run_ranks(_rank, 2, in_pieces, str(tmp_path))
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), alone)


def test_the_average_is_exponential_and_is_what_is_evaluated(recorded: Any, tmp_path: Path) -> None:
    decay = 0.7
    recipe = recorded.recipe(tmp_path / "run", ema=decay, steps=4)
    expected, *later = weights_after(recipe, 4)
    for weights in later:
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
    path = train(recipe)
    checkpoint = load_checkpoint(path)
    assert_close({f"student.{k}": v for k, v in checkpoint.student.items()}, later[-1])
    evaluated, exported = load_distillation(path)[0], read_checkpoint(path)
    assert_close(evaluated.state_dict(), expected)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported(images).spatial, evaluated.student(images).spatial)
    name = "backbone.embed.weight"
    assert not torch.equal(evaluated.student.state_dict()[name], checkpoint.student[name])


def test_an_average_goes_on_where_it_was(recorded: Any, tmp_path: Path) -> None:
    def stop(metrics: Any) -> None:
        if metrics.step == 3:
            raise KeyboardInterrupt

    recipe = recorded.recipe(tmp_path / "run", ema=0.9)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, on_metrics=stop)
    resumed, whole = train(recipe, resume=True), train(recorded.recipe(tmp_path / "whole", ema=0.9))
    one, other = (load_checkpoint(path).weights["ema"] for path in (resumed, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_held_out_views_are_evaluated_as_training_goes_on(recorded: Any, tmp_path: Path) -> None:
    plain = train(recorded.recipe(tmp_path / "plain"))
    path = train(recorded.recipe(tmp_path / "run", evaluate_every=2))
    lines = read_metrics(path.parent, "evaluations.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    names = {f"distance/{teacher}/{kind}" for teacher in ("cnn", "vit") for kind in ("summary", "spatial")}
    assert all(set(line) == {"step", "knn/student", *names} for line in lines)
    losses = [[line["loss"] for line in read_metrics(run.parent)] for run in (plain, path)]
    assert losses[0] == losses[1], "evaluating must change nothing"
