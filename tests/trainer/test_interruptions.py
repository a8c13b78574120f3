from __future__ import annotations

import json
import math
import random
import re
import resource
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from storage_schemas.errors import DataDamage, UserError
from storage_schemas.layout import row_arrays
from tests.recording import flip_bit
from tests.trainer.runs import assert_same_run, interrupt, run_cli
from trainer.checkpoint import load_checkpoint, newest_checkpoint
from trainer.config import TrainConfig
from trainer.groups import batches, open_groups, schedule_of
from trainer.metrics import read_metrics
from trainer.reader import TargetReader
from trainer.train import train


def test_a_killed_process_resumes_to_the_same_bits(recorded: Any, tmp_path: Path) -> None:
    def start(name: str, *flags: str) -> subprocess.Popen[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        recipe = recorded.recipe(tmp_path / name / "run", steps=40, checkpoint_every=5, keep=3)
        return run_cli(recipe, tmp_path / name, *flags)

    killed, undisturbed = start("killed"), start("whole")
    lines, kill_after = tmp_path / "killed/run/metrics.jsonl", random.randint(6, 30)
    while killed.poll() is None and (not lines.exists() or lines.read_text().count("\n") < kill_after):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it was over before it was killed"
    with lines.open("a") as cut:
        cut.write('{"step": 41, "lo')  # as a kill within a write leaves it
    resumed = start("killed", "--resume")
    printed, said = resumed.communicate()
    assert resumed.returncode == 0, said
    whole = tmp_path / "whole/run/step-00000040"
    assert undisturbed.communicate()[0].strip() == str(whole)
    assert_same_run(whole, Path(printed.strip()))
    assert [line["step"] for line in read_metrics(lines.parent)] == list(range(1, 41))


# Being stopped


def test_sigterm_ends_the_run_with_a_checkpoint_that_goes_on_to_the_same_bits(
    recorded: Any, tmp_path: Path
) -> None:
    def start(name: str, *flags: str) -> subprocess.Popen[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        recipe = recorded.recipe(tmp_path / name / "run", steps=40, checkpoint_every=100)
        return run_cli(recipe, tmp_path / name, *flags)

    stopped, lines = start("stopped"), tmp_path / "stopped/run/metrics.jsonl"
    while stopped.poll() is None and (not lines.exists() or lines.read_text().count("\n") < 5):
        time.sleep(0.002)
    stopped.send_signal(signal.SIGTERM)
    printed, said = stopped.communicate()
    assert stopped.returncode == 0, said
    left = newest_checkpoint(tmp_path / "stopped/run")
    assert left is not None
    assert printed.strip() == str(left)
    assert 5 <= load_checkpoint(left).step < 40, "it was over before it was stopped"
    assert f"stopped by SIGTERM at {left.name}: run it again with --resume" in said
    resumed, whole = start("stopped", "--resume"), start("whole")
    assert (resumed.communicate()[0], whole.communicate()[0]) != ("", "")
    final = "run/step-00000040"
    assert_same_run(tmp_path / "whole" / final, tmp_path / "stopped" / final)


def test_sigterm_before_the_first_step_leaves_a_checkpoint_too(
    recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recorded.recipe(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("trainer.train.StopSignal.__enter__", lambda self: SimpleNamespace(received=True))
        assert load_checkpoint(train(recipe)).step == 0
    assert_same_run(train(recorded.recipe(tmp_path / "whole")), train(recipe, resume=True))


def test_a_run_that_diverges_stops_with_its_cause_and_keeps_its_checkpoint(
    recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recorded.recipe(tmp_path, steps=6, log_every=2, checkpoint_every=2)
    monkeypatch.setattr("trainer.train.learning_rate", lambda settings, step: math.nan if step == 2 else 0.01)
    with pytest.raises(UserError, match=r"the loss is nan .* at step 4.* listed in .*json"):
        train(recipe)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest).step == 2
    found = json.loads((tmp_path / "diverged-step-00000004.json").read_text())
    config = TrainConfig.from_recipe(recipe)
    groups = open_groups(config)
    batch = next(batches(groups, schedule_of(groups, 1, config), 3))
    shards = groups[0].reader.shards
    assert found == {"step": 4, "views": {"all": [[shards[s], row] for s, row in batch.views.tolist()]}}


def test_a_last_step_that_diverges_is_not_saved(
    recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recorded.recipe(tmp_path, steps=2)
    monkeypatch.setattr("trainer.train.learning_rate", lambda settings, step: math.nan if step else 0.01)
    with pytest.raises(UserError, match=r"training\.learning_rate: the weights .* after step 2"):
        train(recipe)
    assert newest_checkpoint(tmp_path) is None


def test_a_full_disk_is_one_line_and_costs_no_older_checkpoint(recorded: Any, tmp_path: Path) -> None:
    recipe = recorded.recipe(tmp_path / "run", steps=40, checkpoint_every=2)
    interrupt(recipe, 3)
    before = newest_checkpoint(tmp_path / "run")
    assert before is not None

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    process = run_cli(recipe, tmp_path, "--resume", preexec_fn=small_files)
    said = process.communicate()[1]
    assert process.returncode == 1
    assert len([line for line in said.splitlines() if not line.startswith("training: ")]) == 1, said
    assert "step-00000004" in said
    assert "File too large" in said
    assert newest_checkpoint(tmp_path / "run") == before
    load_checkpoint(before)


# Damage met on the way


def damage_row(recorded: Any, teacher: str, row: int) -> None:
    commit = recorded.store.commit(teacher, "train-0")
    part = recorded.folder / "store" / recorded.store.part_path(teacher, "train-0", commit.attempt)
    array = next(a for a in row_arrays(recorded.store.spec(teacher), commit.rows) if a.name == "spatial")
    flip_bit(part / array.object_path(0), 8 * (array.stride * row + 10))


def test_a_damaged_row_stops_the_run_unless_it_is_to_be_skipped(own_copy: Any, tmp_path: Path) -> None:
    damage_row(own_copy, "cnn", 4)
    with pytest.raises(DataDamage, match=r"shard 'train-0', teacher 'cnn', .* row 4 of 'spatial': xxh3"):
        train(own_copy.recipe(tmp_path / "stopped", steps=10))
    train(own_copy.recipe(tmp_path / "run", steps=10, on_corrupt="skip", log_every=3))
    lines = (tmp_path / "run/damage.txt").read_text().splitlines()
    assert lines
    assert all(re.match(r"step \d+: shard 'train-0', teacher 'cnn', .* row 4 ", line) for line in lines)
    assert sum(line["corrupt_rows"] for line in read_metrics(tmp_path / "run")) == len(lines)


def test_a_skipped_row_trains_as_an_invalid_one(own_copy: Any, recorded: Any) -> None:
    damage_row(own_copy, "cnn", 4)
    arguments = (["cnn", "vit"], (32, 32))
    damaged = TargetReader(own_copy.store, own_copy.sources(), *arguments, on_corrupt="skip")
    whole = TargetReader(recorded.store, recorded.sources(), *arguments)
    for a, b in zip(damaged.in_order(5), whole.in_order(5), strict=True):
        hit = (b.views == (0, 4)).all(1)
        assert len(a.damage) == hit.sum()
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.valid["vit"], b.valid["vit"])
        assert torch.equal(a.valid["cnn"], b.valid["cnn"] & ~torch.from_numpy(hit))
        assert a.targets["cnn"].spatial[hit].isnan().all()
        assert torch.equal(a.targets["cnn"].spatial[~hit], b.targets["cnn"].spatial[~hit])


def test_a_skipped_image_is_valid_for_no_teacher(own_copy: Any) -> None:
    table = own_copy.store.views("train-1")
    offset, nbytes = table["offset"][6].as_py(), table["nbytes"][6].as_py()
    flip_bit(own_copy.folder / "shards/train-1.tar", 8 * (offset + nbytes // 2))
    reader = TargetReader(own_copy.store, own_copy.sources(), ["cnn", "vit"], (32, 32), on_corrupt="skip")
    views = own_copy.store.manifest.views_per_image
    damaged = {(reader.shards.index("train-1"), row) for row in range(6 - 6 % views, 6 - 6 % views + views)}
    named = 0
    for batch in reader.in_order(5):
        hit = np.array([tuple(view) in damaged for view in batch.views.tolist()])
        named += len(batch.damage)
        assert not batch.valid["cnn"][hit].any()
        assert not batch.valid["vit"][hit].any()
        assert batch.valid["cnn"][~hit].all()
        assert (batch.images[hit] == 0).all()
    assert named == views
