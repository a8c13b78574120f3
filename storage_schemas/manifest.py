"""What a store says of itself and of each teacher: frozen, canonical, and refused when it differs."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from storage_schemas.crops import CropPolicy
from storage_schemas.errors import UserError

SCHEMA_VERSION = 1

# The decoder and the resize that made the pixels. A new name whenever either would give other pixels.
PIXELS = "torchvision-rgb/bicubic-antialias-uint8/1"

TEACHER_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not yes or no")
    return value


Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Positive = Annotated[Integer, Field(gt=0)]
Seed = Annotated[Integer, Field(ge=0, lt=2**63)]


class Frozen(BaseModel):
    """A value: no field changes, and none is unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PatchGrid(Frozen):
    """Rows and columns of a teacher's spatial features."""

    height: Positive
    width: Positive


class TeacherSpec(Frozen):
    """Every fact about a recorded teacher. Nothing else in the project repeats one of them.

    `weights` says where they came from (`package:...`, `file:...`, `hub:...`, `random:seed=...`) and is left
    out of the fingerprint, for a path differs between machines; `weights_sha256` is of the file, or of the
    tensors if random. `patch_size` is the number of input pixels a cell of the grid stands for. `pixel_mean`
    and `pixel_std` are in [0, 1]. `blocks`: of the model only the first so many. `spatial`: before or after a
    neck, of models that have one. What is None takes no part in the fingerprint.
    """

    name: str = Field(pattern=TEACHER_NAME)
    family: str
    model: str
    weights: str
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    height: Positive
    width: Positive
    patch_size: Positive
    grid: PatchGrid
    summary_dim: Positive
    spatial_dim: Positive
    summary: Literal["cls", "projected", "mean", "pooled"]
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    codec: Literal["fp16", "int8"] = "fp16"
    pixels: str = PIXELS
    blocks: Positive | None = None
    spatial: Literal["backbone", "neck"] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of everything that decides the recorded numbers."""
        deciding = self.model_dump(mode="json", exclude={"weights"}, exclude_none=True)
        return sha256(canonical_json(deciding)).hexdigest()

    @property
    def row_bytes(self) -> int:
        """Bytes of one view's features as stored, without checksums and indices."""
        cells = self.grid.height * self.grid.width
        spatial = cells * self.spatial_dim * 2 if self.codec == "fp16" else cells * (self.spatial_dim + 2)
        return self.summary_dim * 2 + spatial


class StoreManifest(Frozen):
    """What every row of the store has in common.

    seed: of the crops. max_pixels: an image whose header promises more is not decoded (height times width).
    """

    schema_version: int = SCHEMA_VERSION
    crops: CropPolicy = CropPolicy()
    views_per_image: Integer = Field(1, ge=1, le=10_000)
    seed: Seed = 0
    max_pixels: Positive = 2**26


def canonical_json(value: object) -> bytes:
    """One spelling for one value: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def require_same(
    what: str, stored: BaseModel, given: BaseModel, ignore: frozenset[str] = frozenset()
) -> None:
    """Refuse, naming each field that differs with both its values."""
    old, new = stored.model_dump(mode="json"), given.model_dump(mode="json")
    differing = [key for key in new if key not in ignore and old.get(key) != new[key]]
    if differing:
        pairs = "; ".join(f"{key}: stored {old.get(key)!r}, given {new[key]!r}" for key in differing)
        raise UserError(
            f"{what} was made with other settings ({pairs}). Use the stored values, or another store."
        )
