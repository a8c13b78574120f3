from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.recorder import Recorder
from pipeline.shards import index_tar
from pipeline.teachers import create_teacher
from storage_schemas.crops import CropPolicy
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import TeacherSpec
from storage_schemas.pixels import decode
from storage_schemas.replay import CropReplay
from storage_schemas.store import FeatureStore
from tests.recording import FakeTeacher, make_jpeg, make_shard, make_spec, make_store, problems

CROPS = CropPolicy(kind="random_resized", scale=(0.2, 1.0), first_view="center")


class Watching(FakeTeacher):
    """Keeps every pixel that it is shown."""

    def __init__(self, spec: TeacherSpec) -> None:
        super().__init__(spec)
        self.seen: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor) -> TeacherOutput:
        self.seen += images.clone()
        return super().__call__(images)


def read_part(store: FeatureStore, teacher: str, shard: str) -> tuple[np.ndarray, np.ndarray]:
    part = store.part(teacher, shard)
    return np.asarray(part.summary[...]), np.asarray(part.spatial[...])


def bomb(height: int, width: int) -> bytes:
    """A small PNG whose header promises height by width pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("views", [1, 3, 11])
def test_replayed_crops_are_the_pixels_that_the_teachers_saw(tmp_path: Path, views: int) -> None:
    url = str(make_shard(tmp_path / "a.tar", [make_jpeg(s, 30 + s, 70 - 3 * s) for s in range(5)]))
    store = make_store(tmp_path / "store", views_per_image=views, crops=CROPS)
    teachers = [Watching(make_spec("small")), Watching(make_spec("large", height=32, width=48))]
    Recorder(store, list(teachers), batch_size=4, decode_threads=3).record("a", url)
    replay = CropReplay("a", url, store.views("a"), store.manifest.max_pixels)
    for teacher in teachers:
        size = (teacher.spec.height, teacher.spec.width)
        assert len(teacher.seen) == 5 * views
        for row, seen in enumerate(teacher.seen):
            assert torch.equal(replay.crop(row, size), seen)


def test_the_first_view_is_the_centre_and_the_others_are_not(tmp_path: Path) -> None:
    url = str(make_shard(tmp_path / "a.tar", [make_jpeg(0, 40, 60)]))
    store = make_store(tmp_path / "store", views_per_image=4, crops=CROPS)
    Recorder(store, [FakeTeacher(make_spec())], 8, 1).record("a", url)
    rows = store.views("a").to_pylist()
    boxes = [(row["top"], row["left"], row["crop_height"], row["crop_width"]) for row in rows]
    assert boxes[0] == (0, 10, 40, 40)
    assert not rows[0]["hflip"]
    assert [row["view"] for row in rows] == [0, 1, 2, 3]
    assert len(set(boxes)) == 4


@pytest.mark.parametrize("model", ["test_efficientnet", "test_vit"])
@pytest.mark.parametrize("resolution", [160, 96])
@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_recorded_features_are_the_teachers_own(
    tmp_path: Path, model: str, resolution: int, codec: Any
) -> None:
    url = str(make_shard(tmp_path / "a.tar", 4))
    store = make_store(tmp_path / "store", views_per_image=2, crops=CROPS)
    teacher = create_teacher(
        "timm", model, weights="random", seed=1, name="t", resolution=resolution, codec=codec, device="cpu"
    )
    Recorder(store, [teacher], 3, 2).record("a", url)
    replay = CropReplay("a", url, store.views("a"), store.manifest.max_pixels)
    crops = [replay.crop(row, (resolution, resolution)) for row in range(8)]
    direct = [teacher(crop[None]) for crop in crops]
    summary = np.empty((8, teacher.spec.summary_dim), np.float16)
    grid = (teacher.spec.grid.height, teacher.spec.grid.width)
    spatial = np.empty((8, *grid, teacher.spec.spatial_dim), np.float16)
    part = store.part("t", "a")
    part.read_summary(range(8), summary)
    part.read_spatial(range(8), spatial)
    for row, output in enumerate(direct):
        scale = {"fp16": 1e-3, "int8": 1e-2}[codec] * float(output.spatial.abs().max())
        np.testing.assert_allclose(summary[row], output.summary[0], rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(spatial[row], output.spatial[0], atol=scale)


@pytest.mark.parametrize(
    ("damage", "status"),
    [
        (lambda data: data[: len(data) // 2], "undecodable"),
        (lambda data: b"", "undecodable"),
        (lambda data: b"GIF89a" + data, "unsupported"),
        (lambda data: bomb(50_000, 50_000), "too_large"),
        (lambda data: bomb(2**31 - 1, 2**31 - 1), "too_large"),
    ],
    ids=["half", "empty", "another format", "bomb", "largest bomb"],
)
def test_a_damaged_image_costs_its_own_rows(
    tmp_path: Path, damage: Callable[[bytes], bytes], status: str
) -> None:
    images = [make_jpeg(seed) for seed in range(6)]
    stores = {}
    for name, second in (("whole", images[2]), ("hurt", damage(images[2]))):
        url = str(make_shard(tmp_path / name / "a.tar", [*images[:2], second, *images[3:]]))
        stores[name] = make_store(tmp_path / name / "store", views_per_image=2)
        receipt = Recorder(stores[name], [FakeTeacher(make_spec())], 4, 2).record("a", url)
    assert receipt.statuses == {"ok": 10, status: 2}
    assert receipt.invalid == {"fake": 2}
    whole, hurt = (read_part(stores[name], "fake", "a") for name in ("whole", "hurt"))
    others = [row for row in range(12) if row not in (4, 5)]
    for before, after in zip(whole, hurt, strict=True):
        np.testing.assert_array_equal(before[others], after[others])
        assert np.isnan(after[[4, 5]]).all()
    rows = stores["hurt"].views("a").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 4 + [status] * 2 + ["ok"] * 6
    assert all(bool(row["error"]) == (row["status"] != "ok") for row in rows)
    assert [row["key"] for row in rows] == [f"{row // 2:04}" for row in range(12)]
    assert stores["hurt"].commit("fake", "a").invalid_rows == (4, 5)
    assert problems(stores["hurt"]) == []


def test_a_shard_with_no_readable_image_is_recorded_as_such(tmp_path: Path) -> None:
    url = str(make_shard(tmp_path / "a.tar", [b"no", b"image"]))
    for codec in ("fp16", "int8"):
        store = make_store(tmp_path / codec)
        receipt = Recorder(store, [FakeTeacher(make_spec(codec=codec))], 4, 2).record("a", url)
        assert (receipt.invalid, receipt.statuses) == ({"fake": 2}, {"unsupported": 2})
        assert problems(store) == []
        assert store.moments("fake")["spatial"].count == 0


class Poisoned(FakeTeacher):
    """Gives one value that fp16 cannot hold, for the images of one brightness."""

    def __init__(self, spec: TeacherSpec, poison: float, where: str) -> None:
        super().__init__(spec)
        self.poison, self.where, self.calls = poison, where, 0

    def __call__(self, images: torch.Tensor) -> TeacherOutput:
        output = super().__call__(images)
        self.calls += 1
        if self.calls == 2:
            getattr(output, self.where)[1].view(-1)[-1] = self.poison
        return output


@pytest.mark.parametrize("codec", ["fp16", "int8"])
@pytest.mark.parametrize("where", ["summary", "spatial"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 70_000.0])
def test_what_fp16_cannot_hold_makes_its_row_invalid(
    tmp_path: Path, codec: str, where: str, poison: float
) -> None:
    url = str(make_shard(tmp_path / "a.tar", 9))
    store = make_store(tmp_path / "store")
    plain, poisoned = make_spec("plain", codec), make_spec("other", codec)
    teachers = [FakeTeacher(plain), Poisoned(poisoned, poison, where)]
    receipt = Recorder(store, teachers, 4, 2).record("a", url)
    assert receipt.invalid == {"plain": 0, "other": 1}
    assert store.commit("other", "a").invalid_rows == (5,)
    summary, _ = read_part(store, "other", "a")
    assert np.isnan(summary[5]).all()
    assert np.isfinite(np.delete(summary, 5, axis=0)).all()
    assert store.moments("other")["summary"].count == 8
    assert problems(store) == []


def test_a_teacher_of_other_shapes_than_its_spec_is_stopped(tmp_path: Path) -> None:
    class Misshapen(FakeTeacher):
        def __call__(self, images: torch.Tensor) -> TeacherOutput:
            output = super().__call__(images)
            return TeacherOutput(output.summary[:, :1], output.spatial)

    url = str(make_shard(tmp_path / "a.tar", 2))
    store = make_store(tmp_path / "store")
    with pytest.raises(AssertionError):
        Recorder(store, [Misshapen(make_spec())], 4, 2).record("a", url)
    assert store.garbage() == []


def test_labels_and_long_captions_are_kept(tmp_path: Path) -> None:
    caption = "é " * 21_000
    url = str(make_shard(tmp_path / "a.tar", 2, caption=caption))
    store = make_store(tmp_path / "store", views_per_image=3)
    Recorder(store, [FakeTeacher(make_spec())], 4, 2).record("a", url)
    assert store.views("a")["caption"].to_pylist() == [caption] * 6
    assert store.views("a")["label"].to_pylist() == [None] * 6


def test_view_tables_name_the_bytes_of_each_image(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "a.tar", 3)
    store = make_store(tmp_path / "store")
    Recorder(store, [FakeTeacher(make_spec())], 4, 2).record("a", str(path))
    data = path.read_bytes()
    for row in store.views("a").to_pylist():
        image = decode(data[row["offset"] : row["offset"] + row["nbytes"]], 10**6)
        assert image.shape == (3, row["height"], row["width"])
    source, index = store.commit("fake", "a").source, index_tar(path, "a")
    assert (source.size, source.sha256) == (index.size, index.sha256)


def test_a_later_teacher_touches_nothing_that_is_there(tmp_path: Path) -> None:
    url = str(make_shard(tmp_path / "a.tar", 3))
    store = make_store(tmp_path / "store", views_per_image=2)
    Recorder(store, [FakeTeacher(make_spec("one"))], 4, 2).record("a", url)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    both = [FakeTeacher(make_spec("one")), FakeTeacher(make_spec("two", "int8"))]
    receipt = Recorder(store, both, 3, 1).record("a", url)
    assert receipt.committed == ("two",)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert problems(store) == []
    assert Recorder(store, both, 3, 1).record("a", url).committed == ()


def test_a_changed_tar_is_refused_for_a_later_teacher(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "a.tar", 3)
    store = make_store(tmp_path / "store")
    Recorder(store, [FakeTeacher(make_spec("one"))], 4, 2).record("a", str(path))
    before = index_tar(path, "a").sha256
    for change in (lambda: make_shard(path, 3, first=50), lambda: make_shard(path, 3, caption="other")):
        change()
        later = Watching(make_spec("two"))
        with pytest.raises(UserError, match=rf"'a' has sha256 {index_tar(path, 'a').sha256}, but {before}"):
            Recorder(store, [later], 4, 2).record("a", str(path))
        assert later.seen == []
    assert store.shards("two") == []
    assert store.garbage() == []


def test_a_teacher_without_any_finite_feature_is_refused(tmp_path: Path) -> None:
    class Broken(FakeTeacher):
        def __call__(self, images: torch.Tensor) -> TeacherOutput:
            output = super().__call__(images)
            return TeacherOutput(output.summary / 0, output.spatial)

    url = str(make_shard(tmp_path / "a.tar", 3))
    store = make_store(tmp_path / "store")
    teachers = [FakeTeacher(make_spec("good")), Broken(make_spec("broken"))]
    with pytest.raises(
        UserError, match="teacher: 'broken' gives no finite features for any view of shard 'a'"
    ):
        Recorder(store, teachers, 2, 1).record("a", url)
    assert (store.shards("good"), store.shards("broken"), store.garbage()) == ([], [], [])


def test_a_commit_says_where_its_tar_lay_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shard(tmp_path / "in" / "a.tar", 1)
    monkeypatch.chdir(tmp_path)
    store = make_store(tmp_path / "store")
    Recorder(store, [FakeTeacher(make_spec())], 2, 1).record("a", "in/a.tar")
    assert store.commit("fake", "a").source.url == str(tmp_path / "in" / "a.tar")


def test_a_tar_that_changes_while_it_is_read_is_damage(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "a.tar", 3)

    class Meddling(FakeTeacher):
        def __call__(self, images: torch.Tensor) -> TeacherOutput:
            make_shard(tmp_path / "new" / "a.tar", 3, first=9).replace(path)
            return super().__call__(images)

    store = make_store(tmp_path / "store")
    with pytest.raises(DataDamage, match=r"shard 'a': .* changed while it was read"):
        Recorder(store, [Meddling(make_spec())], 1, 1).record("a", str(path))
    assert [name for name, _ in store.objects.walk()] == ["manifest.json", "teachers/fake/spec.json"]


def test_replay_refuses_another_tar_by_shard_and_row(tmp_path: Path) -> None:
    path = make_shard(tmp_path / "a.tar", 3)
    store = make_store(tmp_path / "store")
    Recorder(store, [FakeTeacher(make_spec())], 4, 2).record("a", str(path))
    views = store.views("a")
    make_shard(path, [make_jpeg(1), make_jpeg(2), make_jpeg(3)])
    replay = CropReplay("a", str(path), views, 10**6)
    with pytest.raises(DataDamage, match="shard 'a' row 1: image has digest"):
        replay.crop(1, (24, 24))
    path.unlink()
    with pytest.raises(UserError, match="shard 'a': there is no"):
        CropReplay("a", str(path), views, 10**6)
    with pytest.raises(UserError, match=r"shard 'a', '/gone/a\.tar': '/gone' is no folder"):
        CropReplay("a", "/gone/a.tar", views, 10**6)


@pytest.mark.parametrize("views", [1, 40])
def test_few_crops_are_in_memory_at_once(tmp_path: Path, views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.recorder as module

    made = seen = most = 0
    cut = module.cut

    def counting(*arguments: Any) -> torch.Tensor:
        nonlocal made
        made += 1
        return cut(*arguments)

    class Slow(FakeTeacher):
        def __call__(self, images: torch.Tensor) -> TeacherOutput:
            nonlocal seen, most
            most = max(most, made - seen)
            seen += len(images)
            return super().__call__(images)

    monkeypatch.setattr(module, "cut", counting)
    url = str(make_shard(tmp_path / "a.tar", 120 // views))
    store = make_store(tmp_path / "store", views_per_image=views)
    Recorder(store, [Slow(make_spec())], batch_size=5, decode_threads=2).record("a", url)
    assert seen == made == 120 // views * views
    assert most <= (2 * 2 + 1) * 5
