from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from storage_schemas.crops import CropPolicy
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.inspection import inspect_store
from storage_schemas.manifest import StoreManifest
from storage_schemas.objects import Objects
from storage_schemas.store import FeatureStore
from tests.recording import flip_bit, make_spec, make_store, random_output, view_table, write_part


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 1), ("views_per_image", 3), ("max_pixels", 100), ("crops", CropPolicy(kind="center"))],
)
def test_another_manifest_is_refused_with_both_values(tmp_path: Path, field: str, value: Any) -> None:
    make_store(tmp_path)
    old = StoreManifest().model_dump(mode="json")[field]
    given = StoreManifest(**{field: value})
    with pytest.raises(UserError) as caught:
        FeatureStore.create(str(tmp_path), given)
    assert f"{field}: stored {old!r}, given {given.model_dump(mode='json')[field]!r}" in str(caught.value)
    FeatureStore.create(str(tmp_path), StoreManifest())


@pytest.mark.parametrize("extra", [{}, {"field_of_the_future": 1}])
def test_another_schema_version_is_refused_naming_both(tmp_path: Path, extra: dict[str, Any]) -> None:
    make_store(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text()) | {"schema_version": 7} | extra
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    for use in (FeatureStore.open, lambda url: FeatureStore.create(url, StoreManifest())):
        with pytest.raises(UserError, match="schema version 7, this program reads 1"):
            use(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("weights_sha256", "1" * 64), ("codec", "int8"), ("height", 32), ("pixels", "x"), ("summary", "cls")],
)
def test_another_teacher_of_the_same_name_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    store, spec = make_store(tmp_path), make_spec()
    store.add_teacher(spec)
    other = make_spec(**{field: value})
    message = f"{field}: stored {getattr(spec, field)!r}, given {value!r}"
    for use in (store.add_teacher, lambda spec: store.require(store.manifest, [spec])):
        with pytest.raises(UserError) as caught:
            use(other)
        assert message in str(caught.value)
    store.add_teacher(make_spec(weights="file:/elsewhere.pth"))  # where a file lies makes no difference


def test_a_part_of_another_fingerprint_is_damage(tmp_path: Path) -> None:
    store, spec = make_store(tmp_path), make_spec()
    write_part(store, spec, random_output(spec, 2))
    path = tmp_path / "teachers/fake/spec.json"
    path.write_text(path.read_text().replace('"weights_sha256":"0', '"weights_sha256":"1'))
    fresh = FeatureStore.open(str(tmp_path))
    with pytest.raises(DataDamage, match="fingerprint"):
        fresh.part("fake", "a")
    assert fresh.verify("fake", "a")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder"):
        FeatureStore.open(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no manifest\.json"):
        FeatureStore.open(str(tmp_path))
    store = make_store(tmp_path)
    store.add_teacher(make_spec())
    assert store.teachers() == ["fake"]
    assert store.shards("fake") == []
    for use in (store.shards, store.spec, store.moments):
        with pytest.raises(UserError, match=r"'other' is not in store .*; there: fake"):
            use("other")
    with pytest.raises(UserError, match="no recorded shard"):
        store.moments("fake")
    with pytest.raises(UserError, match="'a' is not recorded for teacher 'fake'"):
        store.part("fake", "a")
    with pytest.raises(UserError, match="'a' has no view table"):
        store.views("a")


def test_a_view_table_is_put_once_and_must_stay_equal(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    digest = store.put_views("a", view_table(3))
    written = (tmp_path / "views/a.parquet").stat().st_mtime_ns
    assert store.put_views("a", view_table(3)) == digest
    assert (tmp_path / "views/a.parquet").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="'a' has 3 views in the store and 4 in the tar"):
        store.put_views("a", view_table(4))
    with pytest.raises(UserError, match="'a' differs at row 0, nbytes: stored 7, now 8"):
        store.put_views("a", view_table(3, nbytes=8))
    assert store.views("a").equals(view_table(3))


@pytest.mark.parametrize("bit", range(0, 8 * 4000, 1777))
def test_a_flipped_bit_in_a_view_table_is_found_through_the_commit(tmp_path: Path, bit: int) -> None:
    store, spec = make_store(tmp_path), make_spec()
    write_part(store, spec, random_output(spec, 5))
    path = tmp_path / "views/a.parquet"
    flip_bit(path, bit % (8 * path.stat().st_size))
    with pytest.raises(DataDamage, match="shard 'a'"):
        store.committed_views(store.commit("fake", "a"))
    assert len(store.verify("fake", "a")) == 1


@pytest.mark.parametrize("name", ["manifest.json", "teachers/fake/spec.json"])
@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"schema_version": "x"}', b"\xff", b"[" * 100_000])
def test_damaged_metadata_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    store, spec = make_store(tmp_path), make_spec()
    write_part(store, spec, random_output(spec, 2))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataDamage, match=name):
        FeatureStore.open(str(tmp_path)).spec("fake")


def test_a_spec_under_another_name_is_damage(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.add_teacher(make_spec())
    (tmp_path / "teachers/fake").rename(tmp_path / "teachers/other")
    with pytest.raises(DataDamage, match="is of teacher 'fake'"):
        FeatureStore.open(str(tmp_path)).spec("other")


def test_garbage_is_what_no_commit_names_and_nobody_writes_now(tmp_path: Path) -> None:
    store, spec = make_store(tmp_path), make_spec()
    commit = write_part(store, spec, random_output(spec, 2))
    kept = tmp_path / store.part_path("fake", "a", commit.attempt)
    left = [store.part_path("fake", shard, "f" * 32) for shard in ("a", "b")]
    for path in left:
        store.objects.put(f"{path}/summary/c/0/0", b"half")
    assert store.garbage() == left
    assert store.garbage(older_than=3600) == []
    old = time.time() - 7200
    os.utime(tmp_path / left[0] / "summary/c/0/0", (old, old))
    assert store.garbage(older_than=3600) == left[:1]
    for path in store.garbage():
        store.objects.delete(path)
    assert store.garbage() == []
    assert sorted((tmp_path / "teachers/fake/parts").iterdir()) == [kept]
    assert store.verify("fake", "a") == []


def test_an_attempt_that_is_still_at_its_first_object_is_young(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.add_teacher(make_spec())
    path = store.part_path("fake", "a", "f" * 32)
    staging = tmp_path / path / "summary/c/0/0#1"
    staging.parent.mkdir(parents=True)
    staging.write_bytes(b"half")
    assert store.garbage(older_than=3600) == []
    old = time.time() - 7200
    os.utime(staging, (old, old))
    assert store.garbage(older_than=3600) == [path]


def test_commits_of_a_shard_from_different_tars_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for name in ("one", "two"):
        write_part(store, make_spec(name), random_output(make_spec(name), 2))
    path = tmp_path / "teachers/two/commits/a.json"
    path.write_text(path.read_text().replace("0" * 64, "1" * 64, 1))
    commit = store.commit("two", "a")
    assert commit.source.sha256 == "1" * 64
    for name in ("one", "two"):
        [line] = store.verify(name, "a")
        assert "'a' has sha256" in line
        assert "0" * 64 in line
        assert "1" * 64 in line


def test_a_commit_that_does_not_hold_stops_neither_inspection_nor_the_search_for_garbage(
    tmp_path: Path,
) -> None:
    store, spec = make_store(tmp_path), make_spec()
    for shard in ("a", "b.c", "d"):
        write_part(store, spec, random_output(spec, 2), shard)
    left = [store.part_path("fake", shard, "f" * 32) for shard in ("a", "b.c", "d")]
    for path in left:
        store.objects.put(f"{path}/zarr.json", b"{}")
    (tmp_path / "teachers/fake/commits/b.c.json").write_bytes(b"{")
    (tmp_path / "views/d.parquet").write_bytes(b"{")
    assert store.garbage() == [left[0], left[2]]  # one of b.c's two may be the one that counted
    found = inspect_store(store)
    assert (found.teachers[0].shards, found.teachers[0].rows, found.views) == (2, 4, 4)
    assert [("b.c.json" in line, "'d'" in line) for line in found.damage] == [(True, False), (False, True)]


def test_what_a_killed_put_left_is_garbage(tmp_path: Path) -> None:
    store, spec = make_store(tmp_path), make_spec()
    write_part(store, spec, random_output(spec, 2))
    places = ("manifest.json", "views/a.parquet", "teachers/fake/spec.json", "teachers/fake/commits/a.json")
    left = sorted(f"{place}#17" for place in places)
    for path in left:
        (tmp_path / path).write_bytes(b"half")
    assert sorted(store.garbage()) == left
    assert store.garbage(older_than=3600) == []
    for path in store.garbage():
        store.objects.delete(path)
    assert store.garbage() == list(tmp_path.rglob("*#*")) == []
    assert store.verify("fake", "a") == []


def test_inspection_adds_up(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for name, codec in (("x", "fp16"), ("y", "int8")):
        spec = make_spec(name, codec)
        for shard, rows in (("a", 3), ("b", 5)):
            output = random_output(spec, rows)
            output.spatial[1] = float("nan")
            write_part(store, spec, output, shard)
    store.objects.put(f"{store.part_path('x', 'a', 'f' * 32)}/zarr.json", b"{}")
    found = inspect_store(store)
    assert [(entry.name, entry.shards, entry.rows, entry.invalid_rows) for entry in found.teachers] == [
        ("x", 2, 8, 2),
        ("y", 2, 8, 2),
    ]
    for entry in found.teachers:
        parts = [store.commit(entry.name, shard) for shard in ("a", "b")]
        on_disk = sum(
            store.objects.size(f"{store.part_path(part.teacher, part.shard, part.attempt)}/{one.path}") or 0
            for part in parts
            for one in part.objects
        )
        assert entry.bytes == on_disk
    assert found.teachers[0].fidelity == {}
    assert 0.999 < found.teachers[1].fidelity["cosine_min"] <= found.teachers[1].fidelity["cosine_mean"] <= 1
    assert (found.shards, found.views, found.statuses, found.garbage) == (2, 8, {"ok": 8}, 1)


def test_one_store_on_memory_and_on_disk_has_the_same_objects(tmp_path: Path) -> None:
    found = []
    for url in (str(tmp_path), f"memory://{tmp_path.name}"):
        store, spec = make_store(url), make_spec()
        write_part(store, spec, random_output(spec, 4))
        assert FeatureStore.exists(url)
        attempt = store.commit("fake", "a").attempt
        found.append([path.replace(attempt, "") for path, _ in store.objects.walk()])
    assert found[0] == found[1]


def test_free_bytes_are_known_of_folders_only(tmp_path: Path) -> None:
    assert isinstance(make_store(tmp_path).objects, Objects)
    assert make_store(tmp_path).objects.free_bytes()
    assert make_store(f"memory://free-{tmp_path.name}").objects.free_bytes() is None
