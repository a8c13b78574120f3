from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from storage_schemas.errors import UserError
from trainer.evaluation import knn
from trainer.evaluation.knn import knn_accuracy, knn_classify, nearest


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    return x[:1000], y[:1000], x[1000:], y[1000:]


def test_it_agrees_with_an_independent_one_on_real_images() -> None:
    bank, bank_labels, queries, _ = _digits()

    def votes(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)

    other = KNeighborsClassifier(20, weights=votes, metric="cosine", algorithm="brute")
    expected = other.fit(bank.numpy(), bank_labels.numpy()).predict(queries.numpy())
    assert (knn_classify(bank, bank_labels, queries).numpy() == expected).mean() > 0.995


def test_real_digits_are_told_apart() -> None:
    assert knn_accuracy(*_digits()) > 0.9


def test_a_bank_classifies_itself_with_one_neighbour() -> None:
    bank, labels = torch.randn(50, 8), torch.randint(0, 5, (50,))
    assert torch.equal(knn_classify(bank, labels, bank, k=1), labels)
    assert knn_accuracy(bank, labels, bank, labels, k=1) == 1


def test_lengths_of_vectors_do_not_matter_and_labels_may_be_any_integers() -> None:
    bank, labels, queries = torch.randn(50, 8), torch.randint(0, 5, (50,)), torch.randn(20, 8)
    predicted = knn_classify(bank, labels, queries)
    rescaled = knn_classify(bank * torch.rand(50, 1).add(0.1), labels, queries * 9)
    assert torch.equal(rescaled, predicted)
    assert torch.equal(knn_classify(bank, labels * 1000 - 7, queries), predicted * 1000 - 7)


def test_nearer_neighbours_outvote_more_neighbours() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    query = torch.tensor([[1.0, 0.1]])
    assert knn_classify(bank, torch.tensor([4, 9, 9]), query, k=3).item() == 4
    assert knn_classify(bank, torch.tensor([4, 9, 9]), query, k=3, temperature=100).item() == 9


def test_no_temperature_is_too_extreme() -> None:
    """Towards zero the nearest one decides, towards infinity the majority."""
    bank, labels, queries = torch.randn(50, 8), torch.randint(1, 5, (50,)), torch.randn(50, 8)
    for side in (queries, -queries):
        nearest_label = labels[nearest(bank, side, 1)[:, 0]]
        assert torch.equal(knn_classify(bank, labels, side, k=5, temperature=1e-9), nearest_label)
    binary = labels % 2
    majority = binary[nearest(bank, queries, 5)].sum(1) >= 3
    assert torch.equal(knn_classify(bank, binary, queries, k=5, temperature=1e9), majority.long())


def test_zero_vectors_are_far_from_everything() -> None:
    bank = torch.cat([torch.zeros(1, 2), torch.eye(2)])
    queries = torch.tensor([[0.0, 0.0], [0.2, 0.9]])
    assert nearest(bank, queries, 3)[1].tolist() == [2, 1, 0]
    assert knn_classify(bank, torch.tensor([5, 6, 7]), queries, k=1)[1].item() == 7


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_change_the_answer(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = torch.randn(50, 8), torch.randn(23, 8)
    expected = nearest(bank, queries, 4)
    monkeypatch.setattr(knn, "CHUNK", chunk)
    assert torch.equal(nearest(bank, queries, 4), expected)


def test_nearest_starts_with_the_vector_itself() -> None:
    bank = torch.randn(50, 8)
    found = nearest(bank, bank, 5)
    assert found.shape == (50, 5)
    assert torch.equal(found[:, 0], torch.arange(50))


@pytest.mark.parametrize("k", [0, 51])
def test_a_k_that_the_bank_does_not_hold_is_refused(k: int) -> None:
    bank, labels = torch.randn(50, 8), torch.zeros(50, dtype=torch.long)
    with pytest.raises(UserError, match=f"k {k} .* 50 vectors"):
        knn_classify(bank, labels, bank, k=k)


def test_what_is_not_finite_is_refused_by_row() -> None:
    good, bad = torch.randn(50, 8), torch.randn(50, 8)
    bad[31, 2] = torch.nan
    with pytest.raises(UserError, match="bank row 31"):
        nearest(bad, good, 3)
    with pytest.raises(UserError, match="queries row 31"):
        nearest(good, bad, 3)
