"""A small store, recorded once a session by real code: a CNN and a ViT over three shards."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.recorder import Recorder
from pipeline.teachers import Teacher, TeacherOutput, create_teacher
from storage_schemas.crops import CropPolicy
from storage_schemas.manifest import StoreManifest, TeacherSpec
from storage_schemas.store import FeatureStore

RESOLUTION = 32  # of the student
VIEWS = 3
IMAGES = {"train-0": 7, "train-1": 5, "held-out": 6}
BROKEN = ("train-0", 2)  # an image that cannot be decoded


class Overflowing:
    """A teacher that overflows fp16 on images whose blue is above a threshold."""

    def __init__(self, teacher: Teacher, threshold: float) -> None:
        self.teacher = teacher
        self.threshold = threshold

    @property
    def spec(self) -> TeacherSpec:
        return self.teacher.spec

    def __call__(self, images: torch.Tensor) -> TeacherOutput:
        output = self.teacher(images)
        output.spatial[images[:, 2].float().mean((1, 2)) > self.threshold] = 1e6
        return output


@dataclass(frozen=True)
class Recorded:
    """`folder` holds shards/*.tar and store; `teachers` are those that recorded it."""

    folder: Path
    store: FeatureStore
    teachers: Mapping[str, Teacher]

    def recipe(self, output: Path, **training: Any) -> dict[str, Any]:
        """A small ViT with the labels and shapes of this store; `training` overrides its section."""
        settings = {
            "output": str(output),
            "resolution": RESOLUTION,
            "batch_size": 8,
            "steps": 6,
            "learning_rate": 1e-3,
            "warmup": 2,
            "log_every": 1,
            "checkpoint_every": 2,
            "block_rows": 4,
            "window_blocks": 3,
            "device": "cpu",
        }
        manifest = self.store.manifest
        return {
            "store": {"url": self.store.url, "views_per_image": VIEWS, "crops": manifest.crops.model_dump()},
            "data": {
                "train": f"{self.folder}/shards/train-*.tar",
                "held_out": f"{self.folder}/shards/held-out.tar",
            },
            "student": {"name": "radio_vit_ti16", "width": 24, "depth": 2, "heads": 2, "max_size": 32},
            "training": settings | training,
            "evaluation": {"k": 3},
        }

    def sources(self, pattern: str = "train-*") -> dict[str, str]:
        """URLs of the shards by name."""
        return {path.stem: str(path) for path in sorted((self.folder / "shards").glob(f"{pattern}.tar"))}


_session: list[Recorded] = []


@pytest.fixture
def recorded(tmp_path_factory: pytest.TempPathFactory, write_tar: Any, jpeg: Any) -> Recorded:
    """The store, shared by all tests: they must not change it."""
    if not _session:
        _session.append(_record(tmp_path_factory.mktemp("recorded"), write_tar, jpeg))
    return _session[0]


@pytest.fixture
def own_copy(recorded: Recorded, tmp_path: Path) -> Recorded:
    """A copy of the store and its tars, to be damaged."""
    folder = tmp_path / "copy"
    shutil.copytree(recorded.folder, folder)
    return Recorded(folder, FeatureStore.open(str(folder / "store")), recorded.teachers)


def _record(folder: Path, write_tar: Any, jpeg: Any) -> Recorded:
    first = 0
    for shard, count in IMAGES.items():
        samples = [
            {"__key__": f"{i:04d}", "jpg": jpeg(i, 48 + i, 60 - i), "cls": i % 2, "txt": f"image {i}"}
            for i in range(first, first + count)
        ]
        if shard == BROKEN[0]:
            samples[BROKEN[1]]["jpg"] = b"no image"
        write_tar(folder / "shards" / f"{shard}.tar", samples)
        first += count
    teachers: dict[str, Teacher] = {
        "cnn": _teacher("test_efficientnet", name="cnn", seed=1, resolution=64),
        "vit": Overflowing(_teacher("test_vit", name="vit", seed=2, resolution=48), threshold=150.0),
    }
    crops = CropPolicy(scale=(0.3, 1.0), first_view="center")
    manifest = StoreManifest(crops=crops, views_per_image=VIEWS, seed=3)
    recorder = Recorder(FeatureStore.create(str(folder / "store"), manifest), [*teachers.values()], 8, 2)
    for shard in IMAGES:
        receipt = recorder.record(shard, str(folder / "shards" / f"{shard}.tar"))
        assert receipt.error is None
    return Recorded(folder, recorder.store, teachers)


def _teacher(model: str, **settings: Any) -> Teacher:
    return create_teacher("timm", model, weights="random", **settings)
