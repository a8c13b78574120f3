from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from storage_schemas.manifest import StoreManifest, TeacherSpec, canonical_json
from tests.recording import make_spec


def test_the_fingerprint_changes_with_every_fact_but_the_place_of_the_weights() -> None:
    changes: dict[str, Any] = {
        "name": "other",
        "family": "other",
        "model": "other",
        "weights_sha256": "1" * 64,
        "height": 32,
        "width": 32,
        "patch_size": 4,
        "grid": {"height": 2, "width": 2},
        "summary_dim": 5,
        "spatial_dim": 5,
        "summary": "cls",
        "blocks": 2,
        "spatial": "neck",
        "pixel_mean": (0.1, 0.2, 0.3),
        "pixel_std": (0.1, 0.2, 0.3),
        "compute_dtype": "bfloat16",
        "codec": "int8",
        "pixels": "other",
    }
    assert changes.keys() | {"weights"} == TeacherSpec.model_fields.keys()
    found = {make_spec(**{key: value}).fingerprint for key, value in changes.items()}
    assert len(found | {make_spec().fingerprint}) == len(changes) + 1
    assert make_spec(weights="file:x").fingerprint == make_spec().fingerprint


def test_specs_survive_json_with_their_fingerprint() -> None:
    spec = make_spec(pixel_mean=(0.1, 1 / 3, 0.498039))
    again = TeacherSpec.model_validate_json(canonical_json(spec.model_dump(mode="json")))
    assert (again, again.fingerprint) == (spec, spec.fingerprint)
    shuffled = dict(reversed(json.loads(canonical_json(spec.model_dump(mode="json"))).items()))
    assert TeacherSpec.model_validate(shuffled).fingerprint == spec.fingerprint


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "-a", "a\n", "x" * 65, "ä"])
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        make_spec(name)


def test_configs_do_not_change() -> None:
    with pytest.raises(ValidationError):
        StoreManifest().seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        StoreManifest(sed=3)  # type: ignore[call-arg]
