"""`python -m cli`: what `rebroadcast` is where nothing is installed, and what torchrun and Ray jobs start."""

from cli import app

app(prog_name="rebroadcast")
