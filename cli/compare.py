"""The command `compare`: several students, or values of one key, on one store."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated

import typer

from cli.console import AsJson, Overrides, RecipePath, complain, out, print_json, print_table, progress
from storage_schemas.errors import UserError
from storage_schemas.recipe import read_recipe


def compare(
    recipe: RecipePath,
    students: Annotated[str, typer.Option(metavar="a,b", help="Students, each by its name.")] = "",
    vary: Annotated[
        str, typer.Option(metavar="KEY=a,b", help="Values of a key of the recipe, instead of students.")
    ] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Of the images counted a second.")] = 16,
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """Train several students on the same views, and print and plot quality against speed."""
    from trainer.compare import compare as run
    from trainer.compare import of_students, of_values

    if bool(students) == bool(vary):
        raise UserError("--students, --vary: give one of the two")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("compare: runs in one process; train each under torchrun with `train`")
    sections = read_recipe(recipe, overrides)
    if students:
        key, variants = "student", of_students(sections, [name.strip() for name in students.split(",")])
    else:
        key, variants = of_values(sections, vary)
    with progress("training", "steps") as (advance, start):
        found = run(key, variants, batch_size, start, advance, complain)
    if as_json:
        print_json(asdict(found))
    else:
        print_table(*found.table())
        for line in found.conditions():
            out.print(line, highlight=False, markup=False)
        if found.page:
            out.print(f"page: {found.page}", highlight=False, markup=False, soft_wrap=True)
    if found.failed:
        raise typer.Exit(1)
