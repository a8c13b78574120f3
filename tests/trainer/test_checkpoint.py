from __future__ import annotations

import errno
import io
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from storage_schemas.errors import DataDamage, UserError
from trainer import checkpoint
from trainer.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint

FILES = ("student.safetensors", "adaptors.safetensors", "optimizer.pt", "checkpoint.json")


def _state(seed: int) -> dict[str, Any]:
    """A student, an adaptor and an optimiser that has taken a step."""
    torch.manual_seed(seed)
    student, adaptors = nn.Linear(4, 3), nn.BatchNorm1d(3)
    optimizer = torch.optim.AdamW([*student.parameters(), *adaptors.parameters()])
    adaptors(student(torch.randn(5, 4))).square().sum().backward()
    optimizer.step()
    return {
        "weights": {"student": student.state_dict(), "adaptors": adaptors.state_dict()},
        "optimizer_state": optimizer.state_dict(),
        "meta": {"position": seed * 32, "recipe": {"student": {"name": "é"}, "rate": 1e-3}},
    }


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _holds(path: Path | None, seed: int) -> bool:
    assert path is not None
    return _same(load_checkpoint(path).student, _state(seed)["weights"]["student"])


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    state = _state(1)
    path = save_checkpoint(tmp_path, 100, **state)
    loaded = load_checkpoint(path)
    assert path == tmp_path / "step-00000100"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    assert (loaded.step, loaded.meta) == (100, state["meta"])
    assert _same(loaded.student, state["weights"]["student"])
    assert _same(loaded.adaptors, state["weights"]["adaptors"])
    saved, found = state["optimizer_state"], loaded.optimizer_state
    assert found["param_groups"] == saved["param_groups"]
    assert all(_same(found["state"][i], saved["state"][i]) for i in saved["state"])


def test_the_newest_is_of_the_highest_step(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    assert newest_checkpoint(tmp_path) is None
    for step in (300, 100, 2_000_000_000, 200):
        save_checkpoint(tmp_path, step, **_state(1))
    assert newest_checkpoint(tmp_path) == tmp_path / "step-2000000000"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_an_incomplete_one_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    older = save_checkpoint(tmp_path, 1, **_state(1))
    file = save_checkpoint(tmp_path, 2, **_state(2)) / name
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    assert newest_checkpoint(tmp_path) == older
    with pytest.raises(DataDamage, match=name):
        load_checkpoint(file.parent)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_its_file_named(tmp_path: Path, name: str) -> None:
    file = save_checkpoint(tmp_path, 1, **_state(1)) / name
    data = bytearray(file.read_bytes())
    data[data.index(b'"position": 32') + 13 if name == "checkpoint.json" else len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataDamage, match=rf"{name}.* has digest \w{{64}}, recorded \w{{64}}"):
        load_checkpoint(file.parent)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, **_state(1), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    going_back = save_checkpoint(tmp_path, 1, **_state(1), keep=1)
    assert list(tmp_path.iterdir()) == [going_back]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, **_state(1))
    path = save_checkpoint(tmp_path, 5, **_state(2))
    assert _holds(path, 2)
    assert list(tmp_path.iterdir()) == [path]


def test_of_one_step_the_one_that_replaced_the_other_counts(tmp_path: Path) -> None:
    old = save_checkpoint(tmp_path, 5, **_state(1))
    aside = old.rename(tmp_path / "step-00000005~")
    assert newest_checkpoint(tmp_path) == aside
    new = save_checkpoint(tmp_path / "elsewhere", 5, **_state(2)).rename(old)
    assert newest_checkpoint(tmp_path) == new


class Crash(BaseException):
    """What nothing catches."""


def _crash_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    original, calls = getattr(owner, name), iter(range(1000))

    def crashing(*arguments: Any, **settings: Any) -> Any:
        if next(calls) == call:
            raise Crash
        return original(*arguments, **settings)

    monkeypatch.setattr(owner, name, crashing)


CRASHES = [
    *((checkpoint.safetensors.torch, "save_file", call) for call in (0, 1)),
    (checkpoint.torch, "save", 0),
    *((checkpoint, "_sync", call) for call in range(6)),
    *((Path, "rename", call) for call in (0, 1)),
]


@pytest.mark.parametrize("tidies", [True, False], ids=["unwound", "killed"])
@pytest.mark.parametrize("step", [1, 2], ids=["same-step", "next-step"])
@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: f"{crash[1]}-{crash[2]}")
def test_after_a_crash_anywhere_a_whole_checkpoint_is_there(
    tmp_path: Path, crash: tuple[Any, str, int], step: int, tidies: bool
) -> None:
    save_checkpoint(tmp_path, 1, **_state(1))
    with pytest.MonkeyPatch.context() as patch:
        _crash_at_call(patch, *crash)
        if not tidies:
            patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        with suppress(Crash):  # the second rename comes only where there is something to replace
            save_checkpoint(tmp_path, step, **_state(2))
    newest = newest_checkpoint(tmp_path)
    assert _holds(newest, 1) or _holds(newest, 2)
    final = save_checkpoint(tmp_path, 3, **_state(3), keep=1)
    assert list(tmp_path.iterdir()) == [final]
    assert _holds(newest_checkpoint(tmp_path), 3)


def test_a_full_disk_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save_checkpoint(tmp_path, 1, **_state(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match=f"checkpoint {tmp_path}.*: disk full: .*No space left"):
        save_checkpoint(tmp_path, 1, **_state(2), keep=1)
    assert list(tmp_path.iterdir()) == [older]
    assert _holds(older, 1)


@pytest.mark.parametrize("cause", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_stopped_torch_within_a_write_is_what_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: BaseException
) -> None:
    save = torch.save

    class Stopping(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 100:
                raise cause
            return super().write(data)

    monkeypatch.setattr(checkpoint.torch, "save", lambda state, _: save(state, Stopping()))
    with pytest.raises((OSError, KeyboardInterrupt)) as raised:
        save_checkpoint(tmp_path, 1, **_state(1))
    assert cause in (raised.value, raised.value.__cause__)
    assert not list(tmp_path.iterdir())


def test_weights_that_share_memory_are_named(tmp_path: Path) -> None:
    weight = torch.randn(3, 4)
    with pytest.raises(UserError, match=r"student weights 'a' and 'b' share memory"):
        save_checkpoint(tmp_path, 1, {"student": {"a": weight, "b": weight.T}}, {}, {})
    assert newest_checkpoint(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_weights_of_any_layout_are_taken(tmp_path: Path) -> None:
    weights = {
        "t": torch.randn(3, 4).T,
        "empty": torch.empty(0),
        "none": torch.empty(0, 3),
        "n": torch.tensor(3),
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"student": weights, "adaptors": {}}, {}, {}))
    assert _same(loaded.student, weights)
    assert loaded.adaptors == {}


def test_other_things_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    save_checkpoint(tmp_path, 1, **_state(1), keep=1)
    save_checkpoint(tmp_path, 2, **_state(1), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "step-00000002",
        "step-notes",
    ]
