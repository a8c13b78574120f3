from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.recorder import Recorder
from pipeline.teachers import create_teacher
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.layout import row_arrays
from tests.recording import flip_bit
from trainer.checkpoint import load_checkpoint, newest_checkpoint
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.groups import batches, count_valid, open_groups, ranks_by_teacher, schedule_of
from trainer.learner import Learner, make_optimizer
from trainer.metrics import read_metrics
from trainer.reader import Batch, TargetReader
from trainer.students import create_student
from trainer.train import first_model, learning_rate, seed_step, train

ROOT = Path(__file__).parents[2]
CPU = World(0, 1, 0, torch.device("cpu"))
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


STUDENTS = {
    # Positions of an input smaller than their grid are drawn anew at each step.
    "vit": {"name": "radio_vit_ti16", "width": 24, "depth": 2, "heads": 2, "max_size": 64},
    # Batch statistics and stochastic depth: state outside of the weights, and random numbers.
    "cnn": {"name": "timm/test_resnet", "drop_path_rate": 0.3},
}


@pytest.fixture(params=STUDENTS, ids=list(STUDENTS))
def recipe_of(request: pytest.FixtureRequest, recorded: Any) -> Callable[..., dict[str, Any]]:
    """A recipe for each kind of student."""

    def make(output: Path, **training: Any) -> dict[str, Any]:
        recipe: dict[str, Any] = recorded.recipe(output, **training)
        recipe["student"] = STUDENTS[request.param]
        return recipe

    return make


# Resuming


def test_a_resumed_run_equals_one_without_interruption(recipe_of: Any, tmp_path: Path) -> None:
    whole = train(recipe_of(tmp_path / "whole"))
    assert whole == train(recipe_of(tmp_path / "whole"), resume=True)  # nothing is left to do
    for after in (1, 3, 5):
        recipe = recipe_of(tmp_path / str(after))
        interrupt(recipe, after)
        resumed = train(recipe, resume=True)
        assert_same_run(whole, resumed)
        assert [line["step"] for line in read_metrics(resumed.parent)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("normalizer", ["standardize", "phi_s"])
def test_normalizers_come_back_from_a_checkpoint(recorded: Any, tmp_path: Path, normalizer: str) -> None:
    whole = train(recorded.recipe(tmp_path / "whole", normalizer=normalizer))
    kept = [name for name in load_checkpoint(whole).adaptors if "normalizers" in name]
    assert len(kept) == 2 * 2 * 2  # a mean and a matrix of each kind of each teacher's features
    recipe = recorded.recipe(tmp_path / "run", normalizer=normalizer)
    interrupt(recipe, 3)
    assert_same_run(whole, train(recipe, resume=True))


def test_two_runs_are_equal_and_another_seed_is_not(recorded: Any, tmp_path: Path) -> None:
    one, two, other = (
        train(recorded.recipe(tmp_path / name, seed=seed, steps=3))
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    )
    assert_same_run(one, two)
    assert metrics(one.parent) != metrics(other.parent)


def run_cli(recipe: dict[str, Any], folder: Path, *flags: str, **kwargs: Any) -> subprocess.Popen[str]:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", "train", str(path), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes, **kwargs)


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


def test_checkpoints_are_not_gone_over_without_being_asked(recorded: Any, tmp_path: Path) -> None:
    recipe = recorded.recipe(tmp_path / "run", steps=2)
    train(recipe)
    with pytest.raises(UserError, match=r"training\.output: .* holds step-00000002; give --resume"):
        train(recipe)


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("training", "seed", 9, r"training\.seed: checkpoint '.*step-00000002' has 0, the recipe has 9"),
        ("training", "steps", 50, r"training\.steps: .* has 2, the recipe has 50"),
        ("training", "normalizer", "phi_s", r"training\.normalizer: .* has 'none', the recipe has 'phi_s'"),
        ("training", "loss", {"cosine": 0.5}, r"training\.loss\.cosine: .* has 0\.9, the recipe has 0\.5"),
        ("training", "resolution", [32, 48], r"training\.resolution: .* has \(32, 32\), the recipe has"),
        ("student", "depth", 1, r"student\.depth: .* has 2, the recipe has 1"),
        ("training", "teachers", ["cnn"], r"training\.teachers: .* has \(\), the recipe has \('cnn',\)"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused_by_field(
    recorded: Any, tmp_path: Path, section: str, key: str, value: Any, named: str
) -> None:
    recipe = recorded.recipe(tmp_path, steps=2)
    train(recipe)
    recipe[section][key] = value
    with pytest.raises(UserError, match=named):
        train(recipe, resume=True)


def test_what_changes_no_batch_is_free_to_change(recorded: Any, tmp_path: Path) -> None:
    interrupt(recorded.recipe(tmp_path / "run"), 3)
    free = {"threads": 1, "prefetch": 0, "log_every": 1, "checkpoint_every": 5, "keep": 1}
    resumed = train(recorded.recipe(tmp_path / "run", **free), resume=True)
    assert_same_run(train(recorded.recipe(tmp_path / "whole")), resumed)


def test_other_targets_are_refused(recorded: Any, own_copy: Any, tmp_path: Path) -> None:
    interrupt(recorded.recipe(tmp_path / "run"), 3)
    fewer = recorded.recipe(tmp_path / "run")
    fewer["data"]["train"] = f"{recorded.folder}/shards/train-0.tar"
    with pytest.raises(UserError, match=r"data\.train: checkpoint '.*' was trained on other shards"):
        train(fewer, resume=True)
    third = create_teacher("timm", "test_vit", weights="random", name="third", seed=5, resolution=48)
    recorder = Recorder(own_copy.store, [third], 8, 2)
    for shard, url in own_copy.sources().items():
        assert recorder.record(shard, url).committed == ("third",)
    more = recorded.recipe(tmp_path / "run")
    more["store"]["url"] = own_copy.store.url
    with pytest.raises(UserError, match=r"training\.teachers: .* learned from cnn, vit, the store has cnn, "):
        train(more, resume=True)


def test_a_folder_is_written_to_by_one_run_at_a_time(recorded: Any, tmp_path: Path) -> None:
    recipe = recorded.recipe(tmp_path, steps=2)

    def again(_: object) -> None:
        with pytest.raises(UserError, match=r"training\.output: another run is writing to"):
            train(recipe, resume=True)

    assert train(recipe, on_metrics=again) == train(recipe, resume=True)


def test_of_a_damaged_checkpoint_the_older_one_is_named(recorded: Any, tmp_path: Path) -> None:
    recipe = recorded.recipe(tmp_path, steps=4)
    newest = train(recipe)
    weights = newest / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(DataDamage, match=r"digest .*; delete .*step-00000004: --resume then .*step-00000002"):
        train(recipe, resume=True)
    shutil.rmtree(newest)
    assert train(recipe, resume=True) == newest


# Against teachers in the loop


def live_batch(recorded: Any, reader: TargetReader, batch: Batch) -> Batch:
    """The batch with targets from the teachers themselves, run on the very same crops."""
    targets = {}
    for name, teacher in recorded.teachers.items():
        spec = teacher.spec
        shown = TargetReader(recorded.store, recorded.sources(), [name], (spec.height, spec.width))
        output = teacher(torch.stack([_crop(recorded, shown, view) for view in batch.views.tolist()]))
        targets[name] = TeacherOutput(output.summary, output.spatial)
    return Batch(batch.images, targets, batch.valid, batch.views)


def _crop(recorded: Any, reader: TargetReader, view: list[int]) -> torch.Tensor:
    from storage_schemas.replay import CropReplay

    shard = reader.shards[view[0]]
    replay = CropReplay(shard, recorded.sources()[shard], recorded.store.views(shard), 2**26)
    return replay.crop(view[1], reader.resolution)


def test_stored_targets_train_as_live_teachers_do(recorded: Any, tmp_path: Path) -> None:
    """A CNN and a ViT at once, step by step, within the rounding of fp16."""
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, steps=12, warmup=0))
    settings, groups = config.training, open_groups(config)
    schedule, reader = schedule_of(groups, 1, config), groups[0].reader
    losses: dict[str, list[float]] = {}
    for mode in ("stored", "live"):
        learner = Learner(first_model(config, groups), settings, CPU)
        stream = batches(groups, schedule)
        for step, batch in enumerate(islice(stream, settings.steps)):
            seed_step(settings.seed, step, 0)
            given = live_batch(recorded, reader, batch) if mode == "live" else batch
            counts, _ = count_valid(given, learner.model.specs, stop=False)
            ranks = ranks_by_teacher(groups, schedule, step)
            found, _ = learner.step(given, learning_rate(settings, step), counts, ranks)
            losses.setdefault(mode, []).append(float(found.total))
        stream.close()
    assert losses["stored"] == pytest.approx(losses["live"], rel=1e-3)
    assert losses["stored"][-1] < losses["stored"][0]


# The optimiser and its rate


def test_the_rate_warms_up_falls_as_a_cosine_and_ends_at_zero() -> None:
    settings = TrainConfig.model_validate(
        {
            "store": {"url": "s"},
            "data": {"train": "t"},
            "student": {"name": "n"},
            "training": {"output": "o", "steps": 110, "warmup": 10, "learning_rate": 2.0},
        }
    ).training
    rates = [learning_rate(settings, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(0, abs=1e-12)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    "name", ["radio_vit_ti16", "eradio_xt", "timm/test_vit", "timm/test_resnet", "timm/test_vit_relpos"]
)
def test_norms_biases_tokens_and_positions_do_not_decay(name: str) -> None:
    settings = TrainConfig.model_validate(
        {
            "store": {"url": "s"},
            "data": {"train": "t"},
            "student": {"name": "n"},
            "training": {"output": "o", "steps": 1, "weight_decay": 0.3},
        }
    ).training
    student = create_student(name)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, others = make_optimizer(student, settings).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    left, right = ([names[id(p)] for p in group["params"]] for group in (decayed, others))
    assert sorted(left + right) == sorted(names.values())
    assert all(name.endswith(".weight") for name in left)
    assert not [name for name in left if "norm" in name or "pos_embed" in name or "token" in name]
    assert any(name.endswith(".bias") for name in right)


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


# Damage met on the way


def damage_row(recorded: Any, teacher: str, row: int) -> None:
    commit = recorded.store.commit(teacher, "train-0")
    part = recorded.folder / "store" / recorded.store.part_path(teacher, "train-0", commit.attempt)
    array = next(a for a in row_arrays(recorded.store.spec(teacher), commit.rows) if a.name == "spatial")
    flip_bit(part / array.object_path(0), 8 * (array.stride * row + 10))


def test_a_damaged_row_stops_the_run_unless_it_is_to_be_skipped(own_copy: Any, tmp_path: Path) -> None:
    damage_row(own_copy, "cnn", 4)
    with pytest.raises(DataDamage, match=r"shard 'train-0', teacher 'cnn', .* row 4 of 'spatial': crc32c"):
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


# What is written beside the checkpoints


def test_tensorboard_holds_the_same_numbers(recorded: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recorded.recipe(tmp_path / "run")
    interrupt(recipe, 3)
    train(recipe, resume=True)
    lines = read_metrics(tmp_path / "run")
    board = EventAccumulator(str(tmp_path / "run"))
    board.Reload()
    for tag in ("loss", *lines[0]["terms"]):
        events = board.Scalars(tag)
        expected = [line["loss"] if tag == "loss" else line["terms"][tag] for line in lines]
        assert [event.step for event in events] == [line["step"] for line in lines]
        assert [event.value for event in events] == pytest.approx(expected, rel=1e-6)


class FakeWandb:
    """As much of the package as a run uses."""

    def __init__(self) -> None:
        self.told: dict[int, dict[str, float]] = {}
        self.runs: list[dict[str, Any]] = []

    def init(self, **settings: Any) -> FakeWandb:
        self.runs.append(settings)
        return self

    def __enter__(self) -> FakeWandb:
        return self

    def __exit__(self, *_: object) -> None:
        self.runs[-1]["ended"] = True

    def log(self, values: dict[str, float], step: int) -> None:
        self.told[step] = self.told.get(step, {}) | values


def test_weights_and_biases_is_told_the_same_in_one_run(
    recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    recipe = recorded.recipe(tmp_path / "run", wandb="students", evaluate_every=4)
    interrupt(recipe, 3)
    train(recipe, resume=True)
    first, second = fake.runs
    assert (first["project"], first["id"], first["ended"]) == ("students", second["id"], True)
    assert [fake.told[line["step"]]["loss"] for line in read_metrics(tmp_path / "run")] == [
        line["loss"] for line in read_metrics(tmp_path / "run")
    ]
    assert "knn/student" in fake.told[4]


def test_weights_and_biases_must_be_there_if_asked_for(recorded: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training\.wandb: 'students' needs the package wandb; install it"):
        train(recorded.recipe(tmp_path / "run", wandb="students"))


def test_every_checkpoint_has_its_line_of_metrics(recorded: Any, tmp_path: Path) -> None:
    heard: list[int] = []
    recipe = recorded.recipe(tmp_path, steps=7, log_every=4, checkpoint_every=3, keep=2)
    train(recipe, on_metrics=lambda line: heard.append(line.step))
    assert heard == [3, 4, 6, 7]
    assert [line["step"] for line in read_metrics(tmp_path)] == heard
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000006", "step-00000007"]


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


# What a recipe may say


def test_a_subset_of_the_teachers_can_be_learned_from(recorded: Any, tmp_path: Path) -> None:
    path = train(recorded.recipe(tmp_path, teachers=["vit"], steps=2))
    assert {name.split("/")[0] for name in read_metrics(tmp_path)[0]["terms"]} == {"vit"}
    assert {name.split(".")[0] for name in load_checkpoint(path).adaptors} == {"vit"}


def test_a_teacher_of_weight_zero_teaches_nothing(recorded: Any, tmp_path: Path) -> None:
    loss = {"summary_weight": {"cnn": 0}, "spatial_weight": {"cnn": 0}}
    path = train(recorded.recipe(tmp_path / "a", steps=3, loss=loss, clip=None, weight_decay=0))
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path / "a"))
    start = first_model(config, open_groups(config)).adaptors.state_dict()
    trained = load_checkpoint(path).adaptors
    assert all(torch.equal(trained[name], start[name]) for name in trained if name.startswith("cnn."))
    assert not all(torch.equal(trained[name], start[name]) for name in trained if name.startswith("vit."))


@pytest.mark.parametrize(
    ("section", "values", "named"),
    [
        ("student", {"name": "vit_giant"}, "student name 'vit_giant' is unknown"),
        ("student", {"dpth": 3}, "does not take the setting 'dpth'"),
        ("training", {"resolution": 33}, "image size 33 x 33 must be a multiple of the patch size 16"),
        ("training", {"teachers": ["sam"]}, "teacher: 'sam' is not in store .* there: cnn, vit"),
        ("training", {"loss": {"spatial_weight": {"sam": 0}}}, r"loss\.spatial_weight: 'sam' .* cnn, vit"),
        ("training", {"loss": {"cosine": -1}}, r"training\.loss\.cosine: -1"),
        ("training", {"device": "tpu9000"}, r"training\.device: 'tpu9000'"),
        ("training", {"stepz": 3}, r"training\.stepz: unknown key"),
        ("store", {"url": "/nowhere/at/all"}, "'/nowhere/at/all' is no folder"),
        ("data", {"train": "/nowhere/*.tar"}, "'/nowhere' is no folder"),
    ],
)
def test_a_wrong_recipe_is_named(
    recorded: Any, tmp_path: Path, section: str, values: dict[str, Any], named: str
) -> None:
    recipe = recorded.recipe(tmp_path / "run")
    recipe[section] |= values
    with pytest.raises(UserError, match=named):
        train(recipe)
    assert not (tmp_path / "run").exists()
