"""What a training step changes: the model, its optimiser, and the average of its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainer.balancing import Weights
from trainer.checkpoint import Checkpoint
from trainer.config import TrainingConfig
from trainer.distillation import Distillation, Losses, loss_terms, weighted_sum
from trainer.distributed import World, all_sum, no_sync, wrap
from trainer.losses import teacher_of, terms_of
from trainer.reader import Batch

UNDECAYED = ("token", "position", "pos_embed")  # in the last part of a parameter's name
MODULES = ("student", "adaptors", "balancing")  # of a Distillation: a file of a checkpoint each


class Learner:
    """One rank's copy of all that is learned."""

    def __init__(self, model: Distillation, settings: TrainingConfig, world: World) -> None:
        self.model = model
        self.optimizer = make_optimizer(model, settings)
        self.average: AveragedModel | None = None
        self._settings = settings
        self._world = world
        if settings.ema is not None:
            move = get_ema_multi_avg_fn(settings.ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=move, use_buffers=True)
            self.average.n_averaged.fill_(1)  # the first weights are its first value
        if settings.compile:
            model.compile()
        self._replica = wrap(model, world)

    def step(
        self, batch: Batch, rate: float, counts: Mapping[str, float], ranks: Mapping[str, int]
    ) -> tuple[Losses, Tensor]:
        """One step of the optimiser at learning rate `rate`, on this rank's share of the batches.

        counts: valid rows of each teacher over all ranks. ranks: how many share a teacher's batch, for each
        teacher that some rank serves in this step. Returns the losses over all ranks, and the norm of the
        gradient before it was clipped.
        """
        settings = self._settings
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages over ranks: so that a group's mean gradient counts by its share of them, each of its
        # ranks divides by the valid rows over the number of its ranks.
        shares = {name: counts[name] / ranks[name] for name in batch.targets}
        pieces = batch.to(self._world.device).split(settings.accumulate)
        found = []
        for place, piece in enumerate(pieces, start=1):
            with nullcontext() if place == len(pieces) else no_sync(self._replica):
                losses = self._losses(piece, shares, len(pieces))
                losses.total.backward()  # type: ignore[no-untyped-call]
            found.append(losses.detach())
        for parameter in self.model.parameters_beside(ranks):  # zeros would move them by their momentum
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip or math.inf)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        losses = self._over_ranks(found, ranks)
        self.model.balancing.observe(losses.terms)
        return losses, norm

    def _losses(self, batch: Batch, shares: Mapping[str, float], pieces: int) -> Losses:
        """Of one of so many pieces of a batch."""
        settings = self._settings
        half = settings.precision == "bfloat16"
        with torch.autocast(self._world.device.type, torch.bfloat16, enabled=half):
            predicted = self._replica(batch.images, tuple(batch.targets))
        targets = self.model.normalize(batch.targets)
        terms = loss_terms(predicted.by_teacher, targets, batch.valid, settings.loss)
        balance = self.model.balancing.weigh([*terms], predicted.summary)
        balance = Weights(balance.factors, balance.penalty / pieces)
        losses = weighted_sum(terms, batch.valid, shares, settings.loss, balance)
        if self._world.size == 1:
            return losses
        # DDP waits for a gradient of each parameter. Which of its own balancing uses, hangs on the terms.
        unused = [*self.model.parameters_beside(batch.targets), *self.model.balancing.parameters()]
        total = losses.total + sum(0 * parameter.sum() for parameter in unused)
        return Losses(total, losses.terms, losses.weights)

    def _over_ranks(self, pieces: list[Losses], ranks: Mapping[str, int]) -> Losses:
        """The losses of the step: means over the global batch, the same on every rank."""
        terms = terms_of(ranks)
        weighed = [term for term in terms if term in self.model.balancing.places]
        zero = torch.zeros((), device=self._world.device)  # of a term of other ranks
        sums = [torch.stack([piece.total for piece in pieces]).sum() / self._world.size]
        for kind, names, count in (("terms", terms, 1), ("weights", weighed, len(pieces))):
            for name in names:
                values = torch.stack([getattr(piece, kind).get(name, zero) for piece in pieces])
                sums.append(values.sum() / (ranks[teacher_of(name)] * count))
        total, *means = all_sum(torch.stack(sums))
        return Losses(
            total,
            dict(zip(terms, means[: len(terms)], strict=True)),
            dict(zip(weighed, means[len(terms) :], strict=True)),
        )

    def evaluated(self) -> Distillation:
        """A copy of the model to evaluate, folded: of its averaged weights where there are any."""
        model = deepcopy(self.model if self.average is None else self.average.module)
        assert isinstance(model, Distillation)
        return model.fold().eval()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """State dicts of a checkpoint, by the names of their files."""
        found = {name: getattr(self.model, name).state_dict() for name in MODULES}
        if self.average is not None:
            found["ema"] = self.average.module.state_dict()
        return {name: state for name, state in found.items() if state or name != "balancing"}

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint of the same recipe."""
        for name in MODULES:
            getattr(self.model, name).load_state_dict(checkpoint.weights.get(name, {}))
        self.optimizer.load_state_dict(checkpoint.optimizer_state)
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint.weights["ema"])


def make_optimizer(model: nn.Module, settings: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (AM-RADIO section 4); no decay on norms, biases, tokens and position embeddings, nor on what a
    module says itself (`no_weight_decay`, as timm's models do).
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    said = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(method := getattr(module, "no_weight_decay", None))
        for name in method()
    }
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or name in said or any(w in name.rsplit(".", 1)[-1] for w in UNDECAYED)
        (others if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate)
