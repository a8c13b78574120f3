"""Where shards are recorded: in this process, or by a pool of Ray actors. Of the pipeline, this module alone
imports Ray.

An executor takes tasks from a queue until it is empty and nothing is under way, and yields a receipt for
each. The driver may put a task back into the queue while it iterates; retries are its business alone, because
a Ray method that Ray retries can run twice, and an actor can outlive its driver. Exactly-once comes from the
commit.

As a batch job: `ray job submit --working-dir . -- python -m cli extract RECIPE`. Ray packs the folder without
what `.gitignore` and `.rayignore` name (so without `.venv` and `runs`), unpacks it on every node in a folder
of its own, and runs the entry point with the `python` on the PATH of `ray start`. Paths in such a recipe must
therefore be absolute, or URLs of an object store.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from pipeline.config import ExtractConfig
from pipeline.recorder import Receipt, Recorder
from pipeline.teachers import Teacher, create_teacher
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.manifest import TeacherSpec
from storage_schemas.objects import StorageError
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
    """The teachers' specs, and the executor that the recipe asks for. The store is not touched.

    `auto` is Ray where a cluster's address is given or there are several workers.
    """
    settings = config.extract
    several = settings.workers > 1 or _ray_address(config)
    if settings.executor == "inline" or (settings.executor == "auto" and not several):
        teachers = load_teachers(config)
        return [teacher.spec for teacher in teachers], partial(run_inline, config, teachers)
    if _ray_address(config):
        _require_absolute("store.url", [config.store.url])
        _require_absolute("data", [*config.data.train, *config.data.held_out])
    cpu = {name: entry.model_copy(update={"device": "cpu"}) for name, entry in config.teachers.items()}
    teachers = load_teachers(config.model_copy(update={"teachers": cpu}))  # the driver needs no GPU
    return [teacher.spec for teacher in teachers], partial(run_ray, config)


def _ray_address(config: ExtractConfig) -> str | None:
    return config.extract.ray_address or os.environ.get("RAY_ADDRESS") or None


def _require_absolute(field: str, urls: list[str]) -> None:
    for url in urls:
        if not urlsplit(url).scheme and not Path(url).is_absolute():
            raise UserError(
                f"{field}: {url!r} is relative, and workers on a cluster have other folders; make it absolute"
            )


def load_teachers(config: ExtractConfig) -> list[Teacher]:
    """The recipe's teachers, each on its own device or on the recipe's."""
    return [
        create_teacher(
            entry.family,
            entry.model,
            weights=entry.weights,
            name=name,
            **{"device": config.extract.device, **entry.settings},
        )
        for name, entry in config.teachers.items()
    ]


def make_recorder(config: ExtractConfig, teachers: list[Teacher]) -> Recorder:
    """A worker's recorder: the store opened, the teachers registered in it."""
    store = FeatureStore.open(config.store.url)
    return Recorder(store, teachers, config.extract.batch_size, config.extract.decode_threads)


def attempt(recorder: Recorder, task: Task, on_views: OnViews) -> Receipt:
    """Record a shard; what goes wrong with it is in the receipt, so that the others go on.

    Damage and mistakes will not go away by another try. Anything else may: memory, disk or network.
    """
    try:
        return recorder.record(task.shard, task.url, on_views)
    except (DataDamage, UserError) as error:
        return Receipt(task.shard, error=str(error))
    except (OSError, RuntimeError, MemoryError, StorageError) as error:
        reason = f"shard {task.shard!r}: {type(error).__name__}: {_first_line(error)}"
        return Receipt(task.shard, error=reason, retry=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def run_inline(
    config: ExtractConfig, teachers: list[Teacher], queue: deque[Task], on_views: OnViews
) -> Iterator[tuple[Task, Receipt]]:
    """One shard after the other, in this process."""
    recorder = make_recorder(config, teachers)
    while queue:
        task = queue.popleft()
        yield task, attempt(recorder, task, on_views)


class _Worker:
    """What lives in a Ray actor."""

    def __init__(self, config: ExtractConfig) -> None:
        torch.set_num_threads(max(1, int(config.extract.actor_cpus)))
        self.recorder = make_recorder(config, load_teachers(config))

    def record(self, task: Task) -> Receipt:
        return attempt(self.recorder, task, lambda count: None)


def run_ray(config: ExtractConfig, queue: deque[Task], on_views: OnViews) -> Iterator[tuple[Task, Receipt]]:
    """Shards in `workers` actors, each with its own copy of the teachers. A dead actor is replaced, and its
    shard's attempt has failed.

    On an existing cluster (`ray_address`, RAY_ADDRESS) or on one started here for the time of the run. Only
    tasks and receipts pass through Ray; pixels and features never enter its object store.
    """
    ray = _import_ray()
    settings = config.extract
    own = not ray.is_initialized()
    if own:
        _start_ray(ray, config)
    remote = ray.remote(_Worker).options(
        num_cpus=settings.actor_cpus, num_gpus=settings.actor_gpus, max_restarts=0, max_task_retries=0
    )
    running: dict[Any, tuple[Any, Task]] = {}
    idle: list[Any] = []
    try:
        while queue or running:
            while queue and len(running) < settings.workers:
                actor = idle.pop() if idle else remote.remote(config)
                task = queue.popleft()
                running[actor.record.remote(task)] = (actor, task)
            [done], _ = ray.wait(list(running), num_returns=1)
            actor, task = running.pop(done)
            try:
                receipt = ray.get(done)
                idle.append(actor)
                on_views(receipt.views)
            except ray.exceptions.RayError as error:
                ray.kill(actor)
                reason = f"shard {task.shard!r}: its worker failed: {_last_cause(error)}"
                receipt = Receipt(task.shard, error=reason, retry=True)
            yield task, receipt
    finally:
        for actor in [*idle, *(actor for actor, _ in running.values())]:
            ray.kill(actor)
        if own:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError(
            "extract.executor: 'ray' needs Ray; install it with `pip install 'rebroadcast[ray]'`"
        ) from error
    return ray


def _start_ray(ray: Any, config: ExtractConfig) -> None:
    """Connect to the cluster, or start one here with what the actors ask for."""
    address, settings = _ray_address(config), config.extract
    if address is None:
        cpus = max(1, math.ceil(settings.workers * settings.actor_cpus))
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
        if settings.actor_gpus > ray.cluster_resources().get("GPU", 0):
            raise UserError(
                f"extract.actor_gpus: {settings.actor_gpus} for each actor, and there is no such GPU here"
            )
        return
    try:
        ray.init(address, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"extract.ray_address: {address!r}: {_first_line(error)}") from error


def _last_cause(error: BaseException) -> str:
    """One line: why an actor died or could not start. Ray puts a remote traceback's cause last."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if "Traceback" in str(error) or "ray::" in str(error) else lines[0]
