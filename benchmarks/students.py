"""The students of AM-RADIO's Table 6 side by side: images a second as ratios to RADIO-ViT-B/16.

    python benchmarks/students.py [--runs 3] [--batch-size 4] [--threads 2] [NAME ...]

Forward passes at 224 pixels in float32 on the CPU, in evaluation mode, with random weights. The students take
turns within a run, and only one is in memory; each run's ratio is to RADIO-ViT-B/16 in that run, measured
right before each student, so that a busy machine slows both; its own images a second stand in each row, and
tell a row that something else disturbed. Figures are medians over the runs. The paper's
images a second are of a GPU, and it has no RADIO-ViT-B/16: its ratios are to B/14, beside ours to B/14.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from trainer.students import Student, create_student
from trainer.students.registry import TABLE_6

BASE = "radio_vit_b16"
# Name: the paper's parameters in millions, and its images a second (Table 6).
PAPER = {
    "radio_vit_b32": (88, 17152),
    "radio_vit_b14": (86, 3699),
    "radio_vit_l14": (304, 1126),
    "radio_vit_h14": (632, 556),
    **TABLE_6,
    "eradio_b": (118, 6422),
    "eradio_b without neck": (113, 7040),
    "eradio_l": (265, 3472),
}
PAPER_BASE = 3699  # RADIO-ViT-B/14


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PAPER)}; all if none are given")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = torch.rand(options.batch_size, 3, 224, 224)
    base = make(BASE)
    print(f"batch {options.batch_size}, {options.threads} threads, {options.runs} runs, {torch.__version__}")
    print("| student | parameters, M | images/s | B/16's, then | to B/16 | to B/14 | the paper's, to B/14 |")
    print("|---|---|---|---|---|---|---|")
    names = [*dict.fromkeys(["radio_vit_b14", *(options.names or PAPER)])]
    b14 = 1.0
    for name in names:
        student = make(name)
        speeds, bases = measure(base, student, images, options.runs)
        ratio = statistics.median(speed / other for speed, other in zip(speeds, bases, strict=True))
        b14 = ratio if name == "radio_vit_b14" else b14
        millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
        paper = PAPER[name][1] / PAPER_BASE
        print(
            f"| {name} | {millions:.1f} | {statistics.median(speeds):.2f} | {statistics.median(bases):.2f} "
            f"| {ratio:.2f} | {ratio / b14:.2f} | {paper:.2f} |",
            flush=True,
        )


def make(name: str) -> Student:
    plain = name.removesuffix(" without neck")
    settings: dict[str, Any] = {} if plain == name else {"neck": False}
    return create_student(plain, resolution=(224, 224), **settings).eval()


@torch.inference_mode()
def measure(base: Student, student: Student, images: Tensor, runs: int) -> tuple[list[float], list[float]]:
    """Images a second of the student, and of `base` beside it, one of each a run, after one that does not
    count.
    """
    speeds, bases = [], []
    for _ in range(1 + runs):
        bases.append(len(images) / clock(base, images))
        speeds.append(len(images) / clock(student, images))
    return speeds[1:], bases[1:]


def clock(student: Student, images: Tensor) -> float:
    start = time.perf_counter()
    student(images)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
