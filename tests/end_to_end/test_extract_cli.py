"""`extract`, `plan`, `verify`, `inspect` and `gc` as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from cli import app
from pipeline.teachers import FAMILIES
from storage_schemas.objects import Objects
from storage_schemas.store import FeatureStore
from storage_schemas.views import encode_views
from tests.recording import create_fake_teacher, flip_bit, make_jpeg, make_shard

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fake_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "fake", create_fake_teacher)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, *words: str) -> None:
    """Exit 2, one line beside those of progress, which has these words."""
    lines = [line for line in result.stderr.strip().splitlines() if not line.startswith("verifying: ")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe with two fake teachers over three shards, one image of which is damaged."""
    for number in range(3):
        images = [make_jpeg(10 * number + one) for one in range(4)]
        images[1] = images[1][: 200 if number == 1 else None]
        make_shard(tmp_path / "shards" / f"s{number}.tar", images)
    fake = {"family": "fake", "model": "sums", "weights": "none"}
    write(
        tmp_path,
        {
            "store": {"url": str(tmp_path / "store"), "views_per_image": 2},
            "data": {"train": f"{tmp_path}/shards/s[01].tar", "held_out": f"{tmp_path}/shards/s2.tar"},
            "teachers": {"one": fake, "two": {**fake, "codec": "int8"}},
            "extract": {"batch_size": 4, "device": "cpu"},
        },
    )
    return tmp_path


def write(folder: Path, recipe: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def change(folder: Path, section: str, **values: Any) -> Path:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe[section] |= values
    return write(folder, recipe)


def test_from_a_recipe_to_an_inspected_and_verified_store(folder: Path) -> None:
    planned = json.loads(run("plan", folder / "recipe.yaml", "--rate", 100, "--json").stdout)
    assert (planned["shards"], planned["rows"], planned["exact"], planned["fits"]) == (3, 24, True, True)
    assert planned["hours"] == pytest.approx(24 / 100 / 3600)
    done = run("extract", folder / "recipe.yaml", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["recorded"], report["views"], report["failed"]) == (3, 24, {})
    assert report["statuses"] == {"ok": 22, "undecodable": 2}
    assert report["invalid"] == {"one": 2, "two": 2}
    found = json.loads(run("inspect", folder / "store", "--json").stdout)
    assert [(t["name"], t["shards"], t["rows"], t["invalid_rows"]) for t in found["teachers"]] == [
        ("one", 3, 24, 2),
        ("two", 3, 24, 2),
    ]
    assert sum(teacher["bytes"] for teacher in found["teachers"]) == report["bytes"]
    written = [
        sum(one.size for shard in opened(folder).shards(name) for one in chunks(folder, name, shard))
        for name in ("one", "two")
    ]
    assert [teacher["bytes"] for teacher in planned["teachers"]] == written
    shown = run("inspect", folder / "store")
    assert all(word in shown.stdout for word in ("one", "two", "int8", "sums", "status undecodable: 2"))
    checked = run("verify", folder / "store")
    assert (checked.exit_code, checked.stdout) == (0, "6 parts of 2 teachers: all as recorded\n")
    again = json.loads(run("extract", folder / "recipe.yaml", "--json").stdout)
    assert (again["recorded"], again["already_done"]) == (0, 3)


def opened(folder: Path) -> FeatureStore:
    return FeatureStore.open(str(folder / "store"))


def chunks(folder: Path, teacher: str, shard: str) -> list[Any]:
    return [o for o in opened(folder).commit(teacher, shard).objects if not o.path.endswith("zarr.json")]


def test_flags_choose_teachers_and_shards_and_override_the_recipe(folder: Path) -> None:
    first = run("extract", folder / "recipe.yaml", "--teachers", "two", "--shards", "s[12]")
    assert first.exit_code == 0, first.output
    assert opened(folder).teachers() == ["two"]
    assert opened(folder).shards("two") == ["s1", "s2"]
    other = folder / "other store"
    moved = run("extract", folder / "recipe.yaml", "--set", f"store.url={other}", "--set", "store.seed=5")
    assert moved.exit_code == 0, moved.output
    assert FeatureStore.open(str(other)).manifest.seed == 5


def test_a_failed_shard_is_listed_and_gives_exit_1(folder: Path) -> None:
    os.truncate(folder / "shards/s0.tar", 3000)
    result = run("extract", folder / "recipe.yaml")
    assert result.exit_code == 1
    assert "2 recorded, 0 were done, 1 failed" in result.stdout
    assert "failed: s0: shard 's0', byte" in result.stdout
    assert "attempt 1 of 3: shard 's0'" in result.stderr
    assert json.loads(run("extract", folder / "recipe.yaml", "--json").stdout)["failed"].keys() == {"s0"}


def test_verify_lists_every_problem_and_gives_exit_1(folder: Path) -> None:
    run("extract", folder / "recipe.yaml")
    for teacher, shard in (("one", "s0"), ("two", "s2")):
        attempt = opened(folder).commit(teacher, shard).attempt
        flip_bit(folder / f"store/teachers/{teacher}/parts/{shard}.{attempt}/spatial/c/0/0/0/0", 99)
    result = run("verify", folder / "store")
    assert result.exit_code == 1
    assert "shard 's0', teacher 'one', attempt " in result.stdout
    assert "shard 's2', teacher 'two', attempt " in result.stdout
    assert result.stdout.endswith("6 parts of 2 teachers: 2 problems\n")


def test_gc_removes_what_does_not_count(folder: Path) -> None:
    run("extract", folder / "recipe.yaml")
    left = f"teachers/one/parts/s0.{'f' * 32}"
    opened(folder).objects.put(f"{left}/zarr.json", b"{}")
    young = run("gc", folder / "store")
    assert (young.exit_code, young.stdout) == (0, "0 removed\n")
    old = run("gc", folder / "store", "--older-than", 0)
    assert (old.exit_code, old.stdout) == (0, f"{left}\n1 removed\n")
    assert run("verify", folder / "store").exit_code == 0


def test_verify_goes_on_past_a_teacher_that_cannot_be_read(folder: Path) -> None:
    run("extract", folder / "recipe.yaml")
    (folder / "store/teachers/one/spec.json").write_bytes(b"{")
    (folder / "store/views/s1.parquet").unlink()
    result = run("verify", folder / "store")
    assert result.exit_code == 1
    assert result.stdout.count("teachers/one/spec.json") == 1
    assert "shard: 's1' has no view table" in result.stdout


def test_a_plan_over_a_damaged_tar_names_it(folder: Path) -> None:
    (folder / "shards/s1.tar").write_bytes(b"no tar" * 1000)
    result = run("plan", folder / "recipe.yaml", "--json")
    assert (result.exit_code, json.loads(result.stdout)["exact"]) == (1, False)
    assert result.stderr.startswith("damaged: shard 's1', byte ")


def test_deep_verification_runs_the_teachers_again(folder: Path) -> None:
    real = {"family": "timm", "model": "test_efficientnet", "weights": "random", "seed": 3, "resolution": 64}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["teachers"] = {"fp": real, "int": {**real, "codec": "int8"}}
    assert run("extract", write(folder, recipe), "--shards", "s1").exit_code == 0
    result = run("verify", folder / "store", "--deep", "--sample", 6)
    assert (result.exit_code, result.stdout) == (0, "2 parts of 2 teachers: all as recorded\n")
    make_shard(folder / "shards/s1.tar", 4, first=40)
    changed = run("verify", folder / "store", "--deep")
    assert changed.exit_code == 1
    assert "shard 's1' row 0: image has digest" in changed.stderr
    (folder / "shards/s1.tar").unlink()
    refused(run("verify", folder / "store", "--deep"), "shard 's1'", "there is no")


def test_deep_verification_finds_features_of_another_crop(folder: Path) -> None:
    real = {"family": "timm", "model": "test_efficientnet", "weights": "random", "seed": 3, "resolution": 64}
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["teachers"] = {"fp": real}
    run("extract", write(folder, recipe), "--shards", "s0")
    views, commit = folder / "store/views/s0.parquet", folder / "store/teachers/fp/commits/s0.json"
    table = opened(folder).views("s0")
    places = table.column_names.index("top"), table.column_names.index("hflip")
    moved = table.slice(1).to_pylist() + table.slice(0, 1).to_pylist()
    rows = [
        {name: (there if places[0] <= at <= places[1] else here)[name] for at, name in enumerate(here)}
        for here, there in zip(table.to_pylist(), moved, strict=True)
    ]
    views.write_bytes(encode_views(pa.Table.from_pylist(rows, schema=table.schema)))
    old, new = opened(folder).commit("fp", "s0").views_sha256, sha256(views.read_bytes()).hexdigest()
    commit.write_text(commit.read_text().replace(old, new))
    assert run("verify", folder / "store").exit_code == 0
    deep = run("verify", folder / "store", "--deep")
    assert deep.exit_code == 1
    assert "shard 's0', teacher 'fp', row 0: summary differs by" in deep.stdout


def test_no_room_is_refused_before_anything_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objects, "free_bytes", lambda self: 1234)
    refused(run("extract", folder / "recipe.yaml"), "store.url", "1,234 bytes free")
    assert run("plan", folder / "recipe.yaml").exit_code == 1
    assert list((folder / "store").iterdir()) == []


def test_what_is_no_recipe_and_no_store_is_refused(folder: Path) -> None:
    refused(run("extract", folder / "none.yaml"), "recipe", "none.yaml", "does not exist")
    refused(run("inspect", folder / "none"), "store.url", "none", "is no folder")
    refused(run("verify", folder / "recipe.yaml"), "store.url", "is no folder")
    refused(run("gc", "ftp://x/y"), "ftp")
    (folder / "recipe.yaml").write_text("stores: {}\n")
    refused(run("extract", folder / "recipe.yaml"), "unknown section 'stores'", "store, data, teachers")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("store.url=s4://b/x", ("store.url", "s4://b/x", "scheme 's4'")),
        ("store.url={folder}/recipe.yaml", ("store.url", "recipe.yaml", "cannot be a folder")),
        ("store.urls=x", ("store.urls", "unknown key", "'x'")),
        ("store.views_per_image=0", ("store.views_per_image", "0")),
        ("store.crops.kind=middle", ("store.crops.kind", "'middle'")),
        ("extract.batch_size=many", ("extract.batch_size", "'many'", "integer")),
        ("extract.bach_size=3", ("extract.bach_size", "unknown key", "3", "batch_size")),
        ("extract.executor=slurm", ("extract.executor", "'slurm'")),
        ("data.train={folder}/shards/x*.tar", ("data", "x*.tar", "matches no tar")),
        ("data.train={folder}/nowhere/*.tar", ("data", "nowhere", "is no folder")),
        ("data.train={folder}/recipe.yaml", ("data", "recipe.yaml", ".tar")),
        ("data.train={folder}/{{shards,twin}}/s2.tar", ("data", "same name 's2'")),
        ("data.train=", ("data.train", "None")),
        ("teachers.one=", ("teachers.one", "None")),
        ("teachers.one.family=tim", ("family", "'tim'")),
        ("teachers.one.name=x", ("teachers", "'one'", "'name'")),
        ("teachers.a/b={{family: fake, model: m, weights: w}}", ("teachers", "a/b")),
        ("teachers.t={{family: timm, model: test_vit, weights: random, seed: 0, size: 3}}", ("size", "3")),
        ("teachers.t={{family: timm, model: test_vit, weights: random}}", ("seed",)),
        ("nonsense", ("--set", "nonsense")),
        ("a.b=1", ("unknown section 'a'",)),
        ("store.url.x=1", ("--set", "store.url.x")),
        ("store.seed=[1", ("--set", "store.seed=[1")),
    ],
)
def test_wrong_input_is_refused_in_one_line(folder: Path, override: str, words: tuple[str, ...]) -> None:
    make_shard(folder / "twin/s2.tar", 1)
    result = run("extract", folder / "recipe.yaml", "--set", override.format(folder=folder))
    refused(result, *words)
    assert not (folder / "store/manifest.json").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teachers", "three"], ("--teachers", "'three'", "one, two")),
        (["--shards", "t*"], ("--shards", "'t*'", "3")),
        (["--workers", "0"], ("workers", "0")),
    ],
)
def test_wrong_flags_are_refused_in_one_line(folder: Path, flags: list[str], words: tuple[str, ...]) -> None:
    refused(run("extract", folder / "recipe.yaml", *flags), *words)


def test_the_module_and_its_exit_code_are_those_of_the_command(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli", "extract", str(folder / "none.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: recipe: ")
