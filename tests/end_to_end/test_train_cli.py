"""`train` and `eval` as a user runs them: what they print, where, and how they end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from obstore.exceptions import PermissionDeniedError
from rich.console import Console
from typer.testing import CliRunner

import cli
import cli.console
from storage_schemas.store import FeatureStore
from trainer.evaluation.knn import knn_accuracy

ROOT = Path(__file__).parents[2]
CLASSES, EACH = 3, 4  # labels, and images of each in a shard


@dataclass(frozen=True)
class Project:
    """A folder with shards, a recipe, a store, and a student that is trained."""

    folder: Path
    checkpoint: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def store(self) -> FeatureStore:
        return FeatureStore.open(str(self.folder / "store"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def write_recipe(folder: Path) -> Path:
    recipe = {
        "store": {"url": f"{folder}/store", "views_per_image": 2, "crops": {"first_view": "center"}},
        "data": {"train": f"{folder}/train-*.tar", "held_out": f"{folder}/held-out.tar"},
        "teachers": {
            "cnn": {
                "family": "timm",
                "model": "test_resnet",
                "weights": "random",
                "seed": 1,
                "resolution": 64,
            }
        },
        "student": {"name": "timm/test_vit", "img_size": 32},
        "training": {
            "output": f"{folder}/student",
            "resolution": 32,
            "batch_size": 8,
            "steps": 4,
            "checkpoint_every": 2,
            "log_every": 2,
            "device": "cpu",
        },
        "evaluation": {"k": 3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


_session: list[Project] = []


@pytest.fixture
def project(tmp_path_factory: pytest.TempPathFactory, write_tar: Any, jpeg: Any) -> Project:
    """Recorded and trained once; tests must not change it."""
    if not _session:
        folder = tmp_path_factory.mktemp("project")
        for shard in ("train-0", "train-1", "held-out"):
            write_tar(folder / f"{shard}.tar", samples(shard, jpeg))
        recipe = write_recipe(folder)
        succeed("extract", recipe)
        _session.append(Project(folder, Path(succeed("train", recipe).strip())))
    return _session[0]


def samples(shard: str, jpeg: Any) -> Iterator[dict[str, Any]]:
    for place in range(CLASSES * EACH):
        seed = place + 100 * ("train-0", "train-1", "held-out").index(shard)
        yield {"__key__": f"{place:03d}", "jpg": jpeg(seed, 40, 50), "cls": place % CLASSES}


def test_train_prints_the_checkpoint_on_stdout_and_progress_on_stderr(project: Project) -> None:
    assert project.checkpoint == project.folder / "student" / "step-00000004"
    again = run("train", project.recipe, "--resume")
    assert again.exit_code == 0
    assert again.stdout == f"{project.checkpoint}\n"
    longer = run("train", project.recipe, "--set", f"training.output={project.folder / 'other'}")
    assert "training: 4 of 4 steps" in longer.stderr
    assert longer.stdout.strip() == str(project.folder / "other/step-00000004")


def test_knn_is_the_same_of_recipe_checkpoint_and_output_folder(project: Project) -> None:
    found = [
        json.loads(succeed("eval", "knn", subject, "--json"))
        for subject in (project.recipe, project.checkpoint, project.folder / "student")
    ]
    assert found[0] == found[1] == found[2]
    assert list(found[0]) == ["cnn", "raw pixels", "student"]
    assert f"{100 * found[0]['student']:.2f} %" in succeed("eval", "knn", project.recipe)


def test_knn_of_a_teacher_is_read_straight_from_the_store(project: Project) -> None:
    store = project.store()
    vectors, labels = {}, {}
    for name, shards in {"bank": ["train-0", "train-1"], "queries": ["held-out"]}.items():
        parts = [torch.from_numpy(store.part("cnn", shard).summary[::2]).float() for shard in shards]
        vectors[name] = torch.cat(parts)
        known = [store.views(shard)["label"].to_pylist()[::2] for shard in shards]
        labels[name] = torch.tensor([label for shard in known for label in shard])
    expected = knn_accuracy(vectors["bank"], labels["bank"], vectors["queries"], labels["queries"], k=3)
    found = json.loads(succeed("eval", "knn", project.recipe, "--json"))
    assert found["cnn"] == pytest.approx(expected)


def test_distance_of_student_and_constant(project: Project) -> None:
    found = json.loads(succeed("eval", "distance", project.checkpoint, "--json"))
    assert list(found) == ["constant", "student"]
    for by_teacher in found.values():
        assert by_teacher["cnn"]["views"] == 2 * CLASSES * EACH
        assert 0 < by_teacher["cnn"]["spatial"] < 2
    table = succeed("eval", "distance", project.recipe)
    assert f"{found['student']['cnn']['spatial']:.4f}" in table


def test_throughput_comes_with_its_conditions(project: Project) -> None:
    found = json.loads(succeed("eval", "throughput", project.checkpoint, "--batch-size", 2, "--json"))
    assert found["images_per_second"] > 0
    assert (found["batch_size"], found["height"], found["width"]) == (2, 32, 32)
    assert "device: cpu" in succeed("eval", "throughput", project.checkpoint, "--batch-size", 2)


def test_before_training_there_are_teachers_and_a_constant(project: Project, tmp_path: Path) -> None:
    nowhere = ("--set", f"training.output={tmp_path}")
    found = json.loads(succeed("eval", "knn", project.recipe, *nowhere, "--json"))
    assert list(found) == ["cnn", "raw pixels"]
    assert list(json.loads(succeed("eval", "distance", project.recipe, *nowhere, "--json"))) == ["constant"]
    assert_refused(run("eval", "throughput", project.recipe, *nowhere), "the recipe has no checkpoint yet")


def assert_refused(result: Result, named: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert named in result.stderr


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("student.name=vit_huge", "student name 'vit_huge' is unknown"),
        ("student.patchsize=4", "'patchsize'"),
        ("training.resolution=30", "does not take 30 x 30 images"),
        ("training.steps=0", "training.steps: 0"),
        ("training.learning_rate=.inf", "training.learning_rate: inf"),
        ("training.loss.cosine=.nan", "training.loss.cosine: nan"),
        ("evaluation.temperature=.inf", "evaluation.temperature: inf"),
        ("training.warmup=1000", "training.warmup: 1000: Value error, is more than the"),
        ("training.output=", "training.output: "),
        ("training.output=''", "training.output: ''"),
        ("data.held_out={folder}/train-1.tar", "data.held_out: shard 'train-1' is in data.train too"),
        ("training.speed=1", "training.speed: unknown key"),
        ("training.teachers=[sam]", "teacher: 'sam' is not in store"),
        ("store.url=/nowhere", "'/nowhere' is no folder"),
        ("data.train=/nowhere/x.tar", "'/nowhere' is no folder"),
        ("trainig.steps=3", "unknown section 'trainig'"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_exit_2(
    project: Project, tmp_path: Path, override: str, named: str
) -> None:
    output, given = f"training.output={tmp_path / 'out'}", override.format(folder=project.folder)
    assert_refused(run("train", project.recipe, "--set", output, "--set", given), named)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_one_line_and_exit_2(project: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        given = ("--set", f"training.output={folder}", "--set", "store.url=/nowhere")
        assert_refused(run("train", project.recipe, *given), f"training.output: '{folder}' cannot be written")


def test_a_finished_run_is_not_started_over(project: Project) -> None:
    assert_refused(run("train", project.recipe), "holds step-00000004; give --resume, or another output")


def test_a_student_that_was_trained_otherwise_is_not_evaluated(project: Project) -> None:
    assert_refused(
        run("eval", "knn", project.recipe, "--set", "training.seed=7"),
        "step-00000004' has 0, the recipe has 7",
    )


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.held_out=[]", "data.held_out: is missing from the recipe"),
        ("data.held_out={folder}/train-1.tar", "data.held_out: shard 'train-1' is in data.train too"),
        ("evaluation.k=100", "evaluation.k: 100 is more than the 24 labels of data.train"),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_line(project: Project, override: str, named: str) -> None:
    given = override.format(folder=project.folder)
    assert_refused(run("eval", "knn", project.recipe, "--set", given), named)


def test_images_without_labels_are_named(tmp_path: Path, write_tar: Any, jpeg: Any) -> None:
    for shard in ("train-0", "held-out"):
        without = [{k: v for k, v in sample.items() if k != "cls"} for sample in samples(shard, jpeg)]
        write_tar(tmp_path / f"{shard}.tar", without)
    recipe = write_recipe(tmp_path)
    succeed("extract", recipe)
    assert_refused(run("eval", "knn", recipe), "data.train: no image has a label")


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    assert_refused(run("eval", "knn", tmp_path), "holds none; give the training.output of a recipe")
    assert_refused(run("eval", "knn", tmp_path / "none.yaml"), "none.yaml' does not exist")


def test_damage_is_exit_1(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.checkpoint, tmp_path / "step-00000004")
    weights = tmp_path / "step-00000004/student.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert_refused(run("eval", "knn", tmp_path / "step-00000004"), "student.safetensors has digest", code=1)


def test_an_interruption_is_one_line_and_exit_130(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.train.train", interrupted)
    monkeypatch.setattr("storage_schemas.inspection.inspect_store", interrupted)
    assert_refused(run("train", project.recipe), "interrupted: run it again with --resume to go on", code=130)
    assert_refused(run("inspect", project.folder / "store"), "interrupted: run it again to go on", code=130)


def test_what_an_object_store_refuses_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionDeniedError("Forbidden: s3://b/manifest.json\n\nDebug source: ...")

    monkeypatch.setattr("obstore.get", refuse)
    refused = run("inspect", project.folder / "store")
    assert_refused(refused, "error: Forbidden: s3://b/manifest.json", code=1)


def test_a_narrow_terminal_cuts_no_figure(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "out", Console(width=60))
    shown = succeed("inspect", project.folder / "store")
    assert "…" not in shown


def test_under_torchrun_an_error_is_said_once(project: Project) -> None:
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [
        sys.executable,
        "-m",
        *launcher,
        "-m",
        "cli",
        "train",
        str(project.recipe),
        "--set",
        "training.steps=0",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode != 0
    assert done.stderr.count("error: recipe.training.steps: 0") == 1, done.stderr


def test_compare_prints_a_table_and_writes_a_page(project: Project, tmp_path: Path) -> None:
    output = f"training.output={tmp_path}"
    names = "timm/test_efficientnet,timm/test_resnet"
    result = run("compare", project.recipe, "--students", names, "--set", output)
    assert result.exit_code == 0, result.output
    assert "timm/test_resnet: loss" in result.stderr or "training: 8 of 8 steps" in result.stderr
    page = tmp_path / "compare/student.html"
    assert f"page: {page}\n" in result.stdout
    assert "images/s: forward, batch 16 at 32×32, float32, cpu" in result.stdout
    found = json.loads(succeed("compare", project.recipe, "--students", names, "--set", output, "--json"))
    assert [entry["name"] for entry in found["results"]] == names.split(",")
    for entry in found["results"]:
        folder = tmp_path / "compare" / entry["name"].replace("/", "-")
        assert entry["checkpoint"] == str(folder / "step-00000004")
        knn = json.loads(succeed("eval", "knn", folder, "--json"))
        assert (entry["knn"], found["knn_beside"]["cnn"]) == (knn["student"], knn["cnn"])
        distance = json.loads(succeed("eval", "distance", folder, "--json"))
        assert (entry["distance"], found["constant"]) == (distance["student"], distance["constant"])
        assert f"{entry['distance']['cnn']['summary']:.4f}" in result.stdout
        assert f"{entry['parameters']:,}" in page.read_text(encoding="utf-8")


def test_compare_lists_what_failed_and_exits_1(project: Project, tmp_path: Path) -> None:
    values = "training.learning_rate=1.0e-3,1.0e+30"  # the second diverges
    result = run("compare", project.recipe, "--vary", values, "--set", f"training.output={tmp_path}")
    assert result.exit_code == 1
    assert result.stderr.count("1e+30: training.learning_rate:") == 1
    assert "0.001" in result.stdout


def test_compare_refuses_in_one_line(project: Project, tmp_path: Path) -> None:
    output = ("--set", f"training.output={tmp_path / 'none'}")
    compare = ("compare", project.recipe, *output)
    assert_refused(run(*compare), "--students, --vary: give one of the two")
    both = ("--students", "eradio_t", "--vary", "training.seed=1,2")
    assert_refused(run(*compare, *both), "--students, --vary: give one of the two")
    assert_refused(run(*compare, "--students", "eradio_t,eradio_u"), "student name 'eradio_u' is unknown")
    assert_refused(run(*compare, "--students", "eradio_t,eradio_t"), "'eradio_t' is named twice")
    assert_refused(run(*compare, "--vary", "training.seed=1,-1"), "recipe.training.seed: -1")
    assert not (tmp_path / "none").exists()


def test_help_needs_no_torch() -> None:
    code = (
        "import cli, sys; print([m for m in ('torch', 'ray', 'zarr', 'pyarrow', 'timm') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_the_script_and_the_module_are_the_same() -> None:
    script = Path(sys.executable).with_name("rebroadcast")
    if not script.exists():
        pytest.skip("the project is not installed beside this interpreter")
    said = [
        subprocess.run([*command, "train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        for command in ([str(script)], [sys.executable, "-m", "cli"])
    ]
    assert said[0].stdout == said[1].stdout
    assert "Usage: rebroadcast train" in said[0].stdout
