"""Objects under a URL: the same few calls for a local folder, S3, GCS and memory.

Only calls that an object store has are used: whole puts, uploads in parts, put-if-absent, range reads,
listings. A put is atomic and lasts: a killed process leaves an object whole or absent (a local one with
perhaps `<object>#<n>` beside it, which no listing shows), and when a put returns, a power loss takes nothing
of it: local files and their folders are fsynced.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, MemoryStore, from_url
from zarr.storage import ObjectStore

from storage_schemas.errors import DataDamage, UserError

StorageError = BaseError  # of an object store or a file system; one that is no missing object, and may pass
PIECE_BYTES = 4 << 20  # of a remote object that is read to its end
STEP_BYTES = 256 << 10  # of a file: what looks at the bytes next finds them in a core's cache
PART_BYTES = 8 << 20  # of an upload in parts; S3 takes no less than 5 MiB
IOV_MAX = 1024  # buffers that one call writes

Bytes = NDArray[np.uint8]
_memory: dict[str, MemoryStore] = {}


class Objects:
    """The objects below one URL. Paths are relative, with `/`. `root` is the folder of local files."""

    def __init__(self, url: str, store: Any, root: Path | None = None) -> None:
        self.url = url
        self.root = root
        self._store = store

    def get(self, path: str) -> bytes:
        """The whole object; FileNotFoundError if there is none."""
        return bytes(obstore.get(self._store, path).bytes())

    def get_ranges(self, path: str, starts: Sequence[int], nbytes: int) -> list[Any]:
        """Buffers of `nbytes` bytes from each start (shorter where the object ends), in few requests."""
        return list(obstore.get_ranges(self._store, path, starts=starts, lengths=[nbytes] * len(starts)))

    def put(self, path: str, data: bytes) -> None:
        """Write a whole object."""
        if self.root is None:
            obstore.put(self._store, path, data)
        else:
            self._put_file(path, data, replace=True)

    def open_writer(self, path: str) -> ObjectWriter:
        """To write an object in pieces; it is there, whole, after `finish`."""
        return ObjectWriter(self._store, self.root, path)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write, unless there is such an object already; says whether this call wrote it.

        False does not mean that another writer won: an earlier try's answer may be lost. Read back.
        """
        if self.root is not None:
            return self._put_file(path, data, replace=False)
        try:
            obstore.put(self._store, path, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def _put_file(self, path: str, data: bytes, *, replace: bool) -> bool:
        writer = self.open_writer(path)
        try:
            writer.write([data])
            return writer.finish(replace=replace)
        finally:
            writer.abort()

    def stream(self, path: str) -> Iterator[bytes]:
        """The object in pieces; FileNotFoundError if there is none."""
        if self.root is None:
            yield from map(bytes, obstore.get(self._store, path).stream(min_chunk_size=PIECE_BYTES))
            return
        # obstore's stream of a file is many times slower
        with (self.root / path).open("rb", buffering=0) as file:
            while piece := file.read(STEP_BYTES):
                yield piece

    def size(self, path: str) -> int | None:
        """Bytes of an object, None if there is none."""
        try:
            return int(obstore.head(self._store, path)["size"])
        except FileNotFoundError:
            return None

    def walk(self, prefix: str = "") -> list[tuple[str, int]]:
        """(path, bytes) of every object below a folder, sorted."""
        found = obstore.list(self._store, prefix or None).collect()
        return sorted((entry["path"], int(entry["size"])) for entry in found)

    def names(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Names of (folders, objects) directly in a folder, sorted."""
        found = obstore.list_with_delimiter(self._store, folder or None)
        folders = sorted(path.rsplit("/", 1)[-1] for path in found["common_prefixes"])
        return folders, sorted(entry["path"].rsplit("/", 1)[-1] for entry in found["objects"])

    def staged(self, folder: str = "") -> list[str]:
        """Local files directly in a folder that a put is at work on, or that it left when it was killed."""
        if self.root is None:
            return []
        return sorted(str(path.relative_to(self.root)) for path in (self.root / folder).glob("*#*"))

    def modified(self, path: str) -> float:
        """Unix time of the newest object below a folder, counting local ones being put; 0 if none."""
        if self.root is not None:
            place = self.root / path
            files = (file for file in (place, *place.rglob("*")) if not file.is_dir())
            try:
                return max((file.stat().st_mtime for file in files), default=0.0)
            except FileNotFoundError:  # it was put, or removed, at this moment
                return time.time()
        found = obstore.list(self._store, path).collect()
        return max((entry["last_modified"].timestamp() for entry in found), default=0.0)

    def delete(self, path: str) -> None:
        """Remove a staged file, or all objects below a folder."""
        below = [found for found, _ in self.walk(path)]
        if below:
            obstore.delete(self._store, below)
        if self.root is not None and (self.root / path).is_file():
            (self.root / path).unlink(missing_ok=True)
        elif self.root is not None:
            shutil.rmtree(self.root / path, ignore_errors=True)

    def zarr(self) -> ObjectStore[Any]:
        """The same objects as Zarr reads them."""
        return ObjectStore(self._store, read_only=True)

    def free_bytes(self) -> int | None:
        """Free space of the local file system that holds the objects; None where there is no such limit."""
        if self.root is None:
            return None
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


class ObjectWriter:
    """One object, in pieces, each behind the last. A process that is killed before `finish` leaves none.

    Local: a staging file of the form that LocalStore's listings pass over, which `finish` gives its name.
    """

    def __init__(self, store: Any, root: Path | None, path: str) -> None:
        self._remote, self._descriptor = None, -1
        if root is None:
            self._remote = obstore.open_writer(store, path, buffer_size=PART_BYTES, max_concurrency=2)
            return
        self._path = root / path
        self._staged = self._path.with_name(f"{self._path.name}#{secrets.randbits(63)}")
        _make_lasting_folder(self._path.parent)
        self._descriptor = os.open(self._staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, pieces: Sequence[bytes | Bytes]) -> None:
        """The next bytes, from one or more buffers."""
        if self._remote is not None:
            for piece in pieces:
                self._remote.write(bytes(piece))
            return
        for first in range(0, len(pieces), IOV_MAX):
            _write_all(self._descriptor, pieces[first : first + IOV_MAX])

    def finish(self, *, replace: bool = True) -> bool:
        """Make the object be there, to last. False if there is one already that it must not replace."""
        if self._remote is not None:
            self._remote.close()
            return True
        os.fsync(self._descriptor)
        if replace:
            self._staged.rename(self._path)
        else:
            try:
                self._path.hardlink_to(self._staged)
            except FileExistsError:
                return False
            self._staged.unlink()
        os.close(self._descriptor)
        self._descriptor = -1
        _sync_folder(self._path.parent)
        return True

    def abort(self) -> None:
        """Leave nothing, if it is not finished."""
        self._remote = None  # an upload that is never closed makes no object
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._staged.unlink(missing_ok=True)


def _write_all(descriptor: int, pieces: Sequence[bytes | Bytes]) -> None:
    left = sum(map(len, pieces)) - os.writev(descriptor, pieces)  # type: ignore[arg-type]
    if left:  # a full disk takes some, and says so when asked for more
        rest = memoryview(b"".join(map(bytes, pieces)))
        while left:
            left -= os.write(descriptor, rest[-left:])


def _make_lasting_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_lasting_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_objects(url: str, *, create: bool = False, field: str = "url") -> Objects:
    """The objects below a local path, or a file://, s3://, gs:// or memory:// URL. UserError names `field`.

    A memory:// URL is a place of its own in this process: memory://a/b is not below memory://a.
    """
    scheme = urlsplit(url).scheme
    if scheme in ("", "file"):
        path = unquote(url[len("file://") :]) or "/" if scheme else os.path.expanduser(url)  # noqa: PTH111
        root = Path(path).absolute()
        if scheme and not url.startswith("file:///"):
            raise UserError(f"{field}: {url!r} must be file:// and an absolute path")
        if create:
            _make_folder(root, url, field)
        if not root.is_dir():
            raise UserError(f"{field}: {url!r} is no folder")
        return Objects(url, LocalStore(root), root)
    if scheme == "memory":
        return Objects(url, _memory.setdefault(url.rstrip("/"), MemoryStore()))
    if scheme in ("s3", "gs"):
        try:
            return Objects(url, from_url(url))
        except BaseError as error:
            raise UserError(f"{field}: {url!r} cannot be opened: {str(error).splitlines()[0]}") from error
    raise UserError(
        f"{field}: {url!r} has scheme {scheme!r}; use a local path, file://, s3://, gs:// or memory://"
    )


def _make_folder(root: Path, url: str, field: str) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{field}: {url!r} cannot be a folder: {error.strerror}") from error


def split_url(url: str) -> tuple[str, str]:
    """The folder and the name of an object's URL."""
    folder, separator, name = url.rpartition("/")
    if folder in ("", "file://"):
        folder += "/" if separator else "."
    return folder, name


@contextmanager
def local_file(url: str) -> Iterator[Path]:
    """A path to the object's bytes: the file itself if it is local, else a temporary copy."""
    folder, name = split_url(url)
    objects = open_objects(folder)
    if objects.root is not None:
        yield objects.root / name
        return
    with NamedTemporaryFile(suffix=f"-{name}") as copy:
        for piece in objects.stream(name):
            copy.write(piece)
        copy.flush()
        yield Path(copy.name)


class RangeReader:
    """Reads one object by ranges; a local file through its descriptor, straight into the caller's memory.

    Safe to use from several threads. A file that is replaced while it is open goes on being read as it was.
    """

    def __init__(self, objects: Objects, path: str) -> None:
        self._objects = objects
        self._path = path
        self._descriptor = -1
        if objects.root is not None:
            self._descriptor = os.open(objects.root / path, os.O_RDONLY | os.O_CLOEXEC)

    def size(self) -> int:
        """Bytes of the object."""
        if self._descriptor >= 0:
            return os.fstat(self._descriptor).st_size
        size = self._objects.size(self._path)
        if size is None:
            raise FileNotFoundError(self._path)
        return size

    def read(self, start: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `start`; DataDamage where the object ends before."""
        if self._descriptor >= 0:
            data = os.pread(self._descriptor, nbytes, start)
        else:
            data = bytes(self._objects.get_ranges(self._path, [start], nbytes)[0])
        self._require(start, len(data), nbytes)
        return data

    def read_into(self, starts: Sequence[int], targets: Sequence[Bytes]) -> Iterator[int]:
        """Fill targets[i] (equal sizes for all i) with the bytes from starts[i] on.

        Yields each i as it is filled, so that a checksum finds the bytes still in the processor's cache.
        """
        nbytes = len(targets[0])
        if self._descriptor >= 0:
            for i, start in enumerate(starts):
                count = os.preadv(self._descriptor, (targets[i],), start)  # type: ignore[arg-type]
                self._require(start, count, nbytes)
                yield i
            return
        for i, buffer in enumerate(self._objects.get_ranges(self._path, starts, nbytes)):
            record = np.frombuffer(buffer, dtype=np.uint8)
            self._require(starts[i], len(record), nbytes)
            targets[i][:] = record
            yield i

    def _require(self, start: int, count: int, wanted: int) -> None:
        if count != wanted:
            raise DataDamage(f"{self._objects.url}/{self._path}: {count} of {wanted} bytes at {start}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file descriptor, if there is one."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()
