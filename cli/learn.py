"""Commands about students: train, students, export."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from cli.console import (
    AsJson,
    Overrides,
    RecipePath,
    complain,
    out,
    print_json,
    print_table,
    progress,
    show_metrics,
)
from storage_schemas.errors import UserError
from storage_schemas.recipe import read_recipe


def train(
    recipe: RecipePath,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    on_corrupt: Annotated[
        Literal["stop", "skip"] | None, typer.Option(help="What a row that does not hold does to the run.")
    ] = None,
    launcher: Annotated[
        Literal["ray"] | None, typer.Option(help="Run it in workers of Ray Train, as torchrun would.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Of Ray Train, one a rank.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; else RAY_ADDRESS, else here.")
    ] = None,
    overrides: Overrides = [],
) -> None:
    """Train the recipe's student from the store. Under torchrun, every rank runs this."""
    from trainer.config import TrainConfig

    run = _launcher(launcher, workers, address)
    flags = [] if on_corrupt is None else [f"training.on_corrupt={on_corrupt}"]
    sections = read_recipe(recipe, [*overrides, *flags])
    steps = TrainConfig.from_recipe(sections).training.steps
    with progress("training", "steps") as (advance, start):
        checkpoint = run(sections, resume, on_metrics=show_metrics(advance, start, steps))
    if os.environ.get("RANK", "0") == "0":
        if checkpoint.name != f"step-{steps:08d}":
            complain(f"stopped by SIGTERM at {checkpoint.name}: run it again with --resume to go on")
        out.print(str(checkpoint), highlight=False, markup=False, soft_wrap=True)


def _launcher(name: str | None, workers: int | None, address: str | None) -> Callable[..., Path]:
    """What trains: this process, as a rank of torchrun if it is one, or workers of Ray."""
    if name is None:
        if workers is not None or address is not None:
            option = "--address" if workers is None else "--workers"
            raise UserError(f"{option}: is for --launcher ray; give that, too")
        from trainer.train import train as alone

        return alone
    from trainer.launchers import train_by_ray

    return partial(train_by_ray, workers=workers or 1, address=address)


def students(
    measure: Annotated[bool, typer.Option("--measure", help="Also count images a second here.")] = False,
    as_json: AsJson = False,
) -> None:
    """Students at 224 pixels: parameters, GFLOPs (two a multiply-add), grid. Others of timm are timm/NAME."""
    from trainer.catalogue import describe, described_students

    listed = [describe(name, measure) for name in described_students()]
    if as_json:
        print_json([asdict(found) for found in listed])
        return
    rows = []
    for found in listed:
        row = [found.name, f"{found.parameters:,}", f"{found.gflops:.1f}", "×".join(map(str, found.grid))]
        rows.append([*row, *([f"{found.images_per_second:.2f}"] if measure else [])])
    print_table(("name", "parameters", "GFLOPs", "grid", *(["images/s"] if measure else [])), rows)


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder.")],
    to: Annotated[Literal["safetensors", "torchscript", "onnx", "torch-export"], typer.Option()],
    destination: Annotated[
        str, typer.Option("--out", metavar="PATH", help="A folder or URL for safetensors, else a file.")
    ],
    resolution: Annotated[
        tuple[int, int] | None, typer.Option(metavar="HEIGHT WIDTH", help="The training one if not given.")
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Any resolution the student takes.")] = False,
    teacher: Annotated[str | None, typer.Option(help="Export its features, not the student's own.")] = None,
) -> None:
    """Write a trained student for use without this project, and check what was written against it."""
    from trainer.export import export_student

    out.print(export_student(checkpoint, to, destination, resolution, dynamic, teacher), highlight=False)
