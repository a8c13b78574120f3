"""Features -> part -> commit: one attempt at one teacher's features of one source shard."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from pipeline.sending import ArraySender, SendingThreads
from storage_schemas.commits import Commit, ObjectDigest, SourceTar, digest_object
from storage_schemas.errors import DataDamage
from storage_schemas.features import Moments, PackedFeatures, TeacherOutput, pack, sample_tokens
from storage_schemas.layout import row_arrays, small_objects
from storage_schemas.manifest import TeacherSpec
from storage_schemas.store import FeatureStore

MOMENT_VECTORS = 2048  # gathered for one product, instead of many small ones
PUTS = 8  # of small objects at once: each waits for a disk or a network


class PartWriter:
    """Takes a shard's features in row order and leaves a complete part; `commit` makes it count.

    Rows are written as they come, and each object is read back in a thread while the next one fills: of each
    array, the rows of `sending.AHEAD` calls wait in memory.
    """

    def __init__(self, store: FeatureStore, spec: TeacherSpec, shard: str, rows: int) -> None:
        self.store = store
        self.spec = spec
        self.shard = shard
        self.rows = rows
        self.attempt = uuid4().hex
        self.path = store.part_path(spec.name, shard, self.attempt)
        self._threads = SendingThreads()
        self._arrays = {array.name: array for array in row_arrays(spec, rows)}
        self._senders = {
            name: ArraySender(store.objects, self.path, array, self._threads)
            for name, array in self._arrays.items()
        }
        self._valid = np.zeros(rows, dtype=bool)
        self._written = 0
        self._disposable = True  # no commit names this attempt, nor can one come to
        self._moments = {
            "summary": _MomentGatherer(spec.summary_dim),
            "spatial": _MomentGatherer(spec.spatial_dim),
        }
        self._fidelity = _Fidelity()

    def append(self, output: TeacherOutput) -> None:
        """The next rows: summary b d, spatial b h w d, which nobody may change from now on.

        A row not finite in fp16 is stored as invalid.
        """
        packed = pack(output, self.spec.codec)
        first, self._written = self._written, self._written + len(packed.valid)
        assert self._written <= self.rows, (self.shard, self._written, self.rows)
        cells = (packed.summary.shape[1:], packed.spatial.shape[1:])
        assert cells == tuple(self._arrays[name].shape[1:] for name in ("summary", "spatial")), cells
        self._valid[first : self._written] = packed.valid
        self._senders["summary"].add(packed.summary)
        self._senders["spatial"].add(packed.spatial)
        if packed.scale is not None:
            self._senders["spatial_scale"].add(packed.scale)
        self._measure(output, packed, first)

    def _put_and_digest(self, name: str, data: bytes) -> ObjectDigest:
        path = f"{self.path}/{name}"
        self.store.objects.put(path, data)
        size, digest = digest_object(self.store.objects, path)
        if (size, digest) != (len(data), xxh3_128_hexdigest(data)):
            raise DataDamage(
                f"shard {self.shard!r}: object {path!r} read back with {size} bytes, xxh3_128 {digest}"
            )
        return ObjectDigest(path=name, size=size, xxh3_128=digest)

    def _measure(self, output: TeacherOutput, packed: PackedFeatures, first: int) -> None:
        stored = packed.restored()
        tokens = sample_tokens(stored, first).reshape(len(stored), -1, stored.shape[-1])  # b n d
        self._moments["summary"].add(packed.summary[packed.valid])
        self._moments["spatial"].add(tokens[packed.valid].reshape(-1, stored.shape[-1]))
        if packed.scale is not None:
            self._fidelity.add(output.spatial.float().cpu().numpy()[packed.valid], stored[packed.valid])

    @property
    def valid_rows(self) -> int:
        """Rows so far that have features."""
        return int(self._valid.sum())

    def commit(self, source: SourceTar, views_sha256: str) -> Commit | None:
        """Finish the part and make it count; None if another attempt already does."""
        assert self._written == self.rows, (self.shard, self._written, self.rows)
        try:
            objects = [sent.result() for sender in self._senders.values() for sent in sender.objects]
        except DataDamage as error:
            raise DataDamage(f"shard {self.shard!r}: {error}") from error
        moments = {name: gatherer.moments() for name, gatherer in self._moments.items()}
        checksums = {
            array.checksums: np.array(self._senders[name].checksums, dtype=np.uint64)
            for name, array in self._arrays.items()
        }
        small = small_objects(self.spec, self._valid, checksums, moments)
        with ThreadPoolExecutor(PUTS, thread_name_prefix="put") as pool:
            objects += pool.map(self._put_and_digest, small.keys(), small.values())
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
        self._threads.close()
        for sender in self._senders.values():
            sender.abort()
        if self._disposable:
            self.store.objects.delete(self.path)


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
        while self._count + len(vectors) >= MOMENT_VECTORS:
            left = MOMENT_VECTORS - self._count
            self._waiting.append(vectors[:left])
            self._flush()
            vectors = vectors[left:]
        self._waiting.append(vectors)
        self._count += len(vectors)

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
