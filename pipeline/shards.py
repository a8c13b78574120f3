"""A source shard's samples, from a tar whose every byte is accounted for.

Python's tarfile takes a damaged header for the end of the archive, and misses one truncation in ten. So only
its parser of single headers is used, and they must tile the file: members follow one another without a gap
from byte 0, padding is zero, after the last come at least two blocks of zeros, and only zeros to the end.

What no checksum inside a tar covers can still change unseen: a flipped bit in a caption, in an image, or in
the long name that a PAX or GNU record holds. The digest of the whole file, kept in every commit, tells such a
tar from the one that was recorded.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from storage_schemas.errors import DataDamage

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
TEXT_LIMIT = 64 * 1024
_HEADER_LIMIT = 1024 * 1024
_PIECE = 1024 * 1024
_BLOCK = tarfile.BLOCKSIZE
_REGULAR = frozenset({tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE})
_PAX = frozenset({tarfile.XHDTYPE, tarfile.XGLTYPE})
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")
# The standard's keywords, and those of vendors (VENDOR.keyword). Anything else is a flipped bit.
_PAX_KEYWORD = re.compile(
    rb"(path|size|linkpath|atime|ctime|mtime|uid|gid|uname|gname|comment|charset|hdrcharset|[A-Z]+\..+)"
)
_KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)
_INTEGER = re.compile(rb"\s*([+-]?[0-9]{1,18})\s*")


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a tar: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a shard, with the integer of its `.cls` and the text of its `.txt`, if there are any."""

    key: str
    image: Member
    label: int | None
    caption: str | None


@dataclass(frozen=True, slots=True)
class TarIndex:
    """A shard's samples in the order of their images, and the size and SHA-256 of the whole tar."""

    samples: list[Sample]
    size: int
    sha256: str


def index_tar(path: Path, name: str) -> TarIndex:
    """Read a webdataset tar once, from end to end; DataDamage, naming the shard, where anything is amiss.

    The members of a sample share a key: the name up to the first dot after the last slash. Members other
    than images, `.cls` and `.txt`, and keys without an image, are passed over. Bytes of a caption that are
    not UTF-8 are replaced; a `.cls` that is no integer, or a second image, label or caption of one key, is
    damage.
    """
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    captions: dict[str, str] = {}
    seen: Mapping[str, Mapping[str, object]] = {"image": images, "cls": labels, "txt": captions}
    with path.open("rb") as file:
        tar = _Tar(file, name)
        for member, content in tar.members():
            key, extension = _split_name(member.name)
            place = "image" if extension in IMAGE_EXTENSIONS else extension
            if key in seen.get(place, {}):
                raise tar.damage(f"key {key!r} has a second {place} {member.name!r}")
            if place == "image":
                images[key] = member
            elif place == "cls":
                labels[key] = tar.integer(member, content)
            elif place == "txt":
                captions[key] = content.decode("utf-8", "replace")
    if not images:
        raise tar.damage("there is no image (jpg, jpeg, png, webp) in it")
    samples = [Sample(key, image, labels.get(key), captions.get(key)) for key, image in images.items()]
    return TarIndex(samples, tar.position, tar.digest.hexdigest())


def _split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension; two empty strings for a name that webdataset passes over."""
    match = _KEY_AND_EXTENSION.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


class _Tar:
    """Reads a tar forwards, checks what it passes, and hashes it all."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.position = 0
        self.digest = hashlib.sha256()
        self._file = file
        self._name = name
        self._size = os.fstat(file.fileno()).st_size

    def damage(self, message: str) -> DataDamage:
        return DataDamage(f"shard {self._name!r}, byte {self.position}: {message}")

    def members(self) -> Iterator[tuple[Member, bytes]]:
        """Regular members in order, with the content of `.cls` and `.txt` and nothing of the others."""
        name: str | None = None
        size: int | None = None
        while (header := self._header()) is not None:
            if header.type in _PAX:
                path, length = self._pax(header.size)
                if header.type == tarfile.XGLTYPE and (path, length) != (None, None):
                    raise self.damage("a global header names or sizes every member")
                name, size = name if path is None else path, size if length is None else length
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                name = self._text(self._small(header.size).split(b"\0", 1)[0])
            elif header.type == tarfile.DIRTYPE and header.size == 0:
                name, size = None, None
            elif header.type in _REGULAR:
                member = Member(
                    header.name if name is None else name,
                    self.position,
                    header.size if size is None else size,
                )
                yield member, self._content(member)
                name, size = None, None
            else:
                raise self.damage(f"{header.name!r} is a link, a device or sparse: store plain files")
        if name is not None or size is not None:
            raise self.damage("the last header stands alone")
        self._end()

    def integer(self, member: Member, content: bytes) -> int:
        match = _INTEGER.fullmatch(content)
        if match is None:
            raise self.damage(f"{member.name!r} holds {content[:20]!r}, not an integer")
        return int(match[1])

    def _header(self) -> tarfile.TarInfo | None:
        """The next header, or None at the block of zeros that ends the archive."""
        start = self.position
        block = self._take(_BLOCK)
        if start == 0:
            self._refuse_compressed(block)
        if not block.strip(b"\0"):
            return None
        # tarfile reads the checksum leniently, so that some bits of its own field could flip unseen.
        checksum = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
        if block[148:156] not in {b"%06o\0 " % checksum, b"%06o \0" % checksum, b"%07o\0" % checksum}:
            raise self.damage(f"the header at byte {start} is damaged: its checksum does not hold")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except (tarfile.HeaderError, ValueError) as error:
            raise self.damage(f"the header at byte {start} cannot be read: {error}") from error
        if header.size < 0:
            raise self.damage(f"{header.name!r} says that it has {header.size} bytes")
        return header

    def _refuse_compressed(self, block: bytes) -> None:
        for magic, kind in _COMPRESSED.items():
            if block.startswith(magic):
                raise self.damage(
                    f"the tar is compressed with {kind}: images are read by offset, store it plain"
                )

    def _content(self, member: Member) -> bytes:
        _, extension = _split_name(member.name)
        if extension not in {"cls", "txt"}:
            self._pass(member.nbytes)
            self._padding()
            return b""
        if member.nbytes > TEXT_LIMIT:
            raise self.damage(f"{member.name!r} has {member.nbytes} bytes, more than {TEXT_LIMIT}")
        return self._small(member.nbytes)

    def _pax(self, nbytes: int) -> tuple[str | None, int | None]:
        """`path` and `size` of a PAX header's records, each of which is `length keyword=value newline`."""
        body, position = self._small(nbytes), 0
        path, size = None, None
        while position < len(body):
            length = _PAX_LENGTH.match(body, position)
            end = position + int(length[1]) if length else 0
            record = body[length.end() : end] if length else b""
            keyword, equals, value = record[:-1].partition(b"=")
            if record[-1:] != b"\n" or end > len(body) or not equals or not _PAX_KEYWORD.fullmatch(keyword):
                raise self.damage("a PAX header is damaged")
            if keyword.startswith(b"GNU.sparse"):
                raise self.damage("a member is sparse: store plain files")
            if keyword == b"path":
                path = self._text(value)
            elif keyword == b"size":
                if not re.fullmatch(rb"[0-9]{1,18}", value):
                    raise self.damage(f"a PAX header says that a member has {value[:20]!r} bytes")
                size = int(value)
            position = end
        return path, size

    def _text(self, name: bytes) -> str:
        return name.decode("utf-8", "backslashreplace")

    def _small(self, nbytes: int) -> bytes:
        if nbytes > _HEADER_LIMIT:
            raise self.damage(f"a header of {nbytes} bytes, more than {_HEADER_LIMIT}")
        content = self._take(nbytes)
        self._padding()
        return content

    def _require(self, nbytes: int) -> None:
        left = self._size - self.position
        if nbytes > left:
            raise self.damage(f"the tar is truncated: {nbytes} bytes should follow, {left} do")

    def _take(self, nbytes: int) -> bytes:
        self._require(nbytes)
        data = self._file.read(nbytes)
        if len(data) != nbytes:
            raise self.damage("the tar became shorter while it was read")
        self.position += nbytes
        self.digest.update(data)
        return data

    def _pass(self, nbytes: int) -> None:
        self._require(nbytes)
        while nbytes:
            nbytes -= len(self._take(min(nbytes, _PIECE)))

    def _padding(self) -> None:
        if self._take(-self.position % _BLOCK).strip(b"\0"):
            raise self.damage("the padding after a member is not zero")

    def _end(self) -> None:
        """The rest of the file: at least one more block of zeros, whole blocks, nothing else."""
        if self._take(_BLOCK).strip(b"\0"):
            raise self.damage("a single block of zeros stands between members")
        while rest := self._size - self.position:
            if self._take(min(rest, _PIECE)).strip(b"\0"):
                raise self.damage("something follows the end of the archive: damage, or a joined tar")
        if self._size % _BLOCK:
            raise self.damage(f"{self._size} bytes are not whole blocks of {_BLOCK}")
