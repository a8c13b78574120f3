from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional

from pipeline.config import ExtractConfig
from pipeline.extract import extract
from pipeline.teachers import create_teacher
from pipeline.text import embed_classes, read_classes, read_templates, record_text
from storage_schemas.errors import UserError
from storage_schemas.store import FeatureStore
from tests.conftest import MakeJpeg, WriteTar
from tests.pipeline.teachers.upstream import TINY_CLIP, add_tiny_clip

open_clip = pytest.importorskip("open_clip")

MODEL = TINY_CLIP
add_tiny_clip()
CLASSES = ("goldfish", "tench", "a {brace}")
TEMPLATES = ("a photo of a {}.", "{} in the snow")


@pytest.fixture
def recorded(tmp_path: Path, write_tar: WriteTar, jpeg: MakeJpeg) -> ExtractConfig:
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "jpg": jpeg(0, 50, 60)}])
    entry: dict[str, Any] = {
        "family": "open_clip",
        "model": MODEL,
        "weights": "random",
        "seed": 0,
        "blocks": 1,
    }
    config = ExtractConfig.from_recipe(
        {
            "store": {"url": str(tmp_path / "store")},
            "data": {"train": str(tmp_path / "a.tar")},
            "teachers": {"clip": entry, "cls": {**entry, "summary": "cls"}},
            "extract": {"device": "cpu"},
        }
    )
    assert not extract(config).failed
    (tmp_path / "fish.txt").write_text("\n".join([*CLASSES, "", ""]), encoding="utf-8")
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES), encoding="utf-8")
    return config


def test_embeddings_are_means_over_templates_of_what_the_text_tower_gives(
    recorded: ExtractConfig, tmp_path: Path
) -> None:
    record_text(recorded, "clip", str(tmp_path / "fish.txt"), str(tmp_path / "templates.txt"))
    store = FeatureStore.open(str(tmp_path / "store"))
    found = store.text("clip", "fish")
    torch.manual_seed(0)
    network = open_clip.create_model(MODEL).eval()
    tokenize = open_clip.get_tokenizer(MODEL)
    for name, vector in zip(CLASSES, found.vectors, strict=True):
        with torch.no_grad():
            texts = network.encode_text(tokenize([template.replace("{}", name) for template in TEMPLATES]))
        expected = functional.normalize(functional.normalize(texts, dim=-1).mean(0), dim=-1)
        assert np.abs(vector - expected.numpy()).max() < 1e-5
    assert found.names == CLASSES
    assert store.texts("clip") == ["fish"]
    assert found.vectors.shape[1] == store.spec("clip").summary_dim
    assert found.provenance.weights_sha256 == store.spec("clip").weights_sha256
    assert found.provenance.templates == TEMPLATES
    assert "SimpleTokenizer" in found.provenance.tokenizer
    table = pq.read_table(tmp_path / "store" / "teachers" / "clip" / "text" / "fish.parquet")
    assert table["class"].to_pylist() == list(CLASSES)
    assert len(table["embedding"][0]) == 32


def test_a_list_is_kept_or_refused_and_never_replaced(recorded: ExtractConfig, tmp_path: Path) -> None:
    classes, templates = str(tmp_path / "fish.txt"), str(tmp_path / "templates.txt")
    first = record_text(recorded, "clip", classes, templates)
    path = tmp_path / "store" / "teachers" / "clip" / "text" / "fish.parquet"
    before = path.read_bytes()
    assert np.array_equal(record_text(recorded, "clip", classes, templates).vectors, first.vectors)
    (tmp_path / "templates.txt").write_text("{}")
    with pytest.raises(UserError, match=r"made with other settings .*templates"):
        record_text(recorded, "clip", classes, templates)
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    (tmp_path / "fish.txt").write_text("cod")
    with pytest.raises(UserError, match=r"holds other classes \(3\) than those given \(1\)"):
        record_text(recorded, "clip", classes, templates)
    assert path.read_bytes() == before
    record_text(recorded, "clip", classes, templates, name="cod")
    assert FeatureStore.open(str(tmp_path / "store")).texts("clip") == ["cod", "fish"]


def test_bad_input_is_named(recorded: ExtractConfig, tmp_path: Path) -> None:
    classes, templates = str(tmp_path / "fish.txt"), str(tmp_path / "templates.txt")
    with pytest.raises(UserError, match="'cls' has no text side"):
        record_text(recorded, "cls", classes, templates)
    with pytest.raises(UserError, match="'other' is not in the recipe"):
        record_text(recorded, "other", classes, templates)
    with pytest.raises(UserError, match=r"--name: '\.\./x' may hold only"):
        record_text(recorded, "clip", classes, templates, name="../x")
    changed = {"clip": recorded.teachers["clip"].model_copy(update={"weights": "random", "seed": 3})}
    with pytest.raises(UserError, match="was recorded with"):
        record_text(recorded.model_copy(update={"teachers": changed}), "clip", classes, templates)
    with pytest.raises(UserError, match="classes: 'dogs' is not embedded for 'clip'; there: none"):
        FeatureStore.open(str(tmp_path / "store")).text("clip", "dogs")
    for content, message in (("{} and {}", "must hold {} once"), ("a {x}", "once"), ("", "holds no line")):
        (tmp_path / "templates.txt").write_text(content)
        with pytest.raises(UserError, match=message):
            read_templates(templates)
    with pytest.raises(UserError, match="--classes: '/nowhere' cannot be read"):
        read_classes("/nowhere")


def test_imagenet_is_built_in() -> None:
    assert len(read_classes("imagenet")) == 1000
    assert read_classes("imagenet")[:2] == ("tench", "goldfish")
    assert len(read_templates("imagenet")) == 80
    assert "a bad photo of a {}." in read_templates("imagenet")


def test_image_and_text_embeddings_meet_in_one_space() -> None:
    teacher = create_teacher("open_clip", MODEL, weights="random", seed=0, device="cpu")
    found = embed_classes(MODEL, "random", {"seed": 0, "device": "cpu"}, ["cat"], ["{}"])
    assert found.vectors.shape[1] == teacher.spec.summary_dim
    assert found.provenance.weights_sha256 == teacher.spec.weights_sha256
    assert np.linalg.norm(found.vectors, axis=1) == pytest.approx(1, abs=1e-5)
