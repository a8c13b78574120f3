"""Training in workers of Ray Train, in processes of their own so that no test leaves a cluster behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from storage_schemas.errors import UserError
from tests.pipeline.test_executors import ENVIRONMENT, descendants, end
from trainer.config import TrainConfig
from trainer.launchers import train_by_ray
from trainer.metrics import read_metrics
from trainer.train import train

ROOT = Path(__file__).parents[2]
SECONDS = 280  # a dozen processes import torch and Ray: half a minute, or minutes on busy cores


def start(recipe: dict[str, Any], folder: Path, *flags: str) -> subprocess.Popen[str]:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    command = [sys.executable, "-m", "cli", "train", str(path), "--launcher", "ray", "--workers", "2", *flags]
    environment = ENVIRONMENT | {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def by_ray(recipe: dict[str, Any], folder: Path, *flags: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    process = start(recipe, folder, *flags)
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        end(process)
    return process.returncode, out, err


def test_two_workers_learn_what_one_process_does(recorded: Any, tmp_path: Path) -> None:
    train(recorded.recipe(tmp_path / "one", steps=4))
    recipe = recorded.recipe(Path("two"), steps=4)  # relative to where it is started
    code, out, err = by_ray(recipe, tmp_path)
    assert code == 0, err
    assert out == "two/step-00000004\n"
    assert "training: 4 of 4 steps loss" in err
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-5)
    assert not list((tmp_path / "two").glob(".ray*"))
    assert not (tmp_path / "home/ray_results").exists()
    # What the run holds is that of any other: without Ray, it goes on.
    assert train(recorded.recipe(tmp_path / "two", steps=4), resume=True).name == "step-00000004"


def test_an_error_of_the_workers_is_one_line(recorded: Any, tmp_path: Path) -> None:
    code, out, err = by_ray(recorded.recipe(tmp_path / "out", batch_size=9), tmp_path)
    assert (code, out) == (2, "")
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "training.batch_size: 9 must be a multiple of the 2 ranks; give 8 or 10" in line


def test_a_worker_that_dies_ends_the_run(recorded: Any, tmp_path: Path) -> None:
    process = start(recorded.recipe(tmp_path / "out", steps=100_000), tmp_path)
    try:
        deadline = time.monotonic() + SECONDS
        while not list(tmp_path.glob("out/step-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        below = descendants(process.pid)
        os.kill(max(pid for pid, line in below.items() if "RayTrainWorker" in line), signal.SIGKILL)
        _, err = process.communicate(timeout=deadline - time.monotonic())
    finally:
        end(process)
    assert process.returncode == 1
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "died" in line
    assert "--resume" in line


def test_a_cluster_needs_absolute_paths(recorded: Any, tmp_path: Path) -> None:
    recipe = recorded.recipe(tmp_path / "out")
    recipe["data"]["held_out"] = "held-out.tar"
    TrainConfig.from_recipe(recipe)
    with pytest.raises(UserError, match=r"data: 'held-out\.tar' is relative"):
        train_by_ray(recipe, address="127.0.0.1:1")
