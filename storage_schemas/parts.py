"""The Zarr v3 layout of a part: one teacher's features for one source shard.

Arrays: `summary` (rows, d), `spatial` (rows, h, w, d), `valid` (rows,); with codec int8 also `spatial_scale`
(rows, h, w); and a group `moments`. The metadata is written by zarr-python and any Zarr v3 reader can open a
part. The chunk data of the large arrays is written and read here, because both are hot: an object of such an
array is a `sharding_indexed` chunk whose inner chunks, one a row and each followed by its CRC-32C, stand in
row order without gaps. So a row's place is arithmetic, and reading it is one system call into the caller's
memory and one checksum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import zarr
from awscrt import checksums
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec

from storage_schemas.commits import Commit
from storage_schemas.errors import DataDamage
from storage_schemas.features import Moments, dequantize
from storage_schemas.manifest import TeacherSpec
from storage_schemas.objects import Bytes, Objects, RangeReader

SHARD_BYTES = 192 << 20
CRC_BYTES = 4
MISSING = np.uint64(2**64 - 1)  # in a Zarr shard index: no such inner chunk

Rows = Sequence[NDArray[Any]] | NDArray[Any]  # contiguous arrays of one row each, or one array of them


@dataclass(frozen=True, slots=True)
class RowArray:
    """An array of a part with one row an inner chunk: where each row's bytes stand."""

    name: str
    dtype: Literal["float16", "int8"]
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Views of the source shard."""
        return self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's values."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def stride(self) -> int:
        """Bytes from one row to the next in an object: the values and their checksum."""
        return self.row_bytes + CRC_BYTES

    @property
    def shard_rows(self) -> int:
        """Rows of one object: up to 192 MiB, all rows if they fit."""
        return max(1, min(self.rows, SHARD_BYTES // self.stride))

    @property
    def shards(self) -> int:
        """How many objects hold the array."""
        return -(-self.rows // self.shard_rows)

    def rows_in(self, shard: int) -> int:
        """Rows that an object really holds; only the last may be short."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)

    def object_path(self, shard: int) -> str:
        """Path of an object below the part."""
        return f"{self.name}/c/{shard}" + "/0" * (len(self.shape) - 1)

    def object_bytes(self, shard: int) -> int:
        """Size of an object: rows with checksums, then the shard index with its own."""
        return self.rows_in(shard) * self.stride + self.shard_rows * 16 + CRC_BYTES


def row_arrays(spec: TeacherSpec, rows: int) -> tuple[RowArray, ...]:
    """The arrays of a part that hold features."""
    grid = (spec.grid.height, spec.grid.width)
    summary = RowArray("summary", "float16", (rows, spec.summary_dim))
    if spec.codec == "fp16":
        return summary, RowArray("spatial", "float16", (rows, *grid, spec.spatial_dim))
    levels = RowArray("spatial", "int8", (rows, *grid, spec.spatial_dim))
    return summary, levels, RowArray("spatial_scale", "float16", (rows, *grid))


def part_bytes(spec: TeacherSpec, rows: int) -> int:
    """Bytes of a part's chunk data: exact for the features, without the few KiB of metadata."""
    features = sum(
        array.object_bytes(shard) for array in row_arrays(spec, rows) for shard in range(array.shards)
    )
    moments = sum(4 * (d + d * d) for d in (spec.summary_dim, spec.spatial_dim))
    return features + rows + moments


def part_objects(spec: TeacherSpec, rows: int) -> int:
    """How many objects a part is: chunk data and metadata."""
    arrays = row_arrays(spec, rows)
    small = 2 + 2 * 5  # the metadata of two groups; `valid` and four arrays of moments
    return sum(array.shards + 1 for array in arrays) + small


def crc32c(data: Any) -> int:
    """CRC-32C of a contiguous buffer."""
    return int(checksums.crc32c(data))


class ShardBuffer:
    """The bytes of one object of a RowArray, filled in place."""

    def __init__(self, array: RowArray, shard: int) -> None:
        self.array = array
        self.path = array.object_path(shard)
        self.rows = array.rows_in(shard)
        self._bytes: Bytes = np.empty(array.object_bytes(shard), dtype=np.uint8)
        record = np.dtype(
            [("values", np.dtype(array.dtype).newbyteorder("<"), array.shape[1:]), ("crc", "<u4")]
        )
        self._records = self._bytes[: self.rows * array.stride].view(record)

    @property
    def values(self) -> NDArray[Any]:
        """(rows, ...) to be written to."""
        values: NDArray[Any] = self._records["values"]
        return values

    def seal(self) -> Bytes:
        """Add the checksums and the shard index (Zarr v3 `sharding_indexed`, index at the end); the whole
        object.
        """
        stride, row_bytes = self.array.stride, self.array.row_bytes
        for row in range(self.rows):
            self._records["crc"][row] = crc32c(self._bytes[row * stride : row * stride + row_bytes])
        index = np.full((self.array.shard_rows, 2), MISSING, dtype="<u8")
        index[: self.rows, 0] = np.arange(self.rows, dtype=np.uint64) * np.uint64(stride)
        index[: self.rows, 1] = stride
        tail = self._bytes[self.rows * stride :]
        tail[:-CRC_BYTES] = index.view(np.uint8).reshape(-1)
        tail[-CRC_BYTES:] = np.array([crc32c(index)], dtype="<u4").view(np.uint8)
        return self._bytes


def write_metadata(objects: Objects, path: str, spec: TeacherSpec, rows: int) -> None:
    """The group and the metadata of its RowArrays; their objects are put beside them."""
    group = zarr.create_group(objects.zarr(read_only=False), path=path)
    for array in row_arrays(spec, rows):
        cells = array.shape[1:]
        group.create_array(
            array.name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(1, *cells),
            shards=(array.shard_rows, *cells),
            serializer=BytesCodec(),
            compressors=[Crc32cCodec()],
            fill_value=float("nan") if array.dtype == "float16" else 0,
        )


def write_small(objects: Objects, path: str, valid: NDArray[np.bool_], moments: dict[str, Moments]) -> None:
    """`valid`, and `moments/<summary|spatial>_<mean|covariance>` with counts as attributes; checksummed."""
    group = zarr.open_group(objects.zarr(read_only=False), path=path, mode="r+")
    counts = {name: value.count for name, value in moments.items()}
    arrays: dict[str, NDArray[Any]] = {"valid": valid}
    group.create_group("moments", attributes=counts)
    for name, value in moments.items():
        arrays[f"moments/{name}_mean"] = value.mean.astype(np.float32)
        arrays[f"moments/{name}_covariance"] = value.covariance.astype(np.float32)
    for name, data in arrays.items():
        config = {"write_empty_chunks": True}
        group.create_array(name, data=data, chunks=data.shape, compressors=[Crc32cCodec()], config=config)  # type: ignore[arg-type]


class Part:
    """One committed part. `summary`, `spatial` and `valid` are Zarr arrays; `read` is the trainer's fast way
    in.

    With codec int8, `spatial` holds levels; `read` gives fp16 for either codec. Threads may share a part.
    """

    def __init__(self, objects: Objects, path: str, spec: TeacherSpec, commit: Commit) -> None:
        self.commit = commit
        self.spec = spec
        self._objects = objects
        self._path = path
        self._arrays = {array.name: array for array in row_arrays(spec, commit.rows)}
        self._files: dict[str, RangeReader] = {}

    @cached_property
    def group(self) -> zarr.Group:
        """The Zarr group."""
        return zarr.open_group(self._objects.zarr(read_only=True), path=self._path, mode="r")

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
        array = self.group[name]
        assert isinstance(array, zarr.Array)
        return array

    def moments(self) -> dict[str, Moments]:
        """Of the valid rows' `summary` vectors, and of a sample of their `spatial` tokens."""
        group = self.group["moments"]
        assert isinstance(group, zarr.Group)
        read = {
            name: np.asarray(self._array(f"moments/{name}")[...], dtype=np.float64)
            for name in ("summary_mean", "summary_covariance", "spatial_mean", "spatial_covariance")
        }
        counts = {name: int(str(group.attrs[name])) for name in ("summary", "spatial")}
        return {
            name: Moments(counts[name], read[f"{name}_mean"], read[f"{name}_covariance"]) for name in counts
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
        raw = [target.reshape(-1).view(np.uint8) for target in out]  # row_bytes each
        assert [len(target) for target in raw] == [array.row_bytes] * len(rows), array
        stored = np.empty((len(rows), CRC_BYTES), dtype=np.uint8)
        shards = np.asarray(rows, dtype=np.int64) // array.shard_rows
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard).tolist()
            starts = [rows[place] % array.shard_rows * array.stride for place in places]
            file = self._file(array, int(shard))
            targets, trailers = [raw[place] for place in places], [stored[place] for place in places]
            for record in file.read_records(starts, targets, trailers):
                self._check(name, rows[places[record]], targets[record], trailers[record])

    def _check(self, name: str, row: int, values: Bytes, checksum: Bytes) -> None:
        wanted, found = int(checksum.view("<u4")[0]), crc32c(values)
        if wanted != found:
            raise DataDamage(
                f"{self._place} row {row} of {name!r}: crc32c stored {wanted:08x}, read {found:08x}"
            )

    def _file(self, array: RowArray, shard: int) -> RangeReader:
        path = array.object_path(shard)
        file = self._files.get(path)
        if file is None:
            try:
                file = RangeReader(self._objects, f"{self._path}/{path}")
            except FileNotFoundError as error:
                raise DataDamage(f"{self._place} object {path!r} is missing") from error
            if file.size() != array.object_bytes(shard):
                raise DataDamage(
                    f"{self._place} object {path!r}: {file.size()} bytes, not {array.object_bytes(shard)}"
                )
            self._files[path] = file
        return file

    @property
    def _place(self) -> str:
        return f"shard {self.commit.shard!r}, teacher {self.commit.teacher!r}, attempt {self.commit.attempt}:"

    def close(self) -> None:
        """Let go of the open files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
