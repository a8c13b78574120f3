"""How the terms of the loss are weighed beside each other (AM-RADIO section 3.3.1, Table 3, appendix D).

Every method is a module, so that what it learns or remembers is in the checkpoints, and has the same two
methods: `weigh`, before a step's losses are known, and `observe`, with their means over all ranks, after. So
weights are constant within a step, however it is cut into ranks and pieces. The recipe's own weights (lambda
and gamma) multiply these.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import BalancingConfig
from trainer.losses import teacher_of


@dataclass(frozen=True, slots=True)
class Weights:
    """`factors` by term, () or one a sample, b; a term that is not named has 1. `penalty`, (), is added."""

    factors: dict[str, Tensor] = field(default_factory=dict)
    penalty: Tensor | float = 0.0


class Balancing(nn.Module, ABC):
    """terms: of all teachers, named teacher/summary or teacher/spatial. summary_dim: of the student."""

    def __init__(self, terms: Sequence[str], summary_dim: int, config: BalancingConfig) -> None:
        super().__init__()
        self.places = {term: place for place, term in enumerate(terms)}

    @abstractmethod
    def weigh(self, terms: Sequence[str], summary: Tensor) -> Weights:
        """Weights of those of the terms that a batch has; `summary` is the student's, b d."""

    def observe(self, means: Mapping[str, Tensor]) -> None:
        """The terms' means over the global batch of a step."""

    def parameters_beside(self, teachers: Collection[str]) -> list[nn.Parameter]:
        """Those that take no part where only these teachers are served."""
        return []

    def _known(self, terms: Sequence[str]) -> list[str]:
        return [term for term in terms if term in self.places]


class Naive(Balancing):
    """Every term counts once: the paper's choice."""

    def __init__(self, *_: object) -> None:
        super().__init__((), 0, BalancingConfig())

    def weigh(self, terms: Sequence[str], summary: Tensor) -> Weights:
        return Weights()


class Uncertainty(Balancing):
    """sum of exp(-b) L + penalty * softplus(b), with a learned b for each term, which starts at 0.

    AM-RADIO equation 6 (after Kendall et al. 2018), with one scalar a term as b. The paper's text does not
    give the factor of softplus: penalty.
    """

    def __init__(self, terms: Sequence[str], summary_dim: int, config: BalancingConfig) -> None:
        super().__init__(terms, summary_dim, config)
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in terms)
        self._penalty = config.penalty

    def weigh(self, terms: Sequence[str], summary: Tensor) -> Weights:
        b = {term: self.b[self.places[term]] for term in self._known(terms)}
        penalty = sum(self._penalty * F.softplus(value) for value in b.values())
        return Weights({term: torch.exp(-value) for term, value in b.items()}, penalty)

    def parameters_beside(self, teachers: Collection[str]) -> list[nn.Parameter]:
        return [self.b[i] for term, i in self.places.items() if teacher_of(term) not in teachers]


class AdaLoss(Balancing):
    """sum of L / EMA(L): AM-RADIO equation 7 (after Hu et al. 2019).

    The average is over the steps before this one, in which the term took part; until there is one, the weight
    is 1.
    """

    average: Tensor

    def __init__(self, terms: Sequence[str], summary_dim: int, config: BalancingConfig) -> None:
        super().__init__(terms, summary_dim, config)
        self.register_buffer("average", torch.zeros(len(terms)))  # 0: nothing observed
        self._momentum = config.momentum

    def weigh(self, terms: Sequence[str], summary: Tensor) -> Weights:
        factors = torch.where(self.average > 0, 1 / self.average, 1.0)
        return Weights({term: factors[self.places[term]] for term in self._known(terms)})

    @torch.no_grad()
    def observe(self, means: Mapping[str, Tensor]) -> None:
        for term in self._known([*means]):
            place, mean = self.places[term], means[term].to(self.average)
            moved = torch.lerp(mean, self.average[place], self._momentum)
            self.average[place] = torch.where(self.average[place] > 0, moved, mean)


class AmtmlKd(Balancing):
    """For each image a softmax over teachers, from a latent vector a teacher (AMTML-KD, Liu et al. 2020).

    logit = v . (latent * summary); both terms of a teacher have its weight. Weights are times the number of
    teachers in the batch, so they start at 1; a teacher that is alone in its group keeps 1. Nothing holds
    them up where a loss is large: AM-RADIO saw them collapse onto CLIP.
    """

    def __init__(self, terms: Sequence[str], summary_dim: int, config: BalancingConfig) -> None:
        super().__init__(terms, summary_dim, config)
        self.teachers = list(dict.fromkeys(teacher_of(term) for term in terms))
        self.latent = nn.ParameterList(nn.Parameter(torch.zeros(summary_dim)) for _ in self.teachers)
        self.v = nn.Parameter(torch.full((summary_dim,), summary_dim**-0.5))

    def weigh(self, terms: Sequence[str], summary: Tensor) -> Weights:
        known = self._known(terms)
        teachers = list(dict.fromkeys(map(teacher_of, known)))
        if not teachers:
            return Weights()
        latent = torch.stack([self.latent[self.teachers.index(name)] for name in teachers])  # t d
        logits = (summary.float()[:, None] * latent) @ self.v  # b t
        weights = len(teachers) * logits.softmax(-1)
        return Weights({term: weights[:, teachers.index(teacher_of(term))] for term in known})

    def parameters_beside(self, teachers: Collection[str]) -> list[nn.Parameter]:
        return [self.latent[i] for i, name in enumerate(self.teachers) if name not in teachers]


BALANCINGS: dict[str, type[Balancing]] = {
    "naive": Naive,
    "uncertainty": Uncertainty,
    "adaloss": AdaLoss,
    "amtml_kd": AmtmlKd,
}


def create_balancing(config: BalancingConfig, terms: Sequence[str], summary_dim: int) -> Balancing:
    """The method that a recipe names, over these terms."""
    return BALANCINGS[config.kind](terms, summary_dim, config)
