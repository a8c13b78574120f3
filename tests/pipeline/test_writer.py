from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import sending
from pipeline.sending import ArraySender
from pipeline.writer import PartWriter
from storage_schemas import layout, objects
from storage_schemas.commits import SourceTar
from storage_schemas.errors import DataDamage
from storage_schemas.objects import Objects, ObjectWriter
from storage_schemas.store import FeatureStore
from tests.recording import make_spec, make_store, problems, random_output, view_table, write_part

SOURCE = SourceTar(url="a.tar", size=1, sha256="0" * 64)


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_a_part_does_not_depend_on_the_batches_it_came_in(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 600)
    spec, digests = make_spec(codec=codec), []
    for batch in (1, 4, 13):
        commit = write_part(make_store(tmp_path / str(batch)), spec, random_output(spec, 13), batch=batch)
        digests.append(
            {entry.path: entry.xxh3_128 for entry in commit.objects if "moments" not in entry.path}
        )
    assert digests[0] == digests[1] == digests[2]


def begin(store: FeatureStore, rows: int = 6) -> tuple[PartWriter, str]:
    spec = make_spec()
    store.add_teacher(spec)
    digest = store.put_views("a", view_table(rows))
    writer = PartWriter(store, spec, "a", rows)
    return writer, digest


def test_the_attempt_that_loses_leaves_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    writers = [begin(store) for _ in range(2)]
    for writer, _ in writers:
        writer.append(random_output(writer.spec, 6))
    commits = [writer.commit(SOURCE, digest) for writer, digest in writers]
    for writer, _ in writers:
        writer.close()
    assert [commit is not None for commit in commits] == [True, False]
    assert store.garbage() == []
    assert problems(store) == []
    assert len(list((tmp_path / "teachers/fake/parts").iterdir())) == 1


def test_an_attempt_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    writer, _ = begin(store, rows=600)
    for _ in range(3):
        writer.append(random_output(writer.spec, 100))
    writer.close()
    assert store.garbage() == []
    assert [path for path, _ in store.objects.walk("teachers/fake/parts")] == []


def test_an_answer_that_is_lost_and_never_comes_keeps_what_may_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    writer, digest = begin(store)
    writer.append(random_output(writer.spec, 6))
    put = Objects.put_if_absent

    def lose_the_answer(self: Objects, path: str, data: bytes) -> bool:
        put(self, path, data)
        raise OSError("connection reset")

    monkeypatch.setattr(Objects, "put_if_absent", lose_the_answer)
    with pytest.raises(OSError, match="connection reset"):
        writer.commit(SOURCE, digest)
    writer.close()
    assert store.shards("fake") == ["a"]
    assert problems(store) == []


@pytest.mark.parametrize("call", ["put", "write"])
@pytest.mark.parametrize("url", ["local", "memory"])
def test_what_does_not_read_back_as_written_is_not_committed(
    tmp_path: Path, url: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path if url == "local" else f"memory://flipped-{call}")
    owner: Any = Objects if call == "put" else ObjectWriter
    whole = getattr(owner, call)

    def flipped(data: Any) -> Any:
        changed = np.array(np.frombuffer(data, dtype=np.uint8))
        changed[len(changed) // 2] ^= 1
        return changed

    def flip(self: Any, *arguments: Any) -> Any:
        *path, data = arguments
        return whole(self, *path, flipped(data) if call == "put" else [flipped(data[0]), *data[1:]])

    writer, digest = begin(store)
    monkeypatch.setattr(owner, call, flip)
    writer.append(random_output(writer.spec, 6))
    with pytest.raises(DataDamage, match=r"shard 'a': object .* read back with"):
        writer.commit(SOURCE, digest)
    writer.close()
    assert store.shards("fake") == store.garbage() == []


@pytest.mark.parametrize("url", ["local", "memory"])
@pytest.mark.parametrize("step", [1, 100, 300])
def test_objects_do_not_depend_on_how_many_rows_are_sent_at_once(
    tmp_path: Path, url: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 600)
    spec = make_spec()
    whole = write_part(make_store(tmp_path / "whole"), spec, random_output(spec, 13))
    monkeypatch.setattr(sending, "STEP_BYTES", step)
    monkeypatch.setattr(objects, "IOV_MAX", 3)
    store = make_store(tmp_path / "steps" if url == "local" else f"memory://steps-{step}")
    assert write_part(store, spec, random_output(spec, 13)).objects == whole.objects
    assert problems(store) == []


@pytest.mark.parametrize("taken", [1, 7, 50])
def test_a_disk_that_takes_less_than_it_is_given_is_given_the_rest(
    tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    whole = write_part(make_store(tmp_path / "whole"), spec, random_output(spec, 13))
    write = os.write

    def take_some(descriptor: int, pieces: list[Any]) -> int:
        return write(descriptor, b"".join(map(bytes, pieces))[:taken])

    monkeypatch.setattr(os, "writev", take_some)
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:taken]))
    store = make_store(tmp_path / "some")
    assert write_part(store, spec, random_output(spec, 13)).objects == whole.objects


def test_an_attempt_that_ends_within_an_object_leaves_no_file(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    writer, _ = begin(store, rows=6)
    writer.append(random_output(writer.spec, 4))
    assert len(list(tmp_path.rglob("*#*"))) == 2  # of summary and spatial, which no listing shows
    assert [path for path, _ in store.objects.walk("teachers/fake/parts")] == []
    writer.close()
    assert list(tmp_path.rglob("*#*")) == []


def test_few_rows_wait_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, most, lock = 0, 0, threading.Lock()
    add, write = ArraySender.add, ObjectWriter.write

    def count_up(self: ArraySender, values: Any) -> None:
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        add(self, values)

    def slowly(self: ObjectWriter, pieces: Any) -> None:
        nonlocal waiting
        time.sleep(0.01)
        write(self, pieces)
        with lock:
            waiting -= 1

    monkeypatch.setattr(ArraySender, "add", count_up)
    monkeypatch.setattr(ObjectWriter, "write", slowly)
    writer, _ = begin(make_store(tmp_path), rows=40)
    for start in range(20):
        writer.append(random_output(writer.spec, 1, start))
    writer.close()
    assert most <= 2 * (sending.AHEAD + 1)  # of two arrays
