"""That the documentation says what is: its code runs, its tables hold, its links and commands exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
import yaml
from pydantic import BaseModel

import cli
from pipeline.config import ExtractConfig, RecordingConfig, TeacherConfig
from pipeline.teachers.timm import TimmSettings
from pipeline.writer import PartWriter
from storage_schemas.commits import Commit, SourceTar
from storage_schemas.crops import CropPolicy
from storage_schemas.features import TeacherOutput
from storage_schemas.layout import SHARD_BYTES
from storage_schemas.manifest import PatchGrid, StoreManifest, TeacherSpec
from storage_schemas.recipe import DataConfig, StoreConfig, read_recipe
from storage_schemas.store import FeatureStore
from storage_schemas.views import VIEW_SCHEMA, ViewStatus
from trainer.config import EvaluationConfig, LossConfig, StudentConfig, TrainConfig, TrainingConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
STORE_FORMAT = (ROOT / "docs" / "store-format.md").read_text()
RECIPE_KEYS = (ROOT / "docs" / "recipes.md").read_text()

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def fenced(text: str, language: str) -> list[str]:
    """Blocks of code in a language, without the indentation of a list they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next heading."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"there is no heading {heading!r}"
    return found[1]


def table(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its header; code without backticks."""
    found = re.search(r"^\|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", section(text, heading), re.MULTILINE)
    assert found is not None, f"there is no table below {heading!r}"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    return [[re.sub(r"^`([^`]*)`$", r"\1", cell) for cell in row] for row in rows]


# A store, read as the page says.


@dataclass(frozen=True)
class Recorded:
    summary: torch.Tensor
    spatial: torch.Tensor
    views: list[dict[str, Any]]


def record(url: Path, codec: str) -> Recorded:
    """Six rows of a teacher `lite0` for a shard `train-00000`; row 4 has no features."""
    spec = TeacherSpec(
        name="lite0",
        family="timm",
        model="none",
        weights="random:seed=0",
        weights_sha256="0" * 64,
        height=8,
        width=12,
        patch_size=4,
        grid=PatchGrid(height=2, width=3),
        summary_dim=5,
        spatial_dim=7,
        summary="mean",
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
        codec=codec,
    )
    store = FeatureStore.create(str(url), StoreManifest(views_per_image=2))
    store.add_teacher(spec)
    summary, spatial = torch.randn(6, 5), torch.randn(6, 2, 3, 7)
    summary[4] = torch.nan
    image = {"member": "a.jpg", "offset": 512, "nbytes": 9, "digest": bytes(16), "height": 40, "width": 50}
    crop = {"top": 1, "left": 2, "crop_height": 30, "crop_width": 20, "hflip": True}
    views = [
        {**image, **crop, "key": f"image-{row // 2}", "view": row % 2, "status": "ok"} for row in range(6)
    ]
    writer = PartWriter(store, spec, "train-00000", 6)
    writer.append(TeacherOutput(summary, spatial))
    digest = store.put_views("train-00000", pa.Table.from_pylist(views, schema=VIEW_SCHEMA))
    assert writer.commit(SourceTar(url="train-00000.tar", size=1, sha256="0" * 64), digest) is not None
    writer.close()
    return Recorded(summary, spatial, views)


def run_reader(folder: Path, row: int) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    """Run the page's code in a process of its own that refuses this project's packages."""
    [code] = fenced(STORE_FORMAT, "python")
    code = code.replace(', "train-00000", 0\n', f', "train-00000", {row}\n')
    assert f'"train-00000", {row}\n' in code
    before = (
        "import sys\n"
        "for name in ('storage_schemas', 'pipeline', 'trainer', 'cli'): sys.modules[name] = None\n"
    )
    after = (
        "import numpy\n"
        "scale = part['spatial_scale'][row] if 'spatial_scale' in part else 1.0\n"
        "numpy.savez('read.npz', summary=summary, spatial=spatial, valid=valid, scale=scale)\n"
        "views['digest'] = views['digest'].hex()\n"
        "print(json.dumps(views))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", before + code + after],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    with np.load(folder / "read.npz") as arrays:
        return json.loads(done.stdout), dict(arrays)


def test_a_store_is_readable_in_ten_lines_without_this_project(tmp_path: Path) -> None:
    [code] = fenced(STORE_FORMAT, "python")
    assert len(code.strip().splitlines()) <= 10
    assert set(re.findall(r"^import (.*)$", code, re.MULTILINE)) == {
        "json, pathlib",
        "pyarrow.parquet as pq",
        "zarr",
    }
    recorded = record(tmp_path / "runs/demo/store", "fp16")
    views, read = run_reader(tmp_path, row=3)
    assert views["key"] == "image-1"
    assert {name: views[name] for name in ("view", "top", "hflip")} == {"view": 1, "top": 1, "hflip": True}
    np.testing.assert_array_equal(read["summary"], recorded.summary[3].half().numpy())
    np.testing.assert_array_equal(read["spatial"], recorded.spatial[3].half().numpy())
    assert bool(read["valid"])


def test_the_reader_sees_a_row_without_features(tmp_path: Path) -> None:
    record(tmp_path / "runs/demo/store", "fp16")
    _, read = run_reader(tmp_path, row=4)
    assert not bool(read["valid"])
    assert np.isnan(read["summary"]).all()
    assert np.isnan(read["spatial"]).all()


def test_int8_is_restored_as_the_page_says(tmp_path: Path) -> None:
    assert 'spatial.astype("f4") * part["spatial_scale"][row][..., None]' in STORE_FORMAT
    recorded = record(tmp_path / "runs/demo/store", "int8")
    _, read = run_reader(tmp_path, row=3)
    restored = read["spatial"].astype("f4") * read["scale"][..., None]
    largest = recorded.spatial[3].abs().amax(-1, keepdim=True).numpy()
    assert (np.abs(restored - recorded.spatial[3].numpy()) <= 0.6 * largest / 127).all()


# The tables of the store's format.


@pytest.mark.parametrize(
    ("heading", "model"), [("manifest.json", StoreManifest), ("spec.json", TeacherSpec), ("Commit", Commit)]
)
def test_the_page_names_every_field_of_a_record(heading: str, model: type[BaseModel]) -> None:
    assert [row[0] for row in table(STORE_FORMAT, heading)] == list(model.model_fields)


def test_the_page_names_every_column_of_a_view_table() -> None:
    said = [(name, kind, null == "no") for name, kind, null, _ in table(STORE_FORMAT, "View table")]
    names = {"fixed_size_binary[16]": "binary(16)"}
    fields = [(field.name, str(field.type), not field.nullable) for field in VIEW_SCHEMA]
    assert said == [(name, names.get(kind, kind), required) for name, kind, required in fields]
    [row] = [row for row in table(STORE_FORMAT, "View table") if row[0] == "status"]
    assert set(re.findall(r"`(\w+)`", row[3])) == {str(status) for status in ViewStatus}


def test_the_pages_arrays_are_those_of_a_part(tmp_path: Path) -> None:
    record(tmp_path, "int8")
    found = {
        path.parent.relative_to(part).as_posix()
        for part in (tmp_path / "teachers/lite0/parts").iterdir()
        for path in part.rglob("zarr.json")
        if json.loads(path.read_text())["node_type"] == "array"
    }
    assert {row[0] for row in table(STORE_FORMAT, "Part")} == found


def test_a_row_stands_where_the_page_says(tmp_path: Path) -> None:
    recorded = record(tmp_path, "fp16")
    row_bytes = 2 * 3 * 7 * 2
    stride = row_bytes + 4
    [data] = [path.read_bytes() for path in tmp_path.glob("teachers/lite0/parts/*/spatial/c/0/0/0/0")]
    assert len(data) == 6 * stride + 6 * 16 + 4
    values = np.frombuffer(data[3 * stride : 3 * stride + row_bytes], "<f2").reshape(2, 3, 7)
    np.testing.assert_array_equal(values, recorded.spatial[3].half().numpy())
    assert f"{SHARD_BYTES} // stride" in STORE_FORMAT
    index = np.frombuffer(data[6 * stride : -4], "<u8").reshape(6, 2)
    assert index.tolist() == [[row * stride, stride] for row in range(6)]


def test_the_pages_crops_are_those_that_are_drawn() -> None:
    keys = table(STORE_FORMAT, "Crops")
    assert [row[0] for row in keys] == list(CropPolicy.model_fields)
    assert {row[0]: yaml.safe_load(row[1]) for row in keys} == CropPolicy().model_dump(mode="json")
    for line in section(STORE_FORMAT, "An example").strip().splitlines()[-2:]:
        view, *said = [json.loads(cell) for cell in line.strip("|").split("|")]
        box = CropPolicy().draw(0, bytes(range(16)), view, 480, 640)
        assert said == [box.top, box.left, box.height, box.width, box.hflip]


# The keys of a recipe.


def stated_defaults(heading: str) -> dict[str, str]:
    return {row[0]: row[2] for row in table(RECIPE_KEYS, heading) if row[0] != "any other"}


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("`store`", StoreConfig),
        ("`store.crops`", CropPolicy),
        ("`data`", DataConfig),
        ("`extract`", RecordingConfig),
        ("`student`", StudentConfig),
        ("`training`", TrainingConfig),
        ("`training.loss`", LossConfig),
        ("`evaluation`", EvaluationConfig),
    ],
)
def test_the_page_has_every_key_and_its_default(heading: str, model: type[BaseModel]) -> None:
    stated = stated_defaults(heading)
    assert set(stated) == set(model.model_fields)
    required = {name for name, default in stated.items() if default == "required"}
    assert required == {name for name, field in model.model_fields.items() if field.is_required()}
    optional = {name: text for name, text in stated.items() if text not in ("required", "none")}
    given = {name: yaml.safe_load(text) for name, text in optional.items()}
    placeholders = {name: {"steps": 1}.get(name, "x") for name in required}
    assert model.model_validate(placeholders | given) == model.model_validate(placeholders)


def test_the_page_has_every_key_of_a_teacher() -> None:
    known = set(TeacherConfig.model_fields) | set(TimmSettings.model_fields) - {"name"}  # the entry's own key
    assert set(stated_defaults("`teachers.NAME`")) == known


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_holds_what_both_halves_can_read(path: Path) -> None:
    recipe = read_recipe(path)
    ExtractConfig.from_recipe(recipe)
    TrainConfig.from_recipe(recipe)
    assert f"recipes/{path.name}" in RECIPE_KEYS


def test_the_readmes_recipe_can_be_read(tmp_path: Path) -> None:
    [text] = fenced((ROOT / "README.md").read_text(), "yaml")
    (tmp_path / "my.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "my.yaml")
    ExtractConfig.from_recipe(recipe)
    TrainConfig.from_recipe(recipe)


# What the pages point at.


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@page
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, link


@page
def test_footnotes_are_defined_and_used(path: Path) -> None:
    text = path.read_text()
    defined = re.findall(r"^\[\^([\w-]+)\]:", text, re.MULTILINE)
    used = set(re.findall(r"\[\^([\w-]+)\](?!:)", text))
    assert len(defined) == len(set(defined))
    assert set(defined) == used


@page
def test_named_files_exist(path: Path) -> None:
    """Recipes, and whatever else of the repository is named by its path in backticks."""
    text = path.read_text()
    named = set(re.findall(r"\brecipes/\w+\.yaml", text))
    named |= set(
        re.findall(r"`((?:storage_schemas|pipeline|trainer|tests|docker|benchmarks)/[\w./]*)`", text)
    )
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def commands(text: str) -> Iterator[list[str]]:
    """The words after the program in every call of the command line, in code blocks and in backticks."""
    code = [line for block in fenced(text, "sh") for line in block.splitlines()]
    code += re.findall(r"`([^`\n]+)`", text)
    for line in code:
        found = re.match(r"(?:.*-m cli|(?:\.venv/bin/)?rebroadcast)(?: (.*))?$", line.split(" #")[0].rstrip())
        if found and found[1]:
            yield shlex.split(found[1])


@page
def test_commands_and_options_exist(path: Path) -> None:
    for words in commands(path.read_text()):
        command: Any = typer.main.get_command(cli.app)
        rest = list(words)
        while rest and hasattr(command, "commands"):
            assert rest[0] in command.commands, f"rebroadcast {shlex.join(words)}: no command {rest[0]!r}"
            command = command.commands[rest.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in options]
        assert unknown == [], f"rebroadcast {shlex.join(words)}"


def test_the_readme_shows_every_command() -> None:
    shown = {words[0] for path in PAGES for words in commands(path.read_text())}
    group: Any = typer.main.get_command(cli.app)
    assert shown == set(group.commands)
