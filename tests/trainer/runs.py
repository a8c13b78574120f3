"""Whole runs for the tests of the trainer: started, interrupted, compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import load_checkpoint
from trainer.distillation import Losses
from trainer.groups import Group, Schedule, count_valid, ranks_by_teacher
from trainer.learner import Learner
from trainer.metrics import read_metrics
from trainer.reader import Batch
from trainer.train import train

ROOT = Path(__file__).parents[2]
RATES = ("images_per_second", "data_wait")  # what may differ between two equal runs


def assert_same_run(a: Path, b: Path) -> None:
    """Equal weights, optimiser state and metrics, to the last bit."""
    one, other = load_checkpoint(a), load_checkpoint(b)
    assert one.step == other.step
    for left, right in ((one.student, other.student), (one.adaptors, other.adaptors)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    for place, state in one.optimizer_state["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other.optimizer_state["state"][place][name])
    assert one.optimizer_state["param_groups"] == other.optimizer_state["param_groups"]
    assert metrics(a.parent) == metrics(b.parent)


def take_step(
    learner: Learner, groups: Sequence[Group], schedule: Schedule, step: int, batch: Batch, rate: float
) -> Losses:
    """A step as the loop makes it, but for the random numbers; the losses over all ranks."""
    counts, _ = count_valid(batch, learner.model.specs, stop=False)
    losses, _ = learner.step(batch, rate, counts, ranks_by_teacher(groups, schedule, step))
    return losses


def metrics(output: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in RATES} for line in read_metrics(output)]


def interrupt(recipe: dict[str, Any], after: int) -> None:
    """Train, and stop as an exception would stop it after `after` lines of metrics."""
    lines = 0

    def stop(_: object) -> None:
        nonlocal lines
        lines += 1
        if lines == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, on_metrics=stop)


def run_cli(recipe: dict[str, Any], folder: Path, *flags: str, **kwargs: Any) -> subprocess.Popen[str]:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", "train", str(path), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes, **kwargs)
