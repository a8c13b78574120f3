"""FeatureStore: create, open, list, read and verify a store. The only place that builds a path inside one.

<store>/manifest.json                               StoreManifest
<store>/views/<shard>.parquet                       one row a view
<store>/teachers/<teacher>/spec.json                TeacherSpec
<store>/teachers/<teacher>/parts/<shard>.<attempt>/ a Zarr v3 group
<store>/teachers/<teacher>/commits/<shard>.json     names the one attempt that counts
<store>/teachers/<teacher>/text/<classes>.parquet   class embeddings of its text tower
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from hashlib import sha256
from typing import TypeVar

import pyarrow as pa
from pydantic import BaseModel, ValidationError

from storage_schemas.commits import Commit, read_commit, write_commit
from storage_schemas.errors import DataDamage, UserError
from storage_schemas.features import Moments
from storage_schemas.manifest import (
    SCHEMA_VERSION,
    TEACHER_NAME,
    StoreManifest,
    TeacherSpec,
    canonical_json,
    require_same,
)
from storage_schemas.objects import Objects, open_objects
from storage_schemas.parts import Part, find_damage
from storage_schemas.text import ClassEmbeddings, put_classes, read_classes
from storage_schemas.views import decode_views, encode_views

NAMED = 5  # of many names, those that an error lists

Model = TypeVar("Model", bound=BaseModel)


class FeatureStore:
    """A store at a URL (a folder, s3://, gs:// or memory://). Nothing in it changes once it is committed."""

    def __init__(self, objects: Objects, manifest: StoreManifest) -> None:
        self.objects = objects
        self.manifest = manifest
        self._specs: dict[str, TeacherSpec] = {}

    @classmethod
    def create(cls, url: str, manifest: StoreManifest) -> FeatureStore:
        """Open the store, making it if there is none; UserError if there is one with another manifest."""
        objects = open_objects(url, create=True, field="store.url")
        objects.put_if_absent("manifest.json", canonical_json(manifest.model_dump(mode="json")))
        store = cls.open(url)
        store.require(manifest)
        return store

    @classmethod
    def open(cls, url: str) -> FeatureStore:
        """Open a store that exists; UserError if there is none or if its schema is of another version."""
        objects = open_objects(url, field="store.url")
        try:
            data = objects.get("manifest.json")
        except FileNotFoundError as error:
            raise UserError(
                f"store: {url!r} holds no manifest.json; record into it with `rebroadcast extract`"
            ) from error
        return cls(objects, _parse_manifest(data, url))

    @classmethod
    def exists(cls, url: str) -> bool:
        """Whether there is a store; makes the folder of a local one."""
        return open_objects(url, create=True, field="store.url").size("manifest.json") is not None

    def require(self, manifest: StoreManifest, specs: Sequence[TeacherSpec] = ()) -> None:
        """UserError, naming the fields, if the store or one of these teachers in it is another."""
        require_same(f"store {self.url!r}", self.manifest, manifest)
        for spec in specs:
            if self.objects.size(self._spec_path(spec.name)) is not None:
                self._require_spec(spec)

    @property
    def url(self) -> str:
        """Where the store is."""
        return self.objects.url

    def teachers(self) -> list[str]:
        """Names of the recorded teachers, sorted."""
        folders = self.objects.names("teachers")[0]
        return [name for name in folders if self.objects.size(self._spec_path(name)) is not None]

    def shards(self, teacher: str) -> list[str]:
        """Names of the source shards committed for a teacher, sorted."""
        names = self.objects.names(f"teachers/{self._known(teacher)}/commits")[1]
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def spec(self, teacher: str) -> TeacherSpec:
        """What is known of a teacher; UserError naming those there are if it is not one of them."""
        if teacher not in self._specs:
            try:
                data = self.objects.get(self._spec_path(teacher))
            except FileNotFoundError as error:
                there = ", ".join(self.teachers()) or "none"
                raise UserError(
                    f"teacher: {teacher!r} is not in store {self.url!r}; there: {there}"
                ) from error
            spec = _parse(TeacherSpec, data, f"{self.url}/{self._spec_path(teacher)}")
            if spec.name != teacher:
                raise DataDamage(f"{self.url}/{self._spec_path(teacher)}: is of teacher {spec.name!r}")
            self._specs[teacher] = spec
        return self._specs[teacher]

    def add_teacher(self, spec: TeacherSpec) -> None:
        """Register a teacher; UserError, naming the fields, if its name stands for another fingerprint."""
        data = canonical_json(spec.model_dump(mode="json"))
        self.objects.put_if_absent(self._spec_path(spec.name), data)
        self._require_spec(spec)

    def _require_spec(self, spec: TeacherSpec) -> None:
        what = f"teacher {spec.name!r} in store {self.url!r}"
        require_same(what, self.spec(spec.name), spec, ignore=frozenset({"weights"}))

    def has_commit(self, teacher: str, shard: str) -> bool:
        """Whether a shard is committed for a teacher; one request, and no listing."""
        return self.objects.size(self._commit_path(teacher, shard)) is not None

    def commit(self, teacher: str, shard: str) -> Commit:
        """The record that makes a part count; UserError if the shard is not committed for the teacher."""
        try:
            commit = read_commit(self.objects, self._commit_path(self._known(teacher), shard))
        except FileNotFoundError as error:
            there = self.shards(teacher)
            more = f" and {len(there) - NAMED:,} more" if len(there) > NAMED else ""
            raise UserError(
                f"shard: {shard!r} is not recorded for teacher {teacher!r} in {self.url!r}; there: "
                f"{', '.join(there[:NAMED]) or 'none'}{more}"
            ) from error
        if (commit.teacher, commit.shard) != (teacher, shard):
            raise DataDamage(
                f"commit of shard {shard!r}, teacher {teacher!r} names {commit.shard!r}, {commit.teacher!r}"
            )
        if commit.fingerprint != self.spec(teacher).fingerprint:
            raise DataDamage(
                f"shard {shard!r}, teacher {teacher!r}: commit has fingerprint {commit.fingerprint}"
            )
        return commit

    def commits(self, teacher: str) -> tuple[list[Commit], dict[str, str]]:
        """Every commit of a teacher, by shard; and for each shard whose commit does not hold, why."""
        held, damage = [], {}
        for shard in self.shards(teacher):
            try:
                held.append(self.commit(teacher, shard))
            except DataDamage as error:
                damage[shard] = str(error)
        return held, damage

    def write_commit(self, commit: Commit) -> bool:
        """Make an attempt count. False if another attempt already does; then this one is garbage."""
        return write_commit(self.objects, self._commit_path(commit.teacher, commit.shard), commit)

    def part_path(self, teacher: str, shard: str, attempt: str) -> str:
        """Where an attempt's Zarr group is, below the store."""
        return f"teachers/{teacher}/parts/{shard}.{attempt}"

    def part(self, teacher: str, shard: str) -> Part:
        """The committed part of a shard."""
        commit = self.commit(teacher, shard)
        path = self.part_path(teacher, shard, commit.attempt)
        return Part(self.objects, path, self.spec(teacher), commit)

    def views(self, shard: str) -> pa.Table:
        """The view table of a shard, VIEW_SCHEMA; UserError if there is none."""
        return self._read_views(shard)[0]

    def committed_views(self, commit: Commit) -> pa.Table:
        """The view table that a commit names, DataDamage unless it is that one to the bit."""
        table, digest = self._read_views(commit.shard)
        where = f"shard {commit.shard!r}, teacher {commit.teacher!r}:"
        if digest != commit.views_sha256:
            raise DataDamage(f"{where} view table has sha256 {digest}, committed {commit.views_sha256}")
        if len(table) != commit.rows:
            raise DataDamage(f"{where} view table has {len(table)} rows, committed {commit.rows}")
        return table

    def _read_views(self, shard: str) -> tuple[pa.Table, str]:
        try:
            data = self.objects.get(f"views/{shard}.parquet")
        except FileNotFoundError as error:
            raise UserError(f"shard: {shard!r} has no view table in {self.url!r}") from error
        return decode_views(data, shard), sha256(data).hexdigest()

    def put_views(self, shard: str, table: pa.Table) -> str:
        """Store a view table, or check that the stored one is equal; its SHA-256. UserError names a row that
        differs.
        """
        self.objects.put_if_absent(f"views/{shard}.parquet", encode_views(table))
        stored, digest = self._read_views(shard)
        if not stored.equals(table):
            raise UserError(
                f"shard: {shard!r} {_first_difference(stored, table)}; the store knows it from another tar: "
                f"restore that, or give this one another name"
            )
        return digest

    def require_tar(self, shard: str, sha256: str) -> None:
        """UserError, naming both digests, if a teacher's commit of the shard is of another tar."""
        for teacher in self.teachers():
            known = self.commit(teacher, shard).source if self.has_commit(teacher, shard) else None
            if known and known.sha256 != sha256:
                raise UserError(
                    f"shard: {shard!r} has sha256 {sha256}, but {known.sha256} where it is recorded for "
                    f"teacher {teacher!r}; restore that tar, or give this one another name"
                )

    def moments(self, teacher: str, shards: Sequence[str] | None = None) -> dict[str, Moments]:
        """Moments of `summary` and of `spatial` (a sample of tokens) over a teacher's committed parts.

        shards: only these, if given. UserError if there is none.
        """
        chosen = self.shards(teacher) if shards is None else shards
        if not chosen:
            raise UserError(f"teacher: {teacher!r} has no recorded shard in {self.url!r}")
        total: dict[str, Moments] = {}
        for shard in chosen:  # one at a time: their covariances are large
            for name, found in self.part(teacher, shard).moments().items():
                total[name] = Moments.merge((total[name], found)) if name in total else found
        return total

    def verify(self, teacher: str, shard: str) -> list[str]:
        """Every digest and row count of one commit; one line for each thing that does not hold."""
        try:
            commit = self.commit(teacher, shard)
            self.committed_views(commit)
            self.require_tar(shard, commit.source.sha256)
            return find_damage(self.part(teacher, shard))
        except (DataDamage, UserError) as error:
            return [str(error)]

    def garbage(self, older_than: float = 0) -> list[str]:
        """What no commit names, and nobody has written to for `older_than` seconds: folders of attempts, and
        local files that a put left when its process was killed.

        An attempt at a shard whose commit does not hold may be the one that counted, and is none.
        """
        found = [path for folder in ("", "views", "teachers") for path in self.objects.staged(folder)]
        for teacher in self.teachers():
            home = f"teachers/{teacher}"
            for folder in (home, f"{home}/commits", f"{home}/text"):
                found += self.objects.staged(folder)
            commits, damage = self.commits(teacher)
            counting = {f"{commit.shard}.{commit.attempt}" for commit in commits}
            for attempt in self.objects.names(f"{home}/parts")[0]:
                if attempt not in counting and attempt.rpartition(".")[0] not in damage:
                    found.append(f"{home}/parts/{attempt}")
        return [path for path in found if time.time() - self.objects.modified(path) >= older_than]

    def texts(self, teacher: str) -> list[str]:
        """Names of the lists of classes that are embedded beside a teacher, sorted."""
        names = self.objects.names(f"teachers/{self._known(teacher)}/text")[1]
        return [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]

    def text(self, teacher: str, classes: str) -> ClassEmbeddings:
        """Class embeddings by the name of their list; UserError naming those there are if it is not one."""
        try:
            return read_classes(self.objects, self._text_path(teacher, classes))
        except FileNotFoundError as error:
            there = ", ".join(self.texts(teacher)) or "none; record them with `rebroadcast text`"
            raise UserError(
                f"classes: {classes!r} is not embedded for {teacher!r}; there: {there}"
            ) from error

    def put_text(self, teacher: str, classes: str, embeddings: ClassEmbeddings) -> ClassEmbeddings:
        """Store class embeddings, or check that the stored ones were made so; those that there are now."""
        if not re.fullmatch(TEACHER_NAME, classes):
            raise UserError(f"--name: {classes!r} may hold only letters, digits, '_' and '-'")
        return put_classes(self.objects, self._text_path(self._known(teacher), classes), embeddings)

    def _text_path(self, teacher: str, classes: str) -> str:
        return f"teachers/{teacher}/text/{classes}.parquet"

    def _spec_path(self, teacher: str) -> str:
        return f"teachers/{teacher}/spec.json"

    def _known(self, teacher: str) -> str:
        return self.spec(teacher).name

    def _commit_path(self, teacher: str, shard: str) -> str:
        return f"teachers/{teacher}/commits/{shard}.json"


class _Versioned(BaseModel):
    schema_version: int


def _parse_manifest(data: bytes, url: str) -> StoreManifest:
    version = _parse(_Versioned, data, f"{url}/manifest.json").schema_version
    if version != SCHEMA_VERSION:  # then its fields may be others, too
        raise UserError(
            f"store: {url!r} has schema version {version}, this program reads {SCHEMA_VERSION}; "
            f"use the release that wrote it, or record anew"
        )
    return _parse(StoreManifest, data, f"{url}/manifest.json")


def _parse(model: type[Model], data: bytes, where: str) -> Model:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataDamage(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _first_difference(stored: pa.Table, given: pa.Table) -> str:
    if len(stored) != len(given):
        return f"has {len(stored)} views in the store and {len(given)} in the tar"
    for row, (old, new) in enumerate(zip(stored.to_pylist(), given.to_pylist(), strict=True)):
        for name in old:
            if old[name] != new.get(name):
                return f"differs at row {row}, {name}: stored {old[name]!r}, now {new.get(name)!r}"
    return f"has other columns: stored {stored.schema.names}, now {given.schema.names}"
