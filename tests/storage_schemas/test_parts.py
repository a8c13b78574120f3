from __future__ import annotations

import shutil
from itertools import count
from pathlib import Path

import numpy as np
import obstore
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_schemas import layout
from storage_schemas.errors import DataDamage
from storage_schemas.features import Moments, TeacherOutput, dequantize, pack, sample_tokens
from storage_schemas.layout import chunk_paths, crc32c, metadata_paths, part_bytes, row_arrays
from storage_schemas.parts import Part
from storage_schemas.store import FeatureStore
from tests.recording import flip_bit, make_spec, make_store, random_output, write_part

ROWS = 11
_numbers = count()


@pytest.fixture(params=[10**9, 600, 1], ids=["one object", "several, the last short", "a row an object"])
def shard_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(layout, "SHARD_BYTES", request.param)
    return int(request.param)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "a store") if request.param == "local" else f"memory://parts-{next(_numbers)}"


def expected(output: TeacherOutput, codec: str) -> tuple[np.ndarray, np.ndarray]:
    packed = pack(output, codec)  # type: ignore[arg-type]
    return packed.summary, packed.restored()


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_zarr_reads_what_was_written(url: str, codec: str, shard_bytes: int) -> None:
    store, spec = make_store(url), make_spec(codec=codec)
    output = random_output(spec, ROWS)
    output.summary[3] = torch.inf
    write_part(store, spec, output)
    part = store.part("fake", "a")
    summary, spatial = expected(output, codec)
    found = part.spatial[...]
    if codec == "int8":
        found = dequantize(found, part.group["spatial_scale"][...])  # type: ignore[index, arg-type]
    np.testing.assert_array_equal(part.summary[...], summary)
    np.testing.assert_array_equal(found, spatial)
    assert part.valid[...].tolist() == [row != 3 for row in range(ROWS)]
    assert part.commit.invalid_rows == (3,)
    assert part.spatial.chunks == (1, 3, 2, 6)
    array = row_arrays(spec, ROWS)[1]
    assert array.shards == {10**9: 1, 600: -(-ROWS // (600 // array.stride)), 1: ROWS}[shard_bytes]


def test_a_part_is_what_the_layout_says(tmp_path: Path, shard_bytes: int) -> None:
    for codec in ("fp16", "int8"):
        store, spec = make_store(tmp_path / codec), make_spec(codec=codec)
        commit = write_part(store, spec, random_output(spec, ROWS))
        sizes = {entry.path: entry.size for entry in commit.objects}
        folder = store.part_path("fake", "a", commit.attempt)
        assert {path.removeprefix(f"{folder}/") for path, _ in store.objects.walk(folder)} == sizes.keys()
        assert sizes.keys() == chunk_paths(spec, ROWS) | metadata_paths(spec, ROWS)
        assert sum(sizes[path] for path in chunk_paths(spec, ROWS)) == part_bytes(spec, ROWS)
        assert sum(sizes[path] for path in metadata_paths(spec, ROWS)) < 12_000


def test_writing_touches_nothing_outside_the_attempt(tmp_path: Path) -> None:
    store, spec = make_store(tmp_path), make_spec()
    commit = write_part(store, spec, random_output(spec, 3))
    outside = {path for path, _ in store.objects.walk() if commit.attempt not in path}
    commits = "teachers/fake/commits/a.json"
    assert outside == {"manifest.json", "views/a.parquet", "teachers/fake/spec.json", commits}


@pytest.mark.parametrize("codec", ["fp16", "int8"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=20))
def test_any_rows_read_as_zarr_reads_them(url: str, codec: str, shard_bytes: int, rows: list[int]) -> None:
    store, spec = make_store(url), make_spec(codec=codec)
    output = random_output(spec, ROWS)
    output.spatial[5, 0, 0, 0] = torch.nan
    if not store.objects.walk("teachers"):
        write_part(store, spec, output)
    part = store.part("fake", "a")
    summary, spatial = expected(output, codec)
    read_summary = np.empty((len(rows), 4), np.float16)
    scattered = [np.empty((3, 2, 6), np.float16) for _ in rows]
    part.read_summary(rows, read_summary)
    part.read_spatial(rows, scattered)
    np.testing.assert_array_equal(read_summary, summary[rows])
    for found, row in zip(scattered, rows, strict=True):
        np.testing.assert_array_equal(found, spatial[row])
    part.close()


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_moments_are_those_committed_or_damage(tmp_path: Path, damage: str) -> None:
    store, spec = make_store(tmp_path), make_spec()
    commit = write_part(store, spec, random_output(spec, ROWS))
    names = [entry.path for entry in commit.objects if entry.path.startswith("moments/")]
    assert len(names) == 9
    for name in names:
        path = tmp_path / store.part_path("fake", "a", commit.attempt) / name
        data = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "flipped":
            flip_bit(path, 8)
        else:
            path.write_bytes(data[:-1])
        with pytest.raises(DataDamage, match=rf"shard 'a', teacher 'fake', .*/{name}'"):
            store.moments("fake")
        path.write_bytes(data)
    assert store.moments("fake")["summary"].count == ROWS


def test_rows_that_do_not_exist_and_memory_that_would_be_copied_are_refused(tmp_path: Path) -> None:
    store, spec = make_store(tmp_path), make_spec()
    write_part(store, spec, random_output(spec, ROWS))
    part = store.part("fake", "a")
    for row in (-1, ROWS):
        with pytest.raises(AssertionError):
            part.read_summary([row], np.empty((1, 4), np.float16))
    with pytest.raises(AssertionError, match="own memory"):
        part.read_summary([0], np.empty((1, 8), np.float16)[:, ::2])


def read_all(part: Part) -> None:
    rows = list(range(part.commit.rows))
    part.read_summary(rows, np.empty((len(rows), 4), np.float16))
    part.read_spatial(rows, np.empty((len(rows), 3, 2, 6), np.float16))


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_any_flipped_bit_of_any_object_is_found_and_named(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 600)
    store, spec = make_store(tmp_path), make_spec(codec=codec)
    commit = write_part(store, spec, random_output(spec, ROWS))
    folder = tmp_path / store.part_path("fake", "a", commit.attempt)
    random = np.random.default_rng(0)
    for entry in commit.objects:
        for bit in random.integers(0, entry.size * 8, 3).tolist():
            flip_bit(folder / entry.path, bit)
            found = store.verify("fake", "a")
            assert len(found) == 1
            assert "shard 'a'" in found[0]
            assert f"/{entry.path}'" in found[0]
            flip_bit(folder / entry.path, bit)
    assert store.verify("fake", "a") == []


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_reading_a_row_with_a_flipped_bit_names_it(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 600)
    store, spec = make_store(tmp_path), make_spec(codec=codec)
    commit = write_part(store, spec, random_output(spec, ROWS))
    folder = tmp_path / store.part_path("fake", "a", commit.attempt)
    random = np.random.default_rng(1)
    for array in row_arrays(spec, ROWS):
        for row in range(ROWS):
            shard, place = divmod(row, array.shard_rows)
            bit = place * array.stride * 8 + int(random.integers(0, array.row_bytes * 8))
            flip_bit(folder / array.object_path(shard), bit)
            with pytest.raises(DataDamage, match=rf"shard 'a', teacher 'fake'.* row {row} of '{array.name}'"):
                read_all(store.part("fake", "a"))
            flip_bit(folder / array.object_path(shard), bit)
    read_all(store.part("fake", "a"))


def test_missing_and_truncated_objects_are_named(tmp_path: Path, url: str) -> None:
    store, spec = make_store(url), make_spec()
    commit = write_part(store, spec, random_output(spec, ROWS))
    folder = store.part_path("fake", "a", commit.attempt)
    for entry in commit.objects:
        path = f"{folder}/{entry.path}"
        data = store.objects.get(path)
        store.objects.put(path, data[:-1])
        assert [path in line for line in store.verify("fake", "a")] == [True]
        if entry.path.startswith(("summary/c", "spatial/c")):
            with pytest.raises(DataDamage, match=rf"{entry.path}.*: {len(data) - 1} bytes, not {len(data)}"):
                read_all(store.part("fake", "a"))
        if entry.path.startswith(("summary_xxh3/c", "spatial_xxh3/c")):
            for damaged in (data[:-1], data[:3], b"\x01" + data[1:]):
                store.objects.put(path, damaged)
                with pytest.raises(DataDamage, match=rf"{entry.path}.* is damaged: {len(damaged)} bytes"):
                    read_all(store.part("fake", "a"))
        obstore.delete(store.objects._store, path)
        assert [path in line and "is missing" in line for line in store.verify("fake", "a")] == [True]
        if entry.path.startswith(("summary/c", "spatial/c", "summary_xxh3/c", "spatial_xxh3/c")):
            with pytest.raises(DataDamage, match=rf"{entry.path}.* is missing"):
                read_all(store.part("fake", "a"))
        store.objects.put(path, data)
    assert store.verify("fake", "a") == []


def test_an_absent_inner_chunk_which_zarr_reads_as_nan_is_found(tmp_path: Path) -> None:
    store, spec = make_store(tmp_path), make_spec()
    commit = write_part(store, spec, random_output(spec, ROWS))
    array = row_arrays(spec, ROWS)[1]
    path = tmp_path / store.part_path("fake", "a", commit.attempt) / array.object_path(0)
    data = bytearray(path.read_bytes())
    index = len(data) - 4 - 16 * ROWS
    data[index + 16 * 7 : index + 16 * 8] = b"\xff" * 16
    data[-4:] = crc32c(bytes(data[index:-4])).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    assert np.isnan(store.part("fake", "a").spatial[7]).all()  # type: ignore[arg-type]
    assert [array.object_path(0) in line for line in store.verify("fake", "a")] == [True]


def test_moments_are_those_of_the_valid_rows_and_of_the_sampled_tokens(tmp_path: Path) -> None:
    store, spec = make_store(tmp_path), make_spec()
    shards = {"a": 11, "b": 7, "c": 1}
    for seed, (shard, rows) in enumerate(shards.items()):
        output = random_output(spec, rows, seed)
        output.summary[0] = torch.nan
        write_part(store, spec, output, shard)
    summaries, tokens = [], []
    for shard in shards:
        part = store.part("fake", shard)
        valid = np.asarray(part.valid[...])
        summaries.append(np.asarray(part.summary[...])[valid])
        for row in np.flatnonzero(valid):
            tokens.append(sample_tokens(np.asarray(part.spatial[row : row + 1]), int(row)))
    merged = store.moments("fake")
    for name, vectors in (("summary", np.concatenate(summaries)), ("spatial", np.concatenate(tokens))):
        assert merged[name].count == len(vectors)
        np.testing.assert_allclose(merged[name].mean, vectors.astype(np.float64).mean(0), atol=1e-6)
        covariance = np.cov(vectors.astype(np.float64).T, bias=True)
        np.testing.assert_allclose(merged[name].covariance, covariance, atol=1e-5)
        again = Moments.of(vectors.astype(np.float32))
        np.testing.assert_allclose(merged[name].covariance, again.covariance, atol=1e-5)


def test_a_store_moved_elsewhere_is_the_same(tmp_path: Path) -> None:
    spec = make_spec()
    write_part(make_store(tmp_path / "old"), spec, random_output(spec, ROWS))
    shutil.move(tmp_path / "old", tmp_path / "new place")
    store = FeatureStore.open(f"file://{tmp_path}/new%20place")
    assert store.verify("fake", "a") == []
    group = zarr.open_group(str(tmp_path / "new place" / store.part("fake", "a").group.path), mode="r")
    np.testing.assert_array_equal(group["summary"][...], store.part("fake", "a").summary[...])  # type: ignore[index]
