"""The commit record: the one thing that readers trust, and how exactly one attempt comes to count."""

from __future__ import annotations

from pydantic import Field, ValidationError

from storage_schemas.errors import DataDamage
from storage_schemas.manifest import SCHEMA_VERSION, Frozen, canonical_json
from storage_schemas.objects import Objects


class ObjectDigest(Frozen):
    """An object of a part: its path below the part, and the size and BLAKE3 of what was read back after
    writing (BLAKE3 because SHA-256, four times slower, would be what bounds the writing).
    """

    path: str
    size: int
    blake3: str


class SourceTar(Frozen):
    """The source shard that was recorded. `url` is where it lay then; size and SHA-256 are its identity."""

    url: str
    size: int
    sha256: str


class Commit(Frozen):
    """One teacher's features of one source shard count, and these objects are they.

    invalid_rows: rows without features, because the image could not be read or the features were not finite
    in fp16. fidelity: for a lossy codec, the mean and least cosine between the teacher's tokens and the
    stored ones.
    """

    schema_version: int = SCHEMA_VERSION
    teacher: str
    shard: str
    attempt: str
    rows: int = Field(ge=0)
    invalid_rows: tuple[int, ...]
    views_sha256: str
    source: SourceTar
    objects: tuple[ObjectDigest, ...]
    fingerprint: str
    versions: dict[str, str]
    fidelity: dict[str, float] = Field(default_factory=dict)

    @property
    def valid_rows(self) -> int:
        """Rows with features."""
        return self.rows - len(self.invalid_rows)

    @property
    def bytes(self) -> int:
        """Bytes of all the objects of the part."""
        return sum(entry.size for entry in self.objects)


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
