from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.recorder import Recorder
from pipeline.teachers import create_teacher
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.replay import CropReplay
from tests.trainer.runs import assert_same_run, interrupt, metrics, take_step
from trainer.checkpoint import load_checkpoint
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.groups import batches, open_groups, schedule_of
from trainer.learner import Learner, make_optimizer
from trainer.metrics import read_metrics
from trainer.reader import Batch, TargetReader
from trainer.students import create_student
from trainer.train import first_model, learning_rate, seed_step, train

CPU = World(0, 1, 0, torch.device("cpu"))

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


def test_all_fields_that_differ_are_named(recorded: Any, tmp_path: Path) -> None:
    train(recorded.recipe(tmp_path, steps=2))
    other = recorded.recipe(tmp_path, steps=3, seed=4, log_every=2)
    with pytest.raises(UserError, match=r"training\.seed: .*; training\.steps: .* has 2, .* 3; use the"):
        train(other, resume=True)


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
    with pytest.raises(
        UserError, match=r"training\.teachers: .* learned from cnn, vit, this run would from cnn, "
    ):
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


class Live:
    """The teachers themselves, run on the very same crops."""

    def __init__(self, recorded: Any, reader: TargetReader) -> None:
        self.teachers, sources = recorded.teachers, recorded.sources()
        self.replays = [
            CropReplay(shard, sources[shard], recorded.store.views(shard), 2**26) for shard in reader.shards
        ]

    def __call__(self, batch: Batch) -> Batch:
        """The batch, with what they say instead of what is stored."""
        targets = {}
        for name, teacher in self.teachers.items():
            size = (teacher.spec.height, teacher.spec.width)
            crops = [self.replays[shard].crop(row, size) for shard, row in batch.views.tolist()]
            output = teacher(torch.stack(crops))
            targets[name] = TeacherOutput(output.summary, output.spatial)
        return Batch(batch.images, targets, batch.valid, batch.views)


def test_stored_targets_train_as_live_teachers_do(recorded: Any, tmp_path: Path) -> None:
    """A CNN and a ViT at once, step by step, within the rounding of fp16."""
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, steps=50, warmup=0))
    settings, groups = config.training, open_groups(config)
    schedule, live = schedule_of(groups, 1, config), Live(recorded, groups[0].reader)
    losses: dict[str, list[float]] = {}
    for mode in ("stored", "live"):
        learner = Learner(first_model(config, groups), settings, CPU)
        stream = batches(groups, schedule)
        for step, batch in enumerate(islice(stream, settings.steps)):
            seed_step(settings.seed, step, 0)
            given = live(batch) if mode == "live" else batch
            found = take_step(learner, groups, schedule, step, given, learning_rate(settings, step))
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
    timm_says = getattr(getattr(student.backbone, "model", None), "no_weight_decay", set)()
    assert not {f"backbone.model.{name}" for name in timm_says} & set(left)
    assert all(name.endswith(".weight") for name in left)
    assert not [name for name in left if "norm" in name or "pos_embed" in name or "token" in name]
    assert any(name.endswith(".bias") for name in right)


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
        ("training", {"loss": {"cosine": 0, "smooth_l1": 0}}, r"training\.loss\.smooth_l1: 0.*nothing would"),
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
