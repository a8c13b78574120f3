from __future__ import annotations

from pathlib import Path

import pytest

from storage_schemas.errors import UserError
from storage_schemas.objects import open_objects
from storage_schemas.sources import expand_shards, shard_name


def test_a_shard_is_named_as_its_tar() -> None:
    assert shard_name("s3://bucket/a/b.c.tar") == "b.c"


def test_shards_are_found_wherever_objects_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in ("memory://sources", "~/in"):
        open_objects(url, create=True).put("a.tar", b"x")
        assert expand_shards([f"{url}/*.tar"]) == {"a": f"{url}/a.tar"}


def test_shards_are_found_by_globs_and_braces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my shards"
    folder.mkdir()
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "notes.txt", "a-1.tar.part"):
        (folder / name).touch()
    everything = expand_shards([f"{folder}/*.tar"])
    assert list(everything) == ["a-0", "a-1", "b-0"]
    assert expand_shards([f"{folder}/a-{{0..1}}.tar"]).keys() == {"a-0", "a-1"}
    assert expand_shards([f"{folder}/{{a,b}}-0.tar"]).keys() == {"a-0", "b-0"}
    assert expand_shards(["my shards/?-0.tar"]) == {n: f"my shards/{n}.tar" for n in ("a-0", "b-0")}
    assert expand_shards([f"{folder}/*.tar", f"{folder}/a-0.tar"]) == everything
    assert list(expand_shards([f"file://{tmp_path}/my%20shards/*.tar"])) == list(everything)


def test_shards_that_cannot_be_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("x/a.tar", "y/a.tar", "y/b c.tar", "y/.tar", "y/c.zip"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for pattern, reason in {
        "x/*.zip": "does not name a .tar file",
        "x/b.tar": "matches no tar",
        "x/b*.tar": "matches no tar",
        "z/*.tar": "is no folder",
        "x/{a.tar": "unbalanced braces",
        "y/b c.tar": "letters, digits",
        "y/.tar": "letters, digits",
        "{x,y}/a.tar": "have the same name 'a'",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            expand_shards([f"{tmp_path}/{pattern}"], "data.train")
        assert str(caught.value).startswith("data.train: ")
