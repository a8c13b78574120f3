from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from storage_schemas.crops import CropBox, CropPolicy

DIGESTS = st.binary(min_size=16, max_size=16)
SIDES = st.integers(1, 5000)
SEEDS = st.integers(0, 2**63 - 1)


@given(
    policy=st.sampled_from(
        [
            CropPolicy(),
            CropPolicy(scale=(1.0, 1.0)),
            CropPolicy(scale=(0.001, 0.002), ratio=(0.1, 10.0)),
            CropPolicy(kind="center"),
            CropPolicy(kind="whole"),
            CropPolicy(first_view="center"),
        ]
    ),
    seed=SEEDS,
    digest=DIGESTS,
    view=st.integers(0, 9999),
    height=SIDES,
    width=SIDES,
)
def test_every_box_lies_inside_its_image(
    policy: CropPolicy, seed: int, digest: bytes, view: int, height: int, width: int
) -> None:
    box = policy.draw(seed, digest, view, height, width)
    assert 0 <= box.top < box.top + box.height <= height
    assert 0 <= box.left < box.left + box.width <= width
    assert box == policy.draw(seed, digest, view, height, width), "the same arguments draw the same box"


def test_a_box_depends_on_seed_digest_and_view() -> None:
    policy = CropPolicy()
    boxes = {
        policy.draw(seed, bytes([digest]) * 16, view, 480, 640)
        for seed in range(4)
        for digest in range(4)
        for view in range(4)
    }
    assert len(boxes) == 64


def test_boxes_are_pinned_for_ever() -> None:
    """Stores that were recorded before must be recordable further: a change here is a new schema version."""
    box = CropBox(top=239, left=280, height=217, width=203, hflip=True)
    assert CropPolicy().draw(7, b"0123456789abcdef", 3, 480, 640) == box


@settings(max_examples=30)
@given(st.tuples(st.floats(0.05, 0.7), st.floats(0.05, 0.7)).map(sorted), DIGESTS)
def test_area_and_ratio_are_within_the_policy(scale: list[float], digest: bytes) -> None:
    policy = CropPolicy(scale=(scale[0], scale[1]))
    box = policy.draw(0, digest, 0, 2000, 2000)
    rounding = 2 / min(box.height, box.width)
    assert scale[0] * (1 - 2 * rounding) <= box.height * box.width / 2000**2 <= scale[1] * (1 + 2 * rounding)
    assert abs(math.log(box.width / box.height)) <= math.log(4 / 3) + rounding


def test_mirroring_has_its_probability() -> None:
    def mirrored(hflip: float) -> float:
        draws = [CropPolicy(hflip=hflip).draw(0, b"x" * 16, view, 100, 100).hflip for view in range(2000)]
        return sum(draws) / len(draws)

    assert mirrored(0.0) == 0
    assert mirrored(1.0) == 1
    assert mirrored(0.5) == pytest.approx(0.5, abs=0.05)


def test_boxes_cover_the_image_evenly() -> None:
    boxes = [CropPolicy(scale=(0.1, 0.1)).draw(1, b"y" * 16, view, 600, 600) for view in range(2000)]
    rows = sum((box.top + box.height / 2) / 600 for box in boxes) / len(boxes)
    columns = sum((box.left + box.width / 2) / 600 for box in boxes) / len(boxes)
    assert rows == pytest.approx(0.5, abs=0.02)
    assert columns == pytest.approx(0.5, abs=0.02)


def test_center_is_the_largest_central_square_and_whole_is_everything() -> None:
    assert CropPolicy(kind="center").draw(5, b"z" * 16, 9, 300, 451) == CropBox(0, 75, 300, 300)
    assert CropPolicy(kind="center").draw(5, b"z" * 16, 9, 451, 300) == CropBox(75, 0, 300, 300)
    assert CropPolicy(kind="whole").draw(5, b"z" * 16, 9, 300, 451) == CropBox(0, 0, 300, 451)


def test_first_view_replaces_view_zero_only() -> None:
    policy, plain = CropPolicy(first_view="center"), CropPolicy()
    assert policy.draw(3, b"w" * 16, 0, 200, 300) == CropBox(0, 50, 200, 200)
    assert policy.draw(3, b"w" * 16, 1, 200, 300) == plain.draw(3, b"w" * 16, 1, 200, 300)


def test_an_image_too_thin_for_the_ratio_gets_the_largest_central_crop() -> None:
    assert CropPolicy(hflip=0).draw(0, b"v" * 16, 1, 10, 5000) == CropBox(0, 2493, 10, 13)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", (0.5, 0.2)),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 1.5)),
        ("ratio", (2.0, 1.0)),
        ("ratio", (0.5, float("inf"))),
        ("scale", (float("nan"), 1.0)),
        ("hflip", 1.5),
        ("hflip", float("nan")),
    ],
)
def test_wrong_bounds_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError):
        CropPolicy.model_validate({field: value})
