from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_schemas.errors import DataDamage, UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.replay import CropReplay
from trainer.groups import Group, Schedule
from trainer.groups import batches as group_batches
from trainer.order import global_batch
from trainer.reader import Batch, TargetReader

SIZE = (32, 40)
SEED = 5

shared_store = settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def open_reader(recorded: Any, **kwargs: Any) -> TargetReader:
    teachers = kwargs.pop("teachers", ("cnn", "vit"))
    return TargetReader(recorded.store, recorded.sources(), teachers, kwargs.pop("size", SIZE), **kwargs)


def batches(
    reader: TargetReader, first: int, count: int, size: int, rank: int = 0, ranks: int = 1
) -> list[Batch]:
    return list(islice(stream(reader, size, first, rank, ranks), count))


def stream(reader: TargetReader, size: int, first: int = 0, rank: int = 0, ranks: int = 1) -> Any:
    """The batches of a single group, in the order of SEED."""
    group = Group("all", reader, reader.order(SEED, block_rows=4, window_blocks=3), size, share=1)
    return group_batches([group], Schedule([1], ranks), first, rank)


def assert_equal(a: Batch, b: Batch) -> None:
    assert np.array_equal(a.views, b.views)
    assert torch.equal(a.images, b.images)
    for teacher in a.targets:
        for kind in ("summary", "spatial"):
            left, right = getattr(a.targets[teacher], kind), getattr(b.targets[teacher], kind)
            assert torch.equal(left.view(torch.int16), right.view(torch.int16))  # NaN included
        assert torch.equal(a.valid[teacher], b.valid[teacher])


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        torch.cat([part.images for part in parts]),
        {
            name: TeacherOutput(
                torch.cat([part.targets[name].summary for part in parts]),
                torch.cat([part.targets[name].spatial for part in parts]),
            )
            for name in parts[0].targets
        },
        {name: torch.cat([part.valid[name] for part in parts]) for name in parts[0].valid},
        np.concatenate([part.views for part in parts]),
    )


def test_every_row_is_what_zarr_and_the_replay_say(recorded: Any) -> None:
    reader = open_reader(recorded)
    seen = 0
    for batch in reader.in_order(4):
        for place, (index, row) in enumerate(batch.views.tolist()):
            shard = reader.shards[index]
            replay = CropReplay(shard, recorded.sources()[shard], recorded.store.views(shard), 2**26)
            assert torch.equal(batch.images[place], replay.crop(row, SIZE))
            for name, target in batch.targets.items():
                part = recorded.store.part(name, shard)
                assert bool(batch.valid[name][place]) == bool(part.valid[row])
                for kind in ("summary", "spatial"):
                    np.testing.assert_array_equal(
                        getattr(target, kind)[place].numpy(), getattr(part, kind)[row]
                    )
        seen += len(batch.views)
    assert seen == len(reader)


def test_images_at_a_teachers_resolution_give_its_features_again(recorded: Any) -> None:
    """So the student is shown the very pixels that the teacher saw."""
    for name, teacher in recorded.teachers.items():
        spec = teacher.spec
        reader = open_reader(recorded, teachers=[name], size=(spec.height, spec.width))
        for batch in reader.in_order(8):
            live = teacher(batch.images)
            assert batch.valid[name].all()
            for kind in ("summary", "spatial"):
                stored, now = getattr(batch.targets[name], kind), getattr(live, kind)
                torch.testing.assert_close(stored.float(), now, rtol=2e-3, atol=1e-4)


@given(first=st.integers(0, 40), ranks=st.sampled_from([2, 4]))
@shared_store
def test_the_shares_of_ranks_are_the_global_batch_at_any_resume_point(
    recorded: Any, first: int, ranks: int
) -> None:
    reader = open_reader(recorded)
    whole = batches(reader, first, 2, size=8)
    shares = [batches(reader, first, 2, 8, rank, ranks) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        assert_equal(joined([share[step] for share in shares]), batch)
    order = reader.order(SEED, 4, 3)
    for step, batch in enumerate(whole, start=first):
        picks = global_batch(order, step, 8)
        assert_equal(reader.load(picks), batch)


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (4, 3)])
def test_threads_change_nothing(recorded: Any, threads: int, prefetch: int) -> None:
    usual = batches(open_reader(recorded), 0, 4, size=8)
    other = batches(open_reader(recorded, threads=threads, prefetch=prefetch), 0, 4, size=8)
    for a, b in zip(usual, other, strict=True):
        assert_equal(a, b)


def test_an_epoch_shows_every_view_with_features_once(recorded: Any) -> None:
    reader = open_reader(recorded)
    order = reader.order(SEED, 4, 3)
    seen = [tuple(view) for batch in batches(reader, 0, len(order), size=1) for view in batch.views.tolist()]
    with_features = {
        (index, row)
        for index, shard in enumerate(reader.shards)
        for row in range(recorded.store.commit("cnn", shard).rows)
        if any(recorded.store.part(name, shard).valid[row] for name in reader.teachers)
    }
    assert len(seen) == len(set(seen))
    assert set(seen) == with_features


def test_rows_of_one_teacher_are_masked_and_rows_of_none_left_out(recorded: Any) -> None:
    both = open_reader(recorded)
    rows = sum(recorded.store.commit("cnn", shard).rows for shard in both.shards)
    assert len(both) == rows - recorded.store.manifest.views_per_image  # of the image that is none
    valid = joined(list(both.in_order(8))).valid
    assert valid["cnn"].all()
    assert 0 < int(valid["vit"].sum()) < len(both)
    assert len(open_reader(recorded, teachers=["vit"])) == int(valid["vit"].sum())
    batch = joined(list(both.in_order(8)))
    assert batch.targets["vit"].spatial[~batch.valid["vit"]].isnan().all()
    assert batch.targets["vit"].spatial[batch.valid["vit"]].isfinite().all()


def test_view_numbers_can_be_chosen(recorded: Any) -> None:
    reader = open_reader(recorded)
    views = recorded.store.manifest.views_per_image
    for batch in reader.in_order(3, view=1):
        assert set((batch.views[:, 1] % views).tolist()) == {1}


def test_no_more_batches_are_loaded_than_threads_and_prefetch(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = threading.Semaphore(0)
    begun: list[int] = []
    load = TargetReader.load

    def counted(self: TargetReader, picks: Any) -> Batch:
        begun.append(1)
        batch = load(self, picks)
        loaded.release()
        return batch

    monkeypatch.setattr(TargetReader, "load", counted)
    reader = open_reader(recorded, threads=2, prefetch=3)
    coming = stream(reader, 4)
    for taken in range(1, 8):
        next(coming)
        while sum(1 for _ in iter(lambda: loaded.acquire(timeout=0.05), False)):
            pass
        assert len(begun) <= taken + 5 - 1
    coming.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


# Damage


def image_place(recorded: Any, shard: str, row: int) -> tuple[int, int]:
    table = recorded.store.views(shard)
    return table["offset"][row].as_py(), table["nbytes"][row].as_py()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def read_all(recorded: Any) -> None:
    for _ in open_reader(recorded).in_order(4):
        pass


def test_one_changed_byte_of_an_image_is_refused_by_shard_and_row(own_copy: Any) -> None:
    offset, nbytes = image_place(own_copy, "train-1", 6)
    flip(own_copy.folder / "shards/train-1.tar", offset + nbytes // 2)
    with pytest.raises(DataDamage, match=r"shard 'train-1' row 6: image has digest \w+, recorded \w+"):
        read_all(own_copy)


def test_a_tar_of_another_size_is_refused_before_anything_is_read(own_copy: Any) -> None:
    path = own_copy.folder / "shards/train-1.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(UserError, match=r"shard 'train-1' .* recorded\s+from a tar of \d+; restore"):
        open_reader(own_copy)


def test_another_tar_of_the_same_size_is_refused(own_copy: Any, write_tar: Any, jpeg: Any) -> None:
    path = own_copy.folder / "shards/train-1.tar"
    size = path.stat().st_size
    write_tar(path, [{"__key__": f"{i}", "jpg": jpeg(90 + i, 40, 40)} for i in range(3)])
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(DataDamage, match=r"shard 'train-1'"):
        read_all(own_copy)


def test_a_damaged_feature_is_named_by_teacher_shard_and_row(own_copy: Any) -> None:
    commit = own_copy.store.commit("cnn", "train-0")
    part = own_copy.folder / "store" / own_copy.store.part_path("cnn", "train-0", commit.attempt)
    flip(part / "spatial/c/0/0/0/0", 4 * (2 * 2 * 256 * 2 + 4) + 10)
    with pytest.raises(DataDamage, match=r"shard 'train-0', teacher 'cnn', .* row 4 of 'spatial': xxh3"):
        read_all(own_copy)


def test_a_damaged_view_table_is_refused(own_copy: Any) -> None:
    path = own_copy.folder / "store/views/train-0.parquet"
    flip(path, path.stat().st_size // 3)
    with pytest.raises(DataDamage, match=r"shard 'train-0'"):
        read_all(own_copy)


def test_teachers_of_different_tars_are_refused(own_copy: Any) -> None:
    path = own_copy.folder / "store/teachers/vit/commits/train-0.json"
    commit = own_copy.store.commit("vit", "train-0")
    source = commit.source.model_copy(update={"sha256": "0" * 64})
    path.write_text(commit.model_copy(update={"source": source}).model_dump_json())
    with pytest.raises(DataDamage, match="its teachers cnn, vit were recorded from different tars"):
        open_reader(own_copy)


def test_what_is_not_recorded_is_named_with_what_is(own_copy: Any) -> None:
    with pytest.raises(UserError, match=r"teacher: 'sam' is not in store .* there: cnn, vit"):
        open_reader(own_copy, teachers=["sam"])
    (own_copy.folder / "store/teachers/vit/commits/train-1.json").unlink()
    with pytest.raises(
        UserError, match=r"shard: 'train-1' is not recorded for teacher 'vit' .*; there: held-out, train-0$"
    ):
        open_reader(own_copy)


def test_the_digest_changes_with_what_is_read(recorded: Any, own_copy: Any) -> None:
    digest = open_reader(recorded).digest()
    assert open_reader(own_copy).digest() == digest
    assert open_reader(recorded, teachers=["cnn"]).digest() != digest
    one = TargetReader(recorded.store, recorded.sources("train-0"), ("cnn", "vit"), SIZE)
    assert one.digest() != digest


def test_an_order_of_no_views_names_teachers_and_store(
    recorded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = TargetReader(recorded.store, recorded.sources(), ["cnn", "vit"], (32, 32))
    monkeypatch.setattr(reader, "_rows", [])
    with pytest.raises(
        UserError, match=r"data\.train: no view has features from cnn, vit in store '.*store'"
    ):
        reader.order(0, 4, 3)
