from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from pipeline.photographs import HELD_OUT, _find_photographs, write_photograph_shards
from pipeline.shards import index_tar
from storage_schemas.errors import UserError
from storage_schemas.pixels import decode

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def test_every_tile_decodes_and_is_in_one_shard(tmp_path: Path) -> None:
    pixels: Counter[str] = Counter()
    photographs: dict[str, set[str]] = {}
    for path in write_photograph_shards(tmp_path):
        data = path.read_bytes()
        for sample in index_tar(path, path.stem).samples:
            pixels_of_tile = decode(
                data[sample.image.offset : sample.image.offset + sample.image.nbytes], 2**22
            )
            assert min(pixels_of_tile.shape[1:]) >= 100
            name = sample.key.rsplit("-", 2)[0]
            assert sample.caption is not None
            assert sample.caption.startswith(name.replace("_", " "))
            pixels[name] += pixels_of_tile[0].numel()
            photographs.setdefault(path.stem, set()).add(name)
    whole = {}
    for _, path in _find_photographs():
        with Image.open(path) as image:
            whole[path.stem] = image.width * image.height
    assert pixels == whole
    assert photographs["held-out-whole-00000"] == set(HELD_OUT)
    assert photographs["train-00000"] == photographs["held-out-tiles-00000"] == set(whole) - set(HELD_OUT)


def test_shards_are_the_same_bytes_anywhere_and_left_alone_when_they_are_there(tmp_path: Path) -> None:
    first, second = write_photograph_shards(tmp_path / "a"), write_photograph_shards(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    before = [path.stat().st_ino for path in first]
    first[1].write_bytes(b"damaged")
    again = write_photograph_shards(tmp_path / "a")
    assert again == first
    assert again[0].stat().st_ino == before[0]
    assert again[1].read_bytes() == second[1].read_bytes()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in second}


def test_a_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-image scikit-learn"):
        write_photograph_shards(tmp_path)
