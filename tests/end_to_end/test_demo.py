"""The demo, with fewer views and steps, and an untrained teacher of its own: from nothing to its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cli
import cli.demo
from trainer.evaluation import report as page
from trainer.evaluation.report_values import DemoReport

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

TEACHER = {"family": "timm", "model": "test_resnet", "weights": "random", "seed": 1, "resolution": 64}
SMALL = {
    "teachers": {"tiny": TEACHER},
    "store.views_per_image": 2,
    "student.name": "timm/test_resnet",
    "training.resolution": 64,
    "training.batch_size": 8,
    "training.steps": 6,
    "training.warmup": 0,
    "training.checkpoint_every": 3,
}


@pytest.fixture
def small_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo reads its recipe beside the package `cli`: let it find a scaled-down one there."""
    import yaml

    recipe = yaml.safe_load((Path(cli.demo.__file__).parents[1] / "recipes/demo.yaml").read_text())
    for key, value in SMALL.items():
        section, _, name = key.partition(".")
        if name:
            recipe[section][name] = value
        else:
            recipe[section] = value
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/demo.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(cli.demo, "__file__", str(tmp_path / "cli/demo.py"))


@pytest.mark.usefixtures("small_recipe")
def test_the_demo_ends_with_a_page_that_says_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[DemoReport] = []
    write = page.write_report

    def keep(report: DemoReport, path: Path) -> None:
        written.append(report)
        write(report, path)

    monkeypatch.setattr(page, "write_report", keep)
    out = tmp_path / "out"
    first = CliRunner().invoke(cli.app, ["demo", "--out", str(out)])
    assert first.exit_code == 0, first.output
    [report] = written
    html = (out / "report.html").read_text(encoding="utf-8")
    assert [part.images for part in report.held_out] == [18, 25]
    assert report.views == 2 * report.images
    for part in report.held_out:
        assert part.title in html
        [distance] = part.distances
        for value in (distance.before, distance.after, distance.mean_predictor):
            assert f"{value:.4f}" in html
        assert f"{distance.after:.3f}; untrained {distance.before:.3f}" in first.stdout
    assert html.count("data:image/") >= 3 * 2 * len(report.held_out)
    assert [step for step, _ in report.curves["total"]] == list(range(1, 7))

    again = CliRunner().invoke(cli.app, ["demo", "--out", str(out)])
    assert again.exit_code == 0, again.output
    assert written[1].held_out[0].distances == report.held_out[0].distances
    assert written[1].costs == report.costs
    assert json.loads((out / "recorded.json").read_text())["views"] == 2 * (report.images + 25 + 18)


def test_without_recipes_beside_it_the_demo_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.demo, "__file__", str(tmp_path / "cli/demo.py"))
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "recipes/demo.yaml' is not installed" in result.stderr
    assert not (tmp_path / "out").exists()
