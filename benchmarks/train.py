"""Training from the store beside the same step without loading, and beside the same step with the teacher.

    python benchmarks/train.py [--runs 5] [--steps 8] [--batch-size 16] [--threads 2] [CASE ...]

Each case is a student and a teacher at one resolution, on the photographs that scikit-image and scikit-learn
ship (PNG tiles of about 200 to 470 pixels a side, 4 views each), recorded here with random weights, which do
not change the arithmetic. Rivals take turns within a run:

- store: the loop's own pieces, `groups.batches` and `Learner.step`;
- memory: the same step, again and again on one batch that is there: the student alone;
- live: the same images by the same threads, the teacher in the loop, the same step on what it gives;
- teacher: its forward alone, on one batch that is there.

Counting begins after 20 steps of the first turn of each that loads, after as many as are loaded ahead in its
later turns, and after one step of the others; page cache warm. Figures are medians over the runs, ratios
medians of the runs' own. On a CPU loading is not free: its threads take from the student what they use. So
the seconds that one thread takes to load a batch stand beside those of a step, and all ratios are given in
CPU seconds of the process, too, which other work on the machine changes less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from pipeline.photographs import write_photograph_shards
from pipeline.recorder import Recorder
from pipeline.teachers import Teacher, create_teacher
from storage_schemas.crops import CropPolicy
from storage_schemas.manifest import StoreManifest
from storage_schemas.store import FeatureStore
from storage_schemas.threads import map_ahead
from trainer.config import TrainConfig
from trainer.distributed import World, launch
from trainer.groups import (
    Group,
    Schedule,
    batches,
    count_valid,
    open_groups,
    ranks_by_teacher,
    schedule_of,
)
from trainer.learner import Learner
from trainer.reader import Batch
from trainer.train import first_model, seed_step

Stream = Generator[Batch, None, None]

SKIPPED = 20  # steps before counting begins
# Name: student, teacher, pixels. The smaller the student, the more loading counts on the cores they share.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "resnet10t_128": ("timm/resnet10t", {"family": "timm", "model": "tf_efficientnet_lite0"}, 128),
    "resnet10t_224": ("timm/resnet10t", {"family": "timm", "model": "tf_efficientnet_lite0"}, 224),
    "radio_vit_ti16_224": (
        "radio_vit_ti16",
        {"family": "timm", "model": "vit_small_patch14_reg4_dinov2"},
        224,
    ),
}


@dataclass(frozen=True)
class Cost:
    """Of a batch: seconds, and CPU seconds of the process; `waited` is the share spent waiting for data."""

    wall: float
    cpu: float
    waited: float


@dataclass(frozen=True)
class Trainer:
    """All that a step needs, and the teacher that its targets are from."""

    groups: list[Group]
    schedule: Schedule
    learner: Learner
    teacher: Teacher
    config: TrainConfig

    def step(self, step: int, batch: Batch) -> None:
        """One step, as the training loop makes it."""
        counts, _ = count_valid(batch, self.learner.model.specs, stop=False)
        seed_step(0, step, 0)
        ranks = ranks_by_teacher(self.groups, self.schedule, step)
        self.learner.step(batch, self.config.training.learning_rate, counts, ranks)

    def stored(self) -> Stream:
        """The loop's own batches."""
        return batches(self.groups, self.schedule)

    def held(self) -> Stream:
        """The first of them, again and again."""
        batch = self.load()
        while True:
            yield batch

    def load(self) -> Batch:
        """The first of them."""
        [group] = self.groups
        return group.reader.load(group.order.take(0, group.batch_size))

    def live(self) -> Stream:
        """The same batches with the teacher's features as it gives them, not stored ones."""
        [group] = self.groups
        reader, size = group.reader, group.batch_size
        picks = (group.order.take(step * size, size) for step in count())
        with ThreadPoolExecutor(reader.threads) as pool:
            for batch in map_ahead(pool, partial(reader.load, targets=False), picks, reader.ahead):
                valid = torch.ones(size, dtype=torch.bool)
                targets = {self.teacher.spec.name: self.teacher(batch.images)}
                yield replace(batch, targets=targets, valid=dict.fromkeys(targets, valid))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all if none are given")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="that are counted in each turn")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="that load batches")
    options = parser.parse_args()
    print(
        f"batch {options.batch_size}, {options.threads} loading threads, {torch.get_num_threads()} PyTorch "
        f"threads, {os.cpu_count()} cores, {options.runs} runs of {options.steps} steps"
    )
    with tempfile.TemporaryDirectory() as folder:
        train, *_ = write_photograph_shards(Path(folder) / "shards")
        for name in options.cases or CASES:
            student, teacher, resolution = CASES[name]
            made = create_teacher(**teacher, resolution=resolution, weights="random", seed=0, name="teacher")
            store = FeatureStore.create(
                str(Path(folder) / name),
                StoreManifest(crops=CropPolicy(first_view="center", scale=(0.25, 1.0)), views_per_image=4),
            )
            Recorder(store, [made], batch_size=32, decode_threads=2).record(train.stem, str(train))
            print(f"\n{name}: student {student}, teacher {teacher['model']}, {resolution} pixels")
            config = _config(store.url, str(train), student, resolution, options.batch_size, options.threads)
            with launch("cpu") as world:
                _compare(_trainer(config, made, world), options.steps, options.runs)


def _config(
    store: str, shard: str, student: str, resolution: int, batch_size: int, threads: int
) -> TrainConfig:
    training = {
        "output": "never-written",
        "resolution": resolution,
        "batch_size": batch_size,
        "threads": threads,
        "steps": 1_000_000,
        "learning_rate": 1e-4,
    }
    recipe = {
        "store": {"url": store},
        "data": {"train": shard},
        "student": {"name": student},
        "training": training,
    }
    return TrainConfig.from_recipe(recipe)


def _trainer(config: TrainConfig, teacher: Teacher, world: World) -> Trainer:
    groups = open_groups(config)
    learner = Learner(first_model(config, groups), config.training, world)
    return Trainer(groups, schedule_of(groups, world.size, config), learner, teacher, config)


def _compare(trainer: Trainer, steps: int, runs: int) -> None:
    batch = trainer.load()
    ahead = trainer.groups[0].reader.ahead
    found: dict[str, list[Cost]] = {}
    for run in range(runs):
        skipped = ahead if run else SKIPPED
        costs = {
            "store": _train(trainer, trainer.stored(), skipped, steps),
            "memory": _train(trainer, trainer.held(), 1, steps),
            "live": _train(trainer, trainer.live(), skipped, steps),
            "teacher": _repeat(lambda: trainer.teacher(batch.images), steps),
            "load": _repeat(trainer.load, steps),
        }
        for name, cost in costs.items():
            found.setdefault(name, []).append(cost)
        line = ", ".join(f"{name} {cost.wall:.3f} ({cost.cpu:.3f})" for name, cost in costs.items())
        print(f"  run {run + 1}, seconds a batch (of CPU): {line}", flush=True)
    _report(found, len(batch.images))


def _train(trainer: Trainer, stream: Stream, skipped: int, steps: int) -> Cost:
    with closing(stream):
        for step, batch in enumerate(islice(stream, skipped)):
            trainer.step(step, batch)
        began, cpu, waited = time.perf_counter(), time.process_time(), 0.0
        for step in range(skipped, skipped + steps):
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            trainer.step(step, batch)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Cost(took / steps, cpu / steps, waited / took)


def _repeat(action: Callable[[], object], times: int) -> Cost:
    action()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        action()
    return Cost((time.perf_counter() - began) / times, (time.process_time() - cpu) / times, 0.0)


def _report(found: dict[str, list[Cost]], size: int) -> None:
    for name in ("store", "memory", "live"):
        rates = [size / cost.wall for cost in found[name]]
        print(f"  {name:7} {statistics.median(rates):6.1f} images/s ({min(rates):.1f} to {max(rates):.1f})")
    waits = [cost.waited for cost in found["store"]]
    print(f"  waiting for data: {statistics.median(waits):.1%} of the time (at most {max(waits):.1%})")
    load, step = (statistics.median(cost.cpu for cost in found[name]) for name in ("load", "memory"))
    print(f"  loading a batch takes {load:.3f} CPU seconds, {load / step:.1%} of a step's {step:.3f}")
    for kind in ("wall", "cpu"):
        seconds = {name: [getattr(cost, kind) for cost in costs] for name, costs in found.items()}
        predicted = statistics.median(
            (a + b) / a for a, b in zip(seconds["memory"], seconds["teacher"], strict=True)
        )
        print(
            f"  by {kind} time: store is {_ratio(seconds, 'memory'):.2f} × memory, and "
            f"{_ratio(seconds, 'live'):.2f} × live, where (step + teacher) / step is {predicted:.2f}"
        )


def _ratio(seconds: dict[str, list[float]], other: str) -> float:
    return statistics.median(b / a for a, b in zip(seconds["store"], seconds[other], strict=True))


if __name__ == "__main__":
    main()
