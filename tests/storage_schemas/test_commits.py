from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from storage_schemas.commits import Commit, read_commit, write_commit
from storage_schemas.errors import DataDamage
from storage_schemas.manifest import canonical_json
from storage_schemas.objects import Objects, open_objects
from tests.recording import make_spec, make_store, random_output, write_part

PATH = "teachers/fake/commits/a.json"


def make_commit(tmp_path: Path) -> Commit:
    return write_part(make_store(tmp_path / "made"), make_spec(), random_output(make_spec(), 3))


def test_the_first_of_two_attempts_counts(tmp_path: Path) -> None:
    objects, first = open_objects(str(tmp_path)), make_commit(tmp_path)
    second = first.model_copy(update={"attempt": "1" * 32})
    assert write_commit(objects, "c.json", first)
    assert not write_commit(objects, "c.json", second)
    assert read_commit(objects, "c.json") == first


def test_already_exists_but_it_is_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, commit = open_objects(str(tmp_path)), make_commit(tmp_path)
    put = Objects.put_if_absent

    def reply_lost_and_tried_again(self: Objects, path: str, data: bytes) -> bool:
        put(self, path, data)
        return put(self, path, data)

    monkeypatch.setattr(Objects, "put_if_absent", reply_lost_and_tried_again)
    assert write_commit(objects, "c.json", commit)


def flipped(digest: str) -> str:
    return ("1" if digest[0] == "0" else "0") + digest[1:]


TAMPERED: dict[str, Any] = {
    "schema_version": 2,
    "teacher": "other",
    "shard": "b",
    "attempt": "1" * 32,
    "rows": 4,
    "invalid_rows": [1],
    "views_sha256": "0" * 64,
    "fingerprint": "0" * 64,
    "unknown": 1,
}


@pytest.mark.parametrize("field", TAMPERED)
def test_a_tampered_field_is_found(tmp_path: Path, field: str) -> None:
    store = make_store(tmp_path)
    write_part(store, make_spec(), random_output(make_spec(), 3))
    content = json.loads((tmp_path / PATH).read_text()) | {field: TAMPERED[field]}
    (tmp_path / PATH).write_bytes(canonical_json(content))
    found = store.verify("fake", "a")
    assert found
    assert all("shard 'a'" in line or PATH in line for line in found)


@pytest.mark.parametrize("change", ["xxh3_128", "size", "path", "gone"])
def test_every_tampered_object_entry_is_found(tmp_path: Path, change: str) -> None:
    store = make_store(tmp_path)
    commit = write_part(store, make_spec(), random_output(make_spec(), 3))
    for number, entry in enumerate(commit.objects):
        content = commit.model_dump(mode="json")
        if change == "gone":
            del content["objects"][number]
        else:
            new = {"xxh3_128": flipped(entry.xxh3_128), "size": entry.size + 1, "path": "no/such"}[change]
            content["objects"][number][change] = new
        (tmp_path / PATH).write_bytes(canonical_json(content))
        assert any(entry.path in line for line in store.verify("fake", "a"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attempt", "../../../../etc"),
        ("attempt", "/etc"),
        ("shard", "../a"),
        ("shard", ".."),
        ("teacher", "../fake"),
        ("rows", 0),
        ("rows", -1),
        ("rows", 10**30),
        ("invalid_rows", [3]),
        ("invalid_rows", [-1]),
        ("invalid_rows", [1, 1]),
        ("invalid_rows", [1, 0]),
        ("fingerprint", "x"),
        ("objects", [{"path": "../../x", "size": 1, "xxh3_128": "0" * 32}]),
        ("objects", [{"path": "/etc/passwd", "size": 1, "xxh3_128": "0" * 32}]),
        ("objects", [{"path": "summary//c", "size": 1, "xxh3_128": "0" * 32}]),
        ("objects", [{"path": "summary/./c", "size": 1, "xxh3_128": "0" * 32}]),
        ("objects", [{"path": "zarr.json", "size": -1, "xxh3_128": "0" * 32}]),
        ("source", {"url": "x", "size": -1, "sha256": "0" * 64}),
    ],
)
def test_hostile_values_are_damage_and_reach_no_path(tmp_path: Path, field: str, value: Any) -> None:
    store = make_store(tmp_path)
    commit = write_part(store, make_spec(), random_output(make_spec(), 3))
    content = commit.model_dump(mode="json") | {field: value}
    (tmp_path / PATH).write_bytes(canonical_json(content))
    for use in (store.commit, store.part):
        with pytest.raises(DataDamage):
            use("fake", "a")
    assert store.verify("fake", "a")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_commit_is_damage(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "c.json").write_bytes(data)
    with pytest.raises(DataDamage, match=r"c\.json"):
        read_commit(open_objects(str(tmp_path)), "c.json")
