"""Where shards are recorded: in this process, or by a pool of Ray actors. Ray is imported here only.

An executor takes tasks from a queue until it is empty and nothing is under way, and yields a receipt for
each. The driver may put a task back into the queue while it iterates; retries are its business alone, because
a Ray method that Ray retries can run twice, and an actor can outlive its driver. Exactly-once comes from the
commit.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pipeline.config import ExtractConfig
from pipeline.recorder import Receipt, Recorder
from pipeline.teachers import Teacher, create_teacher
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.manifest import TeacherSpec
from storage_schemas.store import FeatureStore

OnViews = Callable[[int], None]


@dataclass(frozen=True)
class Task:
    """Record one source shard for the teachers that lack it; `attempt` counts from 1."""

    shard: str
    url: str
    attempt: int = 1


Run = Callable[[deque[Task], OnViews], Iterator[tuple[Task, Receipt]]]


def prepare(config: ExtractConfig) -> tuple[list[TeacherSpec], Run]:
    """The teachers' specs, registered in the store, and the executor that the recipe asks for.

    `auto` is Ray where a cluster's address is given or there are several workers.
    """
    settings = config.extract
    several = settings.workers > 1 or settings.ray_address or os.environ.get("RAY_ADDRESS")
    if settings.executor == "inline" or (settings.executor == "auto" and not several):
        recorder = make_recorder(config)
        return recorder.specs, partial(run_inline, recorder)
    store = FeatureStore.open(config.store.url)
    specs = [teacher.spec for teacher in load_teachers(config, device="cpu")]  # the driver needs no GPU
    for spec in specs:
        store.add_teacher(spec)
    return specs, partial(run_ray, config)


def load_teachers(config: ExtractConfig, device: str | None = None) -> list[Teacher]:
    """The recipe's teachers, on the recipe's device or on another."""
    return [
        create_teacher(
            entry.family,
            entry.model,
            weights=entry.weights,
            name=name,
            device=device or config.extract.device,
            **entry.settings,
        )
        for name, entry in config.teachers.items()
    ]


def make_recorder(config: ExtractConfig) -> Recorder:
    """A worker's recorder: the store opened, the teachers loaded and registered."""
    store = FeatureStore.open(config.store.url)
    return Recorder(store, load_teachers(config), config.extract.batch_size, config.extract.decode_threads)


def attempt(recorder: Recorder, task: Task, on_views: OnViews) -> Receipt:
    """Record a shard; what goes wrong with it is in the receipt, so that the others go on.

    Damage and mistakes will not go away by another try. Anything else may: memory, disk or network.
    """
    try:
        return recorder.record(task.shard, task.url, on_views)
    except (DataDamage, UserError) as error:
        return Receipt(task.shard, error=str(error))
    except (OSError, RuntimeError, MemoryError) as error:
        return Receipt(task.shard, error=f"shard {task.shard!r}: {type(error).__name__}: {error}", retry=True)


def run_inline(recorder: Recorder, queue: deque[Task], on_views: OnViews) -> Iterator[tuple[Task, Receipt]]:
    """One shard after the other, in this process."""
    while queue:
        task = queue.popleft()
        yield task, attempt(recorder, task, on_views)


class _Worker:
    """What lives in a Ray actor."""

    def __init__(self, config_json: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.recorder = make_recorder(ExtractConfig.model_validate_json(config_json))

    def record(self, task: Task) -> Receipt:
        return attempt(self.recorder, task, lambda count: None)


def run_ray(config: ExtractConfig, queue: deque[Task], on_views: OnViews) -> Iterator[tuple[Task, Receipt]]:
    """Shards in `workers` actors, each with its own copy of the teachers. A dead actor's shard fails and is
    replaced.

    On an existing cluster (`ray_address`, RAY_ADDRESS) or on one started here for the time of the run. Only
    tasks and receipts pass through Ray; pixels and features never enter its object store.
    """
    try:
        import ray
        from ray.exceptions import RayActorError, RayTaskError
    except ImportError as error:
        raise UserError(
            "--executor: 'ray' needs Ray; install it with `pip install 'rebroadcast[ray]'`"
        ) from error
    settings = config.extract
    address = settings.ray_address or os.environ.get("RAY_ADDRESS")
    own = not ray.is_initialized()
    if own:
        local: dict[str, Any] = {} if address else {"include_dashboard": False, "num_cpus": settings.workers}
        ray.init(address=address, log_to_driver=False, **local)
    threads = max(1, (os.cpu_count() or 1) // settings.workers)
    remote = ray.remote(_Worker).options(
        num_cpus=settings.actor_cpus, num_gpus=settings.actor_gpus, max_restarts=0, max_task_retries=0
    )
    running: dict[Any, tuple[Any, Task]] = {}
    idle: list[Any] = []
    try:
        while queue or running:
            while queue and len(running) < settings.workers:
                actor = idle.pop() if idle else remote.remote(config.model_dump_json(), threads)
                task = queue.popleft()
                running[actor.record.remote(task)] = (actor, task)  # type: ignore[union-attr]
            [done], _ = ray.wait(list(running), num_returns=1)
            actor, task = running.pop(done)
            try:
                receipt = ray.get(done)
                idle.append(actor)
                on_views(receipt.views)
            except (RayActorError, RayTaskError) as error:
                first = str(error).strip().splitlines()[0]
                receipt = Receipt(task.shard, error=f"shard {task.shard!r}: worker died: {first}", retry=True)
            yield task, receipt
    finally:
        for actor in [*idle, *(actor for actor, _ in running.values())]:
            ray.kill(actor)
        if own:
            ray.shutdown()
