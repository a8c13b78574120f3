"""A run's checkpoints: what is saved, and what may go on from it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from storage_schemas.errors import DataDamage, UserError
from trainer.checkpoint import (
    Checkpoint,
    complete_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from trainer.config import TrainConfig, require_same_run
from trainer.distillation import Distillation
from trainer.distributed import World, barrier
from trainer.learner import Learner
from trainer.metrics import Diverged

LOCK = ".lock"
DAMAGE = "damage.txt"


class StopSignal:
    """A context in which SIGTERM, as clusters send it before they kill, only sets `received`."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows no other to listen
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, *_: object) -> None:
        self.received = True


@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints of one recipe.

    targets: the digest of what it trains on (`groups.digest_of`). over_ranks: how several groups are served.
    """

    recipe: dict[str, Any]
    config: TrainConfig
    targets: str
    over_ranks: bool
    world: World

    @property
    def folder(self) -> Path:
        """Where they are."""
        return Path(self.config.training.output)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Rank 0 alone writes to the folder, until its process ends; UserError if another run does."""
        if self.world.rank:
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("w")
        except OSError as error:
            raise _unwritable(self.folder, error.strerror or str(error)) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"training.output: another run is writing to {str(self.folder)!r}; wait for its end, or "
                    f"give another output"
                ) from error
            yield

    def save(self, learner: Learner, step: int) -> None:
        """Rank 0 writes a checkpoint; the others wait until it is there. UserError if training diverged."""
        for name, weight in learner.model.named_parameters():
            if not weight.isfinite().all():
                raise UserError(
                    f"training.learning_rate: the weights {name} are not finite after step {step}, which is "
                    f"not saved; lower it, or give a longer training.warmup"
                )
        if self.world.rank == 0:
            specs = {name: spec.model_dump(mode="json") for name, spec in learner.model.specs.items()}
            save_checkpoint(
                self.folder,
                step,
                learner.weights(),
                learner.optimizer.state_dict(),
                meta={
                    "recipe": self.recipe,
                    "targets": self.targets,
                    "teachers": specs,
                    "over_ranks": self.over_ranks,
                },
                keep=self.config.training.keep,
            )
        barrier()

    def note_damage(self, step: int, damage: Sequence[str]) -> None:
        """Every row that a step left out, in a file beside the checkpoints that all ranks add to."""
        if damage:
            with (self.folder / DAMAGE).open("a") as lines:
                lines.write("".join(f"step {step + 1}: {line}\n" for line in damage))

    def diverged(self, error: Diverged, views: dict[str, list[tuple[str, int]]]) -> UserError:
        """The same error, with the views of its step in a file that it names."""
        path = self.folder / f"diverged-step-{error.step:08d}.json"
        if self.world.rank == 0:
            path.write_text(json.dumps({"step": error.step, "views": views}, indent=1) + "\n")
        return UserError(f"{error}; the step's views are listed in {path}")

    def newest(self, resume: bool) -> Path | None:
        """The newest complete checkpoint; UserError if there is one and `resume` was not asked for."""
        newest = newest_checkpoint(self.folder)
        if newest is not None and not resume:
            raise UserError(
                f"training.output: {str(self.folder)!r} holds {newest.name}; give --resume, or another output"
            )
        return newest

    def restore(self, newest: Path, learner: Learner) -> int:
        """Load a checkpoint; the step to go on from. UserError if it is of another run."""
        try:
            checkpoint = load_checkpoint(newest)
        except DataDamage as error:
            older = next((path.name for path in complete_checkpoints(self.folder) if path != newest), None)
            remedy = f"--resume then takes {older}" if older else "there is no older one"
            raise DataDamage(f"{error}; delete {newest}: {remedy}") from error
        self._require_same(checkpoint, newest, learner.model)
        learner.load(checkpoint)
        return checkpoint.step

    def _require_same(self, checkpoint: Checkpoint, path: Path, model: Distillation) -> None:
        where = f"checkpoint {str(path)!r}"
        require_same_run(TrainConfig.from_recipe(checkpoint.meta["recipe"]), self.config, where)
        before, now = list(checkpoint.meta["teachers"]), list(model.specs)
        if before != now:
            raise UserError(
                f"training.teachers: {where} learned from {', '.join(before)}, this run would from "
                f"{', '.join(now)}; name the former, in their order, in training.teachers or "
                f"training.groups, or give another training.output"
            )
        over_ranks = checkpoint.meta.get("over_ranks", False)
        if over_ranks != self.over_ranks:
            ways = {True: "ranks", False: "steps"}
            raise UserError(
                f"training.split: {where} served its groups over {ways[over_ranks]}, this run would over "
                f"{ways[self.over_ranks]}; set training.split to {ways[over_ranks]}"
            )
        if checkpoint.meta["targets"] != self.targets:
            raise UserError(
                f"data.train: {where} was trained on other shards or recordings; give those, or another "
                f"training.output"
            )


def require_writable(folder: Path) -> None:
    """UserError if the output folder cannot be made, or not be written to; nothing is made yet."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.access(path, os.F_OK))
    if not nearest.is_dir():
        raise _unwritable(folder, f"{str(nearest)!r} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{str(nearest)!r} is not writable")


def _unwritable(folder: Path, why: str) -> UserError:
    return UserError(f"training.output: {str(folder)!r} cannot be written to ({why}); give another folder")
