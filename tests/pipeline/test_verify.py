from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.verify
from pipeline.recorder import Recorder
from pipeline.teachers import create_teacher
from pipeline.verify import verify_deep
from storage_schemas.layout import CRC_BYTES, crc32c, row_arrays, row_checksum
from storage_schemas.store import FeatureStore
from tests.recording import make_shard, make_store

SETTINGS = {"seed": 3, "resolution": 32, "blocks": 1}


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Two shards, of 8 and of 2 views, of a shortened ViT with random weights."""
    store = make_store(tmp_path / "store", views_per_image=2)
    teacher = create_teacher("timm", "test_vit", weights="random", name="vit", device="cpu", **SETTINGS)
    recorder = Recorder(store, [teacher], 4, 1)
    for name, images in (("a", 4), ("b", 1)):
        recorder.record(name, str(make_shard(tmp_path / f"{name}.tar", images)))
    return store


def tamper(store: FeatureStore, shard: str, row: int) -> None:
    """Other numbers in a row's summary, with checksums that fit."""
    commit = store.commit("vit", shard)
    array = row_arrays(store.spec("vit"), commit.rows)[0]
    assert store.objects.root is not None
    folder = store.objects.root / store.part_path("vit", shard, commit.attempt)
    path = folder / array.object_path(0)
    data = bytearray(path.read_bytes())
    values = np.full(array.row_bytes // 2, 7, np.float16).tobytes()
    record = values + crc32c(values).to_bytes(CRC_BYTES, "little")
    data[row * array.stride : (row + 1) * array.stride] = record
    path.write_bytes(data)
    path = folder / array.checksums / "c/0"
    checksums = np.frombuffer(path.read_bytes()[:-CRC_BYTES], "<u8").copy()
    checksums[row] = row_checksum(values)
    path.write_bytes(checksums.tobytes() + crc32c(checksums).to_bytes(CRC_BYTES, "little"))


def test_features_agree_with_the_teacher_made_again_and_a_tampered_row_is_named(store: FeatureStore) -> None:
    assert verify_deep(store, "vit", 100) == []
    tamper(store, "a", 5)
    [problem] = verify_deep(store, "vit", 100)
    assert problem.startswith("shard 'a', teacher 'vit', row 5: summary differs by ")


@pytest.mark.parametrize(
    ("views", "rows"), [(1, [1, 0]), (3, [3, 0]), (5, [4, 1]), (10, [8, 2]), (99, [8, 2])]
)
def test_a_sample_is_spread_over_all_shards_and_never_larger(
    store: FeatureStore, views: int, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: dict[str, list[int]] = {"a": [], "b": []}
    compare = pipeline.verify._compare

    def watch(store: FeatureStore, again: Any, commit: Any, chosen: list[int]) -> Any:
        compared[commit.shard] += chosen
        return compare(store, again, commit, chosen)

    monkeypatch.setattr(pipeline.verify, "_compare", watch)
    assert verify_deep(store, "vit", views) == []
    assert [len(compared[shard]) for shard in ("a", "b")] == rows
    assert all(len(set(chosen)) == len(chosen) for chosen in compared.values())
