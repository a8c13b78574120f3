"""Stored targets and the very crops they were made from, in batches.

Which views a batch holds is arithmetic (`trainer.order`, `trainer.groups`); what it holds is checked: each
image against the digest in the view table, each row of features against its checksum, each tar and view table
against the commit. Batches are loaded whole by threads, ahead of their use, and a bound on how many is the
bound on memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from storage_schemas.commits import Commit
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import PIXELS, canonical_json
from storage_schemas.objects import open_objects, split_url
from storage_schemas.parts import Part
from storage_schemas.replay import CropReplay
from storage_schemas.store import FeatureStore
from storage_schemas.threads import map_ahead
from trainer.memory import RecycledMemory
from trainer.order import ViewOrder

COMMIT_READERS = 16  # threads: on an object store each commit is a request, and there is one a shard
OPEN_SHARDS = 64  # view tables and files kept open; a window of the block shuffle touches fewer

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """`images` uint8 b 3 height width; `targets` by teacher, fp16; `valid` by teacher, bool b.

    A target that is not valid is NaN. `views` is b 2: index of the shard in the reader's `shards`, and row.
    `damage`: a line for each row, of images or of a teacher's features, that was left out because it does not
    hold.
    """

    images: torch.Tensor
    targets: dict[str, TeacherOutput]
    valid: dict[str, torch.Tensor]
    views: Indices
    damage: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        targets = {k: TeacherOutput(move(v.summary), move(v.spatial)) for k, v in self.targets.items()}
        valid = {k: move(v) for k, v in self.valid.items()}
        return Batch(move(self.images), targets, valid, self.views, self.damage)

    def split(self, pieces: int) -> list[Batch]:
        """So many equal pieces, in order, which share its memory."""
        if pieces == 1:
            return [self]
        size = len(self.views) // pieces
        assert size * pieces == len(self.views), (len(self.views), pieces)
        return [self._rows(slice(start, start + size)) for start in range(0, len(self.views), size)]

    def _rows(self, rows: slice) -> Batch:
        targets = {k: TeacherOutput(v.summary[rows], v.spatial[rows]) for k, v in self.targets.items()}
        return Batch(
            self.images[rows], targets, {k: v[rows] for k, v in self.valid.items()}, self.views[rows]
        )


class TargetReader:
    """Batches of the views that some teacher has features for, in the source shards `sources` (URLs by name).

    on_corrupt: `stop` raises DataDamage for a row that does not hold; `skip` gives it as not valid, and says
    so in the batch. UserError if a shard is not recorded for a teacher, or if its tar is not the one that was
    recorded.
    """

    def __init__(
        self,
        store: FeatureStore,
        sources: Mapping[str, str],
        teachers: Sequence[str],
        resolution: tuple[int, int],
        threads: int = 2,
        prefetch: int = 2,
        on_corrupt: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.store = store
        self.teachers = tuple(teachers)
        self.resolution = resolution
        self.threads = threads
        self.ahead = threads + prefetch
        self.on_corrupt = on_corrupt
        self.shards = tuple(sources)
        self._memory = RecycledMemory()
        self.specs = {name: store.spec(name) for name in teachers}
        _require_same_pixels({name: spec.pixels for name, spec in self.specs.items()})
        self._sources = dict(sources)
        with ThreadPoolExecutor(COMMIT_READERS, thread_name_prefix="commits") as pool:
            read = partial(_read_commits, store, self.teachers)
            self._commits = dict(zip(sources, pool.map(read, sources, sources.values()), strict=True))
        self._rows = [_Rows(self._commits[shard]) for shard in self.shards]
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        """Views that some teacher has features for."""
        return sum(map(len, self._rows))

    def digest(self) -> str:
        """SHA-256 of what is read: shards, their tars and view tables, teachers. Equal digests give equal
        batches.
        """
        identity = [
            (
                shard,
                teacher,
                commit.source.sha256,
                commit.views_sha256,
                commit.fingerprint,
                commit.invalid_rows,
            )
            for shard, commits in self._commits.items()
            for teacher, commit in commits.items()
        ]
        return sha256(canonical_json(identity)).hexdigest()

    def order(self, seed: int, block_rows: int, window_blocks: int) -> ViewOrder:
        """The order of these views; its indices are this reader's, not rows. UserError if there are none."""
        if not len(self):
            raise UserError(
                f"data.train: no view has features from {', '.join(self.teachers)} in store "
                f"{self.store.url!r}; look for their invalid rows with `rebroadcast inspect`"
            )
        return ViewOrder([len(rows) for rows in self._rows], seed, block_rows, window_blocks)

    def in_order(
        self, batch_size: int, view: int | None = None, targets: bool = True
    ) -> Generator[Batch, None, None]:
        """Every view once, by shard and row; only those with that number of `view` if one is given.

        targets: false for images alone.
        """
        with ThreadPoolExecutor(self.threads, thread_name_prefix="reader") as pool:
            picks = self._picks_in_order(batch_size, view)
            yield from map_ahead(pool, partial(self.load, targets=targets), picks, self.ahead)

    def _picks_in_order(self, batch_size: int, view: int | None) -> Iterator[Indices]:
        views_per_image = self.store.manifest.views_per_image
        for shard, rows in enumerate(self._rows):
            chosen = np.arange(len(rows))
            if view is not None:
                chosen = chosen[rows.at(chosen) % views_per_image == view]
            for start in range(0, len(chosen), batch_size):
                indices = chosen[start : start + batch_size]
                yield np.stack([np.full(len(indices), shard), indices], axis=1)

    def views(self, picks: Indices) -> Indices:
        """b 2, shard and row, of b 2 indices of an order: shard, and place among its rows with features."""
        return np.array([(shard, self._rows[shard].at(place)) for shard, place in picks], dtype=np.int64)

    def load(self, picks: Indices, targets: bool = True) -> Batch:
        """The batch of b 2 indices of an order."""
        views = self.views(picks)
        damage: list[str] = []
        images = self._memory.empty((len(views), 3, *self.resolution), torch.uint8)
        whole = np.ones(len(views), dtype=bool)
        for place, (shard, row) in enumerate(views.tolist()):
            if not self._attempt(damage, lambda: self._cut(images[place], shard, row)):  # noqa: B023
                images[place], whole[place] = 0, False
        found, valid = {}, {}
        for name in self.teachers if targets else ():
            rows = zip(whole.tolist(), *views.T.tolist(), strict=True)
            valid[name] = torch.tensor([ok and self._open(s).is_valid(name, row) for ok, s, row in rows])
            found[name] = self._targets(name, views, whole, valid[name], damage)
        return Batch(images, found, valid, views, tuple(damage))

    def _cut(self, out: torch.Tensor, shard: int, row: int) -> None:
        out.copy_(self._open(shard).replay.crop(row, self.resolution))

    def _targets(
        self, teacher: str, views: Indices, whole: NDArray[np.bool_], valid: torch.Tensor, damage: list[str]
    ) -> TeacherOutput:
        """Of the rows that are `whole`; clears `valid`, b, where their features are not, and notes it."""
        spec = self.specs[teacher]
        cells = (spec.grid.height, spec.grid.width, spec.spatial_dim)
        summary = self._memory.empty((len(views), spec.summary_dim), torch.float16)
        spatial = self._memory.empty((len(views), *cells), torch.float16)
        summary_rows, spatial_rows = summary.numpy(), spatial.numpy()

        def read(shard: int, places: Sequence[int]) -> None:
            rows, part = views[places, 1].tolist(), self._open(shard).parts[teacher]
            part.read_summary(rows, [summary_rows[place] for place in places])
            part.read_spatial(rows, [spatial_rows[place] for place in places])

        lost = np.flatnonzero(~whole).tolist()
        for shard in np.unique(views[whole, 0]).tolist():
            places = np.flatnonzero(whole & (views[:, 0] == shard)).tolist()
            if not self._attempt([], lambda: read(shard, places)):  # noqa: B023 - called at once
                lost += [
                    place
                    for place in places
                    if not self._attempt(damage, lambda: read(shard, [place]))  # noqa: B023
                ]
        if lost:
            summary[lost], spatial[lost], valid[lost] = torch.nan, torch.nan, False
        return TeacherOutput(summary, spatial)

    def _attempt(self, damage: list[str], action: Callable[[], None]) -> bool:
        """Whether it went well. Where damage does not end the run, it is noted."""
        try:
            action()
        except DataDamage as error:
            if self.on_corrupt == "stop":
                raise
            damage.append(str(error))
            return False
        return True

    def _open_shard(self, index: int) -> _OpenShard:
        shard = self.shards[index]
        return _OpenShard(self.store, self._sources[shard], self._commits[shard])


class _OpenShard:
    """One source shard's tar and parts, open."""

    def __init__(self, store: FeatureStore, url: str, commits: Mapping[str, Commit]) -> None:
        first = next(iter(commits.values()))
        table = store.committed_views(first)
        self.replay = CropReplay(first.shard, url, table, store.manifest.max_pixels)
        self.parts = {
            teacher: Part(
                store.objects,
                store.part_path(teacher, commit.shard, commit.attempt),
                store.spec(teacher),
                commit,
            )
            for teacher, commit in commits.items()
        }
        self._invalid = {teacher: frozenset(commit.invalid_rows) for teacher, commit in commits.items()}

    def is_valid(self, teacher: str, row: int) -> bool:
        return row not in self._invalid[teacher]


class _Rows:
    """The rows of a shard that some teacher has features for: what is kept is only those that none has."""

    def __init__(self, commits: Mapping[str, Commit]) -> None:
        rows = next(iter(commits.values())).rows
        without = set.intersection(*(set(commit.invalid_rows) for commit in commits.values()))
        missing = np.array(sorted(without), dtype=np.int64)
        self._count = rows - len(missing)
        self._present_before = missing - np.arange(len(missing))  # each missing row

    def __len__(self) -> int:
        return self._count

    def at(self, place: Indices) -> Indices:
        """The rows at these places among them."""
        return place + np.searchsorted(self._present_before, place, side="right")


def _read_commits(store: FeatureStore, teachers: Sequence[str], shard: str, url: str) -> dict[str, Commit]:
    """The commits of a shard, without their lists of objects: a reader holds those of every shard."""
    commits = {
        teacher: store.commit(teacher, shard).model_copy(update={"objects": ()}) for teacher in teachers
    }
    folder, name = split_url(url)
    size = open_objects(folder).size(name)
    for teacher, commit in commits.items():
        if size != commit.source.size:
            raise UserError(
                f"data: shard {shard!r} at {url!r} has {size} bytes, teacher {teacher!r} was recorded "
                f"from a tar of {commit.source.size}; restore that tar, or record anew"
            )
    identities = {(commit.source.sha256, commit.views_sha256) for commit in commits.values()}
    if len(identities) != 1:
        raise DataDamage(
            f"shard {shard!r}: its teachers {', '.join(teachers)} were recorded from different tars"
        )
    return commits


def _require_same_pixels(pixels: Mapping[str, str]) -> None:
    for teacher, name in pixels.items():
        if name != PIXELS:
            raise UserError(
                f"teacher: {teacher!r} was recorded with pixels {name!r}, this program makes {PIXELS!r}"
            )
