from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from storage_schemas.errors import UserError
from storage_schemas.features import TeacherOutput
from trainer.config import LossConfig
from trainer.evaluation.feature_distance import Predict, feature_distances, mean_predictor
from trainer.reader import TargetReader

CPU = torch.device("cpu")
TEACHERS = ("cnn", "vit")


def held_out(recorded: Any, teachers: tuple[str, ...] = TEACHERS) -> TargetReader:
    return TargetReader(recorded.store, recorded.sources("train-0"), teachers, (16, 16))


def recalling(reader: TargetReader, batch_size: int) -> Predict:
    """Answers each batch with its own targets, and rows without any with something finite."""
    batches: Iterator[Any] = reader.in_order(batch_size)

    def predict(images: torch.Tensor, teachers: Collection[str]) -> dict[str, TeacherOutput]:
        targets = next(batches).targets
        return {
            name: TeacherOutput(t.summary.float().nan_to_num(1.0), t.spatial.float().nan_to_num(1.0))
            for name, t in targets.items()
        }

    return predict


def test_a_prediction_that_equals_the_targets_is_at_distance_zero(recorded: Any) -> None:
    reader = held_out(recorded)
    found = feature_distances({"recall": recalling(reader, 4)}, reader, 4, CPU, LossConfig())["recall"]
    for teacher in TEACHERS:
        commit = recorded.store.commit(teacher, "train-0")
        assert found[teacher].views == commit.valid_rows
        assert found[teacher].summary == pytest.approx(0, abs=1e-6)
        assert found[teacher].spatial == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_the_distance_is_the_mean_over_valid_views_of_the_papers_losses(
    recorded: Any, batch_size: int
) -> None:
    """Worked out again in NumPy from what Zarr reads, for the constant that the moments give."""
    reader = held_out(recorded)
    constant = mean_predictor(recorded.store, TEACHERS, ["train-1"], CPU)
    loss = LossConfig(cosine=0.7, smooth_l1=0.3, transition=0.5)
    found = feature_distances({"constant": constant}, reader, batch_size, CPU, loss)["constant"]
    for teacher in TEACHERS:
        part = recorded.store.part(teacher, "train-0")
        valid = part.valid[...]
        means = {kind: moments.mean for kind, moments in recorded.store.moments(teacher, ["train-1"]).items()}
        summary = part.summary[...][valid].astype(np.float64)
        spatial = part.spatial[...][valid].astype(np.float64)
        error = np.abs(spatial - means["spatial"])
        smooth_l1 = np.where(error < 0.5, error**2 / 1.0, error - 0.25).mean(-1)
        expected = 0.7 * cosine_distance(spatial, means["spatial"]) + 0.3 * smooth_l1
        assert found[teacher].spatial == pytest.approx(expected.mean(), rel=1e-4)
        assert found[teacher].summary == pytest.approx(
            cosine_distance(summary, means["summary"]).mean(), rel=1e-4
        )


def cosine_distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    product: np.ndarray[Any, Any] = (a * b).sum(-1)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b)
    return np.where(lengths > 0, 1 - product / np.where(lengths > 0, lengths, 1), 0)


def test_the_mean_predictor_says_the_same_of_every_place_of_every_image(recorded: Any) -> None:
    answers = mean_predictor(recorded.store, TEACHERS, ["train-0", "train-1"], CPU)(
        torch.zeros(3, 3, 8, 8), TEACHERS
    )
    for teacher in TEACHERS:
        spec, moments = recorded.store.spec(teacher), recorded.store.moments(teacher, ["train-0", "train-1"])
        spatial = answers[teacher].spatial
        assert spatial.shape == (3, spec.grid.height, spec.grid.width, spec.spatial_dim)
        assert torch.equal(spatial, spatial[:1, :1, :1].expand_as(spatial))
        np.testing.assert_allclose(answers[teacher].summary[2], moments["summary"].mean, rtol=1e-5, atol=1e-6)


def test_a_teacher_without_features_is_no_distance_of_zero(own_copy: Any) -> None:
    commit = own_copy.store.commit("vit", "train-0")
    none = commit.model_copy(update={"invalid_rows": tuple(range(commit.rows))})
    path = own_copy.folder / "store/teachers/vit/commits/train-0.json"
    path.write_text(none.model_dump_json())
    reader = held_out(own_copy)
    constant = mean_predictor(own_copy.store, TEACHERS, ["train-1"], CPU)
    with pytest.raises(UserError, match="teacher: 'vit' has features of none of these views"):
        feature_distances({"constant": constant}, reader, 8, CPU, LossConfig())
