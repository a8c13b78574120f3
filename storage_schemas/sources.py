"""Source shards: tars that a recipe names with globs and braces, by the names that a store has for them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence

import braceexpand

from storage_schemas.errors import UserError
from storage_schemas.objects import open_objects, split_url


def shard_name(url: str) -> str:
    """The name of a source shard: its tar's, without `.tar`."""
    return split_url(url)[1].removesuffix(".tar")


def expand_shards(patterns: Sequence[str], field: str = "data") -> dict[str, str]:
    """Source shards by name, sorted, from URLs with globs in the last part (`*`, `?`, `[]`) and braces
    (`{00..99}`).
    """
    found: dict[str, str] = {}
    listings: dict[str, list[str]] = {}
    for url in (url for pattern in patterns for url in _expand(pattern, field, listings)):
        name = shard_name(url)
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise UserError(
                f"{field}: shard name {name!r} may hold only letters, digits, '.', '_' and '-': rename it"
            )
        if found.setdefault(name, url) != url:
            raise UserError(f"{field}: {found[name]!r} and {url!r} have the same name {name!r}: rename one")
    return dict(sorted(found.items()))


def _expand(pattern: str, field: str, listings: dict[str, list[str]]) -> Iterator[str]:
    for url in _expand_braces(pattern, field):
        folder, name = split_url(url)
        if not name.endswith(".tar"):
            raise UserError(f"{field}: {url!r} does not name a .tar file")
        there = listings.get(folder) or open_objects(folder, field=field).names()[1]
        listings[folder] = there
        names = fnmatch.filter(there, name) if set(name) & set("*?[") else [name] if name in there else []
        if not names:
            raise UserError(f"{field}: {url!r} matches no tar")
        yield from (f"{folder.rstrip('/')}/{name}" for name in names)


def _expand_braces(pattern: str, field: str) -> Iterator[str]:
    try:
        yield from braceexpand.braceexpand(pattern)
    except ValueError as error:
        raise UserError(f"{field}: {pattern!r} has unbalanced braces") from error
