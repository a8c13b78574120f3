from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.shards import TarIndex, index_tar
from storage_schemas.errors import DataDamage

Members = Mapping[str, bytes]
SAMPLES: Members = {
    "000.jpg": b"\xff\xd8 first",
    "000.txt": "a cat, näher".encode(),
    "000.json": json.dumps({"sha256": "0"}).encode(),
    "001.jpg": b"second" * 200,
    "001.txt": b"",
    "folder.d/002.extra.png": b"no image of ours",
    "folder.d/002.PNG": b"third",
    "folder.d/002.cls": b" 17\n",
    "003.json": b"{}",
    "004.webp": b"",
    "._junk": b"x",
}
LONG = "long/" * 60 + "name"


def make_tar(members: Members, form: int = tarfile.USTAR_FORMAT, mtime: float = 0.0) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def index(data: bytes, folder: Path) -> TarIndex:
    path = folder / "shard.tar"
    path.write_bytes(data)
    return index_tar(path, "train-7")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


TARS = {
    "ustar": make_tar(SAMPLES),
    "pax": make_tar({**SAMPLES, f"{LONG}.jpg": b"long"}, tarfile.PAX_FORMAT, mtime=1.5),
    "gnu": make_tar({**SAMPLES, f"{LONG}.jpg": b"long"}, tarfile.GNU_FORMAT),
}


@pytest.mark.parametrize("form", TARS)
def test_every_image_is_a_sample_with_its_label_and_caption(form: str, folder: Path) -> None:
    found = index(TARS[form], folder)
    rows = [(sample.key, sample.image.name, sample.label, sample.caption) for sample in found.samples]
    expected = [
        ("000", "000.jpg", None, "a cat, näher"),
        ("001", "001.jpg", None, ""),
        ("folder.d/002", "folder.d/002.PNG", 17, None),
        ("004", "004.webp", None, None),
    ]
    assert rows == expected + ([] if form == "ustar" else [(LONG, f"{LONG}.jpg", None, None)])
    for sample in found.samples:
        image = sample.image
        content = TARS[form][image.offset : image.offset + image.nbytes]
        assert content == {**SAMPLES, f"{LONG}.jpg": b"long"}[image.name]
    assert found.size == len(TARS[form])
    assert found.sha256 == hashlib.sha256(TARS[form]).hexdigest()


def test_webdataset_s_own_writer_is_read(tmp_path: Path) -> None:
    path = tmp_path / "own.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for number in range(3):
            writer.write({"__key__": f"k{number}", "jpg": b"\xff\xd8\xff", "cls": number, "txt": "words"})
    found = index_tar(path, "own")
    assert [(s.key, s.label, s.caption) for s in found.samples] == [(f"k{n}", n, "words") for n in range(3)]


def test_folders_in_a_tar_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.jpeg").write_bytes(b"x")
    with tarfile.open(tmp_path / "out.tar", "w") as tar:
        tar.add(tmp_path / "in", arcname=".")
    assert [s.key for s in index_tar(tmp_path / "out.tar", "out").samples] == ["./deep/a"]


@pytest.mark.parametrize("form", TARS)
def test_truncation_anywhere_is_damage_unless_only_trailing_zeros_are_gone(form: str, folder: Path) -> None:
    data, whole = TARS[form], index(TARS[form], folder).samples
    content = len(data.rstrip(b"\0"))
    end = content + -content % 512  # the last member's block ends here
    for length in {
        *range(0, end + 1024, 61),
        *range(0, end + 1025, 512),
        end + 1023,
        end + 1024,
        len(data) - 1,
    }:
        if length >= end + 1024 and length % 512 == 0:
            assert index(data[:length], folder).samples == whole
            continue
        with pytest.raises(DataDamage, match="shard 'train-7'"):
            index(data[:length], folder)


@pytest.mark.parametrize("form", TARS)
def test_a_flipped_bit_in_any_header_is_damage(form: str, folder: Path) -> None:
    data = TARS[form]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = {start for member in tar for start in (member.offset, member.offset_data - 512)}
    for start in sorted(headers)[:2] + sorted(headers)[-2:]:
        for bit in range(start % 5, 512 * 8, 5):
            damaged = bytearray(data)
            damaged[start + bit // 8] ^= 1 << bit % 8
            with pytest.raises(DataDamage, match="shard 'train-7'"):
                index(bytes(damaged), folder)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(TARS)), st.data())
def test_damage_anywhere_is_damage_or_leaves_every_other_member_in_place(
    folder: Path, form: str, data: st.DataObject
) -> None:
    damaged = bytearray(TARS[form])
    whole = index(TARS[form], folder)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        found = index(bytes(damaged), folder)
    except DataDamage:
        return
    assert found.sha256 != whole.sha256
    if form != "ustar":  # a name in a record of its own has no checksum
        return
    assert sum(a != b for a, b in zip(found.samples, whole.samples, strict=True)) <= 1
    for a, b in zip(found.samples, whole.samples, strict=True):
        assert (a.image.offset, a.image.nbytes) == (b.image.offset, b.image.nbytes)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([b"", *(tar[:1536] for tar in TARS.values())]), st.binary(max_size=3000))
def test_noise_is_damage(folder: Path, start: bytes, noise: bytes) -> None:
    with pytest.raises(DataDamage):
        index(start + noise + b"\1", folder)


@pytest.mark.parametrize(
    ("members", "names"),
    [
        ({}, "no image"),
        ({"a.txt": b"words", "a.json": b"{}"}, "no image"),
        ({"a.jpg": b"1", "a.png": b"2"}, "key 'a' has a second image 'a.png'"),
        ({"a.jpg": b"1", "b.jpg": b"2", "a.JPG": b"3"}, "key 'a' has a second image 'a.JPG'"),
        ({"a.jpg": b"1", "a.cls": b"cat"}, "'a.cls' holds b'cat', not an integer"),
        ({"a.jpg": b"1", "a.cls": b"9" * 19}, "not an integer"),
        ({"a.jpg": b"1", "a.txt": b"w" * 65537}, "65537 bytes, more than 65536"),
    ],
)
def test_ambiguous_or_useless_shards_are_refused_by_name(members: Members, names: str, folder: Path) -> None:
    with pytest.raises(DataDamage, match=names) as caught:
        index(make_tar(members), folder)
    assert "shard 'train-7'" in str(caught.value)


def test_bytes_that_are_not_utf8_are_replaced_in_a_caption(folder: Path) -> None:
    found = index(make_tar({"a.jpg": b"1", "a.txt": b"caf\xe9"}), folder)
    assert found.samples[0].caption == "caf\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE])
def test_links_devices_and_sparse_members_are_refused(kind: bytes, folder: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataDamage, match=r"'a\.jpg' is a link, a device or sparse"):
        index(sink.getvalue(), folder)


def test_a_compressed_tar_is_refused_with_the_remedy(folder: Path) -> None:
    with pytest.raises(DataDamage, match="compressed with gzip"):
        index(gzip.compress(make_tar({"a.jpg": bytes(range(256)) * 9}), 0), folder)


def test_two_joined_tars_are_refused(folder: Path) -> None:
    with pytest.raises(DataDamage, match="something follows the end"):
        index(TARS["ustar"] + make_tar({"z.jpg": b"1"}), folder)


@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME]
)
def test_a_hostile_size_takes_no_memory(kind: bytes, folder: Path) -> None:
    info = tarfile.TarInfo("a.txt")
    info.type, info.size = kind, 2**62
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(10240)
    tracemalloc.start()
    with pytest.raises(DataDamage):
        index(data, folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_chain_of_headers_ends_as_damage_and_not_in_recursion(folder: Path) -> None:
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 0
    with pytest.raises(DataDamage):
        index(info.tobuf(tarfile.USTAR_FORMAT) * 3000, folder)
