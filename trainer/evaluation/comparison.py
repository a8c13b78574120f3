"""What a comparison found: a table, and a page with the plots of quality against speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.evaluation.feature_distance import FeatureDistance
from trainer.evaluation.pareto import Point, pareto_chart, write_page
from trainer.evaluation.throughput import Throughput


@dataclass(frozen=True, slots=True)
class Result:
    """A trained variant. training_views_per_second: the median over its lines of metrics; knn: top-1, None
    without labels.
    """

    name: str
    checkpoint: str
    parameters: int
    throughput: Throughput
    training_views_per_second: float
    distance: dict[str, FeatureDistance]
    knn: float | None

    def closeness(self, constant: dict[str, FeatureDistance]) -> float:
        """How much of a constant's distance is gone, as a mean over teachers, summary and spatial: 1 is a
        perfect copy, 0 no better than the teachers' means.
        """
        pairs = [
            (getattr(mine, kind), getattr(constant[teacher], kind))
            for teacher, mine in self.distance.items()
            for kind in ("summary", "spatial")
        ]
        return (
            1 - statistics.mean(mine / of for mine, of in pairs if of) if any(of for _, of in pairs) else 0.0
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of the values of `key`: what was measured, and what a constant, the teachers and raw pixels reach.

    failed: why, by name. page: the HTML page with the plot; None where nothing was measured.
    """

    key: str
    results: list[Result]
    constant: dict[str, FeatureDistance]
    knn_beside: dict[str, float]
    failed: dict[str, str]
    page: str | None

    def table(self) -> tuple[list[str], list[list[str]]]:
        """(titles, rows): a row a variant, then the constant, the teachers and raw pixels."""
        head = [self.key, "parameters", "images/s", "training views/s"]
        head += [f"{name}: summary / spatial" for name in self.constant]
        knn = bool(self.knn_beside)
        rows = [
            [r.name, f"{r.parameters:,}", f"{r.throughput.images_per_second:.1f}"]
            + [f"{r.training_views_per_second:.1f}", *_distances(r.distance, self.constant)]
            + ([_percent(r.knn)] if knn else [])
            for r in self.results
        ]
        blank = ["", "", ""]
        if self.constant:
            own = _distances(self.constant, self.constant)
            rows.append(["(a constant)", *blank, *own, *([""] if knn else [])])
        rows += [
            [f"({name})", *blank, *[""] * len(self.constant), _percent(top1)]
            for name, top1 in self.knn_beside.items()
        ]
        return head + (["k-NN"] if knn else []), rows

    def conditions(self) -> list[str]:
        """Under which images a second were counted, a line for each set of them."""
        said = {
            f"images/s: forward, batch {t.batch_size} at {t.height}×{t.width}, {t.dtype}, {t.device}, "
            f"{t.threads} threads, median of {t.steps} steps"
            for t in (result.throughput for result in self.results)
        }
        return sorted(said)


def with_page(found: Comparison, path: Path) -> Comparison:
    """The same, its page written."""
    charts = [pareto_chart(title, points) for title, points in _charts(found)]
    failed = [f"failed: {name}: {why}" for name, why in found.failed.items()]
    write_page(
        path,
        f"{len(found.results)} values of {found.key} compared",
        charts,
        *found.table(),
        [*found.conditions(), *failed],
    )
    return replace(found, page=str(path))


def _charts(found: Comparison) -> Iterator[tuple[str, list[Point]]]:
    speeds = [(r, r.throughput.images_per_second) for r in found.results]
    if found.knn_beside:
        yield "k-NN top-1, %", [Point(r.name, speed, 100 * r.knn) for r, speed in speeds if r.knn is not None]
    closeness = "Distance to the teachers that is gone, % of a constant's"
    yield closeness, [Point(r.name, speed, 100 * r.closeness(found.constant)) for r, speed in speeds]


def _distances(found: dict[str, FeatureDistance], teachers: dict[str, FeatureDistance]) -> list[str]:
    return [
        f"{found[name].summary:.4f} / {found[name].spatial:.4f}" if name in found else "" for name in teachers
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
