"""The command line: each command parses, calls one function, and prints.

Exit 0: done. 1: it ran, but something failed and is listed. 2: wrong input, with one line that names it.
130: interrupted.
Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from storage_schemas.errors import DataDamage, UserError
from storage_schemas.recipe import read_recipe

Function = TypeVar("Function", bound=Callable[..., None])

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Record teachers once. Rebroadcast them to every student.",
)
evaluate = typer.Typer(no_args_is_help=True, help="Measure a student, and the teachers it learned from.")
app.add_typer(evaluate, name="eval")

# Where there is no terminal there is no width to fit: tables are written whole.
out, err = Console(width=None if sys.stdout.isatty() else 200), Console(stderr=True, soft_wrap=True)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see docs/recipes.md.")]
Subject = Annotated[
    Path, typer.Argument(metavar="RECIPE_OR_CHECKPOINT", help="A recipe, or a checkpoint's folder.")
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="key=value", help="Override a key of the recipe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
StoreUrl = Annotated[
    str, typer.Argument(metavar="STORE", help="A folder, or an s3://, gs:// or memory:// URL.")
]

PLAIN_SECONDS = 10.0  # between lines of progress where there is no terminal
RANK_0_SECONDS = 3.0  # that other ranks of torchrun leave to rank 0, to say what all of them met


def command(group: typer.Typer) -> Callable[[Function], Function]:
    """A command whose failures become exit codes."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except UserError as error:
                _complain_first(f"error: {error}")
                raise typer.Exit(2) from None
            except (DataDamage, OSError) as error:
                kind = "damaged" if isinstance(error, DataDamage) else "error"
                _complain_first(f"{kind}: {error}")
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                again = "again with --resume" if function.__name__ == "train" else "again"
                _complain_first(f"interrupted: run it {again} to go on")
                raise typer.Exit(130) from None

        group.command(name=function.__name__)(run)
        return function

    return decorate


@command(app)
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
    with _progress("recording", "views") as (advance, start):
        report = run(
            config,
            shards,
            on_start=lambda plan: start(plan.rows),
            on_views=advance,
            on_failure=_complain,
        )
    if as_json:
        _print_json({**asdict(report), "images_per_second": report.images_per_second})
    else:
        _print_facts(_extract_facts(report))
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


@command(app)
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
        _print_json({**asdict(made), "bytes": made.bytes, "hours": made.hours, "fits": made.fits})
    else:
        _print_table(
            ("teacher", "GFLOPs a view", "bytes a view", "bytes", "objects"),
            [
                (c.name, f"{c.gflops:.2f}", f"{c.bytes_a_view:,}", f"{c.bytes:,}", f"{c.objects:,}")
                for c in made.teachers
            ],
        )
        _print_facts(
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
        _complain(f"damaged: {line}")
    if made.damaged or not made.fits:
        raise typer.Exit(1)


@command(app)
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
        _print_json([{**asdict(found), "spec": found.spec and found.spec.model_dump()} for found in listed])
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
    _print_table(columns, rows)
    _print_facts({found.name: found.problem for found in listed if found.problem})


@command(app)
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


@command(app)
def train(
    recipe: RecipePath,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overrides: Overrides = [],
) -> None:
    """Train the recipe's student from the store. Under torchrun, every rank runs this."""
    from trainer.config import TrainConfig
    from trainer.train import train as run

    sections = read_recipe(recipe, overrides)
    steps = TrainConfig.from_recipe(sections).training.steps
    with _progress("training", "steps") as (advance, start):
        checkpoint = run(sections, resume, on_metrics=_show_metrics(advance, start, steps))
    if os.environ.get("RANK", "0") == "0":
        out.print(str(checkpoint), highlight=False, markup=False, soft_wrap=True)


def _show_metrics(advance: Advance, start: Start, steps: int) -> Callable[[Any], None]:
    done = 0

    def show(metrics: Any) -> None:
        nonlocal done
        if not done:
            start(steps)
        rate, wait = metrics.images_per_second, metrics.data_wait
        text = f"loss {metrics.loss:.4f}, {rate:.0f} views/s, {wait:.0%} waiting"
        advance(metrics.step - done, text)
        done = metrics.step

    return show


@command(evaluate)
def knn(subject: Subject, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """k-NN accuracy of each teacher, straight from the store, of raw pixels and of the student."""
    from trainer.evaluation.subject import Subject as Loaded

    with _progress("k-NN", "views") as (advance, _):
        found = Loaded.load(subject, overrides).knn(advance)
    if as_json:
        _print_json(found)
    else:
        _print_table(("", "top-1"), [(name, f"{100 * top1:.2f} %") for name, top1 in found.items()])


@command(evaluate)
def distance(subject: Subject, overrides: Overrides = [], as_json: AsJson = False) -> None:
    """Loss of the student and of a constant against each teacher, on the held-out views."""
    from trainer.evaluation.subject import Subject as Loaded

    with _progress("distance", "views") as (advance, _):
        found = Loaded.load(subject, overrides).distance(advance)
    if as_json:
        _print_json({who: {name: asdict(d) for name, d in by.items()} for who, by in found.items()})
        return
    rows = [
        (who, name, f"{d.summary:.4f}", f"{d.spatial:.4f}", f"{d.views:,}")
        for who, by_teacher in found.items()
        for name, d in by_teacher.items()
    ]
    _print_table(("", "teacher", "summary", "spatial", "views"), rows)


@command(evaluate)
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
        _print_json(found)
    else:
        _print_facts({**found, "images_per_second": f"{found['images_per_second']:.1f}"})


@command(app)
def verify(
    store: StoreUrl,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also run the teachers again on a sample of views.")
    ] = False,
    sample: Annotated[int, typer.Option(min=1, help="Views a teacher for --deep.")] = 32,
) -> None:
    """Check every digest and row count of a store; exit 1 and a line for each thing that does not hold."""
    from pipeline.verify import verify_deep
    from storage_schemas.store import FeatureStore

    opened = FeatureStore.open(store)
    commits: list[tuple[str, str]] = []
    problems: list[str] = []
    for teacher in opened.teachers():
        try:
            commits += [(teacher, shard) for shard in opened.shards(teacher)]
        except (DataDamage, UserError) as error:
            problems.append(str(error))
    with _progress("verifying", "parts") as (advance, start):
        start(len(commits))
        for teacher, shard in commits:
            problems += opened.verify(teacher, shard)
            advance(1)
    if deep and not problems:
        for teacher in opened.teachers():
            problems += verify_deep(opened, teacher, sample)
    problems = list(dict.fromkeys(problems))
    for problem in problems:
        out.print(problem, highlight=False, markup=False)
    checked = f"{len(commits)} parts of {len(opened.teachers())} teachers"
    out.print(f"{checked}: {len(problems)} problems" if problems else f"{checked}: all as recorded")
    if problems:
        raise typer.Exit(1)


@command(app)
def students(
    measure: Annotated[bool, typer.Option("--measure", help="Also count images a second here.")] = False,
    as_json: AsJson = False,
) -> None:
    """Students at 224 pixels: parameters, GFLOPs (two a multiply-add), grid. Others of timm are timm/NAME."""
    from trainer.catalogue import describe, described_students

    listed = [describe(name, measure) for name in described_students()]
    if as_json:
        _print_json([asdict(found) for found in listed])
        return
    rows = []
    for found in listed:
        row = [found.name, f"{found.parameters:,}", f"{found.gflops:.1f}", "×".join(map(str, found.grid))]
        rows.append([*row, *([f"{found.images_per_second:.2f}"] if measure else [])])
    _print_table(("name", "parameters", "GFLOPs", "grid", *(["images/s"] if measure else [])), rows)


@command(app)
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


@command(app)
def inspect(store: StoreUrl, as_json: AsJson = False) -> None:
    """What a store holds: teachers, shards, rows, invalid rows with their reasons, bytes, codecs."""
    from storage_schemas.inspection import inspect_store
    from storage_schemas.store import FeatureStore

    found = inspect_store(FeatureStore.open(store))
    if as_json:
        _print_json(asdict(found))
        return
    rows = []
    for entry in found.teachers:
        spec = entry.spec
        grid = f"{spec['grid']['height']}×{spec['grid']['width']}×{spec['spatial_dim']}"
        counts = (f"{entry.shards:,}", f"{entry.rows:,}", f"{entry.invalid_rows:,}", f"{entry.bytes:,}")
        rows.append((entry.name, spec["model"], spec["weights"], grid, spec["codec"], *counts))
    _print_table(("teacher", "model", "weights", "grid", "codec", "shards", "rows", "invalid", "bytes"), rows)
    facts = {"view tables": f"{found.shards:,}", "views": f"{found.views:,}"}
    facts |= {f"status {name}": f"{count:,}" for name, count in found.statuses.items()}
    facts |= {f"{count:,} ×": reason for reason, count in found.errors.items()}
    facts["attempts that do not count"] = f"{found.garbage:,} (`rebroadcast gc` removes them)"
    _print_facts(facts)


@command(app)
def gc(
    store: StoreUrl,
    older_than: Annotated[float, typer.Option(min=0, help="Hours; younger attempts may be at work.")] = 24.0,
) -> None:
    """Remove attempts that no commit names."""
    from storage_schemas.store import FeatureStore

    opened = FeatureStore.open(store)
    found = opened.garbage(older_than * 3600)
    for path in found:
        opened.objects.delete_folder(path)
        out.print(path, highlight=False)
    out.print(f"{len(found)} attempts removed")


@command(app)
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
    with _progress("training", "steps") as (advance, start):
        checkpoint = run(sections, True, _show_metrics(advance, start, sections["training"]["steps"]))
    report = make_showcase(sections, checkpoint, **recorded)
    write_report(report, folder / "report.html")
    for part in report.held_out:
        for d in part.distances:
            text = f"{d.after:.3f}; untrained {d.before:.3f}, a constant {d.mean_predictor:.3f}"
            out.print(f"{part.title}: distance to {d.teacher} {text}", highlight=False)
    out.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)


def _demo_recipe(folder: Path, overrides: list[str]) -> dict[str, Any]:
    recipe = Path(__file__).parent / "recipes" / "demo.yaml"
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

    with _progress("recording", "views") as (advance, start):
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


Advance = Callable[..., None]
Start = Callable[[int], None]


@contextmanager
def _progress(description: str, unit: str) -> Iterator[tuple[Advance, Start]]:
    """(advance(count, text), start(total)): a bar on a terminal, else a plain line every ten seconds."""
    if not err.is_terminal:
        yield _plain_progress(description, unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err) as bar:
        task = bar.add_task(description, total=None)

        def advance(count: int, text: str = "") -> None:
            bar.update(task, advance=count, description=f"{description} {text}".rstrip())

        yield advance, lambda total: bar.update(task, total=total)


def _plain_progress(description: str, unit: str) -> tuple[Advance, Start]:
    state = {"done": 0, "total": 0, "said": time.monotonic()}

    def advance(count: int, text: str = "") -> None:
        state["done"] += count
        finished = state["done"] == state["total"]
        if finished or time.monotonic() - state["said"] >= PLAIN_SECONDS:
            state["said"] = time.monotonic()
            of = f" of {state['total']:,}" if state["total"] else ""
            print(f"{description}: {state['done']:,}{of} {unit} {text}".rstrip(), file=sys.stderr, flush=True)

    return advance, lambda total: state.update(total=total)


def _print_facts(facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        out.print(f"{name}: {value}", highlight=False, markup=False)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Where the terminal is too narrow, figures go on in the next line: none is cut."""
    table = Table(*(Column(name, overflow="fold") for name in head))
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table, highlight=False)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _complain(line: str) -> None:
    err.print(line, style="red", highlight=False, markup=False)


def _complain_first(line: str) -> None:
    """Rank 0 speaks first, and torchrun then ends the others; what they alone met, they still say."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(RANK_0_SECONDS)
    _complain(line)


if __name__ == "__main__":
    app(prog_name="rebroadcast")
