"""The training loop. It fits on one screen: `train`.

Nothing in it has a memory that a checkpoint lacks: the batches of a step are a pure function of its number,
so are the learning rate and the random numbers (reseeded each step from seed, step and rank). So a resumed
run equals one that was never interrupted, to the last bit, and random state need not be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from trainer.adaptors import Adaptor
from trainer.config import TrainConfig, TrainingConfig
from trainer.distillation import Distillation, start_from, untrained
from trainer.distributed import barrier, launch
from trainer.evaluation.subject import Subject
from trainer.groups import (
    Group,
    batches,
    count_valid,
    digest_of,
    open_groups,
    ranks_by_teacher,
    schedule_of,
    specs_of,
    views_in,
    views_of,
)
from trainer.learner import Learner
from trainer.metrics import Diverged, Meter, MetricsLog, StepMetrics
from trainer.run import Run, StopSignal, require_writable

MOMENT_SHARDS = 64  # at most, spread evenly over the store: of each, two covariances a teacher are read


def train(
    recipe: dict[str, Any],
    resume: bool = False,
    on_metrics: Callable[[StepMetrics], None] = lambda metrics: None,
) -> Path:
    """Train the recipe's student from the store; the folder of the last checkpoint.

    One process, or one of torchrun's: every rank calls this, and rank 0 hears of the metrics. SIGTERM ends
    the run after the step that it is in, with a checkpoint: the returned one is then not of the last step.
    UserError if the output holds checkpoints and `resume` is not asked for, or if they are of other settings.
    """
    config = TrainConfig.from_recipe(recipe)
    settings = config.training
    require_writable(Path(settings.output))
    if settings.evaluate_every:
        open_groups(config, held_out=True)  # UserError now, not at the first evaluation
    with launch(settings.device) as world, ExitStack() as stack:
        groups = open_groups(config)
        schedule = schedule_of(groups, world.size, config)
        model = untrained(config, specs_of(groups)).to(world.device)
        run = Run(recipe, config, digest_of(groups), schedule.over_ranks, world)
        stack.enter_context(run.locked())
        newest = run.newest(resume)
        if newest is None:
            initialise(model, config, groups)
        learner = Learner(model, settings, world)
        first = run.restore(newest, learner) if newest else 0
        stream = stack.enter_context(closing(batches(groups, schedule, first, world.rank)))
        log = stack.enter_context(MetricsLog(run.folder, first, world, settings.wandb))
        stop, meter = stack.enter_context(StopSignal()), Meter(world)
        for step, batch in enumerate(meter.timed(islice(stream, settings.steps - first)), start=first):
            run.note_damage(step, batch.damage)
            counts, stops = count_valid(batch, model.specs, stop.received)
            if not stops:
                seed_step(settings.seed, step, world.rank)
                ranks = ranks_by_teacher(groups, schedule, step)
                losses, norm = learner.step(batch, learning_rate(settings, step), counts, ranks)
                meter.add(losses, norm, views_in(groups, schedule, step))
            done = step if stops else step + 1
            saves = stops or done == settings.steps or done % settings.checkpoint_every == 0
            evaluates = not stops and done % (settings.evaluate_every or settings.steps + 1) == 0
            if meter.steps and (saves or evaluates or done % settings.log_every == 0):
                try:
                    metrics = meter.measure(done, learning_rate(settings, done - 1))
                except Diverged as error:
                    raise run.diverged(error, views_of(groups, schedule, error.step - 1)) from error
                log.write(metrics)
                if world.rank == 0:
                    on_metrics(metrics)
            if saves:
                run.save(learner, done)
            if evaluates:
                if world.rank == 0:
                    log.write_evaluation(done, evaluate(config, learner.evaluated()))
                barrier()
                meter.restart()
            if stops:
                break
        last = run.newest(resume=True)
    assert last is not None
    return last


def evaluate(config: TrainConfig, model: Distillation) -> dict[str, float]:
    """Held-out distances to each teacher, and k-NN where images have labels."""
    subject = Subject(config, model)
    values = {
        f"distance/{name}/{kind}": getattr(found, kind)
        for name, found in subject.student_distance().items()
        for kind in ("summary", "spatial")
    }
    return values | ({"knn/student": subject.student_knn()} if subject.is_labelled() else {})


def first_model(config: TrainConfig, groups: Sequence[Group]) -> Distillation:
    """The model before the first step of a run."""
    model = untrained(config, specs_of(groups))
    initialise(model, config, groups)
    return model


def initialise(model: Distillation, config: TrainConfig, groups: Sequence[Group]) -> None:
    """Fit the normalizers, give the heads the targets' scale, and the model what `start_from` names."""
    for reader in (group.reader for group in groups):
        sample = reader.shards[:: math.ceil(len(reader.shards) / MOMENT_SHARDS)]
        for name in reader.teachers:
            adaptor = model.adaptors[name]
            assert isinstance(adaptor, Adaptor)
            adaptor.match(reader.store.moments(name, sample))
    if config.training.start_from is not None:
        start_from(model, Path(config.training.start_from), config)


def learning_rate(settings: TrainingConfig, step: int) -> float:
    """Linear warm-up, then a cosine that reaches zero after the last step."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout, stochastic depth) as a pure function of (seed, step, rank)."""
    digest = blake2b(b"%d/%d/%d" % (seed, step, rank), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
