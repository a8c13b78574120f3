from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline.executors
import pipeline.plan
from pipeline.config import ExtractConfig
from pipeline.extract import ExtractReport, extract
from pipeline.recorder import Receipt, Recorder
from pipeline.teachers import FAMILIES
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.objects import Objects, StorageError, open_objects
from storage_schemas.store import FeatureStore
from tests.recording import (
    FakeTeacher,
    committed_objects,
    create_fake_teacher,
    flip_bit,
    make_config,
    make_shard,
    make_spec,
    make_store,
    problems,
)


@pytest.fixture(autouse=True)
def _fake_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "fake", create_fake_teacher)


def opened(config: ExtractConfig) -> FeatureStore:
    return FeatureStore.open(config.store.url)


def make_shards(folder: Path, count: int = 3, images: int = 3) -> list[Path]:
    return [make_shard(folder / "shards" / f"s{number}.tar", images) for number in range(count)]


def test_what_is_missing_is_recorded_once(tmp_path: Path) -> None:
    make_shards(tmp_path)
    config = make_config(tmp_path)
    first = extract(config, "s[01]")
    assert (first.shards, first.recorded, first.already_done, first.views, first.failed) == (2, 2, 0, 12, {})
    second = extract(config)
    assert (second.shards, second.recorded, second.already_done, second.views) == (3, 1, 2, 6)
    third = extract(config)
    assert (third.recorded, third.already_done, third.views, third.images_per_second) == (0, 3, 0, 0)
    assert opened(config).shards("one") == opened(config).shards("two") == ["s0", "s1", "s2"]
    assert problems(opened(config)) == []
    with pytest.raises(UserError, match="--shards: 'x\\*' matches none of 3"):
        extract(config, "x*")


def test_a_store_in_memory_and_one_with_odd_names_equal_one_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "a b")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "a b/shards").iterdir():
        open_objects(f"memory://{tmp_path.name}/in").put(path.name, path.read_bytes())
    places = [
        make_config(tmp_path / "a b"),
        make_config(Path("a b"), store={"url": "runs/x y"}),
        make_config(tmp_path / "a b", store={"url": f"file://{tmp_path}/s%20t"}),
        make_config(tmp_path / "a b", store={"url": f"memory://{tmp_path.name}/out"}),
    ]
    tars = {"train": f"memory://{tmp_path.name}/in/*.tar"}
    places.append(make_config(tmp_path, store={"url": f"memory://{tmp_path.name}/2"}, data=tars))
    found = []
    for config in places:
        assert extract(config).failed == {}
        found.append(committed_objects(opened(config)))
    assert all(other == found[0] for other in found)
    assert (tmp_path / "s t/manifest.json").exists()


def flip_a_header(path: Path) -> None:
    flip_bit(path, 8 * 20 + 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, len(path.read_bytes().rstrip(b"\0")) // 512 * 512 + 512),
        flip_a_header,
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(bytes(10240)),
        lambda path: path.write_bytes(b"no tar" * 1000),
    ],
    ids=["half", "no end", "flipped header bit", "nothing", "no members", "no tar"],
)
def test_a_damaged_tar_fails_by_name_and_the_others_go_on(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    damage(make_shards(tmp_path)[1])
    lines: list[str] = []
    report = extract(make_config(tmp_path), on_failure=lines.append)
    assert report.failed.keys() == {"s1"}
    assert "'s1'" in report.failed["s1"]
    assert report.recorded == 2
    assert len(lines) == 1  # what is damaged is not tried again
    store = opened(make_config(tmp_path))
    assert not [path for path, _ in store.objects.walk() if "s1" in path]
    assert not list((tmp_path / "store").rglob("*s1*"))
    assert problems(store) == []


def test_a_plan_lists_the_damaged_tars_and_is_not_exact(tmp_path: Path) -> None:
    paths = make_shards(tmp_path)
    config = make_config(tmp_path)
    whole = pipeline.plan.make_plan(config)
    assert (whole.rows, whole.exact, whole.damaged) == (18, True, ())
    flip_a_header(paths[1])
    plan = pipeline.plan.make_plan(config)
    assert (plan.exact, len(plan.damaged)) == (False, 1)
    assert "shard 's1'" in plan.damaged[0]


@pytest.mark.parametrize("size", [0, 100])
def test_a_commit_that_a_power_loss_has_cut_is_not_taken_for_done(tmp_path: Path, size: int) -> None:
    make_shards(tmp_path)
    config = make_config(tmp_path)
    extract(config)
    os.truncate(tmp_path / "store/teachers/two/commits/s1.json", size)
    with pytest.raises(DataDamage, match=r"commit .*/teachers/two/commits/s1\.json"):
        extract(config)


def test_a_report_has_the_mean_fidelity_over_all_rows() -> None:
    report = ExtractReport()
    for number, (views, mean, least) in enumerate([(9, 0.9, 0.5), (3, 0.5, 0.4), (5, 0.7, 0.6)]):
        fidelity = {"cosine_mean": mean, "cosine_min": least}
        receipt = Receipt(f"s{number}", ("a", "b"), views, invalid={"a": 1, "b": 0}, fidelity={"a": fidelity})
        report.add(receipt)
    report.add(Receipt("late", (), views=100, bytes=7, statuses={"ok": 100}))
    assert report.fidelity.keys() == {"a"}
    assert report.fidelity["a"]["cosine_mean"] == pytest.approx((8 * 0.9 + 2 * 0.5 + 4 * 0.7) / 14)
    assert report.fidelity["a"]["cosine_min"] == 0.4
    assert (report.valid, report.views, report.bytes) == ({"a": 14, "b": 17}, 17, 0)
    assert (report.statuses, report.recorded, report.already_done) == ({}, 3, 1)


def test_when_every_tar_is_damaged_all_are_listed(tmp_path: Path) -> None:
    for path in make_shards(tmp_path):
        flip_a_header(path)
    assert extract(make_config(tmp_path)).failed.keys() == {"s0", "s1", "s2"}


def test_a_changed_tar_is_refused_by_name_when_a_teacher_is_added(tmp_path: Path) -> None:
    paths = make_shards(tmp_path)
    extract(make_config(tmp_path, {"one": {}}))
    make_shard(paths[1], 3, first=77)
    report = extract(make_config(tmp_path, {"one": {}, "two": {}}))
    assert report.failed.keys() == {"s1"}
    assert "'s1' has sha256" in report.failed["s1"]
    assert opened(make_config(tmp_path)).shards("two") == ["s0", "s2"]


@pytest.mark.parametrize("error", [OSError("disk"), RuntimeError("CUDA\nout of memory"), StorageError("503")])
@pytest.mark.parametrize("times", [1, 100])
def test_what_may_pass_is_tried_again_so_many_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
) -> None:
    make_shards(tmp_path)
    put, failures = Objects.put, 0

    def fail(self: Objects, path: str, data: Any) -> None:
        nonlocal failures
        if "s1." in path and failures < times:
            failures += 1
            raise error
        put(self, path, data)

    monkeypatch.setattr(Objects, "put", fail)
    lines: list[str] = []
    report = extract(make_config(tmp_path), on_failure=lines.append)
    assert all("s1" in line and "\n" not in line for line in lines)
    assert len(lines) == min(times, 3)
    assert report.failed.keys() == ({"s1"} if times == 100 else set())
    assert opened(make_config(tmp_path)).garbage() == []
    assert extract(make_config(tmp_path)).failed == report.failed
    assert problems(opened(make_config(tmp_path))) == []


def test_the_loser_of_two_drivers_says_so_and_removes_its_attempt(tmp_path: Path) -> None:
    [path] = make_shards(tmp_path, 1)
    store = make_store(tmp_path / "store", views_per_image=2)
    winners = []

    def other_driver(count: int) -> None:
        if not winners:
            winners.append(Recorder(store, [FakeTeacher(make_spec("one"))], 4, 1).record("s0", str(path)))

    receipt = Recorder(store, [FakeTeacher(make_spec("one"))], 4, 1).record("s0", str(path), other_driver)
    assert (winners[0].committed, receipt.committed) == (("one",), ())
    assert store.garbage() == []
    assert problems(store) == []


def test_a_shard_that_another_driver_was_faster_with_counts_as_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path)
    config = make_config(tmp_path)
    record = Recorder.record

    def be_late(self: Recorder, *arguments: Any) -> Any:
        record(self, *arguments)
        return record(self, *arguments)

    monkeypatch.setattr(Recorder, "record", be_late)
    report = extract(config)
    assert (report.shards, report.recorded, report.already_done) == (3, 0, 3)


@pytest.mark.parametrize("free", [0, 1000])
def test_where_there_is_no_room_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    make_shards(tmp_path)
    monkeypatch.setattr(Objects, "free_bytes", lambda self: free)
    with pytest.raises(UserError, match=rf"store\.url: .* {free:,} bytes free, recording needs about"):
        extract(make_config(tmp_path))
    assert list((tmp_path / "store").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setitem(FAMILIES, "fake", create_fake_teacher)
    changed = make_config(tmp_path, {"one": {"codec": "int8"}}, store={"views_per_image": 1})
    assert extract(changed).failed == {}  # the advice that the message gives can be followed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"store": {"seed": 9}}, "seed: stored 0, given 9"),
        ({"store": {"views_per_image": 3}}, "views_per_image: stored 2, given 3"),
        ({"store": {"crops": {"hflip": 0.1}}}, "crops: stored .*'hflip': 0.5.* given .*'hflip': 0.1"),
        ({"teachers": {"one": {"codec": "int8"}}}, "codec: stored 'fp16', given 'int8'"),
        ({"teachers": {"one": {"spatial_dim": 5}}}, "spatial_dim: stored 6, given 5"),
    ],
)
def test_a_store_made_otherwise_is_refused_and_left_alone(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    make_shards(tmp_path)
    extract(make_config(tmp_path, {"one": {}}))
    before = committed_objects(opened(make_config(tmp_path)))
    with pytest.raises(UserError, match=message):
        extract(make_config(tmp_path, **{"teachers": {"one": {}, "new": {}}, **changes}))
    assert committed_objects(opened(make_config(tmp_path))) == before


def test_where_a_folder_vanishes_the_failure_is_listed(tmp_path: Path) -> None:
    make_shards(tmp_path)
    report = extract(make_config(tmp_path), on_start=lambda plan: shutil.rmtree(tmp_path / "shards"))
    assert report.failed.keys() == {"s0", "s1", "s2"}
    assert all(f"'{tmp_path}/shards' is no folder" in why for why in report.failed.values())


def test_the_plan_says_what_is_written(tmp_path: Path) -> None:
    for number in range(5):
        make_shard(tmp_path / "shards" / f"s{number}.tar", 20 + number)
    big = {"grid": {"height": 12, "width": 12}, "spatial_dim": 48}
    config = make_config(tmp_path, {"one": big, "two": {**big, "codec": "int8"}})
    plans = []
    extract(config, "s[0-3]", on_start=plans.append)
    extract(config, on_start=plans.append)
    store = opened(config)
    for plan, shards in zip(plans, (["s0", "s1", "s2", "s3"], ["s4"]), strict=True):
        assert plan.exact
        assert plan.rows == sum(store.commit("one", shard).rows for shard in shards)
        for cost in plan.teachers:
            commits = [store.commit(cost.name, shard) for shard in shards]
            chunks = sum(o.size for c in commits for o in c.objects if not o.path.endswith("zarr.json"))
            assert cost.bytes == chunks
            metadata = sum(commit.bytes for commit in commits) - cost.bytes
            assert 0 < metadata < 10_000 * len(shards)
            assert cost.objects == sum(len(commit.objects) for commit in commits)
        views = sum(store.objects.size(f"views/{shard}.parquet") or 0 for shard in shards)
        assert views <= plan.rows * pipeline.plan.VIEW_BYTES + 10_000 * len(shards)


def test_the_plan_of_many_shards_is_estimated_from_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path, 9, images=2)
    monkeypatch.setattr(pipeline.plan, "COUNTED_SHARDS", 3)
    plans = []
    extract(make_config(tmp_path), on_start=plans.append)
    assert (plans[0].rows, plans[0].exact, plans[0].shards) == (36, False, 9)


def test_auto_takes_ray_where_there_is_something_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def runner(**settings: Any) -> str:
        config = make_config(Path("/x"), extract={"executor": "auto", **settings})
        return str(pipeline.executors.prepare(config)[1].func.__name__)  # type: ignore[attr-defined]

    assert runner() == "run_inline"
    assert runner(workers=2) == "run_ray"
    assert runner(ray_address="10.0.0.1:6379") == "run_ray"
    assert runner(executor="ray") == "run_ray"
    assert runner(workers=2, executor="inline") == "run_inline"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert runner() == "run_ray"


def test_relative_paths_are_refused_where_workers_have_other_folders() -> None:
    config = make_config(Path("runs"), extract={"executor": "ray", "ray_address": "10.0.0.1:6379"})
    with pytest.raises(UserError, match=r"store\.url: 'runs/store' is relative"):
        pipeline.executors.prepare(config)
