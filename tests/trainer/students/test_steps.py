"""Every student takes a training step: at two sizes, in two precisions, on two ranks, and compiled."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.trainer.ranks import run_ranks
from trainer.distributed import launch, wrap
from trainer.students import STUDENTS, Student, create_student
from trainer.students.registry import TABLE_6

SMALL: dict[str, dict[str, Any]] = {
    "radio_vit_ti16": {"width": 32, "depth": 2, "heads": 2, "max_size": 512, "registers": 1, "window": 2},
    "eradio_xt": {"width": 16, "layers": (1, 1, 1, 1), "heads": (2, 4)},
    "timm/test_resnet": {},
    "timm/vit_tiny_patch16_224": {"depth": 1},
}
RANKS = 2


def step(student: Student, size: tuple[int, int], precision: str) -> None:
    """Forward and backward; every parameter has a finite gradient."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        output = student.train()(torch.rand(2, 3, *size))
    assert output.summary.shape == (2, student.summary_dim)
    assert output.spatial.shape == (2, *student.grid(*size), student.spatial_dim)
    (output.summary.float().square().mean() + output.spatial.float().square().mean()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(224, 224), (128, 192)])
@pytest.mark.parametrize("name", SMALL)
def test_a_step(name: str, size: tuple[int, int], precision: str) -> None:
    torch.manual_seed(0)
    step(create_student(name, resolution=size, **SMALL[name]), size, precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("side", [224, 192])
@pytest.mark.parametrize("name", [*STUDENTS, *TABLE_6])
def test_a_step_of_every_student_at_its_full_size(name: str, side: int, precision: str) -> None:
    if side % (14 if name.endswith("14") else 1):
        side = 196
    # Many CPUs emulate bfloat16, ten times slower: blocks are alike, so some of the full width will do.
    settings = {} if precision == "float32" else shallow(name)
    step(create_student(name, resolution=(side, side), **settings), (side, side), precision)


def shallow(name: str) -> dict[str, Any]:
    """Settings for few of a student's blocks, one of each kind at least; timm's models take none like it."""
    if name.startswith("radio_vit"):
        return {"depth": 2}
    return {"layers": (1, 1, 1, 1)} if name.startswith("eradio") else {}


@pytest.mark.parametrize(
    ("name", "millions"), [*zip(TABLE_6, (21, 44, 30, 52, 88, 254, 49, 119, 56, 51), strict=True)]
)
def test_timms_models_are_those_of_the_papers_table(name: str, millions: int) -> None:
    """With 1000 classes, and cut to millions; timm's efficientvit_l1 has 52 where the paper prints 38."""
    with torch.device("meta"):
        model = timm.create_model(name.removeprefix("timm/"))
    assert sum(parameter.numel() for parameter in model.parameters()) // 10**6 == millions


def run_rank(rank: int, ranks: int, name: str, settings: dict[str, Any], side: int, out: str) -> None:
    torch.manual_seed(0)
    with launch("cpu") as world:
        module = wrap(create_student(name, resolution=(side, side), **settings), world)
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        torch.manual_seed(rank)
        for _ in range(2):  # a parameter that took no part in the first step would stop the second
            output = module(torch.rand(2, 3, side, side))
            optimizer.zero_grad()
            (output.summary.square().mean() + output.spatial.square().mean()).backward()
            optimizer.step()
        parameters = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        (Path(out) / f"{rank}").write_text(sha256(parameters.numpy().tobytes()).hexdigest())


def stay_the_same(name: str, settings: dict[str, Any], side: int, folder: Path) -> None:
    """Two ranks, each with images of its own, take two steps and end with equal parameters."""
    run_ranks(run_rank, RANKS, name, settings, side, str(folder))
    one, other = ((folder / f"{rank}").read_text() for rank in range(RANKS))
    assert one == other


@pytest.mark.parametrize("name", ["radio_vit_ti16", "eradio_xt"])
def test_two_ranks_stay_the_same_without_unused_parameters(name: str, tmp_path: Path) -> None:
    stay_the_same(name, SMALL[name], 64, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*STUDENTS, *TABLE_6])
def test_two_ranks_stay_the_same_with_every_student(name: str, tmp_path: Path) -> None:
    side = 224 if name.startswith("timm") else 4 * patch_size(name)
    stay_the_same(name, shallow(name), side, tmp_path)


def patch_size(name: str) -> int:
    with torch.device("meta"):
        return create_student(name).patch_size


@pytest.mark.parametrize("name", ["radio_vit_ti16", "eradio_xt"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph(name: str, backend: str) -> None:
    torch.manual_seed(0)
    student = create_student(name, **SMALL[name])
    images = torch.rand(2, 3, 64, 128)
    compiled = torch.compile(student, fullgraph=True, backend=backend)
    for training in (False, True):
        student.train(training)
        torch.manual_seed(1)
        expected = student(images)
        torch.manual_seed(1)
        found = compiled(images)
        if backend == "aot_eager" or not training:  # inductor draws other random numbers
            torch.testing.assert_close(found.summary, expected.summary, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.spatial, expected.spatial, rtol=1e-4, atol=1e-4)
        if training:
            (found.summary.sum() + found.spatial.square().sum()).backward()
            assert all(parameter.grad is not None for parameter in student.parameters())
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_compiles_as_one_graph_at_its_full_size(name: str) -> None:
    """On the meta device: the graph is that of the real sizes, and nothing is computed."""
    with torch.device("meta"):
        student, images = create_student(name), torch.empty(2, 3, 224, 224)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    for training in (False, True):
        student.train(training)
        output = compiled(images)
        assert output.spatial.shape == (2, *student.grid(224, 224), student.spatial_dim)
    (output.summary.sum() + output.spatial.square().sum()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    torch.compiler.reset()
