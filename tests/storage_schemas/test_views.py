from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage_schemas.errors import DataDamage
from storage_schemas.views import VIEW_SCHEMA, decode_views, encode_views
from tests.recording import view_table


def test_views_round_trip_and_have_one_encoding() -> None:
    tables = [view_table(500, caption="é" * 5000, key="x"), view_table(3, status="too_large")]
    table = pa.concat_tables(tables)
    data = encode_views(table)
    assert decode_views(data, "a").equals(table)
    assert encode_views(table.combine_chunks()) == encode_views(decode_views(data, "a")) == data
    assert pq.read_table(io.BytesIO(data)).equals(table)


def test_a_flipped_bit_is_found_or_changes_nothing() -> None:
    table = view_table(200, caption="words that differ")
    data = encode_views(table)
    random = np.random.default_rng(0)
    found = 0
    for bit in random.integers(0, len(data) * 8, 300).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            decoded = decode_views(bytes(damaged), "a")
        except DataDamage as error:
            found += "'a'" in str(error)
        else:
            found += decoded.equals(table)
    assert found >= 290  # the footer has no checksum of its own: the commit's digest of the file is for that


def test_other_columns_are_damage() -> None:
    sink = io.BytesIO()
    pq.write_table(view_table(2).drop_columns(["label"]), sink)
    with pytest.raises(DataDamage, match="columns"):
        decode_views(sink.getvalue(), "a")
    assert "label" in VIEW_SCHEMA.names
