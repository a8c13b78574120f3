"""What holds of the project as a whole: the arrows between its packages, what its wheel and images carry."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "storage_schemas", "pipeline", "trainer")
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in it: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(module: str, *, among: tuple[str, ...] = PACKAGES) -> set[str]:
    """Files of the packages that import the module or anything in it."""
    return {
        str(path.relative_to(ROOT))
        for package in among
        for path in modules(package)
        if any(name == module or name.startswith(f"{module}.") for name in imports(path))
    }


@pytest.mark.parametrize("package", PACKAGES[1:])
def test_only_the_contract_is_shared(package: str) -> None:
    others = [other for other in PACKAGES if other not in (package, "storage_schemas")]
    assert {other: importers(other, among=(package,)) for other in others} == {
        other: set() for other in others
    }


def test_ray_is_imported_in_one_place_of_each_half() -> None:
    assert importers("ray") == {"pipeline/executors.py", "trainer/launchers.py"}


def test_torch_distributed_is_imported_in_one_place() -> None:
    assert importers("torch.distributed") <= {"trainer/distributed.py"}


def test_the_contract_knows_no_models() -> None:
    assert importers("timm", among=("storage_schemas",)) == set()


def test_the_wheel_holds_exactly_the_four_names(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*build, "--wheel-dir", str(tmp_path)], cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in files} == set(PACKAGES)
    assert {name for name in files if name.endswith(".py")} == {
        str(path.relative_to(ROOT)) for package in PACKAGES for path in modules(package)
    }


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_yaml_mappings(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_exists_and_is_sent_to_the_builder(path: Path) -> None:
    copies = re.findall(r"^COPY (?!--from)(.+)$", path.read_text(), re.MULTILINE)
    sources = [source for line in copies for source in shlex.split(line)[:-1]]
    assert sources
    sent = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert set(sources) <= sent


def test_compose_starts_a_head_and_a_worker_that_share_a_volume() -> None:
    folder = ROOT / "docker"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    head, worker = compose["services"]["head"], compose["services"]["worker"]
    assert head["volumes"] == worker["volumes"]
    assert {volume.split(":")[0] for volume in head["volumes"]} == set(compose["volumes"])
    for service in (head, worker):
        assert (folder / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
