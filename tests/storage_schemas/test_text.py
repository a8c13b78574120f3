from __future__ import annotations

import numpy as np
import pytest

from storage_schemas.errors import DataDamage
from storage_schemas.text import ClassEmbeddings, TextProvenance, decode_classes, encode_classes

PROVENANCE = TextProvenance(
    model="m", weights="random:seed=0", weights_sha256="0" * 64, tokenizer="t", templates=("a {}", "the {} ü")
)


def classes(count: int = 5) -> ClassEmbeddings:
    vectors = np.random.default_rng(0).normal(size=(count, 7)).astype(np.float32)
    return ClassEmbeddings(tuple(f"class {i}" for i in range(count)), vectors, PROVENANCE)


def test_class_embeddings_survive_storage() -> None:
    found = decode_classes(encode_classes(classes()), "here")
    assert found.names == classes().names
    assert found.provenance == PROVENANCE
    assert found.vectors.dtype == np.float32
    assert np.array_equal(found.vectors, classes().vectors)


def test_damage_is_found() -> None:
    data = encode_classes(classes(200))
    with pytest.raises(DataDamage, match="here: "):
        decode_classes(data[:-20], "here")
    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 1
    with pytest.raises(DataDamage, match="here: "):
        decode_classes(bytes(flipped), "here")
