"""The view table: one row a view, in tar order, the same for every teacher.

Row i of a shard's view table is row i of every array recorded for that shard. That is the whole join.
"""

from __future__ import annotations

import io
from enum import StrEnum

import pyarrow as pa
import pyarrow.parquet as pq

from storage_schemas.errors import DataDamage


class ViewStatus(StrEnum):
    """What became of a view's image. Anything but `ok` has no crop, and no features from any teacher."""

    OK = "ok"
    UNDECODABLE = "undecodable"
    TOO_LARGE = "too_large"
    UNSUPPORTED = "unsupported"


VIEW_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("member", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("nbytes", pa.int64(), nullable=False),
        pa.field("digest", pa.binary(16), nullable=False),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("view", pa.int32(), nullable=False),
        pa.field("top", pa.int32()),
        pa.field("left", pa.int32()),
        pa.field("crop_height", pa.int32()),
        pa.field("crop_width", pa.int32()),
        pa.field("hflip", pa.bool_()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("label", pa.int64()),
        pa.field("caption", pa.string()),
    ]
)
"""`offset` and `nbytes` are of the image member inside its tar; `digest` is the first 16 bytes of its
SHA-256. Sizes and crops are in source pixels, null where the image could not be read. `label` is of `.cls`,
`caption` of `.txt`.
"""


def encode_views(table: pa.Table) -> bytes:
    """Parquet bytes of a view table: zstd, page checksums, the same bytes for the same rows."""
    sink = io.BytesIO()
    pq.write_table(table.cast(VIEW_SCHEMA), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def decode_views(data: bytes, shard: str) -> pa.Table:
    """The view table of `shard`; raises DataDamage where a page checksum or the schema does not hold."""
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataDamage(f"view table of shard {shard!r}: {error}") from error
    if not table.schema.equals(VIEW_SCHEMA):
        raise DataDamage(f"view table of shard {shard!r}: its columns are not those of this schema version")
    return table
