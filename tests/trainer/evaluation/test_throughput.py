from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from storage_schemas.errors import UserError
from trainer.evaluation import throughput
from trainer.evaluation.throughput import measure_throughput


class Clockwork(nn.Module):
    """Takes a given time for each call, and keeps what it was called with."""

    def __init__(self, *seconds: float) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.seconds, self.calls = seconds, 0
        self.seen: list[tuple[torch.Size, torch.dtype, bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(self.seconds[self.calls % len(self.seconds)])
        self.calls += 1
        out: Tensor = self.linear(images.mean((2, 3)))
        self.seen.append((images.shape, out.dtype, self.training, torch.is_grad_enabled()))
        return out


def test_it_is_the_median_of_the_steps_after_the_warm_up() -> None:
    module = Clockwork(0.5, 0.05, 0.05, 0.4)
    measured = measure_throughput(module, 8, 8, batch_size=4, steps=3, warmup=1)
    assert module.calls == 4
    assert 4 / 0.15 < measured.images_per_second <= 4 / 0.05


def test_the_conditions_stand_beside_the_number() -> None:
    module = Clockwork(0)
    measured = measure_throughput(module, 8, 16, batch_size=4, steps=2, warmup=0, dtype=torch.bfloat16)
    assert (measured.height, measured.width, measured.batch_size, measured.steps) == (8, 16, 4, 2)
    assert (measured.dtype, measured.device, measured.compiled) == ("bfloat16", "cpu", False)
    assert measured.threads == torch.get_num_threads()
    assert set(module.seen) == {(torch.Size([4, 3, 8, 16]), torch.bfloat16, False, False)}


@pytest.mark.parametrize("training", [True, False])
def test_the_module_is_left_as_it_was(training: bool) -> None:
    module = Clockwork(0).train(training)
    measure_throughput(module, 8, 8, steps=1)
    assert module.training is training
    assert module.linear.weight.dtype == torch.float32


def test_compiled_modules_are_told_from_others() -> None:
    module = Clockwork(0)
    assert not throughput._is_compiled(module)
    assert throughput._is_compiled(torch.compile(module, backend="eager"))
    module.compile(backend="eager")
    assert throughput._is_compiled(module)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(UserError, match="steps 0"):
        measure_throughput(Clockwork(0), 8, 8, steps=0)
