"""A driver that dies at any step of writing and committing, and two that work at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.extract import extract
from pipeline.teachers import FAMILIES
from storage_schemas.features import TeacherOutput
from storage_schemas.objects import ObjectWriter
from storage_schemas.store import FeatureStore
from tests.recording import (
    FakeTeacher,
    committed_objects,
    create_fake_teacher,
    make_config,
    make_shard,
    problems,
)

PUTS = ("write", "finish")  # all of a local put: each piece, and what makes the object be there
SECONDS = 60  # no child takes a tenth of it


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Children are forked from a process that has imported everything and started no thread."""
    context = multiprocessing.get_context("forkserver")
    imported_late = ["timm", "pandas", "pyarrow.compute"]
    context.set_forkserver_preload([__name__, "tests.recording", *imported_late])
    return context


def run_to_end(folder: Path, report: Path | None = None, seconds_a_batch: float = 0.0) -> None:
    """`extract` in a child; writes what it reports, if asked."""
    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # processes die here, and no disks

    class Slow(FakeTeacher):
        def __call__(self, images: torch.Tensor) -> TeacherOutput:
            time.sleep(seconds_a_batch)
            return super().__call__(images)

    FAMILIES["fake"] = lambda *given: Slow(create_fake_teacher(*given).spec)
    done = extract(make_config(folder))
    if report is not None:
        text = json.dumps({"recorded": done.recorded, "done": done.already_done, "failed": done.failed})
        report.write_text(text)


def die_at(folder: Path, call: int) -> None:
    """`extract` in a child that is killed right before its n-th piece or finish, so after the one before it,
    or at the end of all.
    """
    lock, calls = threading.Lock(), 0

    def deadly(put: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            with lock:
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return put(*arguments, **options)

        return wrapped

    for name in PUTS:
        setattr(ObjectWriter, name, deadly(getattr(ObjectWriter, name)))
    run_to_end(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def child(server: ForkServerContext, function: Callable[..., None], *arguments: Any) -> Any:
    process = server.Process(target=function, args=arguments)
    process.start()
    return process


def undisturbed(folder: Path, shards: int, images: int) -> dict[str, str]:
    for number in range(shards):
        make_shard(folder / "shards" / f"s{number}.tar", images)
    assert extract(make_config(folder)).failed == {}
    wanted = committed_objects(FeatureStore.open(str(folder / "store")))
    shutil.rmtree(folder / "store")
    return wanted


def finish(folder: Path, wanted: dict[str, str]) -> None:
    """The next run completes the store, and only what `gc` removes is left of the one that died."""
    assert extract(make_config(folder)).failed == {}
    store = FeatureStore.open(str(folder / "store"))
    assert problems(store) == []
    assert committed_objects(store) == wanted
    for path in store.garbage():
        store.objects.delete(path)
    parts = [(teacher, shard) for teacher in store.teachers() for shard in store.shards(teacher)]
    kept = {store.part_path(*part, store.commit(*part).attempt) for part in parts}
    left = (folder / "store").glob("teachers/*/parts/*")
    assert {str(path.relative_to(folder / "store")) for path in left} == kept


@pytest.fixture(autouse=True)
def _fake_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "fake", create_fake_teacher)


def count_puts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    calls = 0

    def counting(put: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return put(*arguments, **options)

        return wrapped

    with monkeypatch.context() as patch:
        for name in PUTS:
            patch.setattr(ObjectWriter, name, counting(getattr(ObjectWriter, name)))
        extract(make_config(folder))
    shutil.rmtree(folder / "store")
    return calls


def test_a_driver_killed_around_any_put_leaves_what_the_next_run_completes(
    tmp_path: Path, server: ForkServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = undisturbed(tmp_path, shards=1, images=3)
    puts = count_puts(tmp_path, monkeypatch)
    assert puts >= 2 * 14 + 6  # two parts; manifest, view table, two specs, two commits
    for call in range(1, puts + 2):
        killed = child(server, die_at, tmp_path, call)
        killed.join(SECONDS)
        assert killed.exitcode == -signal.SIGKILL, call
        finish(tmp_path, wanted)
        shutil.rmtree(tmp_path / "store")


def test_a_driver_killed_at_any_moment_leaves_what_the_next_run_completes(
    tmp_path: Path, server: ForkServerContext
) -> None:
    wanted = undisturbed(tmp_path, shards=5, images=4)
    moments = random.Random(0)
    kills = 0
    while kills < 8:
        running = child(server, run_to_end, tmp_path, None, 0.02)
        while not list((tmp_path).glob("store/teachers/one/parts/*")) and running.is_alive():
            time.sleep(0.001)
        running.join(moments.uniform(0, 0.4))
        running.kill()
        running.join(SECONDS)
        kills += 1
        if running.exitcode == 0 or kills % 3 == 0 or kills == 8:
            finish(tmp_path, wanted)
            shutil.rmtree(tmp_path / "store")


def test_of_two_drivers_at_once_each_shard_is_committed_by_one(
    tmp_path: Path, server: ForkServerContext
) -> None:
    wanted = undisturbed(tmp_path, shards=6, images=4)
    reports = [tmp_path / f"{number}.json" for number in range(2)]
    drivers = [child(server, run_to_end, tmp_path, report, 0.01) for report in reports]
    for driver in drivers:
        driver.join(SECONDS)
        assert driver.exitcode == 0
    said = [json.loads(report.read_text()) for report in reports]
    assert [one["failed"] for one in said] == [{}, {}]
    assert all(one["recorded"] + one["done"] == 6 for one in said)
    assert sum(one["recorded"] for one in said) >= 6  # a shard's two teachers may have two winners
    store = FeatureStore.open(str(tmp_path / "store"))
    assert committed_objects(store) == wanted
    assert store.garbage() == []
    assert problems(store) == []
