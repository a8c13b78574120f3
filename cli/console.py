"""What every command shares: exit codes, progress, tables, JSON, and the arguments that several take.

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
from pathlib import Path
from typing import Annotated, Any

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

# Where there is no terminal there is no width to fit: tables are written whole.
out, err = Console(width=None if sys.stdout.isatty() else 200), Console(stderr=True, soft_wrap=True)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; see docs/recipes.md.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="key=value", help="Override a key of the recipe.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

Advance = Callable[..., None]
Start = Callable[[int], None]

PLAIN_SECONDS = 10.0  # between lines of progress where there is no terminal
RANK_0_SECONDS = 3.0  # that other ranks of torchrun leave to rank 0, to say what all of them met


def commands(group: typer.Typer, *functions: Callable[..., None]) -> None:
    """Make functions commands of their own names."""
    for function in functions:
        group.command(name=function.__name__)(_with_exit_codes(function))


def _with_exit_codes(function: Callable[..., None]) -> Callable[..., None]:
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
        except Exception as error:
            from storage_schemas.objects import StorageError  # loaded by whatever could have raised it

            if not isinstance(error, StorageError):
                raise
            _complain_first(f"error: {str(error).strip().partition(chr(10))[0]}")
            raise typer.Exit(1) from None

    return run


@contextmanager
def progress(description: str, unit: str) -> Iterator[tuple[Advance, Start]]:
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


def show_metrics(advance: Advance, start: Start, steps: int) -> Callable[[Any], None]:
    done = 0

    def show(metrics: Any) -> None:
        nonlocal done
        if not done:
            start(steps)
        rate, wait = metrics.images_per_second, metrics.data_wait
        text = f"loss {metrics.loss:.4f}, {rate:.0f} views/s, {wait:.0%} waiting"
        if metrics.corrupt_rows:
            text += f", {metrics.corrupt_rows} rows left out as damaged"
        advance(metrics.step - done, text)
        done = metrics.step

    return show


def print_facts(facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        out.print(f"{name}: {value}", highlight=False, markup=False)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Where the terminal is too narrow, figures go on in the next line: none is cut."""
    table = Table(*(Column(name, overflow="fold") for name in head))
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table, highlight=False)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def complain(line: str) -> None:
    err.print(line, style="red", highlight=False, markup=False)


def _complain_first(line: str) -> None:
    """Rank 0 speaks first, and torchrun then ends the others; what they alone met, they still say."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(RANK_0_SECONDS)
    complain(line)
