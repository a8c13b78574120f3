"""Pictures for the report: PCA maps of features, arrays as data URIs, line charts as inline SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
"""height width 3, RGB."""

Curve = Sequence[tuple[int, float]]
"""(step, value), in the order of steps."""

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36
COLOURS = 6


def pca_rgb(teacher: torch.Tensor, student: torch.Tensor) -> tuple[Pixels, Pixels]:
    """Colours, each `... h w 3`, of a teacher's features and of the student's prediction of them.

    Both are `... h w d`; their grids may differ in size. The mean, the three leading components and their
    ranges are fitted on the teacher alone, over all leading axes, and applied to both: equal features have
    equal colours.
    """
    tokens = teacher.detach().double().flatten(0, -2)  # (... h w) d
    assert min(tokens.shape) >= 3, f"three components need three tokens and channels: {tuple(tokens.shape)}"
    mean = tokens.mean(0)
    components = torch.linalg.svd(tokens - mean, full_matrices=False).Vh[:3]  # 3 d
    # A component's sign is arbitrary: its largest entry is made positive, so that reruns look the same.
    components *= components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    low, high = torch.quantile((tokens - mean) @ components.T, tokens.new_tensor([0.02, 0.98]), dim=0)

    def colour(features: torch.Tensor) -> Pixels:
        scores = (features.detach().double() - mean) @ components.T  # ... h w 3
        unit = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        pixels: Pixels = unit.mul(255).round().to(torch.uint8).numpy()
        return pixels

    return colour(teacher), colour(student)


def data_uri(pixels: Pixels) -> str:
    """A picture as a URI that needs no file: PNG for a small map, whose cells must stay exact, else JPEG."""
    sink = io.BytesIO()
    kind = "png" if max(pixels.shape[:2]) <= 64 else "jpeg"
    Image.fromarray(pixels).save(sink, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"


def line_chart(title: str, curves: Mapping[str, Curve]) -> str:
    """An SVG of values against steps, from zero up, and a legend with the last running mean of each curve.

    Every value is faint, the running mean over a fifteenth of the run solid. What is not finite is left out.
    """
    points = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    smooth = {name: _running_mean(curve) for name, curve in points.items()}
    last = max((x for curve in points.values() for x, _ in curve), default=0) or 1
    top = max((y for curve in points.values() for _, y in curve), default=0.0) or 1.0
    lines, legend = "", ""
    for i, name in enumerate(points):
        colour = f"s{i % COLOURS}"
        lines += f'<polyline class="raw {colour}" points="{_place(points[name], last, top)}"/>'
        lines += f'<polyline class="{colour}" points="{_place(smooth[name], last, top)}"/>'
        value = f"{smooth[name][-1][1]:.3f}" if smooth[name] else "no value"
        legend += f'<li><i class="{colour}"></i>{escape(name)} <b>{value}</b></li>'
    return (
        f'<figure class="chart"><h3>{escape(title)}</h3>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'{_axes(last, top)}{lines}</svg><ul class="legend">{legend}</ul></figure>'
    )


def _axes(last: int, top: float) -> str:
    marks = ""
    for value in _ticks(top, 5):
        y = _y(value, top)
        marks += f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        marks += f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    for value in _ticks(last, 6):
        label = f"step {value:g}" if value == 0 else f"{value:g}"
        marks += (
            f'<text x="{_x(value, last):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>'
        )
    return marks


def _ticks(top: float, count: int) -> list[float]:
    """From zero to `top`, about `count` steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(top / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * count >= top * 0.999)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def _running_mean(curve: Curve) -> list[tuple[int, float]]:
    """Over a fifteenth of the curve, centred; narrower towards its ends."""
    half = len(curve) // 30
    values = np.array([y for _, y in curve])
    return [(x, float(values[max(0, i - half) : i + half + 1].mean())) for i, (x, _) in enumerate(curve)]


def _place(curve: Curve, last: int, top: float) -> str:
    return " ".join(f"{_x(x, last):.1f},{_y(y, top):.1f}" for x, y in curve)


def _x(step: float, last: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / last


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top
