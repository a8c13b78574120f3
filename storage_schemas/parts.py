"""Reading and checking a part: one teacher's features for one source shard, whose layout is in `layout`.

As Zarr arrays, or by `read_*`: one system call for a row into the caller's memory, and one checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from storage_schemas.commits import Commit, ObjectDigest, digest_object
from storage_schemas.errors import DataDamage
from storage_schemas.features import Moments, dequantize
from storage_schemas.layout import (
    CHECKSUM_BYTES,
    CRC_BYTES,
    RowArray,
    chunk_paths,
    crc32c,
    metadata_paths,
    row_arrays,
    row_checksum,
)
from storage_schemas.manifest import TeacherSpec
from storage_schemas.objects import Objects, RangeReader

OPEN_FILES = 4  # of a part: a trainer has many parts open, and a block of its order is in one or two files

Rows = Sequence[NDArray[Any]] | NDArray[Any]  # contiguous arrays of one row each, or one array of them


class Part:
    """One committed part. `summary`, `spatial` and `valid` are Zarr arrays; `read` is the trainer's fast way
    in.

    With codec int8, `spatial` holds levels; `read` gives fp16 for either codec. Threads may share a part.
    """

    def __init__(self, objects: Objects, path: str, spec: TeacherSpec, commit: Commit) -> None:
        self.commit = commit
        self.spec = spec
        self.objects = objects
        self.path = path
        self._arrays = {array.name: array for array in row_arrays(spec, commit.rows)}
        self._files: dict[str, RangeReader] = {}  # the one that was used last stands last
        self._files_lock = Lock()
        self._row_checksums: dict[str, NDArray[np.uint64]] = {}

    @cached_property
    def group(self) -> zarr.Group:
        """The Zarr group."""
        return zarr.open_group(self.objects.zarr(), path=self.path, mode="r")

    @property
    def summary(self) -> zarr.Array[Any]:
        """(rows, d) float16."""
        return self._array("summary")

    @property
    def spatial(self) -> zarr.Array[Any]:
        """(rows, h, w, d) float16, or int8 levels of `spatial_scale` (rows, h, w)."""
        return self._array("spatial")

    @property
    def valid(self) -> zarr.Array[Any]:
        """(rows,) bool."""
        return self._array("valid")

    def _array(self, name: str) -> zarr.Array[Any]:
        return _array(self.group, name)

    def moments(self) -> dict[str, Moments]:
        """Of the valid rows' `summary` vectors, and of a sample of their `spatial` tokens.

        DataDamage unless their objects are those committed: Zarr takes a missing chunk for zeros.
        """
        for line in _find_object_damage(self, "moments/"):
            raise DataDamage(line)
        group = zarr.open_group(self.objects.zarr(), path=f"{self.path}/moments", mode="r")
        return {
            name: Moments(
                int(str(group.attrs[name])),
                np.asarray(_array(group, f"{name}_mean")[...], dtype=np.float64),
                np.asarray(_array(group, f"{name}_covariance")[...], dtype=np.float64),
            )
            for name in ("summary", "spatial")
        }

    def read_summary(self, rows: Sequence[int], out: Rows) -> None:
        """Fill out[i], (d,) float16, with rows[i], every row checked; DataDamage names a row that does not
        hold.
        """
        self._read("summary", rows, out)

    def read_spatial(self, rows: Sequence[int], out: Rows) -> None:
        """Fill out[i], (h, w, d) float16, with rows[i], every row checked; DataDamage names one that does not
        hold.
        """
        if self.spec.codec == "fp16":
            self._read("spatial", rows, out)
            return
        levels = np.empty((len(rows), *self._arrays["spatial"].shape[1:]), dtype=np.int8)
        scale = np.empty(levels.shape[:-1], dtype=np.float16)
        self._read("spatial", rows, levels)
        self._read("spatial_scale", rows, scale)
        for target, values in zip(out, dequantize(levels, scale), strict=True):
            target[...] = values

    def _read(self, name: str, rows: Sequence[int], out: Rows) -> None:
        array = self._arrays[name]
        assert all(0 <= row < array.rows for row in rows), (array, rows)
        assert all(target.flags.c_contiguous for target in out), "rows are read into the caller's own memory"
        raw = [target.reshape(-1).view(np.uint8) for target in out]  # row_bytes each
        assert [len(target) for target in raw] == [array.row_bytes] * len(rows), array
        places = np.asarray(rows, dtype=np.int64)
        stored = self._checksums(array)[places].tolist()
        shards = places // array.shard_rows
        starts = places % array.shard_rows * array.stride
        for shard in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == shard)
            file, here = self._file(array, shard), chosen.tolist()
            for record in file.read_into(starts[chosen].tolist(), [raw[place] for place in here]):
                place = here[record]
                found = row_checksum(raw[place])
                if found != stored[place]:
                    raise DataDamage(
                        f"{self.where} row {rows[place]} of {name!r}: xxh3 stored {stored[place]:016x}, "
                        f"read {found:016x}"
                    )

    def _checksums(self, array: RowArray) -> NDArray[np.uint64]:
        found = self._row_checksums.get(array.name)
        if found is None:
            found = self._row_checksums[array.name] = self._read_checksums(array)
        return found

    def _read_checksums(self, array: RowArray) -> NDArray[np.uint64]:
        path = f"{array.checksums}/c/0"
        try:
            data = self.objects.get(f"{self.path}/{path}")
        except FileNotFoundError as error:
            raise DataDamage(f"{self.where} object {path!r} is missing") from error
        values, crc = data[:-CRC_BYTES], int.from_bytes(data[-CRC_BYTES:], "little")
        if len(values) != array.rows * CHECKSUM_BYTES or crc32c(values) != crc:
            raise DataDamage(f"{self.where} object {path!r} is damaged: {len(data)} bytes, crc32c {crc:08x}")
        return np.frombuffer(values, dtype="<u8")

    def _file(self, array: RowArray, shard: int) -> RangeReader:
        path = array.object_path(shard)
        with self._files_lock:
            file = self._files.pop(path, None) or self._open_file(path, array.object_bytes(shard))
            self._files[path] = file
            if len(self._files) > OPEN_FILES:
                del self._files[next(iter(self._files))]  # it closes when the last thread lets go of it
        return file

    def _open_file(self, path: str, nbytes: int) -> RangeReader:
        try:
            file = RangeReader(self.objects, f"{self.path}/{path}")
            size = file.size()
        except FileNotFoundError as error:
            raise DataDamage(f"{self.where} object {path!r} is missing") from error
        if size != nbytes:
            raise DataDamage(f"{self.where} object {path!r}: {size} bytes, not {nbytes}")
        return file

    @property
    def where(self) -> str:
        """The words that begin what is said of its damage."""
        return f"shard {self.commit.shard!r}, teacher {self.commit.teacher!r}, attempt {self.commit.attempt}:"

    def close(self) -> None:
        """Let go of the open files."""
        with self._files_lock:
            self._files.clear()


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array


def find_damage(part: Part) -> list[str]:
    """Every digest and row count of a part; one line for each thing that does not hold."""
    return list(_find_object_damage(part)) or _find_row_damage(part)


def _find_object_damage(part: Part, below: str = "") -> Iterator[str]:
    """A line for each object, of those whose path begins so, that is not there as committed."""
    committed = {entry.path: entry for entry in part.commit.objects}
    wanted = chunk_paths(part.spec, part.commit.rows) | metadata_paths(part.spec, part.commit.rows)
    for name in sorted(wanted | committed.keys()):
        if name.startswith(below):
            entry = committed.get(name)
            problem = _compare(part, entry) if entry else f"the commit lacks object {name!r}"
            if problem:
                yield f"{part.where} {problem}"


def _compare(part: Part, entry: ObjectDigest) -> str | None:
    path = f"{part.path}/{entry.path}"
    try:
        size, digest = digest_object(part.objects, path)
    except FileNotFoundError:
        return f"object {path!r} is missing"
    if (size, digest) == (entry.size, entry.xxh3_128):
        return None
    return f"object {path!r} has {size} bytes, xxh3_128 {digest}; committed {entry.size}, {entry.xxh3_128}"


def _find_row_damage(part: Part) -> list[str]:
    commit = part.commit
    invalid = np.flatnonzero(~np.asarray(part.valid[...], dtype=bool)).tolist()
    rows = {array.shape[0] for array in (part.valid, part.summary, part.spatial)}
    if (rows, tuple(invalid)) == ({commit.rows}, commit.invalid_rows):
        return []
    return [
        f"{part.where} arrays of {sorted(rows)} rows, {len(invalid)} invalid; "
        f"committed {commit.rows}, {len(commit.invalid_rows)}"
    ]
