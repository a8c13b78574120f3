from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from storage_schemas.errors import UserError
from trainer.compare import compare, of_students, of_values
from trainer.config import TrainConfig
from trainer.distillation import load_distillation
from trainer.evaluation.subject import Subject
from trainer.metrics import read_metrics
from trainer.train import train


@pytest.fixture
def recipe(recorded: Any, tmp_path: Path) -> dict[str, Any]:
    """A recipe whose student is small, as its settings say."""
    made: dict[str, Any] = recorded.recipe(tmp_path / "output", steps=3, warmup=0)
    return made


def losses(checkpoint: str) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(checkpoint).parent)]


def test_each_student_learns_as_it_would_alone(recipe: dict[str, Any], tmp_path: Path) -> None:
    names = ["radio_vit_ti16", "timm/test_efficientnet"]
    found = compare("student", of_students(recipe, names), 4)
    assert [result.name for result in found.results] == names
    assert found.failed == {}
    for result in found.results:
        student = recipe["student"] if result.name == "radio_vit_ti16" else {"name": result.name}
        alone = {**recipe, "student": student}
        alone["training"] = recipe["training"] | {"output": str(tmp_path / "alone" / result.name)}
        checkpoint = train(alone)
        assert losses(result.checkpoint) == losses(str(checkpoint))
        subject = Subject(TrainConfig.from_recipe(alone), load_distillation(checkpoint)[0])
        assert result.distance == subject.distance()["student"]
        assert found.constant == subject.distance()["constant"]
        assert {**found.knn_beside, "student": result.knn} == subject.knn()
        assert result.parameters == sum(
            p.numel() for p in load_distillation(checkpoint)[0].student.parameters()
        )
        assert result.throughput.batch_size == 4
        assert result.throughput.height == recipe["training"]["resolution"]


def test_a_finished_run_is_not_trained_again_and_an_unfinished_one_goes_on(recipe: dict[str, Any]) -> None:
    _, variants = of_values(recipe, "training.learning_rate=1e-3,1e-4")
    first = compare("training.learning_rate", variants, 4)
    kept, cut = (Path(result.checkpoint) for result in first.results)
    before = (kept / "student.safetensors").stat().st_mtime_ns
    shutil.rmtree(cut)  # the newest checkpoint, so that it goes on from the one before
    counted: list[tuple[int, str]] = []
    again = compare(
        "training.learning_rate", variants, 4, advance=lambda steps, text: counted.append((steps, text))
    )
    assert (kept / "student.safetensors").stat().st_mtime_ns == before
    assert [(r.name, r.distance, r.knn) for r in again.results] == [
        (r.name, r.distance, r.knn) for r in first.results
    ]
    assert sum(steps for steps, _ in counted) == 6
    assert not [text for _, text in counted if text.startswith("1e-3: loss")]
    assert [text for _, text in counted if text.startswith("1e-4: loss")]


def test_where_the_loss_varies_distances_are_counted_by_one(recipe: dict[str, Any]) -> None:
    _, variants = of_values(recipe, "training.loss.cosine=0.5,0.0")
    found = compare("training.loss.cosine", variants, 4)
    for result, variant in zip(found.results, variants, strict=True):
        model, _ = load_distillation(Path(result.checkpoint))
        assert result.distance == Subject(TrainConfig.from_recipe(recipe), model).distance()["student"]
        assert variant.config.training.loss.cosine == float(result.name)


def test_one_that_fails_is_listed_and_the_others_go_on(recipe: dict[str, Any]) -> None:
    said: list[str] = []
    names = ["eradio_xt", "timm/test_efficientnet"]
    recipe["training"]["resolution"] = 40  # no multiple of what E-RADIO needs
    found = compare("student", of_students(recipe, names), 4, on_failure=said.append)
    assert [result.name for result in found.results] == names[1:]
    assert list(found.failed) == names[:1]
    [line] = said
    assert line == f"eradio_xt: {found.failed['eradio_xt']}"
    assert found.page is not None
    assert found.failed["eradio_xt"] in Path(found.page).read_text(encoding="utf-8").replace("&#x27;", "'")


def test_the_table_has_every_figure_and_the_page_too(recipe: dict[str, Any]) -> None:
    _, variants = of_values(recipe, "training.balancing=naive,adaloss")
    found = compare("training.balancing", variants, 4)
    head, rows = found.table()
    assert [len(row) for row in rows] == [len(head)] * (2 + 1 + 3)  # a constant, two teachers, raw pixels
    assert found.page is not None
    page = Path(found.page)
    assert page == Path(recipe["training"]["output"]) / "compare/training.balancing.html"
    html = page.read_text(encoding="utf-8")
    assert all(cell in html for row in rows for cell in row)
    assert html.count("<svg") == 2
    assert all(line in html for line in found.conditions())
    for result in found.results:
        for distance in result.distance.values():
            assert f"{distance.summary:.4f} / {distance.spatial:.4f}" in {
                cell for row in rows for cell in row
            }
    assert asdict(found)["results"][0]["throughput"]["threads"] == torch.get_num_threads()


def test_closeness_is_zero_for_a_constant_and_one_for_a_copy(recipe: dict[str, Any]) -> None:
    _, variants = of_values(recipe, "training.seed=1,2")
    found = compare("training.seed", variants, 4)
    copy = {name: replace(d, summary=0.0, spatial=0.0) for name, d in found.constant.items()}
    assert replace(found.results[0], distance=found.constant).closeness(found.constant) == pytest.approx(0)
    assert replace(found.results[0], distance=copy).closeness(found.constant) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["radio_vit_ti16", "radio_vit_xs"], "--students: .*'radio_vit_xs' is unknown: the closest are"),
        (["eradio_t", "eradio_s", "eradio_t"], "--students: 'eradio_t' is named twice"),
        (["eradio_t"], "--students: eradio_t has nothing to be compared with"),
        (["eradio_t", ""], "--students: .*'' is unknown"),
    ],
)
def test_students_that_cannot_be_compared(recipe: dict[str, Any], names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_students(recipe, names)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("learning_rate=1,2", "--vary: 'learning_rate=1,2' is not section.key=value,value"),
        ("training.learning_rate", "is not section.key=value,value"),
        ("training.learning_rate=1e-3", "--vary: 1e-3 has nothing to be compared with"),
        ("training.learning_rate=1e-3,1e-3", "training.learning_rate=1e-3 is given twice"),
        ("training.learning_rate=1e-3,0.001", "'1e-3' and '0.001' mean the same"),
        ("training.learning_rate=1e-3,fast", "recipe.training.learning_rate: 'fast'"),
        ("training.learning=1,2", "training.learning: unknown key"),
        ("extract.workers=1,2", "'1' and '2' mean the same"),
        ("training.output=a,b", "'a' and 'b' mean the same"),
        ("training.learning_rate=[1,2", "is no list of YAML values"),
        ("nothing.here=1,2", "unknown section 'nothing'"),
    ],
)
def test_values_that_cannot_be_compared(recipe: dict[str, Any], vary: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        of_values(recipe, vary)


def test_values_may_be_lists(recipe: dict[str, Any]) -> None:
    key, variants = of_values(recipe, "training.resolution=[32, 48],64")
    assert key == "training.resolution"
    assert [variant.name for variant in variants] == ["[32, 48]", "64"]
    assert [variant.config.training.resolution for variant in variants] == [(32, 48), (64, 64)]
    outputs = [Path(variant.config.training.output).name for variant in variants]
    assert outputs == ["training.resolution=-32-48-", "training.resolution=64"]


def test_nothing_is_trained_where_something_is_missing(recipe: dict[str, Any]) -> None:
    _, variants = of_values({**recipe, "data": {"train": recipe["data"]["train"]}}, "training.seed=1,2")
    with pytest.raises(UserError, match=r"data\.held_out: is missing"):
        compare("training.seed", variants, 4)
    _, variants = of_values(recipe, "student.name=radio_vit_ti16,none")
    with pytest.raises(UserError, match="'none' is unknown"):
        compare("student.name", variants, 4)
    assert not Path(recipe["training"]["output"]).exists()


def test_a_run_that_a_signal_ended_ends_the_comparison(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, variants = of_values(recipe, "training.seed=1,2")
    begun: list[str] = []

    def stopped(recipe: dict[str, Any], *_: object) -> Path:
        begun.append(recipe["training"]["output"])
        return Path(begun[-1], "step-00000002")

    monkeypatch.setattr("trainer.compare.train", stopped)
    with pytest.raises(KeyboardInterrupt):
        compare("training.seed", variants, 4)
    assert len(begun) == 1
