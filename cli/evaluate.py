"""Commands of `eval`, which measure a student: knn, distance, throughput."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli.console import AsJson, Overrides, print_facts, print_json, print_table, progress

Subject = Annotated[
    Path, typer.Argument(metavar="RECIPE_OR_CHECKPOINT", help="A recipe, or a checkpoint's folder.")
]


def knn(subject: Subject, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """k-NN accuracy of each teacher, straight from the store, of raw pixels and of the student."""
    from trainer.evaluation.subject import Subject as Loaded

    with progress("k-NN", "views") as (advance, _):
        found = Loaded.load(subject, overrides).knn(advance)
    if as_json:
        print_json(found)
    else:
        print_table(("", "top-1"), [(name, f"{100 * top1:.2f} %") for name, top1 in found.items()])


def distance(subject: Subject, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """Loss of the student and of a constant against each teacher, on the held-out views."""
    from trainer.evaluation.subject import Subject as Loaded

    with progress("distance", "views") as (advance, _):
        found = Loaded.load(subject, overrides).distance(advance)
    if as_json:
        print_json({who: {name: asdict(d) for name, d in by.items()} for who, by in found.items()})
        return
    rows = [
        (who, name, f"{d.summary:.4f}", f"{d.spatial:.4f}", f"{d.views:,}")
        for who, by_teacher in found.items()
        for name, d in by_teacher.items()
    ]
    print_table(("", "teacher", "summary", "spatial", "views"), rows)


def throughput(
    subject: Subject,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """Images a second of the student's forward pass, with all that the figure depends on."""
    from trainer.evaluation.subject import Subject as Loaded

    found = asdict(Loaded.load(subject, overrides).throughput(batch_size))
    if as_json:
        print_json(found)
    else:
        print_facts({**found, "images_per_second": f"{found['images_per_second']:.1f}"})
