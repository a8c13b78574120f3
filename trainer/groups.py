"""Teacher groups: which teachers a rank serves in a step, at which resolution, with which views.

AM-RADIO section 4, rank/teacher partitioning. Two ways to serve several groups at the rates of their shares:

- over ranks: each step serves all groups, each on its share of the ranks. The gradients of all ranks are
  averaged, so a group's mean gradient counts by its share.
- over steps: each step serves one group, on all ranks, in a fixed cycle. The mean over a cycle is that of one
  step over ranks.

All of it is a pure function of the step, so a group's epochs end where they end, and a resumed run goes on
where it was.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from math import gcd

import torch

from storage_schemas.errors import UserError
from storage_schemas.manifest import TeacherSpec, canonical_json
from storage_schemas.store import FeatureStore
from storage_schemas.threads import map_ahead
from trainer.config import TrainConfig
from trainer.distributed import all_sum
from trainer.losses import terms_of
from trainer.order import ViewOrder, rank_slice
from trainer.reader import Batch, Indices, TargetReader


@dataclass(frozen=True, slots=True)
class Group:
    """Teachers that share a resolution and a batch size, and their own stream of views."""

    name: str
    reader: TargetReader
    order: ViewOrder
    batch_size: int
    share: int


@dataclass(frozen=True, slots=True)
class Work:
    """A rank's part of a step: the `index`-th batch of a `group`, of which it is one of `ranks`."""

    group: int
    index: int
    rank: int
    ranks: int


class Schedule:
    """Who does what: `work` of (step, rank). UserError where the shares do not fit the ranks.

    shares: of the groups, as whole numbers. split: see `TrainingConfig`.
    """

    def __init__(self, shares: Sequence[int], ranks: int, split: str = "auto") -> None:
        common = gcd(*shares)
        self._shares = [share // common for share in shares]
        self.ranks = ranks
        self.over_ranks = len(shares) > 1 and (split == "ranks" or (split == "auto" and ranks > 1))
        if self.over_ranks:
            self._groups = _split_ranks(self._shares, ranks)  # of each rank
        else:
            self._groups = _cycle(self._shares)  # of each step of a cycle

    def work(self, step: int, rank: int) -> Work:
        """What this rank does in this step."""
        if self.over_ranks:
            group = self._groups[rank]
            return Work(group, step, rank - self._groups.index(group), self._groups.count(group))
        cycles, place = divmod(step, len(self._groups))
        group = self._groups[place]
        before = cycles * self._shares[group] + self._groups[:place].count(group)
        return Work(group, before, rank, self.ranks)

    def served(self, step: int) -> list[int]:
        """The groups that this step serves, on whatever ranks."""
        return [*range(len(self._shares))] if self.over_ranks else [self.work(step, 0).group]

    def ranks_of(self, group: int) -> int:
        """How many ranks share a batch of a group."""
        return self._groups.count(group) if self.over_ranks else self.ranks


def open_groups(config: TrainConfig, held_out: bool = False) -> list[Group]:
    """The recipe's groups, over the training shards or the held-out ones."""
    settings = config.training
    store = FeatureStore.open(config.store.url)
    recorded = store.teachers()
    if not recorded:
        raise UserError(f"store.url: {config.store.url!r} holds no teachers; run `rebroadcast extract` first")
    sources = config.held_out_shards() if held_out else config.train_shards()
    found = settings.teacher_groups(recorded)
    settings.loss.require_known([name for group in found.values() for name in group.teachers])
    groups = []
    for place, (name, group) in enumerate(found.items()):
        if not any(map(settings.loss.weight, terms_of(group.teachers))):
            raise UserError(
                f"training.loss: every weight of {', '.join(group.teachers)} is 0, so the batches of group "
                f"{name!r} would teach nothing; leave those teachers out of the training"
            )
        assert group.resolution is not None
        assert group.batch_size is not None
        threads = (settings.threads, settings.prefetch)
        reader = TargetReader(store, sources, group.teachers, group.resolution, *threads, settings.on_corrupt)
        # Groups see views in orders of their own, as the ranks of the paper do.
        order = reader.order(settings.seed + place, settings.block_rows, settings.window_blocks)
        groups.append(Group(name, reader, order, group.batch_size, group.share))
    return groups


def schedule_of(groups: Sequence[Group], ranks: int, config: TrainConfig) -> Schedule:
    """The groups' schedule; UserError unless ranks and pieces divide every batch equally."""
    settings = config.training
    schedule = Schedule([group.share for group in groups], ranks, settings.split)
    for place, group in enumerate(groups):
        of, pieces = schedule.ranks_of(place), settings.accumulate
        if group.batch_size % (of * pieces):
            field = f"training.groups.{group.name}.batch_size" if settings.groups else "training.batch_size"
            by = f"the {of} rank{'s' * (of > 1)}"
            by += f" times training.accumulate {pieces}" if pieces > 1 else ""
            lower = group.batch_size // (of * pieces) * of * pieces
            fitting = [str(size) for size in (lower, lower + of * pieces) if size]
            raise UserError(
                f"{field}: {group.batch_size} must be a multiple of {by}; give {' or '.join(fitting)}"
            )
    return schedule


def specs_of(groups: Sequence[Group]) -> dict[str, TeacherSpec]:
    """Of every teacher of the groups, by name."""
    return {name: spec for group in groups for name, spec in group.reader.specs.items()}


def digest_of(groups: Sequence[Group]) -> str:
    """SHA-256 of what all groups read; of a single one, its reader's own."""
    digests = [group.reader.digest() for group in groups]
    return digests[0] if len(digests) == 1 else sha256(canonical_json(digests)).hexdigest()


def ranks_by_teacher(groups: Sequence[Group], schedule: Schedule, step: int) -> dict[str, int]:
    """The teachers that a step serves, on whatever ranks; for each, how many ranks share its batch."""
    return {
        teacher: schedule.ranks_of(place)
        for place in schedule.served(step)
        for teacher in groups[place].reader.teachers
    }


def views_in(groups: Sequence[Group], schedule: Schedule, step: int) -> int:
    """How many views a step has, over all ranks."""
    return sum(groups[place].batch_size for place in schedule.served(step))


def count_valid(batch: Batch, teachers: Iterable[str], stop: bool) -> tuple[dict[str, float], bool]:
    """Valid rows of each teacher in the batches of all ranks, and whether any rank wants to stop.

    On the CPU, and one exchange a step for both: all ranks hear of it before the same step.
    """
    names = list(teachers)
    own = [batch.valid[name].sum() if name in batch.valid else torch.zeros(()) for name in names]
    *counts, stops = all_sum(torch.stack([*own, torch.tensor(stop)]).double()).tolist()
    return dict(zip(names, counts, strict=True)), bool(stops)


def views_of(groups: Sequence[Group], schedule: Schedule, step: int) -> dict[str, list[tuple[str, int]]]:
    """(shard, row) of the views of a step, by group, over all ranks."""
    found = {}
    for place in schedule.served(step):
        group = groups[place]
        index = next(
            work.index for rank in range(schedule.ranks) if (work := schedule.work(step, rank)).group == place
        )
        views = group.reader.views(group.order.take(index * group.batch_size, group.batch_size))
        found[group.name] = [(group.reader.shards[shard], row) for shard, row in views.tolist()]
    return found


def batches(
    groups: Sequence[Group], schedule: Schedule, first_step: int = 0, rank: int = 0
) -> Generator[Batch, None, None]:
    """This rank's share of each step's batch, from `first_step` on, without end."""
    reader = groups[0].reader  # whose threads and bound serve all groups: one batch comes after the other
    with ThreadPoolExecutor(reader.threads, thread_name_prefix="reader") as pool:
        picks = _picks(groups, schedule, first_step, rank)
        yield from map_ahead(pool, lambda pick: pick[0].load(pick[1]), picks, reader.ahead)


def _picks(
    groups: Sequence[Group], schedule: Schedule, first_step: int, rank: int
) -> Iterator[tuple[TargetReader, Indices]]:
    for step in count(first_step):
        work = schedule.work(step, rank)
        group = groups[work.group]
        yield group.reader, rank_slice(group.order, work.index, group.batch_size, work.rank, work.ranks)


def _split_ranks(shares: Sequence[int], ranks: int) -> list[int]:
    """The group of each rank, in the order of the groups."""
    whole, rest = divmod(ranks, sum(shares))
    if rest:
        raise UserError(
            f"training.groups: shares {_ratio(shares)} do not fit {ranks} ranks; {_remedy(shares, ranks)}"
        )
    return [group for group, share in enumerate(shares) for _ in range(share * whole)]


def _remedy(shares: Sequence[int], ranks: int) -> str:
    total = sum(shares)
    numbers = [str(n) for n in (ranks // total * total, (ranks // total + 1) * total) if n]
    remedies = [f"{' or '.join(numbers)} ranks do"]
    if ranks >= len(shares):
        remedies.append(f"shares {_ratio(_nearest(shares, ranks))} do")
    return ", ".join(remedies) + ", and training.split: steps takes any"


def _nearest(shares: Sequence[int], ranks: int) -> list[int]:
    """Whole ranks for each group, at least one, nearest to its share (largest remainders)."""
    given = [1] * len(shares)
    for _ in range(ranks - len(shares)):
        lacking = [share * ranks / sum(shares) - has for share, has in zip(shares, given, strict=True)]
        given[lacking.index(max(lacking))] += 1
    return given


def _ratio(shares: Sequence[int]) -> str:
    return ":".join(map(str, shares))


def _cycle(shares: Sequence[int]) -> list[int]:
    """The groups of a cycle's steps, each as often as its share, spread evenly."""
    done = [0] * len(shares)
    steps = []
    for step in range(1, sum(shares) + 1):
        due = [share * step / sum(shares) - has for share, has in zip(shares, done, strict=True)]
        group = due.index(max(due))
        done[group] += 1
        steps.append(group)
    return steps
