"""Real photographs without a download: those that scikit-image and scikit-learn carry in their wheels.

Drawings, diagrams, logos, scanned pages and microscope slides are left out; of the stereo pair, one is kept.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from tempfile import NamedTemporaryFile

from storage_schemas.errors import UserError

# Package, folder in it, and the photographs there.
_SOURCES = (
    (
        "skimage",
        "data",
        (
            "astronaut.png",
            "brick.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "coins.png",
            "grass.png",
            "gravel.png",
            "hubble_deep_field.jpg",
            "moon.png",
            "motorcycle_left.png",
            "retina.jpg",
            "rocket.jpg",
        ),
    ),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
)
# An animal, a texture, a building and a machine: no photograph of the other shard shows it.
HELD_OUT = ("chelsea", "china", "gravel", "rocket")


def write_photograph_shards(folder: Path) -> list[Path]:
    """Two webdataset tars in `folder`, train-00000.tar and held-out-00000.tar, the same bytes anywhere.

    A sample is the original file, its name as caption, and where it comes from. Shards that are already there
    with these bytes are left alone. UserError says what to install where a package is missing.
    """
    photographs = {path.stem: (package, path) for package, path in _find_photographs()}
    names = sorted(photographs)
    shards = {
        "train-00000.tar": [name for name in names if name not in HELD_OUT],
        "held-out-00000.tar": [name for name in names if name in HELD_OUT],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for shard, members in shards.items():
        _replace(folder / shard, _tar([photographs[name] for name in members]))
    return [folder / shard for shard in shards]


def _find_photographs() -> list[tuple[str, Path]]:
    found = []
    for package, inside, names in _SOURCES:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"photographs: package {package!r} is missing: pip install scikit-image scikit-learn"
            )
        root = Path(next(iter(spec.submodule_search_locations))) / inside
        found += [(package, root / name) for name in names]
    missing = [path.name for _, path in found if not path.is_file()]
    if missing:
        raise UserError(
            f"photographs: {missing[0]!r} is not in this version of its package: install another one"
        )
    return found


def _tar(photographs: list[tuple[str, Path]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for package, path in photographs:
            caption = path.stem.replace("_", " ")
            source = json.dumps({"package": package, "file": path.name}, sort_keys=True)
            for suffix, content in (
                (path.suffix, path.read_bytes()),
                (".txt", caption.encode()),
                (".json", source.encode()),
            ):
                member = tarfile.TarInfo(path.stem + suffix)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def _replace(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        file.write(content)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)
