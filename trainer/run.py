"""A run's checkpoints: what is saved, and what may go on from it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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

LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints of one recipe. `targets` is the digest of what it trains on (`TargetReader.digest`)."""

    recipe: dict[str, Any]
    config: TrainConfig
    targets: str
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

    def save(self, model: Distillation, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Rank 0 writes a checkpoint; the others wait until it is there. UserError if training diverged."""
        for name, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise UserError(
                    f"training.learning_rate: the weights {name} are not finite after step {step}, which is "
                    f"not saved; lower it, or give a longer training.warmup"
                )
        if self.world.rank == 0:
            specs = {name: spec.model_dump(mode="json") for name, spec in model.specs.items()}
            save_checkpoint(
                self.folder,
                step,
                model.student.state_dict(),
                model.adaptors.state_dict(),
                optimizer.state_dict(),
                meta={"recipe": self.recipe, "targets": self.targets, "teachers": specs},
                keep=self.config.training.keep,
            )
        barrier()

    def newest(self, resume: bool) -> Path | None:
        """The newest complete checkpoint; UserError if there is one and `resume` was not asked for."""
        newest = newest_checkpoint(self.folder)
        if newest is not None and not resume:
            raise UserError(
                f"training.output: {str(self.folder)!r} holds {newest.name}; give --resume, or another output"
            )
        return newest

    def restore(self, newest: Path, model: Distillation, optimizer: torch.optim.Optimizer) -> int:
        """Load a checkpoint; the step to go on from. UserError if it is of another run."""
        try:
            checkpoint = load_checkpoint(newest)
        except DataDamage as error:
            older = next((path.name for path in complete_checkpoints(self.folder) if path != newest), None)
            remedy = f"--resume then takes {older}" if older else "there is no older one"
            raise DataDamage(f"{error}; delete {newest}: {remedy}") from error
        self._require_same(checkpoint, newest, model)
        model.student.load_state_dict(checkpoint.student)
        model.adaptors.load_state_dict(checkpoint.adaptors)
        optimizer.load_state_dict(checkpoint.optimizer_state)
        return checkpoint.step

    def _require_same(self, checkpoint: Checkpoint, path: Path, model: Distillation) -> None:
        where = f"checkpoint {str(path)!r}"
        require_same_run(TrainConfig.from_recipe(checkpoint.meta["recipe"]), self.config, where)
        before, now = list(checkpoint.meta["teachers"]), list(model.specs)
        if before != now:
            raise UserError(
                f"training.teachers: {where} learned from {', '.join(before)}, the store has "
                f"{', '.join(now)}; name those in training.teachers, or give another training.output"
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
