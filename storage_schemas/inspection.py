"""What a store holds, in figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from storage_schemas.commits import merge_fidelity
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.store import FeatureStore


@dataclass(frozen=True, slots=True)
class TeacherSummary:
    """Of one teacher: its spec, and sums over its committed shards. `fidelity` is over all of them."""

    name: str
    spec: dict[str, Any]
    shards: int
    rows: int
    invalid_rows: int
    bytes: int
    fidelity: dict[str, float]


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """Of a store. `statuses` and `errors` count views, `garbage` what no commit names; `damage` has a line
    for each thing that could not be counted.
    """

    manifest: dict[str, Any]
    teachers: list[TeacherSummary]
    shards: int
    views: int
    statuses: dict[str, int]
    errors: dict[str, int]
    garbage: int
    damage: list[str]


def inspect_store(store: FeatureStore) -> StoreSummary:
    """Read every commit, and the view table of every committed shard."""
    damage: list[str] = []
    teachers = [_summarise(store, name, damage) for name in store.teachers()]
    shards = sorted({shard for name in store.teachers() for shard in store.shards(name)})
    statuses: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for shard in shards:
        try:
            views = store.views(shard)
        except (DataDamage, UserError) as error:
            damage.append(str(error))
            continue
        statuses.update(views["status"].to_pylist())
        errors.update(error for error in views["error"].to_pylist() if error)
    return StoreSummary(
        manifest=store.manifest.model_dump(mode="json"),
        teachers=teachers,
        shards=len(shards),
        views=sum(statuses.values()),
        statuses=dict(statuses),
        errors=dict(errors.most_common()),
        garbage=len(store.garbage()),
        damage=damage,
    )


def _summarise(store: FeatureStore, teacher: str, damage: list[str]) -> TeacherSummary:
    commits, lost = store.commits(teacher)
    damage += lost.values()
    return TeacherSummary(
        name=teacher,
        spec=store.spec(teacher).model_dump(mode="json"),
        shards=len(commits),
        rows=sum(commit.rows for commit in commits),
        invalid_rows=sum(len(commit.invalid_rows) for commit in commits),
        bytes=sum(commit.bytes for commit in commits),
        fidelity=merge_fidelity([(commit.valid_rows, commit.fidelity) for commit in commits]),
    )
