from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import recorder
from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.plan import make_plan
from pipeline.teachers import create_teacher, outline_teacher, recreate_teacher
from pipeline.teachers.catalogue import KNOWN, Entry, list_teachers, weights_at_hand
from storage_schemas.errors import UserError
from storage_schemas.recipe import read_recipe
from storage_schemas.store import FeatureStore
from tests.conftest import MakeJpeg, WriteTar
from tests.pipeline.teachers.upstream import TINY_CLIP, add_tiny_clip, random_images

pytest.importorskip("open_clip")
pytest.importorskip("segment_anything")

add_tiny_clip()
RECIPES = Path(__file__).parents[3] / "recipes"
CLIP: dict[str, Any] = {
    "family": "open_clip",
    "model": TINY_CLIP,
    "resolution": 224,
    "weights": "random",
    "seed": 0,
    "blocks": 2,
}
DINO: dict[str, Any] = {
    "family": "timm",
    "model": "vit_small_patch14_dinov2",
    "weights": "random",
    "seed": 1,
    "blocks": 2,
    "resolution": 224,
}
SAM: dict[str, Any] = {
    "family": "sam",
    "model": "vit_b",
    "weights": "random",
    "seed": 2,
    "blocks": 1,
    "resolution": 128,
}


@pytest.fixture
def recipe(tmp_path: Path, write_tar: WriteTar, jpeg: MakeJpeg) -> dict[str, Any]:
    samples = [{"__key__": f"{seed}", "jpg": jpeg(seed, 60 + seed, 80)} for seed in range(3)]
    write_tar(tmp_path / "shards" / "a.tar", samples)
    return {
        "store": {"url": str(tmp_path / "store"), "views_per_image": 2},
        "data": {"train": str(tmp_path / "shards" / "*.tar")},
        "teachers": {"clip": CLIP, "dinov2": DINO, "sam": SAM},
        "extract": {"batch_size": 4, "device": "cpu"},
    }


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    found = (path for path in root.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_teachers_of_one_resolution_share_decoding_and_the_resize(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def watch(name: str) -> None:
        real = getattr(recorder, name)

        def watched(*args: Any) -> Any:
            calls.append((name, *args[2:]) if name == "cut" else (name,))
            return real(*args)

        monkeypatch.setattr(recorder, name, watched)

    watch("decode")
    watch("cut")
    report = extract(ExtractConfig.from_recipe(recipe))
    assert not report.failed
    assert calls.count(("decode",)) == 3, "once an image"
    assert calls.count(("cut", 224, 224)) == 6, "once a view for CLIP and DINOv2 together"
    assert calls.count(("cut", 128, 128)) == 6


def test_a_teacher_added_later_leaves_the_others_as_they_are(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = ExtractConfig.from_recipe(recipe)
    extract(config.select(["clip", "dinov2"]))
    before = files(tmp_path / "store")
    report = extract(config)
    assert not report.failed
    after = files(tmp_path / "store")
    assert {path: after[path] for path in before} == before
    assert {
        Path(path).relative_to(tmp_path / "store").parts[:2] for path in after.keys() - before.keys()
    } == {("teachers", "sam")}
    store = FeatureStore.open(str(tmp_path / "store"))
    rows = {teacher: store.part(teacher, "a").summary.shape[0] for teacher in store.teachers()}
    assert rows == {"clip": 6, "dinov2": 6, "sam": 6}
    assert [line for teacher in store.teachers() for line in store.verify(teacher, "a")] == []


def test_the_class_token_and_its_projection_in_one_store(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["teachers"] = {"clip": CLIP, "clip_cls": {**CLIP, "summary": "cls"}}
    assert not extract(ExtractConfig.from_recipe(recipe)).failed
    store = FeatureStore.open(str(tmp_path / "store"))
    parts = [store.part(name, "a") for name in ("clip", "clip_cls")]
    assert [part.summary.shape[1] for part in parts] == [32, 64]
    assert np.array_equal(np.asarray(parts[0].spatial[...]), np.asarray(parts[1].spatial[...]))


@pytest.mark.parametrize("entry", [CLIP, {**CLIP, "summary": "cls"}, DINO, SAM, {**SAM, "spatial": "neck"}])
def test_a_spec_is_enough_to_make_its_teacher_again(entry: dict[str, Any]) -> None:
    first = create_teacher(**entry, device="cpu", name="mine")
    again = recreate_teacher(first.spec)
    assert again.spec == first.spec
    images = random_images(first.spec, 1)
    assert torch.equal(first(images).spatial, again(images).spatial)
    other = first.spec.model_copy(update={"weights_sha256": "0" * 64})
    with pytest.raises(UserError, match="weights_sha256: stored '000"):
        recreate_teacher(other)


@pytest.mark.parametrize("entry", [CLIP, DINO, SAM])
def test_an_outline_knows_all_but_the_weights(entry: dict[str, Any]) -> None:
    settings = {key: value for key, value in entry.items() if key not in ("weights", "seed")}
    outline, real = outline_teacher(**settings), create_teacher(**entry, device="cpu")
    known = {"weights": real.spec.weights, "weights_sha256": real.spec.weights_sha256}
    assert outline.spec.model_copy(update=known) == real.spec
    assert outline(random_images(real.spec)).spatial.shape == real(random_images(real.spec)).spatial.shape
    assert outline(random_images(real.spec)).spatial.is_meta


@pytest.mark.slow
def test_compiling_changes_rounding_alone() -> None:
    entry = {**DINO, "resolution": 140, "device": "cpu"}
    plain, compiled = create_teacher(**entry), create_teacher(**entry, compile=True)
    assert plain.spec == compiled.spec
    images = random_images(plain.spec)
    torch.testing.assert_close(plain(images).spatial, compiled(images).spatial, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("file", "side"), [("am_radio.yaml", 1024), ("am_radio_small.yaml", 512)])
def test_the_paper_s_recipe_and_its_small_twin_have_two_groups_of_resolutions(file: str, side: int) -> None:
    config = ExtractConfig.from_recipe(read_recipe(RECIPES / file))
    entries = {
        name: Entry(entry.family, entry.model, entry.weights, entry.settings)
        for name, entry in config.teachers.items()
    }
    found = {listing.name: listing.spec for listing in list_teachers(entries)}
    assert {name: spec and (spec.family, spec.height) for name, spec in found.items()} == {
        "metaclip": ("open_clip", 224),
        "dinov2": ("timm", 224),
        "sam": ("sam", side),
    }


def test_the_catalogue_says_what_each_known_teacher_stores() -> None:
    listed = {found.name: found for found in list_teachers(KNOWN)}
    assert [found.problem for found in listed.values() if found.problem] == []
    bytes_a_view = {name: found.spec.row_bytes for name, found in listed.items() if found.spec}
    assert bytes_a_view["openclip_h14"] == (16 * 16 * 1280 + 1024) * 2
    assert bytes_a_view["dinov2_g14"] == (16 * 16 * 1536 + 1536) * 2
    assert bytes_a_view["sam_h"] == (64 * 64 * 1280 + 1280) * 2
    assert bytes_a_view["sam_h_neck"] == (64 * 64 * 256 + 256) * 2


def test_the_catalogue_says_why_a_teacher_cannot_be_made() -> None:
    [found] = list_teachers({"mine": Entry("timm", "resnett18", "hub")})
    assert found.spec is None
    assert "close names: resnet18" in str(found.problem)


def test_weights_are_at_hand_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.pth").touch()
    assert weights_at_hand(Entry("sam", "vit_b", f"file:{tmp_path / 'a.pth'}"))
    assert not weights_at_hand(Entry("sam", "vit_b", f"file:{tmp_path / 'b.pth'}"))
    assert not weights_at_hand(Entry("timm", "resnet18", "package:no_such_package"))
    assert weights_at_hand(Entry("timm", "resnet18", "random"))


def test_the_plan_has_the_numbers_of_the_catalogue(recipe: dict[str, Any]) -> None:
    plan = make_plan(ExtractConfig.from_recipe(recipe))
    entries = {
        name: Entry(
            **{key: entry[key] for key in ("family", "model", "weights")},
            settings={
                key: value for key, value in entry.items() if key not in ("family", "model", "weights")
            },
        )
        for name, entry in recipe["teachers"].items()
    }
    listed = {found.name: found.spec.row_bytes for found in list_teachers(entries) if found.spec}
    assert {cost.name: cost.bytes_a_view for cost in plan.teachers} == listed
    assert all(cost.gflops for cost in plan.teachers)
