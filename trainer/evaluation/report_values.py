"""What the demo's report shows, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from storage_schemas.manifest import TeacherSpec
from trainer.evaluation.figures import Curve, Pixels


@dataclass(frozen=True, slots=True)
class Picture:
    """A view as the student saw it, and the name of its image."""

    name: str
    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Distance:
    """Spatial distance to one teacher on held-out views: of the student before and after training, and of the
    mean predictor, which answers every patch with the teacher's mean feature over the training views."""

    teacher: str
    before: float
    after: float
    mean_predictor: float


@dataclass(frozen=True, slots=True)
class FeatureMaps:
    """One teacher's features of a view and the student's prediction of them, both through `pca_rgb`."""

    teacher: str
    recorded: Pixels
    predicted: Pixels


@dataclass(frozen=True, slots=True)
class Panel:
    """One held-out view with the maps of every teacher."""

    view: Picture
    maps: Sequence[FeatureMaps]


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An image found, and the cosine similarity of its summary to the query's."""

    view: Picture
    similarity: float


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The training images most like a held-out one, by a teacher's summary and by the student's of it.

    candidates: how many images there were to choose from.
    """

    query: Picture
    teacher: str
    candidates: int
    by_teacher: Sequence[Neighbour]
    by_student: Sequence[Neighbour]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What was measured on one source shard that training never saw; `title` says what is in it."""

    title: str
    images: int
    views: int
    distances: Sequence[Distance]
    panels: Sequence[Panel]
    neighbours: Sequence[Neighbours]


@dataclass(frozen=True, slots=True)
class Costs:
    """What the run took: bytes by teacher, seconds by stage, rates (above zero) in views a second."""

    stored_bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    extract_rate: float
    train_rate: float
    trained_views: int
    student_parameters: int


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything the page shows. `images` and `views` are those of training.

    curves: loss at each step. `total` stands in a chart of its own, the others share one.
    """

    images: int
    views: int
    teachers: Sequence[TeacherSpec]
    student: str
    curves: Mapping[str, Curve]
    held_out: Sequence[HeldOut]
    costs: Costs

    @property
    def held_out_images(self) -> int:
        """Of all the held-out shards."""
        return sum(part.images for part in self.held_out)

    @property
    def held_out_views(self) -> int:
        """Of all the held-out shards."""
        return sum(part.views for part in self.held_out)
