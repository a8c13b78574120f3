"""What a run says of itself: lines of metrics.jsonl and evaluations.jsonl, and the same in TensorBoard's
files.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

import torch
from torch import Tensor

from storage_schemas.errors import UserError
from trainer.distillation import Losses
from trainer.distributed import World, all_sum
from trainer.reader import Batch

LINES, EVALUATIONS, WANDB_ID = "metrics.jsonl", "evaluations.jsonl", ".wandb-id"


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """A line of metrics.jsonl. All but `step`, `learning_rate` and `gradient_norm` is since the line before.

    `loss`, `terms` and `weights` (of balancing, where they are not 1) are means over global batches, each
    over the steps that had it. data_wait: share of the time spent waiting for a batch. corrupt_rows: rows of
    images or features that were left out because they do not hold.
    """

    step: int
    loss: float
    terms: dict[str, float]
    weights: dict[str, float]
    learning_rate: float
    gradient_norm: float
    images_per_second: float
    data_wait: float
    corrupt_rows: int


class Diverged(UserError):
    """A loss or a gradient is not finite; `step` had it first."""

    def __init__(self, step: int, loss: float, norm: float, rate: float) -> None:
        super().__init__(
            f"training.learning_rate: the loss is {loss} and its gradient {norm} at step {step}, rate "
            f"{rate:.3g}; lower it, or give a longer training.warmup"
        )
        self.step = step


class Meter:
    """Times this rank's steps, and gathers their losses on the device: only `measure` waits for them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.restart()

    def restart(self) -> None:
        """Time starts here, and nothing has happened yet."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self._views = 0
        self._damaged = 0
        self._totals: list[Tensor] = []  # of each step: loss, norm of the gradient
        self._means: dict[str, dict[str, list[Tensor]]] = {"terms": {}, "weights": {}}

    @property
    def steps(self) -> int:
        """Since the line before."""
        return len(self._totals)

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each is there counts as waiting."""
        self.restart()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - began
            self._damaged += len(batch.damage)
            yield batch

    def add(self, losses: Losses, gradient_norm: Tensor, views: int) -> None:
        """A step: its losses over all ranks, and the views of its global batch."""
        self._views += views
        self._totals.append(torch.stack([losses.total, gradient_norm]))
        for kind, values in (("terms", losses.terms), ("weights", losses.weights)):
            for name, value in values.items():
                self._means[kind].setdefault(name, []).append(value)

    def measure(self, step: int, learning_rate: float) -> StepMetrics:
        """The metrics after `step` steps, the same on every rank; Diverged where one is not finite."""
        totals = torch.stack(self._totals).tolist()
        for place, (loss, norm) in enumerate(totals):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(step - len(totals) + place + 1, loss, norm, learning_rate)
        seconds = time.perf_counter() - self._start
        metrics = StepMetrics(
            step=step,
            loss=sum(loss for loss, _ in totals) / len(totals),
            terms=self._averages("terms"),
            weights=self._averages("weights"),
            learning_rate=learning_rate,
            gradient_norm=totals[-1][1],
            images_per_second=self._views / seconds,
            data_wait=self._waited / seconds,
            corrupt_rows=int(all_sum(torch.tensor(self._damaged))),
        )
        self.restart()
        return metrics

    def _averages(self, kind: str) -> dict[str, float]:
        return {name: float(torch.stack(values).mean()) for name, values in self._means[kind].items()}


class MetricsLog:
    """Writes metrics beside the checkpoints, on rank 0. Whatever is there of later steps is forgotten: they
    are made again.

    wandb: a project of Weights & Biases that is told them too; UserError if its package is missing.
    """

    def __init__(self, folder: Path, first: int, world: World, wandb: str | None = None) -> None:
        self._folder, self._first, self._world = folder, first, world
        self._project = wandb
        self._wandb: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._world.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            self._folder.mkdir(parents=True, exist_ok=True)
            if self._project is not None:
                run = _open_wandb(self._project, self._folder, goes_on=self._first > 0)
                self._wandb = self._stack.enter_context(run)
            for name in (LINES, EVALUATIONS):
                _forget_after(self._folder / name, self._first)
            self._lines = self._stack.enter_context((self._folder / LINES).open("a", buffering=1))
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
        names = ("loss", "learning_rate", "gradient_norm", "images_per_second", "data_wait", "corrupt_rows")
        values = {name: getattr(metrics, name) for name in names} | metrics.terms
        values |= {f"weight/{name}": weight for name, weight in metrics.weights.items()}
        self._tell(values, metrics.step)

    def write_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Add a line to the evaluations, which have a file of their own."""
        with (self._folder / EVALUATIONS).open("a") as lines:
            lines.write(json.dumps({"step": step, **values}) + "\n")
        self._tell(values, step)

    def _tell(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)


def _open_wandb(project: str, folder: Path, goes_on: bool) -> Any:
    """A run of Weights & Biases, a context that ends it; its id is in a file, for when training goes on."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"training.wandb: {project!r} needs the package wandb; install it, or remove the key"
        ) from error
    file = folder / WANDB_ID
    if not (goes_on and file.exists()):
        file.write_text(uuid4().hex)
    return wandb.init(project=project, id=file.read_text(), name=folder.name, dir=str(folder), resume="allow")


def read_metrics(folder: Path, name: str = LINES) -> list[dict[str, Any]]:
    """The lines of a run, but for one that a kill cut short."""
    return [json.loads(line) for line in _whole_lines(folder / name)]


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def _forget_after(path: Path, step: int) -> None:
    kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
