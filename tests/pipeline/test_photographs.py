from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pipeline.photographs import HELD_OUT, write_photograph_shards
from pipeline.shards import index_tar
from storage_schemas.errors import UserError
from storage_schemas.pixels import decode

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def test_every_photograph_decodes_and_is_in_one_shard(tmp_path: Path) -> None:
    train, held_out = (index_tar(path, path.stem).samples for path in write_photograph_shards(tmp_path))
    assert sorted(sample.key for sample in held_out) == sorted(HELD_OUT)
    assert len(train) >= 10
    assert not {sample.key for sample in train} & set(HELD_OUT)
    for name, samples in (("train-00000.tar", train), ("held-out-00000.tar", held_out)):
        data = (tmp_path / name).read_bytes()
        for sample in samples:
            image = decode(data[sample.image.offset : sample.image.offset + sample.image.nbytes], 2**22)
            assert min(image.shape[1:]) >= 300
            assert sample.caption == sample.key.replace("_", " ")


def test_shards_are_the_same_bytes_anywhere_and_left_alone_when_they_are_there(tmp_path: Path) -> None:
    first, second = write_photograph_shards(tmp_path / "a"), write_photograph_shards(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    before = [path.stat().st_ino for path in first]
    first[1].write_bytes(b"damaged")
    again = write_photograph_shards(tmp_path / "a")
    assert again == first
    assert again[0].stat().st_ino == before[0]
    assert again[1].read_bytes() == second[1].read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"train-00000.tar", "held-out-00000.tar"}


def test_a_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image scikit-learn"):
        write_photograph_shards(tmp_path)
