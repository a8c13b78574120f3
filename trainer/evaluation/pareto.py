"""Quality against speed: which candidates no other beats in both, and a page that shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path

from trainer.evaluation.report_words import CSS, PAGE

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 38, 52
WIDE = 4.0  # a range of images a second from which on the axis is logarithmic
CHARACTER, LINE, GAP = 8.4, 18.0, 10.0  # of labels, as wide as they are drawn on a narrow screen
LONGEST = 36  # characters of a label; the table has the whole name

STYLE = """
circle { fill: var(--paper); stroke: var(--s1); stroke-width: 2; }
circle.front { fill: var(--accent); stroke: var(--accent); }
polyline.front { stroke: var(--accent); opacity: .5; }
svg text.name { fill: var(--ink); }
"""

FRONT = """Farther right is faster, farther up is better. Filled: no other one here is at least as fast and
at least as good, and better in one of the two. The line joins them. Speeds are measured: a few percent are
noise."""


@dataclass(frozen=True, slots=True)
class Point:
    """A candidate: of both `speed` and `quality`, more is better."""

    name: str
    speed: float
    quality: float


@dataclass(frozen=True, slots=True)
class Label:
    """A name beside its point: the left end, the middle line and the width of its box, in the SVG's units."""

    text: str
    left: float
    middle: float
    width: float


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one of the two without losing in the other, slowest first."""

    def beaten(p: Point) -> bool:
        return any(
            q.speed >= p.speed and q.quality >= p.quality and (q.speed, q.quality) != (p.speed, p.quality)
            for q in points
        )

    return sorted((p for p in points if not beaten(p)), key=lambda p: (p.speed, -p.quality))


def write_page(
    path: Path,
    title: str,
    charts: Sequence[str],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> None:
    """Write a page that needs no other file: charts, a table, and lines below it."""
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    body = f"<section><p>{FRONT}</p>{''.join(charts)}</section><section>{table}{below}</section>"
    path.parent.mkdir(parents=True, exist_ok=True)
    header = f"<p>Rebroadcast</p><h1>{escape(title)}</h1>"
    page = PAGE.format(title=escape(title), css=CSS + STYLE, head=header, sections=body)
    path.write_text(page, encoding="utf-8")


def pareto_chart(title: str, points: Sequence[Point]) -> str:
    """An SVG of quality, as `title` calls it, against images a second, with the front marked."""
    place_x, marks_x, name_x = _horizontal([p.speed for p in points])
    place_y, marks_y = _vertical([p.quality for p in points])
    front = pareto_front(points)
    at = [(place_x(p.speed), place_y(p.quality)) for p in points]
    dots = ""
    for p, (x, y), label in zip(points, at, place_labels([p.name for p in points], at), strict=True):
        kind = ' class="front"' if p in front else ""
        said = f"{p.name}: {p.speed:.4g} images a second, {p.quality:.4g}"
        dots += _leader(label, x, y)
        dots += f'<circle{kind} cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(said)}</title></circle>'
        side = (label.left, "start") if label.left > x else (label.left + label.width, "end")
        dots += f'<text class="name" x="{side[0]:.1f}" y="{label.middle + 4:.1f}" text-anchor="{side[1]}">'
        dots += f"{escape(label.text)}</text>"
    line = " ".join(f"{place_x(p.speed):.1f},{place_y(p.quality):.1f}" for p in front)
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}, {name_x}">'
        f"{marks_y}{marks_x}"
        f'<text x="{LEFT}" y="16">{escape(title)}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{name_x}</text>'
        f'<polyline class="front" points="{line}"/>{dots}</svg></figure>'
    )


def place_labels(names: Sequence[str], points: Sequence[tuple[float, float]]) -> list[Label]:
    """A label for each point, inside the frame, that covers neither another label nor any point."""
    taken = [(x - GAP / 2, x + GAP / 2, y - GAP / 2, y + GAP / 2) for x, y in points]
    labels = []
    for name, (x, y) in zip(names, points, strict=True):
        text = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        width = CHARACTER * len(text)
        rows = int((HEIGHT - TOP - BOTTOM) / LINE) + 1
        shifts = [0.0, *chain.from_iterable((-LINE * row, LINE * row) for row in range(1, rows))]
        places = [(left, y + shift) for shift in shifts for left in (x + GAP, x - GAP - width)]
        free = (place for place in places if _is_free(*place, width, taken))
        left, middle = next(free, places[0])  # so many that nothing is free: then they overlap
        taken.append((left, left + width, middle - LINE / 2, middle + LINE / 2))
        labels.append(Label(text, left, middle, width))
    return labels


def _is_free(
    left: float, middle: float, width: float, taken: Sequence[tuple[float, float, float, float]]
) -> bool:
    right, top, bottom = left + width, middle - LINE / 2, middle + LINE / 2
    inside = left >= LEFT and right <= WIDTH and top >= TOP - LINE / 2 and bottom <= HEIGHT - BOTTOM
    return inside and not any(
        left < other_right and right > other_left and top < other_bottom and bottom > other_top
        for other_left, other_right, other_top, other_bottom in taken
    )


def _leader(label: Label, x: float, y: float) -> str:
    """A line from the point to a label that is not right beside it."""
    if label.middle == y:
        return ""
    end = label.left - 2 if label.left > x else label.left + label.width + 2
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{label.middle:.1f}"/>'


def _horizontal(values: Sequence[float]) -> tuple[Callable[[float], float], str, str]:
    """(value to x, the axis's marks, its name); logarithmic where the values are wide apart."""
    logarithmic = min(values) > 0 and max(values) / min(values) > WIDE
    scale = math.log10 if logarithmic else float
    # Speeds within a few percent are one speed: they must not fill the axis.
    least = 0.0 if logarithmic else 0.2 * max(values)
    low, high = _padded(scale(min(values)), scale(max(values)), least)

    def place(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (scale(value) - low) / (high - low)

    ticks = _powers(10**low, 10**high) if logarithmic else _ticks(low, high)
    marks = ""
    for value in ticks:
        x = place(value)
        marks += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        marks += f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>'
    return place, marks, "images a second, logarithmic" if logarithmic else "images a second"


def _vertical(values: Sequence[float]) -> tuple[Callable[[float], float], str]:
    low, high = _padded(min(values), max(values))

    def place(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    marks = ""
    for value in _ticks(low, high):
        y = place(value)
        marks += f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        marks += f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    return place, marks


def _padded(low: float, high: float, least: float = 0.0) -> tuple[float, float]:
    """A tenth of the range more on both sides, and at least so wide; around a single value, a tenth of it."""
    margin = max(0.1 * ((high - low) or abs(high) or 1.0), (least - (high - low)) / 2)
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 6))
    step = next(power * f for f in (1, 2, 5, 10) if (high - low) / (power * f) <= 6)
    found = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [round(i * step, 12) for i in found]


def _powers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; the powers alone where those are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 3 else (1,)
    found = [f * 10.0**e for e in exponents for f in factors]
    return [value for value in found if low <= value <= high]
