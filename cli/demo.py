"""The command `demo`: photographs, recording, training and report in one call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import Overrides, out, progress, show_metrics
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.recipe import read_recipe


def demo(
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where everything goes.")] = Path(
        "runs/demo"
    ),
    overrides: Overrides = [],
) -> None:
    """Record two teachers over real photographs, train a small student, and write a report."""
    from pipeline.photographs import write_photograph_shards
    from trainer.evaluation.report import write_report
    from trainer.evaluation.showcase import make_showcase
    from trainer.train import train as run

    sections = _demo_recipe(folder, overrides)
    write_photograph_shards(folder / "shards")
    recorded = _demo_record(sections, folder / "recorded.json")
    with progress("training", "steps") as (advance, start):
        checkpoint = run(sections, True, show_metrics(advance, start, sections["training"]["steps"]))
    report = make_showcase(sections, checkpoint, **recorded)
    write_report(report, folder / "report.html")
    for part in report.held_out:
        for d in part.distances:
            text = f"{d.after:.3f}; untrained {d.before:.3f}, a constant {d.mean_predictor:.3f}"
            out.print(f"{part.title}: distance to {d.teacher} {text}", highlight=False)
    out.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _demo_recipe(folder: Path, overrides: list[str]) -> dict[str, Any]:
    recipe = Path(__file__).parents[1] / "recipes" / "demo.yaml"
    if not recipe.is_file():
        raise UserError(f"demo: {str(recipe)!r} is not installed; run the demo from a copy of the repository")
    places = {
        "store.url": "store",
        "data.train": "shards/train-*.tar",
        "data.held_out": "shards/held-out-*.tar",
        "training.output": "student",
    }
    here = [f"{key}={json.dumps(str(folder / place))}" for key, place in places.items()]
    return read_recipe(recipe, [*here, *overrides])


def _demo_record(sections: dict[str, Any], notes: Path) -> dict[str, float]:
    """Record what is missing. Views and seconds add up in `notes`, for a second run has nothing to time."""
    from pipeline.config import ExtractConfig
    from pipeline.extract import extract

    with progress("recording", "views") as (advance, start):
        config = ExtractConfig.from_recipe(sections)
        found = extract(config, on_start=lambda plan: start(plan.rows), on_views=advance)
    if found.failed:
        raise DataDamage("; ".join(found.failed.values()))
    noted = json.loads(notes.read_text()) if notes.is_file() else {"views": 0, "seconds": 0.0}
    noted = {"views": noted["views"] + found.views, "seconds": noted["seconds"] + found.seconds}
    if not noted["views"]:
        raise UserError(f"--out: {str(notes)!r} of an earlier run is missing; give another folder")
    notes.write_text(json.dumps(noted))
    return {"record_seconds": noted["seconds"], "record_rate": noted["views"] / noted["seconds"]}
