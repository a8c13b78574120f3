"""The report is one well-formed page that needs nothing else, says what it was given, and escapes it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from storage_schemas.manifest import PatchGrid, TeacherSpec
from trainer.evaluation.figures import Pixels
from trainer.evaluation.report import render, write_report
from trainer.evaluation.report_values import (
    Costs,
    DemoReport,
    Distance,
    FeatureMaps,
    HeldOut,
    Neighbour,
    Neighbours,
    Panel,
    Picture,
)

VOID = {"meta", "img", "br"}
HOSTILE = '<script src="https://example.com/x.js">&\'"</script>'


class Page(HTMLParser):
    """Collects what a page loads, and fails on a tag that is not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def pixels(side: int) -> Pixels:
    return np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)


def report(name: str = "cat") -> DemoReport:
    spec = TeacherSpec(
        name="lite0",
        family="timm",
        model="tf_efficientnet_lite0",
        weights="random:seed=0",
        weights_sha256="0" * 64,
        height=224,
        width=224,
        patch_size=32,
        grid=PatchGrid(height=7, width=7),
        summary_dim=1280,
        spatial_dim=320,
        summary="pooled",
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    )
    view = Picture(name, pixels(96))
    near = [Neighbour(view, 0.8125), Neighbour(Picture("coffee", pixels(96)), 0.5)]
    return DemoReport(
        images=18,
        views=144,
        teachers=[spec],
        student=name,
        curves={
            "total": [(1, 2.0), (2, math.nan), (3, 1.0)],
            f"{name} summary": [(1, 0.75), (2, 0.5), (3, 0.25)],
        },
        held_out=[
            HeldOut(
                title=name,
                images=6,
                views=48,
                distances=[Distance(name, before=0.9, after=0.45, mean_predictor=0.6)],
                panels=[Panel(view, [FeatureMaps(name, pixels(7), pixels(7))])],
                neighbours=[Neighbours(view, name, 18, near, near[:1])],
            )
        ],
        costs=Costs({name: 19_200_000}, {name: 83.4}, 12.5, 104.0, 9600, 5_600_000),
    )


def test_the_page_needs_nothing_else() -> None:
    html = render(report())
    page = Page(html)
    assert page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", html)


@pytest.mark.parametrize(
    "values",
    [
        ("18 + 6", "144 + 48", "1 min 23 s", "5.6 M parameters"),
        ("tf_efficientnet_lite0", "224 × 224", "7 × 7", "1,280", "fp16"),
        ("0.9000", "0.4500", "0.6000", "−50\u00a0%", "−25\u00a0%", "for 1 of 1"),
        ("0.81 cat", "1 of 1 in common", "would give 0.1"),
        ("12.5", "104.0", "66.7 times", "19.2 MB", "100.0 kB"),
    ],
    ids=["facts", "teacher", "distance", "neighbours", "costs"],
)
def test_what_was_measured_stands_in_the_page(values: tuple[str, ...]) -> None:
    html = render(report())
    assert [value for value in values if value not in html] == []


def test_names_are_escaped_wherever_they_stand() -> None:
    plain, hostile = render(report()), render(report(HOSTILE))
    assert "example.com" in hostile
    assert "<script" not in hostile
    assert Page(hostile).tags == Page(plain).tags


def test_a_run_with_nothing_to_show_still_has_a_page() -> None:
    empty = replace(report(), teachers=[], curves={"total": []}, held_out=[])
    assert "What this run cannot show" in render(empty)
    Page(render(empty))


def test_values_that_are_not_finite_are_left_out_of_a_curve() -> None:
    coordinates = re.findall(r'points="([^"]*)"', render(report()))
    assert coordinates
    assert "nan" not in " ".join(coordinates)


def test_a_report_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "demo" / "report.html"
    write_report(report("first"), path)
    write_report(report("second"), path)
    assert path.read_text(encoding="utf-8") == render(report("second"))
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
