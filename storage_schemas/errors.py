"""The two kinds of failure that both halves name: a user's mistake, and damaged data."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: the field, the value, the remedy."""


class DataDamage(RuntimeError):
    """Bytes on disk are not what was recorded. The message names the shard, the row where there is one, and
    the digest.
    """
