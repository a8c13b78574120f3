"""A run's checkpoints: what is saved, and what may go on from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from storage_schemas.errors import UserError
from trainer.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from trainer.config import TrainConfig, require_same_run
from trainer.distillation import Distillation
from trainer.distributed import World, barrier


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

    def save(self, model: Distillation, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Rank 0 writes a checkpoint; the others wait until it is there."""
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

    def restore(self, model: Distillation, optimizer: torch.optim.Optimizer, resume: bool) -> int:
        """Load the newest complete checkpoint; the step to go on from, 0 if there is none.

        UserError if there is one and `resume` was not asked for, or if it is of another run.
        """
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return 0
        if not resume:
            raise UserError(
                f"training.output: {str(self.folder)!r} holds {newest.name}; give --resume, or another output"
            )
        checkpoint = load_checkpoint(newest)
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
