"""What each student is. The counts need no memory: they are of a student on PyTorch's meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.evaluation.throughput import measure_throughput
from trainer.students import STUDENTS, create_student
from trainer.students.registry import TABLE_6

SIDE = 224
BATCH = 4


@dataclass(frozen=True, slots=True)
class Described:
    """A student at 224 pixels; a multiply-add is two FLOPs. `images_per_second` is None if not measured."""

    name: str
    parameters: int
    gflops: float
    grid: tuple[int, int]
    images_per_second: float | None = None


def described_students() -> list[str]:
    """Those of the registry, and of timm those of AM-RADIO's Table 6."""
    return [*STUDENTS, *TABLE_6]


def describe(name: str, measure: bool = False) -> Described:
    """The counts of a student, and how fast it is here if asked, at a batch of four in float32."""
    with torch.device("meta"):
        student = create_student(name, resolution=(SIDE, SIDE)).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = student(torch.empty(1, 3, SIDE, SIDE))
    return Described(
        name=name,
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        gflops=counter.get_total_flops() / 1e9,
        grid=(output.spatial.shape[1], output.spatial.shape[2]),
        images_per_second=_images_per_second(name) if measure else None,
    )


def _images_per_second(name: str) -> float:
    student = create_student(name, resolution=(SIDE, SIDE))
    return measure_throughput(student, SIDE, SIDE, BATCH, steps=5, warmup=2).images_per_second
