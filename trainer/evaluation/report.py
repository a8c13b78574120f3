"""The demo's report: one HTML page that needs no other file and no network, from one frozen value.

Nothing is computed here but ratios of the numbers given. Every string that is not ours is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from storage_schemas.manifest import TeacherSpec
from trainer.evaluation import report_words as words
from trainer.evaluation.figures import Curve, data_uri, line_chart
from trainer.evaluation.report_values import (
    DemoReport,
    Distance,
    HeldOut,
    Neighbour,
    Neighbours,
    Panel,
    Picture,
)


def write_report(report: DemoReport, path: Path) -> None:
    """Write the page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(render(report), encoding="utf-8")
    partial.replace(path)


def render(report: DemoReport) -> str:
    """The page."""
    sections = [
        _section("What was done", words.WHAT, _facts(report), _teachers(report.teachers)),
        _section("Does the student predict the teachers?", words.DISTANCE, *map(_distances, report.held_out)),
        _section("How the loss fell", words.LOSS, _charts(report.curves)),
        _section("What teacher and student see", words.PANELS, *map(_panels, report.held_out)),
        _section("Which tiles look alike", words.NEIGHBOURS, *map(_all_neighbours, report.held_out)),
        _section("What it cost", words.COSTS.format_map(_saving(report)), _costs(report)),
        _section("What this run cannot show", words.LIMITS),
    ]
    return words.PAGE.format(
        title="demo report", css=words.CSS, head=_head(report), sections="".join(sections)
    )


def _head(report: DemoReport) -> str:
    lines = [_verdict(part) for part in report.held_out]
    return words.HEAD.format(teachers=len(report.teachers)) + "".join(lines)


def _verdict(part: HeldOut) -> str:
    changes = [f"{_change(d.mean_predictor, d.after)} for {escape(d.teacher)}" for d in part.distances]
    beaten = sum(d.after < d.mean_predictor for d in part.distances)
    return words.VERDICT.format(
        title=escape(part.title), changes=" and ".join(changes), beaten=beaten, of=len(part.distances)
    )


def _grouped(part: HeldOut, body: str) -> str:
    return f"<h3>{escape(part.title)}</h3>{body}"


def _panels(part: HeldOut) -> str:
    return _grouped(part, "".join(map(_panel, part.panels)))


def _all_neighbours(part: HeldOut) -> str:
    return _grouped(part, "".join(map(_neighbours, part.neighbours)))


def _section(title: str, text: str, *body: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{''.join(body)}</section>"


def _facts(report: DemoReport) -> str:
    costs = report.costs
    return _tiles(
        ("tiles", f"{report.images} + {report.held_out_images}", "training + held out"),
        ("views recorded", f"{report.views:,} + {report.held_out_views:,}", "training + held out"),
        ("student", escape(report.student), f"{costs.student_parameters / 1e6:.1f} M parameters"),
        ("recording and training", _seconds(sum(costs.seconds.values())), "wall clock"),
    )


def _tiles(*tiles: tuple[str, str, str]) -> str:
    cells = (
        f"<div><dt>{label}</dt><dd>{value}<small>{note}</small></dd></div>" for label, value, note in tiles
    )
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _teachers(specs: Sequence[TeacherSpec]) -> str:
    head = ("teacher", "model", "input pixels", "patch grid", "summary", "spatial", "codec")
    rows = [
        (
            escape(spec.name),
            escape(spec.model),
            f"{spec.height} × {spec.width}",
            f"{spec.grid.height} × {spec.grid.width}",
            f"{spec.summary_dim:,}",
            f"{spec.spatial_dim:,}",
            spec.codec,
        )
        for spec in specs
    ]
    return _table(head, rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = "".join(f"<th>{title}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def _distances(part: HeldOut) -> str:
    longest = max((v for d in part.distances for v in (d.before, d.after, d.mean_predictor)), default=1.0)
    figures = "".join(_distance(distance, longest) for distance in part.distances)
    return _grouped(part, f'<div class="pair">{figures}</div>')


def _distance(distance: Distance, longest: float) -> str:
    bars = (
        ("untrained student", distance.before, "bar"),
        ("constant answer", distance.mean_predictor, "bar"),
        ("trained student", distance.after, "bar ours"),
    )
    rows = "".join(
        f'<div class="{kind}"><span>{label}</span><i><b style="width:{100 * value / longest:.1f}%"></b></i>'
        f"<span>{value:.4f}</span></div>"
        for label, value, kind in bars
    )
    return (
        f"<figure><h4>{escape(distance.teacher)}</h4>{rows}"
        f"<figcaption>{_change(distance.before, distance.after)} from the untrained student, "
        f"{_change(distance.mean_predictor, distance.after)} from the constant answer</figcaption></figure>"
    )


def _charts(curves: Mapping[str, Curve]) -> str:
    total = {name: curve for name, curve in curves.items() if name == "total"}
    parts = {name: curve for name, curve in curves.items() if name != "total"}
    charts = [
        line_chart(title, chosen) for title, chosen in (("Total", total), ("Its parts", parts)) if chosen
    ]
    return f'<div class="pair">{"".join(charts)}</div>'


def _panel(panel: Panel) -> str:
    maps = "".join(
        _picture(
            Picture(f"{m.teacher}'s features of {panel.view.name}", m.recorded), f"{m.teacher}, recorded"
        )
        + _picture(
            Picture(f"the student's prediction of {m.teacher}", m.predicted), f"{m.teacher}, predicted"
        )
        for m in panel.maps
    )
    view = _picture(panel.view, panel.view.name)
    return f'<div class="panel" style="--teachers:{max(1, len(panel.maps))}">{view}{maps}</div>'


def _neighbours(found: Neighbours) -> str:
    shared = {n.view.name for n in found.by_teacher} & {n.view.name for n in found.by_student}
    by_chance = len(found.by_teacher) * len(found.by_student) / max(1, found.candidates)
    return (
        f'<div class="neighbours">{_picture(found.query, found.query.name)}<div>'
        f"<h4>Nearest by {escape(found.teacher)}</h4>{_strip(found.by_teacher, shared)}"
        f"<h4>Nearest by the student</h4>{_strip(found.by_student, shared)}"
        f"<small>{len(shared)} of {len(found.by_student)} in common; picking blindly among the "
        f"{found.candidates} tiles would give {by_chance:.1f}.</small></div></div>"
    )


def _strip(found: Sequence[Neighbour], shared: set[str]) -> str:
    pictures = (
        _picture(
            n.view,
            f"{n.similarity:.2f} {n.view.name}",
            "picture shared" if n.view.name in shared else "picture",
        )
        for n in found
    )
    return f'<div class="strip">{"".join(pictures)}</div>'


def _picture(picture: Picture, caption: str, kind: str = "picture") -> str:
    image = f'<img src="{data_uri(picture.pixels)}" alt="{escape(picture.name)}">'
    return f'<figure class="{kind}">{image}<figcaption>{escape(caption)}</figcaption></figure>'


def _saving(report: DemoReport) -> dict[str, str]:
    costs = report.costs
    return {
        "recorded": f"{report.views:,}",
        "trained": f"{costs.trained_views:,}",
        "ratio": f"{costs.trained_views / max(1, report.views):.1f}",
        "seconds": _seconds(costs.trained_views / costs.extract_rate),
    }


def _costs(report: DemoReport) -> str:
    costs, rows = report.costs, report.views + report.held_out_views
    total = sum(costs.stored_bytes.values())
    rates = _tiles(
        ("recording rate", f"{costs.extract_rate:,.1f}", "views a second, all teachers"),
        ("training rate", f"{costs.train_rate:,.1f}", "views a second"),
        ("stored", _bytes(total), "by all teachers"),
        ("stored for a view", _bytes(total / rows), "by all teachers"),
    )
    stages = _tiles(*((escape(stage), _seconds(took), "wall clock") for stage, took in costs.seconds.items()))
    lines = [(escape(name), _bytes(size), _bytes(size / rows)) for name, size in costs.stored_bytes.items()]
    return rates + stages + _table(("teacher", "stored", "for a view"), lines)


def _change(old: float, new: float) -> str:
    """`−48 %`, with a real minus sign."""
    return (
        f"{100 * (new - old) / old:+.0f} %".replace("-", "−").replace(" ", "\u00a0") if old else "from zero"
    )


def _bytes(size: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = sum(size >= 1000**i for i in range(1, len(units)))
    return f"{size / 1000**power:.1f} {units[power]}" if power else f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
