"""Commands that record teachers: extract, plan, teachers, text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.console import (
    AsJson,
    Overrides,
    RecipePath,
    complain,
    out,
    print_facts,
    print_json,
    print_table,
    progress,
)
from storage_schemas.recipe import read_recipe


def extract(
    recipe: RecipePath,
    executor: Annotated[
        Literal["auto", "inline", "ray"] | None, typer.Option(help="Where shards are recorded.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Ray actors.")] = None,
    teachers: Annotated[str, typer.Option(metavar="a,b", help="Only these teachers.")] = "",
    shards: Annotated[str, typer.Option(metavar="GLOB", help="Only source shards with such names.")] = "*",
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """Record the teachers' features of every source shard that lacks them. Run it again to go on."""
    from pipeline.config import ExtractConfig
    from pipeline.extract import extract as run

    given = {"executor": executor, "workers": workers}
    flags = [f"extract.{name}={value}" for name, value in given.items() if value is not None]
    config = ExtractConfig.from_recipe(read_recipe(recipe, [*overrides, *flags]))
    if teachers:
        config = config.select(teachers.split(","))
    with progress("recording", "views") as (advance, start):
        report = run(
            config,
            shards,
            on_start=lambda plan: start(plan.rows),
            on_views=advance,
            on_failure=complain,
        )
    if as_json:
        print_json({**asdict(report), "images_per_second": report.images_per_second})
    else:
        print_facts(_extract_facts(report))
    if report.failed:
        raise typer.Exit(1)


def _extract_facts(report: Any) -> dict[str, str]:
    statuses = sorted(report.statuses.items())
    facts = {
        "shards": f"{report.recorded} recorded, {report.already_done} were done, {len(report.failed)} failed",
        "views": ", ".join([f"{report.views:,}", *(f"{count:,} {name}" for name, count in statuses)]),
        "bytes": f"{report.bytes:,}",
        "views a second": f"{report.images_per_second:.1f}",
    }
    facts |= {f"{name}: invalid rows": str(count) for name, count in report.invalid.items() if count}
    facts |= {
        f"{name}: cosine after the codec": f"{value['cosine_mean']:.5f} mean, {value['cosine_min']:.5f} least"
        for name, value in report.fidelity.items()
    }
    return facts | {f"failed: {shard}": why for shard, why in report.failed.items()}


def plan(
    recipe: RecipePath,
    rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Views a second that your machines make.")
    ] = None,
    trial: Annotated[int, typer.Option(min=0, help="Measure the rate here over so many images.")] = 0,
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """What recording will cost, before it starts; exit 1 for too little space or a damaged tar."""
    from pipeline.config import ExtractConfig
    from pipeline.plan import make_plan

    made = make_plan(ExtractConfig.from_recipe(read_recipe(recipe, overrides)), rate, trial)
    if as_json:
        print_json({**asdict(made), "bytes": made.bytes, "hours": made.hours, "fits": made.fits})
    else:
        print_table(
            ("teacher", "GFLOPs a view", "bytes a view", "bytes", "objects"),
            [
                (c.name, f"{c.gflops:.2f}", f"{c.bytes_a_view:,}", f"{c.bytes:,}", f"{c.objects:,}")
                for c in made.teachers
            ],
        )
        print_facts(
            {
                "source shards": f"{made.shards:,}",
                "rows": f"{made.rows:,}"
                + ("" if made.exact else " (estimated from the shards that were read)"),
                "bytes": f"{made.bytes:,}",
                "free": "no limit known" if made.free_bytes is None else f"{made.free_bytes:,}",
                "hours": f"{made.hours:.2f}" if made.hours is not None else "unknown: give --rate or --trial",
                "space": "suffices" if made.fits else "does not suffice: `extract` will refuse to start",
            }
        )
    for line in made.damaged:
        complain(f"damaged: {line}")
    if made.damaged or not made.fits:
        raise typer.Exit(1)


def teachers(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="Its teachers only.")] = None,
    overrides: Overrides = [],
    as_json: AsJson = False,
) -> None:
    """What teachers store, and whether their weights are at hand: a recipe's, or those known by name."""
    from pipeline.config import ExtractConfig
    from pipeline.teachers.catalogue import KNOWN, Entry, list_teachers

    entries = dict(KNOWN)
    if recipe:
        config = ExtractConfig.from_recipe(read_recipe(recipe, overrides))
        entries = {
            name: Entry(entry.family, entry.model, entry.weights, entry.settings)
            for name, entry in config.teachers.items()
        }
    listed = list_teachers(entries)
    if as_json:
        print_json([{**asdict(found), "spec": found.spec and found.spec.model_dump()} for found in listed])
        return
    columns = ("name", "family", "model", "weights", "at hand", "pixels", "grid", "summary", "bytes a view")
    rows = []
    for found in listed:
        row = [found.name, found.entry.family, found.entry.model, found.entry.weights]
        row.append("yes" if found.at_hand else "no")
        if found.spec:
            spec = found.spec
            row += [f"{spec.height}×{spec.width}", f"{spec.grid.height}×{spec.grid.width}×{spec.spatial_dim}"]
            row += [f"{spec.summary} {spec.summary_dim}", f"{spec.row_bytes:,}"]
        rows.append(row)
    print_table(columns, rows)
    print_facts({found.name: found.problem for found in listed if found.problem})


def text(
    recipe: RecipePath,
    teacher: Annotated[str, typer.Option(help="Of open_clip, with summary `projected`.")],
    classes: Annotated[str, typer.Option(metavar="FILE", help="A class name a line; or `imagenet`.")],
    templates: Annotated[
        str, typer.Option(metavar="FILE", help="A prompt a line, `{}` for the class; or `imagenet`.")
    ] = "imagenet",
    name: Annotated[str | None, typer.Option(help="Of the list in the store; default: the file's.")] = None,
    overrides: Overrides = [],
) -> None:
    """Record embeddings of class names beside a recorded CLIP teacher, for zero-shot classification."""
    from pipeline.config import ExtractConfig
    from pipeline.text import record_text

    config = ExtractConfig.from_recipe(read_recipe(recipe, overrides))
    found = record_text(config, teacher, classes, templates, name)
    count, width = found.vectors.shape
    used = len(found.provenance.templates)
    out.print(f"{teacher}: {count:,} classes × {width}, by {used} templates", highlight=False)
