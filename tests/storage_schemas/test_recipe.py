from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage_schemas.errors import UserError
from storage_schemas.recipe import DataConfig, StoreConfig, override_recipe, parse, read_recipe


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_overrides_are_yaml_and_reach_any_depth(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "store: {url: x, crops: {scale: [0.1, 1]}}\n")
    overrides = ["store.url=s3://b/x=y", "store.crops.scale=[0.5, 1.0]", "store.seed="]
    overrides += ["extract.batch_size=7"]
    assert read_recipe(path, overrides) == {
        "store": {"url": "s3://b/x=y", "crops": {"scale": [0.5, 1.0]}, "seed": None},
        "extract": {"batch_size": 7},
    }


def test_overriding_leaves_the_recipe_alone() -> None:
    recipe: dict[str, Any] = {"store": {"url": "x"}}
    override_recipe(recipe, ["store.url=y"])
    assert recipe == {"store": {"url": "x"}}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- a\n", "holds list, not sections"),
        ("", "holds NoneType"),
        ("store: {url: x\n", "r.yaml"),
        ("stor: {}\n", "unknown section 'stor'"),
        ("1: {}\n", "unknown section '1'"),
        ("store: {url: x, url: y}\n", "'url' is given twice"),
        ("store: !!python/object:os.system {}\n", "r.yaml"),
        ("store: \t{}\n\tx", "r.yaml"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        read_recipe(write(tmp_path / "r.yaml", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"^recipe: "):
        read_recipe(tmp_path / name)


@pytest.mark.parametrize("override", ["x", "x=1", "=1", ".=1", "store.url.x=1", "store.url={", "nope.x=1"])
def test_nonsense_overrides_are_refused_in_one_line(override: str) -> None:
    with pytest.raises(UserError, match=r"^(--set|recipe): ") as caught:
        override_recipe({"store": {"url": "x"}}, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "store.url: is missing"),
        (None, "store.url: is missing"),
        ({"url": "x", "sede": 1}, "store.sede: unknown key .value 1.; there are: url, crops"),
        ({"url": "x", "crops": {"scal": 1}}, "store.crops.scal: unknown key .* kind, scale"),
        ({"url": "x", "views_per_image": 0}, "store.views_per_image: 0: "),
        ({"url": "x", "seed": "one"}, "store.seed: 'one': "),
        ({"url": 3}, "store.url: 3: "),
        ({"url": ""}, "store.url: '': "),
        ({"url": "x", "max_pixels": True}, "store.max_pixels: True: .*a number is wanted"),
        ({"url": "x", "seed": False}, "store.seed: False: .*a number is wanted"),
        ({"url": "x", "seed": 2**63}, "store.seed: "),
        (3, "store: 3: "),
    ],
)
def test_a_field_that_does_not_hold_is_named_with_its_value(value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(StoreConfig, value, "store")


@pytest.mark.parametrize("value", [{"train": []}, {"train": ""}, {"train": "a", "held_out": [""]}])
def test_empty_patterns_are_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"^data\.(train|held_out)"):
        parse(DataConfig, value, "data")


def test_one_pattern_is_a_list_of_one() -> None:
    assert parse(DataConfig, {"train": "a"}, "data").train == ("a",)
    assert parse(DataConfig, {"train": ["a", "b"]}, "data").train == ("a", "b")


def test_anchors_and_merges_work(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", "store: &a {url: x}\ndata: {<<: *a, train: y}\n")
    assert read_recipe(path)["data"] == {"url": "x", "train": "y"}
