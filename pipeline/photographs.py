"""Real photographs without a download: those that scikit-image and scikit-learn carry in their wheels.

Drawings, diagrams, logos, scanned pages and microscope slides are left out; of the stereo pair, one is kept.
They are too few to learn from whole, so each is cut into tiles that share no pixel, and a tile is a sample.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile

from PIL import Image

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
# An animal, a texture, a building and a machine: no photograph that is trained on shows it.
HELD_OUT = ("chelsea", "china", "gravel", "rocket")
TILE = 200  # pixels a side, about
EVERY = 4  # of the tiles of the other photographs, one in so many is held out


def write_photograph_shards(folder: Path) -> list[Path]:
    """Three webdataset tars in `folder`: tiles to train on, held-out tiles of the same photographs, and the
    tiles of photographs that are held out whole.

    A sample is a tile as PNG, its name as caption, and where it comes from. Shards that are already there
    with these bytes are left alone. UserError says what to install where a package is missing.
    """
    shards: dict[str, list[tuple[str, bytes]]] = {
        "train-00000.tar": [],
        "held-out-tiles-00000.tar": [],
        "held-out-whole-00000.tar": [],
    }
    train, tiles, whole = shards.values()
    for package, path in sorted(_find_photographs(), key=lambda found: found[1].stem):
        for number, members in enumerate(_cut_tiles(package, path)):
            if path.stem in HELD_OUT:
                whole += members
            elif number % EVERY == EVERY // 2:
                tiles += members
            else:
                train += members
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in shards.items():
        _replace(folder / name, _tar(members))
    return [folder / name for name in shards]


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


def _cut_tiles(package: str, path: Path) -> Iterator[list[tuple[str, bytes]]]:
    """The members of each tile's sample, row by row."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    rows, columns = (min(3, max(2, round(side / TILE))) for side in (image.height, image.width))
    for row in range(rows):
        for column in range(columns):
            top, left = row * image.height // rows, column * image.width // columns
            bottom, right = (row + 1) * image.height // rows, (column + 1) * image.width // columns
            sink = io.BytesIO()
            image.crop((left, top, right, bottom)).save(sink, "PNG")
            key = f"{path.stem}-{row}-{column}"
            source = {"package": package, "file": path.name, "top": top, "left": left}
            caption = f"{path.stem.replace('_', ' ')} {row + 1}.{column + 1}"
            yield [
                (f"{key}.png", sink.getvalue()),
                (f"{key}.txt", caption.encode()),
                (f"{key}.json", json.dumps(source, sort_keys=True).encode()),
            ]


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
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
