"""The Zarr v3 layout of a part: what its objects are, to the byte.

Arrays: `summary` (rows, d), `spatial` (rows, h, w, d), `valid` (rows,); with codec int8 also `spatial_scale`
(rows, h, w); beside each of those with features one of checksums, such as `spatial_xxh3` (rows,); and a group
`moments`. The metadata is written by zarr-python and any Zarr v3 reader can open a part. The chunk data of
the large arrays is written and read here and in `parts`, because both are hot: an object of such an array is
a `sharding_indexed` chunk whose inner chunks, one a row and each followed by its CRC-32C, stand in row order
without gaps. So a row's place is arithmetic.

The CRC-32C is what Zarr has, and is checked by readers of Zarr. Processors sum it at some 22 GB/s, half the
speed of XXH3; so the trainer's reader checks that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import zarr
from awscrt import checksums
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from storage_schemas.features import Moments
from storage_schemas.manifest import TeacherSpec
from storage_schemas.objects import Bytes

SHARD_BYTES = 192 << 20
CRC_BYTES, CHECKSUM_BYTES = 4, 8
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
    def checksums(self) -> str:
        """Name of the array (rows,) of the rows' checksums."""
        return f"{self.name}_xxh3"

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
    checksums = {f"{array.checksums}/c/0" for array in row_arrays(spec, rows)}
    return features | checksums | {"valid/c/0", *mean_and_covariance}


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
    checksums = len(row_arrays(spec, rows)) * (rows * CHECKSUM_BYTES + CRC_BYTES)
    return features + checksums + rows + CRC_BYTES + moments


def row_checksum(values: Any) -> int:
    """XXH3-64 of a contiguous buffer."""
    return xxh3_64_intdigest(values)


def crc32c(data: Any) -> int:
    """CRC-32C of a contiguous buffer."""
    return int(checksums.crc32c(data))


def shard_index(array: RowArray, shard: int) -> Bytes:
    """What ends an object: where its rows are, of Zarr v3 `sharding_indexed`, with its own CRC-32C."""
    rows = array.rows_in(shard)
    index = np.full((array.shard_rows, 2), MISSING, dtype="<u8")
    index[:rows, 0] = np.arange(rows, dtype=np.uint64) * np.uint64(array.stride)
    index[:rows, 1] = array.stride
    data = index.view(np.uint8).reshape(-1)
    return np.concatenate([data, np.array([crc32c(data)], dtype="<u4").view(np.uint8)])


def small_objects(
    spec: TeacherSpec,
    valid: NDArray[np.bool_],
    checksums: dict[str, NDArray[np.uint64]],
    moments: dict[str, Moments],
) -> dict[str, bytes]:
    """Every object of a part, by path, but the chunks of its RowArrays: metadata, `valid`, the checksums by
    name of their array, and `moments/<summary|spatial>_<mean|covariance>` with counts as attributes.

    zarr-python makes them in memory, because in a store it would add groups to every folder above the part.
    """
    made: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(made))
    _create_row_arrays(group, spec, len(valid))
    group.create_group("moments", attributes={name: value.count for name, value in moments.items()})
    arrays: dict[str, NDArray[Any]] = {"valid": valid, **checksums}
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
