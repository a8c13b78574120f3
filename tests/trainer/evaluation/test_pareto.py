from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.pareto import (
    BOTTOM,
    CHARACTER,
    HEIGHT,
    LEFT,
    LINE,
    LONGEST,
    RIGHT,
    TOP,
    WIDTH,
    Point,
    pareto_chart,
    pareto_front,
    place_labels,
    write_page,
)

NAMES = ("eradio_xt", "radio_vit_ti16", "timm/swinv2_small_window8_256", "timm/regnety_064", "naive")
values = st.floats(0.01, 1e4)
candidates = st.lists(st.tuples(values, values), min_size=3, max_size=10).map(
    lambda found: [Point(NAMES[i % 5] + str(i), *pair) for i, pair in enumerate(found)]
)


def beats(one: Point, other: Point) -> bool:
    better = one.speed > other.speed or one.quality > other.quality
    return better and one.speed >= other.speed and one.quality >= other.quality


@given(candidates)
def test_the_front_is_what_nothing_beats(points: list[Point]) -> None:
    front = pareto_front(points)
    assert front
    for point in points:
        assert (point in front) == (not any(beats(other, point) for other in points))
    speeds = [point.speed for point in front]
    assert speeds == sorted(speeds)


def drawn(points: list[Point]) -> ET.Element:
    svg = re.search(r"<svg.*</svg>", pareto_chart("k-NN top-1, %", points), re.DOTALL)
    assert svg is not None
    return ET.fromstring(svg[0])


@given(candidates)
def test_labels_cover_neither_each_other_nor_points_and_stay_inside(points: list[Point]) -> None:
    svg = drawn(points)
    dots = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in svg.iter("circle")]
    labels = place_labels([point.name for point in points], dots)
    for label in labels:
        assert label.width >= CHARACTER * min(len(label.text), LONGEST)
        assert label.left >= LEFT
        assert label.left + label.width <= WIDTH
        assert TOP - LINE <= label.middle <= HEIGHT - BOTTOM
        for x, y in dots:
            beside = x < label.left or x > label.left + label.width
            assert beside or abs(y - label.middle) > LINE / 2
    for a, b in combinations(labels, 2):
        beside = a.left + a.width <= b.left or b.left + b.width <= a.left
        assert beside or abs(a.middle - b.middle) >= LINE - 1e-6


@given(candidates)
def test_every_point_is_in_the_frame_and_in_order(points: list[Point]) -> None:
    svg = drawn(points)
    dots = list(svg.iter("circle"))
    places = [(float(dot.attrib["cx"]), float(dot.attrib["cy"])) for dot in dots]
    for x, y in places:
        assert LEFT < x < WIDTH - RIGHT
        assert TOP < y < HEIGHT - BOTTOM
    for (p, (x, y)), (q, (u, v)) in combinations(zip(points, places, strict=True), 2):
        assert (x - u) * (p.speed - q.speed) >= -1e-9
        assert (y - v) * (p.quality - q.quality) <= 1e-9
    marked = [point for point, dot in zip(points, dots, strict=True) if dot.get("class") == "front"]
    assert sorted(marked, key=lambda p: (p.speed, -p.quality)) == pareto_front(points)


@pytest.mark.parametrize(
    ("speeds", "name"),
    [((90, 100, 110), "images a second"), ((3, 40, 900), "images a second, logarithmic"), ((5, 5, 5), "")],
)
def test_axes_say_what_they_are_and_have_marks(speeds: tuple[float, ...], name: str) -> None:
    svg = drawn([Point(f"s{i}", speed, i) for i, speed in enumerate(speeds)])
    texts = [text.text or "" for text in svg.iter("text")]
    assert "k-NN top-1, %" in texts
    assert (name or "images a second") in texts
    numbers = [text for text in svg.iter("text") if re.fullmatch(r"-?[\d.e+-]+", text.text or "")]
    along_x = [text for text in numbers if text.get("text-anchor") == "middle"]
    along_y = [text for text in numbers if text.get("text-anchor") == "end"]
    assert len(along_x) >= 2
    assert len(along_y) >= 3


def test_the_page_needs_nothing_else_and_escapes(tmp_path: Path) -> None:
    chart = pareto_chart("quality", [Point("<b>", 1, 1), Point("b", 2, 2)])
    write_page(tmp_path / "folder/page.html", "a < b", [chart], ["<head>"], [["<cell>"]], ["<note>"])
    html = (tmp_path / "folder/page.html").read_text(encoding="utf-8")
    assert not re.search(r"<(b|head>.*<head|cell|note)>", html, re.DOTALL)
    assert not re.search(r"(src|href)=|https?:|@import|<script", html)
    assert all(word in html for word in ("&lt;b&gt;", "&lt;cell&gt;", "&lt;note&gt;", "a &lt; b"))
