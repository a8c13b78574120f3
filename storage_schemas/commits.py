"""The commit record: the one thing that readers trust, and how exactly one attempt comes to count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator
from xxhash import xxh3_128

from storage_schemas.errors import DataDamage
from storage_schemas.manifest import SCHEMA_VERSION, TEACHER_NAME, Frozen, canonical_json
from storage_schemas.objects import Objects

# What is read from a store is hostile until it is checked: a name that becomes part of a path cannot leave
# the store.
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=255)]
ObjectPath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(/[A-Za-z0-9_]+)*(/zarr\.json)?$|^zarr\.json$")]


class ObjectDigest(Frozen):
    """An object of a part: its path below the part, and the size and XXH3-128 of what was written, which was
    then read back and found the same.

    XXH3 finds damage at the speed of memory, where SHA-256 or BLAKE3 would bound the writing. It does not
    keep out a forger, but whoever can write objects can write commits.
    """

    path: ObjectPath
    size: Size
    xxh3_128: str = Field(pattern=r"^[0-9a-f]{32}$")


class SourceTar(Frozen):
    """The source shard that was recorded. `url` is where it lay then; size and SHA-256 are its identity."""

    url: str
    size: Size
    sha256: Digest


class Commit(Frozen):
    """One teacher's features of one source shard count, and these objects are they.

    invalid_rows: rows without features, because the image could not be read or the features were not finite
    in fp16. fidelity: for a lossy codec, the mean and least cosine between the teacher's tokens and the
    stored ones.
    """

    schema_version: int = Field(SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    teacher: str = Field(pattern=TEACHER_NAME)
    shard: Name
    attempt: str = Field(pattern=r"^[0-9a-f]{32}$")
    rows: int = Field(gt=0, lt=2**31)
    invalid_rows: tuple[int, ...]
    views_sha256: Digest
    source: SourceTar
    objects: tuple[ObjectDigest, ...]
    fingerprint: Digest
    versions: dict[str, str]
    fidelity: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _rows_exist(self) -> Self:
        if not all(low < high for low, high in pairwise((-1, *self.invalid_rows, self.rows))):
            raise ValueError(f"invalid_rows must rise and lie in 0..{self.rows - 1}")
        return self

    @property
    def valid_rows(self) -> int:
        """Rows with features."""
        return self.rows - len(self.invalid_rows)

    @property
    def bytes(self) -> int:
        """Bytes of all the objects of the part."""
        return sum(entry.size for entry in self.objects)


def merge_fidelity(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Of several parts, given their valid rows and their fidelities; empty if none has one."""
    known = [(rows, part) for rows, part in parts if rows and part.keys() >= {"cosine_mean", "cosine_min"}]
    if not known:
        return {}
    mean = sum(rows * part["cosine_mean"] for rows, part in known) / sum(rows for rows, _ in known)
    return {"cosine_mean": mean, "cosine_min": min(part["cosine_min"] for _, part in known)}


def write_commit(objects: Objects, path: str, commit: Commit) -> bool:
    """Put the record if there is none. True if this attempt is the one that counts, False if another's is.

    "Already exists" is answered by reading back, for the answer to one's own earlier put may have been lost.
    """
    if objects.put_if_absent(path, canonical_json(commit.model_dump(mode="json"))):
        return True
    return read_commit(objects, path).attempt == commit.attempt


def read_commit(objects: Objects, path: str) -> Commit:
    """The record at `path`; FileNotFoundError if there is none, DataDamage if it is not one."""
    try:
        return Commit.model_validate_json(objects.get(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"])
        raise DataDamage(f"commit {objects.url}/{path}: {where}: {first['msg']}") from error


def digest_object(objects: Objects, path: str) -> tuple[int, str]:
    """(size, XXH3-128) of an object as it reads back; FileNotFoundError if there is none."""
    digest, size = xxh3_128(), 0
    for piece in objects.stream(path):
        digest.update(piece)
        size += len(piece)
    return size, digest.hexdigest()
