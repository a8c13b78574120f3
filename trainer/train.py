"""The training loop. It fits on one screen: `train`.

Nothing in it has a memory that a checkpoint lacks: the batches of a step are a pure function of its number,
so are the learning rate and the random numbers (reseeded each step from seed, step and rank). So a resumed
run equals one that was never interrupted, to the last bit, and random state need not be saved.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from storage_schemas.errors import UserError
from storage_schemas.store import FeatureStore
from trainer.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from trainer.config import FREE_ON_RESUME, TrainConfig, TrainingConfig
from trainer.distillation import Distillation, distillation_losses, untrained
from trainer.distributed import World, all_sum, launch, wrap
from trainer.reader import Batch, TargetReader


@dataclass(frozen=True)
class StepMetrics:
    """A line of metrics.jsonl. `loss` and `terms` are means over the global batch of this step.

    images_per_second and data_wait (share of the time spent waiting for a batch) are since the last line.
    """

    step: int
    loss: float
    terms: dict[str, float]
    learning_rate: float
    gradient_norm: float
    images_per_second: float
    data_wait: float


def train(
    recipe: dict[str, Any],
    resume: bool = False,
    on_metrics: Callable[[StepMetrics], None] = lambda metrics: None,
) -> Path:
    """Train the recipe's student from the store; the folder of the last checkpoint.

    One process, or one of torchrun's: every rank calls this. UserError if the output holds checkpoints and
    `resume` is not asked for, or if they are of other settings.
    """
    config = TrainConfig.from_recipe(recipe)
    settings = config.training
    with launch(settings.device) as world:
        reader = make_reader(config)
        model = untrained(config, reader.specs).to(world.device)
        optimizer = make_optimizer(model, settings)
        run = Run(config, recipe, reader.digest(), world)
        first = run.restore(model, optimizer, resume)
        order = reader.order(settings.seed, settings.block_rows, settings.window_blocks)
        wrapped = wrap(torch.compile(model) if settings.compile else model, world)  # type: ignore[arg-type]
        with (
            closing(reader.batches(order, settings.batch_size, first, world.rank, world.size)) as batches,
            _metrics_log(settings, world, first) as log,
        ):
            clock = _Clock()
            for step in range(first, settings.steps):
                batch = clock.wait(batches).to(world.device)
                seed_step(settings.seed, step, world.rank)
                losses, norm = training_step(wrapped, optimizer, batch, settings, step, world)
                if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
                    metrics = clock.measure(step + 1, losses, norm, optimizer, settings, world)
                    log(metrics)
                    on_metrics(metrics)
                    clock = _Clock()
                if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                    run.save(model, optimizer, step + 1)
    newest = newest_checkpoint(Path(settings.output))
    assert newest is not None
    return newest


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: TrainingConfig,
    step: int,
    world: World,
) -> tuple[dict[str, Tensor], Tensor]:
    """One step of AdamW on this rank's share of a batch: (losses by name with "loss" the total, gradient
    norm).
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
    with autocast:
        predicted = model(batch.images)
    losses = distillation_losses(
        predicted, batch.targets, batch.valid, settings.loss, lambda valid: all_sum(valid.sum()) / world.size
    )
    optimizer.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip or math.inf)
    optimizer.step()
    return {"loss": losses.total.detach(), **{k: v.detach() for k, v in losses.terms.items()}}, norm


def make_reader(config: TrainConfig, held_out: bool = False) -> TargetReader:
    """The reader of the training views, or of the held-out ones."""
    store = FeatureStore.open(config.store.url)
    settings = config.training
    teachers = settings.teachers or store.teachers()
    if not teachers:
        raise UserError(f"store.url: {config.store.url!r} holds no teachers; run `rebroadcast extract` first")
    sources = config.held_out_shards() if held_out else config.train_shards()
    return TargetReader(store, sources, teachers, settings.resolution, settings.threads, settings.prefetch)


def make_optimizer(model: nn.Module, settings: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (AM-RADIO section 4); no decay on norms, biases, tokens and position embeddings."""
    decayed = [
        p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(("token", "position"))
    ]
    ids = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in ids]
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


class _Clock:
    """Rates between two lines of metrics."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def wait(self, batches: Iterator[Batch]) -> Batch:
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        self._steps += 1
        return batch

    def measure(
        self,
        step: int,
        losses: dict[str, Tensor],
        norm: Tensor,
        optimizer: torch.optim.Optimizer,
        settings: TrainingConfig,
        world: World,
    ) -> StepMetrics:
        values = all_sum(torch.stack([*losses.values()])).div(world.size).tolist()
        means = dict(zip(losses, values, strict=True))
        elapsed = time.perf_counter() - self._start
        return StepMetrics(
            step=step,
            loss=means.pop("loss"),
            terms=means,
            learning_rate=optimizer.param_groups[0]["lr"],
            gradient_norm=float(norm),
            images_per_second=self._steps * settings.batch_size / elapsed,
            data_wait=self._waited / elapsed,
        )


@contextmanager
def _metrics_log(
    settings: TrainingConfig, world: World, first: int
) -> Iterator[Callable[[StepMetrics], None]]:
    """Writes metrics.jsonl and TensorBoard's event files beside the checkpoints, on rank 0."""
    if world.rank:
        yield lambda metrics: None
        return
    from torch.utils.tensorboard import SummaryWriter

    path = Path(settings.output) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget_after(path, first)
    with path.open("a", buffering=1) as lines, SummaryWriter(settings.output, purge_step=first) as board:

        def log(metrics: StepMetrics) -> None:
            lines.write(json.dumps(asdict(metrics)) + "\n")
            for name, value in {
                **metrics.terms,
                "loss": metrics.loss,
                "rate": metrics.images_per_second,
            }.items():
                board.add_scalar(name, value, metrics.step)

        yield log


def _forget_after(path: Path, step: int) -> None:
    """Keep the lines up to a step: those after it, and one that a kill cut short, are made again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))


@dataclass(frozen=True)
class Run:
    """One recipe's checkpoints. `targets` is the digest of what is trained on (`TargetReader.digest`)."""

    config: TrainConfig
    recipe: dict[str, Any]
    targets: str
    world: World

    @property
    def folder(self) -> Path:
        return Path(self.config.training.output)

    def save(self, model: Distillation, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write a checkpoint, on rank 0."""
        if self.world.rank:
            return
        position = step * self.config.training.batch_size
        meta = {
            "recipe": self.recipe,
            "position": position,
            "targets": self.targets,
            "teachers": model.specs_json(),
        }
        student, adaptors = model.student.state_dict(), model.adaptors.state_dict()
        keep = self.config.training.keep
        save_checkpoint(self.folder, step, student, adaptors, optimizer.state_dict(), meta, keep)

    def restore(self, model: Distillation, optimizer: torch.optim.Optimizer, resume: bool) -> int:
        """Load the newest complete checkpoint; the step to go on from, 0 if there is none."""
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return 0
        if not resume:
            raise UserError(
                f"training.output: {str(self.folder)!r} holds {newest.name}; give --resume, or another output"
            )
        checkpoint = load_checkpoint(newest)
        self._require_same(TrainConfig.from_recipe(checkpoint.meta["recipe"]), newest)
        if checkpoint.meta["targets"] != self.targets:
            raise UserError(
                f"data.train: checkpoint {str(newest)!r} was trained on other shards or recordings"
            )
        model.student.load_state_dict(checkpoint.student)
        model.adaptors.load_state_dict(checkpoint.adaptors)
        optimizer.load_state_dict(checkpoint.optimizer_state)
        return checkpoint.step

    def _require_same(self, old: TrainConfig, path: Path) -> None:
        for section in ("student", "training"):
            before, now = getattr(old, section).model_dump(), getattr(self.config, section).model_dump()
            for key in sorted((before.keys() | now.keys()) - FREE_ON_RESUME):
                if before.get(key) != now.get(key):
                    raise UserError(
                        f"{section}.{key}: checkpoint {str(path)!r} has {before.get(key)!r}, the recipe has "
                        f"{now.get(key)!r}; use the checkpoint's, or another training.output"
                    )
