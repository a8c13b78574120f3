"""Class embeddings of a text tower, beside the teacher whose summaries they can be compared with.

One Parquet file a list of classes: a row a class, in the order of the list, and in the file's metadata what
made them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from storage_schemas.errors import DataDamage, UserError
from storage_schemas.manifest import Frozen, canonical_json, require_same
from storage_schemas.objects import Objects

_PROVENANCE = b"rebroadcast"  # key of the file's metadata


class TextProvenance(Frozen):
    """What made class embeddings. In each of `templates`, `{}` stands for the class name."""

    model: str
    weights: str
    weights_sha256: str
    tokenizer: str
    templates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ClassEmbeddings:
    """`vectors` is float32 c d, of length 1; `names` are the c classes."""

    names: tuple[str, ...]
    vectors: NDArray[np.float32]
    provenance: TextProvenance


def encode_classes(classes: ClassEmbeddings) -> bytes:
    """Parquet bytes: columns `class` and `embedding`, page checksums, provenance as JSON in the metadata."""
    d = classes.vectors.shape[1]
    flat = pa.array(classes.vectors.reshape(-1), pa.float32())
    columns = {
        "class": pa.array(classes.names, pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, d),
    }
    provenance = canonical_json(classes.provenance.model_dump(mode="json"))
    table = pa.table(columns).replace_schema_metadata({_PROVENANCE: provenance})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def put_classes(objects: Objects, path: str, classes: ClassEmbeddings) -> ClassEmbeddings:
    """Store class embeddings unless there are some; those that there are now.

    UserError, naming what differs, if they are of other classes or were made by something else.
    """
    objects.put_if_absent(path, encode_classes(classes))
    stored = read_classes(objects, path)
    require_same(
        f"{objects.url}/{path}", stored.provenance, classes.provenance, ignore=frozenset({"weights"})
    )
    if stored.names != classes.names:
        raise UserError(
            f"{objects.url}/{path} holds other classes ({len(stored.names)}) than those given "
            f"({len(classes.names)}). Give this list another name."
        )
    return stored


def read_classes(objects: Objects, path: str) -> ClassEmbeddings:
    """The class embeddings of an object; FileNotFoundError if there is none."""
    return decode_classes(objects.get(path), f"{objects.url}/{path}")


def decode_classes(data: bytes, where: str) -> ClassEmbeddings:
    """The class embeddings of a file; DataDamage where a checksum or the layout does not hold."""
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        provenance = TextProvenance.model_validate_json(table.schema.metadata[_PROVENANCE])
        flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        names = tuple(table["class"].to_pylist())
        return ClassEmbeddings(names, flat.reshape(len(names), -1), provenance)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError, ValidationError) as error:
        raise DataDamage(f"{where}: {str(error).splitlines()[0]}") from error
