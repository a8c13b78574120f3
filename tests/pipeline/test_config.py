from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.teachers import create_teacher
from storage_schemas.errors import UserError
from tests.recording import make_config

INFINITE, NOT_A_NUMBER = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("actor_cpus", INFINITE),
        ("actor_gpus", NOT_A_NUMBER),
        ("actor_cpus", -1),
        ("batch_size", True),
        ("workers", 0),
    ],
)
def test_settings_of_recording_that_make_no_sense_are_named(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"recipe\.extract\.{field}: "):
        make_config(tmp_path, extract={field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("seed", True),
        ("pixel_mean", (0.5, 0.5, NOT_A_NUMBER)),
        ("pixel_std", (0.5, 0.0, 0.5)),
        ("pixel_std", (0.5, INFINITE, 0.5)),
        ("pixel_std", (0.5, -0.1, 0.5)),
        ("device", "gpu"),
        ("device", "cuda:77"),
        ("device", ""),
    ],
)
def test_settings_of_a_teacher_that_make_no_sense_are_named(field: str, value: Any) -> None:
    settings = {"seed": 0, "resolution": 32, "device": "cpu", field: value}
    with pytest.raises(UserError, match=field):
        create_teacher("timm", "test_vit", weights="random", **settings)
