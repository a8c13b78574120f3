from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from storage_schemas.features import Moments, TeacherOutput
from trainer.adaptors import align
from trainer.balancing import Weights
from trainer.config import LossConfig, TrainConfig
from trainer.distillation import load_distillation, loss_terms, weighted_sum
from trainer.groups import open_groups
from trainer.normalizers import NORMALIZERS, Normalizer, phi_s, standardize
from trainer.train import first_model, train

WIDTHS = (1, 2, 3, 12, 20, 112, 192)
FITS = {name: fit for name, fit in NORMALIZERS.items() if fit is not None}
Array = NDArray[np.float64]


def features(n: int, d: int) -> Array:
    """n d, of channels that are correlated, not centred, and of very different variances."""
    generator = np.random.default_rng(d)
    mixed = generator.normal(size=(n, d)) * 10.0 ** -np.linspace(0, 2, d)
    return mixed @ generator.normal(size=(d, d)) * generator.uniform(0.1, 10, d) + generator.normal(0, 5, d)


def apply(normalizer: Normalizer, values: Array) -> Array:
    output: Array = normalizer(torch.from_numpy(values)).double().numpy()
    return output


def inverse(normalizer: Normalizer, y: Tensor) -> Tensor:
    """x of y = A (x - mean), in float64."""
    matrix = normalizer.matrix.double()
    matrix = matrix.diag() if matrix.ndim == 1 else matrix
    return torch.linalg.solve(matrix, y.double().T).T + normalizer.mean.double()


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_normalised_channels_have_mean_0_and_variance_1(fit: Any, d: int) -> None:
    values = features(4 * d + 3, d)
    normalised = apply(fit(Moments.of(values)), values)
    assert normalised.mean(axis=0) == pytest.approx(np.zeros(d), abs=1e-4)
    assert normalised.var(axis=0) == pytest.approx(np.ones(d), rel=1e-4)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_moments_are_those_of_the_normalised_vectors(fit: Any, d: int) -> None:
    values = features(4 * d + 3, d)
    known = Moments.of(values)
    normalizer = fit(known)
    said, found = normalizer.moments(known), Moments.of(apply(normalizer, values))
    assert said.count == found.count
    assert said.mean == pytest.approx(found.mean, abs=1e-4)
    assert said.covariance == pytest.approx(found.covariance, abs=1e-4)


@pytest.mark.parametrize("samples", ["many", "few"])
@pytest.mark.parametrize("d", WIDTHS)
def test_phi_s_scales_all_distances_alike(d: int, samples: str) -> None:
    """So it does where the covariance has no full rank: fewer samples than channels."""
    values = features(4 * d + 3 if samples == "many" else d // 2 + 2, d)
    known = Moments.of(values)
    normalised, factor = apply(phi_s(known), values), known.covariance.trace() / d
    before, after = (((x[:, None] - x) ** 2).sum(-1) for x in (values, normalised))
    assert after * factor == pytest.approx(before, rel=1e-4, abs=1e-4 * before.max())
    assert normalised.var(axis=0) == pytest.approx(np.ones(d), rel=1e-4)


@pytest.mark.parametrize("samples", ["many", "few"])
@pytest.mark.parametrize("d", WIDTHS)
def test_how_sums_are_rounded_changes_nothing(d: int, samples: str) -> None:
    """Runs on other numbers of threads, so of ranks, must be given the same targets."""
    values = features(4 * d + 3 if samples == "many" else d // 2 + 2, d)
    known = Moments.of(values)
    noise = np.random.default_rng(0).normal(size=(d, d)) * 1e-14
    other = Moments(known.count, known.mean, known.covariance * (1 + noise + noise.T))
    assert apply(phi_s(other), values) == pytest.approx(apply(phi_s(known), values), rel=1e-4, abs=1e-4)


def test_phi_s_spreads_every_eigenvector_over_all_channels() -> None:
    """A Hadamard matrix's entries are all 1 / sqrt d in size: so here at d = 2 and 4, else at most sqrt 2
    times that.
    """
    for d, most in ((2, 1.0), (4, 1.0), (3, 2**0.5), (20, 2**0.5), (112, 2**0.5), (192, 2**0.5)):
        known = Moments.of(features(4 * d, d))
        rotation = phi_s(known).matrix.double().numpy() * np.sqrt(known.covariance.trace() / d)
        spread = abs(rotation @ np.linalg.eigh(known.covariance)[1]) * np.sqrt(d)
        assert spread.max() <= most + 1e-5


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_what_says_little_gives_a_finite_map_that_can_be_inverted(fit: Any, d: int) -> None:
    few, dead = features(max(2, d // 3), d), features(4 * d, d)
    dead[:, ::2] = 3.0
    constant, nothing = np.full((9, d), 1.7), np.zeros((0, d))
    probes = torch.from_numpy(features(16, d))
    for values in (few, few[:1], dead, constant, nothing):
        normalizer = fit(Moments.of(values))
        normalised = normalizer(probes)
        assert normalised.isfinite().all()
        scale = 1e-4 * float(probes.abs().max())
        torch.testing.assert_close(inverse(normalizer, normalised), probes, rtol=1e-4, atol=scale)


def test_what_hardly_varies_is_not_amplified() -> None:
    values = features(400, 12)
    values[:, 3] = 2.0 + 1e-9 * values[:, 4]
    for still in (values[:, [3]], values):
        scale = standardize(Moments.of(still)).matrix
        others = values[:, [0, 1, 2, *range(4, 12)]].std(axis=0).min()
        assert float(scale.max()) <= 1.001 * max(1.0, 1 / others)


def test_of_unknown_targets_nothing_is_changed() -> None:
    probes = torch.randn(5, 12)
    for fit in FITS.values():
        assert torch.equal(fit(Moments.of(np.zeros((0, 12))))(probes), probes)


def test_half_precision_targets_are_normalised_in_float32() -> None:
    values = features(64, 12).astype(np.float16)
    for fit in FITS.values():
        normalizer = fit(Moments.of(values))
        given = torch.from_numpy(values).reshape(4, 4, 4, 12)
        assert normalizer(given).dtype == torch.float32
        assert torch.equal(normalizer(given), normalizer(given.float()))


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_a_folded_layer_gives_what_inverting_its_output_gives(fit: Any, d: int) -> None:
    torch.manual_seed(0)
    linear, inputs = nn.Linear(40, d), torch.randn(50, 40)
    normalizer = fit(Moments.of(features(4 * d, d)))
    with torch.no_grad():
        expected = inverse(normalizer, linear(inputs))
        normalizer.fold_into(linear)
        found = linear(inputs).double()
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("fit", FITS.values(), ids=FITS)
def test_the_resize_and_the_inverse_commute(fit: Any) -> None:
    normalizer, maps = fit(Moments.of(features(64, 20))), torch.randn(2, 4, 6, 20)

    def invert(x: Tensor) -> Tensor:
        return inverse(normalizer, x.reshape(-1, 20)).reshape(x.shape).float()

    torch.testing.assert_close(invert(align(maps, (7, 5))), align(invert(maps), (7, 5)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FITS)
def test_invalid_rows_stay_harmless(recorded: Any, tmp_path: Path, name: str) -> None:
    """The losses and gradients of a batch are those of its valid rows, whatever the others hold."""
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, normalizer=name))
    [group] = open_groups(config)
    reader, model = group.reader, first_model(config, [group])
    batch = next(batch for batch in reader.in_order(8) if len(batch.valid["vit"].unique()) == 2)
    predicted, targets, valid = (x["vit"] for x in (model.predict(batch.images), batch.targets, batch.valid))
    assert not targets.spatial[~valid].isfinite().any()

    def gradients(rows: Tensor) -> list[Tensor]:
        """The loss of some rows, then its gradient at the predicted features of all of them."""
        student, given = (TeacherOutput(x.summary[rows], x.spatial[rows]) for x in (predicted, targets))
        normalised = model.normalize({"vit": given})
        mask = {"vit": valid[rows]}
        terms = loss_terms({"vit": student}, normalised, mask, LossConfig())
        total = weighted_sum(terms, mask, {"vit": mask["vit"].sum()}, LossConfig(), Weights()).total
        at = [predicted.summary, predicted.spatial]
        return [total, *torch.autograd.grad(total, at, retain_graph=True)]

    for everything, good in zip(gradients(torch.arange(len(valid))), gradients(valid), strict=True):
        assert everything.isfinite().all()
        torch.testing.assert_close(everything, good)


@pytest.mark.parametrize("name", FITS)
def test_stored_targets_are_normalised_by_their_own_moments(recorded: Any, tmp_path: Path, name: str) -> None:
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, normalizer=name))
    [group] = open_groups(config)
    reader, model = group.reader, first_model(config, [group])
    valid: dict[str, list[Tensor]] = {"cnn": [], "vit": []}
    for batch in reader.in_order(8):
        for teacher, output in model.normalize(batch.targets).items():
            valid[teacher].append(output.summary[batch.valid[teacher]])
    for summaries in valid.values():
        normalised = torch.cat(summaries)
        assert normalised.mean(0).abs().max() < 1e-3
        assert (normalised.var(0, correction=0) <= 1.001).all()
        if name == "phi_s":
            assert (normalised.var(0, correction=0) >= 0.999).all()


@pytest.mark.parametrize("name", FITS)
def test_first_outputs_are_of_the_normalised_targets_scale(recorded: Any, tmp_path: Path, name: str) -> None:
    """So that, folded, they are of the teacher's own."""
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path, normalizer=name))
    [group] = open_groups(config)
    reader, model, images = (
        group.reader,
        first_model(config, [group]),
        torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8),
    )
    for output in model.predict(images).values():
        for values in (output.summary, output.spatial):
            assert 0.3 < values.square().mean().item() < 3
    for teacher, output in model.fold().predict(images).items():
        for kind, known in reader.store.moments(teacher, reader.shards).items():
            power = getattr(output, kind).square().sum(-1).mean().item()
            expected = float((known.mean**2).sum() + known.covariance.trace())
            assert 0.3 * expected < power < 3 * expected


@pytest.mark.parametrize("name", FITS)
def test_evaluation_sees_the_teachers_own_scale(recorded: Any, tmp_path: Path, name: str) -> None:
    """A folded model predicts what inverting the unfolded one's output gives, on the teacher's grid."""
    recipe = recorded.recipe(tmp_path, normalizer=name, steps=4)
    config, images = TrainConfig.from_recipe(recipe), torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    folded, _ = load_distillation(train(recipe))
    assert not [key for key in folded.state_dict() if "normalizer" in key]
    model = first_model(config, open_groups(config)).eval()
    with torch.no_grad():
        predicted = model.predict(images)
        normalizers = {k: dict(adaptor.normalizers) for k, adaptor in model.adaptors.items()}
        for teacher, output in model.fold().predict(images).items():
            for kind in ("summary", "spatial"):
                found, before = getattr(output, kind), getattr(predicted[teacher], kind)
                flat = before.reshape(-1, before.shape[-1])
                expected = inverse(normalizers[teacher][kind], flat).reshape(before.shape)
                assert (found - expected).norm() <= 1e-5 * expected.norm()
