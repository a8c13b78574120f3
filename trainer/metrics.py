"""What a run says of itself: lines of metrics.jsonl, and the same in TensorBoard's event files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from storage_schemas.errors import UserError
from trainer.distillation import Losses
from trainer.distributed import World, all_sum
from trainer.reader import Batch

LINES = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """A line of metrics.jsonl. `loss` and `terms` are means over the global batch of this step.

    images_per_second and data_wait (share of the time spent waiting for a batch) are since the line before.
    """

    step: int
    loss: float
    terms: dict[str, float]
    learning_rate: float
    gradient_norm: float
    images_per_second: float
    data_wait: float


class Meter:
    """Times this rank's steps, and averages their losses over ranks."""

    def __init__(self, world: World, batch_size: int) -> None:
        self._world = world
        self._batch_size = batch_size
        self._restart()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there counts as waiting."""
        self._restart()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - began
            self._steps += 1
            yield batch

    def measure(self, step: int, losses: Losses, learning_rate: float, gradient_norm: Tensor) -> StepMetrics:
        """The metrics after `step` steps, the same on every rank; UserError where training has diverged."""
        values = torch.stack([losses.total, *losses.terms.values()])
        loss, *terms = (all_sum(values) / self._world.size).tolist()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise UserError(
                f"training.learning_rate: the loss is {loss} and its gradient {float(gradient_norm)} at step "
                f"{step}, rate {learning_rate:.3g}; lower it, or give a longer training.warmup"
            )
        seconds = time.perf_counter() - self._start
        metrics = StepMetrics(
            step=step,
            loss=loss,
            terms=dict(zip(losses.terms, terms, strict=True)),
            learning_rate=learning_rate,
            gradient_norm=float(gradient_norm),
            images_per_second=self._steps * self._batch_size / seconds,
            data_wait=self._waited / seconds,
        )
        self._restart()
        return metrics

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._steps = 0


class MetricsLog:
    """Writes metrics beside the checkpoints, on rank 0. Whatever is there of later steps is forgotten: they
    are made again.
    """

    def __init__(self, folder: Path, first: int, world: World) -> None:
        self._folder, self._first, self._world = folder, first, world
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._world.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / LINES
            _forget_after(path, self._first)
            self._lines = self._stack.enter_context(path.open("a", buffering=1))
            board = SummaryWriter(str(self._folder), purge_step=self._first + 1)
            self._board = self._stack.enter_context(board)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, metrics: StepMetrics) -> None:
        """Add a line."""
        if self._world.rank:
            return
        self._lines.write(json.dumps(asdict(metrics)) + "\n")
        values = {"loss": metrics.loss, **metrics.terms, "images_per_second": metrics.images_per_second}
        for name, value in values.items():
            self._board.add_scalar(name, value, metrics.step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, but for one that a kill cut short."""
    return [json.loads(line) for line in _whole_lines(folder / LINES)]


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _forget_after(path: Path, step: int) -> None:
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
