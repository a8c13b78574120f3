"""What teachers store and whether their weights are at hand, before anything is recorded or downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.teachers import open_clip, outline_teacher, sam, timm
from pipeline.teachers.weights import find_weights
from storage_schemas.errors import UserError
from storage_schemas.manifest import TeacherSpec

_CACHED = {"open_clip": open_clip.find_cached, "sam": sam.find_cached, "timm": timm.find_cached}


@dataclass(frozen=True)
class Entry:
    """A teacher as a recipe names it."""

    family: str
    model: str
    weights: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Listing:
    """What a teacher would store. `spec` is None where it cannot be made, and `problem` says why.

    at_hand: whether its weights are on this machine.
    """

    name: str
    entry: Entry
    spec: TeacherSpec | None
    at_hand: bool
    problem: str | None = None


def _dinov2(size: str, registers: str = "") -> Entry:
    return Entry("timm", f"vit_{size}_patch14{registers}_dinov2.lvd142m", "hub", {"resolution": 224})


KNOWN: Mapping[str, Entry] = {
    "openclip_h14": Entry("open_clip", "ViT-H-14", "hub:laion2b_s32b_b79k"),
    "metaclip_h14": Entry("open_clip", "ViT-H-14-quickgelu", "hub:metaclip_fullcc"),
    "openai_l14": Entry("open_clip", "ViT-L-14-quickgelu", "hub:openai"),
    "openai_l14_336": Entry("open_clip", "ViT-L-14-336-quickgelu", "hub:openai"),
    "dfn_h14_378": Entry("open_clip", "ViT-H-14-378-quickgelu", "hub:dfn5b"),
    "siglip_so400m": Entry("open_clip", "ViT-SO400M-14-SigLIP-384", "hub:webli"),
    "dinov2_s14": _dinov2("small"),
    "dinov2_b14": _dinov2("base"),
    "dinov2_l14": _dinov2("large"),
    "dinov2_g14": _dinov2("giant"),
    "dinov2_g14_reg": _dinov2("giant", "_reg4"),
    "dinov3_l16": Entry("timm", "vit_large_patch16_dinov3.lvd1689m", "hub", {"resolution": 224}),
    "sam_b": Entry("sam", "vit_b", "hub"),
    "sam_l": Entry("sam", "vit_l", "hub"),
    "sam_h": Entry("sam", "vit_h", "hub"),
    "sam_h_neck": Entry("sam", "vit_h", "hub", {"spatial": "neck"}),
}
"""Teachers of the paper and their kin, by names that a recipe may use."""


def list_teachers(entries: Mapping[str, Entry]) -> list[Listing]:
    """What each would store, with the numbers that recording and `plan` use."""
    return [_list(name, entry) for name, entry in entries.items()]


def _list(name: str, entry: Entry) -> Listing:
    try:
        spec = outline_teacher(entry.family, entry.model, **{**entry.settings, "name": name}).spec
        return Listing(name, entry, spec, weights_at_hand(entry))
    except UserError as error:
        return Listing(name, entry, None, False, str(error))


def weights_at_hand(entry: Entry) -> bool:
    """Whether the weights can be loaded without a network."""
    kind, _, tag = entry.weights.partition(":")
    if kind == "random":
        return True
    if kind == "hub":
        return entry.family in _CACHED and _CACHED[entry.family](entry.model, tag) is not None
    try:
        return find_weights(entry.weights).is_file()
    except UserError:
        return False
