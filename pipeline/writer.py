"""Features -> part -> commit: one attempt at one teacher's features of one source shard."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from storage_schemas.commits import Commit, ObjectDigest, SourceTar, digest_object
from storage_schemas.errors import DataDamage
from storage_schemas.features import Moments, PackedFeatures, TeacherOutput, pack, sample_tokens
from storage_schemas.layout import ShardBuffer, row_arrays, small_objects
from storage_schemas.manifest import TeacherSpec
from storage_schemas.store import FeatureStore

MOMENT_VECTORS = 2048  # gathered for one product, instead of many small ones


class PartWriter:
    """Takes a shard's features in row order and leaves a complete part; `commit` makes it count.

    Each object is put as soon as its rows are there, then read back and digested in a thread while the next
    one fills: at most three objects an array are in memory.
    """

    def __init__(self, store: FeatureStore, spec: TeacherSpec, shard: str, rows: int) -> None:
        self.store = store
        self.spec = spec
        self.shard = shard
        self.rows = rows
        self.attempt = uuid4().hex
        self.path = store.part_path(spec.name, shard, self.attempt)
        self._arrays = {array.name: array for array in row_arrays(spec, rows)}
        self._buffers: dict[str, ShardBuffer] = {}
        self._valid = np.zeros(rows, dtype=bool)
        self._written = 0
        self._disposable = True  # no commit names this attempt, nor can one come to
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="put")
        self._puts: list[Future[ObjectDigest]] = []
        self._moments = {
            "summary": _MomentGatherer(spec.summary_dim),
            "spatial": _MomentGatherer(spec.spatial_dim),
        }
        self._fidelity = _Fidelity()

    def append(self, output: TeacherOutput) -> None:
        """The next rows: summary b d, spatial b h w d. A row not finite in fp16 is stored as invalid."""
        packed = pack(output, self.spec.codec)
        first, self._written = self._written, self._written + len(packed.valid)
        assert self._written <= self.rows, (self.shard, self._written, self.rows)
        cells = (packed.summary.shape[1:], packed.spatial.shape[1:])
        assert cells == tuple(self._arrays[name].shape[1:] for name in ("summary", "spatial")), cells
        self._valid[first : self._written] = packed.valid
        self._fill("summary", packed.summary, first)
        self._fill("spatial", packed.spatial, first)
        if packed.scale is not None:
            self._fill("spatial_scale", packed.scale, first)
        self._measure(output, packed, first)

    def _fill(self, name: str, values: NDArray[Any], first: int) -> None:
        array = self._arrays[name]
        while len(values):
            shard, place = divmod(first, array.shard_rows)
            if name not in self._buffers:
                self._buffers[name] = ShardBuffer(array, shard)
            buffer = self._buffers[name]
            count = min(len(values), buffer.rows - place)
            buffer.values[place : place + count] = values[:count]
            if place + count == buffer.rows:
                self._put(self._buffers.pop(name))
            values, first = values[count:], first + count

    def _put(self, buffer: ShardBuffer) -> None:
        for pending in self._puts[-2:-1]:
            pending.result()
        self._puts.append(self._pool.submit(lambda: self._put_and_digest(buffer.path, buffer.seal())))

    def _put_and_digest(self, name: str, data: Any) -> ObjectDigest:
        path = f"{self.path}/{name}"
        self.store.objects.put(path, data)
        size, digest = digest_object(self.store.objects, path)
        if (size, digest) != (len(data), blake3(data).hexdigest()):
            raise DataDamage(
                f"shard {self.shard!r}: object {path!r} read back with {size} bytes, blake3 {digest}"
            )
        return ObjectDigest(path=name, size=size, blake3=digest)

    def _measure(self, output: TeacherOutput, packed: PackedFeatures, first: int) -> None:
        stored = packed.restored()
        for row in np.flatnonzero(packed.valid):
            self._moments["summary"].add(packed.summary[row : row + 1])
            self._moments["spatial"].add(sample_tokens(stored[row : row + 1], first + int(row)))
        if packed.scale is not None:
            self._fidelity.add(output.spatial.float().cpu().numpy()[packed.valid], stored[packed.valid])

    @property
    def valid_rows(self) -> int:
        """Rows so far that have features."""
        return int(self._valid.sum())

    def commit(self, source: SourceTar, views_sha256: str) -> Commit | None:
        """Finish the part and make it count; None if another attempt already does."""
        assert self._written == self.rows, (self.shard, self._written, self.rows)
        objects = [put.result() for put in self._puts]
        moments = {name: gatherer.moments() for name, gatherer in self._moments.items()}
        small = small_objects(self.spec, self._valid, moments)
        objects += [self._put_and_digest(name, data) for name, data in small.items()]
        commit = Commit(
            teacher=self.spec.name,
            shard=self.shard,
            attempt=self.attempt,
            rows=self.rows,
            invalid_rows=tuple(np.flatnonzero(~self._valid).tolist()),
            views_sha256=views_sha256,
            source=source,
            objects=tuple(sorted(objects, key=lambda entry: entry.path)),
            fingerprint=self.spec.fingerprint,
            versions=versions(),
            fidelity=self._fidelity.summary(),
        )
        self._disposable = False  # until there is an answer: a put that fails may have been done
        won = self.store.write_commit(commit)
        self._disposable = not won
        return commit if won else None

    def close(self) -> None:
        """Wait for the writing threads; remove what the attempt has written if it does not count."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._disposable:
            self.store.objects.delete_folder(self.path)


class _Fidelity:
    """Mean and least cosine between tokens as given and as kept; a token of norm zero has none."""

    def __init__(self) -> None:
        self._sum, self._count, self._least = 0.0, 0, 1.0

    def add(self, given: NDArray[np.floating], kept: NDArray[np.floating]) -> None:
        given, kept = given.astype(np.float64), kept.astype(np.float64)  # ... d
        norms = np.linalg.norm(given, axis=-1) * np.linalg.norm(kept, axis=-1)
        cosine = (given * kept).sum(-1)[norms > 0] / norms[norms > 0]
        self._sum, self._count = self._sum + float(cosine.sum()), self._count + cosine.size
        self._least = min(self._least, float(cosine.min(initial=1.0)))

    def summary(self) -> dict[str, float]:
        if self._count == 0:
            return {}
        return {"cosine_mean": self._sum / self._count, "cosine_min": self._least}


class _MomentGatherer:
    def __init__(self, d: int) -> None:
        self._done = Moments.of(np.zeros((0, d), dtype=np.float32))
        self._waiting: list[NDArray[np.floating]] = []
        self._count = 0

    def add(self, vectors: NDArray[np.floating]) -> None:
        self._waiting.append(vectors)
        self._count += len(vectors)
        if self._count >= MOMENT_VECTORS:
            self._flush()

    def moments(self) -> Moments:
        if self._waiting:
            self._flush()
        return self._done

    def _flush(self) -> None:
        vectors = np.concatenate(self._waiting).astype(np.float32)
        self._done = Moments.merge([self._done, Moments.of(vectors)])
        self._waiting, self._count = [], 0


def versions() -> dict[str, str]:
    """Versions of what makes the numbers."""
    return {name: version(name) for name in ("torch", "torchvision", "timm", "zarr", "pillow", "numpy")}
