"""The driver: what is missing -> executor -> commits. Its whole loop is `extract`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.config import ExtractConfig
from pipeline.executors import OnViews, Task, prepare
from pipeline.plan import Plan, require_space
from pipeline.recorder import Receipt
from storage_schemas.commits import merge_fidelity
from storage_schemas.manifest import TeacherSpec
from storage_schemas.store import FeatureStore


@dataclass
class ExtractReport:
    """What a run of `extract` did. `failed` maps a shard to why; `statuses` counts views by ViewStatus.

    valid, invalid: rows with and without features, by teacher. fidelity: of a lossy codec, over the valid
    rows.
    """

    shards: int = 0
    already_done: int = 0
    recorded: int = 0
    views: int = 0
    bytes: int = 0
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    valid: dict[str, int] = field(default_factory=dict)
    invalid: dict[str, int] = field(default_factory=dict)
    fidelity: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        """Views through all the teachers that lacked them, from the first shard to the last."""
        return self.views / self.seconds if self.seconds else 0.0

    def add(self, receipt: Receipt) -> None:
        """Count a shard that is done or given up."""
        if receipt.error:
            self.failed[receipt.shard] = receipt.error
            return
        if not receipt.committed:  # another driver was faster
            self.already_done += 1
            return
        self.recorded += 1
        self.views += receipt.views
        self.bytes += receipt.bytes
        for total, counts in ((self.statuses, receipt.statuses), (self.invalid, receipt.invalid)):
            for name, count in counts.items():
                total[name] = total.get(name, 0) + count
        for teacher, invalid in receipt.invalid.items():
            before, rows = self.valid.get(teacher, 0), receipt.views - invalid
            self.valid[teacher] = before + rows
            parts = [(before, self.fidelity.get(teacher, {})), (rows, receipt.fidelity.get(teacher, {}))]
            if fidelity := merge_fidelity(parts):
                self.fidelity[teacher] = fidelity


def extract(
    config: ExtractConfig,
    shards: str = "*",
    on_start: Callable[[Plan], None] = lambda plan: None,
    on_views: OnViews = lambda count: None,
    on_failure: Callable[[str], None] = lambda line: None,
) -> ExtractReport:
    """Record every source shard whose name matches `shards` and that lacks a commit for one of the teachers.

    Run it again after any interruption: it takes up what is missing. UserError, and nothing is written, if
    the store was made otherwise, if a teacher differs, or if the free space does not suffice.
    """
    sources = config.source_shards(shards)
    specs, run = prepare(config)
    committed = _find_committed(config, specs)
    queue = deque(
        Task(name, url)
        for name, url in sources.items()
        if any(name not in done for done in committed.values())
    )
    report = ExtractReport(shards=len(sources), already_done=len(sources) - len(queue))
    if not queue:
        return report
    on_start(require_space(config, specs, {task.shard: task.url for task in queue}, committed))
    FeatureStore.create(config.store.url, config.store.manifest())
    started = time.monotonic()
    for task, receipt in run(queue, on_views):
        again = receipt.retry and task.attempt < config.extract.attempts
        if receipt.error:
            on_failure(f"attempt {task.attempt} of {config.extract.attempts}: {receipt.error}")
        if again:
            queue.append(Task(task.shard, task.url, task.attempt + 1))
        else:
            report.add(receipt)
    report.seconds = time.monotonic() - started
    return report


def _find_committed(config: ExtractConfig, specs: list[TeacherSpec]) -> dict[str, set[str]]:
    """Names of the shards that each teacher has already; UserError if the store or a teacher is another."""
    if not FeatureStore.exists(config.store.url):
        return {spec.name: set() for spec in specs}
    store = FeatureStore.open(config.store.url)
    store.require(config.store.manifest(), specs)
    there = set(store.teachers())
    return {spec.name: _read_commits(store, spec.name) if spec.name in there else set() for spec in specs}


def _read_commits(store: FeatureStore, teacher: str) -> set[str]:
    """Names of a teacher's shards; DataDamage names a local commit that a power loss has emptied or cut."""
    shards = store.shards(teacher)
    if store.objects.root is not None:
        for shard in shards:
            store.commit(teacher, shard)
    return set(shards)
