"""The Zarr v3 layout of a part: what its objects are, to the byte.

Arrays: `summary` (rows, d), `spatial` (rows, h, w, d), `valid` (rows,); with codec int8 also `spatial_scale`
(rows, h, w); and a group `moments`. The metadata is written by zarr-python and any Zarr v3 reader can open a
part. The chunk data of the large arrays is written and read here and in `parts`, because both are hot: an
object of such an array is a `sharding_indexed` chunk whose inner chunks, one a row and each followed by its
CRC-32C, stand in row order without gaps. So a row's place is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zarr
from awscrt import checksums
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from storage_schemas.features import Moments
from storage_schemas.manifest import TeacherSpec
from storage_schemas.objects import Bytes, Objects

SHARD_BYTES = 192 << 20
STEP_BYTES = 128 << 10  # small enough that what was copied is still in a core's cache when it is summed
CRC_BYTES = 4
MISSING = np.uint64(2**64 - 1)  # in a Zarr shard index: no such inner chunk


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


def chunk_paths(spec: TeacherSpec, rows: int) -> set[str]:
    """Paths below a part of the objects that hold its numbers; all else is metadata."""
    features = {array.object_path(i) for array in row_arrays(spec, rows) for i in range(array.shards)}
    mean_and_covariance = [
        f"moments/{name}_{kind}"
        for name in ("summary", "spatial")
        for kind in ("mean/c/0", "covariance/c/0/0")
    ]
    return features | {"valid/c/0", *mean_and_covariance}


def metadata_paths(spec: TeacherSpec, rows: int) -> set[str]:
    """Paths below a part of its metadata: of two groups and of each array."""
    arrays = {path.split("/c/")[0] for path in chunk_paths(spec, rows)}
    return {"zarr.json", "moments/zarr.json", *(f"{array}/zarr.json" for array in arrays)}


def part_bytes(spec: TeacherSpec, rows: int) -> int:
    """Bytes of a part's numbers, exactly; its metadata are some KiB more."""
    features = sum(
        array.object_bytes(shard) for array in row_arrays(spec, rows) for shard in range(array.shards)
    )
    moments = sum(4 * (d + d * d) + 2 * CRC_BYTES for d in (spec.summary_dim, spec.spatial_dim))
    return features + rows + CRC_BYTES + moments


def crc32c(data: Any) -> int:
    """CRC-32C of a contiguous buffer."""
    return int(checksums.crc32c(data))


def checksum_object(objects: Objects, path: str) -> tuple[int, int]:
    """(size, CRC-32C) of an object as it reads back; FileNotFoundError if there is none."""
    size, checksum = 0, 0
    for piece in objects.stream(path):
        size, checksum = size + len(piece), int(checksums.crc32c(piece, checksum))
    return size, checksum


class ShardStream:
    """The bytes of one object of a RowArray, in order, laid a piece at a time into memory that is used again.

    send: called with each full piece, and with the last; gives the memory to go on in. `checksum` is the
    CRC-32C of all that was laid, put together from those of the rows, so that it costs no pass of its own.
    """

    def __init__(self, array: RowArray, shard: int, piece: Bytes, send: Callable[[Bytes], Bytes]) -> None:
        self.path = array.object_path(shard)
        self.nbytes = array.object_bytes(shard)
        self.room = self._rows = array.rows_in(shard)
        self.checksum = 0
        self._array = array
        self._dtype = np.dtype(array.dtype).newbyteorder("<")
        self._piece, self._used, self._send = piece, 0, send

    def add(self, values: NDArray[Any]) -> None:
        """The next rows, n ...; the last one of the object ends it."""
        rows = np.ascontiguousarray(values, dtype=self._dtype).reshape(len(values), -1).view(np.uint8)
        for row in rows:
            self._lay(np.array([self._lay(row)], dtype="<u4").view(np.uint8))
        self.room -= len(rows)
        if self.room == 0:
            self._lay(self._index())
            if self._used:
                self._send(self._piece[: self._used])

    def _lay(self, data: Bytes) -> int:
        """Copy into the pieces, a step at a time that the cache holds; the data's CRC-32C."""
        checksum = 0
        for start in range(0, len(data), STEP_BYTES):
            step = data[start : start + STEP_BYTES]
            while len(step):
                place = self._piece[self._used : self._used + len(step)]
                count = len(place)
                place[:] = step[:count]
                found = crc32c(place)
                checksum = checksums.combine_crc32c(checksum, found, count)
                self.checksum = checksums.combine_crc32c(self.checksum, found, count)
                self._used += count
                step = step[count:]
                if self._used == len(self._piece):
                    self._piece, self._used = self._send(self._piece), 0
        return checksum

    def _index(self) -> Bytes:
        """Of Zarr v3 `sharding_indexed`, with its checksum."""
        stride, rows = self._array.stride, self._rows
        index = np.full((self._array.shard_rows, 2), MISSING, dtype="<u8")
        index[:rows, 0] = np.arange(rows, dtype=np.uint64) * np.uint64(stride)
        index[:rows, 1] = stride
        data = index.view(np.uint8).reshape(-1)
        return np.concatenate([data, np.array([crc32c(data)], dtype="<u4").view(np.uint8)])


def small_objects(
    spec: TeacherSpec, valid: NDArray[np.bool_], moments: dict[str, Moments]
) -> dict[str, bytes]:
    """Every object of a part, by path, but the chunks of its RowArrays: metadata, `valid`, and
    `moments/<summary|spatial>_<mean|covariance>` with counts as attributes.

    zarr-python makes them in memory, because in a store it would add groups to every folder above the part.
    """
    made: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(made))
    _create_row_arrays(group, spec, len(valid))
    group.create_group("moments", attributes={name: value.count for name, value in moments.items()})
    arrays: dict[str, NDArray[Any]] = {"valid": valid}
    for name, value in moments.items():
        arrays[f"moments/{name}_mean"] = value.mean.astype(np.float32)
        arrays[f"moments/{name}_covariance"] = value.covariance.astype(np.float32)
    for name, data in arrays.items():
        config = {"write_empty_chunks": True}
        group.create_array(name, data=data, chunks=data.shape, compressors=[Crc32cCodec()], config=config)  # type: ignore[arg-type]
    return {path: buffer.to_bytes() for path, buffer in sorted(made.items())}


def _create_row_arrays(group: zarr.Group, spec: TeacherSpec, rows: int) -> None:
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
