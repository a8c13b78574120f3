"""Teachers and stores small enough to be made in milliseconds, for the tests of recording."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.config import ExtractConfig
from pipeline.writer import PartWriter
from storage_schemas.commits import Commit, SourceTar
from storage_schemas.features import TeacherOutput
from storage_schemas.manifest import PatchGrid, StoreManifest, TeacherSpec
from storage_schemas.store import FeatureStore
from storage_schemas.views import VIEW_SCHEMA

SIDE, GRID = 24, (3, 2)


def make_spec(name: str = "fake", codec: str = "fp16", **changes: Any) -> TeacherSpec:
    """Of a teacher that sees 24x24 pixels and gives a 3x2 grid of 6 channels and a summary of 4."""
    facts: dict[str, Any] = {
        "name": name,
        "family": "fake",
        "model": "sums",
        "weights": "random:seed=0",
        "weights_sha256": "0" * 64,
        "height": SIDE,
        "width": SIDE,
        "patch_size": 8,
        "grid": PatchGrid(height=GRID[0], width=GRID[1]),
        "summary_dim": 4,
        "spatial_dim": 6,
        "summary": "mean",
        "pixel_mean": (0.5, 0.5, 0.5),
        "pixel_std": (0.5, 0.5, 0.5),
        "codec": codec,
    }
    return TeacherSpec(**{**facts, **changes})


class FakeTeacher:
    """Means of pixels under fixed weights: a view's features do not depend on its batch."""

    def __init__(self, spec: TeacherSpec) -> None:
        self.spec = spec
        generator = torch.Generator().manual_seed(len(spec.name))
        self._spatial = torch.randn(3, spec.spatial_dim, generator=generator)
        self._summary = torch.randn(3, spec.summary_dim, generator=generator)

    def __call__(self, images: torch.Tensor) -> TeacherOutput:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, self.spec.height, self.spec.width)
        grid = (self.spec.grid.height, self.spec.grid.width)
        cells = torch.nn.functional.adaptive_avg_pool2d(images.float(), grid)  # b 3 h w
        spatial = (cells[..., None] * self._spatial[:, None, None]).sum(1)  # b h w d
        summary = (images.float().mean((2, 3))[..., None] * self._summary).sum(1)  # b d
        return TeacherOutput(summary, spatial)


def create_fake_teacher(model: str, weights: str, settings: dict[str, Any]) -> FakeTeacher:
    """A family for `pipeline.teachers.FAMILIES`."""
    given = {key: value for key, value in settings.items() if key != "device"}
    return FakeTeacher(make_spec(**given, model=model, weights=weights))


def random_output(spec: TeacherSpec, rows: int, seed: int = 0) -> TeacherOutput:
    """Features of `rows` views."""
    generator = torch.Generator().manual_seed(seed)
    summary = torch.randn(rows, spec.summary_dim, generator=generator)
    grid = (spec.grid.height, spec.grid.width, spec.spatial_dim)
    return TeacherOutput(summary, torch.randn(rows, *grid, generator=generator))


def write_part(
    store: FeatureStore, spec: TeacherSpec, output: TeacherOutput, shard: str = "a", batch: int = 5
) -> Commit:
    """Commit features as shard `shard`, with a view table of as many views."""
    rows = len(output.summary)
    store.add_teacher(spec)
    digest = store.put_views(shard, view_table(rows))
    writer = PartWriter(store, spec, shard, rows)
    for start in range(0, rows, batch):
        end = start + batch
        writer.append(TeacherOutput(output.summary[start:end], output.spatial[start:end]))
    commit = writer.commit(SourceTar(url=f"{shard}.tar", size=1, sha256="0" * 64), digest)
    writer.close()
    assert commit is not None
    return commit


def view_table(rows: int, **columns: Any) -> Any:
    """A view table of readable images, one view each."""
    import pyarrow as pa

    base = {"member": "m.jpg", "offset": 512, "nbytes": 7, "digest": bytes(16), "view": 0, "status": "ok"}
    return pa.Table.from_pylist(
        [{**base, "key": str(row), **columns} for row in range(rows)], schema=VIEW_SCHEMA
    )


def make_store(url: Path | str, **manifest: Any) -> FeatureStore:
    """A store at `url`."""
    return FeatureStore.create(str(url), StoreManifest(**manifest))


def make_jpeg(seed: int, height: int = 40, width: int = 52) -> bytes:
    """A smooth random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    sink = io.BytesIO()
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def make_shard(path: Path, images: Sequence[bytes] | int, caption: str | None = None, first: int = 0) -> Path:
    """A tar of images, or of so many random ones."""
    if isinstance(images, int):
        images = [make_jpeg(first + 100 * sum(path.stem.encode()) + seed) for seed in range(images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, data in enumerate(images):
            members = {f"{number:04}.jpg": data}
            if caption is not None:
                members[f"{number:04}.txt"] = caption.encode()
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def make_config(
    folder: Path, teachers: Mapping[str, Mapping[str, Any]] | None = None, **sections: Mapping[str, Any]
) -> ExtractConfig:
    """Recording `folder`/shards/*.tar into `folder`/store with fake teachers, unless said otherwise."""
    if teachers is None:
        teachers = {"one": {}, "two": {"codec": "int8"}}
    fake = {"family": "fake", "model": "sums", "weights": "none"}
    recipe = {
        "store": {"url": str(folder / "store"), "views_per_image": 2, **sections.get("store", {})},
        "data": {"train": str(folder / "shards" / "*.tar"), **sections.get("data", {})},
        "teachers": {name: {**fake, **entry} for name, entry in teachers.items()},
        "extract": {"batch_size": 4, "executor": "inline", **sections.get("extract", {})},
    }
    return ExtractConfig.from_recipe(recipe)


def committed_objects(store: FeatureStore) -> dict[str, str]:
    """Digests of everything that must be the same in every store recorded from the same shards: view tables,
    manifest, specs, and each committed part's objects without the attempt's id; commits without it too.
    """
    found = {}
    for path, _ in store.objects.walk():
        if "/parts/" not in path and "/commits/" not in path:
            found[path] = sha256(store.objects.get(path)).hexdigest()
    for teacher in store.teachers():
        for shard in store.shards(teacher):
            commit = store.commit(teacher, shard)
            folder = store.part_path(teacher, shard, commit.attempt)
            for path, _ in store.objects.walk(folder):
                name = f"{teacher}/{shard}{path.removeprefix(folder)}"
                found[name] = sha256(store.objects.get(path)).hexdigest()
            source = commit.source.model_copy(update={"url": ""})
            plain = commit.model_copy(update={"attempt": "", "source": source})
            found[f"{teacher}/{shard}"] = plain.model_dump_json()
    return found


def problems(store: FeatureStore) -> list[str]:
    """Everything that `verify` finds."""
    return [
        line
        for teacher in store.teachers()
        for shard in store.shards(teacher)
        for line in store.verify(teacher, shard)
    ]


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


Count = Callable[[int], None]
