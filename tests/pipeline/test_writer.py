from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import sending
from pipeline.sending import ArraySender
from pipeline.writer import PartWriter
from storage_schemas import layout
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
        digests.append({entry.path: entry.blake3 for entry in commit.objects if "moments" not in entry.path})
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

    def flip(self: Any, *arguments: Any) -> None:
        *path, data = arguments
        changed = np.array(np.frombuffer(data, dtype=np.uint8))
        changed[len(changed) // 2] ^= 1
        whole(self, *path, changed)

    monkeypatch.setattr(owner, call, flip)
    writer, digest = begin(store)
    writer.append(random_output(writer.spec, 6))
    with pytest.raises(DataDamage, match=r"shard 'a': object .* read back with"):
        writer.commit(SOURCE, digest)
    writer.close()
    assert store.shards("fake") == store.garbage() == []


@pytest.mark.parametrize("piece", [7, 64, 1000])
@pytest.mark.parametrize("url", ["local", "memory"])
def test_objects_do_not_depend_on_the_pieces_nor_on_memory_that_is_used_again(
    tmp_path: Path, url: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 600)
    spec = make_spec()
    whole = write_part(make_store(tmp_path / "whole"), spec, random_output(spec, 13))
    monkeypatch.setattr(sending, "PIECE_BYTES", piece)
    monkeypatch.setattr(layout, "STEP_BYTES", 11)
    store = make_store(tmp_path / "pieces" if url == "local" else f"memory://pieces-{piece}")
    assert write_part(store, spec, random_output(spec, 13)).objects == whole.objects
    assert problems(store) == []


def test_an_attempt_that_ends_within_an_object_leaves_no_file(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    writer, _ = begin(store, rows=6)
    writer.append(random_output(writer.spec, 4))
    assert len(list(tmp_path.rglob("*#*"))) == 2  # of summary and spatial, which no listing shows
    assert [path for path, _ in store.objects.walk("teachers/fake/parts")] == []
    writer.close()
    assert list(tmp_path.rglob("*#*")) == []


def test_few_pieces_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 1)  # each row is an object
    live, most, lock = 0, 0, threading.Lock()
    submit, write = ArraySender._send, ObjectWriter.write

    def count_up(self: ArraySender, piece: Any) -> Any:
        nonlocal live, most
        with lock:
            live += 1
            most = max(most, live)
        return submit(self, piece)

    def count_down(self: ObjectWriter, data: Any) -> None:
        nonlocal live
        write(self, data)
        with lock:
            live -= 1

    monkeypatch.setattr(ArraySender, "_send", count_up)
    monkeypatch.setattr(ObjectWriter, "write", count_down)
    store = make_store(tmp_path)
    writer, digest = begin(store, rows=40)
    for start in range(40):
        writer.append(random_output(writer.spec, 1, start))
    writer.commit(SOURCE, digest)
    writer.close()
    assert (live, most <= 2 * sending.PIECES) == (0, True)  # of two arrays
