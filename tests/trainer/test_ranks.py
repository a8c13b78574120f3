from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from storage_schemas.errors import UserError
from tests.trainer.ranks import free_port
from trainer.checkpoint import load_checkpoint
from trainer.config import TrainConfig
from trainer.groups import batches, open_groups, schedule_of
from trainer.metrics import read_metrics
from trainer.train import train

ROOT = Path(__file__).parents[2]


def start(recipe: dict[str, Any], folder: Path, ranks: int, *flags: str) -> subprocess.Popen[str]:
    """`train` under torchrun with so many ranks, or alone."""
    path = folder / f"{ranks}.yaml"
    path.write_text(json.dumps(recipe))
    launcher = [
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        "--master-port",
        str(free_port()),
        "-m",
    ]
    command = [sys.executable, "-m", *(launcher if ranks > 1 else []), "cli", "train", str(path), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def torchrun(recipe: dict[str, Any], folder: Path, ranks: int, *flags: str) -> Path:
    """The last checkpoint."""
    process = start(recipe, folder, ranks, *flags)
    printed, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    assert len(printed.splitlines()) == 1, printed
    return Path(printed.strip())


def assert_same_losses(one: Path, other: Path) -> None:
    """To 1e-5, step by step."""
    for a, b in zip(read_metrics(one.parent), read_metrics(other.parent), strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_learn_what_one_does(recorded: Any, tmp_path: Path, ranks: int) -> None:
    """With rows that are invalid for one teacher spread unevenly over the ranks."""
    recipe = recorded.recipe(tmp_path / "one", steps=6)
    config = TrainConfig.from_recipe(recipe)
    shares = [rank_valid(config, rank) for rank in range(2)]
    assert shares[0] != shares[1]
    alone = train(recipe)
    together = torchrun(recorded.recipe(tmp_path / "several", steps=6), tmp_path, ranks)
    one, other = load_checkpoint(alone), load_checkpoint(together)
    for left, right in ((one.student, other.student), (one.adaptors, other.adaptors)):
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-5)
    assert_same_losses(alone, together)


def children(pid: int) -> list[int]:
    """Of a process, from the kernel."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_with_another_number_of_ranks(
    recorded: Any, tmp_path: Path, before: int, after: int
) -> None:
    """Over the same global batches in the same order, which the losses of all steps show."""
    settings = {"steps": 30, "checkpoint_every": 4}
    recipe = recorded.recipe(tmp_path / "killed", **settings)
    process = start(recipe, tmp_path, before)
    lines, kill_after = tmp_path / "killed/metrics.jsonl", random.randint(6, 20)
    while process.poll() is None and (not lines.exists() or lines.read_text().count("\n") < kill_after):
        time.sleep(0.002)
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was over before it was killed"
    resumed = torchrun(recipe, tmp_path, after, "--resume")
    whole = train(recorded.recipe(tmp_path / "whole", **settings))
    assert_same_losses(whole, resumed)
    assert [line["step"] for line in read_metrics(resumed.parent)] == [*range(1, 31)]


def test_groups_over_ranks_learn_from_all_and_end_together(recorded: Any, tmp_path: Path) -> None:
    """A group that is through sooner starts anew; two ranks a group learn what one a group does."""
    groups = {
        "small": {"teachers": ["vit"], "resolution": 32, "batch_size": 4},
        "large": {"teachers": ["cnn"], "resolution": 32, "batch_size": 2},
    }
    two, four = (
        torchrun(recorded.recipe(tmp_path / str(ranks), steps=10, groups=groups), tmp_path, ranks)
        for ranks in (2, 4)
    )
    assert_same_losses(two, four)
    terms = {f"{teacher}/{kind}" for teacher in ("cnn", "vit") for kind in ("summary", "spatial")}
    assert all(set(line["terms"]) == terms for line in read_metrics(two.parent))
    more = recorded.recipe(tmp_path / "2", steps=10, groups=groups, split="ranks")
    assert torchrun(more, tmp_path, 4, "--resume") == two, "the same way, with other ranks"
    alone = recorded.recipe(tmp_path / "2", steps=10, groups=groups)
    with pytest.raises(
        UserError, match=r"training\.split: .* served its groups over ranks, this run would over"
    ):
        train(alone, resume=True)


def test_two_ranks_fit_the_same_normalizers(recorded: Any, tmp_path: Path) -> None:
    """With another number of threads in each, which round sums otherwise."""
    alone = train(recorded.recipe(tmp_path / "one", steps=6, normalizer="phi_s"))
    together = torchrun(recorded.recipe(tmp_path / "two", steps=6, normalizer="phi_s"), tmp_path, ranks=2)
    for a, b in zip(read_metrics(alone.parent), read_metrics(together.parent), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-5)


def rank_valid(config: TrainConfig, rank: int) -> list[int]:
    groups = open_groups(config)
    stream = batches(groups, schedule_of(groups, 2, config), 0, rank)
    return [int(batch.valid["vit"].sum()) for batch in islice(stream, config.training.steps)]


def test_a_batch_that_ranks_cannot_share_is_refused(recorded: Any, tmp_path: Path) -> None:
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, batch_size=7))
    with pytest.raises(UserError, match=r"training\.batch_size: 7 must .* the 2 ranks; give 6 or 8"):
        schedule_of(open_groups(config), 2, config)
