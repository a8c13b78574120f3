from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from storage_schemas.errors import DataDamage, UserError
from trainer.distillation import load_distillation
from trainer.export import SUFFIXES, Format, export_student
from trainer.train import train
from trainer.trained import load_student, read_checkpoint

STUDENTS = {
    "radio_vit": {
        "name": "radio_vit_ti16",
        "width": 24,
        "depth": 2,
        "heads": 2,
        "max_size": 128,
        "registers": 1,
    },
    "eradio": {"name": "eradio_xt", "width": 16, "layers": [1, 1, 1, 1], "heads": [2, 4]},
    "timm": {"name": "timm/test_resnet"},
}

_trained: dict[str, Path] = {}


@pytest.fixture
def checkpoint_of(recorded: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(student: str) -> Path:
        if student not in _trained:
            recipe = recorded.recipe(
                tmp_path_factory.mktemp(student), steps=2, resolution=64, adaptor_blocks=1
            )
            _trained[student] = train({**recipe, "student": STUDENTS[student]})
        return _trained[student]

    return make


@pytest.mark.parametrize("student", STUDENTS)
def test_a_loaded_student_is_the_trained_one(
    checkpoint_of: Callable[[str], Path], student: str, tmp_path: Path
) -> None:
    checkpoint, images = checkpoint_of(student), torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    export_student(checkpoint, "safetensors", str(tmp_path / "student"))
    loaded, (model, _) = load_student(str(tmp_path / "student")), load_distillation(checkpoint)
    assert not loaded.training
    own, expected = loaded(images / 255), model.student(images / 255)
    assert torch.equal(own.summary, expected.summary)
    assert torch.equal(own.spatial, expected.spatial)
    for name in ("cnn", "vit"):
        found, head = loaded.adapt(name)(images / 255), model.adaptors[name](expected)
        assert torch.equal(found.summary, head.summary)
        assert torch.equal(found.spatial, head.spatial)
    card = json.loads((tmp_path / "student" / "card.json").read_bytes())
    assert (card["name"], card["steps"], [*card["teachers"]]) == (
        STUDENTS[student]["name"],
        2,
        ["cnn", "vit"],
    )
    assert card["metrics"]["step"] == 2


@pytest.mark.parametrize("normalizer", ["standardize", "phi_s"])
def test_an_exported_student_speaks_at_its_teachers_own_scale(
    recorded: Any, tmp_path: Path, normalizer: str
) -> None:
    recipe = recorded.recipe(tmp_path / "run", steps=2, normalizer=normalizer)
    checkpoint, images = train(recipe), torch.rand(2, 3, 32, 32)
    export_student(checkpoint, "safetensors", str(tmp_path / "student"))
    loaded, (model, _) = load_student(str(tmp_path / "student")), load_distillation(checkpoint)
    assert not [name for name in loaded.state_dict() if "normalizers" in name]
    for teacher, adaptor in model.adaptors.items():
        found, expected = loaded.adapt(teacher)(images), adaptor(model.student(images))
        assert torch.equal(found.summary, expected.summary)
        assert torch.equal(found.spatial, expected.spatial)
        known = recorded.store.moments(teacher, ["train-0", "train-1"])["spatial"]
        power = expected.spatial.square().sum(-1).mean().item()
        truth = float((known.mean**2).sum() + known.covariance.trace())
        assert 0.2 * truth < power < 5 * truth


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("to", SUFFIXES)
def test_what_is_written_runs_without_the_project(
    checkpoint_of: Callable[[str], Path], student: str, to: Format, tmp_path: Path
) -> None:
    """`export_student` itself refuses what does not agree with the module."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out = tmp_path / f"student{SUFFIXES[to]}"
    export_student(checkpoint_of(student), to, str(out), (96, 64), teacher="cnn")
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    ("student", "to"), [("radio_vit", "torch-export"), ("radio_vit", "onnx"), ("timm", "torch-export")]
)
def test_a_dynamic_resolution(
    checkpoint_of: Callable[[str], Path], student: str, to: Format, tmp_path: Path
) -> None:
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    export_student(
        checkpoint_of(student), to, str(tmp_path / f"student{SUFFIXES[to]}"), (64, 96), dynamic=True
    )


def test_what_cannot_be_exported_is_refused_with_what_can(
    checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of("radio_vit")
    with pytest.raises(UserError, match="one resolution; choose onnx or torch-export"):
        export_student(checkpoint, "torchscript", str(tmp_path / "a.ts"), dynamic=True)
    with pytest.raises(UserError, match=r"must end in \.onnx"):
        export_student(checkpoint, "onnx", str(tmp_path / "a.ts"))
    with pytest.raises(UserError, match="multiple of the patch size"):
        export_student(checkpoint, "torchscript", str(tmp_path / "a.ts"), (60, 64))
    with pytest.raises(UserError, match=r"'clip' has no heads here; there: cnn, vit"):
        read_checkpoint(checkpoint).adapt("clip")


def test_what_is_no_student_is_named(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, folder = checkpoint_of("radio_vit"), tmp_path / "student"
    with pytest.raises(UserError, match="rebroadcast export"):
        load_student(str(checkpoint))
    export_student(checkpoint, "safetensors", str(folder))
    weights = folder / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataDamage, match=r"student\.safetensors has digest"):
        load_student(str(folder))
    weights.unlink()
    with pytest.raises(DataDamage, match=r"student\.safetensors is missing"):
        load_student(str(folder))
