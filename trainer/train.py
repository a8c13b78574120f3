"""The training loop. It fits on one screen: `train`.

Nothing in it has a memory that a checkpoint lacks: the batches of a step are a pure function of its number,
so are the learning rate and the random numbers (reseeded each step from seed, step and rank). So a resumed
run equals one that was never interrupted, to the last bit, and random state need not be saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack, closing
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from storage_schemas.errors import UserError
from storage_schemas.store import FeatureStore
from trainer.adaptors import Adaptor
from trainer.config import TrainConfig, TrainingConfig
from trainer.distillation import Distillation, Losses, distillation_losses, start_from, untrained
from trainer.distributed import World, all_sum, launch, unwrap, wrap
from trainer.metrics import Meter, MetricsLog, StepMetrics
from trainer.reader import Batch, TargetReader
from trainer.run import Run, require_writable

MOMENT_SHARDS = 64  # at most, spread evenly over the store: of each, two covariances a teacher are read
UNDECAYED = ("token", "position", "pos_embed")  # in the last part of a parameter's name


def train(
    recipe: dict[str, Any],
    resume: bool = False,
    on_metrics: Callable[[StepMetrics], None] = lambda metrics: None,
) -> Path:
    """Train the recipe's student from the store; the folder of the last checkpoint.

    One process, or one of torchrun's: every rank calls this, and rank 0 hears of the metrics. UserError if
    the output holds checkpoints and `resume` is not asked for, or if they are of other settings.
    """
    config = TrainConfig.from_recipe(recipe)
    settings = config.training
    require_writable(Path(settings.output))
    with launch(settings.device) as world, ExitStack() as stack:
        reader = make_reader(config)
        model = untrained(config, reader.specs).to(world.device)
        optimizer = make_optimizer(model, settings)
        run = Run(recipe, config, reader.digest(), world)
        stack.enter_context(run.locked())
        newest = run.newest(resume)
        if newest is None:
            initialise(model, config, reader)
        first = run.restore(newest, model, optimizer) if newest else 0
        order = reader.order(settings.seed, settings.block_rows, settings.window_blocks)
        if settings.compile:
            model.compile()
        replica, meter = wrap(model, world), Meter(world, settings.batch_size)
        with (
            closing(reader.batches(order, settings.batch_size, first, world.rank, world.size)) as batches,
            MetricsLog(run.folder, first, world) as log,
        ):
            coming = islice(batches, settings.steps - first)
            for step, batch in enumerate(meter.timed(coming), start=first):
                seed_step(settings.seed, step, world.rank)
                rate = learning_rate(settings, step)
                batch = batch.to(world.device)
                losses, norm = training_step(replica, optimizer, batch, rate, settings, world)
                done, last = step + 1, step + 1 == settings.steps
                saves = last or done % settings.checkpoint_every == 0
                if saves or done % settings.log_every == 0:
                    metrics = meter.measure(done, losses, rate, norm)
                    log.write(metrics)
                    if world.rank == 0:
                        on_metrics(metrics)
                if saves:
                    run.save(model, optimizer, done)
        saved = run.newest(resume=True)
    assert saved is not None
    return saved


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rate: float,
    settings: TrainingConfig,
    world: World,
) -> tuple[Losses, Tensor]:
    """One step of the optimiser at learning rate `rate` on this rank's share of a batch: (losses, norm of the
    gradient before it was clipped).
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        predicted = model(batch.images)
    distillation = unwrap(model)
    assert isinstance(distillation, Distillation)
    targets = distillation.normalize(batch.targets)
    losses = distillation_losses(
        predicted, targets, batch.valid, settings.loss, lambda valid: all_sum(valid.sum()) / world.size
    )
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
    optimizer.step()
    return losses.detach(), norm


def make_reader(config: TrainConfig, held_out: bool = False) -> TargetReader:
    """The reader of the training views, or of the held-out ones."""
    settings = config.training
    sources = config.held_out_shards() if held_out else config.train_shards()
    store = FeatureStore.open(config.store.url)
    teachers = settings.teachers or store.teachers()
    if not teachers:
        raise UserError(f"store.url: {config.store.url!r} holds no teachers; run `rebroadcast extract` first")
    settings.loss.require_known(teachers)
    return TargetReader(store, sources, teachers, settings.resolution, settings.threads, settings.prefetch)


def first_model(config: TrainConfig, reader: TargetReader) -> Distillation:
    """The model before the first step of a run."""
    model = untrained(config, reader.specs)
    initialise(model, config, reader)
    return model


def initialise(model: Distillation, config: TrainConfig, reader: TargetReader) -> None:
    """Fit the normalizers, give the heads the targets' scale, and the model what `start_from` names."""
    sample = reader.shards[:: math.ceil(len(reader.shards) / MOMENT_SHARDS)]
    for name, adaptor in model.adaptors.items():
        assert isinstance(adaptor, Adaptor)
        adaptor.match(reader.store.moments(name, sample))
    if config.training.start_from is not None:
        start_from(model, Path(config.training.start_from), config)


def make_optimizer(model: nn.Module, settings: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (AM-RADIO section 4); no decay on norms, biases, tokens and position embeddings."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or any(word in name.rsplit(".", 1)[-1] for word in UNDECAYED)
        (others if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


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
