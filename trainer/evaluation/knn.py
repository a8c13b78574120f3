"""Nearest neighbours by cosine: weighted k-NN classification, and retrieval.

k-NN is AM-RADIO's: k = 20, and each neighbour votes with exp(similarity / 0.07). A vector of zeros is as far
from everything as an orthogonal one. A vector that is not finite is refused: leave invalid rows out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from storage_schemas.errors import UserError

CHUNK = 1024  # queries compared with the whole bank at a time


def knn_classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Labels predicted for `queries`, m d -> m, from a `bank`, n d, of which `bank_labels`, n, are known.

    UserError where the bank holds fewer than k vectors, or where a vector is not finite.
    """
    assert len(bank) == len(bank_labels), (len(bank), len(bank_labels))
    classes, members = torch.unique(bank_labels, return_inverse=True)  # c, n
    predicted = []
    for similarity, index in _neighbours(bank, queries, k):
        # The nearest one's vote is 1: no temperature overflows, and none leaves a query without a vote.
        vote = ((similarity - similarity[:, :1]) / temperature).exp()  # m k
        votes = vote.new_zeros(len(vote), len(classes)).scatter_add_(1, members[index], vote)  # m c
        predicted.append(classes[votes.argmax(1)])
    return torch.cat(predicted)


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Fraction of `queries` whose predicted label is theirs."""
    predicted = knn_classify(bank, bank_labels, queries, k, temperature)
    return (predicted == labels).float().mean().item()


def nearest(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Indices into `bank`, n d, of the k nearest of each of `queries`, m d -> m k, nearest first."""
    return torch.cat([index for _, index in _neighbours(bank, queries, k)])


def _neighbours(bank: Tensor, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(similarity, index), each m k, a chunk of queries at a time."""
    if not 0 < k <= len(bank):
        raise UserError(f"k {k} must be between 1 and the {len(bank)} vectors of the bank")
    for name, vectors in (("bank", bank), ("queries", queries)):
        bad = (~vectors.isfinite().all(1)).nonzero()
        if len(bad):
            raise UserError(f"{name} row {int(bad[0])} is not finite: leave invalid rows out")
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    for start in range(0, len(queries), CHUNK):
        similarity, index = torch.topk(queries[start : start + CHUNK] @ bank.T, k)
        yield similarity, index
