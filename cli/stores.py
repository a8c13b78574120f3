"""Commands on a store: verify, inspect, gc."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import AsJson, out, print_facts, print_json, print_table, progress
from storage_schemas.errors import DataDamage, UserError

if TYPE_CHECKING:
    from storage_schemas.inspection import StoreSummary

StoreUrl = Annotated[
    str, typer.Argument(metavar="STORE", help="A folder, or an s3://, gs:// or memory:// URL.")
]


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
    with progress("verifying", "parts") as (advance, start):
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


def inspect(store: StoreUrl, as_json: AsJson = False) -> None:
    """What a store holds: teachers, shards, rows, invalid rows with their reasons, bytes, codecs.

    Exit 1 and a line for each commit or view table that is damaged; the rest is counted.
    """
    from storage_schemas.inspection import inspect_store
    from storage_schemas.store import FeatureStore

    found = inspect_store(FeatureStore.open(store))
    if as_json:
        print_json(asdict(found))
    else:
        _print_summary(found)
        for line in found.damage:
            out.print(line, highlight=False, markup=False)
    if found.damage:
        raise typer.Exit(1)


def _print_summary(found: StoreSummary) -> None:
    rows = []
    for entry in found.teachers:
        spec = entry.spec
        grid = f"{spec['grid']['height']}×{spec['grid']['width']}×{spec['spatial_dim']}"
        counts = (f"{entry.shards:,}", f"{entry.rows:,}", f"{entry.invalid_rows:,}", f"{entry.bytes:,}")
        rows.append((entry.name, spec["model"], spec["weights"], grid, spec["codec"], *counts))
    print_table(("teacher", "model", "weights", "grid", "codec", "shards", "rows", "invalid", "bytes"), rows)
    facts = {"view tables": f"{found.shards:,}", "views": f"{found.views:,}"}
    facts |= {f"status {name}": f"{count:,}" for name, count in found.statuses.items()}
    facts |= {f"{count:,} ×": reason for reason, count in found.errors.items()}
    facts["attempts and files that do not count"] = f"{found.garbage:,} (`rebroadcast gc` removes them)"
    print_facts(facts)


def gc(
    store: StoreUrl,
    older_than: Annotated[float, typer.Option(min=0, help="Hours; younger attempts may be at work.")] = 24.0,
) -> None:
    """Remove attempts that no commit names, and files that a killed process left half written.

    Exit 1 where a damaged commit does not say which attempt of its shard counts: those are all kept.
    """
    from storage_schemas.store import FeatureStore

    opened = FeatureStore.open(store)
    found = opened.garbage(older_than * 3600)
    for path in found:
        opened.objects.delete(path)
        out.print(path, highlight=False)
    damage = [line for teacher in opened.teachers() for line in opened.commits(teacher)[1].values()]
    for line in damage:
        out.print(line, highlight=False, markup=False)
    out.print(f"{len(found)} removed")
    if damage:
        raise typer.Exit(1)
