from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage_schemas.errors import DataDamage, UserError
from storage_schemas.objects import (
    Objects,
    RangeReader,
    local_file,
    open_objects,
    split_url,
)

_numbers = count()


@pytest.fixture(params=["path", "file", "relative", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Objects:
    monkeypatch.chdir(tmp_path)
    urls = {
        "path": f"{tmp_path}/with a space #1 100%",
        "file": f"file://{tmp_path}/with%20a%20space",
        "relative": "some/where",
        "memory": f"memory://objects-{next(_numbers)}",
    }
    return open_objects(urls[request.param], create=True)


def test_what_is_put_is_there(objects: Objects) -> None:
    objects.put("a/b/c.bin", np.arange(5, dtype=np.uint8))
    objects.put("a/d.bin", b"xyz")
    objects.put("e.bin", b"")
    assert objects.get("a/b/c.bin") == bytes(range(5))
    assert b"".join(objects.stream("a/b/c.bin")) == bytes(range(5))
    assert (objects.size("a/d.bin"), objects.size("e.bin"), objects.size("nothing")) == (3, 0, None)
    assert objects.walk() == [("a/b/c.bin", 5), ("a/d.bin", 3), ("e.bin", 0)]
    assert objects.walk("a/b") == [("a/b/c.bin", 5)]
    assert objects.names("a") == (["b"], ["d.bin"])
    assert objects.names("nothing") == ([], [])
    assert [bytes(piece) for piece in objects.get_ranges("a/b/c.bin", [0, 3], 2)] == [b"\0\1", b"\3\4"]
    objects.delete("a/b")
    assert objects.walk("a") == [("a/d.bin", 3)]
    objects.delete("nothing")
    with pytest.raises(FileNotFoundError):
        objects.get("a/b/c.bin")


@pytest.mark.parametrize("put", [Objects.put, Objects.put_if_absent])
def test_when_a_put_returns_a_power_loss_takes_nothing_of_it(
    tmp_path: Path, put: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def note(descriptor: int) -> None:
        synced.append(re.sub(r"#\d+$", "#", str(Path(f"/proc/self/fd/{descriptor}").readlink())))

    monkeypatch.setattr(os, "fsync", note)
    put(open_objects(str(tmp_path)), "a/b/c", b"data")
    folders = [str(tmp_path), f"{tmp_path}/a"]  # of what was made in them
    assert synced == [*folders, f"{tmp_path}/a/b/c#", f"{tmp_path}/a/b"]


def test_put_if_absent_keeps_the_first(objects: Objects) -> None:
    assert objects.put_if_absent("a/x", b"one")
    assert not objects.put_if_absent("a/x", b"two")
    assert objects.get("a/x") == b"one"


def test_of_many_writers_at_once_one_wins(objects: Objects) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: objects.put_if_absent("x", bytes([i])), range(32)))
    assert sum(won) == 1
    assert objects.get("x") == bytes([won.index(True)])


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://host/x", "scheme 'http'"),
        ("s4://bucket", "scheme 's4'"),
        ("file://relative/x", "absolute path"),
        ("file:x", "absolute path"),
        ("/no/such/folder", "is no folder"),
        ("/dev/null", "is no folder"),
    ],
)
def test_urls_that_cannot_be_are_refused_by_name(url: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        open_objects(url, field="store.url")
    assert f"store.url: {url!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_place_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match="cannot be a folder"):
            open_objects(str(tmp_path / path), create=True)


def test_splitting_and_joining_urls() -> None:
    assert split_url("s3://bucket/a/b.tar") == ("s3://bucket/a", "b.tar")
    assert split_url("b.tar") == (".", "b.tar")
    assert split_url("/b.tar") == ("/", "b.tar")
    assert split_url("file:///b.tar") == ("file:///", "b.tar")
    assert open_objects("file:///").root == Path("/")


def test_a_remote_tar_has_a_local_copy_while_it_is_read() -> None:
    url = f"memory://tars-{next(_numbers)}"
    open_objects(url).put("a.tar", b"content")
    with local_file(f"{url}/a.tar") as path:
        assert path.read_bytes() == b"content"
    assert not path.exists()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_readers_close_what_they_open(objects: Objects) -> None:
    objects.put("x", bytes(range(100)))
    before = open_descriptors()
    for _ in range(3):
        with RangeReader(objects, "x") as reader:
            assert reader.read(10, 5) == bytes(range(10, 15))
            assert reader.size() == 100
        RangeReader(objects, "x").read(0, 1)
    with pytest.raises(FileNotFoundError):
        RangeReader(objects, "nothing").size()
    assert open_descriptors() == before


def test_reading_past_the_end_is_damage(objects: Objects) -> None:
    objects.put("x", bytes(10))
    with RangeReader(objects, "x") as reader, pytest.raises(DataDamage, match=r"x: 3 of 4 bytes at 7"):
        reader.read(7, 4)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(b"x")
    with local_file("~/in/a.tar") as path:
        assert path == tmp_path / "in" / "a.tar"
    open_objects("~/out", create=True).put("b", b"y")
    assert (tmp_path / "out" / "b").read_bytes() == b"y"
    with pytest.raises(UserError, match="is no folder"):
        open_objects("~nobody-of-this-name/out")
