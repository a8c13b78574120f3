"""What a run starts from: heads of the targets' scale, and a student that another run trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from storage_schemas.errors import UserError
from trainer.checkpoint import load_checkpoint
from trainer.config import TrainConfig
from trainer.distillation import start_from
from trainer.groups import open_groups
from trainer.train import first_model, train


def test_a_trained_student_gets_heads_for_more_teachers_and_keeps_those_it_has(
    recorded: Any, tmp_path: Path
) -> None:
    first = train(recorded.recipe(tmp_path / "one", teachers=["cnn"], steps=2))
    recipe = recorded.recipe(tmp_path / "two", start_from=str(first))
    config = TrainConfig.from_recipe(recipe)
    before, now = load_checkpoint(first), first_model(config, open_groups(config))
    assert list(now.adaptors) == ["cnn", "vit"]
    heads = {name: value for name, value in now.adaptors.state_dict().items() if name.startswith("cnn.")}
    for mine, theirs in ((now.student.state_dict(), before.student), (heads, before.adaptors)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    other = TrainConfig.from_recipe({**recipe, "student": {"name": "eradio_xt"}})
    with pytest.raises(UserError, match=r"student 'radio_vit_ti16' .*; the recipe has 'eradio_xt'"):
        start_from(now, first, other)


def test_an_output_folder_stands_for_its_newest_checkpoint(recorded: Any, tmp_path: Path) -> None:
    first = train(recorded.recipe(tmp_path / "one", steps=2))
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path / "two", start_from=str(first.parent)))
    model, before = first_model(config, open_groups(config)), load_checkpoint(first)
    assert all(torch.equal(model.student.state_dict()[name], value) for name, value in before.student.items())


def test_what_cannot_be_started_from_is_one_line(recorded: Any, tmp_path: Path) -> None:
    first = train(recorded.recipe(tmp_path / "one", steps=2))
    recipe = recorded.recipe(tmp_path / "two", start_from=str(first), adaptor_hidden=16)
    with pytest.raises(UserError, match=r"start_from: .* its cnn\.\S+ is \[.*\], the recipe's \[.*\]$"):
        train(recipe)
    with pytest.raises(UserError, match=r"start_from: '.*nowhere' holds no checkpoint"):
        train(recorded.recipe(tmp_path / "two", start_from=str(tmp_path / "nowhere")))


def test_known_teachers_keep_their_normalizers_and_no_others_are_taken(recorded: Any, tmp_path: Path) -> None:
    first = train(recorded.recipe(tmp_path / "one", teachers=["cnn"], steps=2, normalizer="phi_s"))
    recipe = recorded.recipe(tmp_path / "two", start_from=str(first), normalizer="phi_s")
    recipe["data"]["train"] = f"{recorded.folder}/shards/train-0.tar"  # of other moments
    config = TrainConfig.from_recipe(recipe)
    before, now = load_checkpoint(first).adaptors, first_model(config, open_groups(config)).adaptors
    assert all(torch.equal(now.state_dict()[name], value) for name, value in before.items())
    assert not torch.equal(now.state_dict()["vit.normalizers.summary.matrix"], torch.eye(64))
    with pytest.raises(
        UserError, match=r"training\.normalizer: .* has 'phi_s', the recipe has 'none'; .* cnn"
    ):
        train(recorded.recipe(tmp_path / "three", start_from=str(first)))
    train(recorded.recipe(tmp_path / "four", start_from=str(first), teachers=["vit"], steps=2))


def test_resuming_needs_no_longer_what_was_started_from(recorded: Any, tmp_path: Path) -> None:
    first = train(recorded.recipe(tmp_path / "one", steps=2))
    recipe = recorded.recipe(tmp_path / "two", steps=2, start_from=str(first))
    second = train(recipe)
    shutil.rmtree(first.parent)
    assert train(recipe, resume=True) == second


def test_first_outputs_are_of_the_targets_scale(recorded: Any, tmp_path: Path) -> None:
    config = TrainConfig.from_recipe(recorded.recipe(tmp_path / "out"))
    groups = open_groups(config)
    predicted = first_model(config, groups).predict(torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8))
    for name, output in predicted.items():
        reader = groups[0].reader
        for kind, known in reader.store.moments(name, reader.shards).items():
            power = getattr(output, kind).square().sum(-1).mean().item()
            expected = float((known.mean**2).sum() + known.covariance.trace())
            assert 0.3 * expected < power < 3 * expected
