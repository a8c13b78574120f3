"""The command line: each command parses, calls one function, and prints. Here they become one app.

Commands import what they need when they run, so that `--help` needs no torch.
"""

from __future__ import annotations

import typer

from cli import compare, demo, evaluate, learn, record, stores
from cli.console import commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Record teachers once. Rebroadcast them to every student.",
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure a student, and the teachers it learned from.")
app.add_typer(eval_app, name="eval")

commands(app, record.extract, record.plan, record.teachers, record.text, learn.train, compare.compare)
commands(eval_app, evaluate.knn, evaluate.distance, evaluate.throughput)
commands(app, stores.verify, learn.students, learn.export, stores.inspect, stores.gc, demo.demo)
